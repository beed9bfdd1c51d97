"""Products of a tail's Jacobian with a change of a layer, position by position."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simexplain.errors import ModelError
from simexplain.tracing import Trace

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
