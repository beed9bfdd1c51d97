"""The hottest part of a picture hidden, and as much of it elsewhere: what the check is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from simexplain.metrics.curves import ranks
from simexplain.metrics.fills import blurred, gaussian

SHARE = 10
"""One part in this many is hidden."""
_BORDER = 0.03
"""Standard deviation of the border between hidden and shown, as a share of the shorter side."""
_PLACES = (
    (2, 2), (0, 2), (2, 0), (1, 3), (3, 1), (1, 1), (3, 3), (1, 2), (2, 1), (3, 2), (2, 3), (0, 1),
    (1, 0), (0, 3), (3, 0),
)  # fmt: skip
"""Where the control may lie: quarters of height and width by which the hot part is moved."""


def hottest(heatmaps: Tensor) -> Tensor:
    """The hottest tenth of each map ``(...,H,W)``, boolean; less where there is less heat at all.

    Maps are smoothed before, so that of single hot pixels the place counts where most of them are.
    """
    size = (int(heatmaps.shape[-2]), int(heatmaps.shape[-1]))
    soft = _smoothed(heatmaps.relu())
    count = max(1, size[0] * size[1] // SHARE)
    return (ranks(soft, size) < count) & (soft > 0)


def elsewhere(masks: Tensor) -> Tensor:
    """As many pixels of each mask ``(...,H,W)`` in another place, the same for the same mask.

    The mask is moved by quarters of the picture, round its borders, to the place where it overlaps
    least with itself; of equal ones the one that is farthest away.
    """
    height, width = masks.shape[-2:]
    flat = masks.flatten(0, -3) if masks.dim() > 2 else masks[None]
    moved = [(down * height // 4, right * width // 4) for down, right in _PLACES]
    chosen = []
    for mask in flat:
        others = [torch.roll(mask, step, (0, 1)) for step in moved]
        overlaps = [int((mask & other).sum()) for other in others]
        chosen.append(others[overlaps.index(min(overlaps))])
    return torch.stack(chosen).view(masks.shape)


def hidden(images: Tensor, masks: Tensor, veil: Tensor | None = None) -> Tensor:
    """Images ``(...,C,H,W)`` blurred beyond recognition where masks ``(...,H,W)`` are true.

    The border between what is hidden and what is not is soft, so that it does not add a visible
    edge.

    Args:
        images: The images.
        masks: Where to hide.
        veil: The images, :func:`~simexplain.metrics.fills.blurred`, where they are at hand.
    """
    share = _smoothed(masks.to(torch.float32)).unsqueeze(-3).to(images.dtype)
    return torch.lerp(images, blurred(images) if veil is None else veil, share)


def _smoothed(maps: Tensor) -> Tensor:
    """Maps ``(...,H,W)`` under a narrow Gaussian, whose weights are scaled to one at borders."""
    height, width = maps.shape[-2:]
    rows, columns = (gaussian(side, _BORDER * min(height, width)) for side in (height, width))
    down, along = (weights / weights.sum(dim=1, keepdim=True) for weights in (rows, columns))
    return down.to(maps) @ maps @ along.to(maps).T
