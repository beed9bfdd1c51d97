"""The base losses ``L_ml``, each with its miner and usual settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from simexplain.arguments import typed
from simexplain.errors import ModelError
from simexplain.losses.identity import PartIdentityLoss
from simexplain.losses.metric_learning import metric_learning, triplet_miner
from simexplain.losses.objective import MetricLoss
from simexplain.losses.quadruplet import QuadrupletLoss
from simexplain.losses.settings import check_settings


def margin_loss(
    classes: int, width: int, *, margin: float = 0.2, beta: float = 1.2, learn_beta: bool = True
) -> MetricLoss:
    """Margin loss with distance-weighted sampling (Wu et al. 2017), on Euclidean distances.

    The boundary ``beta`` starts at 1.2 and is learned for each class, as published; without
    regularisation (``nu`` 0).
    """
    loss = metric_learning("losses").MarginLoss(
        margin=margin, beta=beta, learn_beta=learn_beta, num_classes=classes if learn_beta else None
    )
    miner = metric_learning("miners").DistanceWeightedMiner(
        cutoff=0.5, nonzero_loss_cutoff=beta + margin
    )
    return MetricLoss(loss, miner)


def proxy_anchor_loss(
    classes: int, width: int, *, alpha: float = 32.0, margin: float = 0.1
) -> MetricLoss:
    """Proxy anchor (Kim et al. 2020) on cosines; AVSL's 16, 1.8 and 2.2 on squared distances.

    Proxies start as in the authors' code and in AVSL: small. Those that the library draws are
    eleven times as large, and turn as much more slowly at the same learning rate.
    """
    loss = metric_learning("losses").ProxyAnchorLoss(classes, width, margin=margin, alpha=alpha)
    nn.init.kaiming_normal_(loss.proxies, mode="fan_out")
    return MetricLoss(loss)


def contrastive_loss(
    classes: int, width: int, *, positive: float = 0.0, negative: float = 1.0
) -> MetricLoss:
    """Contrastive loss (Hadsell et al. 2006), the siamese case: all pairs, Euclidean distances."""
    return MetricLoss(
        metric_learning("losses").ContrastiveLoss(pos_margin=positive, neg_margin=negative)
    )


def triplet_loss(
    classes: int, width: int, *, margin: float = 0.2, negatives: str = "hard"
) -> MetricLoss:
    """Triplet margin loss (Schroff et al. 2015) on Euclidean distances.

    Args:
        classes: Not used.
        width: Not used.
        margin: How much nearer a positive has to be.
        negatives: ``hard``: the nearest of the batch for every pair; ``semihard``, ``easy`` or
            ``all``. Semihard ones are farther than the positive, but by less than the margin.
    """
    miner = triplet_miner(negatives, margin)
    return MetricLoss(metric_learning("losses").TripletMarginLoss(margin=margin), miner)


def multi_similarity_loss(
    classes: int,
    width: int,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    epsilon: float = 0.1,
) -> MetricLoss:
    """Multi-similarity loss with its miner (Wang et al. 2019), on cosines."""
    loss = metric_learning("losses").MultiSimilarityLoss(alpha=alpha, beta=beta, base=base)
    return MetricLoss(loss, metric_learning("miners").MultiSimilarityMiner(epsilon=epsilon))


def quadruplet_loss(
    classes: int, width: int, *, margin: float = 0.2, margin2: float = 0.1, squared: bool = False
) -> MetricLoss:
    """Quadruplet loss (Chen et al. 2017) with the hardest negatives for every pair of a class."""
    return MetricLoss(QuadrupletLoss(margin, margin2, squared=squared))


def identity_loss(classes: int, width: int, *, parts: int = 1, scale: float = 1.0) -> MetricLoss:
    """Cross-entropy of a classifier of the persons, or of one for each part (Sun et al. 2018)."""
    return MetricLoss(PartIdentityLoss(classes, width, parts=parts, scale=scale))


LOSSES: dict[str, Callable[..., MetricLoss]] = {
    "contrastive": contrastive_loss,
    "identity": identity_loss,
    "margin": margin_loss,
    "multi_similarity": multi_similarity_loss,
    "proxy_anchor": proxy_anchor_loss,
    "quadruplet": quadruplet_loss,
    "triplet": triplet_loss,
}
"""Base losses by name: ``(classes, embedding size, **settings) -> MetricLoss``."""


@typed
def metric_loss(name: str, classes: int, width: int, **settings: Any) -> MetricLoss:
    """A base loss by name.

    Args:
        name: A name in :data:`LOSSES`.
        classes: How many classes are trained.
        width: Of the embedding.
        settings: In place of those of the table.

    Raises:
        ModelError: If the name or a setting is unknown, or pytorch-metric-learning is missing.
    """
    if name not in LOSSES:
        raise ModelError(f"Expected a loss of {', '.join(sorted(LOSSES))}, got {name!r}.")
    check_settings(name, LOSSES[name], settings)
    return LOSSES[name](classes, width, **settings)
