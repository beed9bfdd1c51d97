"""Between pixels of a picture, pixels of the network's view, and positions of a grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simexplain.data.preprocessing import Geometry
from simexplain.errors import ComparisonError

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
        mutual: Whether each is the best answer to the other in the ranking asked for.
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
    """

    name: str
    view: tuple[int, int]
    grid: tuple[int, int]
    geometry: Geometry | None = None

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

        Args:
            x: In the user's pixels, from the left edge.
            y: From the upper edge.
            like: Whose type and device the weights shall have.

        Raises:
            ComparisonError: If the network did not see the point.
        """
        across, down = self.in_view(x, y)
        tents = []
        for place, pixels, cells in zip((down, across), self.view, self.grid, strict=True):
            centre = min(max(place * cells / pixels - 0.5, 0.0), cells - 1.0)
            steps = torch.arange(cells, dtype=like.dtype, device=like.device) - centre
            tents.append((1 - steps.abs()).clamp_min(0))
        return tents[0][:, None] * tents[1][None, :]

    def centre(self, position: int) -> Point:
        """The centre of a position, counted row by row, in the user's pixels."""
        row, column = divmod(position, self.grid[1])
        (height, width), (rows, columns) = self.view, self.grid
        x, y = (column + 0.5) * width / columns, (row + 0.5) * height / rows
        return (x, y) if self.geometry is None else self.geometry.point_to_original(x, y)
