"""Exact nearest neighbours by the distance of the AVSL graph, most pairs never computed.

A surrogate distance gives a short list, the exact distance orders it, and a bound proves that
nothing left out is nearer; where the bound does not, it names what else has to be computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from simexplain.errors import ModelError
from simexplain.graph.inference import Graph, Rows
from simexplain.graph.surrogate import Surrogate
from simexplain.graph.tiled import ExactPairs

LEAST_SHORTLIST = 32


class Index(Protocol):
    """The interface of an index over ``Surrogate.vectors(gallery)``, as faiss has it."""

    def search(self, vectors: Any, n: int, /) -> tuple[Any, Any]:
        """Squared distances and rows ``(Q,n)`` for float32 vectors ``(Q,F)``; -1 for none."""


@dataclass(frozen=True)
class Neighbours:
    """The nearest images of the gallery.

    Attributes:
        distances: ``(Q,k)``, ascending.
        indices: Rows of the gallery ``(Q,k)``; of equal distances the smaller row first.
        margins: ``(Q,)``, a lower bound on every distance left out, minus the k-th distance. Not
            negative: the result is proven. Infinite where nothing was left out.
        reranked: ``(Q,)``, how many exact distances were computed.
    """

    distances: Tensor
    indices: Tensor
    margins: Tensor
    reranked: Tensor


@torch.no_grad()
def neighbours(
    graph: Graph,
    q: Rows,
    g: Rows | None,
    k: int,
    *,
    shortlist: int | None = None,
    index: Index | None = None,
    exclude_self: bool = False,
    block: int = 512,
    tile: int | None = None,
) -> Neighbours:
    """The ``k`` nearest images of a gallery for each query, exact up to rounding.

    Needs ``block * G`` numbers twice over and the surrogate vectors of the gallery, never
    ``Q * G``. Whatever the index finds, the result is the same: its list saves time alone.

    Args:
        graph: The graph.
        q: Queries, ``Q`` rows.
        g: Gallery, ``G`` rows; None for the queries themselves.
        k: How many, from 0 to ``G``.
        shortlist: How many are computed exactly before anything is proven, at least ``k``. None
            for ``2 * k`` and no fewer than 32.
        index: An index over ``Surrogate.build(graph, g).vectors(g)``, exact or approximate.
        exclude_self: Whether row ``i`` of the gallery is not a neighbour of query ``i``.
        block: Queries at a time.
        tile: Pairs at a time where distances are exact; None for a choice by device.

    Raises:
        ModelError: If there are fewer than ``k`` neighbours, or the rows do not fit together.
    """
    gallery = q if g is None else g.to(q.embeddings[0])
    others = len(gallery) - exclude_self
    if exclude_self and len(gallery) != len(q):
        raise ModelError(
            f"Expected as many queries as gallery images to exclude each itself, got {len(q)} and "
            f"{len(gallery)}; give the same images, or set exclude_self to False."
        )
    if not 0 <= k <= max(0, others):
        raise ModelError(
            f"Expected k from 0 to the {max(0, others)} images that can be neighbours, got {k}; "
            "ask for fewer."
        )
    if k == 0 or len(q) == 0:
        return _nothing(q, k)
    if block < 1:
        raise ModelError(f"Expected a block of at least 1 query, got {block}; take 512.")
    surrogate = Surrogate.build(graph, gallery)
    size = min(others, max(k, shortlist or max(2 * k, LEAST_SHORTLIST)))
    search = _Search(surrogate, q, gallery, k, size, index, exclude_self, tile)
    parts = [search(slice(s, min(s + block, len(q)))) for s in range(0, len(q), block)]
    return Neighbours(*(torch.cat([part[n] for part in parts]) for n in range(4)))


def _nothing(q: Rows, k: int) -> Neighbours:
    """The result without queries."""
    like = q.embeddings[0]
    return Neighbours(
        like.new_empty(len(q), k),
        torch.empty(len(q), k, dtype=torch.long, device=like.device),
        like.new_full((len(q),), torch.inf),
        torch.zeros(len(q), dtype=torch.long, device=like.device),
    )


class _Search:
    """One block of queries after the other."""

    def __init__(
        self,
        surrogate: Surrogate,
        q: Rows,
        g: Rows,
        k: int,
        size: int,
        index: Index | None,
        exclude_self: bool,
        tile: int | None,
    ) -> None:
        self._surrogate, self._q, self._g = surrogate, q, g
        self._k, self._size, self._index, self._others_only = k, size, index, exclude_self
        self._pairs = ExactPairs(surrogate.graph, q, g, tile)
        self._kinds = _kinds(g)
        if index is None:
            self._vectors = surrogate.vectors(g)
            self._squares = self._vectors.square().sum(dim=1)

    def __call__(self, queries: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Distances, rows, margins and counts of a block."""
        if self._index is None:
            rows, bounds = self._shortlist(queries)
        else:
            rows, bounds = self._looked_up(queries)
        rows = rows.sort(dim=1).values  # so that a stable sort by distance breaks ties by row
        valid = rows >= 0
        exact = self._pairs.listed(queries, rows.clamp_min(0))
        exact = torch.where(valid, self._levelled(rows.clamp_min(0), exact), torch.inf)
        order = exact.argsort(dim=1, stable=True)[:, : self._k]
        candidates = (exact.gather(1, order), rows.gather(1, order))
        margins = bounds - candidates[0][:, -1]
        counts = valid.sum(dim=1)
        open_ = (~(margins > 0)).nonzero().squeeze(1)
        if len(open_):
            self._prove(queries, open_, (rows, exact), (*candidates, margins, counts))
        return (*candidates, margins, counts)

    def _shortlist(self, queries: slice) -> tuple[Tensor, Tensor]:
        """The nearest by surrogate ``(B,S)`` and a lower bound on all other distances ``(B,)``."""
        vectors = self._surrogate.vectors(self._q[queries])
        own = vectors.square().sum(dim=1)
        near = torch.addmm(self._squares, vectors, self._vectors.T, alpha=-2)
        near.add_(own.unsqueeze(1))
        self._without_self(near, queries)
        more = min(self._size + 1, near.shape[1])
        values, rows = near.topk(more, dim=1, largest=False)
        if more == self._size:
            return rows, torch.full_like(own, torch.inf)
        slack = 2 * self._surrogate.unit * (own + self._squares.amax())
        ratios = self._surrogate.ratios(self._q[queries])
        least = (values[:, -1] - slack) * ratios * (1 - 2 * self._surrogate.unit)
        # The image itself comes last where it is excluded; it bounds nothing.
        return rows[:, :-1], torch.where(values[:, -1].isinf(), torch.inf, least)

    def _looked_up(self, queries: slice) -> tuple[Tensor, Tensor]:
        """The list of the index ``(B,S)``, -1 for unused entries; it gives no bound."""
        assert self._index is not None
        vectors = self._surrogate.vectors(self._q[queries])
        query_rows = vectors.to("cpu", torch.float32).contiguous().numpy()
        candidates = self._index.search(query_rows, self._size + self._others_only)[1]
        rows = torch.as_tensor(candidates, dtype=torch.long).to(vectors.device)
        useful = (rows >= 0) & (rows < len(self._g))
        if self._others_only:
            useful &= rows != torch.arange(queries.start, queries.stop, device=rows.device)[:, None]
        rows = torch.where(useful, rows, -1).sort(dim=1).values
        again = rows[:, 1:] == rows[:, :-1]
        rows[:, 1:] = torch.where(again, -1, rows[:, 1:])
        missing = max(0, self._k - rows.shape[1])
        rows = torch.nn.functional.pad(rows, (0, missing), value=-1)
        return rows, vectors.new_full((len(vectors),), -torch.inf)

    def _levelled(self, rows: Tensor, exact: Tensor) -> Tensor:
        """Gives identical images of the gallery the same distance, as if it never rounded.

        A product rounds by where in a tile it is, and ties would be broken by that.

        Args:
            rows: Rows of the gallery ``(B,S)``, ascending.
            exact: Their distances ``(B,S)``.
        """
        if self._kinds is None:
            return exact
        kinds, order = self._kinds[rows].sort(dim=1, stable=True)
        index = torch.arange(kinds.shape[1], device=kinds.device).expand_as(kinds)
        again = torch.nn.functional.pad(kinds[:, 1:] == kinds[:, :-1], (1, 0))
        first = torch.where(again, 0, index).cummax(dim=1).values
        return exact.scatter(1, order, exact.gather(1, order.gather(1, first)))

    def _without_self(self, values: Tensor, queries: slice) -> None:
        if self._others_only:
            values[:, queries].fill_diagonal_(torch.inf)

    def _prove(
        self,
        queries: slice,
        open_: Tensor,
        listed: tuple[Tensor, Tensor],
        result: tuple[Tensor, Tensor, Tensor, Tensor],
    ) -> None:
        """Computes all that may still be among the nearest of the queries left open, in place."""
        distances, indices, margins, counts = result
        block = self._q[queries][open_]
        bounds = self._surrogate.lower_bounds(block, self._g)
        if self._others_only:
            bounds.scatter_(1, (open_ + queries.start).unsqueeze(1), torch.inf)
        for index, row in enumerate(open_.tolist()):
            rows, exact = (part[row] for part in listed)
            rows, exact = rows[rows >= 0], exact[rows >= 0]
            bound = bounds[index]
            bound[rows] = torch.inf
            near = (bound <= distances[row, -1]) & bound.isfinite()
            extra = near.nonzero().squeeze(1)
            at = queries.start + row
            rows = torch.cat((rows, extra))
            new = self._pairs.listed(slice(at, at + 1), extra.unsqueeze(0))[0]
            rows, by_row = rows.sort()
            exact = self._levelled(rows[None], torch.cat((exact, new))[by_row][None])[0]
            exact, order = exact.sort(stable=True)
            distances[row], indices[row] = exact[: self._k], rows[order[: self._k]]
            bound[extra] = torch.inf
            margins[row] = bound.amin() - distances[row, -1]
            counts[row] = len(rows)


def _kinds(g: Rows) -> Tensor | None:
    """A number for each image of the gallery, equal for identical ones; None if none are.

    Integer sums wrap but never round, so that identical rows have equal sums in any order.
    """
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(len(g), dtype=torch.long, device=g.embeddings[0].device)
    for level in (*g.embeddings, *g.certainties):
        bits = (level + 0.0).view(torch.int32 if level.element_size() == 4 else torch.int64)
        factors = torch.randint(-(2**62), 2**62, bits.shape[1:], generator=generator) * 2 + 1
        total += (bits * factors.to(bits.device)).sum(dim=1)
    ordered = total.sort().values
    return total if (ordered[1:] == ordered[:-1]).any() else None
