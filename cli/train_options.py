"""The options of ``simexplain train``: one line for each setting of a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from simexplain.training.options import RANGES, TrainOptions, choices

from .options import RANKS_TYPE, Numbers, OneOf, Size, joined

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
        name, sign, text = str(value).partition("=")
        if not sign or not name.isidentifier():
            self.fail(f"expected NAME=VALUE such as margin=0.2, got {value!r}.")
        if _INTEGER.fullmatch(text):
            return name, int(text)
        if _NUMBER.fullmatch(text):
            return name, float(text)
        return name, {"true": True, "false": False}.get(text, text)


HELP = {
    "backbone": "Network of a zoo: timm:NAME, torchvision:NAME or pcb:timm:NAME.",
    "pretrained": "Random weights: or, with --pretrained, those of the zoo.",
    "embedding": "Width of the embedding; with --avsl nodes of each level.",
    "size": "Input size in pixels. [the model's own]",
    "distance": "Distance between embeddings.",
    "avsl": "Train AVSL, whose distances simexplain attribute explains.",
    "preset": "AVSL as in the paper or as in its authors' code.",
    "levels": "Layer that makes a level of AVSL; repeat. [the last three stages]",
    "eta": "How certainties enter AVSL's reliabilities.",
    "edge_momentum": "Share of AVSL's edges that a step keeps.",
    "edges_per_node": "How many lower nodes each node of AVSL is tied to.",
    "ablation": "A row of AVSL's Table 2.",
    "level_weights": "Weights of AVSL's levels in the loss, lowest first. [1 each]",
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
    "mask_side": "Which side of a mask should be looked at.",
    "optimiser": "Optimiser.",
    "lr": "Learning rate of the network.",
    "head_lr": "Learning rate of the embedding layer or of AVSL's heads.",
    "proxy_lr": "Learning rate of what the loss learns, such as proxies.",
    "reliability_lr": "Learning rate of AVSL's alpha and beta.",
    "weight_decay": "Weight decay.",
    "momentum": "Momentum of sgd.",
    "schedule": "How all learning rates change.",
    "step_epochs": "Epochs between the steps of a schedule.",
    "step_factor": "What a step multiplies the rates by.",
    "warmup_epochs": "Epochs at first that warm up.",
    "warmup": "How to warm up: train all but the network, or let rates grow.",
    "clip": "Largest norm of a group's gradient; 0 for none.",
    "epochs": "Passes over the pictures.",
    "classes_per_batch": "Classes in a batch; 0 for 16, or all where there are fewer.",
    "images_per_class": "Images of each class in a batch.",
    "batches_per_epoch": "Batches in an epoch; 0 for enough to draw as many pictures as DATA has.",
    "augmentation": "How training pictures are varied at random.",
    "precision": "Bits of floating point numbers; fewer than 32 are mixed precision.",
    "freeze_bn": "Keep the statistics of batch norm as they are.",
    "seed": "Random seed.",
    "workers": "Processes that read pictures.",
    "accelerator": "Where to run.",
    "devices": "Processes on each host: GPUs, where there are; they share each batch.",
    "nodes": "Hosts: they must share one folder.",
    "eval_every": "Epochs between evaluations.",
    "ranks": "Ranks to report: the K of Recall@K.",
    "grouped": "Leave the query's own group, as DATA has it, out of the gallery.",
    "best": "What the best model is chosen by.",
    "checkpoint_every": "Steps between checkpoints within an epoch; 0 for none.",
    "attention_triplets": "Validation triplets whose attention is drawn each epoch.",
}
"""Help texts of the settings, in the order of :class:`TrainOptions`."""

_TYPES: dict[str, Any] = {
    "size": Size(),
    "ranks": RANKS_TYPE,
    "level_weights": Numbers(float, "1 or 0.5,1,2"),
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
    """One option; its default is only shown, since a recipe may have another."""
    own, flag = getattr(_OWN, name), f"--{name.replace('_', '-')}"
    if name == "pretrained":
        return click.option(
            "--pretrained/--untrained", default=None, help=f"{HELP[name]} [pretrained]"
        )
    if isinstance(own, bool):
        text = "yes" if own else "no"
        return click.option(
            f"{flag}/--no-{flag[2:]}", name, default=None, help=f"{HELP[name]} [{text}]"
        )
    default_text = ",".join(map(str, own)) if isinstance(own, tuple) else own
    default = "" if default_text in (None, "") else f" [{default_text}]"
    many = name in _NAMES or name == "ranks"
    kind: Any = _TYPES.get(name) or (OneOf(tables[name]) if name in tables else type(own))
    if name in RANGES:
        least, most = RANGES[name]
        between: Any = click.FloatRange if isinstance(own, float) else click.IntRange
        kind = between(least, None if most == float("inf") else most)
    if name == "levels":
        kind = str
    text = f"{HELP[name]}{default}".strip()
    flatten = joined if name == "ranks" else None
    return click.option(
        _NAMES.get(name, flag), name, type=kind, multiple=many, callback=flatten, help=text
    )
