"""Numbers as plain text, for terminals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from simexplain.metrics.intervals import Interval

SIGNED = ("gain", "agreement", "spearman", "cosine")
"""Numbers that can fall on both sides of zero in ordinary use, written with their sign."""


def number(value: float, name: str = "") -> str:
    """Three decimals, with a sign where the metric may have either; a dash for NaN."""
    if math.isnan(value):
        return "-"
    return f"{value:+.3f}" if name in SIGNED else f"{value:.3f}"


def ranged(interval: Interval, name: str = "") -> str:
    """A mean with the ends of its interval, where there is one; marked if of few values."""
    text = number(interval.mean, name)
    if math.isnan(interval.low):
        return text
    ends = f"{number(interval.low, name)}, {number(interval.high, name)}"
    return f"{text} {'?' if interval.few else ''}[{ends}]"


def cost(seconds: float) -> str:
    """Seconds with about three digits."""
    return (
        f"{seconds:.{0 if seconds >= 100 else 1 if seconds >= 10 else 2 if seconds >= 1 else 3}f}"
    )


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table: the first column to the left, numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
