"""Where every number of a tensor lies in the image it was computed from, as local operations go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Shape = tuple[int, ...]
Pair = tuple[float, float]

_MOST = 1 << 21
"""Numbers in an array of places; where an operation would need more, the place is given up."""

_SAME = 1e-4
"""Pixels by which two places differ through rounding alone."""

_MOST_WAYS = 16
"""How many maps that are joined as channels are compared with each other."""


@dataclass(frozen=True, eq=False)
class Span:
    """Where the numbers of a tensor lie along one side of the image, in pixels.

    Each array has as many axes as the tensor; those along which nothing changes have length 1.

    Attributes:
        centre: The middle of what a number sees; NaN for one without a place.
        low: Where begins what it sees; infinite where it sees nothing.
        high: Where that ends; minus infinity where it sees nothing.
        padded: Whether the first looks beyond an edge that was padded.
    """

    centre: Array
    low: Array
    high: Array
    padded: bool = False

    def each(self, change: Callable[[Array], Array]) -> Span:
        """The same after a change that only moves numbers around."""
        return Span(change(self.centre), change(self.low), change(self.high), self.padded)

    def windowed(self, axis: int, middle: Array, taps: NDArray[np.int64]) -> Span:
        """What windows along an axis see.

        Args:
            axis: Its number.
            middle: Where the middle of each window lies ``(m,)``, counted in numbers.
            taps: Which numbers each window takes ``(m,k)``; those beyond the ends are padding.
        """
        size = self.centre.shape[axis]
        if size == 1:
            return self
        valid = (taps >= 0) & (taps < size)
        lower = np.clip(np.floor(middle), 0, size - 2).astype(np.int64)
        share = _along(middle - lower, axis, self.centre.ndim)
        first, second = self.centre.take(lower, axis), self.centre.take(lower + 1, axis)
        with np.errstate(invalid="ignore"):
            mixed = first * (1 - share) + second * share
        centre = np.where(share == 0, first, np.where(share == 1, second, mixed))
        return Span(
            centre,
            _gathered(self.low, axis, taps, valid, np.inf).min(axis=axis + 1),
            _gathered(self.high, axis, taps, valid, -np.inf).max(axis=axis + 1),
            self.padded or bool(taps.min() < 0),
        )

    def reduced(self, axes: Sequence[int]) -> Span:
        """One number of many along some axes, which get length 1."""
        axes = tuple(axis for axis in axes if self.centre.shape[axis] > 1)
        if not axes:
            return self
        known = ~np.isnan(self.centre)
        count = known.sum(axis=axes, keepdims=True)
        total = np.where(known, self.centre, 0).sum(axis=axes, keepdims=True)
        centre = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        low = self.low.min(axis=axes, keepdims=True)
        return Span(centre, low, self.high.max(axis=axes, keepdims=True), self.padded)

    @property
    def varied(self) -> bool:
        """Whether it separates places at all."""
        return self.centre.size > 1


def _along(values: Array, axis: int, axes: int) -> Array:
    return values.reshape([-1 if number == axis else 1 for number in range(axes)])


def _gathered(
    values: Array, axis: int, taps: NDArray[np.int64], valid: NDArray[np.bool_], fill: float
) -> Array:
    """Numbers of windows, with an axis for those of one window after the one of windows."""
    size = values.shape[axis]
    if size == 1:
        taps = np.zeros_like(taps)
    taken = values.take(np.clip(taps, 0, size - 1), axis)
    shape = [1] * taken.ndim
    shape[axis : axis + 2] = taps.shape
    result: Array = np.where(valid.reshape(shape), taken, fill)
    return result


@dataclass(frozen=True, eq=False)
class Place:
    """Where the numbers of a tensor lie in the image.

    Attributes:
        shape: Of the tensor.
        rows: Along the height.
        columns: Along the width.
        sure: Whether no other image can have its numbers elsewhere, as where a network computes an
            order from the image, or attention, which may look anywhere, makes the numbers.
    """

    shape: Shape
    rows: Span
    columns: Span
    sure: bool = True

    @staticmethod
    def of_image(shape: Shape) -> Place:
        """That of an image ``(B,C,H,W)`` itself."""
        spans = []
        for axis in (2, 3):
            edges = _along(np.arange(shape[axis], dtype=np.float64), axis, 4)
            spans.append(Span(edges + 0.5, edges, edges + 1))
        return Place(shape, spans[0], spans[1])

    @property
    def both(self) -> tuple[Span, Span]:
        """Along the height and along the width."""
        return self.rows, self.columns

    def spans(self, change: Callable[[Span], Span], shape: Sequence[int]) -> Place:
        """The same with both spans changed."""
        return replace(
            self, shape=tuple(shape), rows=change(self.rows), columns=change(self.columns)
        )

    def each(self, change: Callable[[Array], Array], shape: Sequence[int]) -> Place:
        """The same after a change that only moves numbers around."""
        return self.spans(lambda span: span.each(change), shape)

    def windowed(
        self, axis: int, middle: Array, taps: NDArray[np.int64], count: int | None = None
    ) -> Place:
        """What windows along an axis see; see :meth:`Span.windowed`."""
        shape = [*self.shape]
        shape[axis] = len(middle) if count is None else count
        return self.spans(lambda span: span.windowed(axis, middle, taps), shape)

    def reduced(self, axes: Sequence[int], shape: Sequence[int]) -> Place | None:
        """What one number of many along some axes sees; None where no place is left of it.

        Args:
            axes: Which get length 1.
            shape: Of the result, with the same number of axes.
        """
        result = self.spans(lambda span: span.reduced(axes), shape)
        for before, after in ((self.rows, result.rows), (self.columns, result.columns)):
            if before.varied and not after.varied:
                return None
        for axis in axes:
            # As where channels hold an image and its mirror image.
            ways = [replace(way, shape=tuple(shape)) for way in self._ways(axis)]
            if len(ways) > 1 and combined(ways, shape, steps=1.0).is_torn:
                return self.torn(shape)
        return result

    def _ways(self, axis: int) -> list[Place]:
        """Of numbers along an axis one for each way of lying, a move of all of them left out.

        Channels may hold the pixels of a patch, whose middle is the place of all, or maps that
        have nothing to do with each other.
        """
        tables = []
        for span in self.both:
            table = np.moveaxis(span.centre, axis, 0).reshape(span.centre.shape[axis], -1)
            tables.append(table - table[:, :1])
        count = max(len(table) for table in tables)
        wide = [np.broadcast_to(table, (count, table.shape[1])) for table in tables]
        both = np.nan_to_num(np.round(np.concatenate(wide, axis=1), 1), nan=np.inf)
        first = np.unique(both, axis=0, return_index=True)[1][:_MOST_WAYS]
        ways: list[Place] = []
        for number in first:
            which = np.array([number])

            def only(array: Array, which: NDArray[np.int64] = which) -> Array:
                return array if array.shape[axis] == 1 else array.take(which, axis)

            way = self.each(only, self.shape)
            ways.append(way if not ways else way.moved_onto(ways[0]))
        return ways

    def moved_onto(self, other: Place) -> Place:
        """The same moved by what most of its numbers are off those of another place."""
        spans = []
        for own, its in zip(self.both, other.both, strict=True):
            apart = own.centre - its.centre
            known = apart[~np.isnan(apart)]
            move = float(np.median(known)) if known.size else 0.0
            spans.append(
                replace(own, centre=own.centre - move, low=own.low - move, high=own.high - move)
            )
        return replace(self, rows=spans[0], columns=spans[1])

    def torn(self, shape: Sequence[int]) -> Place:
        """That of numbers each of which lies in several places, as in a sum with a mirror image."""
        centre, low, high = (np.full((1,) * len(shape), empty) for empty in _EMPTY.values())
        nowhere = Span(centre, low, high)
        return Place(tuple(shape), nowhere, nowhere)

    @property
    def is_torn(self) -> bool:
        """Whether its numbers lie in several places, and so in none."""
        return self.rows.centre.size == 1 and bool(np.isnan(self.rows.centre).all())

    def viewed(self, shape: Sequence[int]) -> Place | None:
        """The same numbers under another shape."""
        groups = list(_groups(self.shape, shape))
        for span in self.both:
            if _viewed_size(span.centre.shape, self.shape, groups) > _MOST:
                return None
        own, new = self.shape, tuple(shape)
        return self.each(lambda array: _viewed(array, own, new, groups), new)

    def dense(self, axes: Sequence[int]) -> Place | None:
        """The same with arrays as long as the tensor along some axes; None where they are large."""
        span = self.rows if self.rows.centre.size > self.columns.centre.size else self.columns
        sizes = [*span.centre.shape]
        for axis in axes:
            sizes[axis] = self.shape[axis]
        if np.prod(sizes) > _MOST:
            return None

        def grown(array: Array) -> Array:
            shape = [*array.shape]
            for axis in axes:
                shape[axis] = self.shape[axis]
            return np.broadcast_to(array, shape)

        return self.each(grown, self.shape)

    def varies(self, axis: int) -> bool:
        """Whether numbers along an axis lie in different places."""
        sides: list[int] = [span.centre.shape[axis] for span in self.both]
        return max(sides) > 1

    @cached_property
    def cells(self) -> int:
        """How many numbers have places of their own; 0 where two have the same."""
        rows, columns = (span.centre for span in self.both)
        if all(1 in pair for pair in zip(rows.shape, columns.shape, strict=True)):
            known = [array[~np.isnan(array)] for array in (rows, columns)]
            apart = all(len(np.unique(_rounded(each))) == len(each) for each in known)
            return len(known[0]) * len(known[1]) if apart else 0
        both = (_rounded(rows) + 1j * _rounded(columns)).ravel()
        both = both[~np.isnan(both)]
        apart = bool(len(np.unique(both)) == len(both))
        return len(both) if apart else 0

    @cached_property
    def field(self) -> float:
        """How many pixels a number sees."""
        sides = [span.high - span.low for span in self.both]
        finite = [side[np.isfinite(side)] for side in sides]
        return float(np.prod([side.mean() if side.size else 0.0 for side in finite]))

    def contradicts(self, other: Place, steps: float = 1.5) -> bool:
        """Whether many numbers lie elsewhere than those of a place of as many cells.

        A small move of all numbers alike does not count, as between two ways that pad differently.

        Args:
            other: That place.
            steps: From how many cells off a number lies elsewhere.
        """
        off = np.zeros(1, dtype=bool)
        for own, its in zip(self.both, other.both, strict=True):
            marks = np.unique(_rounded(own.centre[~np.isnan(own.centre)]))
            step = float(np.median(np.diff(marks))) if len(marks) > 1 else 0.0
            width = float(np.mean(its.high - its.low, where=np.isfinite(its.high)))
            apart = own.centre - its.centre
            known = apart[~np.isnan(apart)]
            common = float(np.median(known)) if known.size else 0.0
            if abs(common) > max(steps * step, width / 2):
                return True
            off = off | (np.abs(apart - common) > max(steps * step, width / 4))
        return bool(off.mean() > 0.25)


def _rounded(array: Array) -> Array:
    result: Array = np.round(array / _SAME) * _SAME
    return result


def combined(places: Sequence[Place], shape: Sequence[int], steps: float = 1.5) -> Place:
    """The place of what is computed number by number from several, the finest of which counts.

    It is torn where they contradict each other, as an image and its mirror image do; ``steps`` as
    for :meth:`Place.contradicts`.
    """
    shape = tuple(shape)
    wide = [_broadcast(position, shape) for position in places]
    first = next((position for position in wide if position.is_torn), wide[0])
    if len(wide) == 1 or first.is_torn:
        return first
    sure = [position for position in wide if position.sure]
    base = (sure or wide)[0]
    if not _alike(wide):
        most = max(position.cells for position in wide)
        grids = [position for position in wide if position.cells == most] if most > 1 else wide
        sure = [position for position in grids if position.sure]
        base = min(sure or grids, key=lambda position: position.field)
        against = [each for each in grids if most > 1 and base.contradicts(each, steps)]
        if base.sure and any(each.sure for each in against):
            return base.torn(shape)
        base = replace(base, sure=base.sure and not against)
    spans = []
    for name in ("rows", "columns"):
        own, others = getattr(base, name), [getattr(position, name) for position in sure]
        low = _joined(np.minimum, own.low, [each.low for each in others])
        high = _joined(np.maximum, own.high, [each.high for each in others])
        spans.append(Span(own.centre, low, high, any(each.padded for each in [own, *others])))
    return Place(shape, spans[0], spans[1], base.sure)


def _joined(how: np.ufunc, own: Array, others: Sequence[Array]) -> Array:
    """The outermost of several, of those that have the axes of ours."""
    for other in others:
        if other is not own and other.shape == own.shape:
            own = how(own, other)
    return own


def _broadcast(position: Place, shape: Shape) -> Place:
    missing = len(shape) - len(position.shape)
    if not missing:
        return position if position.shape == shape else replace(position, shape=shape)
    return position.each(lambda array: array.reshape((1,) * missing + array.shape), shape)


def joined_along(
    axis: int, parts: Sequence[tuple[int, Place | None]], shape: Sequence[int]
) -> Place | None:
    """Tensors one after the other along an axis; those without a place leave a gap.

    Args:
        axis: Its number.
        parts: Of each tensor how long it is there, and its place.
        shape: Of the result.
    """
    shape = tuple(shape)
    known = [part for _, part in parts if part is not None]
    if not any(part.varies(axis) for part in known) and _alike(known):
        return combined([replace(part, shape=shape) for part in known], shape)
    spans = []
    for name in ("rows", "columns"):
        own = [(size, None if part is None else getattr(part, name)) for size, part in parts]
        union = np.max([span.centre.shape for _, span in own if span is not None], axis=0)
        union[axis] = shape[axis]
        if np.prod(union) > _MOST:
            return None
        padded = any(span.padded for _, span in own if span is not None)
        centre, low, high = (_chained(own, axis, union, each) for each in _EMPTY)
        spans.append(Span(centre, low, high, padded))
    return Place(shape, spans[0], spans[1], all(part.sure for part in known))


_EMPTY = {"centre": np.nan, "low": np.inf, "high": -np.inf}
"""What stands for a number without a place."""


def _chained(parts: Sequence[tuple[int, Span | None]], axis: int, union: Array, name: str) -> Array:
    chain = []
    for size, span in parts:
        shape = [size if number == axis else int(side) for number, side in enumerate(union)]
        array = np.full(1, _EMPTY[name]) if span is None else getattr(span, name)
        chain.append(np.broadcast_to(array, shape))
    return np.concatenate(chain, axis)


def _alike(places: Sequence[Place]) -> bool:
    first = places[0]
    return all(
        own.centre is its.centre
        or (
            own.centre.shape == its.centre.shape
            and np.allclose(own.centre, its.centre, atol=_SAME, equal_nan=True)
        )
        for position in places[1:]
        for own, its in ((first.rows, position.rows), (first.columns, position.columns))
    )


Group = tuple[slice, slice]


def _groups(before: Sequence[int], after: Sequence[int]) -> Iterator[Group]:
    """Which axes of a shape become which ones of another, in groups of equal product."""
    start = end = 0
    while start < len(before) or end < len(after):
        first, last = start, end
        own, new = 1, 1
        while True:
            if own < new or (own == new and start == first and start < len(before)):
                own *= before[start]
                start += 1
            elif new < own or (end == last and end < len(after)):
                new *= after[end]
                end += 1
            else:
                break
        yield slice(first, start), slice(last, end)


def _viewed_size(array: Shape, before: Shape, groups: Sequence[Group]) -> int:
    sides = [np.prod(before[own]) for own, _ in groups if any(side > 1 for side in array[own])]
    return int(np.prod(sides)) if sides else 1


def _viewed(array: Array, before: Shape, after: Shape, groups: Sequence[Group]) -> Array:
    grown: list[int] = []
    made: list[int] = []
    for own, new in groups:
        varied = any(side > 1 for side in array.shape[own])
        grown += before[own] if varied else array.shape[own]
        made += after[new] if varied else [1] * len(after[new])
    result = np.broadcast_to(array, grown).reshape(made)
    for axis in range(result.ndim):
        first = result.take([0], axis)
        if result.shape[axis] > 1 and bool(
            ((result == first) | (np.isnan(result) & np.isnan(first))).all()
        ):
            result = first
    return result
