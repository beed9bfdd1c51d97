"""From a search to its figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from simexplain.data.preprocessing import Geometry
from simexplain.errors import ComparisonError
from simexplain.matching.points import Point
from simexplain.metrics.maps import placed
from simexplain.rendering import cards
from simexplain.rendering.hits import HitColumn, QueryPicture, hits_figure
from simexplain.searching.regions import Box
from simexplain.searching.search_result import Hit, SearchResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 20
"""Hits in one figure."""

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


def draw_search(result: SearchResult, lines: int) -> Figure:
    """The figure of a search; see ``SearchResult.figure``.

    Raises:
        ComparisonError: If the number of pairs is negative.
    """
    if lines < 0:
        raise ComparisonError(f"Expected a number of pairs from 0, got {lines}.")
    shown = result.hits[:MOST]
    query = _Picture(result, result.query)
    columns = [_column(result, query, hit, number, lines) for number, hit in enumerate(shown)]
    columns = on_one_scale(columns)
    rows: tuple[str, ...] = _ROWS[result.region is not None]
    if not _classes(result):
        rows = tuple(row.replace(*_NEXT) for row in rows)
    notes = list(result.warnings)
    if len(shown) < len(result.hits):
        notes.append(f"The figure shows the first {MOST} of {len(result.hits)} hits.")
    return hits_figure(
        query.shown(Path(result.query).name, result.region),
        columns,
        title="Why were these found?",
        verdict=f"{verdict(result)}. {result.closeness}" if result.closeness else verdict(result),
        rows=rows,
        legend=_legend(result, lines),
        footer=footer(result),
        notes=notes,
    )


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
    said = []
    if result.region is None:
        said.append("Warm places add to the similarity of query and hit, blue ones take from it.")
        if lines:
            said.append("Equal numbers: places that are each other's best match.")
        said.append("Hits of a row share one scale.")
    else:
        said.append("Box in a hit: where the region was found.")
    further = _NEXT[0] if _classes(result) else _NEXT[1]
    said.append(
        f"Last row: warm speaks for the hit, blue for the {further}; it sums to the difference "
        "of their distances."
    )
    return " ".join(said)


def _column(result: SearchResult, query: _Picture, hit: Hit, number: int, lines: int) -> HitColumn:
    own = _Picture(result, hit.path)
    column = HitColumn(
        picture=own.pixels,
        title=f"{hit.rank}" if hit.similarity is None else f"{hit.rank}   cos {hit.similarity:.3f}",
        beside=f"d {_short(hit.distance)}",
        far=hit.close is False,
        label=hit.label or "",
        name=Path(hit.path).name,
        seen=own.seen,
        bars=hit.levels,
    )
    if hit.rival is not None and hit.gap is not None:
        column = replace(
            column,
            rival=result.pictures.get(hit.rival.path),
            rather=(
                f"not {hit.rival.label or Path(hit.rival.path).name}",
                f"rank {hit.rival.rank}, d {_short(hit.rival.distance)}, {_gap(hit.gap)}",
            ),
        )
    if result.query_maps is None or result.hit_maps is None or result.contrast_maps is None:
        return column
    marks = [(query.spot(pair.a), own.spot(pair.b)) for pair in hit.pairs[:lines]]
    return replace(
        column,
        on_hit=own.heat(result.hit_maps[number]),
        on_query=query.close(query.heat(result.query_maps[number]), result.region),
        contrast=None
        if hit.rival is None
        else query.close(query.heat(result.contrast_maps[number]), result.region),
        box=own.region(hit.box),
        marks=tuple(marks),
    )


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
    return f"{value:.3f}" if value >= 0.1 or value == 0 else cards.number(value)


def _gap(value: float) -> str:
    """Beside two other numbers there is room for two digits of a small one."""
    return f"{value:+.3f}" if value >= 0.01 else f"{value:+.2g}"


class _Picture:
    """A thumbnail, and how to come to its pixels."""

    def __init__(self, result: SearchResult, path: str) -> None:
        self.pixels = result.pictures[path]
        self.layer_region = result.layer_region
        whole = result.geometries[path]
        height, width = self.pixels.shape[:2]
        self.geometry: Geometry = replace(whole, original=(height, width))
        self.shrink = width / whole.original[1], height / whole.original[0]
        all_of_it = self.geometry.box == (0, 0, width, height)
        self.seen = None if all_of_it else self.geometry.box

    def heat(self, values: Tensor) -> NDArray[np.float32]:
        """A map ``(h,w)`` over the picture, in its own units."""
        size = self.geometry.size
        grown = placed(values[None, None].float(), size, self.layer_region)[0, 0]
        return self.geometry.to_original(grown.cpu().numpy())

    def spot(self, point: Point) -> Point:
        """A point of the picture in pixels of the thumbnail, whose first centre is at 0."""
        return point[0] * self.shrink[0] - 0.5, point[1] * self.shrink[1] - 0.5

    def shown(self, name: str, box: Box | None) -> QueryPicture:
        """The query, with a close-up of its region."""
        whole = QueryPicture(self.pixels, name, self.region(box), self.seen)
        if box is None or whole.region is None:
            return whole
        left, top, _, _ = self._surroundings(box)
        x, y, right, bottom = whole.region
        within = (x - left, y - top, right - left, bottom - top)
        return replace(whole, close_up=QueryPicture(self.close(self.pixels, box), name, within))

    def close(self, pixels: NDArray[Any], box: Box | None) -> NDArray[Any]:
        """The surroundings of a region, cut out of something as large as the thumbnail."""
        if box is None:
            return pixels
        left, top, right, bottom = self._surroundings(box)
        return pixels[top:bottom, left:right]

    def _surroundings(self, box: Box) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of a region with some margin, in the thumbnail's shape."""
        frame = self.region(box)
        assert frame is not None
        left, top, right, bottom = frame
        height, width = self.pixels.shape[:2]
        share = min(1.0, _MARGIN * max((right - left) / width, (bottom - top) / height))
        wide, high = max(8, round(share * width)), max(8, round(share * height))
        x = min(max(0, round((left + right - wide) / 2)), max(0, width - wide))
        y = min(max(0, round((top + bottom - high) / 2)), max(0, height - high))
        return x, y, min(width, x + wide), min(height, y + high)

    def region(self, box: Box | None) -> tuple[float, float, float, float] | None:
        """A box as left, top, right, bottom in pixels of the thumbnail."""
        if box is None:
            return None
        (x, y, wide, high), (across, down) = box, self.shrink
        return x * across, y * down, (x + wide) * across, (y + high) * down
