"""A cache of pictures between rows, within a bound of memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Generic, TypeVar

Value = TypeVar("Value")
NEVER = float("inf")


class LookaheadCache(Generic[Value]):
    """Keeps values until their last use; where memory is short, those that are needed soonest.

    All uses are known beforehand, so the value needed last is evicted, which is optimal (Belady
    1966). What the current row needs is never evicted.

    Attributes:
        limit: Bytes to keep at most, beside those of the current row.
        bytes: Bytes kept now.
        now: The position of the current row in the schedule.
    """

    def __init__(self, limit: int, uses: Callable[[Hashable], Sequence[int]]) -> None:
        """An empty store.

        Args:
            limit: Bytes to keep at most.
            uses: The positions in the schedule at which a key is needed, ascending.
        """
        self.limit = limit
        self.bytes = 0
        self.now = 0
        self._uses = uses
        self._kept: dict[Hashable, tuple[Value, int]] = {}
        self._held: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, key: Hashable, make: Callable[[], tuple[Value, int]]) -> Value:
        """The value of a key, made with its size in bytes where it is not there."""
        if key not in self._kept:
            self._kept[key] = made = make()
            self.bytes += made[1]
            self._held.add(key)
            self._shrink()
        self._held.add(key)
        return self._kept[key][0]

    def release(self) -> None:
        """Ends the current row."""
        for key in self._held:
            if self._next(key) == NEVER:
                self._drop(key)
        self._held.clear()
        self._shrink()

    def _shrink(self) -> None:
        if self.bytes <= self.limit:
            return
        for key in sorted(self._kept.keys() - self._held, key=self._next, reverse=True):
            self._drop(key)
            if self.bytes <= self.limit:
                return

    def _drop(self, key: Hashable) -> None:
        self.bytes -= self._kept.pop(key)[1]

    def _next(self, key: Hashable) -> float:
        uses = self._uses(key)
        index = bisect_right(uses, self.now)
        return uses[index] if index < len(uses) else NEVER


def use_schedule(rows: Sequence[Sequence[int]], batch_size: int) -> Mapping[int, list[int]]:
    """For each group of ``batch_size`` pictures the positions of the rows that need one of it.

    Args:
        rows: The pictures of each row in the order of the schedule.
        batch_size: Pictures in a group.
    """
    schedule: dict[int, list[int]] = {}
    for index, images in enumerate(rows):
        for group in {image // batch_size for image in images}:
            schedule.setdefault(group, []).append(index)
    return schedule
