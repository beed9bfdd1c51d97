"""Places of a tensor's numbers as a grid of cells over the image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simexplain.places.spans import Array, Pair, Place, Span

_FAR_OFF = 0.55
"""A padded convolution of stride 2 puts its cells half a cell off the middle of their pixels."""

_RIM = 0.1
"""The share of a cell from which on pixels that no cell sees are left without heat."""

_EVEN = 0.3
"""How many steps a cell of a grid may lie off evenly spaced ones, as where poolings are uneven."""

_DIGITS = 3
"""Decimals of a pixel to which places of one row or column agree."""

_SAME = 1e-6
"""How much steps from cell to cell may differ by rounding alone."""

_MOST_SCALES = 8
"""In how many sizes of patches a sequence is looked through."""

_LETTERS = {1: "L", 2: "HW", 3: "DHW"}


@dataclass(frozen=True)
class Line:
    """Cells along one side of the image, in pixels.

    Attributes:
        first: The middle of the first.
        step: From one to the next; what it sees, where there is one alone.
        cells: How many there are.
        low: Where the pixels begin that any of them sees.
        high: Where they end.
        width: How many pixels a cell sees at the most.
        padded: Whether the first looks beyond an edge that was padded.
    """

    first: float
    step: float
    cells: int
    low: float
    high: float
    width: float
    padded: bool

    def ends(self, side: int, *, stretched: bool = True) -> Pair:
        """Where the cells begin and end, as shares of a side of so many pixels.

        Padding makes cells of what lies beyond an edge, so it is usual to stretch padded maps over
        the image, unless they would come to lie far from where they look, or over pixels that none
        sees. Where cells share no pixel, only a move is usual.
        """
        rim = max(self.low, side - self.high)
        if self.cells == 1:
            start, end = self.low, self.high
            off, stretched = rim, stretched and self.padded
        else:
            start = self.first - self.step / 2
            end = start + self.cells * self.step
            half = side / self.cells / 2
            off = max(abs(start + self.step / 2 - half), abs(end - self.step / 2 - side + half))
            moved = abs(end - start - side) < 1e-6 * side
            shared = self.width > self.step * (1 + 1e-6) and rim <= _RIM * self.step
            stretched = stretched and self.padded and (moved or shared)
        if off <= (_FAR_OFF * self.step if stretched else 1e-6 * side):
            return 0.0, 1.0
        return round(start / side, 4), round(end / side, 4)


@dataclass(frozen=True)
class Cells:
    """A tensor that is a map over the image.

    Attributes:
        kind: A letter for each axis: ``N`` images, ``C`` channels, others positions.
        grid: Rows and columns ``(h,w)``.
        count: Positions in all.
        tokens: The number of each cell's position, row by row; empty where they are all in order.
        rows: Where the rows lie.
        columns: Likewise.
        sure: As of the :class:`~simexplain.places.spans.Place`.
    """

    kind: str
    grid: tuple[int, int]
    count: int
    tokens: tuple[int, ...]
    rows: Line
    columns: Line
    sure: bool

    def region(
        self, size: tuple[int, int], *, stretched: bool = True
    ) -> tuple[float, float, float, float]:
        """Top, left, bottom and right of the cells as shares of an image ``(H,W)``.

        Args:
            size: That of the image.
            stretched: Draw padded maps all over the image, as is usual; see :meth:`Line.ends`.
        """
        top, bottom = self.rows.ends(size[0], stretched=stretched)
        left, right = self.columns.ends(size[1], stretched=stretched)
        return top, left, bottom, right


def cells_of(position: Place, images: int) -> Cells | None:
    """The grid that the numbers of a tensor make; None where they make none.

    Args:
        position: Where they lie.
        images: How many images the tensor was computed from.
    """
    kind = _kind(position, images)
    if kind is None:
        return None
    sides = [side for side, letter in zip(position.shape, kind, strict=True) if letter not in "NC"]
    count = int(np.prod(sides))
    if straight := _straight(position):
        lines = [_line(span, cells) for span, cells in zip(position.both, straight, strict=True)]
        return Cells(kind, straight, count, (), lines[0], lines[1], position.sure)
    rows, columns = (_flat(span, kind, sides) for span in position.both)
    known = np.flatnonzero(~np.isnan(rows.centre) & ~np.isnan(columns.centre))
    best: tuple[NDArray[np.int64], tuple[int, int]] | None = None
    sequence = len(sides) == 1
    for some in _alternatives(known, rows, columns, several=sequence):
        laid = _gridded(some, rows, columns, twice=sequence)
        if laid is not None and (best is None or len(laid[0]) > len(best[0])):
            best = laid
    if best is None:
        return None
    tokens, grid = best
    ordered = len(tokens) == count and bool((tokens == np.arange(count)).all())
    kept = (span.each(lambda array: array[tokens]) for span in (rows, columns))
    lines = [_line(span, cells) for span, cells in zip(kept, grid, strict=True)]
    listed = () if ordered else tuple(int(token) for token in tokens)
    return Cells(kind, grid, count, listed, lines[0], lines[1], position.sure)


def _straight(position: Place) -> tuple[int, int] | None:
    """The grid of a map whose rows and columns are axes of their own, one after the other."""
    sides, axes = [], []
    for span in position.both:
        marks = span.centre.ravel()
        steps = np.diff(marks)
        if len(marks) < 2 or max(span.centre.shape) < len(marks) or np.isnan(marks).any():
            return None
        if steps.min() <= 0 or steps.max() - steps.min() > _SAME * steps.max():
            return None
        sides.append(len(marks))
        axes.append(int(np.argmax(span.centre.shape)))
    return (sides[0], sides[1]) if axes[0] < axes[1] else None


def _kind(position: Place, images: int) -> str | None:
    """What each axis is; None where images or channels have no axis of their own."""
    axes = len(position.shape)
    if axes not in (3, 4, 5):
        return None
    still = [axis for axis in range(axes) if not position.varies(axis)]
    batch = next((axis for axis in still if position.shape[axis] == images), None)
    rest = [axis for axis in still if axis != batch]
    wide = [axis for axis in rest if position.shape[axis] > 1]
    if batch is None or len(wide) > 1 or not rest:
        return None
    channels = wide[0] if wide else rest[0]
    positions = iter(_LETTERS[axes - 2])
    named = {batch: "N", channels: "C"}
    return "".join(named.get(axis) or next(positions) for axis in range(axes))


def _flat(span: Span, kind: str, sides: list[int]) -> Span:
    """A span with one number for every position."""
    away = tuple(axis for axis, letter in enumerate(kind) if letter in "NC")

    def flattened(array: Array) -> Array:
        return np.broadcast_to(array.squeeze(away), sides).ravel()

    return span.each(flattened)


def _alternatives(
    known: NDArray[np.int64], rows: Span, columns: Span, *, several: bool
) -> Iterator[NDArray[np.int64]]:
    """All positions, and those alone that see as much: of two scales in one sequence the finer."""
    if len(known) < 2:
        return
    yield known
    with np.errstate(invalid="ignore"):
        fields = (rows.high - rows.low)[known] * (columns.high - columns.low)[known]
    sizes, which = np.unique(np.round(fields, _DIGITS), return_inverse=True)
    for number in range(len(sizes)) if several and 1 < len(sizes) <= _MOST_SCALES else ():
        yield known[which == number]


def _gridded(
    some: NDArray[np.int64], rows: Span, columns: Span, *, twice: bool
) -> tuple[NDArray[np.int64], tuple[int, int]] | None:
    """Positions in the order of a grid that they fill.

    Args:
        some: Which there are.
        rows: Where all of them lie.
        columns: Likewise.
        twice: Whether the first of several in one place will do, as where a sequence has them all
            again for a mirror image.
    """
    marks, numbers = [], []
    for span in (rows, columns):
        mark, number = np.unique(np.round(span.centre[some], _DIGITS), return_inverse=True)
        even = np.linspace(mark[0], mark[-1], len(mark))
        if len(mark) > 1 and np.abs(mark - even).max() > _EVEN * (even[1] - even[0]):
            return None
        marks.append(len(mark))
        numbers.append(number)
    cells, first = np.unique(numbers[0] * marks[1] + numbers[1], return_index=True)
    if len(cells) < 2 or len(cells) != marks[0] * marks[1]:
        return None
    if len(cells) < len(some) and not twice:
        return None
    return some[first], (marks[0], marks[1])


def _line(span: Span, cells: int) -> Line:
    width = float(np.max(span.high - span.low, initial=0.0, where=np.isfinite(span.high)))
    first, last = float(span.centre.min()), float(span.centre.max())
    step = (last - first) / (cells - 1) if cells > 1 else width
    return Line(
        first, step, cells, float(span.low.min()), float(span.high.max()), width, span.padded
    )
