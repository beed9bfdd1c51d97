"""A query and what was found for it: a column for each hit, with the reasons below."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from simexplain.rendering import cards
from simexplain.rendering.cards import FAINT, INK, LINE, PALE, SMALL, WARNING, Sheet, foot_lines
from simexplain.rendering.correspondence import COLOURS, Spot, signed_overlay
from simexplain.rendering.overlay import COLOURMAP, Heat, Pixels
from simexplain.rendering.panel import ROLE_COLOURS

MOST_COLUMNS = 5
_CELL, _GAP, _EDGE, _BAR, _ASIDE = 1.9, 0.14, 0.25, 0.8, 0.3
_HEAD, _TITLES, _BETWEEN, _RATHER, _APART = 0.8, 0.62, 0.12, 0.56, 0.3
_TALLEST = 1.35
_BOX = "#00a5cf"

Frame = tuple[float, float, float, float]


@dataclass(frozen=True)
class HitColumn:
    """One hit. Heats are over the whole pictures, in [-1, 1]; None where there are none.

    Attributes:
        picture: RGB ``(H,W,3)``.
        title: Rank and cosine.
        beside: The distance.
        far: Whether it is no close match.
        label: Its class, or nothing.
        name: Such as the file's name.
        on_hit: Heat over its picture.
        on_query: Heat over the query, or over its close-up where it has one.
        contrast: Signed heat over the same: what sets the hit apart from its rival.
        rival: The rival's picture.
        rather: Two lines beside the rival.
        box: Where a region was found: left, top, right, bottom in pixels.
        seen: What the network saw of the picture, likewise; None for all.
        marks: Pairs of points, ``(x, y)`` in what ``on_query`` covers and in the hit, to number.
        bars: Labelled shares to list where there are no heats.
    """

    picture: Pixels
    title: str
    label: str
    name: str
    on_hit: Heat | None = None
    on_query: Heat | None = None
    contrast: Heat | None = None
    rival: Pixels | None = None
    rather: tuple[str, str] = ("", "")
    box: Frame | None = None
    seen: Frame | None = None
    marks: tuple[tuple[Spot, Spot], ...] = ()
    bars: tuple[tuple[str, float], ...] = ()
    beside: str = ""
    far: bool = False


@dataclass(frozen=True)
class QueryPicture:
    """The query.

    Attributes:
        picture: RGB ``(H,W,3)``.
        name: Such as the file's name.
        region: What was searched for: left, top, right, bottom in pixels; None for all.
        seen: What the network saw, likewise.
        close_up: The surroundings of a region, on which the heats lie; with its own region.
    """

    picture: Pixels
    name: str
    region: Frame | None = None
    seen: Frame | None = None
    close_up: QueryPicture | None = None

    @property
    def below(self) -> QueryPicture:
        """What the heats lie on."""
        return self.close_up or self


def hits_figure(
    query: QueryPicture,
    hits: Sequence[HitColumn],
    *,
    title: str,
    verdict: str,
    rows: Sequence[str],
    legend: str,
    footer: str,
    notes: Sequence[str] = (),
) -> Figure:
    """Draws a search: the query on the left, hits in columns of five.

    Args:
        query: The query.
        hits: The nearest first.
        title: The question, in a line.
        verdict: What was searched, in a line.
        rows: What the rows of heats show: over the hits, over the query, the contrast.
        legend: What signs mean.
        footer: Model, layer and distance, so that the figure can be cited.
        notes: Warnings, printed below.

    Returns:
        A figure that belongs to no window and no global state.
    """
    blocks = [hits[at : at + MOST_COLUMNS] for at in range(0, len(hits), MOST_COLUMNS)]
    heated = hits[0].on_hit is not None
    columns = min(len(hits), MOST_COLUMNS)
    left = 2 * _EDGE + _CELL + _ASIDE
    width = left + columns * (_CELL + _GAP) + (_BAR if heated else _EDGE)
    width = max(width, 7.0)
    shape = _Heights(query, hits)
    under = foot_lines(legend, footer, notes, width)
    block = _TITLES + shape.first + shape.below(heated, hits) + _APART
    sheet = Sheet(width, _HEAD + block * len(blocks) + LINE * len(under) + 0.15)
    sheet.say(_EDGE, 0.3, title, most=width - 2 * _EDGE, size=13)
    sheet.say(_EDGE, 0.58, verdict, most=width - 2 * _EDGE, size=9.5, color=FAINT)
    for number, some in enumerate(blocks):
        top = _HEAD + number * block
        _query(sheet, query, top, shape, number)
        for place, hit in enumerate(some):
            x = left + place * (_CELL + _GAP)
            _column(sheet, query, hit, x, top, shape)
        if heated:
            _labels(sheet, rows, top, shape)
    if heated:
        start = _HEAD + _TITLES + shape.first + _BETWEEN
        _bar(sheet, left + columns * (_CELL + _GAP) + 0.08, start, shape.hit)
    return sheet.foot(under)


class _Heights:
    """How high the rows are, in inches: as the tallest of their pictures, within limits."""

    def __init__(self, query: QueryPicture, hits: Sequence[HitColumn]) -> None:
        self.query = _CELL * min(_TALLEST, _ratio(query.below.picture))
        self.hit = _CELL * max(min(_TALLEST, _ratio(hit.picture)) for hit in hits)
        self.first = max(_CELL * min(_TALLEST, _ratio(query.picture)), self.hit)

    def below(self, heated: bool, hits: Sequence[HitColumn]) -> float:
        """All that stands below the pictures of the hits."""
        if heated:
            return self.hit + 2 * self.query + 3 * _BETWEEN + _RATHER
        return 0.1 + LINE * max(len(hit.bars) for hit in hits) + _RATHER


def _ratio(picture: Pixels) -> float:
    return max(0.4, float(picture.shape[0] / picture.shape[1]))


def _query(sheet: Sheet, query: QueryPicture, top: float, shape: _Heights, number: int) -> None:
    colour = ROLE_COLOURS["anchor"]
    what = "query" if query.region is None else "query: what is boxed"
    sheet.say(_EDGE, top + 0.14, what, most=_CELL, size=10, weight="bold", color=colour)
    sheet.say(_EDGE, top + 0.34, query.name, most=_CELL, color=FAINT)
    axes = sheet.picture(query.picture, _EDGE, top + _TITLES, _CELL, shape.first)
    _seen(axes, query.seen)
    _boxed(axes, query.region)


def _labels(sheet: Sheet, rows: Sequence[str], top: float, shape: _Heights) -> None:
    """What each row of heats shows, in the column of the query."""
    y = top + _TITLES + shape.first + _BETWEEN
    for text, height in zip(rows, (shape.hit, shape.query, shape.query), strict=True):
        lines = textwrap.wrap(text, 30)
        start = y + height / 2 - LINE * (len(lines) - 1) / 2
        for position, line in enumerate(lines):
            sheet.say(_EDGE + _CELL, start + LINE * position, line, ha="right", color=INK)
        y += height + _BETWEEN


def _column(
    sheet: Sheet, query: QueryPicture, hit: HitColumn, x: float, top: float, shape: _Heights
) -> None:
    sheet.say(x, top + 0.14, hit.title, most=_CELL, size=10, weight="bold",
              color=FAINT if hit.far else INK)  # fmt: skip
    sheet.say(x + _CELL, top + 0.14, hit.beside, ha="right", color=FAINT)
    said = hit.label or hit.name
    sheet.say(x, top + 0.34, said, most=_CELL, color=INK if hit.label else FAINT)
    if hit.label:
        sheet.say(x, top + 0.34 + LINE * 0.85, hit.name, most=_CELL, color=FAINT, size=SMALL - 1)
    y = top + _TITLES
    axes = sheet.picture(hit.picture, x, y, _CELL, shape.first)
    _seen(axes, hit.seen)
    _boxed(axes, hit.box)
    if hit.far:
        _tagged(axes, "not close")
    y += shape.first + _BETWEEN
    if hit.on_hit is None or hit.on_query is None:
        _bars(sheet, hit, x, y)
        return
    under = query.below
    pictures = (hit.picture, under.picture, under.picture)
    heats = (hit.on_hit, hit.on_query, hit.contrast)
    heights = (shape.hit, shape.query, shape.query)
    for row, (picture, heat, height) in enumerate(zip(pictures, heats, heights, strict=True)):
        if heat is not None:
            axes = sheet.picture(signed_overlay(picture, heat), x, y, _CELL, height)
            _seen(axes, under.seen if row else hit.seen)
            _boxed(axes, under.region if row else hit.box)
            if row < 2:
                _numbers(axes, [pair[1 - row] for pair in hit.marks])
        else:
            sheet.say(x + _CELL / 2, y + height / 2, "nothing further down", ha="center",
                      color=FAINT)  # fmt: skip
        y += height + _BETWEEN
    _rather(sheet, hit, x, y - _BETWEEN + 0.07)


def _rather(sheet: Sheet, hit: HitColumn, x: float, y: float) -> None:
    """The rival in small, and what it is."""
    if hit.rival is None:
        return
    side = _RATHER - 0.12
    sheet.picture(hit.rival, x, y, side, side)
    most = _CELL - side - 0.07
    for position, text in enumerate(hit.rather):
        sheet.say(x + side + 0.07, y + 0.12 + LINE * position, text, most=most, size=SMALL - 0.5,
                  color=FAINT if position else INK)  # fmt: skip


def _bars(sheet: Sheet, hit: HitColumn, x: float, y: float) -> None:
    """Shares of a whole, each with a bar."""
    most = max((abs(value) for _, value in hit.bars), default=0) or 1
    for position, (label, value) in enumerate(hit.bars):
        middle = y + LINE * (position + 0.5)
        length = 0.72 * abs(value) / most
        sheet.frame(x + 1.12, middle - 0.05, max(length, 0.01), 0.1, corner=0, facecolor=PALE)
        sheet.say(x, middle, label, most=0.7, color=FAINT, size=SMALL - 0.5)
        sheet.say(x + 1.08, middle, cards.number(value), ha="right", size=SMALL - 0.5)
    _rather(sheet, hit, x, y + LINE * len(hit.bars) + 0.08)


def _seen(axes: Axes, box: Frame | None) -> None:
    """The border of what the network saw."""
    if box is not None:
        for colour, dashes in (("white", "solid"), (FAINT, (0, (4, 3)))):
            _rectangle(axes, box, edgecolor=colour, linestyle=dashes, linewidth=0.9)


def _boxed(axes: Axes, box: Frame | None) -> None:
    """A region."""
    if box is not None:
        for colour, width in (("white", 3.2), (_BOX, 1.8)):
            _rectangle(axes, box, edgecolor=colour, linewidth=width)


def _tagged(axes: Axes, text: str) -> None:
    """A word in the picture's upper left corner."""
    box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": WARNING, "alpha": 0.9}
    axes.text(0.03, 0.97, text, transform=axes.transAxes, ha="left", va="top", size=SMALL - 0.5,
              color=WARNING, bbox=box)  # fmt: skip


def _rectangle(axes: Axes, box: Frame, **style: Any) -> None:
    left, top, right, bottom = box
    corner, size = (left - 0.5, top - 0.5), (right - left, bottom - top)
    axes.add_patch(Rectangle(corner, size[0], size[1], fill=False, clip_on=False, **style))


def _numbers(axes: Axes, spots: Sequence[Spot]) -> None:
    """Numbered points, the strongest on top."""
    for number in reversed(range(len(spots))):
        colour = COLOURS[number % len(COLOURS)]
        box = {"boxstyle": "circle,pad=0.15", "facecolor": colour, "edgecolor": "white"}
        axes.text(*spots[number], str(number + 1), ha="center", va="center", size=SMALL - 1.5,
                  weight="bold", color=INK, bbox=box)  # fmt: skip


def _bar(sheet: Sheet, x: float, top: float, height: float) -> None:
    """The scale of the heats."""
    axes = sheet.axes(x, top, 0.12, height)
    warm = np.asarray(_warm())
    table = np.concatenate((warm[:0:-1, ::-1], warm))
    bar = sheet.figure.colorbar(ScalarMappable(Normalize(-1, 1), ListedColormap(table)), cax=axes)
    bar.set_ticks([-1, 0, 1])
    bar.ax.tick_params(labelsize=SMALL - 1, colors=FAINT, length=2)
    bar.outline.set_visible(False)
    bar.set_label("share of the row's largest value", size=SMALL - 1, color=FAINT)


def _warm() -> np.ndarray[Any, np.dtype[np.float64]]:
    from matplotlib import colormaps

    return np.asarray(colormaps[COLOURMAP](np.arange(256))[:, :3])
