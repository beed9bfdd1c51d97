"""Attention from a classification head: what similarity attention is compared with in Table 1."""

from __future__ import annotations

from math import log

from torch import Tensor, nn
from torch.nn import functional as F

from simexplain.arguments import typed
from simexplain.errors import ModelError
from simexplain.losses.mining import MiningOptions, MiningTerm, mined_along
from simexplain.losses.objective import Batch, Term


class ClassHead(nn.Module):
    """A linear classifier on the embedding: ``scale * W f + b``, one score for each class.

    The paper (section 4.1) adds "a classification module" without further detail. Here it sits on
    the embedding that the metric loss compares, as in the identification branch of CASN (Zheng et
    al. 2019): any network has an embedding, and the score of a class is ``w . f`` like that of Eq.
    2, so that both kinds of maps come from the same code and differ in the weight vector alone.

    Embeddings have unit length, so scores are scaled. Biases start where every class has the
    probability ``1 / classes``; they would take thousands of small steps to get there.
    """

    @typed
    def __init__(self, classes: int, features: int, *, scale: float = 16.0) -> None:
        """Takes the sizes; weights are drawn as those of any linear layer.

        Args:
            classes: ``C``, at least 2.
            features: ``E``, the size of the embedding.
            scale: What scores are multiplied by.

        Raises:
            ModelError: If a number is out of range.
        """
        super().__init__()
        if classes < 2 or features < 1 or not 0 < scale < float("inf"):
            raise ModelError(
                "Expected at least two classes, one feature and a positive scale for the head, got "
                f"{classes}, {features} and {scale}."
            )
        self.classes, self.features, self.scale = classes, features, float(scale)
        self.linear = nn.Linear(features, classes)
        nn.init.constant_(self.linear.bias, -log(classes - 1))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Scores ``(N,C)`` of rows ``(N,E)``."""
        scores: Tensor = self.linear(self.scale * embeddings)
        return scores

    def directions(self, labels: Tensor) -> Tensor:
        """The vector ``w`` of each label ``(N,E)``: the score of its class is ``w . f + b``."""
        return self.scale * self.linear.weight[labels]

    def check(self, embeddings: Tensor, labels: Tensor) -> None:
        """Raises where a batch is not one that the head was made for.

        Args:
            embeddings: Rows ``(N,E)``.
            labels: Class numbers ``(N,)``.

        Raises:
            ModelError: If the rows have another size, or a label is not the number of a class.
        """
        if embeddings.shape[1] != self.features:
            raise ModelError(
                f"Expected embeddings of {self.features} dimensions for the class head, got "
                f"{embeddings.shape[1]}; make the head for the model's embedding."
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.classes:
            raise ModelError(
                f"Expected labels from 0 to {self.classes - 1} for a head of {self.classes} "
                f"classes, got {low} to {high}; number the training classes from 0."
            )


class ClassificationLoss(Term):
    """``L_bce`` (section 4.1): binary cross-entropy of every class against one-hot targets.

    The mean over images and classes. Head and network are both trained.
    """

    @typed
    def __init__(self, head: ClassHead) -> None:
        """Takes the head, whose weights become parameters of the term."""
        super().__init__()
        self.head = head

    def forward(self, batch: Batch) -> Tensor:
        """The loss of the images of all processes.

        Raises:
            ModelError: If labels or embeddings do not fit the head.
        """
        self.head.check(batch.units, batch.labels)
        scores = self.head(batch.units)
        targets = F.one_hot(batch.labels.long(), self.head.classes)
        return F.binary_cross_entropy_with_logits(scores, targets.to(scores))


class ClassificationMiningLoss(MiningTerm):
    """``L_bce-sm`` (section 4.1): similarity mining with Grad-CAM maps of the image's own class.

    The same as :class:`~simexplain.losses.mining.SimilarityMiningLoss`, but that the maps are
    those of the score of each image's true class. Give both terms one head::

        head = ClassHead(classes, features)
        Objective({
            "ml": (1.0, MetricLoss(losses.ContrastiveLoss())),
            "bce": (0.1, ClassificationLoss(head)),
            "bce_sm": (0.05, ClassificationMiningLoss(head, arch="siamese")),
        })

    The head's weights are held constant in the maps, as weight vectors are in similarity mining:
    ``L_bce`` alone trains the head.
    """

    @typed
    def __init__(
        self, head: ClassHead, options: MiningOptions | None = None, **changes: object
    ) -> None:
        """Takes the head and options, or changes to the default ones by name.

        Args:
            head: The head that a :class:`ClassificationLoss` trains.
            options: Of the mining; ``weights`` is not read.
            **changes: Of single options.
        """
        super().__init__(options, **changes)
        self.head = head

    def forward(self, batch: Batch) -> Tensor:
        """The loss of the comparisons that are found in the batch.

        Raises:
            ModelError: If labels or embeddings do not fit the head.
            ComparisonError: If the batch has no such comparison.
        """
        self.head.check(batch.units, batch.labels)
        tuples = self.comparisons(batch)
        directions = self.head.directions(batch.labels[tuples.places.flatten()])
        return mined_along(batch, tuples, directions, self.options)
