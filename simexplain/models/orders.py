"""Orders in which networks put the cells of a grid into a sequence, other than row by row."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

Order = tuple[tuple[int, int, int, int], ...]
"""A sequence as an array of blocks: each has so many rows and columns, which lie so many rows and
columns of the grid apart. Empty for row by row."""

_WINDOWS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)
_MOST_UNROLLINGS = 4


@lru_cache(maxsize=256)
def tokens_of(count: int, prefix: int = 0, split: int = 0, order: Order = ()) -> tuple[int, ...]:
    """The number in a sequence of each of its cells, row by row ``(h*w)``.

    Args:
        count: Cells.
        prefix: Other tokens before the first cell, or after some cells.
        split: How many cells those are.
        order: In which order the sequence has the cells.
    """
    tokens = torch.arange(count)
    tokens[split:] += prefix
    return tuple((tokens[_ordered(order)] if order else tokens).tolist())


def _ordered(order: Order) -> Tensor:
    rows, columns = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    for count, across, down, right in order:
        rows = (rows[:, None] + down * torch.arange(count).repeat_interleave(across)).flatten()
        columns = (columns[:, None] + right * torch.arange(across).repeat(count)).flatten()
    return torch.argsort(rows * (int(columns.max()) + 1) + columns)


def orders_of(grid: tuple[int, int]) -> Iterator[Order]:
    """Orders of a grid ``(h,w)`` that networks use.

    Column by column; window by window, as in networks with window attention; and unrolled, as in
    Hiera (arXiv 2306.00989, section 4), where each halving to come is an axis of its own.
    """
    height, width = grid
    if min(grid) > 1:
        yield (1, width, 1, 1), (height, 1, 1, 1)
    for down in _sides(height):
        for right in _sides(width):
            if down == right or (2 * down, 2 * right) == grid:
                yield (height // down, width // right, down, right), (down, right, 1, 1)
    unrolled: Order = ()
    for number in range(_MOST_UNROLLINGS):
        step = 1 << number
        if height % (2 * step) or width % (2 * step) or max(grid) == 2 * step:
            return
        unrolled += ((2, 2, step, step),)
        yield (*unrolled, (height // step // 2, width // step // 2, 2 * step, 2 * step))


def _sides(length: int) -> list[int]:
    """Sides of windows, of which several make up a length."""
    return [side for side in {*_WINDOWS, length // 2} if 1 < side < length and length % side == 0]
