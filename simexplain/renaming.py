"""Names that have changed: the old ones work for one more version, with a note of the new one."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from functools import wraps
from importlib import import_module
from typing import Any, TypeVar

from simexplain.errors import ArgumentError

Made = TypeVar("Made", bound=type)


class RenamedWarning(DeprecationWarning):
    """Something was given under a name that it no longer has."""


REFUSED_FROM = "0.2"
"""The version that takes the new names alone."""

RENAMED: dict[str, tuple[str, ...]] = {
    "broken": ("errors",),
    "by": ("refine",),
    "comparison": ("images",),
    "classes": ("classes_per_batch",),
    "different": ("negative",),
    "each": ("images_per_class",),
    "k": ("edges_per_node",),
    "ks": ("ranks",),
    "left_out": ("skipped",),
    "magnify": ("upscale",),
    "masking": ("perturb",),
    "several": ("aggregate",),
    "steps": ("batches_per_epoch", "jacobians", "curve_steps", "reliability_batches"),
    "style": ("formula",),
    "watch": ("attention_triplets",),
}
"""Old names of arguments, options, attributes and keys, each with the new ones.

Of several new names the first that a function, class or command has is meant; where the old name is
still one of its own, nothing is renamed.
"""

ARGUMENTS_ALONE = ("comparison",)
"""Names that no option of the command line ever had."""

RENAMED_OPTIONS: dict[str, tuple[str, ...]] = {
    **{name: new for name, new in RENAMED.items() if name not in ARGUMENTS_ALONE},
    "dataset": ("kind",),
    "k": ("edges_per_node", "ranks"),
    "level": ("confidence",),
    "mask": ("region_mask",),
    "max_batch": ("batch_size",),
    "no_pretrained": ("untrained",),
    "nodes": ("nodes_per_level",),
}
"""The same for the command line, some of whose options were renamed alone."""

RENAMED_VALUES: dict[str, dict[str, str]] = {
    "perturb": {"each": "single", "together": "joint"},
}
"""For new names the values that have changed."""


Call = tuple[tuple[Any, ...], dict[str, Any]]


def _list_and_arch(paths: Any, arch: Any = None, *args: Any, **options: Any) -> Call:
    return (paths, *args), {"arch": arch, **options}


def _two_sides(
    anchor: Any, positives: Any, negatives: Any = (), *args: Any, **options: Any
) -> Call:
    images = [anchor, *positives, *negatives]
    return (images, *args), {"arch": "set", "positives": len(positives), **options}


def _first_and_others(paths: Any, **options: Any) -> Call:
    return (paths[0], paths[1:]), options


def _alike(*args: Any, **options: Any) -> Call:
    return args, options


RENAMED_VERBS: dict[str, tuple[str, Callable[..., Call]]] = {
    "attribute_files": ("attribute", _first_and_others),
    "compare_files": ("compare", _list_and_arch),
    "compare_methods": ("compare", _alike),
    "explain_files": ("explain", _list_and_arch),
    "explain_pair_files": ("explain", _two_sides),
    "match_files": ("match", _alike),
    "segment_files": ("segment", _alike),
}
"""Old names of functions: the one that took its place, and how its arguments are today's."""


def old_verb(name: str, verb: Callable[..., Any]) -> Callable[..., Any]:
    """A function under its old name in :data:`RENAMED_VERBS`, with a warning.

    Args:
        name: The old name.
        verb: The function of today.
    """
    _, arguments = RENAMED_VERBS[name]

    @wraps(verb)
    def call(model: Any, *args: Any, **options: Any) -> Any:
        warnings.warn(
            f"'{name}' is now '{verb.__name__}', which takes pictures and tensors alike; the old "
            f"name is refused from version {REFUSED_FROM}.",
            RenamedWarning,
            stacklevel=2,
        )
        given, options = arguments(*args, **options)
        return verb(model, *given, **options)

    return call


MOVED: dict[str, str] = {
    "BatchOptions": "batching.planning",
    "BatchRow": "batching.planning",
    **dict.fromkeys(("Agreement", "Check"), "checking"),
    "AUGMENTATIONS": "data.training_set",
    "check_training": "data.checking",
    "DataSplit": "data.dataset_split",
    **dict.fromkeys(("DATASETS", "read_dataset"), "data.datasets"),
    "Record": "data.folders",
    "read_picture": "data.images",
    "ClassBalanced": "data.training_set",
    "TrainingImages": "data.training_set",
    "faithfulness": "evaluation.faithfulness",
    **dict.fromkeys(("read_comparisons", "sample_comparisons"), "evaluation.items"),
    "Item": "evaluation.items",
    "sanity_check": "evaluation.faithfulness",
    "centroid": "explaining",
    **dict.fromkeys(
        (
            "ABLATIONS",
            "AttentionMaskLoss",
            "AVSLDistance",
            "AVSLLoss",
            "ClassHead",
            "ClassificationLoss",
            "ClassificationMiningLoss",
            "LOSSES",
            "metric_loss",
            "MetricLoss",
            "Objective",
            "parameter_groups",
            "QuadrupletLoss",
            "SimilarityMiningLoss",
            "soft_mask",
        ),
        "losses",
    ),
    "CAMS": "methods.cams",
    "WeightBank": "methods.weight_bank",
    **dict.fromkeys(
        ("similarity_weights", "SimilarityAttention", "WEIGHTS"), "methods.similarity_attention"
    ),
    "accelerated": "models.accelerating",
    "AVSL": "models.avsl",
    **dict.fromkeys(("AVSLOptions", "PRESETS"), "models.avsl_options"),
    "PairModel": "models.pairs",
    "RENDERERS": "rendering.overlay",
    "GalleryIndex": "searching.index_gallery",
    "Hit": "searching.search_result",
    "Cue": "segmentation.cue",
    **dict.fromkeys(("read_masked", "SegmentationData"), "segmentation.dataset"),
    "GrabCut": "segmentation.cue",
    "read_pascal": "segmentation.dataset",
    **dict.fromkeys(("Trace", "trace"), "tracing"),
    "TrainOptions": "training.options",
    "RECIPES": "training.recipes",
}
"""Names that were at the top level: the module of ``simexplain`` that has them now."""


def old_public(name: str) -> Any:
    """What ``simexplain.NAME`` was in the last version, with a warning.

    Raises:
        AttributeError: If it was nothing.
    """
    if name in MOVED:
        home = f"simexplain.{MOVED[name]}"
        warnings.warn(
            f"'simexplain.{name}' is now '{home}.{name}'; the old name is refused from version "
            f"{REFUSED_FROM}.",
            RenamedWarning,
            stacklevel=3,
        )
        return getattr(import_module(home), name)
    if name in RENAMED_VERBS:
        return old_verb(name, getattr(import_module("simexplain"), RENAMED_VERBS[name][0]))
    raise AttributeError(f"module 'simexplain' has no attribute '{name}'")


def new_name(
    old: str, known: Collection[str], table: Mapping[str, tuple[str, ...]] = RENAMED
) -> str | None:
    """What something is called now among the names ``known``; None if it is not renamed."""
    if old in known:
        return None
    return next((name for name in table.get(old, ()) if name in known), None)


def renamed(given: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """What an earlier version wrote, under today's names and with today's values; no warning.

    What is there under both names counts under the new one.

    Args:
        given: Values by name, such as the settings of a run.
        known: The names that there are today.
    """
    values: dict[str, Any] = {}
    for old, value in given.items():
        new = new_name(old, known) or old
        if new == old or new not in given:
            values[new] = todays_value(new, value)
    return values


def todays_value(name: str, value: Any) -> Any:
    """A value as it is called now, for something with this new name."""
    return RENAMED_VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value


def todays(given: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """As :func:`renamed`, for what a caller wrote: each old name or value makes a warning.

    Raises:
        ArgumentError: If a value is given under both its names.
    """
    for old, value in given.items():
        new = new_name(old, known)
        if new is not None:
            if new in given:
                raise ArgumentError(f"Expected {new} once, got it as {old} as well; leave one out.")
            warn(old, new)
        if (after := todays_value(new or old, value)) is not value:
            warn(value, after)
    return renamed(given, known)


def with_old_names(record: Mapping[str, Any], *old: str) -> dict[str, Any]:
    """JSON that repeats some keys under their old names, for those who read them still."""
    return {
        **record,
        **{name: record[name_of] for name in old if (name_of := new_name(name, record))},
    }


def takes_old_names(made: Made) -> Made:
    """Lets a dataclass be made with old names, and its attributes be read under them.

    Stands above ``@dataclass``. Functions with ``@typed`` do so without more.
    """
    init = made.__init__  # type: ignore[misc]
    parameters = inspect.signature(init).parameters
    known = {*(field.name for field in fields(made)), *vars(made)}

    @wraps(init)
    def renaming_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **todays(kwargs, parameters))

    def getattr_renamed(self: Any, name: str) -> Any:
        new = new_name(name, known)
        if new is None:
            raise AttributeError(f"'{made.__name__}' object has no attribute '{name}'")
        warn(name, new)
        return getattr(self, new)

    made.__init__ = renaming_init  # type: ignore[misc]
    made.__getattr__ = getattr_renamed  # type: ignore[attr-defined]
    return made


def warn(old: str, new: str) -> None:
    """Warns of an old name, at the first line outside simexplain, which has it."""
    text = (
        f"'{old}' is now called '{new}'; version {REFUSED_FROM} will not accept '{old}' any more."
    )
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("simexplain."):
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    warnings.warn(text, RenamedWarning, stacklevel=level)
