"""Optimisers, their groups of parameters, and learning rates as functions of the step alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from simexplain.losses.objective import Objective
from simexplain.losses.parameter_groups import parameter_groups
from simexplain.models.base import SimilarityModel
from simexplain.training.options import TrainOptions

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
