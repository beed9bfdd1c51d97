"""Heatmaps: brought to another size, their peaks, and how well they match masks and points.

A map without positive heat misses: it scores 0, so that a method gains nothing by empty maps. An
empty mask has no score: it is NaN, and means leave it out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from simexplain.errors import ComparisonError
from simexplain.networks import at_least_single

_EQUAL = 1e-6
"""Rounding alone makes equal values of an upsampled float32 map this different."""


def grown(heatmaps: Tensor, size: tuple[int, int]) -> Tensor:
    """Heatmaps ``(...,h,w)`` at another size ``(...,H,W)``, as they are drawn over a picture.

    Bilinear with pixel centres at half-integers; averaged where a map is larger than that.

    Raises:
        ComparisonError: If a map has fewer than two axes, no pixel or values that are not finite.
    """
    if heatmaps.dim() < 2 or not heatmaps.numel():
        raise ComparisonError(
            f"Expected heatmaps (...,h,w) with at least one pixel, got {tuple(heatmaps.shape)}."
        )
    heat = at_least_single(heatmaps.detach())
    if not bool(heat.isfinite().all()):
        raise ComparisonError(
            "Expected finite heatmaps, got NaN or infinity; look for it in the model's weights."
        )
    own = (int(heat.shape[-2]), int(heat.shape[-1]))
    if own == size:
        return heat
    smaller = size[0] < own[0] or size[1] < own[1]
    flat = heat.reshape(-1, 1, *own)
    made = F.interpolate(
        flat, size=list(size), mode="bilinear", align_corners=False, antialias=smaller
    )
    return made.view(*heat.shape[:-2], *size)


def placed(
    heatmaps: Tensor, size: tuple[int, int], region: tuple[float, float, float, float]
) -> Tensor:
    """Heatmaps ``(B,K,h,w)`` whose cells lie in a part of the image, at its size ``(B,K,H,W)``.

    Bilinear with pixel centres at half-integers; zero beyond the part.

    Args:
        heatmaps: The maps.
        size: ``(H,W)`` of the image.
        region: Top, left, bottom and right of the part as shares of the image.
    """
    if region == (0.0, 0.0, 1.0, 1.0):
        return F.interpolate(heatmaps, size=size, mode="bilinear", align_corners=False)
    sides = []
    for axis, start, end in ((-2, *region[::2]), (-1, *region[1::2])):
        centres = (torch.arange(size[axis]) + 0.5) / size[axis]
        inside = (centres >= start) & (centres <= end)
        weights = tents(centres, heatmaps.shape[axis], start, end) * inside[:, None]
        sides.append(weights.to(heatmaps))
    return sides[0] @ heatmaps @ sides[1].T


def tents(places: Tensor, cells: int, start: float, end: float) -> Tensor:
    """Bilinear weights ``(P,cells)`` of places along one side; the edge goes on beyond the cells.

    Args:
        places: ``(P,)``, as shares of the side.
        cells: How many lie between start and end.
        start: Where the cells begin, as a share of the side.
        end: Where they end.
    """
    along = ((places - start) / (end - start) * cells - 0.5).clamp(0, cells - 1)
    steps = torch.arange(cells, dtype=along.dtype, device=along.device)
    return (1 - (along[:, None] - steps).abs()).clamp_min(0)


def signed_heat(
    values: Tensor, size: tuple[int, int], region: tuple[float, float, float, float]
) -> NDArray[np.float32]:
    """A signed map ``(h,w)`` over the image ``(H,W)``, divided by its largest absolute value.

    Args:
        values: The map.
        size: As for :func:`placed`.
        region: As for :func:`placed`.
    """
    heat = placed(values[None, None].float(), size, region)[0, 0]
    top = heat.abs().max()
    drawn: NDArray[np.float32] = (heat / top if bool(top > 0) else heat).cpu().numpy()
    return drawn


def peak_of(heatmap: Tensor) -> tuple[int, int] | None:
    """The pixel ``(row, column)`` where a heatmap ``(H,W)`` is highest; None if nothing is above 0.

    Maps made of blocks have flat maxima, and so have upsampled ones at the border, where the first
    pixel is a corner of the block. Here it is, of all pixels as high as the first maximum and
    connected with it, the one nearest to their centre; of equally near ones the first, row by row.
    """
    top = float(heatmap.max())
    if not top > 0:
        return None
    row, column = divmod(int(heatmap.argmax()), heatmap.shape[1])
    flat = (heatmap >= top * (1 - _EQUAL)).cpu().numpy().astype(np.uint8)
    if flat.sum() > 1:
        _, parts = cv2.connectedComponents(flat, connectivity=4)
        own = np.argwhere(parts == parts[row, column])
        nearest = np.square(own - own.mean(axis=0)).sum(axis=1).argmin()
        row, column = own[nearest].tolist()
    return row, column


Correspondence = Callable[[float, float], Tensor]
"""From a point ``(x, y)`` in image A to a heatmap ``(h,w)`` on image B."""


def pointing(heatmaps: Tensor, masks: Tensor, tolerance: float = 0) -> Tensor:
    """The pointing game (Zhang et al. 2016): whether the hottest pixel lies in the mask.

    Args:
        heatmaps: ``(M,h,w)``, upsampled bilinearly to the masks. Of equal maxima the first counts,
            as in public implementations, so that of a flat maximum it is the upper left corner;
            ``Explanation.peaks`` names its middle.
        masks: ``(M,H,W)``, boolean.
        tolerance: How far outside the mask still hits, in its pixels, between pixel centres; the
            paper allows 15.

    Returns:
        ``(M,)`` float64: 1 hit, 0 miss or empty map, NaN for an empty mask.

    Raises:
        ComparisonError: If shapes or types do not fit.
    """
    heat = _fitted(heatmaps, masks)
    peaks = _peaks(heat)
    hits = torch.stack(
        [_reach(mask, peak) <= tolerance for mask, peak in zip(masks, peaks, strict=True)]
    ).to(heat)
    return _valid(torch.where(heat.amax(dim=(1, 2)) > 0, hits, 0.0), masks)


def energy(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """The energy-based pointing game (Wang et al. 2020, Score-CAM): positive heat inside.

    Args:
        heatmaps: ``(M,h,w)``, upsampled bilinearly to the masks; negative values count as 0.
        masks: ``(M,H,W)``, boolean.

    Returns:
        ``(M,)`` float64 in [0, 1], the share of all positive heat; NaN for an empty mask.
    """
    heat = _fitted(heatmaps, masks).relu()
    inside, total = (heat * masks).sum(dim=(1, 2)), heat.sum(dim=(1, 2))
    return _valid(inside / torch.where(total > 0, total, 1.0), masks)


def iou(heatmaps: Tensor, masks: Tensor, threshold: float) -> Tensor:
    """Intersection over union of the mask and the pixels at least ``threshold`` times as hot.

    Args:
        heatmaps: ``(M,h,w)``, upsampled bilinearly to the masks.
        masks: ``(M,H,W)``, boolean.
        threshold: As a share of each map's own maximum, in (0, 1].

    Returns:
        ``(M,)`` float64 in [0, 1]; NaN for an empty mask.
    """
    if not 0 < threshold <= 1:
        raise ComparisonError(f"Expected a threshold in (0, 1], got {threshold}.")
    heat = _fitted(heatmaps, masks)
    top = heat.amax(dim=(1, 2), keepdim=True)
    chosen = (heat >= threshold * top) & (top > 0)
    both, either = (chosen & masks).sum(dim=(1, 2)), (chosen | masks).sum(dim=(1, 2))
    return _valid(both.to(heat) / either.clamp(min=1), masks)


def best_iou(heatmaps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The highest IoU over all positive thresholds, and where it is reached.

    How well a map could separate the object with the best threshold; which is searched exactly,
    among the values of the map.

    Args:
        heatmaps: ``(M,h,w)``, upsampled bilinearly to the masks.
        masks: ``(M,H,W)``, boolean.

    Returns:
        IoU ``(M,)`` float64 and thresholds ``(M,)`` as shares of each map's maximum; NaN for an
        empty mask, and a threshold of NaN for an empty map.
    """
    flat = _fitted(heatmaps, masks).flatten(1)
    heat, order = flat.sort(dim=1, descending=True)
    inside = masks.flatten(1).gather(1, order).cumsum(dim=1)
    taken = torch.arange(1, flat.shape[1] + 1, device=flat.device)
    union = taken + masks.sum(dim=(1, 2))[:, None] - inside
    # Equally hot pixels pass a threshold together: only the last of them ends a choice.
    last = torch.ones_like(heat, dtype=torch.bool)
    last[:, :-1] = heat[:, :-1] > heat[:, 1:]
    reached = torch.where(last & (heat > 0), inside.to(heat) / union, 0.0)
    best, index = reached.max(dim=1)
    top = heat[:, 0]
    share = heat.gather(1, index[:, None])[:, 0] / torch.where(top > 0, top, torch.nan)
    return _valid(best, masks), _valid(share, masks)


def chance(masks: Tensor, tolerance: float = 0) -> Tensor:
    """The share of pixels that would hit ``(M,)``: what a random point and a flat map score.

    It is the chance level of :func:`pointing` and, without tolerance, of :func:`energy`.

    Args:
        masks: ``(M,H,W)``, boolean.
        tolerance: As for :func:`pointing`.
    """
    _check_masks(masks)
    return _valid(widened(masks, tolerance).double().mean(dim=(1, 2)), masks)


def widened(masks: Tensor, tolerance: float) -> Tensor:
    """Masks ``(M,H,W)`` with every pixel whose centre is within the tolerance of one of theirs."""
    height, width = masks.shape[1:]
    # A disc is a stack of rows; how many mask pixels each row covers comes from running sums.
    sums = F.pad(masks.long().cumsum(dim=2), (1, 0))
    places = torch.arange(width, device=masks.device)
    wide = torch.zeros_like(masks)
    for down in range(-min(int(tolerance), height - 1), min(int(tolerance), height - 1) + 1):
        half = int(math.sqrt(tolerance**2 - down**2))
        right, left = (places + half + 1).clamp(max=width), (places - half).clamp(min=0)
        row = (sums[:, :, right] - sums[:, :, left]) > 0
        to = slice(max(0, down), height + min(0, down))
        wide[:, to] |= row[:, max(0, -down) : height - max(0, down)]
    return wide


def mean_valid(values: Tensor) -> float:
    """The mean of the values that are not NaN; NaN if all are."""
    return float(values.double().nanmean())


@dataclass(frozen=True)
class CorrespondenceScores:
    """The two-image pointing game.

    Attributes:
        share: Of the valid points, those whose maximum lies within the tolerance.
        chance: The same for a random place in B: the share of B's pixels within the tolerance.
        same_place: The same for maps that point at A's own place, scaled to B; a method must beat
            it to have found anything where two views differ little.
        hits: ``(P,)``, 1 or 0, NaN where the partner lies outside B.
        distances: ``(P,)`` in pixels of B; infinite for an empty map.
        found: ``(P,2)``, where the maxima lie, ``(x, y)``.
        expected: ``(P,2)``, where the partners lie.
    """

    share: float
    chance: float
    same_place: float
    hits: Tensor
    distances: Tensor
    found: Tensor
    expected: Tensor


def correspondences(
    maps: Tensor | Correspondence,
    points: Tensor,
    partners: Tensor,
    size: tuple[int, int],
    *,
    tolerance: float,
    size_a: tuple[int, int] | None = None,
) -> CorrespondenceScores:
    """Whether maps from points in image A point at their known partners in image B.

    All coordinates are ``(x, y)`` in pixels with the centre of the first pixel at (0.5, 0.5).

    Args:
        maps: ``(P,h,w)``, one heatmap on B for each point, or a function that makes one.
        points: ``(P,2)`` in A.
        partners: ``(P,2)`` in B, or the transformation from A to B: a homography ``(3,3)`` or an
            affine transformation ``(2,3)`` on columns ``(x, y, 1)``.
        size: Height and width of B, to which the maps are upsampled bilinearly.
        tolerance: In pixels of B.
        size_a: Height and width of A where it differs from B.

    Raises:
        ComparisonError: If shapes do not fit.
    """
    start = torch.as_tensor(points, dtype=torch.float64).cpu()
    if start.dim() != 2 or start.shape[1] != 2 or not len(start):
        raise ComparisonError(f"Expected points (P,2), got {tuple(start.shape)}.")
    expected = transformed(start, partners)
    drawn = maps if isinstance(maps, Tensor) else torch.stack([maps(*p) for p in start.tolist()])
    if drawn.dim() != 3 or len(drawn) != len(start):
        raise ComparisonError(
            f"Expected one heatmap (h,w) for each of {len(start)} points, got {tuple(drawn.shape)}."
        )
    heat = grown(drawn, size).cpu()
    peaks = _peaks(heat).flip(1) + 0.5
    empty = heat.amax(dim=(1, 2)) <= 0
    distances = (peaks - expected).norm(dim=1).masked_fill(empty, torch.inf)
    limit = torch.tensor([size[1], size[0]], dtype=torch.float64)
    outside = ((expected < 0) | (expected > limit)).any(dim=1) | ~expected.isfinite().all(dim=1)
    height, width = size_a or size
    same = start * limit / torch.tensor([width, height], dtype=torch.float64)
    hits, lazy = (
        (gap <= tolerance).double().masked_fill(outside, torch.nan)
        for gap in (distances, (same - expected).norm(dim=1))
    )
    random = _near(expected, size, tolerance).masked_fill(outside, torch.nan)
    return CorrespondenceScores(
        mean_valid(hits), mean_valid(random), mean_valid(lazy), hits, distances, peaks, expected
    )


def transformed(points: Tensor, partners: Tensor) -> Tensor:
    """Where points ``(P,2)`` go: their given partners ``(P,2)``, or by a matrix; float64.

    Three points with partners ``(3,2)`` are never taken for a matrix, which has three columns.

    Raises:
        ComparisonError: If it is neither.
    """
    given = torch.as_tensor(partners, dtype=torch.float64).cpu()
    if given.shape == points.shape:
        return given
    if given.shape not in ((3, 3), (2, 3)):
        raise ComparisonError(
            f"Expected {len(points)} partners (P,2) or a matrix (3,3) or (2,3), got "
            f"{tuple(given.shape)}."
        )
    there = torch.cat((points, torch.ones(len(points), 1, dtype=torch.float64)), dim=1) @ given.T
    if len(given) == 2:
        return there
    # Points behind the camera have no partner: they land outside by way of NaN.
    depth = torch.where(there[:, 2:] > 0, there[:, 2:], torch.nan)
    return there[:, :2] / depth


def _near(places: Tensor, size: tuple[int, int], tolerance: float) -> Tensor:
    """The share of an image's pixels whose centres lie within the tolerance of each place."""
    down, right = (torch.arange(side, dtype=torch.float64) + 0.5 for side in size)
    shares = []
    for x, y in places.tolist():
        away = (right[None] - x).square() + (down[:, None] - y).square()
        shares.append((away <= tolerance**2).double().mean())
    return torch.stack(shares)


def _peaks(heat: Tensor) -> Tensor:
    """Row and column of the first maximum of each map ``(M,H,W)``, as ``(M,2)``."""
    flat = heat.flatten(1).argmax(dim=1)
    return torch.stack((flat // heat.shape[2], flat % heat.shape[2]), dim=1)


def _reach(mask: Tensor, index: Tensor) -> Tensor:
    """How far a place ``(2,)`` (row, column) is from the mask's nearest pixel; else infinite."""
    inside = mask.nonzero().double()
    if not len(inside):
        return torch.full((), torch.inf, dtype=torch.float64, device=mask.device)
    return (inside - index).square().sum(dim=1).amin().sqrt()


def _fitted(heatmaps: Tensor, masks: Tensor) -> Tensor:
    _check_masks(masks)
    if heatmaps.dim() != 3 or len(heatmaps) != len(masks):
        raise ComparisonError(
            f"Expected one heatmap (h,w) for each of {len(masks)} masks, got "
            f"{tuple(heatmaps.shape)}."
        )
    return grown(heatmaps.to(masks.device), (int(masks.shape[1]), int(masks.shape[2]))).double()


def _check_masks(masks: Tensor) -> None:
    if masks.dim() != 3 or masks.dtype != torch.bool or not masks.numel():
        raise ComparisonError(
            f"Expected boolean masks (M,H,W), got {tuple(masks.shape)} of {masks.dtype}."
        )


def _valid(values: Tensor, masks: Tensor) -> Tensor:
    return values.masked_fill(~masks.flatten(1).any(dim=1), torch.nan)
