"""Similarity attention: why is the anchor close to its positives and far from its negatives?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simexplain.arguments import typed
from simexplain.comparison import Comparison
from simexplain.errors import ComparisonError
from simexplain.methods.layer_maps import check_cams, fuse, layer_cams
from simexplain.methods.method import AttentionMaps, Method, check_embeddings
from simexplain.methods.weights import FLAT_BELOW, flat_factors, scaled_weights, weight_rule
from simexplain.models.base import SimilarityModel
from simexplain.models.moving import Region
from simexplain.tracing import Trace, trace

_HALF_SCALE = 1024.0
_SMALLEST_LOG = -60.0


@dataclass(frozen=True)
@typed
class SimilarityAttention(Method):
    """Similarity attention as published (section 3.1, Eq. 2), with its open questions as options.

    Attributes:
        weights: A rule in ``WEIGHTS``; ``paper`` is the published one.
        cam: A formula in ``CAMS`` for all layers, or one per layer. None is the published
            Grad-CAM at the last layer and, where several layers are fused, LayerCAM at the others
            (pooled gradients mean little at finer layers).
        through_weights: Let the gradient also pass through the weight vector; the paper does not
            say. Held constant otherwise, as Grad-CAM holds its class weights.
        keep_negative: Leave out the final ReLU of Eq. 2, so that evidence against the score stays
            as negative values.
    """

    weights: str = "paper"
    cam: str | tuple[str, ...] | None = None
    through_weights: bool = False
    keep_negative: bool = False

    def __post_init__(self) -> None:
        weight_rule(self.weights)
        check_cams(self.cam)

    def attribute(
        self,
        model: SimilarityModel,
        images: Comparison,
        layers: Sequence[str],
        max_batch: int | None,
    ) -> AttentionMaps:
        """One forward and one backward pass serve the whole batch."""
        flat = images.stacked().flatten(0, 1)
        taped = model.unmeasured(layers, flat)
        traced = trace(model, flat, layers, max_batch=max_batch, taped=taped, by_rows=True)
        model.measure(flat, traced)
        apart = model.apart(layers, flat)
        return self.attend(traced, images, apart=apart, frames=model.frames).detached()

    def attend(
        self,
        traced: Trace,
        images: Comparison,
        *,
        create_graph: bool = False,
        apart: Sequence[Region] = (),
        frames: int = 1,
    ) -> AttentionMaps:
        """Maps from a pass that has been made already; differentiable if ``create_graph``.

        Args:
            traced: A trace of ``images.stacked().flatten(0, 1)``.
            images: Tells which image has which role; its values are not read.
            create_graph: Keep the maps differentiable, for training.
            apart: Where in the joined map each layer's own lies; all over it unless given.
            frames: Of how many frames below each other the images are made.
        """
        if not images.unit:
            raise ComparisonError(
                "Similarity attention weighs dimensions by how two embeddings agree there, which a "
                "direction does not have; use similarity_cam, focus, decomposition or a method on "
                "pixels."
            )
        check_embeddings(images.restacked(traced.embeddings.detach()), images.roles)
        with torch.enable_grad():  # also where the caller has switched it off
            rows = images.restacked(traced.embeddings)
            embeddings = images.like(rows)
        with torch.set_grad_enabled(create_graph):
            weights, log_scale = scaled_weights(
                embeddings if create_graph and self.through_weights else images.like(rows.detach()),
                self.weights,
            )
        with torch.enable_grad():
            # Each image's score may only move its own map: sums over images are then exact.
            total = (self._live_weights(embeddings, weights) * rows).sum() * _HALF_SCALE
        gradients = traced.gradients(total, create_graph=create_graph)
        # Published weights where they can be represented, else the maps keep the factor.
        scale = torch.where(log_scale > _SMALLEST_LOG, log_scale, 0.0).exp() / _HALF_SCALE
        with torch.set_grad_enabled(create_graph):
            layer_maps = layer_cams(
                traced.maps,
                gradients,
                self.cam,
                scale=scale.repeat_interleave(images.count),
                keep_negative=self.keep_negative,
                frames=frames,
            )
            layer_maps = {layer: images.restacked(maps) for layer, maps in layer_maps.items()}
            published = weights * log_scale.exp().unsqueeze(1)
            return AttentionMaps(
                maps=fuse(list(layer_maps.values()), apart),
                layer_maps=layer_maps,
                weights=published,
                scores=(published.unsqueeze(1) * rows).sum(dim=2),
                embeddings=rows,
                warnings=self._warnings(images.like(rows.detach()), weights, log_scale),
            )

    def _live_weights(self, embeddings: Comparison, weights: Tensor) -> Tensor:
        """Weights for every image ``(B,K,E)``, optionally with a graph to that image alone."""
        count = embeddings.count
        if not self.through_weights:
            return weights.detach().unsqueeze(1).expand(-1, count, -1)
        rows = embeddings.stacked()
        own = []
        for position in range(count):
            alone = rows.detach().clone()
            alone[:, position] = rows[:, position]
            own.append(scaled_weights(embeddings.like(alone), self.weights)[0])
        return torch.stack(own, dim=1)

    def _warnings(
        self, embeddings: Comparison, weights: Tensor, log_scale: Tensor
    ) -> tuple[str, ...]:
        warnings = []
        flat = flat_factors(embeddings, self.weights)
        if flat and not embeddings.negatives.shape[1]:
            warnings.append(
                f"The weights hardly tell the dimensions apart (the factor of the {flat[0]}, flat "
                f"below {FLAT_BELOW}), so the maps show where anything is rather than what is "
                "alike; weights='relative' repairs that."
            )
        elif self.weights == "paper" and embeddings.negatives.shape[1]:
            acts = f"; the factor of the {flat[0]}, so it hardly acts" if flat else ""
            warnings.append(
                "The published weights have no sign, so dimensions on which a negative is strong "
                f"pull the maps towards it{acts}; weights='signed' keeps only what sets the anchor "
                "apart."
            )
        if bool((weights.amax(dim=1) <= 0).any()):
            warnings.append(
                "All weights of a comparison are zero (are two images identical?), so its maps are "
                "empty."
            )
        if bool((log_scale <= _SMALLEST_LOG).any()):
            warnings.append(
                f"A product of {embeddings.members - 1} factors is too small for its number type; "
                "the maps of that comparison are scaled up by a constant."
            )
        return tuple(warnings)
