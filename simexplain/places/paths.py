"""What the autograd graph of one forward pass states exactly: what everything passes, and where."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from simexplain.places.rules import Step, placed
from simexplain.places.spans import Place

Vertex = tuple[Any, int]
"""A node of the autograd graph and which of its outputs."""


class Paths:
    """The graph from an embedding down to the picture, read once."""

    def __init__(self, embeddings: Tensor, picture: Tensor, leaves: Sequence[Tensor] = ()) -> None:
        """Reads the graph.

        Args:
            embeddings: The result of the pass.
            picture: The leaf tensor that the network was given.
            leaves: Further tensors at which the graph of the picture's content begins.
        """
        self._order: list[Vertex] = []
        self._reaching: set[Vertex] = set()
        self._root = get_gradient_edge(picture).node
        self._ends = {self._root, *(get_gradient_edge(leaf).node for leaf in leaves)}
        if embeddings.requires_grad:
            start = get_gradient_edge(embeddings)
            self._order = _in_order((start.node, start.output_nr))

    def main(self) -> set[Vertex]:
        """The vertices on every way from the embedding to the picture.

        In a topological order a vertex lies on all ways just when no edge from before it leads
        past it.
        """
        reaching = self._reaching
        for vertex in self._order:
            if vertex[0] in self._ends or any(after in reaching for after in _next(vertex)):
                reaching.add(vertex)
        ordered = [vertex for vertex in reversed(self._order) if vertex in reaching]
        number = {vertex: position for position, vertex in enumerate(ordered)}
        passed, far = set(), 0
        for position, vertex in enumerate(ordered):
            if far <= position:
                passed.add(vertex)
            beyond = [number[after] for after in _next(vertex) if after in number]
            far = max([far, *beyond, len(ordered) if vertex[0] in self._ends else 0])
        return passed

    def is_chained(self, upper: Vertex, lower: set[Vertex]) -> bool:
        """Whether one operation after the other leads from a vertex to one of others.

        Args:
            upper: A vertex that everything passes, as found by :meth:`main`.
            lower: Such vertices.
        """
        while upper not in lower:
            ways = [after for after in _next(upper) if after in self._reaching]
            if len(ways) != 1:
                return False
            (upper,) = ways
        return True

    def above(self, main: set[Vertex], layers: set[Vertex]) -> list[Vertex]:
        """What everything passes after the last layer that it does, made with layers in between.

        Args:
            main: What everything passes.
            layers: What layers give, and what those of ``main`` are called with.

        Returns:
            The last one first.
        """
        wide = {vertex for vertex in layers if len(_shape(vertex)) > 2}
        lower, found = wide & main, []
        for vertex in reversed(self._order):
            if vertex in lower:
                break
            if vertex in main and len(_shape(vertex)) > 2 and self._between(vertex, lower, wide):
                found.append(vertex)
        return found

    def _between(self, upper: Vertex, lower: set[Vertex], others: set[Vertex]) -> bool:
        """Whether one of others lies on a way from a vertex down to the next of some."""
        seen, ahead = {upper}, [upper]
        while ahead:
            vertex = ahead.pop()
            if vertex in lower:
                continue
            if vertex in others:
                return True
            new = [v for v in _next(vertex) if v in self._reaching and v not in seen]
            seen.update(new)
            ahead += new
        return False

    def places(self) -> dict[Vertex, Place]:
        """Where the numbers of tensors lie in the picture, for all that local operations made."""
        known: dict[Vertex, Place] = {}
        for vertex in self._order:
            node, number = vertex
            if node is self._root:
                known[vertex] = Place.of_image(_shape(vertex))
                continue
            before = [None if after[0] is None else after for after in node.next_functions]
            given = {
                position: known[after] for position, after in enumerate(before) if after in known
            }
            if given:
                shapes = tuple(None if after is None else _shape(after) for after in before)
                step = Step(node, number, _shape(vertex), given, shapes)
                # What nodes keep differs between versions of torch; unknown places need a proof.
                with suppress(ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
                    if (position := placed(step)) is not None:
                        known[vertex] = position
        return known


def _next(vertex: Vertex) -> list[Vertex]:
    return [(node, nr) for node, nr in vertex[0].next_functions if node is not None]


def _in_order(start: Vertex) -> list[Vertex]:
    """All vertices that can be reached, each after those that it leads to."""
    order: list[Vertex] = []
    seen = {start}
    stack = [(start, iter(_next(start)))]
    while stack:
        vertex, ahead = stack[-1]
        following = next((after for after in ahead if after not in seen), None)
        if following is None:
            order.append(vertex)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(_next(following))))
    return order


def _shape(vertex: Vertex) -> tuple[int, ...]:
    """The shape of what a vertex gave."""
    node, number = vertex
    if hasattr(node, "variable"):
        return tuple(int(side) for side in node.variable.shape)
    return tuple(int(side) for side in node._input_metadata[number].shape)
