"""One figure per comparison: the pictures, their heatmaps, distances and what they mean."""

from __future__ import annotations

import base64
import html
import io
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from simexplain.printing import printable
from simexplain.rendering.lettering import write
from simexplain.rendering.overlay import COLOURMAP, CONTOUR_LEVELS, RENDERERS

ROLE_COLOURS = {"anchor": "#1f4e79", "positive": "#1b7837", "negative": "#a6361c"}
_INK, _FAINT = "#222222", "#666666"
_WARNING = "#8a5a00"
_MOST_COLUMNS = 5
_NOTE = 0.28
"""Inches for two lines under a heatmap."""


@dataclass(frozen=True)
class Row:
    """What one method shows of an image.

    Attributes:
        label: What the row is called; alike for all tiles.
        heatmap: ``(H,W)`` in [0, 1].
        peak: Where the heat is highest, ``(x, y)`` in pixels; None for an empty map.
        note: A line under the heatmap.
    """

    label: str
    heatmap: NDArray[np.float32]
    peak: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True)
class Tile:
    """One image of a figure.

    Attributes:
        picture: RGB ``(H,W,3)``.
        heatmap: ``(H,W)`` in [0, 1].
        role: anchor, positive or negative.
        caption: A short line under the role, such as the file's name.
        distance: To the anchor; None for the anchor itself.
        box: What the network saw: left, top, right, bottom in pixels; None for all of it.
        peak: Where the heat is highest, ``(x, y)`` in pixels; None for an empty map.
        more: Further heatmaps, each in a row of its own with its label; alike for all tiles.
        text: Drawn in place of picture and heatmaps, for a member that is not an image: what the
            given vector stands for.
        kind: What to write in place of the role, such as ``positive vector``.
        label: What the row of ``heatmap`` is called, where there are others.
        note: A line under the heatmap.
        others: What other methods show, each in rows of its own; alike for all tiles.
    """

    picture: NDArray[np.uint8]
    heatmap: NDArray[np.float32]
    role: str
    caption: str = ""
    distance: float | None = None
    box: tuple[float, float, float, float] | None = None
    peak: tuple[float, float] | None = None
    more: tuple[tuple[str, NDArray[np.float32]], ...] = ()
    text: str | None = None
    kind: str = ""
    label: str = ""
    note: str = ""
    others: tuple[Row, ...] = ()

    @property
    def rows(self) -> tuple[Row, ...]:
        """The heatmap and those of other methods."""
        return (Row(self.label, self.heatmap, self.peak, self.note), *self.others)


class ShownFigure(Figure):
    """A figure that a notebook shows by itself, whatever backend is chosen or none."""

    def _repr_png_(self) -> bytes:
        return png_of(self)


def png_of(figure: Figure) -> bytes:
    """A figure as a PNG file; letters that the font lacks become boxes without a warning."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def as_html(figure: Figure, alt: str) -> str:
    """A figure as an image element that holds its own data."""
    data = base64.b64encode(png_of(figure)).decode()
    name = html.escape(printable(alt))
    return f'<img style="max-width:100%" alt="{name}" src="data:image/png;base64,{data}">'


def panel(
    tiles: Sequence[Tile],
    *,
    title: str,
    verdict: str,
    holds: bool | None,
    footer: str,
    notes: Sequence[str] = (),
    styles: Sequence[str] = ("overlay",),
    scale: str = "the maximum",
    joined: str = "product",
) -> Figure:
    """Draws a comparison.

    Args:
        tiles: Anchor first.
        title: The question, in a line.
        verdict: Whether the condition holds and by how much.
        holds: Colours the verdict; None for neither.
        footer: Model, layer and method, so that the figure can be cited; one or several lines.
        notes: Warnings, printed below.
        styles: Names in ``RENDERERS``, one row each below the pictures.
        scale: What full heat is, for the legend.
        joined: What the heatmap is of those in ``more``, such as their product.

    Returns:
        A figure that belongs to no window and no global state.
    """
    columns = min(len(tiles), _MOST_COLUMNS)
    blocks = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    images = [tile for tile in tiles if tile.text is None]
    shape = max(min(tile.picture.shape[0] / tile.picture.shape[1], 1.6) for tile in images)
    cell, legend = 2.75, 0.95
    margin = 0.3 if images[0].more or images[0].others else 0.15
    rows = 1 + len(styles) * len(images[0].rows) + len(images[0].more)
    gap = 0.1 + _NOTE * any(row.note for tile in images for row in tile.rows)
    room = max(60, int(17 * columns * cell))
    below = [
        (line, _FAINT) for said in footer.split("\n") for line in textwrap.wrap(said, room) or [""]
    ]
    below += [(line, _WARNING) for note in notes for line in textwrap.wrap(f"! {note}", room)]
    head, foot = 0.75, 0.18 + 0.17 * len(below)
    body = len(blocks) * (rows * (cell * shape + gap) + 0.55)
    height, width = head + body + foot, columns * cell + legend + 0.15 + margin
    figure = ShownFigure(figsize=(width, height), dpi=120, facecolor="white")
    _headline(figure, title, verdict, holds, height)
    top, bottom = 1 - head / height, foot / height
    step = (top - bottom) / len(blocks)
    for number, block in enumerate(blocks):
        area = (margin / width, top - (number + 1) * step, 1 - (legend + 0.2) / width, step)
        _block(figure, block, columns, (styles, rows, gap), area, 0.55 / (height * step), joined)
    _legend(figure, (1 - legend / width, bottom, top, 0.13 / width), scale)
    _footer(figure, below, foot, height, width)
    return figure


def _headline(figure: Figure, title: str, verdict: str, holds: bool | None, height: float) -> None:
    colour = {True: "#1b7837", False: "#a6361c", None: _FAINT}[holds]
    write(figure, 0.5, 1 - 0.28 / height, title, ha="center", va="center", size=13, color=_INK)
    write(
        figure,
        0.5,
        1 - 0.58 / height,
        verdict,
        ha="center",
        va="center",
        size=11,
        color=colour,
        weight="bold",
    )


def _block(
    figure: Figure,
    tiles: Sequence[Tile],
    columns: int,
    lines: tuple[Sequence[str], int, float],
    area: tuple[float, float, float, float],
    head: float,
    joined: str,
) -> None:
    """One line of images with their renderings below each other."""
    (styles, rows, gap), (left, bottom, right, height) = lines, area
    shape = max(
        (t.picture.shape[0] / t.picture.shape[1] for t in tiles if t.text is None), default=1.0
    )
    grid = figure.add_gridspec(
        rows,
        columns,
        left=left,
        right=right,
        bottom=bottom + 0.02 * height,
        top=bottom + height * (1 - head),
        wspace=0.05,
        hspace=0.04 if gap < _NOTE else gap / 2.75,
    )
    for column, tile in enumerate(tiles):
        if tile.text is not None:
            _card(figure.add_subplot(grid[0, column]), tile, shape)
            continue
        for number, (row, drawn) in enumerate(_drawings(tile, styles, joined)):
            axes = figure.add_subplot(grid[number, column])
            axes.imshow(drawn, interpolation="nearest" if drawn.shape[0] < 64 else "antialiased")
            _dress(axes, tile, first=number == 0, peak=row.peak)
            if column == 0:
                axes.set_ylabel(row.label, size=8, color=_FAINT, labelpad=3, parse_math=False)
            note = textwrap.fill(row.note, 46)
            axes.set_xlabel(note, size=7, color=_FAINT, labelpad=3, parse_math=False)


def _drawings(
    tile: Tile, styles: Sequence[str], joined: str
) -> Iterator[tuple[Row, NDArray[np.uint8]]]:
    """The picture, then what every method and every layer shows on it."""
    yield Row("", tile.heatmap), tile.picture
    for row in tile.rows:
        for style in styles:
            last = style == styles[-1]
            named = replace(row, label=joined) if tile.more and not tile.others else row
            yield (
                named if last else replace(named, note=""),
                RENDERERS[style](tile.picture, row.heatmap),
            )
    for label, heatmap in tile.more:
        yield Row(label, heatmap), RENDERERS[styles[0]](tile.picture, heatmap)


def _card(axes: Axes, tile: Tile, shape: float) -> None:
    """A member without a picture: what it stands for, where its picture would be."""
    text = textwrap.shorten(tile.text or "", 220, placeholder=" …")
    size = 13 if len(text) < 60 else 10
    axes.set_facecolor("#f5f5f2")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_box_aspect(shape)
    lines = textwrap.fill(text, 22 if size > 10 else 28)
    write(axes, 0.5, 0.55, lines, ha="center", va="center", size=size, color=_INK)
    write(axes, 0.5, 0.06, "a vector: no map", ha="center", size=8, color=_FAINT)
    _dress(axes, tile, first=True, peak=None)


def _dress(axes: Axes, tile: Tile, *, first: bool, peak: tuple[float, float] | None) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(first)
        spine.set_color(ROLE_COLOURS[tile.role])
        spine.set_linewidth(2.2)
    if first:
        role = tile.kind or tile.role
        said = role if tile.distance is None else f"{role}   d = {tile.distance:.3f}"
        axes.set_title(f"{said}\n", size=11, color=ROLE_COLOURS[tile.role], weight="bold", pad=-4)
        # In points above the picture: a share of a tall one would run into the line over it.
        axes.annotate(
            _shortened(tile.caption),
            (0.5, 1),
            xycoords="axes fraction",
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            va="bottom",
            size=8,
            color=_FAINT,
            parse_math=False,
        )
    elif peak is not None:
        axes.plot(*peak, marker="+", color="white", markersize=9, markeredgewidth=2.4)
        axes.plot(*peak, marker="+", color="black", markersize=8, markeredgewidth=1.0)
    if tile.box is not None:
        left, top, right, bottom = tile.box
        axes.add_patch(
            Rectangle(
                (left - 0.5, top - 0.5),
                right - left,
                bottom - top,
                fill=False,
                edgecolor="white" if not first else _FAINT,
                linestyle=(0, (4, 3)),
                linewidth=1.1,
            )
        )


def _legend(figure: Figure, place: tuple[float, float, float, float], scale: str) -> None:
    left, bottom, top, width = place
    axes = figure.add_axes((left, bottom + 0.12 * (top - bottom), width, 0.5 * (top - bottom)))
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), COLOURMAP), cax=axes)
    bar.set_ticks([0, *CONTOUR_LEVELS, 1])
    bar.ax.tick_params(labelsize=7, colors=_FAINT, length=2)
    bar.outline.set_visible(False)
    bar.set_label(f"evidence, share of {scale}", size=8, color=_FAINT)


def _footer(
    figure: Figure, lines: Sequence[tuple[str, str]], foot: float, height: float, width: float
) -> None:
    """Lines with their colours, from the bottom of the pictures on."""
    for number, (line, colour) in enumerate(lines):
        level = (foot - 0.12 - 0.17 * number) / height
        write(figure, 0.15 / width, level, line, size=7.5, color=colour, va="top")


def _shortened(text: str, limit: int = 34) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}…{text[-limit // 2 :]}"
