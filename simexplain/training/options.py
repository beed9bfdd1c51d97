"""Every setting of a training run, what it may be, and what has no effect with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import numpy as np

from simexplain.arguments import typed
from simexplain.data.dataset_split import DataSplit, few
from simexplain.errors import ModelError, SimexplainError
from simexplain.models.avsl_options import ETAS, PRESETS
from simexplain.models.backbones import DEFAULT_MODEL
from simexplain.models.base import DISTANCES
from simexplain.renaming import renamed, takes_old_names

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
    from simexplain.losses.mining import SHAPES

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
    """Refuses values of another kind than the field's, as a JSON file may have them."""
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
    """Refuses unknown names and numbers out of range."""
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
    """Refuses settings of the loss and of mining that do not exist, do not fit or contradict."""
    from simexplain.losses.distance_losses import DISTANCE_LOSSES
    from simexplain.losses.metric_losses import LOSSES
    from simexplain.losses.objective import check_settings

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
    """The options of mining, over triplets by default."""
    from simexplain.losses.mining import MiningOptions, mining_options

    arch = "triplet" if options.mining == "none" else options.mining
    try:
        return mining_options(MiningOptions(arch=arch), dict(options.mining_options))
    except SimexplainError as error:
        raise ModelError(str(error)) from error


USUAL_CLASSES = 16
"""The default number of classes in a batch, if the data set has as many."""


@takes_old_names
@dataclass(frozen=True)
@typed
class TrainOptions:
    """How a network is trained; ``RECIPES`` has the papers' values.

    Attributes:
        backbone: ``timm:NAME`` or ``torchvision:NAME``.
        pretrained: Start from the zoo's weights; else from random ones.
        embedding: Width of the embedding, for AVSL the number of nodes of each level.
        size: ``(height, width)`` of the input in pixels; None for the network's own.
        distance: Of plain models, a name in ``DISTANCES``.
        avsl: Train AVSL over the network in place of one embedding.
        preset: ``paper`` or ``official``, where AVSL's text and code differ.
        levels: AVSL's layers; empty for the last three stages.
        eta: ``raw`` as in the paper, or ``standardised``: how certainties enter reliabilities.
        edge_momentum: Share of the old edges that each step keeps, in [0, 1).
        edges_per_node: How many lower nodes stand in for a higher one (AVSL, Eq. 7).
        ablation: A row of AVSL's Table 2, a name in ``ABLATIONS``.
        level_weights: Of AVSL's levels in the loss, lowest first; empty for 1 each.
        loss: L_ml, a name in ``LOSSES``.
        loss_options: Its settings in place of the table's, as ``(name, value)`` pairs.
        mining: Similarity mining over siamese pairs, triplets or quadruplets, or ``none``.
        gamma: Its weight (Eq. 6 of similarity attention).
        mining_options: Fields of ``SimilarityMiningLoss`` by name, as pairs.
        mining_start: Epochs without mining at the beginning.
        mining_warmup: Epochs in which gamma then grows linearly from 0.
        bce: Weight of a classification loss, ``Lml + gamma Lbce`` (Table 1); 0 for none.
        bce_mining: Weight of mining with Grad-CAM's maps of that classifier; 0 for none.
        mask_weight: Weight of attention that falls outside the masks of images that have one; 0
            for none.
        mask_side: Whether masks mark what should be looked at (``inside``) or not (``outside``).
        optimiser: ``adamw``, ``adam`` or ``sgd``.
        lr: Learning rate of the network.
        head_lr: Of the embedding's layer, or AVSL's heads.
        proxy_lr: Of what losses learn themselves, such as proxies.
        reliability_lr: Of AVSL's alpha and beta.
        weight_decay: Of all but alpha and beta.
        momentum: Of ``sgd``.
        schedule: ``constant``, ``cosine`` to 0 at the last step, or ``step``.
        step_epochs: After how many epochs each time ``step`` multiplies the rates...
        step_factor: ...by this.
        warmup_epochs: Of these first epochs...
        warmup: ...only all but the network is trained (``head``), or rates grow from 0
            (``linear``).
        clip: Largest norm of the gradient of each group; 0 for no bound.
        epochs: Passes over the training set.
        classes_per_batch: Classes in a batch; 0 for 16, or all where there are fewer...
        images_per_class: ...and images of each.
        batches_per_epoch: Batches in an epoch; 0 for the number that draws as many images as the
        data set has.
        augmentation: A name in ``AUGMENTATIONS``.
        precision: ``32``, ``bf16`` or ``16`` mixed.
        freeze_bn: Batch norm normalises with the statistics it came with; its scale and shift are
            trained all the same.
        seed: Of everything that is drawn.
        workers: Processes that read pictures; results do not depend on it.
        accelerator: What to train on; ``auto`` takes a GPU where there is one.
        devices: GPUs, or processes on a CPU, per host; a batch is shared by all.
        nodes: Hosts.
        eval_every: Epochs from one evaluation to the next.
        ranks: The K of Recall@K.
        grouped: Leave each query's own group out of the gallery.
        best: Keep the model of the best ``recall`` (at the first of ``ranks``) or ``map_at_r``.
        checkpoint_every: Steps from one checkpoint to the next; one more after each epoch. 0 for
            the latter alone.
        attention_triplets: How many fixed validation triplets have their maps drawn at each
            evaluation.
    """

    backbone: str = DEFAULT_MODEL
    pretrained: bool = True
    embedding: int = 128
    size: tuple[int, int] | None = None
    distance: str = "euclidean"
    avsl: bool = False
    preset: str = "paper"
    levels: tuple[str, ...] = ()
    eta: str = "raw"
    edge_momentum: float = 0.5
    edges_per_node: int = 128
    ablation: str = "full"
    level_weights: tuple[float, ...] = ()
    loss: str = "triplet"
    loss_options: tuple[tuple[str, Any], ...] = ()
    mining: str = "none"
    gamma: float = 0.05
    mining_options: tuple[tuple[str, Any], ...] = ()
    mining_start: int = 0
    mining_warmup: int = 0
    bce: float = 0.0
    bce_mining: float = 0.0
    mask_weight: float = 0.0
    mask_side: str = "inside"
    optimiser: str = "adamw"
    lr: float = 1e-4
    head_lr: float = 1e-3
    proxy_lr: float = 1e-2
    reliability_lr: float = 1e-3
    weight_decay: float = 1e-4
    momentum: float = 0.9
    schedule: str = "constant"
    step_epochs: int = 10
    step_factor: float = 0.5
    warmup_epochs: int = 0
    warmup: str = "head"
    clip: float = 0.0
    epochs: int = 12
    classes_per_batch: int = 0
    images_per_class: int = 2
    batches_per_epoch: int = 0
    augmentation: str = "sam"
    precision: str = "32"
    freeze_bn: bool = True
    seed: int = 0
    workers: int = 0
    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    eval_every: int = 1
    ranks: tuple[int, ...] = (1, 2, 4, 8)
    grouped: bool = False
    best: str = "recall"
    checkpoint_every: int = 100
    attention_triplets: int = 3

    def __post_init__(self) -> None:
        check_types(self, get_type_hints(TrainOptions))
        check_values(self)
        self._check_together()

    def _check_together(self) -> None:
        """What depends on more than one setting."""
        if not self.ranks or not all(isinstance(k, int) and k >= 1 for k in self.ranks):
            raise ModelError(f"Expected ranks of at least one positive number, got {self.ranks}.")
        size = self.size or (1, 1)
        if len(size) != 2 or not all(isinstance(side, int) and side >= 1 for side in size):
            raise ModelError(f"Expected a positive size in pixels, got {self.size}.")
        if self.classes_per_batch == 1:
            raise ModelError("Expected at least two classes in a batch, got 1.")
        world = self.devices * self.nodes
        if self.batch_size % world:
            raise ModelError(
                f"Expected a batch that {world} processes can share evenly, got "
                f"{self.classes_per_batch} classes x {self.images_per_class}; change "
                "--classes-per-batch, --images-per-class or --devices."
            )
        if self.warmup_epochs > self.epochs:
            raise ModelError(
                f"Expected at most as many warm-up epochs as epochs ({self.epochs}), got "
                f"{self.warmup_epochs}."
            )
        if self.bce_mining and not self.bce:
            raise ModelError(
                "Expected a classifier for Grad-CAM mining, got bce of 0; give --bce a weight."
            )
        plain = [name for name in ("bce", "bce_mining") if getattr(self, name)]
        able = avsl_losses()
        if self.avsl and self.loss not in able:
            raise ModelError(f"Expected a loss of {', '.join(able)} for AVSL, got '{self.loss}'.")
        if self.avsl and plain:
            raise ModelError(
                f"{plain[0]} needs one embedding for each image, which AVSL has not; leave one out."
            )
        check_terms(self)
        if self.precision == "16" and self.accelerator == "cpu":
            raise ModelError("Expected precision 32 or bf16 on a CPU, got 16.")

    def settled(self, classes: int) -> TrainOptions:
        """With a number of classes in a batch that these many classes to train on allow."""
        if self.classes_per_batch:
            return self
        return replace(self, classes_per_batch=max(2, min(USUAL_CLASSES, classes)))

    @property
    def batch_size(self) -> int:
        """Images in a batch, of all processes together."""
        return self.classes_per_batch * self.images_per_class

    def to_json(self) -> dict[str, Any]:
        """Plain JSON from which :meth:`from_json` makes an equal object."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainOptions:
        """The counterpart of :meth:`to_json`.

        Raises:
            ModelError: If a setting is unknown or its value cannot be used.
        """
        return with_options(cls(), values)


def with_options(options: TrainOptions, values: Mapping[str, Any]) -> TrainOptions:
    """The options with some of them replaced; lists, mappings and numpy's numbers become plain."""
    known = [field.name for field in fields(TrainOptions)]
    values = renamed(values, known)
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ModelError(f"Training has the options {', '.join(known)}, got '{unknown[0]}'.")
    return replace(options, **{name: _tuples(value) for name, value in values.items()})


def titled(name: str) -> str:
    """A figure as a person writes it: ``Recall@1``, ``MAP@R``."""
    return "MAP@R" if name == "map_at_r" else name.capitalize()


def best_column(options: TrainOptions) -> str:
    """The column of ``metrics.csv`` that the best model is chosen by."""
    return f"recall@{options.ranks[0]}" if options.best == "recall" else "map_at_r"


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, (tuple, list)) else value


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        value = tuple(value.items())
    if isinstance(value, np.generic):
        return value.item()
    return tuple(_tuples(part) for part in value) if isinstance(value, (tuple, list)) else value


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
    """What evaluations did without, a sentence; nothing where they had all pictures."""
    if not broken:
        return ()
    count = f"{len(broken)} test picture{'s' * (len(broken) > 1)}"
    return (f"{count} could not be read in an evaluation, and were left out: {few([*broken])}.",)
