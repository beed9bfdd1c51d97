"""Warnings of a run: options without effect, and pictures that were left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields

from simexplain.data.dataset_split import DataSplit, few
from simexplain.training.options import TrainOptions

NEEDS: tuple[tuple[tuple[str, ...], str, Callable[[TrainOptions], bool]], ...] = (
    (("gamma",), "without mining (--mining)", lambda o: o.mining != "none"),
    (
        ("mining_options", "mining_start", "mining_warmup"),
        "without mining (--mining or --bce-mining)",
        lambda o: o.mining != "none" or o.bce_mining > 0,
    ),
    (
        ("preset", "levels", "eta", "edge_momentum", "edges_per_node", "ablation", "level_weights"),
        "without AVSL (--avsl)",
        lambda o: o.avsl,
    ),
    (("reliability_lr",), "without AVSL (--avsl)", lambda o: o.avsl),
    (("distance",), "on AVSL, which has its own distance", lambda o: not o.avsl),
    (("mask_side",), "without --mask-weight", lambda o: o.mask_weight > 0),
    (("momentum",), "on any optimiser but sgd", lambda o: o.optimiser == "sgd"),
    (
        ("step_epochs", "step_factor"),
        "on any schedule but step",
        lambda o: o.schedule == "step",
    ),
    (("warmup",), "without --warmup-epochs", lambda o: o.warmup_epochs > 0),
)
"""Settings, where they change nothing, and whether the run is one in which they do."""


def without_effect(options: TrainOptions, split: DataSplit) -> tuple[str, ...]:
    """Options without effect, a sentence each.

    A setting counts as given where it is not the default. Masks and groups count where the
    pictures have them.

    Args:
        options: Of the run.
        split: The pictures.
    """
    usual = {field.name: field.default for field in fields(TrainOptions)}
    lines = [
        f"{name}={getattr(options, name)} has no effect {where}."
        for names, where, used in NEEDS
        if not used(options)
        for name in names
        if getattr(options, name) != usual[name]
    ]
    if not options.mask_weight and any(record.mask for record in split.train):
        lines.append("The masks of the pictures have no effect without --mask-weight.")
    judged = (*split.queries, *(split.gallery or ()))
    if not options.grouped and any(record.group for record in judged):
        lines.append("The groups of the pictures have no effect without --grouped.")
    return tuple(lines)


def left_out(broken: Mapping[str, str]) -> tuple[str, ...]:
    """What evaluations did without, a sentence; nothing where they had all pictures.

    Args:
        broken: Pictures by path, with the reason.
    """
    if not broken:
        return ()
    count = f"{len(broken)} test picture{'s' * (len(broken) > 1)}"
    return (f"{count} could not be read in an evaluation, and were left out: {few([*broken])}.",)
