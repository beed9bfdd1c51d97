"""Distances of all pairs by the AVSL graph: exact, or matrix products alone to first order.

Write the doubt ``q = 1 - p`` of each node as its mean over pairs plus a rest, ``q = qbar + eps``.
With the inflows ``t`` and the lower nodes mixed by the edges ``T``, both at ``qbar``, Eq. 8 is

    D = sum of t (1 - q) delta + sum of t eps T + terms with two eps,

summed over all nodes. ``q`` as a polynomial in the product of both certainties makes the first sum
one matrix product. The second is a form of rank ``r`` a level, ``T`` being linear in all lower
nodes; a few directions of it are nearly all, as a mixture of many nodes is nearly its mean. Each
direction is a product of two numbers per pair, each of them one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from simexplain.errors import ModelError
from simexplain.graph.inference import Graph, Rows, broadcast
from simexplain.graph.tiled import ExactPairs, check_widths, exact

RIDGE = 1e-8


@dataclass(frozen=True)
class Form:
    """A weighted sum over the nodes of one level, ``sum of a_m c^m c'^m [delta]``.

    Attributes:
        level: The level.
        powers: ``a``, ``(K+1,r)``; row ``m`` goes with the ``m``-th power of the certainties.
        nodes: Whether ``delta`` is a factor.
    """

    level: int
    powers: Tensor
    nodes: bool

    def to(self, like: Tensor) -> Form:
        """The same in the type and on the device of a tensor."""
        return replace(self, powers=self.powers.to(like))


Coupling = tuple[tuple[Form, ...], tuple[Form, ...]]
"""Two lists of forms; the sum of one is multiplied by the sum of the other."""


def _exactly(level: Tensor) -> Tensor:
    """The same in float64 on the processor: not every device has float64, and set-up is small."""
    return level.detach().to("cpu", torch.float64)


class Fit:
    """Coefficients of the expansion; all in float64."""

    def __init__(
        self,
        graph: Graph,
        rows: tuple[Rows, Rows],
        scales: tuple[Tensor, ...],
        pairs: Sequence[Tensor],
        degree: int,
    ) -> None:
        self._edges = [_exactly(edges) for edges in graph.edges]
        self._powers = [torch.zeros(1)]
        self._doubts = [torch.zeros(1)]  # nothing stands in for the lowest level
        self._rests = [torch.zeros(1)]
        left, right = (
            part[chosen.to(part.embeddings[0].device)]
            for part, chosen in zip(rows, pairs, strict=True)
        )
        self._nodes = [
            (_exactly(one) - _exactly(other)).square()
            for one, other in zip(left.embeddings, right.embeddings, strict=True)
        ]
        for level in range(1, len(graph.widths)):
            slope = _exactly(graph.slopes[level - 1]) * _exactly(scales[level]).square()
            offset = _exactly(graph.offsets[level - 1])
            own, other = (
                _exactly(torch.stack(part.certainties[level].aminmax(dim=0))) for part in rows
            )
            powers = _doubt_powers(slope, offset, own, other, degree)
            means = [_power_means(part.certainties[level], degree) for part in rows]
            doubt = (powers * means[0] * means[1]).sum(dim=0)
            product = _exactly(left.certainties[level]) * _exactly(right.certainties[level])
            self._powers.append(powers)
            self._doubts.append(doubt)
            rest = sum(a * product**m for m, a in enumerate(powers)) - doubt
            self._rests.append(torch.as_tensor(rest))

    def forms(self, rank: int) -> tuple[list[Form], list[Coupling]]:
        """The forms that add up, and those that are multiplied in pairs."""
        flows = [torch.ones_like(self._nodes[-1][0])]
        for level in reversed(range(1, len(self._nodes))):
            flows.insert(0, self._edges[level - 1] @ (flows[0] * self._doubts[level]))
        main = [Form(0, flows[0].unsqueeze(0), nodes=True)]
        couplings: list[Coupling] = []
        hat = self._nodes[0]
        for level in range(1, len(self._nodes)):
            flow, doubt, powers = flows[level], self._doubts[level], self._powers[level]
            trust = -powers
            trust[0] += 1
            main.append(Form(level, flow * trust, nodes=True))
            mixed = hat @ self._edges[level - 1]
            rests, lower = _directions(flow * self._rests[level], mixed, rank)
            around = powers.clone()
            around[0] -= doubt
            for one, other in zip(rests.T, lower.T, strict=True):
                change = Form(level, one * flow * around, nodes=False)
                couplings.append(((change,), self._mixture(level, other)))
            hat = (1 - doubt) * self._nodes[level] + doubt * mixed
        return main, couplings

    def _mixture(self, level: int, weights: Tensor) -> tuple[Form, ...]:
        """``weights . T`` of a level, as forms of the nodes of all lower levels."""
        mixture = []
        for lower in reversed(range(level)):
            weights = self._edges[lower] @ weights
            trust = 1 - self._doubts[lower] if lower else 1.0
            mixture.append(Form(lower, (weights * trust).unsqueeze(0), nodes=True))
            weights = weights * self._doubts[lower]
        return tuple(mixture)


def _power_means(certainties: Tensor, degree: int) -> Tensor:
    """Means of the powers 0 to ``degree`` over the images, ``(degree+1,r)``."""
    exact = _exactly(certainties)
    return torch.stack([(exact**m).mean(dim=0) for m in range(degree + 1)])


def _doubt_powers(slope: Tensor, offset: Tensor, own: Tensor, other: Tensor, degree: int) -> Tensor:
    """``1 - p`` as a polynomial in the product of certainties, ``(degree+1,r)``.

    Interpolates at Chebyshev nodes of the range that the products have.

    Args:
        slope: ``(r,)``.
        offset: ``(r,)``, may be infinite.
        own: Smallest and largest certainty of the queries ``(2,r)``.
        other: Those of the gallery ``(2,r)``.
        degree: At least 1.
    """
    corners = (own.unsqueeze(0) * other.unsqueeze(1)).flatten(0, 1)
    low, high = corners.amin(dim=0), corners.amax(dim=0)
    middle = (low + high) / 2
    # A node whose certainty never changes still needs a width to interpolate over.
    half = torch.maximum((high - low) / 2, torch.full_like(low, 1e-3))
    count = torch.arange(degree + 1, dtype=torch.float64)
    at = torch.cos((count + 0.5) * torch.pi / (degree + 1)).unsqueeze(1)
    values = torch.sigmoid(-(slope * (middle + half * at) + offset))
    inner = torch.linalg.solve(at**count, values)
    powers = torch.zeros_like(inner)
    for n in range(degree + 1):
        for m in range(n + 1):
            powers[m] += inner[n] * math.comb(n, m) * (-middle) ** (n - m) / half**n
    return powers


def _directions(rests: Tensor, mixed: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best sum of ``rank`` products for ``rests . mixed``, in mean square over pairs.

    Args:
        rests: ``(P,r)``.
        mixed: ``(P,r)``.
        rank: Products.

    Returns:
        Weights of both factors, ``(r,R)`` each, ``R`` at most ``rank``.
    """
    roots = []
    for values in (rests, mixed):
        moment = values.T @ values / len(values)
        scale = moment.diagonal().mean()
        # A node that never changes has no variance; a little of the mean one makes it invertible.
        ridge = RIDGE * scale if scale > 0 else torch.ones_like(scale)
        moment.diagonal().add_(ridge)
        roots.append(torch.linalg.cholesky(moment))
    one, other = roots
    left, sizes, right = torch.linalg.svd(one.T @ other)
    first = torch.linalg.solve_triangular(one.T, left[:, :rank] * sizes[:rank], upper=True)
    second = torch.linalg.solve_triangular(other.T, right[:rank].T, upper=True)
    return first, second


SAMPLED_PAIRS = 2048
SAMPLED_IMAGES = 64
BLOCK = 1024


@dataclass(frozen=True)
class Expansion:
    """Distances of all pairs of two sets of images as sums and products of matrix products.

    Attributes:
        q: Queries, embeddings centred, certainties at most 1.
        g: Gallery, likewise; the same object where the queries are the gallery.
        main: Forms that add up.
        couplings: Pairs of lists of forms; the sums of both lists are multiplied and added.
        error: Largest difference to the exact distance over sampled pairs, divided by the mean
            distance.
    """

    q: Rows
    g: Rows
    main: tuple[Form, ...]
    couplings: tuple[Coupling, ...]
    error: float

    @classmethod
    @torch.no_grad()
    def build(
        cls,
        graph: Graph,
        q: Rows,
        g: Rows | None = None,
        degree: int = 1,
        rank: int = 1,
        seed: int = 0,
        *,
        pairs: int = SAMPLED_PAIRS,
    ) -> Expansion:
        """Chooses all coefficients by sampled pairs, in float64, and measures the error.

        Args:
            graph: The graph.
            q: Queries, at least one row.
            g: Gallery, at least one row; None for the queries themselves.
            degree: Degree of the polynomials in the certainties, at least 1.
            rank: Directions kept of each level's coupling to the levels below, at least 1:
                without any, changes of ``p`` do not cancel as they should.
            seed: Seed of the sampled pairs; PyTorch's own random state is not used.
            pairs: How many pairs the coefficients are fitted to. The error is measured on all pairs
                of 64 other queries and 64 other gallery images.

        Raises:
            ModelError: If a set of images is empty, or degree or rank is less than 1.
        """
        like = q.embeddings[0]
        gallery = q if g is None or g is q else g.to(like)
        if min(len(q), len(gallery), degree, rank) < 1:
            raise ModelError(
                f"Expected at least 1 query, 1 gallery image, degree 1 and rank 1, got {len(q)}, "
                f"{len(gallery)}, {degree} and {rank}; raise what is 0."
            )
        for rows in (q, gallery):
            check_widths(graph, rows)
        generator = torch.Generator().manual_seed(seed)
        fit, check = (
            [torch.randint(len(rows), (count,), generator=generator) for rows in (q, gallery)]
            for count in (pairs, SAMPLED_IMAGES)
        )
        first, second, scales = _scaled(q, gallery)
        main, couplings = Fit(graph, (first, second), scales, fit, degree).forms(rank)
        expansion = cls(
            first,
            second,
            tuple(form.to(like) for form in main),
            tuple(
                (tuple(f.to(like) for f in one), tuple(f.to(like) for f in other))
                for one, other in couplings
            ),
            0.0,
        )
        return replace(expansion, error=expansion._measured(graph, q, gallery, check))

    @torch.no_grad()
    def rows(self, queries: slice, gallery: slice = slice(None)) -> Tensor:
        """Distances of some queries to some of the gallery, ``(queries, gallery)``, none below 0.

        Nothing but the result and ``r`` numbers an image, for one product at a time, is kept.
        """
        own, other = self.q[queries], self.g[gallery]
        out = _summed(self.main, own, other)
        for one, factor in self.couplings:
            out.addcmul_(_summed(one, own, other), _summed(factor, own, other))
        return out.clamp_min_(0)

    @torch.no_grad()
    def matrix(self, *, block: int = BLOCK) -> Tensor:
        """All distances ``(Q,G)``; where the queries are the gallery, half of them mirrored."""
        out = self.q.embeddings[0].new_empty(len(self.q), len(self.g))
        symmetric = self.g is self.q
        for top in range(0, len(self.q), block):
            rows = slice(top, min(top + block, len(self.q)))
            for left in range(top if symmetric else 0, len(self.g), block):
                columns = slice(left, min(left + block, len(self.g)))
                part = self.rows(rows, columns)
                if symmetric and left == top:
                    part = part.triu() + part.triu(1).T  # both halves round differently
                out[rows, columns] = part
                if symmetric:
                    out[columns, rows] = part.T
        return out.fill_diagonal_(0) if symmetric else out

    def _measured(self, graph: Graph, q: Rows, g: Rows, pairs: Sequence[Tensor]) -> float:
        """Largest error over all pairs of sampled images, relative to the mean distance."""
        left, right = (chosen.to(q.embeddings[0].device) for chosen in pairs)
        part = replace(self, q=self.q[left], g=self.g[right]).rows(slice(None))
        if g is q:
            part = part.masked_fill(left.unsqueeze(1) == right, 0)
        true = torch.empty_like(part)
        exact = ExactPairs(graph, q[left], g[right])
        exact.block(slice(0, len(left)), slice(0, len(right)), true)
        mean = true.mean()
        apart = (part - true).abs().amax()
        return float(apart / mean if mean > 0 else apart)


def _scaled(q: Rows, g: Rows) -> tuple[Rows, Rows, tuple[Tensor, ...]]:
    """Both sets with embeddings around the gallery's mean and certainties at most 1, and scales.

    No difference of embeddings changes; the products lose fewer digits.
    """
    centres = [level.mean(dim=0) for level in g.embeddings]
    scales = []
    for own, other in zip(q.certainties, g.certainties, strict=True):
        top = torch.maximum(own.abs().amax(dim=0), other.abs().amax(dim=0))
        scales.append(torch.where(top > 0, top, 1.0))
    first, second = (
        Rows(
            tuple(e - centre for e, centre in zip(rows.embeddings, centres, strict=True)),
            tuple(c / scale for c, scale in zip(rows.certainties, scales, strict=True)),
        )
        for rows in (q, g)
    )
    return first, first if g is q else second, tuple(scales)


def _summed(forms: tuple[Form, ...], own: Rows, other: Rows) -> Tensor:
    """The sum of forms for all pairs ``(Q,G)``, one matrix product after the other."""
    out = own.embeddings[0].new_zeros(len(own), len(other))
    for form in forms:
        e, c = own.embeddings[form.level], own.certainties[form.level]
        f, d = other.embeddings[form.level], other.certainties[form.level]
        if form.nodes:
            weights = form.powers[0]
            out += (e.square() @ weights).unsqueeze(1) + f.square() @ weights
            out.addmm_(-2 * weights * e, f.T)
        else:
            out += form.powers[0].sum()
        for m, weights in enumerate(form.powers[1:], start=1):
            one, two = weights * c**m, d**m
            if not form.nodes:
                out.addmm_(one, two.T)
                continue
            out.addmm_(one * e.square(), two.T).addmm_(one, (two * f.square()).T)
            out.addmm_(-2 * one * e, (two * f).T)
    return out


BROADCAST_NUMBERS = 2**25
"""Numbers a tensor of broadcasting may have; 128 MiB in float32, and a dozen of them are live."""

WORTH_EXPANDING = 2**16
"""Pairs below which exact distances are had sooner than the coefficients of an expansion."""

EXPANSIONS = ((1, 1), (2, 2), (3, 4))
"""Degrees and ranks in the order they are tried, from the cheapest."""


@dataclass(frozen=True)
class DistancePlan:
    """How distances are to be computed.

    Attributes:
        method: ``broadcast`` (differentiable), ``exact`` or ``expansion``.
        error: Measured largest error relative to the mean distance, over sampled pairs; 0 for
            ``broadcast`` and ``exact``, which only round.
        degree: Of the expansion; 0 without one.
        rank: Of the expansion; 0 without one.
        tried: The errors of expansions that were not accurate enough, in turn.
        expansion: The expansion itself.
    """

    method: str
    error: float = 0.0
    degree: int = 0
    rank: int = 0
    tried: tuple[float, ...] = ()
    expansion: Expansion | None = None


def planned(
    graph: Graph, q: Rows, g: Rows | None = None, accuracy: float | None = None
) -> DistancePlan:
    """What :func:`distances` does with the same arguments.

    Args:
        graph: The graph.
        q: Queries, ``Q`` rows.
        g: Gallery, ``G`` rows; None for the queries themselves.
        accuracy: Largest error allowed, relative to the mean distance; None for none.

    Raises:
        ModelError: If the accuracy is not positive, or the rows do not fit the graph.
    """
    gallery = q if g is None else g
    if accuracy is None:
        wanted = torch.is_grad_enabled() and _requires_grad(graph, q, gallery)
        return DistancePlan("broadcast" if wanted else "exact")
    if not accuracy > 0:
        raise ModelError(
            f"Expected an accuracy above 0, got {accuracy}; give None for exact distances."
        )
    tried: list[float] = []
    if len(q) * len(gallery) >= WORTH_EXPANDING:
        for degree, rank in EXPANSIONS:
            expansion = Expansion.build(graph, q, g, degree, rank)
            if expansion.error <= accuracy:
                return DistancePlan(
                    "expansion", expansion.error, degree, rank, tuple(tried), expansion
                )
            tried.append(expansion.error)
    return DistancePlan("exact", tried=tuple(tried))


def distances(
    graph: Graph,
    q: Rows,
    g: Rows | None = None,
    *,
    accuracy: float | None = None,
    tile: int | None = None,
) -> Tensor:
    """Distances of all pairs.

    Without an accuracy: differentiable where gradients are enabled and any input requires them
    (large sets in parts that are computed again on the way back), else exact in tiles. With one:
    the cheapest expansion whose error on sampled pairs is no larger, exact distances if none is;
    outside of autograd. The pairs sampled are few among all, so that the largest error of all pairs
    is somewhat larger than the one measured, up to about twice.

    Args:
        graph: The graph.
        q: Queries, ``Q`` rows.
        g: Gallery, ``G`` rows; None for the queries themselves.
        accuracy: Largest error allowed, relative to the mean distance; None for none.
        tile: Pairs at a time where distances are exact; None for a choice by device.

    Returns:
        ``(Q,G)``, not negative.

    Raises:
        ModelError: If the accuracy is not positive, or the rows do not fit the graph.
    """
    plan = planned(graph, q, g, accuracy)
    if plan.expansion is not None:
        return plan.expansion.matrix()
    if plan.method == "exact":
        return exact(graph, q, g, tile=tile)
    return _differentiable(graph, q, q if g is None else g)


def _requires_grad(graph: Graph, q: Rows, g: Rows) -> bool:
    parts = [graph.edges, graph.slopes, graph.offsets]
    parts += [q.embeddings, q.certainties, g.embeddings, g.certainties]
    return any(tensor.requires_grad for part in parts for tensor in part)


def _differentiable(graph: Graph, q: Rows, g: Rows) -> Tensor:
    """By broadcasting; in parts whose intermediate values are not kept, where there are many."""
    like = q.embeddings[0]
    graph, g = graph.to(like), g.to(like)
    height = max(1, BROADCAST_NUMBERS // max(1, len(g) * max(graph.widths)))
    if height >= len(q):
        return broadcast(graph, q, g)
    parts = [
        checkpoint(
            broadcast, graph, q[top : top + height], g,
            use_reentrant=False, preserve_rng_state=False,
        )
        for top in range(0, len(q), height)
    ]  # fmt: skip
    return torch.cat(parts)
