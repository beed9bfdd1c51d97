"""From a heatmap to the marks of a cut, and from there to a mask: one table of ways."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, dataclass
from functools import partial

import cv2
import numpy as np
from numpy.typing import NDArray

from simexplain.arguments import typed
from simexplain.data.images import LARGE
from simexplain.errors import ComparisonError
from simexplain.methods.focus import Focus
from simexplain.option_fields import option

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

BACKGROUND, OBJECT, PROBABLE_BACKGROUND, PROBABLE_OBJECT = 0, 1, 2, 3
"""Marks of pixels, with OpenCV's values: the first two are never changed."""


@dataclass(frozen=True)
@typed
class GrabCut:
    """Rother, Kolmogorov, Blake 2004, as in OpenCV: colour models and a minimal cut, in turns.

    OpenCV draws the first clusters of colours from a random generator of the thread that calls.
    Here that is a thread of our own with a seed of its own: results are equal from run to run, and
    the caller's generator (``cv2.setRNGSeed``) is not touched.

    Attributes:
        iterations: How many turns.
        seed: Of the first clusters.
        longest: A picture with a longer side is reduced to this for the cut, and the mask's edge
            is interpolated back; the cut takes time in proportion to the pixels.

    Raises:
        ComparisonError: If a value is not possible.
    """

    iterations: int = option(
        5, "How often GrabCut is repeated.", least=1, group="From the map to the mask"
    )
    seed: int = 0
    longest: int = option(
        640, "Pixels of the longer side at which GrabCut works.", least=16,
        group="From the map to the mask",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.longest < 16 or not 0 <= self.seed < 2**31:
            raise ComparisonError(
                "Expected at least 1 iteration, a longest side of at least 16 and a seed from 0 to "
                f"{2**31 - 1}, got {self.iterations}, {self.longest} and {self.seed}."
            )

    def __call__(self, picture: Pixels, marks: Pixels) -> Mask:
        """The object in a picture.

        Where no pixel is marked as (probable) object the mask is empty, and where none is marked as
        (probable) background it is everything: there is nothing to tell apart. Sure marks hold in
        a reduced picture too, also where they are too small to be seen in it.

        Args:
            picture: RGB ``(H,W,3)``.
            marks: ``(H,W)`` of the four marks.

        Returns:
            ``(H,W)``.
        """
        small, own = self._reduced(picture, marks)
        inside = _inside(own)
        if inside.all() or not inside.any():
            whole = np.full(marks.shape, bool(inside.any()))
            return np.asarray((whole | (marks == OBJECT)) & (marks != BACKGROUND))
        with ThreadPoolExecutor(1, "simexplain-grabcut") as thread:
            cut = thread.submit(_cut, small, own, self.iterations, self.seed).result()
        if cut.shape == marks.shape:
            return cut
        height, width = marks.shape
        # Of a large picture in 8 bits, to spare 300 MB; they round the height of half an edge.
        grey = cut.astype(np.float32) if marks.size < LARGE else cut * np.uint8(255)
        half = grey.max() / 2
        mask: Mask = np.asarray(
            cv2.resize(grey, (width, height), interpolation=cv2.INTER_CUBIC) > half, dtype=bool
        )
        mask |= marks == OBJECT
        mask &= marks != BACKGROUND
        return mask

    def _reduced(self, picture: Pixels, marks: Pixels) -> tuple[Pixels, Pixels]:
        height, width = marks.shape
        share = self.longest / max(height, width)
        if share >= 1:
            return np.ascontiguousarray(picture), marks.copy()
        size = max(1, round(width * share)), max(1, round(height * share))
        small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        own = cv2.resize(marks, size, interpolation=cv2.INTER_NEAREST)
        return np.asarray(small, dtype=np.uint8), np.asarray(own, dtype=np.uint8)


def _cut(picture: Pixels, marks: Pixels, iterations: int, seed: int) -> Mask:
    cv2.setRNGSeed(seed)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    # Colours are compared by distance, for which the order of channels does not matter.
    cv2.grabCut(picture, marks, None, *models, iterations, cv2.GC_INIT_WITH_MASK)
    return _inside(marks)


def _inside(marks: Pixels) -> Mask:
    """Where marks are of an object, sure or not."""
    inside: Mask = np.asarray(marks == OBJECT) | (marks == PROBABLE_OBJECT)
    return inside


def framed(shape: tuple[int, int], box: tuple[int, int, int, int]) -> Pixels:
    """Marks ``(H,W)`` of a box: probable object inside, background outside."""
    left, top, right, bottom = box
    marks = np.full(shape, BACKGROUND, dtype=np.uint8)
    marks[top:bottom, left:right] = PROBABLE_OBJECT
    return marks


def nearly_all(shape: tuple[int, int], margin: float = 0.02) -> tuple[int, int, int, int]:
    """A box of nearly the whole picture: without this share, at least a pixel, at each side."""
    down, along = (min(max(1, math.ceil(margin * side)), (side - 1) // 2) for side in shape)
    return along, down, shape[1] - along, shape[0] - down


Heat = NDArray[np.float32]


_threshold = partial(
    option, MISSING, least=0, usual="the method's", group="From the map to the mask"
)


@dataclass(frozen=True)
@typed
class Cue:
    """Thresholds that turn a heatmap into marks, as shares of its maximum.

    Attributes:
        sure: From here on a pixel is object, whatever the cut finds.
        probable: From here on it is probably object.
        background: Below it is background, whatever the cut finds; between this and ``probable``
            it is probably background.

    Raises:
        ComparisonError: If they are not in that order.
    """

    sure: float = _threshold("Share of the map's maximum from which a pixel is object.")
    probable: float = _threshold("Share from which it is probably object.", most=1)
    background: float = _threshold("Share below which it is background.", most=1)

    def __post_init__(self) -> None:
        if not 0 <= self.background <= self.probable <= self.sure or self.probable == 0:
            raise ComparisonError(
                "Expected thresholds 0 <= background <= probable <= sure with probable above 0, "
                f"got {self.background:g}, {self.probable:g} and {self.sure:g}."
            )

    def marks(self, heat: Heat, seen: Mask | None = None) -> Pixels:
        """Marks ``(H,W)`` of a heatmap.

        A pixel without heat is never object. ``sure`` above 1 leaves the cut free everywhere.

        Args:
            heat: ``(H,W)`` in [0, 1].
            seen: ``(H,W)``, what the network saw; elsewhere a pixel is probably background.
        """
        marks = np.full(heat.shape, PROBABLE_BACKGROUND, dtype=np.uint8)
        marks[heat < self.background] = BACKGROUND
        marks[heat >= self.probable] = PROBABLE_OBJECT
        marks[heat >= self.sure] = OBJECT
        if seen is not None:
            marks[~seen] = PROBABLE_BACKGROUND
        return marks


CUES: dict[str, Cue] = {
    "focus": Cue(sure=0.6, probable=0.1, background=0.003),
    "sam": Cue(sure=0.95, probable=0.2, background=0.05),
}
"""Thresholds by method, settled in trials on categories that are in no table of the documentation;
other methods have those of ``sam``."""

SHAPES: dict[str, dict[str, float]] = {"focus": {"peak": 3.0, "detail": 0.0}}
"""Options of methods given by name that make better cues, where none are given: a smooth map."""


def default_cue(method: object) -> Cue:
    """The thresholds for a method, given by name or as an object."""
    name = "focus" if isinstance(method, Focus) else method if isinstance(method, str) else ""
    return CUES.get(name, CUES["sam"])


@dataclass(frozen=True)
class Refined:
    """A mask and the marks given to the cut.

    Attributes:
        mask: ``(H,W)``.
        marks: ``(H,W)`` of GrabCut's marks; None where nothing was cut.
        note: What to know about it, or nothing.
    """

    mask: Mask
    marks: Pixels | None = None
    note: str = ""


Refinement = Callable[[Pixels, Heat, Mask, Cue, GrabCut], Refined]
"""``(picture, heat, seen, cue, cut) -> Refined``; the heat is not empty."""


def cued(picture: Pixels, heat: Heat, seen: Mask, cue: Cue, cut: GrabCut) -> Refined:
    """GrabCut from the marks of the heatmap, as in section 4.3 of the paper."""
    marks = cue.marks(heat, seen)
    if _inside(marks).all():
        note = "The map is hot everywhere, so that no pixel is background: the mask is everything."
        return Refined(np.ones_like(seen), marks, note)
    mask = cut(picture, marks)
    note = "The cut left nothing of the object; a lower sure threshold would keep some of it."
    return Refined(mask, marks, "" if mask.any() else note)


def thresholded(picture: Pixels, heat: Heat, seen: Mask, cue: Cue, cut: GrabCut) -> Refined:
    """The pixels from the probable threshold on; the picture's colours play no part."""
    return Refined(heat >= cue.probable)


def otsu(picture: Pixels, heat: Heat, seen: Mask, cue: Cue, cut: GrabCut) -> Refined:
    """Otsu's threshold of the heat that the network saw: two classes that differ the most."""
    levels = np.round(heat * 255).clip(0, 255).astype(np.uint8)
    split, _ = cv2.threshold(levels[seen][None], 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return Refined(np.asarray((levels > split) & seen))


def boxed(picture: Pixels, heat: Heat, seen: Mask, cue: Cue, cut: GrabCut) -> Refined:
    """GrabCut from the box around the pixels above Otsu's threshold, as of a drawn rectangle."""
    inside = otsu(picture, heat, seen, cue, cut).mask
    if not inside.any():
        inside = heat >= heat.max()
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    box = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    marks = framed((heat.shape[0], heat.shape[1]), box)
    return Refined(cut(picture, marks), marks)


def uncued(picture: Pixels, heat: Heat, seen: Mask, cue: Cue, cut: GrabCut) -> Refined:
    """GrabCut from a rectangle around nearly the whole picture: the map plays no part."""
    shape = heat.shape[0], heat.shape[1]
    marks = framed(shape, nearly_all(shape))
    return Refined(cut(picture, marks), marks)


REFINEMENTS: dict[str, Refinement] = {
    "grabcut": cued,
    "threshold": thresholded,
    "otsu": otsu,
    "box": boxed,
    "whole": uncued,
}
"""Ways from a heatmap to a mask: the paper's, and simpler ones to compare it with."""


def refine(
    picture: Pixels,
    heat: Heat,
    cue: Cue,
    *,
    by: str = "grabcut",
    seen: Mask | None = None,
    cut: GrabCut | None = None,
) -> Refined:
    """A mask from a heatmap.

    Args:
        picture: RGB ``(H,W,3)``.
        heat: ``(H,W)`` in [0, 1]; an empty map gives an empty mask, with a note.
        cue: The thresholds.
        by: A name in :data:`REFINEMENTS`.
        seen: ``(H,W)``, what the network saw; None for everything.
        cut: How GrabCut runs.

    Raises:
        ComparisonError: If the name is unknown or shapes do not fit.
    """
    if by not in REFINEMENTS:
        raise ComparisonError(f"Expected refine to be one of {', '.join(REFINEMENTS)}, got '{by}'.")
    if picture.ndim != 3 or picture.dtype != np.uint8 or heat.shape != picture.shape[:2]:
        raise ComparisonError(
            f"Expected a picture (H,W,3) of 8 bits and a heatmap of its size, got {picture.shape} "
            f"of {picture.dtype} and {heat.shape}."
        )
    view = np.ones(heat.shape, dtype=bool) if seen is None else seen
    if by != "whole" and not (heat > 0).any():
        note = "The attention map of the test image is empty, and so is the mask."
        return Refined(np.zeros(heat.shape, dtype=bool), note=note)
    return REFINEMENTS[by](picture, heat, view, cue, cut or GrabCut())
