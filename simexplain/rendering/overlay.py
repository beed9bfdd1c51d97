"""Heatmaps and masks laid over a picture; every renderer takes arrays and gives an array."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import cv2
import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Heat = NDArray[np.float32]
Renderer = Callable[[Pixels, Heat], Pixels]
Values = TypeVar("Values", Heat, NDArray[np.bool_])

COLOURMAP = "inferno"
"""Perceptually uniform: equal steps of heat look like equal steps."""

CONTOUR_LEVELS = (0.25, 0.5, 0.75)

FULL_HEAT = 0.995
"""The share of pixels below the full heat of a map with single bright pixels."""

_SMOOTH = 1 / 120
_ROWS = 64


def overlay(picture: Pixels, heatmap: Heat) -> Pixels:
    """The heat in colour over the picture, more opaque where it is hotter.

    Args:
        picture: RGB ``(H,W,3)``.
        heatmap: ``(H,W)`` in [0, 1].
    """
    return _in_strips(lambda rows, heat: _coloured(rows, heat.clip(0, 1)), picture, heatmap)


def signed_overlay(picture: Pixels, heatmap: Heat) -> Pixels:
    """The same for heat in [-1, 1]: warm where it is positive, cold where it is negative."""
    return _in_strips(lambda rows, heat: _coloured(rows, heat.clip(-1, 1)), picture, heatmap)


def contour(picture: Pixels, heatmap: Heat) -> Pixels:
    """Lines at a quarter, half and three quarters of the full heat, the picture left as it is."""
    drawn: Pixels = picture.copy()
    width = max(1, round(max(picture.shape[:2]) / 220))
    for level in CONTOUR_LEVELS:
        inside = (heatmap >= level).astype(np.uint8)
        lines, _ = cv2.findContours(inside, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        colour = tuple(int(c) for c in colour_table()[round(255 * (0.2 + 0.75 * level))])
        cv2.drawContours(drawn, lines, -1, (255, 255, 255), 2 * width + 1, cv2.LINE_AA)
        cv2.drawContours(drawn, lines, -1, colour, width, cv2.LINE_AA)
    return drawn


def spotlight(picture: Pixels, heatmap: Heat) -> Pixels:
    """The picture itself, lit where the heat is and dark elsewhere."""

    def lit(rows: Pixels, heat: Heat) -> Pixels:
        return _mixed(np.zeros_like(rows), rows, 0.14 + 0.86 * np.sqrt(heat.clip(0, 1)))

    return _in_strips(lit, picture, heatmap)


def robust(heatmaps: Heat, *, shared: bool = False) -> Heat:
    """Maps of single pixels made visible: smoothed slightly, and scaled without the outliers.

    A few pixels of a gradient are far above all others, so that a map divided by its maximum looks
    empty. Here each map is smoothed by a Gaussian of 1/120 of its shorter side, divided by the
    quantile :data:`FULL_HEAT` of its values, and cut off at one.

    Args:
        heatmaps: ``(K,H,W)``, non-negative.
        shared: One scale for all of them.

    Returns:
        ``(K,H,W)`` in [0, 1]; a zero map stays zero.
    """
    sigma = max(1e-3, _SMOOTH * min(heatmaps.shape[1:]))
    smooth = np.stack([cv2.GaussianBlur(heatmap, (0, 0), sigma) for heatmap in heatmaps])
    groups = smooth[None] if shared else smooth[:, None]
    full = np.quantile(groups.reshape(len(groups), -1), FULL_HEAT, axis=1)
    full = np.where(full > 0, full, groups.reshape(len(groups), -1).max(axis=1))
    scaled: Heat = (groups / np.where(full > 0, full, 1)[:, None, None, None]).clip(0, 1)
    return scaled.reshape(heatmaps.shape).astype(np.float32)


RENDERERS: dict[str, Renderer] = {"overlay": overlay, "contour": contour, "spotlight": spotlight}
"""Every renderer by name; a new one is one function and one line here."""


def _in_strips(
    drawn: Callable[[Pixels, Values], Pixels], picture: Pixels, heatmap: Values
) -> Pixels:
    """Some rows at a time, since a picture of 100 million pixels would need gigabytes as floats."""
    whole = np.empty(picture.shape, picture.dtype)
    for top in range(0, len(picture), _ROWS):
        part = slice(top, top + _ROWS)
        whole[part] = drawn(picture[part], heatmap[part])
    return whole


def _grey(picture: Pixels) -> Pixels:
    grey: Pixels = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return grey


def _mixed(below: Pixels, above: Pixels, opacity: NDArray[np.float32]) -> Pixels:
    share = opacity[..., None]
    mixed: Pixels = np.round(below * (1 - share) + above * share).astype(np.uint8)
    return mixed


def _coloured(picture: Pixels, heat: Heat) -> Pixels:
    # A little grey under the colour keeps the picture's own reds from reading as heat.
    grey = _grey(picture)
    base = cv2.addWeighted(picture, 0.6, grey, 0.4, 0)
    colours = colour_table(signed=True)[255 + np.round(255 * heat).astype(np.int16)]
    return _mixed(base, colours, np.float32(0.78) * np.sqrt(np.abs(heat)))


@lru_cache(maxsize=2)
def colour_table(*, signed: bool = False) -> Pixels:
    """The colours of heat from 0 to 1, ``(256,3)``; signed ``(511,3)`` from -1, in blue below 0."""
    warm = colormaps[COLOURMAP](np.arange(256), bytes=True)[:, :3]
    table: Pixels = np.concatenate((warm[:0:-1, ::-1], warm)) if signed else warm
    return np.ascontiguousarray(table)


TINT = (255, 92, 40)
MARK_COLOURS = ((40, 44, 64), (255, 214, 64), (88, 110, 168), (240, 128, 60))
"""Of background, object, probable background, probable object."""
_STRENGTH = 0.42
_SOFT = 0.8
_MARGIN = 8
"""Rows around some others that a blur of that width does not look beyond."""


def outlined(picture: Pixels, mask: NDArray[np.bool_]) -> Pixels:
    """The picture, tinted inside the mask and darkened outside, with the mask's outline.

    Args:
        picture: RGB ``(H,W,3)``.
        mask: ``(H,W)``.
    """
    made = _in_strips(_tinted, picture, mask)
    width = max(1, round(max(mask.shape) / 300))
    lines, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(made, lines, -1, (255, 255, 255), width, cv2.LINE_AA)
    return made


def _tinted(picture: Pixels, mask: NDArray[np.bool_]) -> Pixels:
    """The colours of :func:`outlined`."""
    grey = _grey(picture)
    drawn = np.where(mask[..., None], picture, (0.55 * picture + 0.25 * grey)).astype(np.float32)
    tint = np.array(TINT, dtype=np.float32)
    drawn[mask] = (1 - _STRENGTH) * drawn[mask] + _STRENGTH * tint
    made: Pixels = drawn.round().clip(0, 255).astype(np.uint8)
    return made


def cut_out(picture: Pixels, mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The picture where the mask is, transparent elsewhere: RGBA ``(H,W,4)``.

    Opacity falls off inside the mask's edge, over about a pixel, so that nothing of the ground
    shows; colours of transparent pixels are zero.
    """
    cut = np.empty((*mask.shape, 4), dtype=np.uint8)
    for top in range(0, len(mask), _ROWS):
        above, below = max(0, top - _MARGIN), top + _ROWS + _MARGIN
        soft = cv2.GaussianBlur(mask[above:below].astype(np.float32), (0, 0), _SOFT)
        part = slice(top, top + _ROWS)
        own = soft[top - above :][: len(mask[part])]
        cut[part, :, 3] = ((2 * own - 1).clip(0, 1) * mask[part] * 255).round()
    alpha = cut[..., 3]
    if mask.any() and not alpha.any():
        alpha[:] = mask * np.uint8(255)  # an object of a few pixels has no inside
    np.multiply(picture, (alpha > 0)[..., None], out=cut[..., :3])
    return cut


def marked(picture: Pixels, marks: Pixels) -> Pixels:
    """The marks given to a cut, in :data:`MARK_COLOURS` over the picture in grey."""
    grey = _grey(picture)
    colours = np.array(MARK_COLOURS, dtype=np.float32)[marks]
    mixed: Pixels = (0.4 * grey + 0.6 * colours).round().clip(0, 255).astype(np.uint8)
    return mixed
