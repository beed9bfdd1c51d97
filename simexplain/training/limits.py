"""What each setting of a training run may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args, get_origin

from simexplain.errors import ModelError, SimexplainError
from simexplain.models.avsl_options import ETAS, PRESETS
from simexplain.models.base import DISTANCES

if TYPE_CHECKING:
    from simexplain.losses.mining import MiningOptions

MOST = float("inf")
RANGES: dict[str, tuple[float, float]] = {
    "embedding": (1, MOST), "edges_per_node": (1, MOST), "edge_momentum": (0, 0.999),
    "gamma": (0, MOST), "mining_start": (0, MOST), "mining_warmup": (0, MOST),
    "bce": (0, MOST), "bce_mining": (0, MOST), "mask_weight": (0, MOST),
    "lr": (0, MOST), "head_lr": (0, MOST), "proxy_lr": (0, MOST), "reliability_lr": (0, MOST),
    "weight_decay": (0, MOST), "momentum": (0, 1), "step_epochs": (1, MOST), "step_factor": (0, 1),
    "warmup_epochs": (0, MOST), "clip": (0, MOST), "epochs": (1, MOST),
    "classes_per_batch": (0, MOST), "images_per_class": (2, MOST),
    "batches_per_epoch": (0, 100_000), "seed": (0, 2**31 - 1),
    "workers": (0, MOST), "devices": (1, MOST), "nodes": (1, MOST), "eval_every": (1, MOST),
    "checkpoint_every": (0, MOST), "attention_triplets": (0, MOST),
}  # fmt: skip
"""The smallest and the largest value of each number."""

CHOICES: dict[str, tuple[str, ...]] = {
    "distance": tuple(DISTANCES),
    "preset": tuple(PRESETS),
    "eta": ETAS,
    "mask_side": ("inside", "outside"),
    "optimiser": ("adamw", "adam", "sgd"),
    "schedule": ("constant", "cosine", "step"),
    "warmup": ("head", "linear"),
    "precision": ("32", "bf16", "16"),
    "accelerator": ("auto", "cpu", "gpu", "mps"),
    "best": ("recall", "map_at_r"),
}
"""The names that a setting may have, where it is not a table of names itself."""


def choices() -> dict[str, tuple[str, ...]]:
    """The names that each setting may have, those of other tables as well."""
    from simexplain.data.training_set import AUGMENTATIONS
    from simexplain.losses.avsl_objective import ABLATIONS
    from simexplain.losses.metric_losses import LOSSES
    from simexplain.losses.tuples import SHAPES

    return {
        **CHOICES,
        "ablation": tuple(ABLATIONS),
        "loss": tuple(LOSSES),
        "mining": ("none", *SHAPES),
        "augmentation": tuple(AUGMENTATIONS),
    }


def avsl_losses() -> tuple[str, ...]:
    """The losses that AVSL can be trained with."""
    from simexplain.losses.distance_losses import DISTANCE_LOSSES

    return tuple(DISTANCE_LOSSES)


def check_types(options: Any, hints: dict[str, Any]) -> None:
    """Refuses values of another kind than the field's, as a JSON file may have them.

    Args:
        options: A dataclass.
        hints: The types of its fields.

    Raises:
        ModelError: If there is one.
    """
    for field in fields(options):
        value, kind = getattr(options, field.name), hints[field.name]
        optional = type(None) in get_args(kind)
        if optional or get_origin(kind) is tuple:
            fits = isinstance(value, tuple) or (value is None and optional)
        elif kind in (int, float):
            allowed = (int, float) if kind is float else (int,)
            fits = isinstance(value, allowed) and not isinstance(value, bool)
        else:
            fits = isinstance(value, kind)
        if not fits:
            wanted = getattr(kind, "__name__", str(kind))
            raise ModelError(f"Expected {field.name} as {wanted}, got {value!r}.")


def check_values(options: Any) -> None:
    """Refuses unknown names and numbers out of range.

    Raises:
        ModelError: If there is one.
    """
    for name, known in choices().items():
        if getattr(options, name) not in known:
            raise ModelError(
                f"Expected {name} to be one of {', '.join(known)}, got {getattr(options, name)!r}."
            )
    for name, (least, most) in RANGES.items():
        value = getattr(options, name)
        if not least <= value <= most or value == MOST:
            to = "" if most == MOST else f" and at most {most:g}"
            raise ModelError(f"Expected {name} of at least {least:g}{to}, got {value:g}.")


def check_terms(options: Any) -> None:
    """Refuses settings of the loss and of mining that do not exist, do not fit or contradict.

    Raises:
        ModelError: If there is one.
    """
    from simexplain.losses.distance_losses import DISTANCE_LOSSES
    from simexplain.losses.metric_losses import LOSSES
    from simexplain.losses.settings import check_settings

    for name in ("loss_options", "mining_options"):
        for pair in getattr(options, name):
            if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str):
                raise ModelError(f"Expected {name} as pairs (name, value), got {pair!r}.")
    table: Mapping[str, Any] = DISTANCE_LOSSES if options.avsl else LOSSES
    check_settings(options.loss, table[options.loss], dict(options.loss_options))
    mining_of(options)
    if options.mining == "none":
        return
    if not options.gamma:
        raise ModelError(
            f"Expected a weight above 0 for mining={options.mining!r}, got gamma of 0; say mining "
            "none to train without it."
        )
    arch = dict(options.mining_options).get("arch", options.mining)
    if arch != options.mining:
        raise ModelError(
            f"Expected mining over {options.mining}s, as set by --mining, got the mining option "
            f"arch={arch!r}; leave the option away."
        )


def mining_of(options: Any) -> MiningOptions:
    """The options of mining, over triplets by default.

    Raises:
        ModelError: If one is unknown or cannot be used.
    """
    from simexplain.losses.mining import MiningOptions, mining_options

    arch = "triplet" if options.mining == "none" else options.mining
    try:
        return mining_options(MiningOptions(arch=arch), dict(options.mining_options))
    except SimexplainError as error:
        raise ModelError(str(error)) from error
