"""From options to a network and its objective."""

from __future__ import annotations

from dataclasses import replace

import torch

from simexplain.errors import ModelError
from simexplain.losses.attention import last_linear
from simexplain.losses.avsl_objective import ABLATIONS, AVSLLoss
from simexplain.losses.classification import (
    ClassHead,
    ClassificationLoss,
    ClassificationMiningLoss,
)
from simexplain.losses.constraint import AttentionMaskLoss
from simexplain.losses.metric_losses import metric_loss
from simexplain.losses.mining import SimilarityMiningLoss, named_layers
from simexplain.losses.objective import Objective, Term
from simexplain.models.avsl import AVSL
from simexplain.models.avsl_options import AVSLOptions
from simexplain.models.avsl_parts import LEVELS
from simexplain.models.backbones import build_backbone
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model
from simexplain.networks import find_layer, split_call
from simexplain.training.limits import mining_of
from simexplain.training.options import TrainOptions


def build_model(options: TrainOptions) -> SimilarityModel:
    """The network as it is before training; the caller's random state stays as it is.

    Raises:
        ModelError: If it cannot be built, or has no linear layer for the embedding.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        outputs = 0 if options.avsl else options.embedding
        built = build_backbone(
            options.backbone, pretrained=options.pretrained, outputs=outputs, size=options.size
        )
        model = as_similarity_model(
            built.network,
            preprocess=built.preprocess,
            distance=options.distance,
            name=built.title or built.name,
        )
        model.backbone = built.name
        _check_maps(model, options)
        # The same numbers in another order: a step of EfficientNet-Lite0 takes 0.6 of the time.
        model.to(memory_format=torch.channels_last)
        if options.avsl:
            return _avsl(model, options)
    last = last_linear(model.network)
    if last is None or last.out_features * built.parts != options.embedding:
        raise ModelError(
            f"Expected a network that ends in a linear layer, which {options.backbone} does not; "
            "choose another backbone."
        )
    return model


def _check_maps(model: SimilarityModel, options: TrainOptions) -> None:
    """Attention is drawn from maps, which a picture of a few pixels does not leave."""
    if options.size is None:
        return
    try:
        _ = model.default_layer
    except ModelError as error:
        height, width = options.size
        raise ModelError(
            f"Expected a size at which {options.backbone} has maps over the image, got "
            f"{height}x{width}; choose a larger one (--size)."
        ) from error


def _avsl(base: SimilarityModel, options: TrainOptions) -> AVSL:
    """AVSL over a network, or the part of it that a row of Table 2 has."""
    ablation = ABLATIONS[options.ablation]
    levels = ablation.levels(options.levels or base.stages[-LEVELS:])
    return AVSL(
        base,
        levels=levels,
        nodes=options.embedding,
        preset=avsl_settings(options),
        origin="trained",
    )


def avsl_settings(options: TrainOptions) -> AVSLOptions:
    """How the graph of AVSL is computed."""
    preset = ABLATIONS[options.ablation].options(options.preset)
    return replace(
        preset, k=options.edges_per_node, momentum=options.edge_momentum, eta=options.eta
    )


def build_objective(model: SimilarityModel, options: TrainOptions, classes: int) -> Objective:
    """All terms of the loss; the caller's random state stays as it is.

    Args:
        model: From :func:`build_model`.
        options: Of the run.
        classes: How many there are to train on.

    Raises:
        ModelError: If the settings of a loss or of mining do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed + 1)
        try:
            if (named := mining_of(options).layer) is not None:
                for layer in named_layers(named, model):
                    find_layer(model.network, split_call(layer)[0])
            terms = {**_base(model, options, classes), **_more(options, classes)}
        except ModelError:
            raise
        except (TypeError, ValueError, AssertionError) as error:
            why = " ".join(str(error).split()).rstrip(".")
            raise ModelError(f"The settings of the loss or of mining do not fit: {why}.") from error
    return Objective(terms)


def _base(
    model: SimilarityModel, options: TrainOptions, classes: int
) -> dict[str, tuple[float, Term]]:
    settings = dict(options.loss_options)
    if not isinstance(model, AVSL):
        return {"metric": (1.0, metric_loss(options.loss, classes, options.embedding, **settings))}
    term = AVSLLoss(
        model,
        options.loss,
        classes=classes,
        weights=options.level_weights[-len(model.levels) :] or 1.0,
        level_settings=settings,
    )
    return {"avsl": (1.0, term)}


def _more(options: TrainOptions, classes: int) -> dict[str, tuple[float, Term]]:
    """Mining, the baselines of Table 1, and masks."""
    terms: dict[str, tuple[float, Term]] = {}
    mining = mining_of(options)
    if options.mining != "none":
        terms["mining"] = (options.gamma, SimilarityMiningLoss(mining))
    if options.bce:
        head = ClassHead(classes, options.embedding)
        terms["bce"] = (options.bce, ClassificationLoss(head))
        if options.bce_mining:
            term = ClassificationMiningLoss(head, mining)
            terms["bce_mining"] = (options.bce_mining, term)
    if options.mask_weight:
        masks = AttentionMaskLoss(inside=options.mask_side == "inside", arch=mining.arch)
        terms["masks"] = (options.mask_weight, masks)
    return terms


def check_present(options: TrainOptions) -> None:
    """Refuses devices that this host does not have, before lightning does.

    Raises:
        ModelError: If there are fewer than requested, or none.
    """
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    apple = int(torch.backends.mps.is_available())
    wanted = options.accelerator
    there = {"gpu": cards or apple, "mps": apple}.get(wanted)
    if wanted == "auto" and (cards or apple):
        there = cards or apple
    if there is not None and there < options.devices:
        what = "GPU" if wanted != "mps" else "Apple GPU"
        raise ModelError(
            f"Expected {options.devices} {what}{'s' * (options.devices > 1)} on this host, found "
            f"{there or 'none'}; say --accelerator cpu or fewer --devices."
        )
