"""GrabCut on a picture, with a result that depends on nothing but what it is given."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from simexplain.arguments import typed
from simexplain.errors import ComparisonError

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Result = TypeVar("Result")

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

    iterations: int = 5
    seed: int = 0
    longest: int = 640

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
        inside = np.isin(own, (OBJECT, PROBABLE_OBJECT))
        if inside.all() or not inside.any():
            whole = np.full(marks.shape, bool(inside.any()))
            return np.asarray((whole | (marks == OBJECT)) & (marks != BACKGROUND))
        cut = _alone(lambda: _cut(small, own, self.iterations, self.seed))
        if cut.shape == marks.shape:
            return cut
        height, width = marks.shape
        grown = cv2.resize(cut.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
        return np.asarray(((grown > 0.5) | (marks == OBJECT)) & (marks != BACKGROUND))

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
    return np.isin(marks, (OBJECT, PROBABLE_OBJECT))


def _alone(work: Callable[[], Result]) -> Result:
    """The work in a thread of its own, with whatever it raises."""
    results: list[Result] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="simexplain-grabcut")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return results[0]


def framed(shape: tuple[int, int], box: tuple[int, int, int, int]) -> Pixels:
    """Marks of a box, as a user would draw it: probable object inside, background outside.

    Args:
        shape: ``(H,W)``.
        box: Left, top, right, bottom in pixels; the last two are outside.
    """
    left, top, right, bottom = box
    marks = np.full(shape, BACKGROUND, dtype=np.uint8)
    marks[top:bottom, left:right] = PROBABLE_OBJECT
    return marks


def nearly_all(shape: tuple[int, int], margin: float = 0.02) -> tuple[int, int, int, int]:
    """A box of nearly the whole picture: without this share of it, at least a pixel, at each side.

    Args:
        shape: ``(H,W)``.
        margin: The share.
    """
    down, along = (min(max(1, math.ceil(margin * side)), (side - 1) // 2) for side in shape)
    return along, down, shape[1] - along, shape[0] - down
