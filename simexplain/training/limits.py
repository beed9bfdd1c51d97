"""What each setting of a training run may be."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args, get_origin

from simexplain.errors import ModelError
from simexplain.models.avsl_options import ETAS, PRESETS
from simexplain.models.base import DISTANCES

MOST = float("inf")
RANGES: dict[str, tuple[float, float]] = {
    "embedding": (1, MOST), "k": (1, MOST), "edge_momentum": (0, 0.999),
    "gamma": (0, MOST), "mining_start": (0, MOST), "mining_warmup": (0, MOST),
    "bce": (0, MOST), "bce_mining": (0, MOST), "mask_weight": (0, MOST),
    "lr": (0, MOST), "head_lr": (0, MOST), "proxy_lr": (0, MOST), "reliability_lr": (0, MOST),
    "weight_decay": (0, MOST), "momentum": (0, 1), "step_epochs": (1, MOST), "step_factor": (0, 1),
    "warmup_epochs": (0, MOST), "clip": (0, MOST), "epochs": (1, MOST),
    "classes": (0, MOST), "each": (2, MOST), "steps": (0, MOST), "seed": (0, 2**31 - 1),
    "workers": (0, MOST), "devices": (1, MOST), "nodes": (1, MOST), "eval_every": (1, MOST),
    "checkpoint_every": (0, MOST), "watch": (0, MOST),
}  # fmt: skip
"""The smallest and the largest value of each number."""

CHOICES: dict[str, tuple[str, ...]] = {
    "distance": tuple(DISTANCES),
    "preset": tuple(PRESETS),
    "eta": ETAS,
    "mining": ("none", "siamese", "triplet", "quadruplet"),
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
    from simexplain.data.augmenting import AUGMENTATIONS
    from simexplain.losses.avsl_objective import ABLATIONS
    from simexplain.losses.metric_losses import LOSSES

    return {
        **CHOICES,
        "ablation": tuple(ABLATIONS),
        "loss": tuple(LOSSES),
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
