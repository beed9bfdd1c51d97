"""Weight vectors: which dimensions of the embedding speak for this comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from simexplain.arguments import typed
from simexplain.comparison import Comparison, roles
from simexplain.errors import ComparisonError

FLAT_BELOW = 0.05
"""A factor whose coefficient of variation is smaller hardly separates dimensions."""


@dataclass(frozen=True)
class WeightRule:
    """How much one dimension speaks for "alike" with a positive, or "different" from a negative.

    Attributes:
        positive: ``(anchor, positives) -> factors``, each ``(...,E)``, non-negative.
        negative: ``(anchor, negatives) -> factors``, likewise.
        about: One line for help texts.
    """

    positive: Callable[[Tensor, Tensor], Tensor]
    negative: Callable[[Tensor, Tensor], Tensor]
    about: str


def _agreement(anchor: Tensor, other: Tensor) -> Tensor:
    return 1 - (anchor - other).abs()


def _relative_agreement(anchor: Tensor, other: Tensor) -> Tensor:
    size = anchor.abs() + other.abs()
    # Where neither image is active there is nothing to agree on.
    return torch.where(size > 0, 1 - (anchor - other).abs() / size.clamp_min(1e-30), 0.0)


def _difference(anchor: Tensor, other: Tensor) -> Tensor:
    return (anchor - other).abs()


def _excess(anchor: Tensor, other: Tensor) -> Tensor:
    return (anchor - other).relu()


WEIGHTS: dict[str, WeightRule] = {
    "paper": WeightRule(_agreement, _difference, "as published: 1-|a-p| and |a-n|"),
    "relative": WeightRule(
        _relative_agreement, _difference, "relative to their size: 1-|a-p|/(|a|+|p|) and |a-n|"
    ),
    "signed": WeightRule(
        _agreement, _excess, "only what the anchor has and the negative lacks: relu(a-n)"
    ),
}
"""Every weight rule by name; a new rule is one line here."""


def weight_rule(name: str) -> WeightRule:
    """The rule of this name.

    Raises:
        ComparisonError: If there is none.
    """
    if name not in WEIGHTS:
        raise ComparisonError(f"Expected weights to be one of {', '.join(WEIGHTS)}, got '{name}'.")
    return WEIGHTS[name]


@typed
def similarity_weights(embeddings: Comparison, rule: str = "paper") -> Tensor:
    """The weight vector of each comparison: the product of one factor per other image.

    Similarity attention, section 3.1 and 3.1.1:
    ``w = prod over positives (1 - |a - p|) * prod over negatives |a - n|``, element by element;
    an empty product is one.

    Args:
        embeddings: Unit vectors, ``S = (E,)``.
        rule: A name in :data:`WEIGHTS`.

    Returns:
        Shape ``(B,E)``, non-negative. Differentiable.
    """
    weights, log_scale = scaled_weights(embeddings, rule)
    return weights * log_scale.exp().unsqueeze(1)


def scaled_weights(embeddings: Comparison, rule: str = "paper") -> tuple[Tensor, Tensor]:
    """The weights with every factor divided by its row maximum, so that no product underflows.

    Returns:
        ``weights (B,E)`` and ``log_scale (B,)``, constant in the graph: the published weights
        are ``weights * exp(log_scale)``.
    """
    product = torch.ones_like(embeddings.anchor)
    log_scale = product.new_zeros(embeddings.batch)
    for factor in _factors(embeddings, weight_rule(rule)):
        # The running product is scaled as well: factors may peak at different dimensions.
        product = product * factor
        top = product.detach().amax(dim=1)
        top = torch.where(top > 0, top, torch.ones_like(top))
        product = product / top.unsqueeze(1)
        log_scale = log_scale + top.log()
    return product, log_scale


def flat_factors(embeddings: Comparison, rule: str = "paper") -> list[str]:
    """Which factors hardly tell dimensions apart: their role, number and variation.

    Returns:
        One phrase for each factor whose coefficient of variation (standard deviation over mean,
        over the dimensions) is below :data:`FLAT_BELOW` in any comparison of the batch.
    """
    factors = []
    others = roles(embeddings.positives.shape[1], embeddings.negatives.shape[1])[1:]
    for number, (role, factor) in enumerate(
        zip(others, _factors(embeddings, weight_rule(rule)), strict=True), start=1
    ):
        mean = factor.mean(dim=1)
        variation = factor.std(dim=1, correction=0) / mean.clamp_min(1e-30)
        flat = (mean > 0) & (variation < FLAT_BELOW)
        if bool(flat.any()):
            factors.append(f"{role} in place {number} varies by {float(variation[flat].min()):.3f}")
    return factors


def _factors(embeddings: Comparison, rule: WeightRule) -> list[Tensor]:
    """One factor ``(B,E)`` for each image beside the anchor, positives first."""
    anchor = embeddings.anchor.unsqueeze(1)
    positives = rule.positive(anchor, embeddings.positives)
    negatives = rule.negative(anchor, embeddings.negatives)
    return [*positives.unbind(1), *negatives.unbind(1)]
