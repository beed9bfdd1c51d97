"""Exact nearest neighbours by the distance of the AVSL graph, most pairs never computed.

A surrogate distance gives a short list, the exact distance orders it, and a bound proves that
nothing left out is nearer; where the bound does not, it names what else has to be computed.

Equation 11 writes the distance as ``D(x,y) = sum of lambda(x,y) * delta(x,y)`` over all nodes, with
``lambda >= 0``. The sensitivities vary little over pairs. Their means give the vectors; what they
are at least, for one query and all certainties that the gallery has, gives the bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from simexplain.errors import ModelError
from simexplain.graph.inference import Graph, Rows, infer
from simexplain.graph.tiled import ExactPairs, check_widths

SAMPLED_PAIRS = 2048


@dataclass(frozen=True)
class Surrogate:
    """A squared Euclidean distance in place of the distance of the graph.

    The bounds allow for the rounding of products at the full precision of their type
    (``torch.get_float32_matmul_precision() == "highest"``, the default).

    Attributes:
        graph: The graph.
        weights: Mean sensitivities per level ``(r,)``, not negative.
        centre: Mean embedding of the gallery per level ``(r,)``. No distance changes by it, and
            without it products would lose digits.
        least: Smallest certainty of the gallery per level ``(r,)``.
        most: Largest certainty of the gallery per level ``(r,)``.
    """

    graph: Graph
    weights: tuple[Tensor, ...]
    centre: tuple[Tensor, ...]
    least: tuple[Tensor, ...]
    most: tuple[Tensor, ...]

    @classmethod
    @torch.no_grad()
    def build(
        cls, graph: Graph, g: Rows, *, pairs: int = SAMPLED_PAIRS, seed: int = 0
    ) -> Surrogate:
        """Takes the statistics of a gallery.

        Args:
            graph: The graph; taken to the type and device of the gallery.
            g: Gallery, at least one row.
            pairs: How many random pairs the means are taken of.
            seed: Seed of the pairs; PyTorch's own random state is not used.

        Raises:
            ModelError: If the gallery is empty or of other widths than the graph.
        """
        check_widths(graph, g)
        if not len(g):
            raise ModelError("Expected a gallery of at least 1 image, got none; add images to it.")
        graph = graph.to(g.embeddings[0]).detached()
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(g), (2, pairs), generator=generator)
        left, right = (g[rows.to(g.embeddings[0].device)] for rows in chosen)
        return cls(
            graph,
            tuple(level.mean(dim=0) for level in infer(graph, left, right).sensitivities),
            tuple(level.mean(dim=0) for level in g.embeddings),
            tuple(level.amin(dim=0) for level in g.certainties),
            tuple(level.amax(dim=0) for level in g.certainties),
        )

    @property
    def unit(self) -> float:
        """What the rounding of the sums here, or of one exact distance, is at most, relatively.

        A sum of ``n`` products is wrong by at most ``n * eps / 2`` of the sum of their absolute
        values, in whatever order it is taken (Higham, Accuracy and Stability, section 3.1). Here
        ``n`` counts all nodes, the products of a level that are added up, and a few steps more.
        """
        terms = sum(self.graph.widths) + 8 * len(self.graph.widths) + 64
        return terms * torch.finfo(self.weights[0].dtype).eps / 2

    @torch.no_grad()
    def vectors(self, rows: Rows) -> Tensor:
        """Vectors ``(M, sum of r)``; their squared L2 distances are nearly those of the graph.

        They serve in any index for Euclidean distances.
        """
        check_widths(self.graph, rows)
        return torch.cat(
            [
                (level - centre) * weights.sqrt()
                for level, centre, weights in zip(
                    rows.embeddings, self.centre, self.weights, strict=True
                )
            ],
            dim=1,
        )

    @torch.no_grad()
    def ratios(self, rows: Rows) -> Tensor:
        """What part of its surrogate each distance is at least, ``(M,)`` in [0, 1].

        The least that each sensitivity can be over the whole gallery, divided by its mean; the
        least of it over all nodes. Nodes of mean 0 add nothing to the surrogate.
        """
        least = torch.full_like(rows.embeddings[0][:, 0], torch.inf)
        for level, flow in enumerate(self._flows(rows)):
            part = flow * self._ends(level, rows)[0] if level else flow
            weights = self.weights[level]
            part = torch.where(weights > 0, part / weights, torch.inf)
            least = torch.minimum(least, part.amin(dim=1))
        # Without any weight the surrogate is 0, and so is the bound.
        return torch.where(least.isfinite(), least * (1 - self.unit), 0.0).clamp_max(1)

    @torch.no_grad()
    def lower_bounds(self, rows: Rows, g: Rows, *, tile: int = 1024) -> Tensor:
        """What each distance is at least: five matrix products a level, two at the lowest.

        The inflow of a node is replaced by the least it can be for the query, its reliability by
        a line in the certainty of the gallery image that lies below it, so that both sides
        separate.

        Args:
            rows: Queries, ``M`` rows.
            g: The gallery that this was built of.
            tile: Columns at a time.

        Returns:
            ``(M,G)``; no more than the true distances whatever the rounding, nor than those that
            ``exact`` computes. May be negative.
        """
        bounds = _Sum(rows, self.centre, g, tile)
        for level, flow in enumerate(self._flows(rows)):
            # A node that the sampled pairs give no weight may be left out of a lower bound.
            flow = flow * (self.weights[level] > 0)
            if level == 0:
                bounds.add(level, flow)
                continue
            height, slope, middle = self._line(level, rows)
            span = torch.maximum(self.most[level] - middle, middle - self.least[level])
            height = height - self.unit * (height.abs() + slope.abs() * span)
            bounds.add(level, flow * height)
            bounds.add(level, flow * slope, centre=middle, span=span)
        return bounds.total(self.unit)

    def _flows(self, rows: Rows) -> tuple[Tensor, ...]:
        """What the inflow of each node is at least, per level ``(M,r)``, over the whole gallery.

        All factors are non-negative, so that their least values multiply.
        """
        candidates = [torch.ones_like(rows.embeddings[-1])]
        for level in reversed(range(1, len(self.weights))):
            doubt = self._ends(level, rows)[1]
            candidates.append(
                (candidates[-1] * doubt) @ self.graph.edges[level - 1].T * (1 - self.unit)
            )
        return tuple(reversed(candidates))

    def _ends(self, level: int, rows: Rows) -> tuple[Tensor, Tensor]:
        """The least ``p`` and the least ``1 - p`` of each node over the whole gallery ``(M,r)``.

        ``p`` is monotone in either certainty, so that both are where the certainty of the gallery
        is smallest or largest.
        """
        ends = [self._logits(level, rows, end) for end in (self.least[level], self.most[level])]
        return torch.minimum(*ends).sigmoid(), (-torch.maximum(*ends)).sigmoid()

    def _logits(self, level: int, rows: Rows, other: Tensor) -> Tensor:
        slopes, offsets = self.graph.slopes[level - 1], self.graph.offsets[level - 1]
        return slopes * (rows.certainties[level] * other) + offsets

    def _line(self, level: int, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """A line below ``p`` as a function of the certainty of the gallery image.

        The tangent in the middle where that lies below at the far end too. Else the line through
        the lower end with the smaller of the slope there and that of the chord: a sigmoid is
        first convex, then concave, so ``(p(c) - p(c0)) / (c - c0)`` is least at one of the ends.

        Returns:
            Height in the middle ``(M,r)``, slope ``(M,r)``, and the middle ``(r,)``.
        """
        least, most = self.least[level], self.most[level]
        middle = (least + most) / 2
        rate = self.graph.slopes[level - 1] * rows.certainties[level]
        rising = rate > 0
        low, high = torch.where(rising, least, most), torch.where(rising, most, least)
        at_low, at_middle, at_high = (
            self._logits(level, rows, end).sigmoid() for end in (low, middle, high)
        )
        run = torch.where(high == low, 1.0, high - low)
        chord, start = (at_high - at_low) / run, at_low * (1 - at_low) * rate
        slope = torch.where(chord.abs() < start.abs(), chord, start)
        tangent = at_middle * (1 - at_middle) * rate
        fits = (at_middle <= 0.5) & (at_middle + tangent * (high - middle) <= at_high)
        height = torch.where(fits, at_middle, at_low + slope * (middle - low))
        return height, torch.where(fits, tangent, slope), middle


class _Sum:
    """Sums of ``weight * delta`` for all pairs, and of how large their terms are."""

    def __init__(self, rows: Rows, centres: tuple[Tensor, ...], g: Rows, tile: int) -> None:
        self._rows, self._centres, self._g, self._tile = rows, centres, g, tile
        self._sums = rows.embeddings[0].new_zeros(len(rows), len(g))
        self._sizes = self._sums.new_zeros(len(rows))

    def add(
        self,
        level: int,
        weights: Tensor,
        *,
        centre: Tensor | None = None,
        span: Tensor | float = 1.0,
    ) -> None:
        """Adds one level with weights ``(M,r)``, times ``certainty - centre`` if that is given."""
        own = self._rows.embeddings[level] - self._centres[level]
        squares, crossed = weights * own.square(), -2 * weights * own
        peak = torch.zeros_like(own[0])
        # Products are added when they are done: addmm may run its sum through what is there, which
        # would make one long sum of all levels, with the rounding of one.
        for left in range(0, len(self._g), self._tile):
            part = slice(left, left + self._tile)
            other = self._g.embeddings[level][part] - self._centres[level]
            power = other.square()
            peak = torch.maximum(peak, power.amax(dim=0))
            out = self._sums[:, part]
            if centre is None:
                out += squares.sum(dim=1, keepdim=True)
            else:
                factor = self._g.certainties[level][part] - centre
                out += squares @ factor.T
                other, power = other.mul_(factor), power.mul_(factor)
            out += crossed @ other.T
            out += weights @ power.T
        # |w| (a + b)^2 is at most twice |w| (a^2 + b^2).
        self._sizes += 2 * ((squares.abs() + weights.abs() * peak) * span).sum(dim=1)

    def total(self, unit: float) -> Tensor:
        """The sums, less all that rounding may have added; ``(M,G)``."""
        return self._sums.sub_(unit * self._sizes.unsqueeze(1)).mul_(1 - unit)


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
