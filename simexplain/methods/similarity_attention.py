"""Similarity attention: why is the anchor close to its positives and far from its negatives?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simexplain.arguments import typed
from simexplain.comparison import Comparison, roles
from simexplain.errors import ComparisonError, check_choice
from simexplain.methods.cams import check_cams, fuse, layer_cams
from simexplain.methods.method import AttentionMaps, Method, Task, check_embeddings
from simexplain.models.moving import Region
from simexplain.option_fields import option
from simexplain.tracing import Trace, trace

FLAT_BELOW = 0.05
"""A factor whose coefficient of variation is smaller hardly separates dimensions."""


@dataclass(frozen=True)
class WeightRule:
    """How much one dimension speaks for "alike" with a positive, or "different" from a negative.

    Attributes:
        positive: ``(anchor, positives) -> factors``, each ``(...,E)``, non-negative.
        negative: ``(anchor, negatives) -> factors``, likewise.
        about: One line for help texts.
    """

    positive: Callable[[Tensor, Tensor], Tensor]
    negative: Callable[[Tensor, Tensor], Tensor]
    about: str


def _agreement(anchor: Tensor, other: Tensor) -> Tensor:
    return 1 - (anchor - other).abs()


def _relative_agreement(anchor: Tensor, other: Tensor) -> Tensor:
    size = anchor.abs() + other.abs()
    # Where neither image is active there is nothing to agree on.
    return torch.where(size > 0, 1 - (anchor - other).abs() / size.clamp_min(1e-30), 0.0)


def _difference(anchor: Tensor, other: Tensor) -> Tensor:
    return (anchor - other).abs()


def _excess(anchor: Tensor, other: Tensor) -> Tensor:
    return (anchor - other).relu()


WEIGHTS: dict[str, WeightRule] = {
    "paper": WeightRule(_agreement, _difference, "as published: 1-|a-p| and |a-n|"),
    "relative": WeightRule(
        _relative_agreement, _difference, "relative to their size: 1-|a-p|/(|a|+|p|) and |a-n|"
    ),
    "signed": WeightRule(
        _agreement, _excess, "only what the anchor has and the negative lacks: relu(a-n)"
    ),
}
"""Every weight rule by name; a new rule is one line here."""


def weight_rule(name: str) -> WeightRule:
    """The rule of this name.

    Raises:
        ComparisonError: If there is none.
    """
    check_choice("weights", name, WEIGHTS)
    return WEIGHTS[name]


@typed
def similarity_weights(embeddings: Comparison, rule: str = "paper") -> Tensor:
    """The weight vector of each comparison: the product of one factor per other image.

    Similarity attention, section 3.1 and 3.1.1:
    ``w = prod over positives (1 - |a - p|) * prod over negatives |a - n|``, element by element;
    an empty product is one.

    Args:
        embeddings: Unit vectors, ``S = (E,)``.
        rule: A name in :data:`WEIGHTS`.

    Returns:
        Shape ``(B,E)``, non-negative. Differentiable.
    """
    weights, log_scale = scaled_weights(embeddings, rule)
    return weights * log_scale.exp().unsqueeze(1)


def scaled_weights(embeddings: Comparison, rule: str = "paper") -> tuple[Tensor, Tensor]:
    """The weights with every factor divided by its row maximum, so that no product underflows.

    Returns:
        ``weights (B,E)`` and ``log_scale (B,)``, constant in the graph: the published weights
        are ``weights * exp(log_scale)``.
    """
    product = torch.ones_like(embeddings.anchor)
    log_scale = product.new_zeros(embeddings.batch)
    for factor in _factors(embeddings, weight_rule(rule)):
        # The running product is scaled as well: factors may peak at different dimensions.
        product = product * factor
        top = product.detach().amax(dim=1)
        top = torch.where(top > 0, top, torch.ones_like(top))
        product = product / top.unsqueeze(1)
        log_scale = log_scale + top.log()
    return product, log_scale


def flat_factors(embeddings: Comparison, rule: str = "paper") -> list[str]:
    """Which factors hardly tell dimensions apart: their role, number and variation.

    Returns:
        One phrase for each factor whose coefficient of variation (standard deviation over mean,
        over the dimensions) is below :data:`FLAT_BELOW` in any comparison of the batch.
    """
    factors = []
    others = roles(embeddings.positives.shape[1], embeddings.negatives.shape[1])[1:]
    for number, (role, factor) in enumerate(
        zip(others, _factors(embeddings, weight_rule(rule)), strict=True), start=1
    ):
        mean = factor.mean(dim=1)
        variation = factor.std(dim=1, correction=0) / mean.clamp_min(1e-30)
        flat = (mean > 0) & (variation < FLAT_BELOW)
        if bool(flat.any()):
            factors.append(f"{role} in place {number} varies by {float(variation[flat].min()):.3f}")
    return factors


def _factors(embeddings: Comparison, rule: WeightRule) -> list[Tensor]:
    """One factor ``(B,E)`` for each image beside the anchor, positives first."""
    anchor = embeddings.anchor.unsqueeze(1)
    positives = rule.positive(anchor, embeddings.positives)
    negatives = rule.negative(anchor, embeddings.negatives)
    return [*positives.unbind(1), *negatives.unbind(1)]


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

    weights: str = option(
        "paper",
        "Rule for the weights of sam. "
        + "; ".join(f"{name}: {rule.about}" for name, rule in WEIGHTS.items()) + ".",
        names=WEIGHTS, group="Method",
    )  # fmt: skip
    cam: str | tuple[str, ...] | None = None
    through_weights: bool = option(
        False, "Let the gradient of sam pass through its weights.", group="Method"
    )
    keep_negative: bool = option(False, "Keep negative evidence in the saved maps.", group="Method")

    def __post_init__(self) -> None:
        weight_rule(self.weights)
        check_cams(self.cam)

    def attribute(self, task: Task) -> AttentionMaps:
        """One forward and one backward pass serve the whole batch."""
        model, images, layers, max_batch = task
        flat = images.stacked().flatten(0, 1)
        taped = model.unmeasured(layers, flat)
        by_rows = model.of_tokens(layers, flat)
        traced = trace(model, flat, layers, max_batch=max_batch, taped=taped, by_rows=by_rows)
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
