"""The identity loss of re-identification: every part of the embedding classifies the person."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain.errors import ModelError


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
