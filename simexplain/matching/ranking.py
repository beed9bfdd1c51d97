"""Which entries of a matrix are the strongest, and which positions are each other's best."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simexplain.errors import ComparisonError

RANKED_BY = ("value", "specific")
"""``value``: what two positions add; ``specific``: what of it is particular to the two."""


@dataclass(frozen=True)
class Entry:
    """A place in a matrix ``(n,m)``.

    Attributes:
        row: Its row.
        column: Its column.
        mutual: Whether it is the best of its row and of its column.
    """

    row: int
    column: int
    mutual: bool


def centred(matrix: Tensor) -> Tensor:
    """A matrix ``(n,m)`` without the means of its rows and columns, which then sum to zero."""
    means = matrix.mean(dim=1, keepdim=True) + matrix.mean(dim=0, keepdim=True)
    return matrix - means + matrix.mean()


def strongest(matrix: Tensor, n: int, *, sign: int, mutual: bool, by: str) -> list[Entry]:
    """The entries that bring two images closest, the strongest first.

    Args:
        matrix: ``(n,m)``.
        n: How many at most.
        sign: 1 where larger entries are stronger, -1 where smaller ones are.
        mutual: Only entries that are the best of their row and of their column; by ``specific``,
            those that are weaker than the average entry are left out.
        by: A name in ``RANKED_BY``.

    Raises:
        ComparisonError: If the ranking is unknown.
    """
    if by not in RANKED_BY:
        raise ComparisonError(f"Expected by to be one of {', '.join(RANKED_BY)}, got '{by}'.")
    values = matrix * sign
    ranked = values if by == "value" else centred(values)
    # The first of equals in both directions: one partner for each position.
    best_column, best_row = ranked.argmax(dim=1), ranked.argmax(dim=0)
    flat = ranked.flatten()
    if mutual:
        rows = torch.arange(len(ranked), device=ranked.device)
        rows = rows[best_row[best_column] == rows]
        places = rows * ranked.shape[1] + best_column[rows]
        if by == "specific":
            # Two positions that hardly add anything may still be particular to each other.
            places = places[values.flatten()[places] > values.mean()]
    else:
        places = flat.topk(min(max(n, 0), flat.numel())).indices
    order = flat[places].argsort(descending=True, stable=True)[: max(n, 0)]
    pairs = []
    for index in places[order].tolist():
        row, column = divmod(index, ranked.shape[1])
        each_other = int(best_column[row]) == column and int(best_row[column]) == row
        pairs.append(Entry(row, column, each_other))
    return pairs
