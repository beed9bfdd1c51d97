"""Pictures with parts replaced, and whether an output moves as the picture does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

PARTS = 4
"""Parts into which the picture is cut; each is replaced in a copy of its own."""


Region = tuple[float, float, float, float]
WHOLE: Region = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Moved:
    """A picture with one or another of its parts replaced by those of another picture.

    Attributes:
        pictures: ``(PARTS,C,H,W)``.
        other: ``(1,C,H,W)``, from which the parts are taken.
        parts: Where each part lies ``(PARTS,H,W)``, zero or one; they add up to one.
    """

    pictures: Tensor
    other: Tensor
    parts: Tensor


def moved(example: Tensor) -> Moved:
    """Two pictures of noise at several scales, and mixtures of them; the same for every call.

    Args:
        example: An image ``(1,C,H,W)`` whose shape, type and device count.
    """
    generator = torch.Generator().manual_seed(0)
    shape = tuple(int(side) for side in example.shape[1:])
    first, second = (_noise(shape, generator) for _ in range(2))
    parts = _parts(generator)
    where = F.interpolate(parts[None], size=list(shape[1:]), mode="nearest")[0]
    mixed = torch.where(where[:, None] > 0, second, first)
    return Moved(mixed.to(example), second.to(example), parts)


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    channels, height, width = shape
    total = torch.zeros(1, channels, height, width)
    for cells in (4, 16, 64, max(height, width)):
        size = (min(height, cells), min(width, cells))
        noise = torch.rand((1, channels, *size), generator=generator) - 0.5
        total += F.interpolate(noise, size=(height, width), mode="nearest")
    return total / total.std()


def _parts(generator: torch.Generator) -> Tensor:
    """Four parts, each at home in one quarter and scattered over the others at finer scales."""
    labels = torch.arange(PARTS).view(2, 2)
    for cells, share in ((4, 0.4), (8, 0.3), (16, 0.2)):
        labels = labels.repeat_interleave(cells // len(labels), 0)
        labels = labels.repeat_interleave(cells // labels.shape[1], 1)
        drawn = torch.randint(PARTS, (cells, cells), generator=generator)
        labels = torch.where(torch.rand(cells, cells, generator=generator) < share, drawn, labels)
    return torch.stack([(labels == part).float() for part in range(PARTS)])


class Likeness:
    """Tells how well the cells of a map follow what happens in their own regions of a picture."""

    def __init__(self, parts: Tensor) -> None:
        """Takes where the parts lie ``(PARTS,n,n)``."""
        self.parts = parts.double().cpu().numpy()
        self._there: dict[tuple[tuple[int, int], Region], NDArray[np.float64]] = {}

    def __call__(
        self, responses: NDArray[np.float64], region: Region = WHOLE
    ) -> tuple[float, float]:
        """The correlation over cells and parts, 1 for a map over the image, and the slope.

        Args:
            responses: Squared changes ``(PARTS,h,w)`` of every cell.
            region: Where in the picture the map is laid.
        """
        return _fit(responses, self._laid(responses.shape[1:], region))

    def of_earlier(self, responses: NDArray[np.float64], region: Region = WHOLE) -> float:
        """The correlation with all that lies up to a cell, as sums along an axis have it.

        The largest one, along rows, columns, both or row by row, from any corner.

        Args:
            responses: As above.
            region: As above.
        """
        there = self._laid(responses.shape[1:], region)
        count = np.ones_like(there)
        best = 0.0
        for corner in ((), (1,), (2,), (1, 2)):
            for summed in (
                _along(1),
                _along(2),
                lambda cells: _along(1)(_along(2)(cells)),
                _raster,
            ):
                shares, counts = (summed(np.flip(each, corner)) for each in (there, count))
                best = max(best, _fit(responses, np.flip(shares / counts, corner))[0])
        return best

    def _laid(self, grid: tuple[int, ...], region: Region) -> NDArray[np.float64]:
        """The share of each part in each cell ``(PARTS,h,w)`` of a grid laid on a region."""
        key = ((grid[0], grid[1]), region)
        if key not in self._there:
            rows = overlaps(grid[0], region[0], region[2], self.parts.shape[1])
            columns = overlaps(grid[1], region[1], region[3], self.parts.shape[2])
            self._there[key] = rows @ self.parts @ columns.T
        return self._there[key]


def _along(axis: int) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Sums of cells ``(PARTS,h,w)`` over all up to each along an axis."""
    return lambda cells: cells.cumsum(axis=axis)


def _raster(cells: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same row by row, from the first cell of all."""
    return cells.reshape(len(cells), -1).cumsum(axis=1).reshape(cells.shape)


def _fit(responses: NDArray[np.float64], there: NDArray[np.float64]) -> tuple[float, float]:
    """Correlation and slope of what cells ``(PARTS,h,w)`` do with what lies there."""
    total = responses.sum(axis=0)
    alive = total > 1e-6 * total.max()
    if not alive.any():
        return 0.0, 0.0
    own, there = responses[:, alive] / total[alive], there[:, alive]
    own = own - own.mean(axis=1, keepdims=True)
    there = there - there.mean(axis=1, keepdims=True)
    both, square = float((own * there).sum()), float(np.square(there).sum())
    lengths = math.sqrt(square * float(np.square(own).sum()))
    return both / max(lengths, 1e-30), both / max(square, 1e-30)


def overlaps(cells: int, start: float, end: float, bins: int) -> NDArray[np.float64]:
    """Which share of each of the cells between start and end lies in each of the bins."""
    edges = np.linspace(start, end, cells + 1) * bins
    marks = np.arange(bins)
    low = np.maximum(edges[:-1, None], marks)
    high = np.minimum(edges[1:, None], marks + 1)
    shares: NDArray[np.float64] = np.maximum(high - low, 0) / (edges[1] - edges[0])
    return shares
