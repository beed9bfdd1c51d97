"""Pictures as small as a figure shows them, and where a network's view lies in them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from simexplain.data.preprocessing import Geometry

SIDE = 560
"""Pixels of the longer side."""


def shrunk(image: Image.Image | NDArray[np.uint8], longest: int = SIDE) -> NDArray[np.uint8]:
    """RGB ``(H,W,3)``, no side longer than ``longest``; a smaller picture is left as it is."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(np.ascontiguousarray(image))
    share = min(1.0, longest / max(image.size))
    size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))


class Thumbnail:
    """A small picture on which maps and points of the network's view, or of the picture, are laid.

    Attributes:
        pixels: RGB ``(H,W,3)``.
        seen: The part that the network saw: left, top, right, bottom in its pixels; None for all.
    """

    def __init__(self, pixels: NDArray[np.uint8], geometry: Geometry | None = None) -> None:
        """Of a picture with its geometry, or of a view itself.

        Args:
            pixels: RGB ``(H,W,3)``, the picture reduced by any factor.
            geometry: Of the picture itself; None where the pixels are those of the view.
        """
        height, width = pixels.shape[:2]
        self.pixels, self.geometry = pixels, geometry
        self.shrink, self.seen = (1.0, 1.0), None
        if geometry is not None:
            self.shrink = width / geometry.original[1], height / geometry.original[0]
            self.geometry = replace(geometry, original=(height, width))
            if self.geometry.box != (0, 0, width, height):
                self.seen = self.geometry.box

    def heat(self, heatmap: NDArray[np.float32]) -> NDArray[np.float32]:
        """A map over the view as one over the small picture."""
        return heatmap if self.geometry is None else self.geometry.to_original(heatmap)

    def spot(self, x: float, y: float) -> tuple[float, float]:
        """A point of the picture in pixels of the small one, from the centre of the first."""
        return x * self.shrink[0] - 0.5, y * self.shrink[1] - 0.5

    def view_spot(self, x: float, y: float) -> tuple[float, float]:
        """The same of a point of the view."""
        if self.geometry is not None:
            x, y = self.geometry.point_to_original(x, y)
        return x - 0.5, y - 0.5
