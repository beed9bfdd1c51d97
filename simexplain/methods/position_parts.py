"""Embeddings as sums over the positions of a layer, exact wherever the tail above is linear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simexplain.methods.jacobians import JacobianProducts, Progress, Ticker
from simexplain.methods.raw_vectors import VectorTrace, trace_vectors
from simexplain.methods.short_tails import ShortTail
from simexplain.models.base import SimilarityModel
from simexplain.networks import lengths_of, preserve_state
from simexplain.tracing import trace

EXACT = 1e-5
"""Relative error below which a tail counts as linear along the way from zero."""

MOST_STEPS = 1000
"""Points of the quadrature; finding more of them takes long by itself, and brings nothing."""

_FEW = 8
"""Directions below which a tail is not searched for what can be left out."""


@dataclass(frozen=True)
class PositionParts:
    """Vectors ``v`` of ``M`` images taken apart: ``v = sum of parts + rest``.

    Attributes:
        parts: What each position gives to the vector ``(M,E,h,w)``.
        rest: What no position gives: biases, class tokens ``(M,E)``.
        vectors: The vectors themselves ``(M,E)``.
        lengths: Their lengths ``(M,)``, of the whole vectors also where directions were given.
        steps: Jacobians averaged; 0 where the tail is linear and one serves.
    """

    parts: Tensor
    rest: Tensor
    vectors: Tensor
    lengths: Tensor
    steps: int

    @property
    def residual(self) -> Tensor:
        """``|v - parts - rest|`` over ``|v|`` for each image ``(M,)``: rounding or integration."""
        missing = self.vectors - self.parts.sum(dim=(2, 3)) - self.rest
        return lengths_of(missing) / torch.where(self.lengths > 0, self.lengths, torch.inf)


def position_parts(
    model: SimilarityModel,
    images: Tensor,
    layer: str,
    *,
    directions: Tensor | None = None,
    steps: int = 16,
    max_batch: int | None = None,
    progress: Progress | None = None,
) -> PositionParts:
    """Takes the vectors of images apart into the positions of one layer.

    The tail above the layer is a function ``v(A)``. With its Jacobian ``J`` the parts are ``J A``,
    position by position. That is exact wherever the tail is linear with a bias (pooling, linear
    layers, batch norm, flattening), and also for max and GeM pooling, which are homogeneous of
    degree one (Euler). Whether it is exact here is not guessed from the modules but tested: the
    parts and ``v(0)`` must add up to ``v``. Where they do not, the Jacobians along the straight way
    from the layer's output for a blank image to ``A`` are averaged by Gauss-Legendre quadrature
    (integrated Jacobians, Moeller et al. 2023); ``rest`` is then the vector with the blank image's
    output at this layer, and the error of the integration is the residual.

    Args:
        model: The model.
        images: Preprocessed images ``(M,3,H,W)``.
        layer: The layer.
        directions: ``(D,M,E)``: parts of ``d . v`` for these directions only, which costs ``D``
            backward passes. Rows and vectors then are ``(M,D)``. All dimensions cost ``E`` or
            about ``h * w`` of them, whichever is less.
        steps: Points of the quadrature where it is needed; each costs one forward pass.
        max_batch: Bounds the images in one forward pass; results do not depend on it.
        progress: Called after each group of backward passes; starts again from the first where it
            turns out that Jacobians must be averaged.

    Raises:
        ModelError: If the layer cannot be used.
    """
    traced = trace_vectors(model, images, (layer,), max_batch=max_batch)
    return parts_of(traced, layer, directions=directions, steps=steps, progress=progress)


def parts_of(
    traced: VectorTrace,
    layer: str,
    *,
    directions: Tensor | None = None,
    steps: int = 16,
    progress: Progress | None = None,
) -> PositionParts:
    """The vectors of a pass by the positions of a traced layer; see :func:`position_parts`."""
    chunks = range(len(traced.trace.outputs[layer]))
    tails = [_Tail(traced, layer, number, directions) for number in chunks]
    work = sum(tail.products.groups for tail in tails)
    tick = Ticker(progress, work)
    whole = _joined([tail.direct(tick) for tail in tails])
    # One answer for all images, so that it does not depend on how they were batched.
    if float(whole.residual.max()) <= _rounding(traced.trace.outputs[layer][0].dtype):
        return whole
    tick = Ticker(progress, work * steps)
    return _joined([tail.integrated(steps, tick) for tail in tails])


def _rounding(kind: torch.dtype) -> float:
    """:data:`EXACT`, or what rounding alone leaves of vectors in half precision."""
    return max(EXACT, 8 * torch.finfo(kind).eps)


class _Tail:
    """The part of a model above one layer, for the images of one chunk of a pass."""

    def __init__(
        self, whole: VectorTrace, layer: str, number: int, directions: Tensor | None
    ) -> None:
        self.whole, self.layer, self.number = whole, layer, number
        chosen = slice(number * whole.size, (number + 1) * whole.size)
        self.output = whole.trace.outputs[layer][number]
        with torch.enable_grad():
            self.rows = whole.trace.embeddings[chosen]
        self.directions = None if directions is None else directions[:, chosen].to(self.rows)
        self.products = JacobianProducts(
            whole.trace, layer, self.output, self.rows, self.directions
        )
        # Of a few directions the whole tail is as quick.
        self.short = whole.short(layer, number) if self.products.width > _FEW else None

    def direct(self, tick: Ticker) -> PositionParts:
        """``J A``, and what is left of the vectors where the layer gives zeros."""
        point = self.output.detach()
        if self.short is None:
            parts = self.products(self.rows, self.output, point, tick)
        else:
            parts = self._briefly(self.short, point, point, tick, last=False)
        return self._found(parts, torch.zeros_like(point), 0)

    def integrated(self, steps: int, tick: Ticker) -> PositionParts:
        """The mean Jacobian from a blank image's output, times the way from there."""
        point = self.output.detach()
        # As many as in the chunk, since tokens may come before images in the layer's output.
        blank = torch.zeros_like(self.whole.images[:1]).expand(len(self.rows), -1, -1, -1)
        first = trace(self.whole.model, blank, (self.layer,), max_batch=len(blank))
        start = first.outputs[self.layer][0].detach()
        places, weights = np.polynomial.legendre.leggauss(steps)
        parts = self.rows.detach().new_zeros(())
        for position, weight in zip((places + 1) / 2, weights / 2, strict=True):
            between = (start + position * (point - start)).requires_grad_()
            if self.short is None:
                rows = self._rerun(between, last=True)
                product = self.products(rows, between, point - start, tick)
            else:
                product = self._briefly(self.short, between, point - start, tick, last=True)
            parts = parts + float(weight) * product
        # Not the vector of the blank image: what passes by the layer still comes from the image.
        return self._found(parts, start, steps)

    def _briefly(
        self, short: ShortTail, output: Tensor, change: Tensor, tick: Ticker, *, last: bool
    ) -> Tensor:
        """``J change`` by the part of the tail that vectors read."""
        with preserve_state(self.whole.model.network):
            rows, point, change = short.run(output, change, last=last)
        with torch.enable_grad():
            rows = rows[: len(self.rows)]
        return self.products(rows, point, change, tick)

    def _rerun(self, output: Tensor, *, last: bool) -> Tensor:
        rows = self.whole.rerun(self.layer, self.number, output, last=last)
        with torch.enable_grad():
            return rows[: len(self.rows)]

    def _found(self, parts: Tensor, start: Tensor, steps: int) -> PositionParts:
        rest, rows = self._rerun(start, last=steps > 0).detach(), self.rows.detach()
        lengths = lengths_of(rows)
        return PositionParts(parts, self._projected(rest), self._projected(rows), lengths, steps)

    def _projected(self, rows: Tensor) -> Tensor:
        """The projections ``(m,D)`` of rows ``(m,E)``, or the rows themselves."""
        if self.directions is None:
            return rows
        return torch.einsum("dme,me->md", self.directions, rows)


def _joined(chunks: Sequence[PositionParts]) -> PositionParts:
    """Chunks of images as one."""
    return PositionParts(
        parts=torch.cat([chunk.parts for chunk in chunks]),
        rest=torch.cat([chunk.rest for chunk in chunks]),
        vectors=torch.cat([chunk.vectors for chunk in chunks]),
        lengths=torch.cat([chunk.lengths for chunk in chunks]),
        steps=chunks[0].steps,
    )
