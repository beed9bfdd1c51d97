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
from simexplain.errors import ComparisonError
from simexplain.matching.factors import SCORES
from simexplain.matching.points import Frame, Point, PositionPair
from simexplain.matching.ranking import centred, strongest
from simexplain.models.moving import WHOLE, Region
from simexplain.results.codec import Views
from simexplain.results.result import Attachments, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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

        For ``squared`` that is the position with the least distance.

        Args:
            x: As for :meth:`at`.
            y: As for :meth:`at`.
            side: As for :meth:`at`.
            index: As for :meth:`at`.

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
        if side not in SIDES:
            raise ComparisonError(f"Expected side to be one of {', '.join(SIDES)}, got '{side}'.")
        if not -len(self) <= index < len(self):
            raise ComparisonError(
                f"Expected a pair below {len(self)}, got {index}; counting starts at 0."
            )
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
        pairs = [self._told(index, points, top) for index in range(len(self))]
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

    def _told(self, index: int, points: Sequence[Point] | None, top: int) -> dict[str, Any]:
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
        if self.style != "zhu":
            return maps
        top = maps.amax(dim=(1, 2), keepdim=True)
        return maps / torch.where(top > 0, top, torch.ones_like(top))


def _near(pair: PositionPair) -> PositionPair:
    """A pair of positions as precise as pixels are."""
    return replace(pair, a=_rounded(pair.a), b=_rounded(pair.b))


def _rounded(numbers: Sequence[float]) -> Any:
    return tuple(round(number, 1) for number in numbers)
