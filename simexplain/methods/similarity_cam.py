"""The Grad-CAM family on a similarity: one map per image, from the similarity's own gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simexplain.arguments import typed
from simexplain.comparison import Comparison
from simexplain.errors import ComparisonError
from simexplain.methods.directions import margin_directions
from simexplain.methods.layer_maps import Cams, check_cams, fuse, layer_cams
from simexplain.methods.method import AttentionMaps, Method, check_embeddings
from simexplain.methods.raw_vectors import trace_vectors
from simexplain.methods.scoring import floor_of, slack_of
from simexplain.methods.unexplained import unexplained_share, unexplained_share_warning
from simexplain.models.base import SimilarityModel
from simexplain.networks import lengths_of, unit_rows
from simexplain.tracing import Trace, trace

SCORES = {
    "cosine": "of the unit embeddings",
    "dot": "of the vectors before normalisation",
    "held": "cosine with the lengths of the vectors held constant",
}
"""The available similarities."""

_CANCELS_BELOW = 1e-3


@dataclass(frozen=True)
@typed
class SimilarityCAM(Method):
    """Grad-CAM, HiResCAM, LayerCAM or Grad-CAM++ (``CAMS``) of a similarity, for every image.

    Each image's score is its similarity to the positives minus that to the negatives, all other
    images held (``margin_directions``). One forward and one backward pass serve the whole batch.

    The cosine does not change when all features grow alike, so its gradient is orthogonal to the
    vector. With average pooling, a linear tail without bias and no final ReLU its map sums to zero
    however similar the images are, and a map scaled to its own maximum does not show how much.
    ``held`` is free of that: its map then sums to the cosine.

    Attributes:
        score: ``cosine``, ``dot`` or ``held``, see ``SCORES``.
        cam: A formula in ``CAMS`` for all layers, or one per layer.
        keep_negative: Leave out the final ReLU.
    """

    score: str = "cosine"
    cam: Cams = None
    keep_negative: bool = False

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ComparisonError(
                f"Expected score to be one of {', '.join(SCORES)}, got '{self.score}'."
            )
        check_cams(self.cam)

    def attribute(
        self,
        model: SimilarityModel,
        images: Comparison,
        layers: Sequence[str],
        max_batch: int | None,
    ) -> AttentionMaps:
        """One forward and one backward pass serve the whole batch."""
        flat_images = images.stacked().flatten(0, 1)
        if self.score == "cosine":
            traced = trace(model, flat_images, layers, max_batch=max_batch, by_rows=True)
        else:
            traced = trace_vectors(model, flat_images, layers, max_batch=max_batch).trace
        vectors = traced.embeddings.detach()
        units = images.restacked(unit_rows(vectors))
        check_embeddings(units, images.roles)
        others = images.like(images.restacked(vectors) if self.score == "dot" else units)
        directions = margin_directions(others)
        flat = directions.flatten(0, 1)
        with torch.enable_grad():
            scores = (traced.embeddings * flat).sum(dim=1)
            if self.score == "held":
                scores = scores / lengths_of(vectors)
            gradients = traced.gradients(scores.sum())
        with torch.no_grad():
            share = self._unexplained(traced, gradients, scores.detach())
            signed = layer_cams(
                traced.maps,
                gradients,
                self.cam,
                scale=torch.ones_like(scores),
                keep_negative=True,
                frames=model.frames,
            )
            layer_maps = {
                layer: images.restacked(maps if self.keep_negative else maps.relu())
                for layer, maps in self._above_rounding(signed, flat, units.flatten(0, 1)).items()
            }
        return AttentionMaps(
            maps=fuse(list(layer_maps.values()), model.apart(list(layer_maps), flat_images)),
            layer_maps=layer_maps,
            weights=directions,
            scores=images.restacked(scores.detach()),
            embeddings=units,
            warnings=self._warnings(signed, share),
            unexplained=None if share is None else images.restacked(share),
        ).detached()

    def _above_rounding(
        self, signed: dict[str, Tensor], directions: Tensor, units: Tensor
    ) -> dict[str, Tensor]:
        """Maps with those set to zero that are rounding: of cosines as large as they can be."""
        if self.score != "cosine":
            return signed
        seen = (slack_of(directions, units) > floor_of(directions)).view(-1, 1, 1)
        return {layer: maps * seen for layer, maps in signed.items()}

    def _unexplained(
        self, traced: Trace, gradients: dict[str, Tensor], scores: Tensor
    ) -> Tensor | None:
        """The largest share of any layer ``(M,)``; gradients times maps are what positions add."""
        if self.score == "cosine":
            return None
        maps = traced.maps
        sums = [(gradients[layer] * maps[layer]).sum(dim=(1, 2, 3)) for layer in maps]
        return torch.stack([unexplained_share(scores, one.to(scores)) for one in sums]).amax(dim=0)

    def _warnings(self, signed: dict[str, Tensor], share: Tensor | None) -> tuple[str, ...]:
        if share is not None:
            return unexplained_share_warning(float(share.max()), " x ".join(signed))
        cancelled = [
            layer
            for layer, maps in signed.items()
            if bool(
                (maps.sum(dim=(1, 2)).abs() < _CANCELS_BELOW * maps.abs().sum(dim=(1, 2))).any()
            )
        ]
        if not cancelled:
            return ()
        return (
            f"At layer {cancelled[0]} the evidence for and against cancels exactly, as the cosine "
            "does not change with the length of the vector; the map shows where, not how much, and "
            "score='held' does both.",
        )
