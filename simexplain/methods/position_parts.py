"""Embeddings as sums over the positions of a layer, exact wherever the tail above is linear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simexplain.methods.raw_vectors import RawVectors
from simexplain.models.base import SimilarityModel
from simexplain.tracing import Trace, rerun, trace

EXACT = 1e-5
"""Relative error below which a tail counts as linear along the way from zero."""

_DIRECTIONS = 32


@dataclass(frozen=True)
class PositionParts:
    """Vectors ``v`` of ``M`` images taken apart: ``v = sum of parts + rest``.

    Attributes:
        parts: What each position gives to the vector ``(M,E,h,w)``.
        rest: What no position gives: biases, class tokens ``(M,E)``.
        vectors: The vectors themselves ``(M,E)``.
        lengths: Their lengths ``(M,)``, of the whole vectors also where directions were given.
        steps: Jacobians averaged; 1 where the tail is linear.
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
        return missing.square().sum(dim=1).sqrt() / self.lengths.clamp_min(1e-30)


def position_parts(
    model: SimilarityModel,
    images: Tensor,
    layer: str,
    *,
    directions: Tensor | None = None,
    steps: int = 16,
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
            backward passes in place of ``E``. Rows and vectors then are ``(M,D)``.
        steps: Points of the quadrature where it is needed; each costs one forward pass.

    Raises:
        ModelError: If the layer cannot be used.
    """
    raw = RawVectors(model)
    traced = trace(raw, images, (layer,))
    (output,) = traced.outputs[layer]
    grid = _gridder(traced, layer)
    wanted = _Directions(directions, traced.embeddings)
    point = output.detach()
    vectors = wanted.of(traced.embeddings.detach())
    lengths = traced.embeddings.detach().square().sum(dim=1).sqrt()
    rest = wanted.of(rerun(raw, images, layer, torch.zeros_like(point)).detach())
    here = wanted.contracted(traced.embeddings, output, point, grid)
    found = PositionParts(here, rest, vectors, lengths, 1)
    if float(found.residual.max()) <= EXACT:
        return found
    blank = trace(raw, torch.zeros_like(images), (layer,))
    start = blank.outputs[layer][0].detach()
    places, weights = np.polynomial.legendre.leggauss(steps)
    parts = torch.zeros_like(here)
    for place, weight in zip((places + 1) / 2, weights / 2, strict=True):
        between = (start + place * (point - start)).requires_grad_()
        rows = rerun(raw, images, layer, between)
        parts += float(weight) * wanted.contracted(rows, between, point - start, grid)
    # Not the vector of the blank image: what passes by the layer still comes from the image.
    rest = wanted.of(rerun(raw, images, layer, start).detach())
    return PositionParts(parts, rest, vectors, lengths, steps)


class _Directions:
    """Which projections of the vectors are taken apart: all dimensions, or some directions."""

    def __init__(self, directions: Tensor | None, rows: Tensor) -> None:
        self.given = directions
        self.width = rows.shape[1] if directions is None else len(directions)

    def of(self, rows: Tensor) -> Tensor:
        """The projections ``(M,D)`` of rows ``(M,E)``."""
        if self.given is None:
            return rows
        return torch.einsum("dme,me->md", self.given.to(rows), rows)

    def planes(self, start: int, rows: Tensor) -> Tensor:
        """A few directions ``(d,M,E)``."""
        end = min(start + _DIRECTIONS, self.width)
        if self.given is not None:
            return self.given[start:end].to(rows)
        chosen = rows.new_zeros((end - start, *rows.shape))
        for number, plane in enumerate(chosen):
            plane[:, start + number] = 1
        return chosen

    def contracted(
        self, rows: Tensor, point: Tensor, change: Tensor, grid: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """``J change`` position by position ``(M,D,h,w)``, a few rows of ``J`` at a time."""
        features = grid(change)
        found: list[Tensor] = []
        for start in range(0, self.width, _DIRECTIONS):
            gradients = _gradients(rows, point, self.planes(start, rows.detach()))
            found += [(grid(g).to(features.dtype) * features).sum(dim=1) for g in gradients]
        return torch.stack(found, dim=1)


def _gridder(traced: Trace, layer: str) -> Callable[[Tensor], Tensor]:
    count = len(traced.embeddings)
    return lambda tensor: traced.to_grid(layer, tensor)[:count]


def _gradients(rows: Tensor, point: Tensor, chosen: Tensor) -> list[Tensor]:
    """One gradient for each plane of ``chosen``; in one batch where the operators allow it."""
    try:
        (batch,) = torch.autograd.grad(
            rows, point, chosen, retain_graph=True, is_grads_batched=True
        )
        return list(batch)
    except RuntimeError:
        return [torch.autograd.grad(rows, point, plane, retain_graph=True)[0] for plane in chosen]
