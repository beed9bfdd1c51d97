"""The direction in which each image's embedding changes the comparison: other methods' score."""

from __future__ import annotations

import torch
from torch import Tensor

from simexplain.comparison import Comparison


def margin_directions(embeddings: Comparison) -> Tensor:
    """The direction ``(B,K,E)`` in which each embedding raises the margin, all others held.

    Given vectors are held always and have no direction of their own.

    The margin of similarities is ``mean over positives of a . p - mean over negatives of a . n``.
    For a similar pair it is the similarity itself, and each image's direction is the other image;
    for a dissimilar pair its negative. The anchor of a triplet has the direction ``p - n``, the
    positive ``a``, the negative ``-a``: what sets the negative apart counts as evidence there.

    Args:
        embeddings: Rows ``(E,)`` in a comparison, unit or raw.
    """
    anchor = embeddings.anchor
    near, far = embeddings.positives, embeddings.negatives
    pull = near.sum(dim=1) / max(1, near.shape[1]) - far.sum(dim=1) / max(1, far.shape[1])
    own = anchor.unsqueeze(1)
    directions = torch.cat(
        (
            pull.unsqueeze(1),
            own.expand_as(near) / max(1, near.shape[1]),
            -own.expand_as(far) / max(1, far.shape[1]),
        ),
        dim=1,
    )
    return directions[:, list(embeddings.places)] if embeddings.given else directions
