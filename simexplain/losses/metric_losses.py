"""The base losses ``L_ml``, each with its miner and usual settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain.arguments import typed
from simexplain.errors import ComparisonError, ModelError, meant
from simexplain.losses.objective import MetricLoss, check_settings, safe_sqrt
from simexplain.networks import at_least_single


def metric_learning(part: str) -> Any:
    """A package of pytorch-metric-learning: ``losses``, ``miners``, ``distances`` and so on.

    Raises:
        ModelError: If it is not installed.
    """
    try:
        return import_module(f"pytorch_metric_learning.{part}")
    except ModuleNotFoundError as error:
        raise ModelError(
            "Expected pytorch-metric-learning for this loss, which is not installed; run "
            "pip install 'simexplain[train]'."
        ) from error


NEGATIVES = ("hard", "semihard", "easy", "all")
"""Which negatives of a batch make triplets."""


def triplet_miner(negatives: str, margin: float) -> Any:
    """A miner of triplets with all positives; semihard negatives are those of Schroff et al. 2015.

    Raises:
        ModelError: If the kind of negatives does not exist, or the package is not installed.
    """
    if negatives not in NEGATIVES:
        raise ModelError(
            f"Expected negatives to be one of {', '.join(NEGATIVES)}, got '{negatives}'"
            f"{meant(negatives, NEGATIVES) or '.'}"
        )
    miners = metric_learning("miners")
    if negatives == "semihard":
        return miners.TripletMarginMiner(margin=margin, type_of_triplets="semihard")
    return miners.BatchEasyHardMiner("all", negatives)


class PartIdentityLoss(nn.Module):
    """A classifier of its own for each part of the embedding, their cross-entropies added up.

    PCB (Sun et al. 2018, section 3.1): every stripe has to tell the person alone. With one part
    it is the usual classification loss. The classifiers are thrown away after training.

    Rows have unit length; they are multiplied by ``scale * sqrt(width)``, which for ``scale`` of 1
    is the length of numbers of variance one, as a batch norm gives them.
    """

    def __init__(self, classes: int, width: int, *, parts: int = 1, scale: float = 1.0) -> None:
        """Takes the sizes; weights start as in PCB's code: normal, of 0.001, biases 0.

        Args:
            classes: ``C``, persons to train on, at least 2.
            width: ``E``, of the embedding.
            parts: ``P``, stretches of ``E / P`` numbers one after the other.
            scale: What rows are multiplied by, see above.

        Raises:
            ModelError: If a number is out of range, or the parts cannot share the width.
        """
        super().__init__()
        if classes < 2 or parts < 1 or width < 1 or width % parts or not 0 < scale < float("inf"):
            raise ModelError(
                "Expected at least two classes, parts that share the embedding evenly and a "
                f"positive scale for the identity loss, got {classes} classes, {parts} parts of "
                f"{width} numbers and a scale of {scale}."
            )
        self.parts, self.scale = parts, float(scale) * sqrt(width)
        self.weight = nn.Parameter(torch.empty(parts, classes, width // parts).normal_(std=0.001))
        self.bias = nn.Parameter(torch.zeros(parts, classes))

    def scores(self, embeddings: Tensor) -> Tensor:
        """Logits of each part: ``(N,P,C)`` of unit rows ``(N,E)``."""
        rows = (self.scale * embeddings).reshape(len(embeddings), self.parts, -1)
        return torch.einsum("npe,pce->npc", rows, self.weight) + self.bias

    def forward(self, embeddings: Tensor, labels: Tensor, indices: object = None) -> Tensor:
        """The mean over images of the sum over parts.

        Args:
            embeddings: Unit rows ``(N,E)``.
            labels: Numbers of the persons ``(N,)``, from 0.
            indices: Not used; other losses get the pairs of a miner.

        Raises:
            ModelError: If a label is not the number of a class.
        """
        classes = self.bias.shape[1]
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise ModelError(
                f"Expected labels from 0 to {classes - 1} for {classes} persons, got {low} to "
                f"{high}; number the training classes from 0."
            )
        every = labels.long().repeat_interleave(self.parts)
        scores = self.scores(embeddings).flatten(0, 1)
        return self.parts * F.cross_entropy(scores.float(), every)


@dataclass(frozen=True)
class Quadruplets:
    """Which rows of a batch make quadruplets.

    Attributes:
        anchors: Places ``(Q,)``.
        positives: Other images of the anchors' classes ``(Q,)``.
        negatives: Images of other classes ``(Q,)``.
        others: Images of third classes ``(Q,)``; None where the batch has only two classes.
    """

    anchors: Tensor
    positives: Tensor
    negatives: Tensor
    others: Tensor | None


class QuadrupletMiner:
    """The hardest quadruplets of a batch, one for each ordered pair of images of one class.

    The first negative is the image of another class that is nearest to the anchor; the second is
    the image of a third class that is nearest to the first. Of equally near images the first in
    the batch is taken. Nothing is drawn.
    """

    def __call__(self, embeddings: Tensor, labels: Tensor) -> Quadruplets:
        """Finds them; there are none where no class has two images or there is one class only.

        Args:
            embeddings: Rows ``(N,E)``; read without a gradient.
            labels: ``(N,)``.
        """
        same = labels.unsqueeze(0) == labels.unsqueeze(1)
        paired = same & ~torch.eye(len(labels), dtype=torch.bool, device=same.device)
        anchors, positives = (paired & ~same.all(dim=1, keepdim=True)).nonzero().unbind(1)
        if not len(anchors):
            return Quadruplets(anchors, positives, anchors, None)
        rows = embeddings.detach()
        nearest = _apart(rows).masked_fill(same, torch.inf).argmin(dim=1)
        return completed(rows, labels, anchors, positives, nearest[anchors])


def completed(
    embeddings: Tensor, labels: Tensor, anchors: Tensor, positives: Tensor, negatives: Tensor
) -> Quadruplets:
    """Triplets made quadruplets: the image of a third class that is nearest to each negative.

    Args:
        embeddings: Rows ``(N,E)``.
        labels: ``(N,)``.
        anchors: Places ``(Q,)``.
        positives: Likewise.
        negatives: Likewise, of other classes than the anchors.
    """
    if len(set(labels.tolist())) < 3 or not len(anchors):
        return Quadruplets(anchors, positives, negatives, None)
    own, first = labels[anchors].unsqueeze(1), labels[negatives].unsqueeze(1)
    taken = (labels == own) | (labels == first)
    distances = _apart(embeddings.detach())[negatives]
    others = distances.masked_fill(taken, torch.inf).argmin(dim=1)
    return Quadruplets(anchors, positives, negatives, others)


class QuadrupletLoss(nn.Module):
    """``relu(d(a,p) - d(a,n1) + m1) + relu(d(a,p) - d(n1,n2) + m2)`` (Chen et al. 2017, Eq. 5).

    The first part is the triplet loss. The second pulls images of one class nearer to each other
    than images of two other classes, whatever the anchor; its margin is the smaller one. The paper
    compares squares of a learned metric and sets the margins from the batch; here ``d`` is the
    Euclidean distance of the rows as they come, and the margins are constants.

    Each part is the mean over the quadruplets that violate it, which is how
    pytorch-metric-learning averages its triplet loss. A batch with two classes has no second
    negative, and the first part stands alone; with one class, or no two images of a class, the loss
    is 0.

    Use it as ``MetricLoss(QuadrupletLoss())``, with or without a miner.
    """

    @typed
    def __init__(self, margin: float = 0.2, margin2: float = 0.1, *, squared: bool = False) -> None:
        """Takes the margins, which are distances (squares of distances if ``squared``).

        Args:
            margin: ``m1``, of the first part.
            margin2: ``m2``, of the second.
            squared: Compare squares of distances, as the paper writes it.

        Raises:
            ModelError: If a margin is not a finite number.
        """
        super().__init__()
        for value in (margin, margin2):
            if not abs(value) < float("inf"):
                raise ModelError(f"Expected finite margins of the quadruplet loss, got {value}.")
        self.margin, self.margin2, self.squared = float(margin), float(margin2), squared
        self._mine: Callable[[Tensor, Tensor], Quadruplets] = QuadrupletMiner()

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices: Quadruplets | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: Rows ``(N,E)``.
            labels: ``(N,)``.
            indices: Quadruplets; or triplets ``(a, p, n)`` of a pytorch-metric-learning miner,
                each with the nearest image of a third class; or None, for the hardest.

        Returns:
            A scalar in the graph.

        Raises:
            ComparisonError: If the indices are neither.
        """
        quadruplets = self._quadruplets(embeddings, labels, indices)
        own = self._distances(embeddings, quadruplets.anchors, quadruplets.positives)
        apart = self._distances(embeddings, quadruplets.anchors, quadruplets.negatives)
        loss = _violated(own - apart + self.margin)
        if quadruplets.others is not None:
            across = self._distances(embeddings, quadruplets.negatives, quadruplets.others)
            loss = loss + _violated(own - across + self.margin2)
        # Without a quadruplet the loss must still be part of the graph.
        return loss + 0 * embeddings.sum()

    def _quadruplets(
        self, embeddings: Tensor, labels: Tensor, indices: Quadruplets | Sequence[Tensor] | None
    ) -> Quadruplets:
        if indices is None:
            return self._mine(embeddings, labels)
        if isinstance(indices, Quadruplets):
            return indices
        if len(indices) != 3:
            raise ComparisonError(
                f"Expected quadruplets or triplets (a, p, n) from the miner, got {len(indices)} "
                "index tensors; use QuadrupletMiner or a miner of triplets."
            )
        return completed(embeddings, labels, *indices)

    def _distances(self, rows: Tensor, one: Tensor, other: Tensor) -> Tensor:
        squares = (rows[one] - rows[other]).square().sum(dim=1)
        return squares if self.squared else safe_sqrt(squares)


def _apart(rows: Tensor) -> Tensor:
    rows = at_least_single(rows)
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")


def _violated(gaps: Tensor) -> Tensor:
    """The mean of the positive ones; 0 without any."""
    violations = gaps.relu()
    return violations.sum() / (violations > 0).sum().clamp_min(1)


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
