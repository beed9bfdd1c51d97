"""Distances for the losses and miners of pytorch-metric-learning: those of AVSL, and given ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from simexplain.arguments import typed
from simexplain.graph.distances import distances
from simexplain.losses.metric_losses import metric_learning
from simexplain.losses.objective import safe_sqrt
from simexplain.models.avsl import AVSL
from simexplain.models.base import DISTANCES

_BaseDistance: Any = metric_learning("distances").BaseDistance


class GivenDistances(_BaseDistance):  # type: ignore[misc]
    """For losses that shall work on a matrix ``(N,K)`` of distances, given as the embeddings.

    Where a loss wants similarities, each becomes ``1 - d/2``: of squared distances between unit
    vectors that is the cosine.
    """

    @typed
    def __init__(self, *, similarities: bool = False) -> None:
        super().__init__(normalize_embeddings=False, is_inverted=similarities)

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor | None) -> Tensor:
        """The matrix itself."""
        return 1 - query_emb / 2 if self.is_inverted else query_emb


class AVSLDistance(_BaseDistance):  # type: ignore[misc]
    """The distance of an AVSL model, for any loss or miner of pytorch-metric-learning.

    Embeddings are the rows of the model. Use it in a training loop of your own::

        level = MarginLoss(margin=0.2, beta=1.2, distance=AVSLDistance(model, level=0))
        overall = MarginLoss(margin=0.2, beta=1.2, distance=AVSLDistance(model))
        rows = model(images)                # in training mode this updates the edges
        (level(rows, labels) + overall(rows, labels)).backward()

    Gradients are separated as in Eq. 10: a level's distance trains network and head, the overall
    distance alpha and beta alone.
    """

    @typed
    def __init__(
        self,
        model: AVSL,
        level: int | None = None,
        *,
        root: bool = False,
        similarities: bool = False,
    ) -> None:
        """Takes the model, which does not become a part of the loss.

        Args:
            model: The model whose rows come.
            level: The number of a level, 0 the lowest; None for the overall distance.
            root: The square root, on the scale of a Euclidean distance.
            similarities: ``1 - d/2`` in place of the distance ``d``, for losses that want
                similarities.
        """
        super().__init__(normalize_embeddings=False, is_inverted=similarities)
        self._held = (model,)  # a tuple: as a submodule its parameters would be the loss's own
        self.level, self.root = level, root

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor | None) -> Tensor:
        """Distances ``(Q,G)`` of rows ``(Q,E)`` and ``(G,E)``."""
        (model,) = self._held
        other = query_emb if ref_emb is None else ref_emb
        if self.level is None:
            q, g = (model.unpacked(rows.detach()) for rows in (query_emb, other))
            return self._as_asked(distances(model.graph(), q, g))
        own, others = (model.unpacked(rows).embeddings[self.level] for rows in (query_emb, other))
        return self._as_asked(DISTANCES["squared"](own, others))

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """Distances ``(B,)`` of pairs of rows."""
        return self.compute_mat(query_emb, ref_emb).diagonal()

    def _as_asked(self, distances: Tensor) -> Tensor:
        if self.root:
            distances = safe_sqrt(distances)
        return 1 - distances / 2 if self.is_inverted else distances
