"""The result of matching: what every pair of positions adds, with everything needed to show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from simexplain.data.images import Picture
from simexplain.data.preprocessing import Geometry, Preprocess
from simexplain.errors import ComparisonError, check_choice, check_index
from simexplain.matching.factors import SCORES
from simexplain.methods.cams import unit_scaled
from simexplain.metrics.maps import tents
from simexplain.models.moving import WHOLE, Region
from simexplain.results.codec import Views
from simexplain.results.result import Attachments, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Point = tuple[float, float]


@dataclass(frozen=True)
class PositionPair:
    """A position of the first image and one of the second.

    Attributes:
        a: A point of the first image ``(x, y)``, in pixels of the picture where files were
            matched, else of the tensor.
        b: A point of the second image, likewise.
        value: What they add to the score together.
        share: The value over the score; 0 where the score is 0.
        specific: The part of the value that is particular to the two, see
            ``Matching.interaction``.
        mutual: Whether each is the best answer to the other in the chosen ranking.
    """

    a: Point
    b: Point
    value: float
    share: float
    specific: float
    mutual: bool


@dataclass(frozen=True)
class Frame:
    """Where the grid of a layer lies in what the user counts pixels of.

    Attributes:
        name: What to call the image in errors.
        view: ``(height, width)`` of the tensor.
        grid: ``(h, w)`` of the layer.
        geometry: Where the view lies in a picture; None where pixels are those of the tensor.
        region: Where in the view the positions lie; a layer may see a part of it.
    """

    name: str
    view: tuple[int, int]
    grid: tuple[int, int]
    geometry: Geometry | None = None
    region: Region = WHOLE

    @property
    def box(self) -> tuple[float, float, float, float]:
        """What the network saw: left, top, right, bottom."""
        if self.geometry is not None:
            return self.geometry.box
        return 0.0, 0.0, float(self.view[1]), float(self.view[0])

    def in_view(self, x: float, y: float) -> Point:
        """A point in pixels of the view.

        Raises:
            ComparisonError: If the network did not see it.
        """
        left, top, right, bottom = self.box
        if not (left <= x <= right and top <= y <= bottom):
            raise ComparisonError(
                f"Expected a point of {self.name} that the network saw, x from {left:.1f} to "
                f"{right:.1f} and y from {top:.1f} to {bottom:.1f}, got ({x:g}, {y:g})."
            )
        if self.geometry is None:
            return x, y
        return self.geometry.point_from_original(x, y)

    def weights(self, x: float, y: float, like: Tensor) -> Tensor:
        """Bilinear weights ``(h,w)`` of a point: four neighbours, the edge going on outside.

        Centres lie at half-integers: position 0 of a grid with cells of 32 pixels is at pixel 16.
        Of a layer that sees a part of the image, the outermost positions stand for points up to a
        cell beyond it.

        Args:
            x: In the user's pixels, from the left edge.
            y: From the upper edge.
            like: Whose type and device the weights shall have.

        Raises:
            ComparisonError: If the network or the layer did not see the point.
        """
        across, down = self.in_view(x, y)
        sides = []
        for axis, index in enumerate((down, across)):
            start, end = self._span(axis)
            reach = (end - start) / self.grid[axis]
            if not start - reach <= index <= end + reach:
                raise ComparisonError(self._unseen(x, y))
            where = torch.tensor([index], dtype=like.dtype, device=like.device)
            sides.append(tents(where, self.grid[axis], start, end)[0])
        return sides[0][:, None] * sides[1][None, :]

    def _unseen(self, x: float, y: float) -> str:
        (top, bottom), (left, right) = self._span(0), self._span(1)
        (left, top), (right, bottom) = self._own(left, top), self._own(right, bottom)
        return (
            f"Expected a point of {self.name} that the layer sees, x from {left:.1f} to "
            f"{right:.1f} and y from {top:.1f} to {bottom:.1f}, got ({x:g}, {y:g}); name an "
            "earlier layer, which sees the whole."
        )

    def centre(self, position: int) -> Point:
        """The centre of a position, counted row by row, in the user's pixels."""
        places = []
        for axis, number in enumerate(divmod(position, self.grid[1])):
            start, end = self._span(axis)
            places.append(start + (number + 0.5) * (end - start) / self.grid[axis])
        return self._own(places[1], places[0])

    def _span(self, axis: int) -> tuple[float, float]:
        """From where to where positions lie, in pixels of the view."""
        start, end = self.region[axis::2]
        return start * self.view[axis], end * self.view[axis]

    def _own(self, x: float, y: float) -> Point:
        """A point of the view in the user's pixels."""
        return (x, y) if self.geometry is None else self.geometry.point_to_original(x, y)


RANKED_BY = ("value", "specific")
"""``value``: what two positions add; ``specific``: what of it is particular to the two."""


@dataclass(frozen=True)
class Entry:
    """A place in a matrix ``(n,m)``.

    Attributes:
        row: Its row.
        column: Its column.
        mutual: Whether it is the best of its row and of its column.
    """

    row: int
    column: int
    mutual: bool


def centred(matrix: Tensor) -> Tensor:
    """A matrix ``(n,m)`` without the means of its rows and columns, which then sum to zero."""
    means = matrix.mean(dim=1, keepdim=True) + matrix.mean(dim=0, keepdim=True)
    return matrix - means + matrix.mean()


def strongest(matrix: Tensor, n: int, *, sign: int, mutual: bool, by: str) -> list[Entry]:
    """The entries that bring two images closest, the strongest first.

    Args:
        matrix: ``(n,m)``.
        n: How many at most.
        sign: 1 where larger entries are stronger, -1 where smaller ones are.
        mutual: Only entries that are the best of their row and of their column; by ``specific``,
            those that are weaker than the average entry are left out.
        by: A name in ``RANKED_BY``.

    Raises:
        ComparisonError: If the ranking is unknown.
    """
    check_choice("by", by, RANKED_BY)
    values = matrix * sign
    ranked = values if by == "value" else centred(values)
    # The first of equals in both directions: one partner for each position.
    best_column, best_row = ranked.argmax(dim=1), ranked.argmax(dim=0)
    flat = ranked.flatten()
    if mutual:
        rows = torch.arange(len(ranked), device=ranked.device)
        rows = rows[best_row[best_column] == rows]
        places = rows * ranked.shape[1] + best_column[rows]
        if by == "specific":
            # Two positions that hardly add anything may still be particular to each other.
            places = places[values.flatten()[places] > values.mean()]
    else:
        places = flat.topk(min(max(n, 0), flat.numel())).indices
    order = flat[places].argsort(descending=True, stable=True)[: max(n, 0)]
    pairs = []
    for index in places[order].tolist():
        row, column = divmod(index, ranked.shape[1])
        each_other = int(best_column[row]) == column and int(best_row[column]) == row
        pairs.append(Entry(row, column, each_other))
    return pairs


SIDES = ("a", "b")
_POINTS, _APART, _SEARCHED = 3, 0.25, 40


@dataclass(frozen=True)
class Matching(Result):
    """The scores of ``B`` pairs of images as sums over all pairs of their positions.

    Attributes:
        matrix: ``(B,h,w,h',w')``, signed: what position ``(i,j)`` of the first image and ``(k,l)``
            of the second add to the score together.
        score: ``(B,)``, from the vectors themselves.
        score_name: A name in ``SCORES``.
        style: A name in ``STYLES``.
        layer: The layer whose positions they are.
        model: Name of the model.
        images: The preprocessed images of both sides, ``(B,3,H,W)`` and ``(B,3,H',W')``.
        preprocess: How to make ``images`` visible again.
        warnings: What to know before trusting it.
        versions: Of the packages that made it.
        pictures: The original pictures of each pair where files were matched, else empty.
        geometries: Where the images lie in the pictures; points are in pixels of the picture
            wherever they are known.
        unexplained: The share ``(B,)`` of each score, in [0, 1], that positions do not account for:
            biases, what passes by the layer, the error of an integration. None of old files.
        regions: Of both sides top, left, bottom and right of where the positions lie, as shares of
            the image; a layer may see a part of it.
        bypass: For the layer the share of the embedding that bypasses it, 0 to 1, where that is
            known; measured on the first two images of their size that the model explained.
    """

    matrix: Tensor
    score: Tensor
    score_name: str
    style: str
    layer: str
    model: str
    images: tuple[Views, Views]
    preprocess: Preprocess
    warnings: tuple[str, ...]
    versions: Mapping[str, str]
    pictures: tuple[tuple[Picture, Picture], ...] = field(default=(), repr=False)
    geometries: tuple[tuple[Geometry, Geometry], ...] = field(default=(), repr=False)
    unexplained: Tensor | None = None
    regions: tuple[Region, Region] = (WHOLE, WHOLE)
    bypass: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.matrix)

    @property
    def residual(self) -> Tensor:
        """The sum of the matrix minus the score ``(B,)``, float64, CPU: rounding or integration.

        With style ``zhu`` it is also, with its sign turned, the share of the biases.
        """
        return self.matrix.cpu().double().sum(dim=(1, 2, 3, 4)) - self.score.cpu().double()

    def marginals(self) -> tuple[Tensor, Tensor]:
        """What each position adds in all, ``(B,h,w)`` and ``(B,h',w')``; each sums to the score.

        For average pooling without a head and the cosine they are the maps of Stylianou et al.
        2019. Style ``zhu`` cuts every pair off at zero before it sums, as the code of that paper
        does, and divides each map by its maximum; its maps do not sum to the score.
        """
        matrix = self.matrix.clamp_min(0) if self.style == "zhu" else self.matrix
        return self._shown(matrix.sum(dim=(3, 4))), self._shown(matrix.sum(dim=(1, 2)))

    def at(self, x: float, y: float, side: str = "a", index: int = 0) -> Tensor:
        """Which places of the other image answer to a point: a signed map ``(h',w')``.

        The row of the matrix at the point, interpolated bilinearly between the four nearest
        positions with pixel centres at half-integers; beyond the outermost centres the edge goes
        on. It sums to the marginal at that point. Style ``zhu`` cuts every pair off at zero before
        it interpolates, and divides the map by its maximum.

        Args:
            x: In pixels of the picture where files were matched, else of the tensor.
            y: Likewise, from the upper edge.
            side: ``a`` for a point of the first image, ``b`` for one of the second.
            index: Which pair.

        Raises:
            ComparisonError: If the pair or side does not exist, or the network did not see the
                point.
        """
        return self._shown(self._row(x, y, side, index)[None])[0]

    def best(self, x: float, y: float, side: str = "a", index: int = 0) -> PositionPair:
        """The position of the other image that answers most to a point, and what they add.

        For ``squared`` that is the position with the least distance. Takes what :meth:`at` does.

        Raises:
            ComparisonError: As for :meth:`at`.
        """
        weights = self.frame(side, index).weights(x, y, self.matrix).flatten()
        values = self._flat(index)
        special = centred(values)
        if side == "b":
            values, special = values.T, special.T
        row = weights @ values
        position = int((row * self.sign).argmax())
        other = self.frame(SIDES[1 - SIDES.index(side)], index).centre(position)
        a, b = ((x, y), other) if side == "a" else (other, (x, y))
        # Whether the position that the point lies in is in turn the best one for its answer.
        mutual = int((values[:, position] * self.sign).argmax()) == int(weights.argmax())
        numbers = float(row[position]), float((weights @ special)[position])
        return self._pair(a, b, *numbers, mutual, index)

    def interaction(self) -> Tensor:
        """What is particular to each pair of positions ``(B,h,w,h',w')``: the matrix, centred.

        A few strong positions answer most to all others, whatever those show. So the matrix is the
        sum of three parts, as in a two-way analysis of variance: what each position of the first
        image adds on average, what each of the second adds on average (both with the overall mean
        of the matrix, which is taken off once), and this one, whose rows and columns sum to zero.
        """
        flat = torch.stack([centred(self._flat(index)) for index in range(len(self))])
        return flat.reshape(self.matrix.shape)

    def top(
        self, n: int = 8, index: int = 0, *, mutual: bool = False, by: str = "value"
    ) -> tuple[PositionPair, ...]:
        """The strongest pairs of positions: those that bring the images closest.

        Args:
            n: How many at most.
            index: Which pair of images.
            mutual: Only positions that are each other's best; then no position comes twice.
            by: ``value``, what they add; ``specific``, what of it is particular to the two (then
                mutual pairs that add less than an average pair are left out).

        Raises:
            ComparisonError: If the pair of images or the ranking does not exist.
        """
        values = self._flat(index)
        special = centred(values)
        first, second = (self.frame(side, index) for side in SIDES)
        return tuple(
            self._pair(
                first.centre(entry.row),
                second.centre(entry.column),
                float(values[entry.row, entry.column]),
                float(special[entry.row, entry.column]),
                entry.mutual,
                index,
            )
            for entry in strongest(values, n, sign=self.sign, mutual=mutual, by=by)
        )

    @property
    def sign(self) -> int:
        """1 where larger parts bring images closer, -1 for distances."""
        return SCORES[self.score_name].sign

    def frame(self, side: str, index: int = 0) -> Frame:
        """Where the positions of one image lie.

        Raises:
            ComparisonError: If the pair or the side does not exist.
        """
        check_choice("side", side, SIDES)
        check_index("pair", index, len(self))
        position = SIDES.index(side)
        image = self.images[position]
        axes = self.matrix.shape[1 + 2 * position : 3 + 2 * position]
        return Frame(
            name=f"'{self.pictures[index][position].path}'" if self.pictures else f"image {side}",
            view=(int(image.shape[-2]), int(image.shape[-1])),
            grid=(int(axes[0]), int(axes[1])),
            geometry=self.geometries[index][position] if self.geometries else None,
            region=self.regions[position],
        )

    def figure(
        self, index: int = 0, *, points: Sequence[Point] | None = None, lines: int = 6
    ) -> Figure:
        """A figure of pair ``index``: strongest mutual pairs, marginals, and a row for each point.

        Args:
            index: Which pair.
            points: Points ``(x, y)`` of the first image, as for :meth:`at`; the first positions of
                the strongest mutual pairs unless given.
            lines: How many mutual pairs to connect, ranked by what is particular to them.

        Raises:
            ComparisonError: If the pair does not exist, or the network did not see a point.
        """
        return self._draw(index, points, lines)

    def save(
        self,
        folder: str | Path,
        *,
        force: bool = False,
        points: Sequence[Point] | None = None,
        top: int = 8,
    ) -> dict[str, str]:
        """As :meth:`Result.save`.

        Args:
            folder: Made if missing.
            force: Replace the files of a matching that is there already.
            points: Of the first image of each pair, for figures and JSON.
            top: How many pairs of positions the JSON lists.

        Raises:
            OutputError: If files are there already, or the folder cannot be written.
            ComparisonError: If the network did not see a point.
        """
        return self.write(folder, force=force, points=points, top=top)

    def captions(self) -> list[str]:
        """One for each pair."""
        return [f"Matching of pair {index + 1}" for index in range(len(self))]

    def attachments(self, points: Sequence[Point] | None = None, **options: Any) -> Attachments:
        """A figure of each pair."""
        return self._figures(points=points)

    def summary(
        self, points: Sequence[Point] | None = None, top: int = 8, **options: Any
    ) -> dict[str, Any]:
        """What stands at the top is that of the first pair, ``matchings`` has all of them."""
        pairs = [self._record(index, points, top) for index in range(len(self))]
        return {
            "style": self.style,
            "layer": self.layer,
            "model": self.model,
            **pairs[0],
            "bypass": self.bypass,
            "warnings": self.warnings,
            "versions": self.versions,
            "preprocess": self.preprocess,
            "matchings": pairs,
        }

    def _record(self, index: int, points: Sequence[Point] | None, top: int) -> dict[str, Any]:
        shown = self.default_points(index) if points is None else points
        answers = [self.best(*point, index=index) for point in shown]
        return {
            "score": {"name": self.score_name, "value": self.score[index]},
            "residual": self.residual[index],
            "unexplained": None if self.unexplained is None else self.unexplained[index],
            "images": [self._image(index, position) for position in range(2)],
            "points": [
                {"at": at, "best": _rounded(own.b), "value": own.value, "share": own.share}
                for at, own in zip(shown, answers, strict=True)
            ],
            "pairs": [_near(pair) for pair in self.top(top, index)],
            "mutual_pairs": [
                _near(pair) for pair in self.top(top, index, mutual=True, by="specific")
            ],
        }

    def _image(self, index: int, position: int) -> dict[str, Any]:
        frame = self.frame(SIDES[position], index)
        return {
            "path": self.pictures[index][position].path if self.pictures else None,
            "grid": frame.grid,
            "region": frame.region,
            "seen": _rounded(frame.box),
            "geometry": frame.geometry and frame.geometry.to_json(),
        }

    def default_points(self, index: int = 0) -> list[Point]:
        """Where the strongest mutual pairs lie in the first image, a few that are well apart."""
        pairs: list[PositionPair] = []
        left, top, right, bottom = self.frame("a", index).box
        apart = _APART * max(right - left, bottom - top)
        for pair in self.top(_SEARCHED, index, mutual=True, by="specific"):
            if len(pairs) == _POINTS:
                break
            if all(np.hypot(pair.a[0] - o.a[0], pair.a[1] - o.a[1]) >= apart for o in pairs):
                pairs.append(pair)
        return [pair.a for pair in pairs]

    def _row(self, x: float, y: float, side: str, index: int) -> Tensor:
        weights = self.frame(side, index).weights(x, y, self.matrix)
        axes = "hw,hwkl->kl" if side == "a" else "kl,hwkl->hw"
        matrix = self.matrix[index]
        return torch.einsum(axes, weights, matrix.clamp_min(0) if self.style == "zhu" else matrix)

    def _flat(self, index: int) -> Tensor:
        """The matrix of one pair of images as ``(h*w,h'*w')``."""
        self.frame("a", index)
        return self.matrix[index].flatten(2).flatten(0, 1)

    def _pair(
        self, a: Point, b: Point, value: float, specific: float, mutual: bool, index: int
    ) -> PositionPair:
        score = float(self.score[index])
        return PositionPair(a, b, value, value / score if score else 0.0, specific, mutual)

    def _shown(self, maps: Tensor) -> Tensor:
        """Maps ``(M,h,w)`` in the way of the style."""
        return unit_scaled(maps) if self.style == "zhu" else maps


def _near(pair: PositionPair) -> PositionPair:
    """A pair of positions as precise as pixels are."""
    return replace(pair, a=_rounded(pair.a), b=_rounded(pair.b))


def _rounded(numbers: Sequence[float]) -> Any:
    return tuple(round(number, 1) for number in numbers)
