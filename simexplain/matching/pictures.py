"""From a matching to its figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from simexplain.data.preprocessing import Thumbnail, shrunk
from simexplain.errors import ComparisonError, printable
from simexplain.matching.factors import SCORES
from simexplain.matching.result import SIDES, Matching, Point
from simexplain.metrics.maps import signed_heat
from simexplain.rendering.overlay import signed_overlay
from simexplain.rendering.sheet import COLOURS, Bar, Cell, Grid, Row, Words, page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL, _TALLEST = 3.3, 4.2
_LEGEND = (
    "Lines: positions that are each other's best, by what they add together beyond what each "
    "adds on average; 1 is the strongest. Numbers stand in the middle of positions."
)

_Heats = tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]


def draw_matching(
    matching: Matching, index: int, points: Sequence[Point] | None, lines: int
) -> Figure:
    """The figure of one pair; see ``Matching.figure``.

    Raises:
        ComparisonError: If the pair does not exist, or the network did not see a point.
    """
    if lines < 0:
        raise ComparisonError(f"Expected a number of lines from 0, got {lines}.")
    sides = [_Side(matching, position, index) for position in range(2)]
    if points is None:
        points = matching.default_points(index)
    chosen = matching.top(lines, index, mutual=True, by="specific")
    maps = [part[index] for part in matching.marginals()]
    name = f"what each place adds to the {SCORES[matching.score_name].noun}"
    heats: list[_Heats] = [(sides[0].heat(maps[0]), sides[1].heat(maps[1]))]
    rows = [
        Row([side.cell(side.caption) for side in sides], tallest=_TALLEST),
        _row(sides, (name, name), heats[0], (None, None)),
    ]
    for number, point in enumerate(points):
        heats.append((None, sides[1].heat(matching.at(*point, index=index))))
        rows.append(_point_row(matching, sides, point, heats[-1], number, index))
    signed = any(heat is not None and heat.min() < -0.02 for pair in heats for heat in pair)
    bar = Bar("share of each map's largest value", signed, row=1)
    sheet = page(
        [Grid(rows, [_CELL] * 2, gap=0.55, bar=bar)],
        title="Which region answers to which?",
        verdict=summary(matching, index),
        legend=_LEGEND if chosen else "",
        footer=footer(matching),
        notes=matching.warnings,
    )
    ends = [(sides[0].spot(*pair.a), sides[1].spot(*pair.b)) for pair in chosen]
    sheet.connect(sheet.figure.axes[:2], ends)
    return sheet.figure


def summary(matching: Matching, index: int) -> str:
    """The score, of how many parts it is the sum, and how nearly."""
    (rows, columns), (below, across) = (matching.frame(side, index).grid for side in SIDES)
    noun, score = SCORES[matching.score_name].noun, float(matching.score[index])
    return (
        f"{noun} {score:.4f}, the sum over {rows} x {columns} by {below} x {across} positions; "
        f"residual {float(matching.residual[index]):+.0e}"
    )


def footer(matching: Matching) -> str:
    """What one must know to cite the figure."""
    about = SCORES[matching.score_name].about
    return "   ·   ".join(
        (matching.model, f"layer {matching.layer}", about, f"style {matching.style}")
    )


def _point_row(
    matching: Matching,
    sides: Sequence[_Side],
    point: Point,
    heats: _Heats,
    number: int,
    index: int,
) -> Row:
    best = matching.best(*point, index=index)
    most = "most" if matching.sign > 0 else "least"
    texts = (
        f"point {number + 1} at ({best.a[0]:.0f}, {best.a[1]:.0f})",
        f"{most} at ({best.b[0]:.0f}, {best.b[1]:.0f}): {best.value:+.5f}, {best.share:+.2%}",
    )
    colour = COLOURS[number % len(COLOURS)]
    rings = (sides[0].spot(*best.a), colour), (sides[1].spot(*best.b), colour)
    return _row(sides, texts, heats, rings)


def _row(
    sides: Sequence[_Side],
    texts: tuple[str, str],
    heats: _Heats,
    rings: tuple[tuple[Point, str] | None, tuple[Point, str] | None],
) -> Row:
    cells = zip(sides, texts, heats, rings, strict=True)
    return Row([side.cell(text, heat, ring) for side, text, heat, ring in cells], tallest=_TALLEST)


class _Side:
    """One image of a pair as it is drawn: the whole picture, reduced, or the network's view."""

    def __init__(self, matching: Matching, position: int, index: int) -> None:
        self.frame = matching.frame(SIDES[position], index)
        self.caption = ("first image", "second image")[position]
        self.whole = bool(matching.pictures)
        if self.whole:
            picture = matching.pictures[index][position]
            self.caption = printable(Path(picture.path).name)
            geometry = matching.geometries[index][position]
            self.picture = Thumbnail(shrunk(picture.image), geometry)
        else:
            self.picture = Thumbnail(matching.preprocess.undo(matching.images[position][index]))

    def heat(self, values: Tensor) -> NDArray[np.float32]:
        """A map ``(h,w)`` over the picture, divided by its largest absolute value."""
        return self.picture.heat(signed_heat(values, self.frame.view, self.frame.region))

    def spot(self, x: float, y: float) -> Point:
        """A point of the user's in pixels of the drawn picture, whose first centre is at 0."""
        return self.picture.spot(*((x, y) if self.whole else self.frame.in_view(x, y)))

    def cell(
        self,
        text: str,
        heat: NDArray[np.float32] | None = None,
        ring: tuple[Point, str] | None = None,
    ) -> Cell:
        """The picture with a line over it, and with heat and a ring where there are any."""
        pixels = self.picture.pixels
        shown = pixels if heat is None else signed_overlay(pixels, heat)
        return Cell(shown, (Words(text, size=9),), seen=self.picture.seen, ring=ring)
