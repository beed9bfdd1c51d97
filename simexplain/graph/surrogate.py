"""Vectors whose squared distance is nearly that of the AVSL graph, and bounds that hold always.

Equation 11 writes the distance as ``D(x,y) = sum of lambda(x,y) * delta(x,y)`` over all nodes, with
``lambda >= 0``. The sensitivities vary little over pairs. Their means give the vectors; what they
are at least, for one query and all certainties that the gallery has, gives the bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simexplain.errors import ModelError
from simexplain.graph.inference import Graph, Rows, infer
from simexplain.graph.tiled import check_widths

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
