"""How sure a mean is: bootstrap confidence intervals (Efron 1979)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simexplain.errors import ComparisonError

FEW = 10
"""Values from which on an interval is meaningful."""

_AT_ONCE = 2**22


_MOST_SAMPLES = 1_000_000


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval.

    Attributes:
        mean: Of the valid values; NaN without any.
        low: Lower end; NaN with fewer than two values, which say nothing about their spread.
        high: Upper end; likewise.
        count: How many values were valid.
        level: The confidence level.
        few: Whether it is of fewer than ``FEW`` values, too few for the interval to mean much.
    """

    mean: float
    low: float
    high: float
    count: int
    level: float
    few: bool = False


def bootstrap_mean(
    values: Tensor | Sequence[float], *, level: float = 0.95, samples: int = 2000, seed: int = 0
) -> Interval:
    """The mean of independent values with its percentile bootstrap interval.

    Values are drawn again with replacement ``samples`` times; the interval holds the middle
    ``level`` of the means. Of few values (below some twenty) it is a little too narrow.

    Args:
        values: ``(n,)``; NaN marks those that are not valid, which are left out.
        level: Between 0 and 1.
        samples: How often to draw.
        seed: Of a generator of its own: the same values and seed give the same interval.

    Raises:
        ComparisonError: If an option does not fit.
    """
    if not 0 < level < 1 or samples < 1:
        raise ComparisonError(
            f"Expected a level between 0 and 1 and at least one sample, got {level} and {samples}."
        )
    if samples > _MOST_SAMPLES:
        raise ComparisonError(f"Expected at most {_MOST_SAMPLES:,} samples, got {samples}.")
    given = torch.as_tensor(values, dtype=torch.float64).detach().flatten().cpu()
    valid = given[~given.isnan()]
    count, nan = len(valid), math.nan
    if count < 2:
        return Interval(float(valid[0]) if count else nan, nan, nan, count, level, count < FEW)
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, _AT_ONCE // count)
    means = [
        valid[torch.randint(count, (min(at_once, samples - start), count), generator=generator)]
        .mean(dim=1)
        for start in range(0, samples, at_once)
    ]  # fmt: skip
    tail = (1 - level) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return Interval(float(valid.mean()), float(low), float(high), count, level, count < FEW)


def bootstrap_difference(
    one: Tensor | Sequence[float],
    other: Tensor | Sequence[float],
    *,
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean of paired differences ``one - other`` with its bootstrap interval.

    Two methods on the same items differ far less by chance than on different items; only pairs
    with two valid values count.

    Args:
        one: ``(n,)``.
        other: ``(n,)``, item by item the same things.
        level: Between 0 and 1.
        samples: How often to draw.
        seed: As for :func:`bootstrap_mean`.

    Raises:
        ComparisonError: If the numbers of values differ or an option does not fit.
    """
    left, right = (
        torch.as_tensor(values, dtype=torch.float64).detach().flatten().cpu()
        for values in (one, other)
    )
    if len(left) != len(right):
        raise ComparisonError(
            f"Expected as many values of one as of the other, got {len(left)} and {len(right)}."
        )
    return bootstrap_mean(left - right, level=level, samples=samples, seed=seed)
