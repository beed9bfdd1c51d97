"""Soft-masking: an image without what its attention map shows (section 3.2 of the SAM paper)."""

from __future__ import annotations

from torch import Tensor

from simexplain.arguments import typed
from simexplain.errors import ComparisonError
from simexplain.methods.layer_maps import at_grid, unit_scaled


def attention_mask(
    maps: Tensor, size: tuple[int, int], *, alpha: float = 10.0, beta: float = 0.5
) -> Tensor:
    """``sigmoid(alpha * (M - beta))`` of maps brought to the images' size, in (0, 1).

    Maps are upsampled bilinearly and divided by their maximum; a map that is zero everywhere
    stays zero, which hides next to nothing.

    Args:
        maps: ``(M,h,w)``, non-negative.
        size: ``(H,W)`` of the images.
        alpha: Steepness.
        beta: The share of the maximum at which a pixel is half hidden.

    Returns:
        ``(M,H,W)``, differentiable in the maps.
    """
    scaled = unit_scaled(at_grid(maps, size))
    return (alpha * (scaled - beta)).sigmoid()


@typed
def soft_mask(
    images: Tensor,
    maps: Tensor,
    *,
    alpha: float = 10.0,
    beta: float = 0.5,
    ground: Tensor | None = None,
) -> Tensor:
    """Images without the pixels of high attention: ``x * (1 - sigmoid(alpha * (M - beta)))``.

    On preprocessed images a hidden pixel takes the data set's mean colour, which is zero there.

    Args:
        images: ``(M,3,H,W)``.
        maps: ``(M,h,w)``, non-negative; any scale.
        alpha: See :func:`attention_mask`.
        beta: Likewise.
        ground: What shows where an image is hidden, in place of zeros; broadcasts to ``images``.

    Returns:
        ``(M,3,H,W)``, differentiable in both.

    Raises:
        ComparisonError: If there is not one map for each image.
    """
    if maps.dim() != 3 or images.dim() != 4 or len(maps) != len(images):
        raise ComparisonError(
            f"Expected images (M,3,H,W) and as many maps (M,h,w), got {tuple(images.shape)} and "
            f"{tuple(maps.shape)}."
        )
    size = int(images.shape[2]), int(images.shape[3])
    mask = attention_mask(maps, size, alpha=alpha, beta=beta).unsqueeze(1)
    shown = images * (1 - mask)
    return shown if ground is None else shown + ground * mask
