"""Between pixels of a picture, pixels of the network's view, and positions of a grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simexplain.data.preprocessing import Geometry
from simexplain.errors import ComparisonError
from simexplain.metrics.maps import tents
from simexplain.models.moving import WHOLE, Region

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
