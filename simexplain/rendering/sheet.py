"""Every figure is a sheet: a head, grids of cells below each other, a foot; all sizes in inches.

A cell holds a picture with what lies on it, lines of text above and below, or text in place of the
picture. Text is wrapped or shortened to the breadth of its cell, and the sheet grows in height, so
that nothing leaves its place.
"""

from __future__ import annotations

import base64
import html
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.transforms import Affine2D
from numpy.typing import NDArray

from simexplain.errors import printable
from simexplain.rendering.lettering import DOTS, FONT, breadth, shortened, wrapped, write
from simexplain.rendering.overlay import Pixels, colour_table

Frame = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels of a picture."""

Spot = tuple[float, float]
"""``(x, y)`` in pixels of a picture, from the centre of the first one."""

INK, FAINT, PALE, WARNING = "#222222", "#666666", "#c9c9c9", "#8a5a00"
ROLE_COLOURS = {"anchor": "#1f4e79", "positive": "#1b7837", "negative": "#a6361c"}
VERDICTS = {True: ROLE_COLOURS["positive"], False: ROLE_COLOURS["negative"], None: FAINT}
"""The colour of a condition that holds, fails, or is not one."""

COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#0072b2", "#f0e442", "#999999")
"""Of things to tell apart (Okabe and Ito), also by colour-blind people."""

_REGION, _CARD, _RULE = "#00a5cf", "#f5f5f2", "#dddddd"
_DASHES = (0, (4, 3))

SMALL = 8.0
"""Points of ordinary text; what is smaller cannot be read once a figure is 1200 pixels wide."""

LINE = 0.175
"""From one line of small text to the next."""

EDGE = 0.2
_BAR, _TALLEST_BAR = 0.95, 3.2


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


@dataclass(frozen=True)
class Words:
    """Text of a cell.

    Attributes:
        text: Literal; one or more lines.
        ink: Its colour.
        size: In points.
        weight: ``normal`` or ``bold``.
        align: ``left``, ``center`` or ``right``.
        lines: How many lines it may take; what is longer is shortened in its middle.
        aside: A short text at the right end of the first line, in faint ink.
    """

    text: str
    ink: str = INK
    size: float = SMALL
    weight: str = "normal"
    align: str = "center"
    lines: int = 1
    aside: str = ""

    @property
    def line(self) -> float:
        """The height of a line."""
        return LINE * max(self.size, 6) / SMALL

    def fitted(self, width: float) -> list[str]:
        """Its lines."""
        if self.aside:
            width -= breadth(printable(self.aside), SMALL) + 0.1
        return wrapped(self.text, width, self.size, self.weight, self.lines) if self.text else []

    def height(self, width: float) -> float:
        """Of all its lines."""
        return self.line * max(len(self.fitted(width)), bool(self.aside))


@dataclass(frozen=True)
class Cell:
    """One place of a grid.

    Attributes:
        picture: RGB ``(H,W,3)`` with its heat on it, if any.
        above: Text over the picture.
        below: Text under it.
        inside: Text in place of a picture, in the middle of the row.
        frame: The colour of a frame; of text in place of a picture, it makes a card.
        seen: What the network saw; the rest is hatched. None for all of it.
        region: A box of interest.
        mask: ``(H,W)`` in [0, 1], to be outlined at a half.
        peak: To be crossed.
        ring: To be ringed in a colour.
        spots: To be numbered, the first on top.
        tag: A word in the upper left corner.
        beside: Text at the right of a picture as wide as it is high.
        draw: Draws anything into the place ``(sheet, x, y, width, height)``.
        height: Of what is drawn.
    """

    picture: Pixels | None = None
    above: tuple[Words, ...] = ()
    below: tuple[Words, ...] = ()
    inside: tuple[Words, ...] = ()
    frame: str = ""
    seen: Frame | None = None
    region: Frame | None = None
    mask: NDArray[np.float32] | None = None
    peak: Spot | None = None
    ring: tuple[Spot, str] | None = None
    spots: tuple[Spot, ...] = ()
    tag: str = ""
    beside: tuple[Words, ...] = ()
    draw: Callable[[Sheet, float, float, float, float], None] | None = None
    height: float = 0.0

    @property
    def padding(self) -> float:
        """Between the frame of a card and its text."""
        return 0.12 if self.frame else 0.0

    def tall(self, width: float, most: float) -> float:
        """How high it is between the texts above and below."""
        if self.picture is None:
            return max(self.height, _stacked(self.inside, width - 2 * self.padding) + self.padding)
        return most if self.beside else fitted(self.picture, width, most)[1]


@dataclass(frozen=True)
class Row:
    """Cells beside each other, their pictures hanging from one line.

    Attributes:
        cells: One for each column of the grid; None for an empty one.
        heading: Text over the whole row.
        tallest: No picture is higher.
        rule: A thin line over the row.
    """

    cells: Sequence[Cell | None]
    heading: Words | None = None
    tallest: float = 100.0
    rule: bool = False

    def heights(self, widths: Sequence[float]) -> tuple[float, float, float, float]:
        """Of the heading, of the texts above, of the pictures, and from there to the end."""
        own = [(cell, width) for cell, width in zip(self.cells, widths, strict=True) if cell]
        over = max((_stacked(cell.above, width) for cell, width in own), default=0.0)
        tall = [cell.tall(width, self.tallest) for cell, width in own]
        row = max(tall, default=0.0)
        end = [
            (row if cell.picture is None else high)
            + _stacked(cell.below, width) + 0.06 * bool(cell.below)
            for high, (cell, width) in zip(tall, own, strict=True)
        ]  # fmt: skip
        heading = self.heading.height(_breadth(widths, 0)) + 0.05 if self.heading else 0.0
        return heading, over + 0.04 * bool(over), row, max(end, default=0.0)


@dataclass(frozen=True)
class Bar:
    """A scale of colours at the right of a grid.

    Attributes:
        label: What full heat is.
        signed: From -1 on, not from 0 on.
        row: From which row on.
        ticks: Values with a number; unless given, steps of a half.
    """

    label: str
    signed: bool = False
    row: int = 0
    ticks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Grid:
    """Rows of equally many cells.

    Attributes:
        rows: From the top.
        widths: Of the columns.
        gap: Between columns.
        between: Between rows.
        bar: A scale at the right.
    """

    rows: Sequence[Row]
    widths: Sequence[float]
    gap: float = 0.08
    between: float = 0.12
    bar: Bar | None = None

    @property
    def width(self) -> float:
        """With the scale."""
        return _breadth(self.widths, self.gap) + (_BAR if self.bar else 0)

    @property
    def height(self) -> float:
        """Of all rows."""
        heights = (row.heights(self.widths) for row in self.rows)
        return sum(a + b + d + self.between for a, b, _, d in heights)

    def draw(self, sheet: Sheet, left: float, top: float) -> None:
        """Draws all cells from a corner on, and the scale."""
        end = top + self.height
        for number, row in enumerate(self.rows):
            heading, over, tall, rest = row.heights(self.widths)
            full = _breadth(self.widths, self.gap)
            if row.rule:
                sheet.line(((left, top - self.between / 2), (left + full, top - self.between / 2)))
            if row.heading:
                sheet.stack((row.heading,), left, top, _breadth(self.widths, 0), "heading")
            top += heading + over
            x = left
            for cell, width in zip(row.cells, self.widths, strict=True):
                if cell:
                    sheet.cell(cell, x, top, width, tall, row.tallest)
                x += width + self.gap
            if self.bar and self.bar.row == number:
                high = min(max(end - top - self.between, 1.2), _TALLEST_BAR)
                sheet.bar(self.bar, left + full + 0.1, top, 0.13, high)
            top += rest + self.between


def _breadth(widths: Sequence[float], gap: float) -> float:
    return sum(widths) + gap * (len(widths) - 1)


def _stacked(words: Sequence[Words], width: float) -> float:
    return sum(text.height(width) for text in words)


class Sheet:
    """A page on which every place is in inches from the upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = ShownFigure(figsize=(width, height), dpi=DOTS, facecolor="white")
        # By way of fractions of the figure, since a tight crop moves only those.
        inches = Affine2D().scale(1 / width, -1 / height).translate(0, 1)
        self._place = inches + self.figure.transFigure

    def say(self, x: float, y: float, text: str, *, most: float | None = None, **style: Any) -> Any:
        """Writes a line literally, shortened to ``most`` inches where given."""
        style = {"size": SMALL, "color": INK, "va": "center", "zorder": 6, **style}
        text = printable(text)
        if most is not None:
            text = shortened(text, most, style["size"], style.get("weight", "normal"))
        return write(self.figure, x, y, text, transform=self._place, **style)

    def stack(
        self, words: Sequence[Words], x: float, y: float, width: float, gid: str = ""
    ) -> None:
        """Writes lines below each other into a column, from ``y`` down."""
        for text in words:
            share = {"left": 0.0, "center": 0.5, "right": 1.0}[text.align]
            style: dict[str, Any] = {"size": text.size, "va": "baseline", "gid": gid}
            base = y + 0.7 * text.line
            for line in text.fitted(width):
                self.say(x + share * width, y + 0.7 * text.line, line, ha=text.align,
                         color=text.ink, weight=text.weight, **style)  # fmt: skip
                y += text.line
            if text.aside:
                self.say(x + width, base, text.aside, **{**style, "size": SMALL}, color=FAINT,
                         ha="right")  # fmt: skip

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes whose upper left corner is at ``(x, y)``."""
        low = self.height - y - height
        position = (x / self.width, low / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(position, zorder=4)

    def picture(self, pixels: Pixels, x: float, y: float, width: float, height: float) -> Axes:
        """A picture as large as fits into a place, in its middle."""
        wide, high = fitted(pixels, width, height)
        axes = self.axes(x + (width - wide) / 2, y + (height - high) / 2, wide, high)
        few = min(pixels.shape[:2]) < 64
        axes.imshow(pixels, aspect="auto", interpolation="nearest" if few else "antialiased")
        axes.autoscale(False)
        axes.set_axis_off()
        return axes

    def frame(
        self, x: float, y: float, width: float, height: float, *, corner: float = 0.08, **style: Any
    ) -> Any:
        """A rectangle with round corners."""
        style = {"facecolor": "white", "edgecolor": "none", "linewidth": 0, "zorder": 2, **style}
        box = f"round,pad=0,rounding_size={min(corner, width / 2, height / 2)}"
        patch = FancyBboxPatch((x, y), width, height, box, transform=self._place, **style)
        return self.figure.add_artist(patch)

    def line(self, points: Sequence[Spot], **style: Any) -> Any:
        """A straight line; from five points on, its last four are those of a curve."""
        curve = [Path.CURVE4] * (3 if len(points) > 4 else 0)
        straight = [Path.LINETO] * (len(points) - 1 - len(curve))
        path = Path(points, [Path.MOVETO, *straight, *curve])
        style = {"edgecolor": PALE, "linewidth": 1, "zorder": 1, "capstyle": "butt", **style}
        patch = PathPatch(path, facecolor="none", transform=self._place, **style)
        return self.figure.add_artist(patch)

    def cell(self, cell: Cell, x: float, y: float, width: float, tall: float, most: float) -> None:
        """Draws a cell whose picture or text begins at ``y`` and is at most ``tall`` high."""
        self.stack(cell.above, x, y - 0.04 - _stacked(cell.above, width), width, "above")
        end = y + tall
        if cell.picture is not None:
            end = y + cell.tall(width, most)
            wide, high = fitted(cell.picture, *((most, most) if cell.beside else (width, most)))
            left = x if cell.beside else x + (width - wide) / 2
            _mark(self.picture(cell.picture, left, y, wide, high), cell)
            middle = y + (most - _stacked(cell.beside, width - most)) / 2
            self.stack(cell.beside, x + most + 0.07, middle, width - most - 0.07, "beside")
        elif cell.frame:
            self.frame(x, y, width, tall, corner=0, facecolor=_CARD, edgecolor=cell.frame,
                       linewidth=2.2)  # fmt: skip
        if cell.draw:
            cell.draw(self, x, y, width, tall)
        room = width - 2 * cell.padding
        start = y + (tall - _stacked(cell.inside, room)) / 2
        self.stack(cell.inside, x + cell.padding, start, room, "inside")
        self.stack(cell.below, x, end + 0.06, width, "below")

    def bar(self, bar: Bar, x: float, y: float, width: float, height: float) -> None:
        """A scale of colours, upright or lying."""
        axes, lying = self.axes(x, y, width, height), width > height
        colours = ListedColormap(colour_table(signed=bar.signed) / 255)
        scale = ScalarMappable(Normalize(-1 if bar.signed else 0, 1), colours)
        kind = "horizontal" if lying else "vertical"
        drawn = self.figure.colorbar(scale, cax=axes, orientation=kind)
        drawn.set_ticks(bar.ticks or ((-1, -0.5, 0, 0.5, 1) if bar.signed else (0, 0.5, 1)))
        drawn.ax.tick_params(labelsize=SMALL - 1, colors=FAINT, length=2, pad=1.5,
                            labelfontfamily=FONT)  # fmt: skip
        drawn.outline.set_visible(False)
        axes.grid(visible=False)
        label = "\n".join(wrapped(bar.label, max(width, height), SMALL))
        drawn.set_label(label, size=SMALL, color=FAINT, parse_math=False, family=FONT)

    def connect(self, ends: Sequence[Axes], lines: Sequence[tuple[Spot, Spot]]) -> None:
        """Numbered lines from one picture to another, the first on top."""
        if not lines:
            return
        for number in reversed(range(len(lines))):
            a, b = lines[number]
            for edge, width in (("white", 3.4), (COLOURS[number % len(COLOURS)], 2.0)):
                line = ConnectionPatch(
                    a, b, "data", "data", axesA=ends[0], axesB=ends[1], color=edge, alpha=0.95,
                    linewidth=width, zorder=5 + 0.01 * (len(lines) - number),
                )  # fmt: skip
                self.figure.add_artist(line)
        for axes, spots in zip(ends, zip(*lines, strict=True), strict=True):
            _number(axes, spots, self.figure)

    def foot(self, lines: Sequence[tuple[str, str]]) -> Figure:
        """Lines of (text, colour) at the lower end, which finish the figure."""
        start = self.height - LINE * len(lines)
        for position, (text, colour) in enumerate(lines):
            self.say(EDGE, start + LINE * (position - 0.2), text, color=colour)
        return self.figure


def page(
    grids: Sequence[Grid],
    *,
    title: str,
    verdict: str = "",
    ink: str = FAINT,
    legend: str = "",
    footer: str = "",
    notes: Sequence[str] = (),
    least: float = 5.0,
) -> Sheet:
    """Draws grids below each other, with a head and a foot.

    Args:
        grids: From the top.
        title: The question, or what is shown.
        verdict: The answer, under it.
        ink: Of the verdict.
        legend: What signs mean, below the grids.
        footer: Model, layer and options, so that the figure can be cited; one or several lines.
        notes: Warnings, below all.
        least: The sheet is at least so wide.

    Returns:
        A sheet whose figure belongs to no window and no global state.
    """
    width = max(least, 2 * EDGE + max(grid.width for grid in grids))
    head = (
        Words(title, size=13, align="left", lines=3),
        Words(verdict, ink, 10, "normal" if ink == FAINT else "bold", "left", lines=3),
    )
    under = foot_lines(legend, footer, notes, width)
    top = 0.12 + _stacked(head, width - 2 * EDGE) + 0.12
    body = sum(grid.height + 0.1 for grid in grids)
    sheet = Sheet(width, top + body + LINE * len(under) + 0.12)
    sheet.stack(head, EDGE, 0.12, width - 2 * EDGE, "head")
    for grid in grids:
        grid.draw(sheet, EDGE, top)
        top += grid.height + 0.1
    sheet.foot(under)
    return sheet


def foot_lines(
    legend: str, footer: str, notes: Sequence[str], width: float
) -> list[tuple[str, str]]:
    """What stands below a figure, each line with its colour: legend, source, warnings."""
    texts = [(legend, INK), (footer, FAINT), *((f"! {note}", WARNING) for note in notes)]
    return [
        (line, colour)
        for text, colour in texts
        if text.strip()
        for line in wrapped(text, width - 2 * EDGE, SMALL)
    ]


def fitted(picture: Pixels, width: float, height: float) -> tuple[float, float]:
    """The largest size in inches, ``(width, height)``, that a picture has within a place."""
    high, wide = picture.shape[:2]
    scale = min(width / wide, height / high)
    # A picture one pixel high would vanish.
    return max(wide * scale, 0.03), max(high * scale, 0.03)


def _mark(axes: Axes, cell: Cell) -> None:
    """Draws on a picture what its cell marks."""
    assert cell.picture is not None
    height, width = cell.picture.shape[:2]
    if cell.seen is not None:
        _hatch(axes, cell.seen, width, height)
    if cell.mask is not None:
        for colour, thick in (("black", 2.0), ("white", 0.9)):
            axes.contour(cell.mask, [0.5], colors=colour, linewidths=thick)
    if cell.region is not None:
        for colour, thick in (("white", 3.2), (_REGION, 1.8)):
            region = [at - 0.5 for at in cell.region]
            _outline(axes, region, edgecolor=colour, linewidth=thick, clip_on=False)
    if cell.peak is not None:
        for colour, size, thick in (("white", 9, 2.4), ("black", 8, 1.0)):
            axes.plot(*cell.peak, marker="+", color=colour, markersize=size, markeredgewidth=thick)
    if cell.ring is not None:
        spot, own = cell.ring
        for colour, thick in (("white", 4.6), (own, 2.6)):
            axes.plot(*spot, marker="o", markersize=13, fillstyle="none", clip_on=False,
                      color=colour, markeredgewidth=thick)  # fmt: skip
    _number(axes, cell.spots, axes)
    if cell.tag:
        box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": WARNING}
        write(axes, 0.03, 0.97, cell.tag, transform=axes.transAxes, ha="left", va="top",
              size=SMALL - 0.5, color=WARNING, bbox={**box, "alpha": 0.9})  # fmt: skip
    if cell.frame:
        border = (-0.5, -0.5, width - 0.5, height - 0.5)
        _outline(axes, border, edgecolor=cell.frame, linewidth=2.2, clip_on=False)


def _hatch(axes: Axes, seen: Frame, width: int, height: int) -> None:
    """Hatches what the network did not see, and draws the border of what it saw."""
    left, right = (min(max(at, 0.0), width) for at in (seen[0], seen[2]))
    top, bottom = (min(max(at, 0.0), height) for at in (seen[1], seen[3]))
    strips = ((0, 0, width, top), (0, bottom, width, height), (0, top, left, bottom),
              (right, top, width, bottom))  # fmt: skip
    hidden = [strip for strip in strips if strip[2] - strip[0] > 0.5 < strip[3] - strip[1]]
    for x, y, end, low in hidden:
        patch = Rectangle((x - 0.5, y - 0.5), end - x, low - y, facecolor=(1, 1, 1, 0.4),
                          edgecolor=(0.3, 0.3, 0.3, 0.5), hatch="////", linewidth=0)  # fmt: skip
        axes.add_patch(patch).set_gid("unseen")
    if hidden:
        inner = (left - 0.5, top - 0.5, right - 0.5, bottom - 0.5)
        for colour, dashes in (("white", "solid"), (FAINT, _DASHES)):
            _outline(axes, inner, edgecolor=colour, linestyle=dashes, linewidth=1.0)


def _outline(axes: Axes, box: Sequence[float], **style: Any) -> None:
    left, top, right, bottom = box
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, **style))


def _number(axes: Axes, spots: Sequence[Spot], target: Axes | Figure) -> None:
    """Numbered points of a picture, the first on top; on the figure they lie over its lines."""
    for number in reversed(range(len(spots))):
        colour = COLOURS[number % len(COLOURS)]
        box = {"boxstyle": "circle,pad=0.18", "facecolor": colour, "edgecolor": "white"}
        write(target, *spots[number], str(number + 1), transform=axes.transData, ha="center",
              va="center", size=SMALL - 1, weight="bold", color=INK, bbox=box,
              zorder=7 - 0.01 * number)  # fmt: skip
