"""Part of a query: searched for by itself, and boxed where it is found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from simexplain.data.folders import Record, mask_of
from simexplain.data.preprocessing import Geometry
from simexplain.errors import ComparisonError
from simexplain.matching.factors import Factors
from simexplain.models.moving import WHOLE, overlaps
from simexplain.models.moving import Region as Span
from simexplain.networks import unit_rows

Box = tuple[float, float, float, float]
"""``(x, y, width, height)`` in pixels of a picture."""

ABOVE_MEAN = 0.4
"""How far between a map's mean and its maximum the border of a box lies; tuned on the scenes of
``benchmarks/search.py`` with other cut-outs than those of the published table."""

_FINE = 28
_BLOCK = 256
_OPAQUE = 127


@dataclass(frozen=True)
class Region:
    """A part of a picture.

    Attributes:
        mask: ``(H,W)`` over the picture.
        box: What the user gave, or the bounds of the mask.
        source: The file of the mask; empty for a box.
    """

    mask: NDArray[np.bool_]
    box: Box
    source: str = ""

    @classmethod
    def of_box(cls, box: Box, size: tuple[int, int]) -> Region:
        """A rectangle ``(x, y, width, height)`` of a picture of ``(height, width)`` pixels.

        Raises:
            ComparisonError: If it is empty or not wholly inside the picture.
        """
        x, y, wide, high = box
        height, width = size
        finite = all(np.isfinite(value) for value in box)
        if not finite:
            raise ComparisonError(f"Expected a region of four finite numbers, got {box}.")
        if wide < 1 or high < 1:
            raise ComparisonError(
                f"Expected a region of at least one pixel, got {wide:g} x {high:g}."
            )
        if x < 0 or y < 0 or x + wide > width or y + high > height:
            raise ComparisonError(
                f"Expected a region inside the picture of {width} x {height} pixels, got x from "
                f"{x:g} to {x + wide:g} and y from {y:g} to {y + high:g}."
            )
        mask = np.zeros(size, dtype=bool)
        mask[
            round(y) : max(round(y) + 1, round(y + high)),
            round(x) : max(round(x) + 1, round(x + wide)),
        ] = True
        return cls(mask, (float(x), float(y), float(wide), float(high)))

    @classmethod
    def of_mask(cls, path: str | Path, size: tuple[int, int]) -> Region:
        """A mask file of the picture's size: its alpha channel, else where it is bright.

        Raises:
            ImageError: If it cannot be read or has another size.
            ComparisonError: If it marks nothing.
        """
        values = mask_of(Record(Path(path), mask=Path(path)), size)
        if values is None:  # a mask without an alpha channel: its brightness
            values = mask_of(Record(Path(), mask=Path(path)), size)
        assert values is not None
        mask = values > _OPAQUE
        if not mask.any():
            raise ComparisonError(
                f"Expected a mask that is white where the region is, but '{path}' marks nothing."
            )
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        left, top = float(columns[0]), float(rows[0])
        bounds = (left, top, float(columns[-1]) + 1 - left, float(rows[-1]) + 1 - top)
        return cls(mask, bounds, str(path))

    def coverage(self, geometry: Geometry, grid: tuple[int, int], layer: Span = WHOLE) -> Tensor:
        """Which share of each position's cell it covers ``(h,w)``, in [0, 1].

        Args:
            geometry: Where the network's view lies in the picture.
            grid: ``(h, w)``.
            layer: Where in the view the positions lie: top, left, bottom and right as shares.

        Raises:
            ComparisonError: If the network or the layer saw nothing of it.
        """
        seen = torch.from_numpy(geometry.from_original(self.mask)).float()
        if not bool(seen.any()):
            _mark(seen, self.mask, geometry)
        if not bool(seen.any()):
            left, top, right, bottom = geometry.box
            raise ComparisonError(
                f"Expected a region that the network saw, x from {left:.0f} to {right:.0f} and y "
                f"from {top:.0f} to {bottom:.0f}, but none of it lies there; --fit pad or squash "
                "shows the network the whole picture."
            )
        rows, columns = (
            torch.from_numpy(overlaps(cells, start, end, pixels)).float()
            for cells, start, end, pixels in zip(
                grid, layer[:2], layer[2:], seen.shape, strict=True
            )
        )
        covered = rows @ seen @ columns.T
        if not bool(covered.any()):
            raise ComparisonError(
                "Expected a region within what the layer sees, which is a part of the picture "
                "alone, but none of it lies there; make the index of an earlier layer with --layer."
            )
        return covered


def _mark(seen: Tensor, mask: NDArray[np.bool_], geometry: Geometry) -> None:
    """Marks where a part lies that is too small to hold the centre of a pixel of the view."""
    rows, columns = np.nonzero(mask)
    indices = np.stack((rows, columns), axis=1) + 0.5
    at = np.floor(indices * geometry.scale - np.asarray(geometry.offset)).astype(int)
    rows, columns = at[((at >= 0) & (at < geometry.size)).all(axis=1)].T
    seen[rows, columns] = 1.0


def region_vector(query: Factors, coverage: Tensor) -> Tensor:
    """What a region adds to the vector of an image, at unit length ``(E,)``.

    The sum of the positions' parts, each as much as the region covers of its cell; biases, which
    belong to no position, are left out.

    Args:
        query: Factors of one image.
        coverage: ``(h,w)``, from :meth:`Region.coverage`.

    Raises:
        ComparisonError: If the region adds nothing.
    """
    summed = torch.einsum("hw,ehw->e", coverage.to(query.parts.device), query.parts[0].float())
    if not bool(summed.norm() > 0):
        raise ComparisonError(
            "Expected a region that adds something to the picture's vector, but its positions are "
            "all zero; choose another or a larger one."
        )
    return unit_rows(summed, dim=0)


def similarities(images: Factors, unit: Tensor) -> Tensor:
    """The cosine of a vector with what each position of images adds ``(K,h,w)``.

    Args:
        images: Factors of ``K`` images.
        unit: ``(E,)``, of unit length.
    """
    parts = images.parts.float().flatten(2)
    along = torch.matmul(unit, parts)
    lengths = parts.square().sum(dim=1).sqrt()
    # A position that adds nothing is like nothing.
    cosines = torch.where(lengths > 0, along / lengths.clamp_min(1e-30), torch.zeros_like(along))
    return cosines.reshape(len(images), *images.parts.shape[2:])


def best_box(similarity: Tensor, geometry: Geometry, layer: Span = WHOLE) -> Box:
    """The box of the place that a map points at, in pixels of the picture.

    The map is interpolated to at least 28 cells a side. A threshold is laid between its mean and
    its maximum (``ABOVE_MEAN``), and of all rectangles the one with the largest sum of what is
    above it, less what is below, is taken.

    Args:
        similarity: ``(h,w)``.
        geometry: Where the network's view lies in the picture.
        layer: As for :meth:`Region.coverage`.
    """
    times = max(1, -(-_FINE // min(similarity.shape)))
    fine = F.interpolate(
        similarity[None, None].float(), scale_factor=times, mode="bilinear", align_corners=False
    )[0, 0]
    values = fine.double().cpu().numpy()
    mean = float(similarity.double().mean())
    border = mean + ABOVE_MEAN * (float(similarity.double().max()) - mean)
    top, left, bottom, right = _best_rectangle(values - border)
    down, along = (
        np.linspace(start * side, end * side, cells + 1).clip(0, side)
        for start, end, side, cells in zip(
            layer[:2], layer[2:], geometry.size, values.shape, strict=True
        )
    )
    first = geometry.point_to_original(float(along[left]), float(down[top]))
    last = geometry.point_to_original(float(along[right]), float(down[bottom]))
    return first[0], first[1], last[0] - first[0], last[1] - first[1]


def _best_rectangle(values: NDArray[np.float64]) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of the rectangle with the largest sum."""
    sums = np.concatenate((np.zeros((1, values.shape[1])), values.cumsum(axis=0)))
    tops, bottoms = np.triu_indices(len(sums), 1)
    bands = sums[bottoms] - sums[tops]
    ends = np.concatenate((np.zeros((len(bands), 1)), bands.cumsum(axis=1)), axis=1)
    lowest = np.minimum.accumulate(ends[:, :-1], axis=1)
    gains = ends[:, 1:] - lowest
    band, right = np.unravel_index(int(gains.argmax()), gains.shape)
    left = int(ends[band, : right + 1].argmin())
    return int(tops[band]), left, int(bottoms[band]), int(right) + 1
