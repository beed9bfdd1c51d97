"""The quadruplet loss (Chen et al. 2017), with the hardest quadruplets of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simexplain.arguments import typed
from simexplain.errors import ComparisonError, ModelError
from simexplain.losses.safe_sqrt import safe_sqrt
from simexplain.networks import at_least_single


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
