"""Heatmaps brought to another size and their peaks, in one way for everything."""

from __future__ import annotations

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
