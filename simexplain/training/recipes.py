"""The papers' settings as named recipes: one literal table, every value with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simexplain.errors import ModelError
from simexplain.training.options import TrainOptions, with_options

_SAM_SECTION = "similarity attention, section 4.2"
_PCB, _PCB_CODE = "PCB (Sun et al. 2018), section 4.2", "PCB's code, train_PCB.sh"
_RATIO = "ours; PCB's new layers learn ten times as fast as its network"

PCB: Mapping[str, tuple[Any, str]] = {
    "backbone": ("pcb:timm:resnet50", f"{_PCB}, which {_SAM_SECTION} follows"),
    "size": ((384, 128), _PCB),
    "embedding": (1536, "PCB, section 3.1: six stripes of 256"),
    "loss": ("identity", "PCB, section 3.1"),
    "loss_options": ((("parts", 6),), "PCB, section 3.1"),
    "augmentation": ("pcb", _PCB),
    "optimiser": ("adam", _SAM_SECTION),
    "epochs": (40, _SAM_SECTION),
    "lr": (1e-4, "ours; neither names a rate for Adam"),
    "head_lr": (1e-3, _RATIO),
    "proxy_lr": (1e-3, _RATIO),
    "weight_decay": (5e-4, "PCB's code, PCB.py"),
    "schedule": ("step", _PCB),
    "step_epochs": (27, f"{_PCB_CODE}: after 40 of 60 epochs, two thirds of them"),
    "step_factor": (0.1, _PCB),
    "classes_per_batch": (16, f"ours; {_PCB_CODE} has 64 images, shuffled"),
    "images_per_class": (4, f"ours; {_PCB_CODE} has 64 images, shuffled"),
    "freeze_bn": (False, "PCB's code"),
    "grouped": (True, "Market-1501: the query's person before its own camera does not count"),
    "ranks": ((1, 5, 10), "Market-1501"),
}
"""The part-based baseline alone."""

REID_SAM: Mapping[str, tuple[Any, str]] = {
    **PCB,
    "mining": ("triplet", "similarity attention, section 4.2: triplets are ours, it does not say"),
    "gamma": (0.2, _SAM_SECTION),
}
"""With similarity attention and mining."""


Values = Mapping[str, tuple[Any, str]]


@dataclass(frozen=True)
class Recipe:
    """Settings of a run.

    Attributes:
        about: What it trains, in a line.
        kind: The data set that it is meant for, a name in ``DATASETS``.
        values: By the name of the setting, its value and where that comes from. All else is as in
            :class:`~simexplain.training.options.TrainOptions`.
    """

    about: str
    kind: str
    values: Values

    @property
    def options(self) -> TrainOptions:
        """The settings as a run takes them."""
        return with_options(TrainOptions(), {n: value for n, (value, _) in self.values.items()})


OURS = "ours"
_MEASURED = "ours: docs/training-results.md"
_AVSL, _CODE = "AVSL, section 4.2", "AVSL's code, examples/samples_avsl.sh"
_BASE = "AVSL's code, examples/samples_baseline.sh"
_SHUFFLED = "ours: 180 as in AVSL, section 4.2; its code draws 4 of a class or shuffles"
_SAM, _LOOK = "similarity attention, section 4", "ours: a first look on emoji"

_RESNET: Values = {
    "backbone": ("timm:resnet50", f"{_AVSL} and {_SAM}"),
    "size": ((224, 224), _AVSL),
    "embedding": (512, _AVSL),
}
_PAPERS: Values = {
    **_RESNET,
    "augmentation": ("avsl", _AVSL),
    "optimiser": ("adamw", _AVSL),
    "weight_decay": (1e-4, _AVSL),
    "classes_per_batch": (45, _SHUFFLED),
    "images_per_class": (4, _SHUFFLED),
    "clip": (10.0, "AVSL's code, examples/config/param/gradclipper"),
    "warmup": ("head", "AVSL's code: --warm_up_list embedder collector"),
    "warmup_epochs": (5, _CODE),
    "schedule": ("step", "AVSL's code, examples/config/links"),
    "step_factor": (0.5, _CODE),
    "epochs": (60, "ours; the code stops after 15 epochs without a gain"),
}
_AVSL_GRAPH: Values = {
    "avsl": (True, "AVSL, section 3.4"),
    "preset": ("official", "AVSL's code, which the rates below were tuned with"),
    "edges_per_node": (128, "AVSL, section 4.3"),
    "edge_momentum": (0.5, _AVSL),
}
_ANCHOR: Values = {"loss": ("proxy_anchor", _AVSL)}
_AVSL_ANCHOR: Values = {
    **_PAPERS,
    **_AVSL_GRAPH,
    **_ANCHOR,
    "loss_options": ((("alpha", 16.0), ("positive", 1.8), ("negative", 2.2)), _AVSL),
}
_AVSL_MARGIN: Values = {
    **_PAPERS,
    **_AVSL_GRAPH,
    "loss": ("margin", _AVSL),
    "loss_options": (
        (("margin", 0.2), ("beta", 1.2), ("sampling", "hard")),
        f"{_AVSL}, where both are swapped; HardSelector of its code",
    ),
    "lr": (1e-4, _AVSL),
    "head_lr": (1e-4, "AVSL's code, examples/config/args.csv: --lr_embedder"),
    "proxy_lr": (0.01, "AVSL's code, examples/config/args.csv: --lr_loss"),
    "reliability_lr": (1e-4, "AVSL's code, examples/config/args.csv: --lr_collector"),
    "step_epochs": (10, "AVSL's code, examples/config/args.csv: --step"),
}
_BASE_ANCHOR: Values = {
    **_PAPERS,
    **_ANCHOR,
    "distance": ("cosine", "Proxy anchor, which AVSL's baseline is"),
    "loss_options": ((("alpha", 32.0), ("margin", 0.1)), _BASE),
    "lr": (1e-4, _BASE),
    "head_lr": (1e-4, _BASE),
    "proxy_lr": (0.01, _BASE),
}
_BASE_MARGIN: Values = {
    **_PAPERS,
    "loss": ("margin", _AVSL),
    "loss_options": ((("margin", 0.2), ("beta", 1.2)), _AVSL),
    "lr": (1e-4, _AVSL),
    "head_lr": (1e-4, "AVSL's code, examples/config/args.csv: --lr_embedder"),
    "proxy_lr": (0.01, "AVSL's code, examples/config/args.csv: --lr_loss"),
    "step_epochs": (10, "AVSL's code, examples/config/args.csv: --step"),
}
_KS_SOP: Values = {"ranks": ((1, 10, 100), "AVSL, Table 1")}
_SOP: Values = {
    **_KS_SOP,
    "lr": (6e-4, _CODE),
    "head_lr": (6e-4, _CODE),
    "proxy_lr": (0.06, _CODE),
    "step_epochs": (15, _CODE),
    "step_factor": (0.25, _CODE),
    "freeze_bn": (False, "AVSL's code: --not_freeze_bn"),
}
_SAM_BASE: Values = {
    **_RESNET,
    "size": ((224, 224), "ours; its supplement, which has all settings, is not at hand"),
    "embedding": (512, "ours"),
    "augmentation": ("sam", "the protocol of Wang et al., which section 4.1 follows"),
    "gamma": (0.25, "similarity attention, Table 1"),
    "lr": (1e-5, "ours"),
    "head_lr": (1e-4, "ours"),
    "classes_per_batch": (16, "ours"),
    "images_per_class": (4, "ours"),
    "epochs": (60, "ours"),
    "warmup": ("head", "ours"),
    "warmup_epochs": (2, "ours"),
}


def _sam(arch: str, loss: str) -> Values:
    """Similarity attention with one arrangement of images, in the loss and in mining."""
    source = "similarity attention, Table 2"
    return {**_SAM_BASE, "mining": (arch, source), "loss": (loss, source)}


_EMOJI: Values = {
    "size": ((96, 96), _LOOK),
    "embedding": (128, _LOOK),
    "augmentation": ("light", _LOOK),
    "optimiser": ("adamw", _LOOK),
    "lr": (1e-4, _LOOK),
    "head_lr": (1e-3, _LOOK),
    "weight_decay": (1e-4, _LOOK),
    "classes_per_batch": (16, _LOOK),
    "images_per_class": (2, _LOOK),
    "epochs": (12, _LOOK),
    "schedule": ("cosine", _MEASURED),
    "grouped": (True, "the data set: a query's own vendor does not count"),
}
_EMOJI_AVSL: Values = {
    "avsl": (True, "AVSL, section 3.4"),
    "edges_per_node": (32, _MEASURED),
    "eta": ("standardised", _MEASURED),
    "reliability_lr": (0.03, _MEASURED),
}
_EMOJI_ANCHOR: Values = {**_EMOJI, **_ANCHOR, "warmup_epochs": (1, _MEASURED)}

RECIPES: dict[str, Recipe] = {
    "avsl-proxyanchor-cub": Recipe(
        "ProxyAnchor-AVSL, Table 1",
        "cub",
        {
            **_AVSL_ANCHOR,
            "level_weights": ((0.5, 1.0, 0.5), _CODE),
            "lr": (1e-5, f"{_CODE} (the paper: 1e-4)"),
            "head_lr": (5.5e-4, _CODE),
            "proxy_lr": (1.1e-4, _CODE),
            "reliability_lr": (1.1e-4, _CODE),
            "step_epochs": (10, _CODE),
        },
    ),
    "avsl-proxyanchor-cars196": Recipe(
        "ProxyAnchor-AVSL, Table 1",
        "cars",
        {
            **_AVSL_ANCHOR,
            "level_weights": ((1.0, 4.0, 4.0), _CODE),
            "lr": (2.523e-4, f"{_CODE} (the paper: 1e-4)"),
            "head_lr": (1.629e-4, _CODE),
            "proxy_lr": (0.09918, _CODE),
            "reliability_lr": (0.09918, _CODE),
            "step_epochs": (5, _CODE),
        },
    ),
    "avsl-proxyanchor-sop": Recipe(
        "ProxyAnchor-AVSL, Table 1",
        "sop",
        {
            **_AVSL_ANCHOR,
            **_SOP,
            "loss_options": (
                (("alpha", 16.0), ("positive", 1.8), ("negative", 2.4)),
                f"{_CODE}, there 2.2 for the overall distance",
            ),
            "level_weights": ((1.0, 4.0, 4.0), _CODE),
            "reliability_lr": (0.06, _CODE),
        },
    ),
    "avsl-margin-cub": Recipe("Margin-AVSL, Table 1", "cub", _AVSL_MARGIN),
    "avsl-margin-cars196": Recipe("Margin-AVSL, Table 1", "cars", _AVSL_MARGIN),
    "avsl-margin-sop": Recipe("Margin-AVSL, Table 1", "sop", {**_AVSL_MARGIN, **_KS_SOP}),
    "proxyanchor-cub": Recipe(
        "AVSL's baseline, Table 1", "cub", {**_BASE_ANCHOR, "step_epochs": (5, _BASE)}
    ),
    "proxyanchor-cars196": Recipe(
        "AVSL's baseline, Tables 1 and 2", "cars", {**_BASE_ANCHOR, "step_epochs": (10, _BASE)}
    ),
    "proxyanchor-sop": Recipe("AVSL's baseline, Table 1", "sop", {**_BASE_ANCHOR, **_SOP}),
    "margin-cub": Recipe("AVSL's baseline, Table 1", "cub", _BASE_MARGIN),
    "margin-cars196": Recipe("AVSL's baseline, Table 1", "cars", _BASE_MARGIN),
    "margin-sop": Recipe("AVSL's baseline, Table 1", "sop", {**_BASE_MARGIN, **_KS_SOP}),
    "sam-siamese-cub": Recipe(
        "similarity attention, Tables 1 and 2", "cub", _sam("siamese", "contrastive")
    ),
    "sam-triplet-cub": Recipe("similarity attention, Table 2", "cub", _sam("triplet", "triplet")),
    "sam-quadruplet-cub": Recipe(
        "similarity attention, Table 2", "cub", _sam("quadruplet", "quadruplet")
    ),
    "sam-triplet-cars196": Recipe(
        "similarity attention, section 4.1", "cars", _sam("triplet", "triplet")
    ),
    "sam-triplet-sop": Recipe(
        "similarity attention, Table 2",
        "sop",
        {
            **_sam("triplet", "triplet"),
            "ranks": ((1, 10, 100, 1000), "similarity attention, Table 2"),
        },
    ),
    "sam-reid-market1501": Recipe("similarity attention, Table 3", "market1501", REID_SAM),
    "sam-reid-cuhk03": Recipe("similarity attention, Table 3", "cuhk03", REID_SAM),
    "pcb-market1501": Recipe("its baseline, Table 3", "market1501", PCB),
    "pcb-cuhk03": Recipe("its baseline, Table 3", "cuhk03", PCB),
    "emoji-triplet": Recipe("a baseline for small data", "folder", _EMOJI),
    "emoji-sam-triplet": Recipe(
        "similarity mining on small data",
        "folder",
        {**_EMOJI, "mining": ("triplet", _LOOK), "gamma": (0.05, _LOOK)},
    ),
    "emoji-proxyanchor": Recipe(
        "a baseline for small data", "folder", {**_EMOJI_ANCHOR, "distance": ("cosine", OURS)}
    ),
    "emoji-avsl-proxyanchor": Recipe(
        "AVSL on small data", "folder", {**_EMOJI_ANCHOR, **_EMOJI_AVSL}
    ),
    "emoji-margin": Recipe(
        "a baseline for small data", "folder", {**_EMOJI, "loss": ("margin", OURS)}
    ),
    "emoji-avsl-margin": Recipe(
        "AVSL on small data", "folder", {**_EMOJI, **_EMOJI_AVSL, "loss": ("margin", OURS)}
    ),
}
"""Every recipe by its name; a new one is one entry here."""


def recipe_named(name: str) -> Recipe:
    """A recipe by its name."""
    if name not in RECIPES:
        raise ModelError(f"Expected a recipe of {', '.join(RECIPES)}, got '{name}'.")
    return RECIPES[name]


def recipe_page() -> str:
    """All recipes as Markdown: a table for each, a line for each value and its source."""
    parts = []
    for name, recipe in RECIPES.items():
        rows = [
            f"| `{setting}` | `{_shown(value)}` | {source} |"
            for setting, (value, source) in recipe.values.items()
        ]
        head = f"## {name}\n\n{recipe.about[0].upper()}{recipe.about[1:]}; `--kind {recipe.kind}`."
        parts.append(
            "\n".join((head, "", "| setting | value | source |", "| --- | --- | --- |", *rows))
        )
    return "\n\n".join(parts) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        pairs = [f"{v[0]}={_shown(v[1])}" if isinstance(v, tuple) else _shown(v) for v in value]
        return " ".join(pairs)
    return f"{value:g}" if isinstance(value, float) else str(value)
