"""Which images of a batch are compared: disjoint pairs, triplets or quadruplets by their labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simexplain.comparison import Comparison
from simexplain.errors import ComparisonError

SHAPES = {"siamese": (1, 0), "triplet": (1, 1), "quadruplet": (1, 2)}
"""Positives and negatives of each arrangement that is trained with."""


@dataclass(frozen=True)
class Tuples:
    """Comparisons among the images of a batch.

    Attributes:
        places: Which image is where, ``(T,K)``: anchor, positives, negatives.
        positives: How many of each are positives.
    """

    places: Tensor
    positives: int

    def __len__(self) -> int:
        return len(self.places)

    def of(self, rows: Tensor) -> Comparison:
        """The comparisons of things ``(N,*S)`` that the images have, such as embeddings."""
        return self.arranged(rows[self.places])

    def arranged(self, stack: Tensor) -> Comparison:
        """Comparisons from a stack ``(T,K,*S)``."""
        cut = 1 + self.positives
        return Comparison(stack[:, 0], stack[:, 1:cut], stack[:, cut:])


def disjoint_tuples(
    embeddings: Tensor,
    labels: Tensor,
    arch: str = "triplet",
    *,
    share: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tuples:
    """Comparisons in which no image occurs twice, so that every image is masked at most once.

    Anchors and positives are drawn, as many as leave an image for each negative; a negative is the
    nearest image of another class that is left (hard negatives).

    Args:
        embeddings: Rows ``(N,E)``; read without a gradient.
        labels: ``(N,)``.
        arch: A key of :data:`SHAPES`.
        share: Only the hardest share of the comparisons, in (0, 1]: those that violate their
            condition most, or come closest to it; at least one.
        generator: The only source of chance.

    Raises:
        ComparisonError: If the batch has no such comparison, or an option is out of range.
    """
    if arch not in SHAPES:
        raise ComparisonError(f"Expected arch to be one of {', '.join(SHAPES)}, got {arch!r}.")
    if not 0 < share <= 1:
        raise ComparisonError(f"Expected a share in (0, 1], got {share}.")
    positives, negatives = SHAPES[arch]
    distances = torch.cdist(embeddings.detach().float(), embeddings.detach().float())
    order = torch.randperm(len(labels), generator=generator).tolist()
    tuples = _partition(distances.tolist(), labels.tolist(), order, negatives)
    if not tuples:
        raise ComparisonError(
            f"Expected a batch with a {arch} in it (two images of a class"
            f"{' and one of another' if negatives else ''}), got {len(labels)} images of "
            f"{len(set(labels.tolist()))} classes; sample several images of several classes."
        )
    places = torch.tensor(tuples, device=embeddings.device)
    if share < 1:
        places = places[_hardest(distances, places, share)]
    return Tuples(places, positives)


def _partition(
    distances: list[list[float]], labels: list[int], order: list[int], negatives: int
) -> list[list[int]]:
    """As many anchors with positives as leave enough others, each with its nearest of those."""
    pairs = _pairs(labels, order)
    if not negatives:
        return pairs
    pairs = pairs[: len(order) // (2 + negatives)]
    free = set(order).difference(*pairs)
    tuples: list[list[int]] = []
    for anchor, positive in pairs:
        others = [index for index in free if labels[index] != labels[anchor]]
        if len(others) < negatives:
            continue
        others.sort(key=lambda index: (distances[anchor][index], index))
        tuples.append([anchor, positive, *others[:negatives]])
        free -= set(tuples[-1])
    return tuples


def _pairs(labels: list[int], order: list[int]) -> list[list[int]]:
    """Disjoint pairs of one class each."""
    waiting: dict[int, int] = {}
    pairs = []
    for index in order:
        other = waiting.pop(labels[index], None)
        if other is None:
            waiting[labels[index]] = index
        else:
            pairs.append([other, index])
    return pairs


def _hardest(distances: Tensor, places: Tensor, share: float) -> Tensor:
    """Which comparisons violate their condition most, in their order."""
    anchors = places[:, :1]
    own = distances[anchors, places[:, 1:2]].amax(dim=1)
    other = distances[anchors, places[:, 2:]]
    hardness = own - other.amin(dim=1) if other.shape[1] else own
    count = max(1, round(share * len(places)))
    return hardness.topk(count).indices.sort().values
