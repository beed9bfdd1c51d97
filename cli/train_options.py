"""The options of ``simexplain train``: one line for each setting of a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from simexplain.training.limits import RANGES, choices
from simexplain.training.options import TrainOptions

from .options import OneOf, Size

F = TypeVar("F", bound=Callable[..., Any])
_OWN = TrainOptions()
_INTEGER, _NUMBER = re.compile(r"[+-]?\d+"), re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.I)


class Pair(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """``NAME=VALUE``; the value becomes a number or a truth value where it reads as one."""

    name = "NAME=VALUE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Any]:
        """The pair."""
        name, sign, said = str(value).partition("=")
        if not sign or not name.isidentifier():
            self.fail(f"expected NAME=VALUE such as margin=0.2, got {value!r}.")
        if _INTEGER.fullmatch(said):
            return name, int(said)
        if _NUMBER.fullmatch(said):
            return name, float(said)
        return name, {"true": True, "false": False}.get(said, said)


class Numbers(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """``1,2,4,8``."""

    name = "N,N,..."

    def __init__(self, kind: type = int) -> None:
        self.kind = kind

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """The numbers."""
        try:
            return tuple(self.kind(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"expected numbers with commas in between, got {value!r}.")


HELP = {
    "backbone": "The network: timm:NAME, torchvision:NAME, pcb:timm:NAME.",
    "pretrained": "Start from the zoo's weights.",
    "embedding": "Width of the embedding; with --avsl nodes of each level.",
    "size": "Input size in pixels. [the network's own]",
    "distance": "Between embeddings.",
    "avsl": "Train AVSL, which simexplain attribute takes apart.",
    "preset": "AVSL as in the paper or as in its authors' code.",
    "levels": "A layer of AVSL; repeat. [the last three stages]",
    "eta": "How certainties enter AVSL's reliabilities.",
    "edge_momentum": "Share of AVSL's edges that a step keeps.",
    "k": "How many lower nodes stand in for a higher one.",
    "ablation": "A row of AVSL's Table 2.",
    "level_weights": "Of AVSL's levels in the loss, lowest first. [1 each]",
    "loss": "Metric loss.",
    "loss_options": "A setting of the loss; repeat.",
    "mining": "Similarity mining over such comparisons.",
    "gamma": "Weight of mining.",
    "mining_options": "A setting of mining, e.g. share=0.5; repeat.",
    "mining_start": "Epochs without mining at first.",
    "mining_warmup": "Epochs in which gamma then grows.",
    "bce": "Weight of a classification loss (Grad-CAM baseline).",
    "bce_mining": "Weight of mining with its Grad-CAM maps.",
    "mask_weight": "Weight of attention on the wrong side of masks.",
    "mask_side": "Which side of a mask shall be looked at.",
    "optimiser": "",
    "lr": "Learning rate of the network.",
    "head_lr": "Of embedding layer or AVSL's heads.",
    "proxy_lr": "Of proxies and what else a loss learns.",
    "reliability_lr": "Of AVSL's alpha and beta.",
    "weight_decay": "",
    "momentum": "Of sgd.",
    "schedule": "Of all learning rates.",
    "step_epochs": "Epochs between the steps of a schedule.",
    "step_factor": "What a step multiplies rates by.",
    "warmup_epochs": "First epochs that warm up.",
    "warmup": "By training all but the network, or by growing rates.",
    "clip": "Largest norm of a group's gradient; 0 for none.",
    "epochs": "",
    "classes": "Classes in a batch; 0 for 16, or all where there are fewer.",
    "each": "Pictures of each of them.",
    "steps": "Batches in an epoch; 0 for as many as there are pictures.",
    "augmentation": "How training pictures are varied.",
    "precision": "Bits of floating point; below 32 mixed.",
    "freeze_bn": "Keep batch norm's statistics as they came.",
    "seed": "",
    "workers": "Processes that read pictures.",
    "accelerator": "What to train on.",
    "devices": "GPUs, or processes on a CPU, that share each batch.",
    "nodes": "Hosts.",
    "eval_every": "Epochs between evaluations.",
    "ks": "K of Recall@K.",
    "grouped": "Leave each query's own group out of the gallery.",
    "best": "What the best model is chosen by.",
    "checkpoint_every": "Steps between checkpoints within an epoch; 0 for none.",
    "watch": "Validation triplets whose maps are drawn.",
}
"""What ``--help`` says of each setting, in the order of :class:`TrainOptions`."""

_TYPES: dict[str, Any] = {
    "size": Size(),
    "ks": Numbers(),
    "level_weights": Numbers(float),
    "loss_options": Pair(),
    "mining_options": Pair(),
}
_NAMES = {
    "levels": "--level", "loss_options": "--loss-option", "mining_options": "--mining-option",
}  # fmt: skip


def training_options(command: F) -> F:
    """Adds an option for every setting; those that were not given are None or empty."""
    tables = choices()
    for name in reversed(HELP):
        command = _option(name, tables)(command)
    return command


def given_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given, as ``train`` takes them."""
    return {name: given[name] for name in HELP if given[name] not in (None, ())}


def _option(name: str, tables: dict[str, tuple[str, ...]]) -> Callable[[F], F]:
    """One option; its default is only told, since a recipe may have another."""
    own, flag = getattr(_OWN, name), f"--{name.replace('_', '-')}"
    if isinstance(own, bool):
        said = "yes" if own else "no"
        return click.option(
            f"{flag}/--no-{flag[2:]}", name, default=None, help=f"{HELP[name]} [{said}]"
        )
    told = ",".join(map(str, own)) if isinstance(own, tuple) else own
    default = "" if told in (None, "") else f" [{told}]"
    many = name in _NAMES
    kind: Any = _TYPES.get(name) or (OneOf(tables[name]) if name in tables else type(own))
    if name in RANGES:
        least, most = RANGES[name]
        between: Any = click.FloatRange if isinstance(own, float) else click.IntRange
        kind = between(least, None if most == float("inf") else most)
    if name == "levels":
        kind = str
    said = f"{HELP[name]}{default}".strip()
    return click.option(_NAMES.get(name, flag), name, type=kind, multiple=many, help=said)
