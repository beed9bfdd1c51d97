"""A figure of a segmentation: the way from picture to mask, and the pictures that asked for it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from simexplain.rendering.lettering import write
from simexplain.rendering.masks import MARK_COLOURS
from simexplain.rendering.overlay import Pixels
from simexplain.rendering.panel import ShownFigure

_INK, _FAINT, _WARN = "#222222", "#666666", "#8a5a00"
_MARKS = ("background", "object", "probably background", "probably object")
_CELL, _SMALL = 2.75, 1.7
_MOST_ELONGATED = 1.6


@dataclass(frozen=True)
class Cell:
    """One picture of the figure.

    Attributes:
        title: What it is.
        caption: A short line under the title.
        picture: RGB ``(H,W,3)``.
    """

    title: str
    caption: str
    picture: Pixels


def mask_panel(
    cells: Sequence[Cell],
    supports: Sequence[Cell],
    *,
    title: str,
    footer: str,
    notes: Sequence[str] = (),
    marks: bool = False,
) -> Figure:
    """Draws a segmentation.

    Args:
        cells: The way from the picture to the mask, in one row.
        supports: Small pictures below it, as many in a row as fit.
        title: The question, in a line.
        footer: Model, layer and setting, so that the figure can be cited.
        notes: Warnings, printed below.
        marks: Whether a legend of the marks is needed.

    Returns:
        A figure that belongs to no window and no global state.
    """
    width = len(cells) * _CELL + 0.3
    fitting = max(1, int((width - 0.3) / _SMALL))
    lines = [supports[at : at + fitting] for at in range(0, len(supports), fitting)]
    wrapped = [line for note in notes for line in textwrap.wrap(f"! {note}", int(17 * width))]
    tall = _CELL * max(_shape(cell) for cell in cells)
    low = _SMALL * max((_shape(cell) for cell in supports), default=0)
    foot = 0.4 + 0.17 * len(wrapped) + (0.28 if marks else 0)
    height = 0.5 + 0.5 + tall + len(lines) * (low + 0.5) + foot
    figure = ShownFigure(figsize=(width, height), dpi=120, facecolor="white")
    write(figure, 0.5, 1 - 0.28 / height, title, ha="center", va="center", size=13, color=_INK)
    top = height - 1.0
    _row(figure, cells, _CELL, tall, top, (width, height), size=11)
    for number, line in enumerate(lines):
        below = top - tall - number * (low + 0.5) - 0.5
        _row(figure, line, _SMALL, low, below, (width, height), size=8.5)
    if marks:
        _legend(figure, (foot - 0.02) / height)
    _foot(figure, footer, wrapped, (foot - (0.4 if marks else 0.12)) / height, height, width)
    return figure


def _shape(cell: Cell) -> float:
    """Height by width, within what a row can show."""
    return float(min(cell.picture.shape[0] / cell.picture.shape[1], _MOST_ELONGATED))


def _row(
    figure: Figure,
    cells: Sequence[Cell],
    wide: float,
    tall: float,
    top: float,
    page: tuple[float, float],
    *,
    size: float,
) -> None:
    """Cells beside each other, their upper edges ``top`` inches above the page's lower edge."""
    start = (page[0] - wide * len(cells)) / 2
    for place, cell in enumerate(cells):
        left = (start + place * wide + 0.06) / page[0]
        area = (left, (top - tall) / page[1], (wide - 0.12) / page[0], tall / page[1])
        axes = figure.add_axes(area, anchor="N")
        axes.imshow(cell.picture, interpolation="antialiased")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color(_FAINT)
            spine.set_linewidth(0.6)
        _caption(axes, cell, size)


def _caption(axes: Axes, cell: Cell, size: float) -> None:
    most = 34 if size > 10 else 20
    text = cell.caption
    if len(text) > most:
        text = f"{text[: most // 2 - 1]}…{text[-most // 2 :]}"
    for number, (said, points, colour) in enumerate(
        ((text, size - 2.5, _FAINT), (cell.title, size, _INK))
    ):
        axes.annotate(
            said, (0.5, 1), (0, 3 + number * (size + 1)), xycoords="axes fraction",
            textcoords="offset points", ha="center", va="bottom", size=points, color=colour,
            parse_math=False,
        )  # fmt: skip


def _legend(figure: Figure, bottom: float) -> None:
    order = (1, 3, 2, 0)
    colours = [tuple(0.4 * 0.5 + 0.6 * part / 255 for part in MARK_COLOURS[n]) for n in order]
    handles = [Patch(facecolor=c, label=_MARKS[n]) for c, n in zip(colours, order, strict=True)]
    figure.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, bottom), ncols=4, fontsize=8,
        frameon=False, labelcolor=_FAINT, handlelength=1.2, borderaxespad=0,
    )  # fmt: skip


def _foot(
    figure: Figure, footer: str, notes: Sequence[str], start: float, height: float, width: float
) -> None:
    left = 0.15 / width
    write(figure, left, start, footer, size=7.5, color=_FAINT, va="top")
    for number, note in enumerate(notes, start=1):
        write(figure, left, start - 0.17 * number / height, note, size=7.5, color=_WARN, va="top")
