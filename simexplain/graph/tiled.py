"""Exact distances of many pairs in small buffers that are used again (Eq. 8 of AVSL)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from simexplain.errors import ModelError
from simexplain.graph.inference import Graph, Rows

PROCESSOR_TILE, ACCELERATOR_TILE = 1024, 65536
"""Pairs at a time: on a processor what stays in its cache, elsewhere what is worth a launch."""


class ExactPairs:
    """Distances of pairs of two sets of images, a tile of pairs at a time.

    The nodes are subtracted first and multiplied by the edges afterwards. To multiply once and
    scale (``a + b - 2ab``) would save two passes of elementwise work in a hundred, and would lose
    that identical images have distance 0 and that nothing cancels.

    Four buffers of ``tile * r`` numbers are all that is allocated, ``r`` the widest level. Not to
    be used by two threads at once.

    Args:
        graph: The graph; taken to the type and device of the queries.
        q: Queries, ``Q`` rows.
        g: Gallery, ``G`` rows.
        tile: Pairs at a time, at least 1; None for a choice by device.

    Attributes:
        tile: Pairs at a time.

    Raises:
        ModelError: If the widths of the rows are not those of the graph, or no pair fits a tile.
    """

    def __init__(self, graph: Graph, q: Rows, g: Rows, tile: int | None = None) -> None:
        like = q.embeddings[0]
        if tile is None:
            tile = PROCESSOR_TILE if like.device.type == "cpu" else ACCELERATOR_TILE
        if tile < 1:
            raise ModelError(f"Expected a tile of at least 1 pair, got {tile}; take 1024.")
        for rows in (q, g):
            check_widths(graph, rows)
        self._q, self._g = q, g.to(like)
        self._graph = graph.to(like).detached()
        self.tile = tile
        self._space = like.new_empty(4, tile * max(graph.widths))

    @torch.no_grad()
    def block(self, queries: slice, gallery: slice, out: Tensor) -> None:
        """Writes the distances of all pairs of two slices.

        Args:
            queries: Which queries; both ends given.
            gallery: Which images of the gallery; both ends given.
            out: ``(queries, gallery)``, written; may be a view.
        """
        columns = gallery.stop - gallery.start
        # Equal parts: a small rest would waste most of a matrix product.
        parts = max(1, -(-columns // self.tile))
        width = max(1, -(-columns // parts))
        height = max(1, self.tile // width)
        for top in range(queries.start, queries.stop, height):
            rows = slice(top, min(top + height, queries.stop))
            below = slice(rows.start - queries.start, rows.stop - queries.start)
            for left in range(gallery.start, gallery.stop, width):
                part = slice(left, min(left + width, gallery.stop))
                beside = slice(part.start - gallery.start, part.stop - gallery.start)
                out[below, beside] = self._infer(rows, part, part.stop - part.start)

    @torch.no_grad()
    def listed(self, queries: slice, candidates: Tensor) -> Tensor:
        """Distances of each query to its own list of the gallery.

        Args:
            queries: Which queries; both ends given.
            candidates: Rows of the gallery ``(queries, S)``.

        Returns:
            ``(queries, S)``.
        """
        out = self._space.new_empty(candidates.shape)
        width = max(1, min(candidates.shape[1], self.tile))
        height = max(1, self.tile // width)
        for top in range(0, len(candidates), height):
            rows = slice(queries.start + top, min(queries.start + top + height, queries.stop))
            for left in range(0, candidates.shape[1], width):
                chosen = candidates[top : top + height, left : left + width]
                distances = self._infer(rows, chosen, chosen.shape[1])
                out[top : top + height, left : left + width] = distances
        return out

    def _infer(self, queries: slice, gallery: slice | Tensor, columns: int) -> Tensor:
        """Distances ``(queries, columns)``; see :func:`simexplain.graph.inference.infer`."""
        shape = (queries.stop - queries.start, columns)
        hat = self._nodes(0, queries, gallery, shape)
        for level, edges in enumerate(self._graph.edges, start=1):
            lower = self._buffer(1, (hat.shape[0] * hat.shape[1], edges.shape[1]))
            torch.mm(hat.flatten(0, 1), edges, out=lower)
            doubt = self._doubts(level, queries, gallery, shape)
            nodes = self._nodes(level, queries, gallery, shape)  # where hat was
            hat = torch.lerp(nodes, lower.view_as(nodes), doubt, out=nodes)
        return hat.sum(dim=2)

    def _nodes(
        self, level: int, queries: slice, gallery: slice | Tensor, shape: tuple[int, int]
    ) -> Tensor:
        """``delta`` of a level, ``(*shape,r)``."""
        own = self._q.embeddings[level][queries].unsqueeze(1)
        other = self._taken(self._g.embeddings[level], gallery)
        out = self._buffer(0, (*shape, own.shape[2]))
        return torch.sub(other, own, out=out).square_()

    def _doubts(
        self, level: int, queries: slice, gallery: slice | Tensor, shape: tuple[int, int]
    ) -> Tensor:
        """``1 - p`` of a level, ``(*shape,r)``; an infinite offset makes it exactly 0."""
        slopes, offsets = self._graph.slopes[level - 1], self._graph.offsets[level - 1]
        own = self._q.certainties[level][queries].unsqueeze(1) * -slopes
        other = self._taken(self._g.certainties[level], gallery)
        out = self._buffer(2, (*shape, own.shape[2]))
        return torch.addcmul(-offsets, other, own, out=out).sigmoid_()

    def _taken(self, level: Tensor, which: slice | Tensor) -> Tensor:
        """Rows of the gallery, as a view or gathered into a buffer."""
        if isinstance(which, slice):
            return level[which]
        out = self._buffer(3, (which.numel(), level.shape[1]))
        torch.index_select(level, 0, which.flatten(), out=out)
        return out.view(*which.shape, level.shape[1])

    def _buffer(self, number: int, shape: tuple[int, ...]) -> Tensor:
        return self._space[number, : math.prod(shape)].view(shape)


def check_widths(graph: Graph, rows: Rows) -> None:
    """Raises a ModelError if rows have other levels than the graph."""
    for parts in (rows.embeddings, rows.certainties):
        widths = tuple(level.shape[1] for level in parts)
        if widths != graph.widths:
            raise ModelError(
                f"Expected rows of widths {graph.widths} for this graph, got {widths}; embed the "
                "images with the model that the graph is from."
            )


@torch.no_grad()
def exact(graph: Graph, q: Rows, g: Rows | None = None, *, tile: int | None = None) -> Tensor:
    """Exact distances of all pairs, with no tensor of ``Q * G * r`` numbers.

    Args:
        graph: The graph.
        q: Queries, ``Q`` rows.
        g: Gallery, ``G`` rows. None or ``q`` itself: all pairs among the queries, where each pair
            is computed once and mirrored.
        tile: Pairs at a time; None for a choice by device.

    Returns:
        ``(Q,G)``, not negative; exactly 0 for identical images. Outside of autograd.

    Raises:
        ModelError: If the widths of the rows are not those of the graph, or no pair fits a tile.
    """
    symmetric = g is None or g is q
    gallery = q if g is None else g
    pairs = ExactPairs(graph, q, gallery, tile)
    out = q.embeddings[0].new_empty(len(q), len(gallery))
    if not symmetric:
        pairs.block(slice(0, len(q)), slice(0, len(gallery)), out)
        return out
    # Queries whose remaining columns fit a tile together go together.
    height = max(1, pairs.tile // max(1, len(q)))
    for top in range(0, len(q), height):
        rows = slice(top, min(top + height, len(q)))
        pairs.block(rows, slice(top, len(q)), out[rows, top:])
        # Products round by where in a tile they are: the square on the diagonal is mirrored too.
        out[rows, rows] = out[rows, rows].triu() + out[rows, rows].triu(1).T
        out[rows.stop :, rows] = out[rows, rows.stop :].T
    return out


@torch.no_grad()
def gathered(
    graph: Graph, q: Rows, g: Rows, candidates: Tensor, *, tile: int | None = None
) -> Tensor:
    """Exact distances of each query to its own list of the gallery.

    Args:
        graph: The graph.
        q: Queries, ``Q`` rows.
        g: Gallery, ``G`` rows.
        candidates: Rows of the gallery ``(Q,S)``, integers in [0, G).
        tile: Pairs at a time; None for a choice by device.

    Returns:
        ``(Q,S)``.

    Raises:
        ModelError: If the lists are not one a query, or the widths are not those of the graph.
    """
    if candidates.dim() != 2 or len(candidates) != len(q):
        raise ModelError(
            f"Expected candidates of shape ({len(q)}, S), got {tuple(candidates.shape)}; give a "
            "list of as many gallery rows for each query."
        )
    return ExactPairs(graph, q, g, tile).listed(slice(0, len(q)), candidates)
