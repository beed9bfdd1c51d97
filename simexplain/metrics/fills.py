"""What takes the place of pixels that are hidden: in methods that hide parts, and in curves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Fill = Callable[[Tensor, Tensor], Tensor]
"""From images ``(...,3,H,W)`` and black ``(3,1,1)`` in their units to images of that shape."""

BLUR = 1 / 8
"""The standard deviation of the blur as a share of the shorter side: shapes go, the tone stays."""


def blurred(images: Tensor, black: Tensor | None = None) -> Tensor:
    """Images ``(...,3,H,W)`` under a Gaussian of :data:`BLUR` times their shorter side.

    At the borders the weights inside the image are scaled to one, so a flat image stays as it is.
    ``black`` is not used.
    """
    height, width = images.shape[-2:]
    exact = images.to(torch.promote_types(images.dtype, torch.float32))
    sigma = BLUR * min(height, width)
    rows, columns = (gaussian(side, sigma) for side in (height, width))
    down, along = (
        (weights / weights.sum(dim=1, keepdim=True)).to(exact) for weights in (rows, columns)
    )
    return (down @ exact @ along.T).to(images.dtype)


def mean_colour(images: Tensor, black: Tensor | None = None) -> Tensor:
    """Each image ``(...,3,H,W)`` in its own mean colour; ``black`` is not used."""
    return images.mean(dim=(-2, -1), keepdim=True).expand_as(images)


def blackened(images: Tensor, black: Tensor) -> Tensor:
    """Black ``(3,1,1)`` all over: zeros for images in [0, 1], else black after normalisation."""
    return black.to(images).expand_as(images)


def border_colour(images: Tensor, black: Tensor | None = None) -> Tensor:
    """Each image ``(...,3,H,W)`` in the mean colour of its outermost pixels; ``black`` is not used.

    Of objects that are cut out or photographed on plain ground it is that of the ground.
    """
    exact = images.to(torch.promote_types(images.dtype, torch.float32))
    whole, inner = exact.sum(dim=(-2, -1)), exact[..., 1:-1, 1:-1].sum(dim=(-2, -1))
    height, width = images.shape[-2:]
    count = height * width - max(height - 2, 0) * max(width - 2, 0)
    return ((whole - inner) / count)[..., None, None].to(images.dtype).expand_as(images)


FILLS: dict[str, Fill] = {
    "blur": blurred,
    "mean": mean_colour,
    "black": blackened,
    "border": border_colour,
}
"""The image heavily blurred, its own mean colour, black, or the colour of its border; one function
and one line each."""


def gaussian(side: int, sigma: float) -> Tensor:
    """Weights ``(side,side)`` of every place in the blur of every other, 1 for itself; float64."""
    places = torch.arange(side, dtype=torch.float64)
    return (-0.5 * ((places[:, None] - places[None]) / max(sigma, 1e-3)).square()).exp()
