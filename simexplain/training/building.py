"""From options to a network, its objective, its optimiser and the learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

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
from simexplain.losses.parameter_groups import parameter_groups
from simexplain.models.avsl import AVSL
from simexplain.models.avsl_options import AVSLOptions
from simexplain.models.avsl_parts import LEVELS
from simexplain.models.backbones import build_backbone
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model
from simexplain.networks import find_layer, split_call
from simexplain.training.options import TrainOptions, mining_of

_Build = Callable[[list[dict[str, Any]], TrainOptions], torch.optim.Optimizer]
OPTIMISERS: dict[str, _Build] = {
    "adamw": lambda groups, _: torch.optim.AdamW(groups),
    "adam": lambda groups, _: torch.optim.Adam(groups),
    "sgd": lambda groups, options: torch.optim.SGD(groups, momentum=options.momentum),
}
"""The optimisers by name, from parameter groups and options."""


def optimiser_for(
    model: SimilarityModel, objective: Objective, options: TrainOptions
) -> torch.optim.Optimizer:
    """The optimiser, its groups named as in ``parameter_groups``; empty ones are left out."""
    groups = parameter_groups(
        objective,
        model,
        learning_rate=options.lr,
        rates={
            "heads": options.head_lr,
            "proxies": options.proxy_lr,
            "reliability": options.reliability_lr,
        },
        weight_decay=options.weight_decay,
    )
    for group in groups:
        group["base"] = group["lr"]
        if group["name"] == "reliability":
            group["weight_decay"] = 0.0  # alpha of 0 is not simpler than any other
    return OPTIMISERS[options.optimiser](groups, options)


def _constant(options: TrainOptions, epoch: float) -> float:
    return 1.0


def _cosine(options: TrainOptions, epoch: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, epoch / options.epochs)))


SCHEDULES: dict[str, Callable[[TrainOptions, float], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "step": lambda options, epoch: options.step_factor ** (int(epoch) // options.step_epochs),
}
"""Factors of the learning rates from the options and how many epochs are over, with fractions."""


def rate_factor(options: TrainOptions, group: str, step: int, steps: int) -> float:
    """What the learning rate of a group is multiplied by.

    Args:
        options: The schedule and the warm-up.
        group: The name of the group.
        step: Steps taken so far, from 0.
        steps: Steps of an epoch.

    Returns:
        At least 0; 0 for the network while only the rest is trained.
    """
    factor = SCHEDULES[options.schedule](options, step / steps)
    if step >= options.warmup_epochs * steps:
        return factor
    if options.warmup == "head":
        return 0.0 if group == "network" else factor
    return factor * (step + 1) / (steps * options.warmup_epochs)


def mining_factor(options: TrainOptions, step: int, steps: int) -> float:
    """What gamma is multiplied by, in [0, 1]: nothing at first, then a linear growth."""
    since = step - options.mining_start * steps
    if since < 0:
        return 0.0
    growth = options.mining_warmup * steps
    return min(1.0, (since + 1) / growth) if growth else 1.0


def set_rates(
    optimiser: torch.optim.Optimizer, options: TrainOptions, step: int, steps: int
) -> None:
    """Gives every group its learning rate of this step."""
    for group in optimiser.param_groups:
        group["lr"] = group["base"] * rate_factor(options, group["name"], step, steps)


def drop_idle(optimiser: torch.optim.Optimizer) -> None:
    """Groups at rate 0 get no gradient, so that not even their moments move."""
    for group in optimiser.param_groups:
        if group["lr"] == 0:
            for parameter in group["params"]:
                parameter.grad = None


def clip_groups(optimiser: torch.optim.Optimizer, most: float) -> None:
    """Bounds the norm of the gradient of each group, as AVSL's published code does."""
    if most:
        for group in optimiser.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], most)


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
