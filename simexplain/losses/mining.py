"""Similarity mining: what is left when the attended regions are hidden shall decide nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch.func import functional_call

from simexplain.arguments import typed
from simexplain.comparison import Comparison
from simexplain.errors import ComparisonError, ModelError
from simexplain.losses.attention import scaled_images
from simexplain.losses.inputs import similarity_model
from simexplain.losses.masking import soft_mask
from simexplain.losses.mining_rules import MINING, mining_loss
from simexplain.losses.objective import Batch, Term, unit_rows
from simexplain.losses.own_images import Own, own_maps
from simexplain.losses.settings import check_kind
from simexplain.losses.statistics import statistics_kept
from simexplain.losses.tuples import SHAPES, Tuples, disjoint_tuples
from simexplain.methods.layer_maps import check_cams
from simexplain.methods.scoring import check_choice, filled
from simexplain.methods.weights import scaled_weights, weight_rule
from simexplain.metrics.fills import FILLS
from simexplain.models.base import SimilarityModel
from simexplain.tracing import trace

ZERO = "zero"
"""The fill of the paper: hidden pixels are multiplied by zero."""


@dataclass(frozen=True)
class MiningOptions:
    """How similarity mining is done; the defaults are the paper's where it states one.

    Attributes:
        arch: ``siamese`` (Eq. 4), ``triplet`` (Eq. 3) or ``quadruplet`` (Eq. 5).
        weights: The rule of the weight vector, a key of ``WEIGHTS``.
        rule: How Eq. 3 is read, a key of :data:`MINING`.
        alpha: Steepness of the soft mask.
        beta: Where on the scaled map a pixel is half hidden.
        fill: What hidden pixels show: ``zero``, which is the mean colour of the data that the
            network was trained on, or a key of ``FILLS``, such as ``border`` and ``blur``.
        layer: The layer of the maps, or several with commas between, whose maps are multiplied;
            the model's default layer unless given.
        cam: The formula of the maps at all layers, a key of ``CAMS``; Grad-CAM (Eq. 2) at the
            coarsest and LayerCAM at finer ones unless given.
        share: Mine only the hardest share of the comparisons of a batch, in (0, 1].
        masked_scale: Size of the masked images relative to the images; 0.5 makes them cheaper.
        through_mask: Let the gradient also pass through mask and map, as the paper does.
        through_network: Let the second look train the network as well, as the paper does; without
            it the network that judges hidden images is held, so that attention alone learns.
    """

    arch: str = "triplet"
    weights: str = "paper"
    rule: str = "absolute"
    alpha: float = 10.0
    beta: float = 0.5
    fill: str = ZERO
    layer: str | None = None
    cam: str | None = None
    share: float = 1.0
    masked_scale: float = 1.0
    through_mask: bool = True
    through_network: bool = True

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(MiningOptions).items():
            check_kind(name, getattr(self, name), kind, ComparisonError)
        check_choice("arch", self.arch, SHAPES)
        weight_rule(self.weights)
        check_cams(self.cam)
        check_choice("the mining rule", self.rule, MINING)
        check_choice("fill", self.fill, {ZERO: None, **FILLS})
        if not 0 < self.masked_scale <= 1 or not 0 < self.share <= 1:
            raise ComparisonError(
                f"Expected share and masked_scale in (0, 1], got {self.share} and "
                f"{self.masked_scale}."
            )
        if not self.alpha > 0:
            raise ComparisonError(f"Expected alpha above 0, got {self.alpha}.")
        if not (self.through_mask or self.through_network):
            raise ComparisonError(
                "Expected through_mask or through_network to be true, got false for both, which "
                "would train nothing; leave one of them on."
            )


def mining_options(options: MiningOptions, changes: Mapping[str, Any]) -> MiningOptions:
    """Options with some of them replaced.

    Raises:
        ComparisonError: If the option does not exist, or its value cannot be used.
    """
    known = [field.name for field in fields(MiningOptions)]
    if unknown := [name for name in changes if name not in known]:
        raise ComparisonError(
            f"Expected options of mining among {', '.join(known)}, got {unknown[0]!r}."
        )
    return replace(options, **changes)


class MiningTerm(Term):
    """What terms that hide attention have in common: options, a layer, comparisons of a batch."""

    @typed
    def __init__(self, options: MiningOptions | None = None, **changes: object) -> None:
        """Takes options, or changes to the default ones by name.

        Raises:
            ComparisonError: If the option does not exist, or its value cannot be used.
        """
        super().__init__()
        self.options = mining_options(options or MiningOptions(), changes)

    def layers(self, model: SimilarityModel) -> tuple[str, ...]:
        """The layers of the maps."""
        return named_layers(self.options.layer, model)

    def layers_for(self, model: SimilarityModel, images: Tensor) -> tuple[str, ...]:
        """The layers of the maps for images of this size."""
        return named_layers(self.options.layer, model, images)

    def comparisons(self, batch: Batch) -> Tuples:
        """Those that :func:`disjoint_tuples` finds.

        Raises:
            ComparisonError: If there is none.
        """
        return disjoint_tuples(
            batch.units,
            batch.labels,
            self.options.arch,
            share=self.options.share,
            generator=batch.generator,
        )


class SimilarityMiningLoss(MiningTerm):
    """``L_sm`` as a term of an :class:`Objective`, or alone on a :class:`Comparison` of images.

    As a term it picks disjoint comparisons out of the batch, so it costs one more forward and
    backward pass of the batch and no more. Maps come from the pass that all terms share.
    """

    def forward(self, batch: Batch) -> Tensor:
        """The loss of the comparisons that are found in the batch."""
        return mined(batch, self.comparisons(batch), self.options)

    def on(self, model: nn.Module, images: Comparison) -> Tensor:
        """The loss of comparisons of preprocessed images, in the model's present modes.

        Args:
            model: The model in training, as for :class:`Objective`.
            images: Pairs, triplets, quadruplets or any set of images ``(3,H,W)``.
        """
        model = similarity_model(model)
        flat = images.stacked().flatten(0, 1)
        traced = trace(model, flat, self.layers_for(model, flat), differentiable=True)
        places = torch.arange(len(flat), device=flat.device).view(images.batch, images.count)
        batch = Batch.alone(model, flat, traced)
        return mined(batch, Tuples(places, images.positives.shape[1]), self.options)


def named_layers(
    layer: str | None, model: SimilarityModel, images: Tensor | None = None
) -> tuple[str, ...]:
    """The layers that an option names, with commas between.

    None stands for the model's default layer, for images ``(M,C,H,W)`` where they are given.
    """
    if layer is None:
        layer = model.default_layer if images is None else model.default_for(images)
    return tuple(layer.replace(" ", "").split(","))


def mined(batch: Batch, tuples: Tuples, options: MiningOptions) -> Tensor:
    """The mining loss of given comparisons, whose images each occur at most once."""
    return mined_along(batch, tuples, tuple_weights(batch, tuples, options.weights), options)


def tuple_weights(batch: Batch, tuples: Tuples, rule: str) -> Tensor:
    """The weight vector of its comparison for each image of all comparisons ``(T*K,E)``."""
    weights = scaled_weights(tuples.of(batch.units.detach()), rule)[0]
    return weights.unsqueeze(1).expand(-1, tuples.places.shape[1], -1).flatten(0, 1)


def mined_along(batch: Batch, tuples: Tuples, weights: Tensor, options: MiningOptions) -> Tensor:
    """Hides what the maps of scores ``w . f`` show and takes the mining rule of what is left.

    Args:
        batch: The pass, opened at the layers of the maps.
        tuples: Comparisons whose images each occur at most once.
        weights: The weight vector of each image of all comparisons ``(T*K,E)``, held constant.
        options: How masks are made; its weight rule is not read.
    """
    own = Own.of(batch, tuples.places.flatten())
    with torch.set_grad_enabled(torch.is_grad_enabled() and options.through_mask):
        layers = named_layers(options.layer, batch.model, batch.images)
        maps = own_maps(batch, own, weights, layers, options.cam)
    images = batch.images[own.which]
    masked = soft_mask(
        images, maps, alpha=options.alpha, beta=options.beta, ground=_ground(batch, images, options)
    )
    hidden = batch.units.new_zeros(0, batch.units.shape[1])
    if len(masked):
        looked_at = scaled_images(masked, options.masked_scale)
        hidden = embed_again(batch.model, looked_at, held=not options.through_network)
    stack = own.together(batch, hidden).view(*tuples.places.shape, -1)
    return mining_loss(tuples.arranged(stack), options.rule)


def _ground(batch: Batch, images: Tensor, options: MiningOptions) -> Tensor | None:
    """What shows where images are hidden, in place of zeros."""
    return None if options.fill == ZERO else filled(batch.model, images, options.fill)


class _Look(nn.Module):
    """A model whose call gives embeddings, as ``functional_call`` wants it."""

    @typed
    def __init__(self, model: SimilarityModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.embed(images)


def _held(model: SimilarityModel, images: Tensor) -> Tensor:
    """Embeddings of which no gradient reaches the model's parameters."""
    look = _Look(model)
    fixed = {name: part.detach() for name, part in look.named_parameters()}
    rows: Tensor = functional_call(look, fixed, (images,))
    return rows


def embed_again(model: SimilarityModel, images: Tensor, *, held: bool = False) -> Tensor:
    """Unit embeddings of masked images, which must not move batch-norm statistics.

    Args:
        model: The model in training.
        images: ``(m,3,H,W)``.
        held: Hold its parameters constant: a gradient reaches the images alone.

    Raises:
        ModelError: If the model cannot take images of this size.
    """
    with statistics_kept(model):
        try:
            return unit_rows(model, _held(model, images) if held else model.embed(images))
        except RuntimeError as error:
            if "size" not in str(error.__cause__ or error):
                raise
            raise ModelError(
                f"The model does not take masked images of {tuple(images.shape[2:])}; "
                "leave masked_scale at 1."
            ) from error
