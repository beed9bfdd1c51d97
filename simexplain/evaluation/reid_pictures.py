"""Failures of re-identification as pictures: who was asked for, who came, who was meant."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from simexplain.data.images import read_picture
from simexplain.rendering.lettering import write
from simexplain.rendering.panel import ROLE_COLOURS, ShownFigure

if TYPE_CHECKING:
    from simexplain.evaluation.reid_result import Failure, Reidentification

_INK, _FAINT = "#222222", "#666666"
_ACROSS = 4
_SIDE, _TALL, _GAP, _BETWEEN = 0.62, 1.24, 0.06, 0.42
_HEAD, _LINE, _EDGE = 0.72, 0.15, 0.2
_PARTS = (("query", "anchor"), ("came first", "negative"), ("was meant", "positive"))


def draw_failures(result: Reidentification, most: int) -> Figure:
    """A block of three pictures for each failure, the worst first.

    Args:
        result: Whose failures.
        most: How many to draw at most.

    Raises:
        ImageError: If a picture cannot be read.
    """
    failures, count = result.failures[:most], len(result.failures)
    model = str(result.settings["model"])
    across = min(_ACROSS, max(1, len(failures)))
    down = -(-max(1, len(failures)) // across)
    block = (3 * _SIDE + 2 * _GAP + _BETWEEN, _TALL + 3 * _LINE + 0.25)
    width = max(2 * _EDGE + across * block[0] - _BETWEEN, 4.6)
    height = _HEAD + down * block[1] + 0.1
    figure = ShownFigure(figsize=(width, height), dpi=120, facecolor="white")
    said = f"{len(failures)} of {count} queries" if count > len(failures) else f"{count} queries"
    title = f"Found somebody else first: {said}, the worst first"
    if not failures:
        title = "Every query found its person first"
    write(figure, _EDGE / width, 1 - 0.2 / height, title, size=10, color=_INK, va="center")
    write(figure, _EDGE / width, 1 - 0.42 / height, model, size=7, color=_FAINT, va="center")
    for number, failure in enumerate(failures):
        row, column = divmod(number, across)
        left = _EDGE + column * block[0]
        _draw_one(figure, failure, left, _HEAD + row * block[1], (width, height))
    return figure


def _draw_one(
    figure: Figure, failure: Failure, left: float, top: float, size: tuple[float, float]
) -> None:
    """One failure; lengths in inches from the upper left corner."""
    width, height = size
    shown = (
        (failure.query, ""),
        (failure.wrong, f"{failure.distances[0]:.3f}"),
        (failure.right, f"{failure.distances[1]:.3f}, place {failure.first}"),
    )
    for place, ((record, below), (title, role)) in enumerate(zip(shown, _PARTS, strict=True)):
        x = left + place * (_SIDE + _GAP)
        pixels = np.asarray(read_picture(record.path).image)
        # Of the same height where they can be; what is wide is as wide as its place.
        scale = min(_TALL / pixels.shape[0], _SIDE / pixels.shape[1])
        tall, wide = scale * pixels.shape[0], scale * pixels.shape[1]
        inset = x + (_SIDE - wide) / 2
        box = (inset / width, 1 - (top + _LINE + tall) / height, wide / width, tall / height)
        axes = figure.add_axes(box)
        axes.imshow(pixels, aspect="auto")
        axes.set_axis_off()
        frame = Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, clip_on=False)
        frame.set(edgecolor=ROLE_COLOURS[role], linewidth=1.6)
        axes.add_patch(frame)
        middle = (x + _SIDE / 2) / width
        under = top + _LINE + _TALL
        for line, (text, colour) in enumerate(
            ((f"{record.label} c{record.camera}", _INK), (below, _FAINT))
        ):
            y = 1 - (under + (line + 0.65) * _LINE) / height
            write(figure, middle, y, text, size=6, color=colour, ha="center", va="center")
        y = 1 - (top + 0.4 * _LINE) / height
        colour = ROLE_COLOURS[role]
        write(figure, middle, y, title, size=6.5, color=colour, ha="center", va="center")
