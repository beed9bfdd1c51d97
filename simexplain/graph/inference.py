"""The AVSL graph of pairs of images: top-down inference and what it attributes (section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simexplain.errors import ModelError


@dataclass(frozen=True)
class Rows:
    """What is known of ``M`` images, level by level from the lowest.

    Attributes:
        embeddings: Per level ``(M,r)``, unit rows.
        certainties: Per level ``(M,r)``, how focused each node's CAM is.
    """

    embeddings: tuple[Tensor, ...]
    certainties: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.embeddings[0])

    def __getitem__(self, which: slice | Tensor) -> Rows:
        """The same for some of the images."""
        return self._each(lambda level: level[which])

    def to(self, like: Tensor) -> Rows:
        """The same in the type and on the device of a tensor."""
        return self._each(lambda level: level.to(like))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Rows:
        return Rows(
            tuple(change(level) for level in self.embeddings),
            tuple(change(level) for level in self.certainties),
        )


def unpack(packed: Tensor, widths: Sequence[int]) -> Rows:
    """The counterpart of ``pack``.

    Raises:
        ModelError: If the rows are not of this model's width.
    """
    if packed.dim() != 2 or packed.shape[1] != 2 * sum(widths):
        raise ModelError(
            f"Expected embeddings of shape (M, {2 * sum(widths)}) from this AVSL model, got "
            f"{tuple(packed.shape)}; embed the images with the same model."
        )
    parts = torch.split(packed, [*widths, *widths], dim=1)
    return Rows(parts[: len(widths)], parts[len(widths) :])


@dataclass(frozen=True)
class Graph:
    """The part of the AVSL graph that all pairs share.

    Attributes:
        edges: For each pair of adjacent levels the normalised edges ``(r_low,r_high)``,
            non-negative; a column sums to one, or to zero where a node has no edge.
        slopes: For each level but the lowest ``(r,)``: what multiplies both certainties in Eq. 6.
        offsets: Likewise what is added; infinite for nodes that are always their own.
        bottom: Nodes of the lowest level.
    """

    edges: tuple[Tensor, ...]
    slopes: tuple[Tensor, ...]
    offsets: tuple[Tensor, ...]
    bottom: int

    @property
    def widths(self) -> tuple[int, ...]:
        """Nodes of each level, from the lowest."""
        return (self.bottom, *(edges.shape[1] for edges in self.edges))

    def to(self, like: Tensor) -> Graph:
        """The same in the type and on the device of a tensor."""
        edges, slopes, offsets = (
            tuple(part.to(like) for part in parts)
            for parts in (self.edges, self.slopes, self.offsets)
        )
        return replace(self, edges=edges, slopes=slopes, offsets=offsets)

    def detached(self) -> Graph:
        """The same without an autograd graph."""
        edges, slopes, offsets = (
            tuple(part.detach() for part in parts)
            for parts in (self.edges, self.slopes, self.offsets)
        )
        return replace(self, edges=edges, slopes=slopes, offsets=offsets)

    def reliability(self, level: int, q: Tensor, g: Tensor) -> Tensor:
        """``p`` in (0, 1] of Eq. 5 and 6 from two certainties of any shapes that broadcast.

        The lowest level has nothing below it that could stand in, so there ``p`` is 1.
        """
        if level == 0:
            return torch.ones_like(q * g)
        return torch.sigmoid(self.slopes[level - 1] * (q * g) + self.offsets[level - 1])


def normalised_edges(edges: Tensor, k: int, *, ties: str, epsilon: float) -> Tensor:
    """The ``k`` strongest positive edges of each higher node, scaled to sum one (Eq. 7, 8).

    Args:
        edges: ``(r_low,r_high)``, of any sign; negative ones count as none.
        k: How many lower nodes may stand in for a higher one.
        ties: ``first`` keeps exactly ``k``; ``all`` keeps every edge within 1e-8 of the k-th.
        epsilon: Added to each sum. With 0 a column sums to exactly one.

    Returns:
        ``(r_low,r_high)``; a column without a positive edge stays zero.
    """
    positive = edges.relu()
    k = min(k, len(edges))
    if ties == "all":
        kept = positive >= positive.topk(k, dim=0).values[-1:] - 1e-8
    else:
        order = positive.argsort(dim=0, descending=True, stable=True)
        kept = torch.zeros_like(positive, dtype=torch.bool).scatter(0, order[:k], True)
    chosen = positive * kept
    total = chosen.sum(dim=0, keepdim=True) + epsilon
    return chosen / torch.where(total > 0, total, torch.ones_like(total))


@dataclass(frozen=True)
class PairGraph:
    """The graph of pairs; every list runs from the lowest level, every tensor is ``(*S,r)``.

    Attributes:
        nodes: ``delta`` of Eq. 1, squared differences of unit embeddings.
        reliabilities: ``p`` of Eq. 6; 1 at the lowest level.
        rectified: ``delta hat`` of Eq. 8.
        inflows: What weight the rectified node has in the distance; 1 at the top.
        sensitivities: ``lambda`` of Eq. 11, the derivative of the distance by ``delta``.
    """

    nodes: tuple[Tensor, ...]
    reliabilities: tuple[Tensor, ...]
    rectified: tuple[Tensor, ...]
    inflows: tuple[Tensor, ...]
    sensitivities: tuple[Tensor, ...]

    @property
    def distance(self) -> Tensor:
        """The overall distance ``(*S)``: the sum of the rectified nodes at the top."""
        return self.rectified[-1].sum(dim=-1)

    @property
    def contributions(self) -> tuple[Tensor, ...]:
        """``lambda * delta`` per level, ``(*S,r)``; all together they are the distance."""
        return tuple(s * d for s, d in zip(self.sensitivities, self.nodes, strict=True))


def infer(graph: Graph, q: Rows, g: Rows) -> PairGraph:
    """Infers pairs ``(q[i], g[i])``; rows of shapes ``(*S,r)`` that broadcast serve as well.

    Differentiable in every input. For many pairs take the functions for all pairs: this one keeps
    every intermediate value.
    """
    levels = range(len(graph.widths))
    nodes = tuple((q.embeddings[n] - g.embeddings[n]).square() for n in levels)
    sure = tuple(graph.reliability(n, q.certainties[n], g.certainties[n]) for n in levels)
    rectified = [nodes[0]]
    for level in levels[1:]:
        lower = rectified[-1] @ graph.edges[level - 1]
        rectified.append(sure[level] * nodes[level] + (1 - sure[level]) * lower)
    inflows = [torch.ones_like(nodes[-1])]
    for level in reversed(levels[1:]):
        inflows.append((inflows[-1] * (1 - sure[level])) @ graph.edges[level - 1].T)
    inflows.reverse()
    sensitivities = tuple(flow * p for flow, p in zip(inflows, sure, strict=True))
    return PairGraph(nodes, sure, tuple(rectified), tuple(inflows), sensitivities)


def broadcast(graph: Graph, q: Rows, g: Rows) -> Tensor:
    """Distances ``(Q,G)`` by plain broadcasting, differentiable in every input.

    Needs several tensors of ``Q * G * r`` numbers: for training batches, and as the reference.
    """
    return infer(graph, _expanded(q, 1), _expanded(g, 0)).distance


def _expanded(rows: Rows, axis: int) -> Rows:
    return Rows(
        tuple(level.unsqueeze(axis) for level in rows.embeddings),
        tuple(level.unsqueeze(axis) for level in rows.certainties),
    )
