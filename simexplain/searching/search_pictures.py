"""From a search to its figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simexplain.data.preprocessing import Thumbnail
from simexplain.errors import ComparisonError, printable
from simexplain.matching.result import Point
from simexplain.metrics.maps import placed
from simexplain.rendering.lettering import number
from simexplain.rendering.overlay import Heat, signed_overlay
from simexplain.rendering.sheet import (
    FAINT,
    INK,
    LINE,
    PALE,
    ROLE_COLOURS,
    SMALL,
    Bar,
    Cell,
    Frame,
    Grid,
    Row,
    Sheet,
    Words,
    page,
)
from simexplain.searching.query import Box
from simexplain.searching.search_result import Hit, SearchResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 20
"""Hits in one figure."""

_ACROSS, _CELL, _TALLEST, _RATHER = 5, 1.9, 2.6, 0.5
_MARGIN = 1.5
"""How many times larger than a region its close-up is."""

_ROWS = {
    False: (
        "where the hit agrees with the query",
        "where the query agrees with the hit",
        "what in the query speaks for the hit, not for the next class down",
    ),
    True: (
        "how like the region each place is",
        "what in the region is found there",
        "what in the region speaks for the hit, not for the next class down",
    ),
}
_NEXT = "next class down", "next picture down"


@dataclass(frozen=True)
class HitColumn:
    """One hit. Heats are over the whole pictures, in [-1, 1]; None where there are none.

    Attributes:
        hit: Its numbers.
        picture: Its picture.
        rival: The rival's picture.
        on_hit: Heat over its picture.
        on_query: Heat over the query, or over its close-up where a region was searched for.
        contrast: Signed heat over the same: what sets the hit apart from its rival.
        marks: Pairs of points, in what ``on_query`` covers and in the hit, to number.
    """

    hit: Hit
    picture: _Picture
    rival: NDArray[np.uint8] | None = None
    on_hit: Heat | None = None
    on_query: Heat | None = None
    contrast: Heat | None = None
    marks: tuple[tuple[Point, Point], ...] = ()


def draw_search(result: SearchResult, lines: int) -> Figure:
    """The figure of a search; see ``SearchResult.figure``."""
    if lines < 0:
        raise ComparisonError(f"Expected a number of pairs from 0, got {lines}.")
    shown = result.hits[:MOST]
    query = _Picture(result, result.query)
    columns = [_column(result, query, hit, number, lines) for number, hit in enumerate(shown)]
    columns = on_one_scale(columns)
    notes = list(result.warnings)
    if len(shown) < len(result.hits):
        notes.append(f"The figure shows the first {MOST} of {len(result.hits)} hits.")
    across = min(len(columns), _ACROSS)
    heated = result.query_maps is not None
    bar = Bar("share of the row's largest value", signed=True, row=1) if heated else None
    grids = [
        Grid(_rows(result, query, columns[start : start + across], across),
             [_CELL] * (1 + across), gap=0.14, bar=None if start else bar)
        for start in range(0, len(columns), across)
    ]  # fmt: skip
    return page(
        grids,
        title="Why were these found?",
        verdict=f"{verdict(result)}. {result.closeness}" if result.closeness else verdict(result),
        legend=_legend(result, lines),
        footer=footer(result),
        notes=notes,
        least=7.0,
    ).figure


def verdict(result: SearchResult) -> str:
    """What was searched, in a line."""
    what = (
        Path(result.query).name
        if result.region is None
        else f"a region of {Path(result.query).name}"
    )
    return f"The {len(result.hits)} nearest of {result.gallery} pictures to {what}"


def footer(result: SearchResult) -> str:
    """What one must know to cite the figure."""
    parts = [result.model]
    parts += [f"layer {result.layer}"] if result.layer else []
    parts += [f"distance {result.distance_name}"] if result.distance_name else []
    return "   ·   ".join((*parts, f"index {Path(result.index).name}"))


def _classes(result: SearchResult) -> bool:
    return any(hit.label is not None for hit in result.hits)


def _legend(result: SearchResult, lines: int) -> str:
    if result.query_maps is None:
        return "Bars: what each level adds to the distance." if result.hits[0].levels else ""
    parts = []
    if result.region is None:
        parts.append("Warm places add to the similarity of query and hit, blue ones take from it.")
        if lines:
            parts.append("Equal numbers: places that are each other's best match.")
        parts.append("Hits of a row share one scale.")
    else:
        parts.append("Box in a hit: where the region was found.")
    further = _NEXT[0] if _classes(result) else _NEXT[1]
    parts.append(
        f"Last row: warm speaks for the hit, blue for the {further}; it sums to the difference "
        "of their distances."
    )
    return " ".join(parts)


def _column(result: SearchResult, query: _Picture, hit: Hit, number: int, lines: int) -> HitColumn:
    own = _Picture(result, hit.path)
    rival = None if hit.rival is None else result.pictures.get(hit.rival.path)
    column = HitColumn(hit, own, rival)
    if result.query_maps is None or result.hit_maps is None or result.contrast_maps is None:
        return column
    return replace(
        column,
        on_hit=own.heat(result.hit_maps[number]),
        on_query=query.close(query.heat(result.query_maps[number]), result.region),
        contrast=None
        if hit.rival is None
        else query.close(query.heat(result.contrast_maps[number]), result.region),
        marks=tuple((query.spot(*pair.a), own.spot(*pair.b)) for pair in hit.pairs[:lines]),
    )


def _rows(
    result: SearchResult, query: _Picture, columns: Sequence[HitColumn], across: int
) -> list[Row]:
    """The query with some hits, and below them why each was found."""
    empty: list[Cell | None] = [None] * (across - len(columns))
    what = "query" if result.region is None else "query: what is boxed"
    above = (
        Words(what, ROLE_COLOURS["anchor"], 10, "bold", "left"),
        Words(printable(Path(result.query).name), FAINT, align="left"),
    )
    first = Cell(query.pixels, above, seen=query.seen, region=query.frame(result.region))
    rows = [Row([first, *map(_found, columns), *empty], tallest=_TALLEST)]
    if result.query_maps is None:
        rows.append(Row([None, *map(_bars, columns), *empty]))
    else:
        under = query.close(query.pixels, result.region)
        texts: tuple[str, ...] = _ROWS[result.region is not None]
        texts = texts if _classes(result) else tuple(text.replace(*_NEXT) for text in texts)
        heats = zip(*(_heats(result, query, under, column) for column in columns), strict=True)
        rows += [
            Row([Cell(inside=(Words(text, align="right", lines=6),)), *cells, *empty],
                tallest=_TALLEST)
            for text, cells in zip(texts, heats, strict=True)
        ]  # fmt: skip
    return [*rows, Row([None, *map(_rather, columns), *empty], tallest=_RATHER)]


def _found(column: HitColumn) -> Cell:
    """The picture of a hit, its numbers and its name."""
    hit, name = column.hit, printable(Path(column.hit.path).name)
    title = f"{hit.rank}" if hit.similarity is None else f"{hit.rank}   cos {hit.similarity:.3f}"
    far = hit.close is False
    above = [
        Words(title, FAINT if far else INK, 10, "bold", "left", aside=f"d {_short(hit.distance)}")
    ]
    above += [Words(hit.label, align="left")] if hit.label else []
    above.append(Words(name, FAINT, SMALL - bool(hit.label), align="left"))
    return Cell(
        column.picture.pixels, tuple(above), seen=column.picture.seen,
        region=column.picture.frame(hit.box), tag="not close" if far else "",
    )  # fmt: skip


def _heats(
    result: SearchResult, query: _Picture, under: NDArray[np.uint8], column: HitColumn
) -> list[Cell]:
    """What the maps of a hit show, over its picture and over the query."""
    assert column.on_hit is not None
    assert column.on_query is not None
    own = column.picture
    whole = result.region is None
    on_query: dict[str, Any] = {
        "seen": query.seen if whole else None,
        "region": None if result.region is None else query.within(result.region),
    }
    cells = [
        Cell(signed_overlay(own.pixels, column.on_hit), seen=own.seen,
             region=own.frame(column.hit.box), spots=tuple(b for _, b in column.marks)),
        Cell(signed_overlay(under, column.on_query), spots=tuple(a for a, _ in column.marks),
             **on_query),
    ]  # fmt: skip
    if column.contrast is None:
        return [*cells, Cell(inside=(Words("nothing further down", FAINT),))]
    return [*cells, Cell(signed_overlay(under, column.contrast), **on_query)]


def _rather(column: HitColumn) -> Cell | None:
    """The rival in small, and what it is."""
    rival, gap = column.hit.rival, column.hit.gap
    if rival is None or gap is None or column.rival is None:
        return None
    name = rival.label or printable(Path(rival.path).name)
    # Beside two other numbers there is room for two digits of a small one.
    difference = f"{gap:+.3f}" if gap >= 0.01 else f"{gap:+.2g}"
    numbers = f"rank {rival.rank}, d {_short(rival.distance)}, {difference}"
    words = (
        Words(f"not {name}", size=7.5, align="left"),
        Words(numbers, FAINT, 7.5, align="left", lines=2),
    )
    return Cell(column.rival, beside=words)


def _bars(column: HitColumn) -> Cell:
    """What each level adds to the distance, each with a bar."""
    levels = column.hit.levels
    most = max((abs(value) for _, value in levels), default=0) or 1

    def draw(sheet: Sheet, x: float, y: float, width: float, height: float) -> None:
        for position, (label, value) in enumerate(levels):
            middle, length = y + LINE * (position + 0.5), 0.72 * abs(value) / most
            sheet.frame(x + 1.12, middle - 0.05, max(length, 0.01), 0.1, corner=0, facecolor=PALE)
            sheet.say(x, middle, label, most=0.7, color=FAINT, size=SMALL - 0.5)
            sheet.say(x + 1.08, middle, number(value), ha="right", size=SMALL - 0.5)

    return Cell(draw=draw, height=LINE * len(levels))


def on_one_scale(columns: Sequence[HitColumn]) -> list[HitColumn]:
    """Every row of heats divided by the largest absolute value in it, so that hits compare."""
    for row in ("on_hit", "on_query", "contrast"):
        heats = [getattr(column, row) for column in columns]
        top = max((float(np.abs(heat).max()) for heat in heats if heat is not None), default=0)
        if top > 0:
            columns = [
                column if heat is None else replace(column, **{row: heat / top})
                for column, heat in zip(columns, heats, strict=True)
            ]
    return list(columns)


def _short(value: float) -> str:
    """Three digits that count."""
    return f"{value:.3f}" if value >= 0.1 or value == 0 else number(value)


class _Picture(Thumbnail):
    """A thumbnail with the maps of a layer."""

    def __init__(self, result: SearchResult, path: str) -> None:
        super().__init__(result.pictures[path], result.geometries[path])
        self.region, self.view = result.layer_region, result.geometries[path].size

    def heat(self, heatmap: Tensor | Heat) -> Heat:
        """A map ``(h,w)`` over the picture, in its own units."""
        values = torch.as_tensor(heatmap)[None, None].float()
        return super().heat(placed(values, self.view, self.region)[0, 0].cpu().numpy())

    def close(self, pixels: NDArray[Any], box: Box | None) -> NDArray[Any]:
        """The surroundings of a region, cut out of something as large as the thumbnail."""
        if box is None:
            return pixels
        left, top, right, bottom = self._surroundings(box)
        return pixels[top:bottom, left:right]

    def within(self, box: Box) -> Frame:
        """A region in its surroundings: left, top, right, bottom in their pixels."""
        left, top, _, _ = self._surroundings(box)
        x, y, right, bottom = self.frame(box) or (0.0,) * 4
        return x - left, y - top, right - left, bottom - top

    def _surroundings(self, box: Box) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of a region with some margin, in the thumbnail's shape."""
        left, top, right, bottom = self.frame(box) or (0.0,) * 4
        height, width = self.pixels.shape[:2]
        share = min(1.0, _MARGIN * max((right - left) / width, (bottom - top) / height))
        wide, high = max(8, round(share * width)), max(8, round(share * height))
        x = min(max(0, round((left + right - wide) / 2)), max(0, width - wide))
        y = min(max(0, round((top + bottom - high) / 2)), max(0, height - high))
        return x, y, min(width, x + wide), min(height, y + high)

    def frame(self, box: Box | None) -> Frame | None:
        """A box as left, top, right, bottom in pixels of the thumbnail."""
        if box is None:
            return None
        (x, y, wide, high), (across, down) = box, self.shrink
        return x * across, y * down, (x + wide) * across, (y + high) * down
