"""Equations 3, 4 and 5: the loss of the embeddings of images whose attention is hidden."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from simexplain.comparison import Comparison
from simexplain.errors import ComparisonError
from simexplain.losses.safe_sqrt import safe_sqrt

HELD_MARGIN = 0.2
"""By how much a masked negative shall stay farther than the positive under the rule ``held``."""

MINING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "absolute": lambda positive, negative: (positive - negative).abs(),
    "printed": lambda positive, negative: positive - negative,
    "reversed": lambda positive, negative: (negative - positive).relu(),
    "held": lambda positive, negative: (positive - negative + HELD_MARGIN).relu(),
}
"""Readings of Eq. 3 from the distances of masked positives and negatives to the masked anchor.

``absolute``: the masked triplet shall be undecided, as in the text. ``printed``: the difference
as it stands, whose minimum is a triplet that still holds. ``held``: the same with an end, a hinge
on the order with a margin. ``reversed``: a hinge on the reversed order."""


def mining_loss(masked: Comparison, rule: str = "absolute") -> Tensor:
    """``L_sm`` of embeddings of masked images: Eq. 3, 4 or 5 by the roles there are.

    With positives and negatives, the rule summed over every (positive, negative) of a comparison:
    one for a triplet (Eq. 3), two for a quadruplet (Eq. 5). With positives alone, minus their
    distance (Eq. 4): what looked alike shall come apart. With negatives alone, which the paper
    does not treat, their distance.

    Args:
        masked: Unit rows ``(E,)``.
        rule: A key of :data:`MINING`.

    Returns:
        The mean over comparisons, a scalar.

    Raises:
        ComparisonError: If the rule does not exist.
    """
    if rule not in MINING:
        raise ComparisonError(f"Expected mining to be one of {', '.join(MINING)}, got {rule!r}.")
    positive = _distances(masked.anchor, masked.positives)
    negative = _distances(masked.anchor, masked.negatives)
    if not negative.shape[1]:
        return -positive.sum(dim=1).mean()
    if not positive.shape[1]:
        return negative.sum(dim=1).mean()
    terms = MINING[rule](positive.unsqueeze(2), negative.unsqueeze(1))
    return terms.sum(dim=(1, 2)).mean()


def _distances(anchor: Tensor, others: Tensor) -> Tensor:
    """Euclidean ``(B,n)``, with a defined gradient where two rows are the same."""
    return safe_sqrt((anchor.unsqueeze(1) - others).square().sum(dim=2))
