"""From a matching to its figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from simexplain.data.preprocessing import Geometry
from simexplain.errors import ComparisonError
from simexplain.matching.factors import SCORES
from simexplain.matching.points import Point
from simexplain.matching.result import SIDES, Matching
from simexplain.metrics.maps import signed_heat
from simexplain.printing import printable
from simexplain.rendering.correspondence import COLOURS, Row, correspondence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_THUMBNAIL = 560


def draw_matching(
    matching: Matching, index: int, points: Sequence[Point] | None, lines: int
) -> Figure:
    """The figure of one pair; see ``Matching.figure``.

    Raises:
        ComparisonError: If there is no such pair, or the network did not see a point.
    """
    if lines < 0:
        raise ComparisonError(f"Expected a number of lines from 0, got {lines}.")
    sides = [_Side(matching, place, index) for place in range(2)]
    if points is None:
        points = matching.default_points(index)
    chosen = matching.top(lines, index, mutual=True, by="specific")
    maps = [part[index] for part in matching.marginals()]
    name = f"what each place adds to the {SCORES[matching.score_name].noun}"
    every = Row(
        texts=(name, name),
        heats=(sides[0].heat(maps[0]), sides[1].heat(maps[1])),
    )
    return correspondence(
        (sides[0].picture, sides[1].picture),
        (sides[0].caption, sides[1].caption),
        (sides[0].box, sides[1].box),
        [(sides[0].spot(*pair.a), sides[1].spot(*pair.b)) for pair in chosen],
        [
            every,
            *(_row(matching, sides, point, number, index) for number, point in enumerate(points)),
        ],
        title="Which region answers to which?",
        verdict=summary(matching, index),
        footer=footer(matching),
        notes=matching.warnings,
    )


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


def _row(matching: Matching, sides: Sequence[_Side], point: Point, number: int, index: int) -> Row:
    best = matching.best(*point, index=index)
    texts = (
        f"point {number + 1} at ({best.a[0]:.0f}, {best.a[1]:.0f})",
        f"{'most' if matching.sign > 0 else 'least'} at ({best.b[0]:.0f}, {best.b[1]:.0f}): "
        f"{best.value:+.5f}, {best.share:+.2%}",
    )
    return Row(
        texts=texts,
        heats=(None, sides[1].heat(matching.at(*point, index=index))),
        marks=(sides[0].spot(*best.a), sides[1].spot(*best.b)),
        colour=COLOURS[number % len(COLOURS)],
    )


class _Side:
    """One image of a pair as it is drawn: the whole picture, reduced, or the network's view."""

    def __init__(self, matching: Matching, place: int, index: int) -> None:
        self.frame = matching.frame(SIDES[place], index)
        self.box: tuple[float, float, float, float] | None = None
        self.geometry: Geometry | None = None
        if matching.pictures:
            picture = matching.pictures[index][place]
            self.caption = printable(Path(picture.path).name)
            width, height = picture.image.size
            self.shrink = min(1.0, _THUMBNAIL / max(width, height))
            small = (max(1, round(height * self.shrink)), max(1, round(width * self.shrink)))
            thumbnail = picture.image.resize((small[1], small[0]), Image.Resampling.LANCZOS)
            self.picture = np.asarray(thumbnail)
            self.geometry = replace(matching.geometries[index][place], original=small)
            if self.geometry.box != (0, 0, small[1], small[0]):
                self.box = self.geometry.box
        else:
            self.caption = ("first image", "second image")[place]
            self.picture = matching.preprocess.undo(matching.images[place][index])

    def heat(self, values: Tensor) -> NDArray[np.float32]:
        """A map ``(h,w)`` over the picture, divided by its largest absolute value."""
        heat = signed_heat(values, self.frame.view, self.frame.region)
        return heat if self.geometry is None else self.geometry.to_original(heat)

    def spot(self, x: float, y: float) -> Point:
        """A point of the user's in pixels of the drawn picture, whose first centre is at 0."""
        if self.geometry is None:
            x, y = self.frame.in_view(x, y)
            return x - 0.5, y - 0.5
        return x * self.shrink - 0.5, y * self.shrink - 0.5
