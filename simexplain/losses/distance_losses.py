"""Losses on distances by name: proxy anchor, and those of pytorch-metric-learning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from simexplain.errors import ModelError
from simexplain.losses.metric_losses import metric_learning, triplet_miner
from simexplain.losses.objective import safe_sqrt, seeded_by


@dataclass(frozen=True)
class DistanceBatch:
    """Distances of a batch.

    Attributes:
        distances: ``(N,K)``, squared as Eq. 10 has them.
        labels: Class numbers of the rows ``(N,)``.
        columns: Class numbers of the columns ``(K,)``.
        nodes: How many nodes were summed, the dimension of the space.
        generator: The only source of chance.
        attract_only: Only distances to the own class count.
    """

    distances: Tensor
    labels: Tensor
    columns: Tensor
    nodes: int
    generator: torch.Generator
    attract_only: bool = False


class LossOnDistances(nn.Module, ABC):
    """One loss ``L(d)``.

    Attributes:
        settings: Its numbers, as plain JSON values.
    """

    uses_proxies: ClassVar[bool] = False  # else the columns are the rows

    settings: dict[str, Any]

    @abstractmethod
    def forward(self, measured: DistanceBatch) -> Tensor:
        """The loss, a scalar."""


class ProxyAnchor(LossOnDistances):
    """Proxy anchor (Kim et al. 2020, Eq. 4) on distances, in the form of the AVSL paper.

    Per proxy ``log(1 + sum exp(alpha (d - positive)))`` over the images of its class, mean over
    the classes of the batch, plus ``log(1 + sum exp(alpha (negative - d)))`` over all others, mean
    over all proxies. On squared distances of unit vectors, ``d = 2 - 2 cos``, this is Kim et al.'s
    loss with scale ``2 alpha`` on ``cos = 1 - d/2``: ``positive = 2 (1 - margin)`` and
    ``negative = 2 (1 + margin)``. AVSL's 16, 1.8 and 2.2 are Kim et al.'s 32 and 0.1.
    """

    uses_proxies: ClassVar[bool] = True

    def __init__(
        self,
        classes: int | None = None,
        *,
        alpha: float = 16.0,
        positive: float = 1.8,
        negative: float = 2.2,
    ) -> None:
        super().__init__()
        self.alpha, self.positive, self.negative = alpha, positive, negative
        self.settings = {"alpha": alpha, "positive": positive, "negative": negative}

    def forward(self, measured: DistanceBatch) -> Tensor:
        """The loss of images (rows) and proxies (columns)."""
        same = measured.labels[:, None] == measured.columns[None]
        pull = _log_one_plus(self.alpha * (measured.distances - self.positive), same)
        present = same.any(dim=0)
        pulled = (pull * present).sum() / present.sum().clamp_min(1)
        if measured.attract_only:
            return pulled
        push = _log_one_plus(self.alpha * (self.negative - measured.distances), ~same)
        return pulled + push.mean()


def _log_one_plus(exponents: Tensor, kept: Tensor) -> Tensor:
    """``log(1 + sum of exp)`` over the rows that are kept, ``(K,)``; 0 where none is."""
    chosen = exponents.masked_fill(~kept, -torch.inf)
    return torch.cat((torch.zeros_like(chosen[:1]), chosen)).logsumexp(dim=0)


class PairLoss(LossOnDistances):
    """Any loss of pytorch-metric-learning on pairs or triplets, on given distances."""

    def __init__(
        self,
        loss: Any,
        sampler: Callable[[DistanceBatch, Tensor], Any] | None = None,
        *,
        root: bool = False,
        settings: dict[str, Any] | None = None,
    ) -> None:
        """Takes the loss over.

        Args:
            loss: A loss with a ``distance``, which is replaced; a loss that wants similarities
                gets ``1 - d/2``.
            sampler: From what was measured and the distances as the loss sees them to indices.
            root: Give the loss the square roots, the Euclidean distances.
            settings: For the record.

        Raises:
            ModelError: If the loss has no distance, or roots are to become similarities.
        """
        from simexplain.losses.avsl_distance import GivenDistances

        super().__init__()
        if not hasattr(loss, "distance"):
            raise ModelError(
                f"Expected a loss of pytorch-metric-learning with a distance, got "
                f"{type(loss).__name__}; take MarginLoss, TripletMarginLoss or another on pairs."
            )
        inverted = bool(loss.distance.is_inverted)
        if inverted and root:
            raise ModelError(
                f"{type(loss).__name__} works on similarities 1 - d/2 of squared distances; leave "
                "root out."
            )
        loss.distance = GivenDistances(similarities=inverted)
        self.loss, self.sampler, self.root = loss, sampler, root
        self.settings = dict(settings or {}) | {"root": root}

    def forward(self, measured: DistanceBatch) -> Tensor:
        """The loss of the rows with each other."""
        given = safe_sqrt(measured.distances) if self.root else measured.distances
        with seeded_by(measured.generator):
            tuples = None if self.sampler is None else self.sampler(measured, given.detach())
            loss: Tensor = self.loss(given, measured.labels, tuples)
        return loss


@dataclass(frozen=True)
class DistanceWeighted:
    """One negative for each pair of a class, drawn evenly over distances (Wu et al. 2017, sec. 4).

    Weights are one over the density of distances on a sphere, which ``nodes`` give. As
    ``DistanceWeightedMiner`` of pytorch-metric-learning, from distances alone.

    Attributes:
        cutoff: Smallest Euclidean distance that weights are computed for.
        reach: Negatives at least this far, as the loss sees distances, are never drawn.
    """

    cutoff: float = 0.5
    reach: float = 1.4

    def __call__(self, measured: DistanceBatch, given: Tensor) -> Any:
        """Anchors, positives and negatives."""
        weights = self.weights(measured, given)
        draw = metric_learning("utils.loss_and_miner_utils").get_random_triplet_indices
        return draw(measured.labels, weights=weights)

    def weights(self, measured: DistanceBatch, given: Tensor) -> Tensor:
        """How likely each negative is for each anchor ``(N,N)``; rows sum to one, or to zero."""
        apart = measured.distances.detach().clamp_min(self.cutoff**2)
        n = measured.nodes
        log = (2 - n) / 2 * apart.log() - (n - 3) / 2 * (1 - apart / 4).log()
        usable = (measured.labels[:, None] != measured.columns[None]) & (given < self.reach)
        log = log.masked_fill(~(usable & log.isfinite()), -torch.inf)
        likelihood = torch.exp(log - log.amax(dim=1, keepdim=True))
        return likelihood.nan_to_num(0.0) / likelihood.nan_to_num(0.0).sum(
            dim=1, keepdim=True
        ).clamp_min(1)


@dataclass(frozen=True)
class Hardest:
    """For each image one other of its class and the nearest of another, as AVSL's code does.

    Attributes:
        cutoff: Negatives nearer than this, as the loss sees distances, count as this near; the
            first of those is taken.
    """

    cutoff: float = 0.5

    def __call__(self, measured: DistanceBatch, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Anchors, positives and negatives."""
        same = measured.labels[:, None] == measured.columns[None]
        own = torch.eye(len(same), dtype=torch.bool, device=same.device)
        positives = same & ~own
        usable = positives.any(dim=1) & ~same.all(dim=1)
        anchors = usable.nonzero().flatten()
        if not len(anchors):
            return anchors, anchors, anchors
        cutoff = given[same].amax().clamp_max(self.cutoff)
        negatives = given.clamp_min(cutoff).masked_fill(same, torch.inf)[anchors].argmin(dim=1)
        drawn = torch.multinomial(positives[anchors].float(), 1).flatten()
        return anchors, drawn, negatives


class Mined:
    """A miner of pytorch-metric-learning, on the distances that the loss sees."""

    def __init__(self, miner: Any) -> None:
        from simexplain.losses.avsl_distance import GivenDistances

        miner.distance = GivenDistances(similarities=bool(miner.distance.is_inverted))
        self.miner = miner

    def __call__(self, measured: DistanceBatch, given: Tensor) -> Any:
        """Indices as the miner gives them."""
        return self.miner(given, measured.labels)


SAMPLERS: dict[str, Callable[..., Callable[[DistanceBatch, Tensor], Any]]] = {
    "distance": DistanceWeighted,
    "hard": Hardest,
}
"""How the margin loss finds its triplets."""


def margin(
    classes: int | None = None,
    *,
    margin: float = 0.2,
    beta: float = 1.2,
    learn_beta: bool = True,
    sampling: str = "distance",
    root: bool = False,
) -> PairLoss:
    """The margin loss (Wu et al. 2017) on distances.

    The AVSL paper names the factors 1.2 and 0.2 the other way round; its code has the margin 0.2
    and the boundary 1.2. It puts them to the squared distance of a level, as in Eq. 10, while Wu et
    al. mean the Euclidean distance, which ``root`` gives.

    Args:
        classes: How many there are, for a boundary of each; needed where they are learned.
        margin: Alpha of Wu et al.
        beta: The boundary between near and far, at the start.
        learn_beta: Learn one for each class, as Wu et al. and AVSL's code do.
        sampling: ``distance`` (Wu et al.) or ``hard`` (AVSL's code), see :data:`SAMPLERS`.
        root: Work on Euclidean distances.

    Raises:
        ModelError: If the sampling is unknown, or classes are not given.
    """
    if sampling not in SAMPLERS:
        raise ModelError(f"Expected a sampling of {', '.join(SAMPLERS)}, got {sampling!r}.")
    if learn_beta and classes is None:
        raise ModelError("Expected a number of classes to learn their boundaries; give classes.")
    loss = metric_learning("losses").MarginLoss(
        margin=margin, beta=beta, learn_beta=learn_beta, num_classes=classes if learn_beta else None
    )
    sampler = DistanceWeighted(reach=beta + margin) if sampling == "distance" else Hardest()
    settings = {"margin": margin, "beta": beta, "learn_beta": learn_beta, "sampling": sampling}
    return PairLoss(loss, sampler, root=root, settings=settings)


def contrastive(
    classes: int | None = None,
    *,
    positive: float = 0.0,
    negative: float = 1.0,
    root: bool = True,
) -> PairLoss:
    """Contrastive loss (Hadsell et al. 2006) over all pairs, on Euclidean distances."""
    loss = metric_learning("losses").ContrastiveLoss(pos_margin=positive, neg_margin=negative)
    return PairLoss(loss, root=root, settings={"positive": positive, "negative": negative})


def triplet(
    classes: int | None = None, *, margin: float = 0.2, negatives: str = "hard", root: bool = True
) -> PairLoss:
    """Triplet margin loss (Schroff et al. 2015), on Euclidean distances.

    Args:
        classes: Not used.
        margin: How much nearer a positive has to be.
        negatives: ``hard``, ``semihard``, ``easy`` or ``all``, as for ``triplet_loss``.
        root: Work on Euclidean distances.
    """
    loss = metric_learning("losses").TripletMarginLoss(margin=margin)
    miner = triplet_miner(negatives, margin)
    settings = {"margin": margin, "negatives": negatives}
    return PairLoss(loss, Mined(miner), root=root, settings=settings)


def multi_similarity(
    classes: int | None = None,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    epsilon: float = 0.1,
) -> PairLoss:
    """Multi-similarity loss with its miner (Wang et al. 2019), on similarities ``1 - d/2``."""
    loss = metric_learning("losses").MultiSimilarityLoss(alpha=alpha, beta=beta, base=base)
    miner = metric_learning("miners").MultiSimilarityMiner(epsilon=epsilon)
    settings = {"alpha": alpha, "beta": beta, "base": base, "epsilon": epsilon}
    return PairLoss(loss, Mined(miner), settings=settings)


DISTANCE_LOSSES: dict[str, Callable[..., LossOnDistances]] = {
    "contrastive": contrastive,
    "margin": margin,
    "multi_similarity": multi_similarity,
    "proxy_anchor": ProxyAnchor,
    "triplet": triplet,
}
"""Losses for ``AVSLLoss`` by name: ``(classes, **settings) -> LossOnDistances``."""
