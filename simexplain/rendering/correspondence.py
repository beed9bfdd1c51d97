"""Two pictures and what answers to what in them: lines, signed heat, and a row for each point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle
from numpy.typing import NDArray

from simexplain.rendering.cards import FAINT, INK, LINE, SMALL, Sheet, fitted, foot_lines
from simexplain.rendering.overlay import COLOURMAP, Heat, Pixels

COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#0072b2", "#f0e442", "#999999")
"""Of lines and points (Okabe and Ito), which colour-blind people can tell apart."""

_CELL, _TALLEST, _GAP, _EDGE, _BAR = 3.3, 4.2, 0.55, 0.25, 0.95
_HEAD, _CAPTION, _BELOW = 0.8, 0.3, 0.1

Spot = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """Both pictures once more, with heat or a mark on them.

    Attributes:
        texts: Above each picture.
        heats: ``(H,W)`` in [-1, 1] over each picture; None for the picture as it is.
        marks: ``(x, y)`` in pixels to ring in each picture, or None.
        colour: Of the marks.
    """

    texts: tuple[str, str]
    heats: tuple[Heat | None, Heat | None]
    marks: tuple[Spot | None, Spot | None] = (None, None)
    colour: str = INK


def correspondence(
    pictures: tuple[Pixels, Pixels],
    captions: tuple[str, str],
    boxes: tuple[tuple[float, float, float, float] | None, ...],
    lines: Sequence[tuple[Spot, Spot]],
    rows: Sequence[Row],
    *,
    title: str,
    verdict: str,
    footer: str,
    notes: Sequence[str] = (),
) -> Figure:
    """Draws a matching.

    Args:
        pictures: Both, RGB ``(H,W,3)``.
        captions: A line for each, such as the file's name.
        boxes: What the network saw of each: left, top, right, bottom in pixels; None for all.
        lines: Pairs of points, the strongest first, to connect.
        rows: Below the connected pictures, from the top.
        title: The question, in a line.
        verdict: The score and that it adds up.
        footer: Model, layer and style, so that the figure can be cited.
        notes: Warnings, printed below.

    Returns:
        A figure that belongs to no window and no global state.
    """
    width = 2 * _EDGE + 2 * _CELL + _GAP + _BAR
    height = max(fitted(picture, _CELL, _TALLEST)[1] for picture in pictures)
    step = height + _CAPTION + _BELOW
    under = foot_lines(_legend(len(lines)), footer, notes, width)
    total = _HEAD + step * (1 + len(rows)) + LINE * len(under) + 0.2
    sheet = Sheet(width, total)
    middle = _EDGE + _CELL + _GAP / 2
    most = 2 * _CELL + _GAP
    sheet.say(middle, 0.3, title, most=most, size=13, ha="center")
    sheet.say(middle, 0.6, verdict, most=most, size=10, ha="center", color=FAINT)
    top = _Row(sheet, Row(captions, (None, None)), pictures, boxes, _HEAD, height)
    _connect(sheet, top.axes, lines)
    for number, row in enumerate(rows):
        _Row(sheet, row, pictures, boxes, _HEAD + step * (number + 1), height)
    if rows:
        _bar(sheet, _HEAD + step + _CAPTION, height, any(_negative(row) for row in rows))
    return sheet.foot(under)


def signed_overlay(picture: Pixels, heat: Heat) -> Pixels:
    """The heat in colour over the picture: warm where it is positive, cold where negative.

    Args:
        picture: RGB ``(H,W,3)``.
        heat: ``(H,W)`` in [-1, 1].
    """
    grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    base = cv2.addWeighted(picture, 0.6, grey, 0.4, 0)
    heat = heat.clip(-1, 1)
    colours = _table()[np.round(255 + 255 * heat).astype(np.int64)]
    share = 0.78 * np.sqrt(np.abs(heat))[:, :, None]
    return np.asarray(np.round(base * (1 - share) + colours * share), dtype=np.uint8)


@lru_cache(maxsize=1)
def _table() -> NDArray[np.uint8]:
    """511 colours from -1 to 1: the house's heat, and for negative values the same in blue."""
    warm = colormaps[COLOURMAP](np.arange(256), bytes=True)[:, :3]
    cold = warm[:, ::-1]
    table: NDArray[np.uint8] = np.concatenate((cold[:0:-1], warm))
    return table


class _Row:
    """Both pictures side by side, on one middle line."""

    def __init__(
        self,
        sheet: Sheet,
        row: Row,
        pictures: tuple[Pixels, Pixels],
        boxes: tuple[tuple[float, float, float, float] | None, ...],
        top: float,
        height: float,
    ) -> None:
        self.axes: list[Axes] = []
        for place, picture in enumerate(pictures):
            left = _EDGE + place * (_CELL + _GAP)
            text = row.texts[place]
            middle = left + _CELL / 2
            sheet.say(middle, top + _CAPTION - 0.13, text, most=_CELL, ha="center", size=SMALL + 1)
            heat = row.heats[place]
            shown = picture if heat is None else signed_overlay(picture, heat)
            axes = sheet.picture(shown, left, top + _CAPTION, _CELL, height)
            if (box := boxes[place]) is not None:
                _frame(axes, box)
            if (mark := row.marks[place]) is not None:
                _ring(axes, mark, row.colour)
            self.axes.append(axes)


def _connect(sheet: Sheet, axes: Sequence[Axes], lines: Sequence[tuple[Spot, Spot]]) -> None:
    """Lines between the pictures, numbered at both ends, the strongest on top."""
    for number in reversed(range(len(lines))):
        colour = COLOURS[number % len(COLOURS)]
        a, b = lines[number]
        for edge, width in (("white", 3.4), (colour, 2.0)):
            line = ConnectionPatch(
                a, b, "data", "data", axesA=axes[0], axesB=axes[1], color=edge, linewidth=width,
                alpha=0.95, zorder=5 + 0.01 * (len(lines) - number),
            )  # fmt: skip
            sheet.figure.add_artist(line)
    for number in reversed(range(len(lines))):
        colour = COLOURS[number % len(COLOURS)]
        for place, (x, y) in zip(axes, lines[number], strict=True):
            box = {"boxstyle": "circle,pad=0.22", "facecolor": colour, "edgecolor": "white"}
            # On the sheet, not in the axes: those lie below the lines.
            sheet.figure.text(
                x, y, str(number + 1), transform=place.transData, ha="center", va="center",
                size=SMALL, weight="bold", color=INK, bbox=box, zorder=7 - 0.01 * number,
            )  # fmt: skip


def _ring(axes: Axes, point: Spot, colour: str) -> None:
    style: dict[str, Any] = {"marker": "o", "markersize": 13, "fillstyle": "none", "clip_on": False}
    axes.plot(*point, color="white", markeredgewidth=4.6, **style)
    axes.plot(*point, color=colour, markeredgewidth=2.6, **style)


def _frame(axes: Axes, box: tuple[float, float, float, float]) -> None:
    """The border of what the network saw."""
    left, top, right, bottom = box
    corner, size = (left - 0.5, top - 0.5), (right - left, bottom - top)
    for colour, dashes in (("white", "solid"), (FAINT, (0, (4, 3)))):
        style: dict[str, Any] = {"edgecolor": colour, "linestyle": dashes, "linewidth": 1.1}
        axes.add_patch(Rectangle(corner, size[0], size[1], fill=False, **style))


def _bar(sheet: Sheet, top: float, height: float, negative: bool) -> None:
    """The scale of the heat, beside the first row that has any."""
    axes = sheet.axes(2 * _EDGE + 2 * _CELL + _GAP, top, 0.14, height)
    colours = ListedColormap(_table()[0 if negative else 255 :] / 255)
    scale = ScalarMappable(Normalize(-1 if negative else 0, 1), colours)
    bar = sheet.figure.colorbar(scale, cax=axes)
    bar.set_ticks([-1, -0.5, 0, 0.5, 1] if negative else [0, 0.5, 1])
    bar.ax.tick_params(labelsize=SMALL - 1, colors=FAINT, length=2)
    bar.outline.set_visible(False)
    bar.set_label("share of each map's largest value", size=SMALL, color=FAINT)


def _negative(row: Row) -> bool:
    return any(heat is not None and float(heat.min()) < -0.02 for heat in row.heats)


def _legend(lines: int) -> str:
    if not lines:
        return ""
    return (
        "Lines: positions that are each other's best, by what they add together beyond what each "
        "adds on average; 1 is the strongest. Numbers stand in the middle of positions."
    )
