"""Small pictures of what a search is about, so that a result can be shown anywhere."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from simexplain.data.images import Picture, read_picture
from simexplain.data.preprocessing import Geometry, shrunk
from simexplain.errors import ImageError
from simexplain.searching.index_gallery import GalleryIndex

SIDE = 360
"""Pixels of the longer side of a thumbnail."""

_MISSING = 225


class Album:
    """Thumbnails by path, and where the network's view lies in the pictures themselves."""

    def __init__(self, gallery: GalleryIndex) -> None:
        self.gallery = gallery
        self.pictures: dict[str, NDArray[np.uint8]] = {}
        self.geometries: dict[str, Geometry] = {}
        self.warnings: list[str] = []

    def add_query(self, picture: Picture, geometry: Geometry) -> None:
        """The query, which has been read."""
        self.pictures[picture.path] = shrunk(picture.image, SIDE)
        self.geometries[picture.path] = geometry

    def add(self, index: int) -> None:
        """A picture of the gallery; a grey one, and a warning, where it is gone or has changed."""
        path, geometry = str(self.gallery.file(index)), self.gallery.geometry(index)
        if path in self.pictures:
            return
        self.geometries[path] = geometry
        try:
            image = read_picture(path).image
            if (image.height, image.width) == geometry.original:
                self.pictures[path] = shrunk(image, SIDE)
                return
            why = "has another size than when it was indexed; bring the index up to date"
        except ImageError:
            why = "cannot be read where it was indexed; give their folder with --root"
        self.warnings.append(f"'{path}' {why}. The figure leaves it grey.")
        height, width = geometry.original
        self.pictures[path] = shrunk(Image.new("RGB", (width, height), (_MISSING,) * 3), SIDE)
