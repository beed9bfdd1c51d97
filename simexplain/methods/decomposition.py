"""The similarity taken apart exactly: what each position of each image adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from simexplain.arguments import typed
from simexplain.comparison import Comparison
from simexplain.errors import ModelError
from simexplain.methods.directions import margin_directions
from simexplain.methods.layer_maps import fuse
from simexplain.methods.method import AttentionMaps, Method, check_embeddings
from simexplain.methods.position_parts import EXACT, MOST_STEPS, parts_of
from simexplain.methods.raw_vectors import trace_vectors
from simexplain.methods.unexplained import unexplained_share, unexplained_share_warning
from simexplain.models.base import SimilarityModel
from simexplain.networks import unit_rows

_FAR_OFF = 0.05


@dataclass(frozen=True)
@typed
class Decomposition(Method):
    """Activation decomposition (Zhu et al. 2019; Stylianou et al. 2019), signed and exact.

    Each image's score is its cosine to the positives minus that to the negatives, the others held.
    The map of an image at one layer is what each position adds to that score, by
    ``position_parts``. Biases and everything else that no position gives are spread evenly over the
    map, so that a map sums to its score; for tails that are not linear, up to an integration error,
    which a warning reports.

    Attributes:
        steps: Points of the quadrature for tails that are not linear.
        keep_negative: Leave the signs; else negative values are cut off, and no map adds up.
    """

    steps: int = 16
    keep_negative: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            raise ModelError(
                f"Expected steps of at least 1 and at most {MOST_STEPS}, got {self.steps}."
            )

    def attribute(
        self,
        model: SimilarityModel,
        images: Comparison,
        layers: Sequence[str],
        max_batch: int | None,
    ) -> AttentionMaps:
        """What each position adds; of several layers the positive parts are multiplied."""
        flat = images.stacked().flatten(0, 1)
        traced = trace_vectors(model, flat, layers, max_batch=max_batch)
        units = images.restacked(unit_rows(traced.vectors))
        check_embeddings(units, images.roles)
        directions = margin_directions(images.like(units))
        layer_maps, worst, shares = {}, 0.0, []
        for layer in layers:
            done = parts_of(
                traced, layer, directions=directions.flatten(0, 1).unsqueeze(0), steps=self.steps
            )
            rest = done.rest[:, 0, None, None] / done.parts[0, 0].numel()
            maps = images.restacked((done.parts[:, 0] + rest) / done.lengths[:, None, None])
            shares.append(unexplained_share(done.vectors[:, 0], done.parts.sum(dim=(1, 2, 3))))
            layer_maps[layer] = maps if self.keep_negative else maps.relu()
            if done.steps:
                worst = max(worst, float(done.residual.max()))
        share = images.restacked(torch.stack(shares).amax(dim=0))
        return AttentionMaps(
            maps=fuse(
                list(layer_maps.values()), model.apart(list(layer_maps), images.stacked()[:, 0])
            ),
            layer_maps=layer_maps,
            weights=directions,
            scores=(units * directions).sum(dim=2),
            embeddings=units,
            warnings=self._warnings(worst)
            + unexplained_share_warning(float(share.max()), " x ".join(layers)),
            unexplained=share,
        ).detached()

    def _warnings(self, worst: float) -> tuple[str, ...]:
        if worst <= EXACT:
            return ()
        advice = "" if worst < _FAR_OFF else "; more steps or a later layer bring it down"
        return (
            f"The tail above the layer is not linear, so {self.steps} Jacobians were averaged; the "
            f"maps add up to the score but for {worst:.1%} of the vector's length{advice}.",
        )
