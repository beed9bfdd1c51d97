"""Heatmaps brought to another size, in one way for every metric."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from simexplain.errors import ComparisonError
from simexplain.networks import at_least_single


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
