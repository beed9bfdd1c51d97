"""The result of segmenting: a mask with everything needed to judge, show and keep it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from simexplain.data.preprocessing import Geometry
from simexplain.renaming import takes_old_names, with_old_names
from simexplain.results.result import Attachments, Result
from simexplain.segmentation.cue import Heat, Mask, Pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROLES = ("support", "other")


@dataclass(frozen=True)
class SupportImage:
    """An image of what to look for, or of what not to.

    Attributes:
        name: Its file; empty for tensors.
        role: ``support``, or ``other`` for one of another class.
        picture: RGB ``(h,w,3)``, as the network saw it.
        heat: ``(h,w)`` float32 in [0, 1], its own attention map.
    """

    name: str
    role: str
    picture: Pixels = field(repr=False)
    heat: Heat = field(repr=False)


class _Grown:
    """The field ``heat``: of a large picture what makes it, since it takes 4 bytes a pixel."""

    def __get__(self, result: Segmentation | None, owner: object = None) -> Any:
        if result is None:
            return self
        kept = vars(result)["heat"]
        return kept() if callable(kept) else kept

    def __set__(self, result: Segmentation, heat: Any) -> None:
        vars(result)["heat"] = heat


@takes_old_names
@dataclass(frozen=True)
class Segmentation(Result):
    """Which pixels of a test image show what the supports show.

    Attributes:
        mask: ``(H,W)`` boolean, at the picture's own resolution.
        heat: ``(H,W)`` float32 in [0, 1], the attention map that it was made from.
        marks: ``(H,W)`` uint8, the marks given to GrabCut: 0 background, 1 object, 2 probably
            background, 3 probably object; None where nothing was cut.
        picture: RGB ``(H,W,3)``.
        name: The test image's file; empty for a tensor.
        images: The supports, then those of other classes.
        refine: How the map became a mask, a name in ``REFINEMENTS``.
        method: Name of the method.
        model: Name of the model.
        layers: The layers used.
        options: Everything else that was chosen, as plain JSON values.
        warnings: What to know before trusting it.
        versions: Of the packages that made it.
        bypass: For each layer the share of the embedding that bypasses it, 0 to 1, where that is
            known; measured on the first two images of their size that the model explained.
        geometries: Where the network's view lies in the test picture, then in those of ``images``;
            empty for tensors.
    """

    mask: Mask = field(repr=False)
    heat: Heat = field(repr=False)
    marks: Pixels | None = field(repr=False)
    picture: Pixels = field(repr=False)
    name: str
    images: tuple[SupportImage, ...] = field(repr=False)
    refine: str
    method: str
    model: str
    layers: tuple[str, ...]
    options: Mapping[str, Any]
    warnings: tuple[str, ...]
    versions: Mapping[str, str] = field(repr=False)
    bypass: Mapping[str, float] = field(default_factory=dict)
    geometries: tuple[Geometry, ...] = field(default=(), repr=False)

    @property
    def share(self) -> float:
        """The share of the picture's pixels in the mask."""
        return float(self.mask.mean())

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """Left, top, right, bottom of the mask in pixels, the last two outside; None if empty."""
        if not self.mask.any():
            return None
        rows, columns = (np.flatnonzero(self.mask.any(axis=axis)) for axis in (1, 0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1

    def overlay(self) -> Pixels:
        """The picture with the mask in colour and its outline ``(H,W,3)``."""
        from simexplain.rendering.overlay import outlined

        return outlined(self.picture, self.mask)

    def cutout(self, *, crop: bool = True) -> NDArray[np.uint8]:
        """The object alone, RGBA ``(h,w,4)``, its edge smoothed over a pixel.

        Args:
            crop: Only the box around the mask; an empty mask gives the whole, transparent.
        """
        from simexplain.rendering.overlay import cut_out

        whole = cut_out(self.picture, self.mask)
        if not crop or self.box is None:
            return whole
        left, top, right, bottom = self.box
        return whole[top:bottom, left:right]

    def figure(self) -> Figure:
        """Test image, attention map, marks for the cut, result; below them the supports."""
        return self._draw()

    def to_store(self) -> Segmentation:
        """With map and picture at most as large as the cut sees them."""
        longest = int(self.options["cut"]["longest"])
        height, width = self.mask.shape
        share = min(1.0, longest / max(height, width))
        size = max(1, round(width * share)), max(1, round(height * share))
        return self._resized(size, cv2.INTER_AREA)

    def from_store(self) -> Segmentation:
        """At the size of the mask again, which is exact."""
        return self._resized(self.mask.shape[::-1], cv2.INTER_LINEAR)

    def _resized(self, size: tuple[int, ...], how: int) -> Segmentation:
        if self.picture.shape[1::-1] == size:
            return self
        heat, picture = (
            np.asarray(cv2.resize(own, size, interpolation=how))
            for own in (self.heat, self.picture)
        )
        return replace(self, heat=heat, picture=picture)

    def captions(self) -> list[str]:
        """Of its figure."""
        return [f"Segmentation of {self.name or 'an image'}"]

    def attachments(self, **options: Any) -> Attachments:
        """Mask, overlay, cut-out and figure."""
        return {
            "mask": ("mask.png", lambda: self.mask.astype(np.uint8) * 255),
            "overlay": ("overlay.png", self.overlay),
            "cutout": ("cutout.png", self.cutout),
            **self._figures(),
        }

    def summary(self, **options: Any) -> dict[str, Any]:
        """The result in a few lines."""
        height, width = self.mask.shape
        record = {
            **{name: getattr(self, name) for name in ("refine", "method", "model")},
            "layers": self.layers,
            "bypass": self.bypass,
            "test": {"path": self.name or None, "size": [width, height]},
            "seen": round(self.geometries[0].seen, 4) if self.geometries else None,
            "geometries": [geometry.to_json() for geometry in self.geometries],
            "supports": [image.name or None for image in self.images if image.role == "support"],
            "others": [image.name or None for image in self.images if image.role == "other"],
            "share": self.share,
            "box": self.box,
            "options": self.options,
            "warnings": self.warnings,
            "versions": self.versions,
        }
        return with_old_names(record, "by")


Segmentation.heat = _Grown()  # type: ignore[assignment]
