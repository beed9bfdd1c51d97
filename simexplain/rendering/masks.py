"""Masks on pictures: laid over them, cut out of them, and the marks given to a cut, in colours."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from simexplain.rendering.overlay import Pixels

TINT = (255, 92, 40)
MARK_COLOURS = ((40, 44, 64), (255, 214, 64), (88, 110, 168), (240, 128, 60))
"""Of background, object, probable background, probable object."""
_STRENGTH = 0.42
_SOFT = 0.8


def outlined(picture: Pixels, mask: NDArray[np.bool_]) -> Pixels:
    """The picture, tinted inside the mask and darkened outside, with the mask's outline.

    Args:
        picture: RGB ``(H,W,3)``.
        mask: ``(H,W)``.
    """
    grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    drawn = np.where(mask[..., None], picture, (0.55 * picture + 0.25 * grey)).astype(np.float32)
    tint = np.array(TINT, dtype=np.float32)
    drawn[mask] = (1 - _STRENGTH) * drawn[mask] + _STRENGTH * tint
    made: Pixels = drawn.round().clip(0, 255).astype(np.uint8)
    width = max(1, round(max(mask.shape) / 300))
    lines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(made, lines, -1, (255, 255, 255), width, cv2.LINE_AA)
    return made


def cut_out(picture: Pixels, mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The picture where the mask is, transparent elsewhere: RGBA ``(H,W,4)``.

    Opacity falls off inside the mask's edge, over about a pixel, so that nothing of the ground
    shows; colours of transparent pixels are zero.
    """
    soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), _SOFT)
    alpha = ((2 * soft - 1).clip(0, 1) * mask * 255).round().astype(np.uint8)
    if mask.any() and not alpha.any():
        alpha = mask.astype(np.uint8) * 255  # an object of a few pixels has no inside
    colours = np.where(alpha[..., None] > 0, picture, 0).astype(np.uint8)
    return np.dstack((colours, alpha))


def marked(picture: Pixels, marks: Pixels) -> Pixels:
    """The marks given to a cut, in :data:`MARK_COLOURS` over the picture in grey."""
    grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    colours = np.array(MARK_COLOURS, dtype=np.float32)[marks]
    mixed: Pixels = (0.4 * grey + 0.6 * colours).round().clip(0, 255).astype(np.uint8)
    return mixed
