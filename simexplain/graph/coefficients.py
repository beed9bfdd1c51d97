"""The coefficients of the expansion of AVSL distances, fitted to sampled pairs in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simexplain.graph.inference import Graph, Rows

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
