"""The similarity taken apart exactly: what each position of each image adds to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simexplain.arguments import typed
from simexplain.errors import ModelError
from simexplain.methods.cams import fuse
from simexplain.methods.method import (
    AttentionMaps,
    Method,
    Task,
    check_embeddings,
    margin_directions,
    unexplained_share,
    unexplained_share_warning,
)
from simexplain.methods.raw_vectors import VectorTrace, trace_vectors
from simexplain.methods.short_tails import ShortTail
from simexplain.models.base import SimilarityModel
from simexplain.networks import lengths_of, preserve_state, unit_rows
from simexplain.tracing import Trace, trace

Progress = Callable[[int, int], None]
"""Called with how many groups of backward passes are done, and how many there are in all."""

_AT_ONCE = 32
_MOST_NUMBERS = 2**25
"""In the gradients of one backward pass over several directions; 128 MB of floats."""


class Ticker:
    """Counts groups of backward passes for a listener, if there is one."""

    def __init__(self, progress: Progress | None, work: int) -> None:
        self.progress, self.work, self.done = progress, work, 0

    def __call__(self) -> None:
        """One group more."""
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.work)


class JacobianProducts:
    """``J change`` by the positions of a layer, for all dimensions or for some directions.

    The change at each of ``h * w`` positions, times a Jacobian of ``E`` rows, costs ``E`` backward
    passes or ``h * w`` forward ones, whichever is less. Both give the same numbers.
    """

    def __init__(
        self, trace: Trace, layer: str, output: Tensor, rows: Tensor, directions: Tensor | None
    ) -> None:
        """Reads sizes alone.

        Args:
            trace: Says what a position is.
            layer: Of the trace.
            output: What the layer gives, for as many images as the network is run on.
            rows: Vectors ``(m,E)``; fewer than there are outputs where a batch was filled up.
            directions: ``(D,m,E)``, or None for all dimensions.
        """
        self.trace, self.layer, self.directions = trace, layer, directions
        self.count = len(rows)
        self.at_once = max(1, min(_AT_ONCE, _MOST_NUMBERS // output.numel()))
        self.width = rows.shape[1] if directions is None else len(directions)
        self.positions = int(self._grid(output.detach()).shape[2:].numel())
        self.forward = directions is None and self.positions < self.width

    @property
    def groups(self) -> int:
        """Into how many groups the passes through one Jacobian are divided."""
        return len(self._some(self.positions if self.forward else self.width))

    def __call__(self, rows: Tensor, point: Tensor, change: Tensor, tick: Ticker) -> Tensor:
        """``(m,D,h,w)``: the Jacobian of ``rows`` by ``point``, times the change at each position.

        Raises:
            ModelError: If the rows do not depend on the point.
        """
        if self.forward:
            try:
                return self._by_positions(rows, point, change, tick)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                # Some operators, such as fused attention, can be differentiated only once.
                self.forward = False
        return self._by_directions(rows, point, self._grid(change), tick)

    def _by_directions(self, rows: Tensor, point: Tensor, grid: Tensor, tick: Ticker) -> Tensor:
        """Rows of ``J``, a few at a time, each multiplied with the change at every position."""
        products: list[Tensor] = []
        for some in self._some(self.width):
            if self.directions is None:
                planes = rows.new_zeros((len(some), *rows.shape))
                planes[range(len(some)), :, list(some)] = 1
            else:
                planes = self.directions[some.start : some.stop]
            gradients = self._gradients(rows, point, planes)
            products += [(self._grid(g).to(grid.dtype) * grid).sum(dim=1) for g in gradients]
            tick()
        return torch.stack(products, dim=1)

    def _by_positions(self, rows: Tensor, point: Tensor, change: Tensor, tick: Ticker) -> Tensor:
        """``J`` times the change at one position after the other.

        ``J^T u`` is linear in ``u``. Its derivative in ``u``, multiplied by a change, is ``J``
        times that change: a forward product from two backward passes.
        """
        lever = torch.zeros_like(rows, requires_grad=True)
        with torch.enable_grad():
            back = self._gradients(rows, point, lever, create_graph=True)[0]
        marks, (height, width) = self._marks(change)
        products: list[Tensor] = []
        for some in self._some(height * width):
            planes = torch.stack([change * (marks == position) for position in some]).to(back.dtype)
            products += self._gradients(back, lever, planes)
            tick()
        return torch.stack(products, dim=2).reshape(*rows.shape, height, width)

    def _marks(self, output: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """For every number of the layer's output its position, or -1 where it lies on none."""
        with torch.enable_grad():
            blank = torch.zeros_like(output, dtype=torch.float32, requires_grad=True)
            grid = self.trace.to_grid(self.layer, blank)
        height, width = int(grid.shape[2]), int(grid.shape[3])
        # A grid is a rearrangement, so what flows back through it lands where it came from.
        numbers = torch.arange(1, height * width + 1, device=output.device, dtype=torch.float32)
        (marks,) = torch.autograd.grad(grid, blank, numbers.view(height, width).expand_as(grid))
        return marks - 1, (height, width)

    def _some(self, count: int) -> list[range]:
        """Numbers up to ``count`` in groups whose gradients fit into memory together."""
        size = self.at_once
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def _grid(self, tensor: Tensor) -> Tensor:
        return self.trace.to_grid(self.layer, tensor)[: self.count]

    def _gradients(
        self, values: Tensor, point: Tensor, planes: Tensor, *, create_graph: bool = False
    ) -> list[Tensor]:
        """One gradient for each plane, or for the only one; in one batch where operators allow."""
        if not values.requires_grad:
            raise ModelError(self.trace.diagnose(self.layer))

        def gradient(plane: Tensor, *, batched: bool = False) -> Tensor:
            (slope,) = torch.autograd.grad(
                values, point, plane, retain_graph=True, create_graph=create_graph,
                is_grads_batched=batched, allow_unused=True,
            )  # fmt: skip
            if slope is None:
                raise ModelError(self.trace.diagnose(self.layer))
            return slope

        if planes.shape == values.shape:
            return [gradient(planes)]
        try:
            return list(gradient(planes, batched=True))
        except RuntimeError:
            return [gradient(plane) for plane in planes]


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
    parts, rest, vectors, lengths = (
        torch.cat([getattr(chunk, name) for chunk in chunks])
        for name in ("parts", "rest", "vectors", "lengths")
    )
    return PositionParts(parts, rest, vectors, lengths, chunks[0].steps)


_FAR_OFF = 0.05


@dataclass(frozen=True)
@typed
class Decomposition(Method):
    """Activation decomposition (Zhu et al. 2019; Stylianou et al. 2019), signed and exact.

    Each image's score is its cosine to the positives minus that to the negatives, the others held.
    The map of an image at one layer is what each position adds to that score, by
    ``position_parts``. Biases and everything else that no position gives are spread evenly over the
    map, so that a map sums to its score; for tails that are not linear, up to an integration error,
    which a warning reports.

    Attributes:
        steps: Points of the quadrature for tails that are not linear.
        keep_negative: Leave the signs; else negative values are cut off, and no map adds up.
    """

    steps: int = 16
    keep_negative: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            raise ModelError(
                f"Expected steps of at least 1 and at most {MOST_STEPS}, got {self.steps}."
            )

    def attribute(self, task: Task) -> AttentionMaps:
        """What each position adds; of several layers the positive parts are multiplied."""
        model, images, layers, max_batch = task
        flat = images.stacked().flatten(0, 1)
        traced = trace_vectors(model, flat, layers, max_batch=max_batch)
        units = images.restacked(unit_rows(traced.vectors))
        check_embeddings(units, images.roles)
        directions = margin_directions(images.like(units))
        layer_maps, worst, shares = {}, 0.0, []
        for layer in layers:
            done = parts_of(
                traced, layer, directions=directions.flatten(0, 1).unsqueeze(0), steps=self.steps
            )
            rest = done.rest[:, 0, None, None] / done.parts[0, 0].numel()
            maps = images.restacked((done.parts[:, 0] + rest) / done.lengths[:, None, None])
            shares.append(unexplained_share(done.vectors[:, 0], done.parts.sum(dim=(1, 2, 3))))
            layer_maps[layer] = maps if self.keep_negative else maps.relu()
            if done.steps:
                worst = max(worst, float(done.residual.max()))
        share = images.restacked(torch.stack(shares).amax(dim=0))
        return AttentionMaps(
            maps=fuse(
                list(layer_maps.values()), model.apart(list(layer_maps), images.stacked()[:, 0])
            ),
            layer_maps=layer_maps,
            weights=directions,
            scores=(units * directions).sum(dim=2),
            embeddings=units,
            warnings=self._warnings(worst)
            + unexplained_share_warning(float(share.max()), " x ".join(layers)),
            unexplained=share,
        ).detached()

    def _warnings(self, worst: float) -> tuple[str, ...]:
        if worst <= EXACT:
            return ()
        advice = "" if worst < _FAR_OFF else "; more steps or a later layer bring it down"
        return (
            f"The tail above the layer is not linear, so {self.steps} Jacobians were averaged; the "
            f"maps add up to the score but for {worst:.1%} of the vector's length{advice}.",
        )
