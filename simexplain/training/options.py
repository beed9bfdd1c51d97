"""Every setting of a training run, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np

from simexplain.arguments import typed
from simexplain.data.dataset_split import DataSplit, few
from simexplain.data.training_set import AUGMENTATIONS
from simexplain.errors import ModelError, SimexplainError
from simexplain.losses.avsl_objective import ABLATIONS
from simexplain.losses.distance_losses import DISTANCE_LOSSES
from simexplain.losses.metric_losses import LOSSES
from simexplain.losses.mining import SHAPES, MiningOptions
from simexplain.losses.mining import mining_options as mining_options_from
from simexplain.losses.objective import check_settings
from simexplain.models.avsl_options import ETAS, PRESETS
from simexplain.models.backbones import DEFAULT_MODEL
from simexplain.models.base import DISTANCES
from simexplain.option_fields import Unless, check_options, documented, option, without_effect
from simexplain.renaming import renamed, takes_old_names

USUAL_CLASSES = 16
"""The default number of classes in a batch, if the data set has as many."""

_network, _of_avsl, _objective, _optimising, _run = (
    partial(option, group=group) for group in ("Network", "AVSL", "Objective", "Optimising", "Run")
)


_MINED = Unless("without mining (--mining)", lambda o: o.mining != "none")
_MINED_AT_ALL = Unless(
    "without mining (--mining or --bce-mining)", lambda o: o.mining != "none" or o.bce_mining > 0
)
_AVSL = Unless("without AVSL (--avsl)", lambda o: o.avsl)
_STEPPED = Unless("on any schedule but step", lambda o: o.schedule == "step")


@takes_old_names
@documented
@dataclass(frozen=True)
@typed
class TrainOptions:
    """How a network is trained; ``RECIPES`` has the papers' values.

    Every field declares its help, range, choices and where it has no effect.
    """

    # fmt: off
    backbone: str = _network(
        DEFAULT_MODEL, "Network of a zoo: timm:NAME, torchvision:NAME or pcb:timm:NAME.",
        rare=False,
    )
    pretrained: bool = _network(
        True, "Random weights: or, with --pretrained, those of the zoo.",
        flag="--pretrained/--untrained", usual="pretrained", rare=False,
    )
    embedding: int = _network(
        128, "Width of the embedding; with --avsl nodes of each level.", least=1,
    )
    size: tuple[int, int] | None = _network(
        None, "Input size in pixels.", usual="the model's own", rare=False,
    )
    distance: str = _network(
        "euclidean", "Distance between embeddings.", names=DISTANCES,
        unless=Unless("on AVSL, which has its own distance", lambda o: not o.avsl),
    )
    avsl: bool = _of_avsl(
        False, "Train AVSL, whose distances simexplain attribute explains.", rare=False,
    )
    preset: str = _of_avsl(
        "paper", "AVSL as in the paper or as in its authors' code.", names=PRESETS, unless=_AVSL,
    )
    levels: tuple[str, ...] = _of_avsl(
        (), "Layer that makes a level of AVSL; repeat.", usual="the last three stages",
        flag="--level", unless=_AVSL,
    )
    eta: str = _of_avsl(
        "raw", "How certainties enter AVSL's reliabilities; raw as in the paper.", names=ETAS,
        unless=_AVSL,
    )
    edge_momentum: float = _of_avsl(
        0.5, "Share of AVSL's edges that a step keeps.", least=0, most=0.999, unless=_AVSL,
    )
    edges_per_node: int = _of_avsl(
        128, "How many lower nodes each node of AVSL is tied to; Eq. 7.", least=1, unless=_AVSL,
    )
    ablation: str = _of_avsl("full", "A row of AVSL's Table 2.", names=ABLATIONS, unless=_AVSL)
    level_weights: tuple[float, ...] = _of_avsl(
        (), "Weights of AVSL's levels in the loss, lowest first.", usual="1 each", unless=_AVSL,
    )
    loss: str = _objective("triplet", "Metric loss.", names=LOSSES, rare=False)
    loss_options: tuple[tuple[str, Any], ...] = _objective(
        (), "A setting of the loss; repeat.", flag="--loss-option",
    )
    mining: str = _objective(
        "none", "Similarity mining over such comparisons.", names=("none", *SHAPES), rare=False,
    )
    gamma: float = _objective(
        0.05, "Weight of mining; Eq. 6 of similarity attention.", least=0, unless=_MINED,
    )
    mining_options: tuple[tuple[str, Any], ...] = _objective(
        (), "A setting of mining, e.g. share=0.5; repeat.", flag="--mining-option",
        unless=_MINED_AT_ALL,
    )
    mining_start: int = _objective(
        0, "Epochs without mining at first.", least=0, unless=_MINED_AT_ALL,
    )
    mining_warmup: int = _objective(
        0, "Epochs in which gamma then grows; linearly from 0.", least=0, unless=_MINED_AT_ALL,
    )
    bce: float = _objective(
        0.0, "Weight of a classification loss (Grad-CAM baseline); 0 for none.", least=0,
    )
    bce_mining: float = _objective(
        0.0, "Weight of mining with its Grad-CAM maps; 0 for none.", least=0,
    )
    mask_weight: float = _objective(
        0.0, "Weight of attention on the wrong side of masks; 0 for none.", least=0,
    )
    mask_side: str = _objective(
        "inside", "Which side of a mask should be looked at.", names=("inside", "outside"),
        unless=Unless("without --mask-weight", lambda o: o.mask_weight > 0),
    )
    optimiser: str = _optimising("adamw", "Optimiser.", names=("adamw", "adam", "sgd"))
    lr: float = _optimising(1e-4, "Learning rate of the network.", least=0, rare=False)
    head_lr: float = _optimising(
        1e-3, "Learning rate of the embedding layer or of AVSL's heads.", least=0,
    )
    proxy_lr: float = _optimising(
        1e-2, "Learning rate of what the loss learns, such as proxies.", least=0,
    )
    reliability_lr: float = _optimising(
        1e-3, "Learning rate of AVSL's alpha and beta.", least=0, unless=_AVSL,
    )
    weight_decay: float = _optimising(
        1e-4, "Weight decay; of all but AVSL's alpha and beta.", least=0,
    )
    momentum: float = _optimising(
        0.9, "Momentum of sgd.", least=0, most=1, unless=Unless("on any optimiser but sgd", lambda
        o: o.optimiser == "sgd"),
    )
    schedule: str = _optimising(
        "constant", "How all learning rates change; cosine ends at 0.", names=("constant", "cosine",
        "step"),
    )
    step_epochs: int = _optimising(
        10, "Epochs between the steps of a schedule.", least=1, unless=_STEPPED,
    )
    step_factor: float = _optimising(
        0.5, "What a step multiplies the rates by.", least=0, most=1, unless=_STEPPED,
    )
    warmup_epochs: int = _optimising(0, "Epochs at first that warm up.", least=0)
    warmup: str = _optimising(
        "head", "How to warm up: train all but the network, or let rates grow.", names=("head",
        "linear"), unless=Unless("without --warmup-epochs", lambda o: o.warmup_epochs > 0),
    )
    clip: float = _optimising(0.0, "Largest norm of a group's gradient; 0 for none.", least=0)
    epochs: int = _run(12, "Passes over the pictures.", least=1, rare=False)
    classes_per_batch: int = _run(
        0, "Classes in a batch; 0 for 16, or all where there are fewer.", least=0,
    )
    images_per_class: int = _run(2, "Images of each class in a batch.", least=2)
    batches_per_epoch: int = _run(
        0, "Batches in an epoch; 0 for enough to draw as many pictures as DATA has.", least=0,
        most=100_000,
    )
    augmentation: str = _run(
        "sam", "How training pictures are varied at random.", names=AUGMENTATIONS,
    )
    precision: str = _run(
        "32", "Bits of floating point numbers; fewer than 32 are mixed precision.", names=("32",
        "bf16", "16"),
    )
    freeze_bn: bool = _run(
        True, "Keep the statistics of batch norm as they are; its scale and shift are trained.",
    )
    seed: int = _run(0, "Random seed.", least=0, most=2**31 - 1)
    workers: int = _run(0, "Processes that read pictures; results do not depend on it.", least=0)
    accelerator: str = _run("auto", "Where to run.", names=("auto", "cpu", "gpu", "mps"))
    devices: int = _run(
        1, "Processes on each host: GPUs, where there are; they share each batch.", least=1,
    )
    nodes: int = _run(1, "Hosts: they must share one folder.", least=1)
    eval_every: int = _run(1, "Epochs between evaluations.", least=1)
    ranks: tuple[int, ...] = _run((1, 2, 4, 8), "Ranks to report: the K of Recall@K.")
    grouped: bool = _run(False, "Leave the query's own group, as DATA has it, out of the gallery.")
    best: str = _run(
        "recall", "What the best model is chosen by; recall is that at the first of the ranks.",
        names=("recall", "map_at_r"),
    )
    checkpoint_every: int = _run(
        100, "Steps between checkpoints within an epoch; 0 for none.", least=0,
    )
    attention_triplets: int = _run(
        3, "Validation triplets whose attention is drawn each epoch.", least=0,
    )
    # fmt: on

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, list):
                raise ModelError(f"Expected {name} as a tuple, got {value!r}.")
        check_options(self, ModelError)
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
        if self.avsl and self.loss not in DISTANCE_LOSSES:
            able = ", ".join(DISTANCE_LOSSES)
            raise ModelError(f"Expected a loss of {able} for AVSL, got '{self.loss}'.")
        if self.avsl and plain:
            raise ModelError(
                f"{plain[0]} needs one embedding for each image, which AVSL has not; leave one out."
            )
        _check_terms(self)
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
    """The options with some of them replaced; lists, mappings and numpy's numbers become plain.

    Raises:
        ModelError: If a setting is unknown or its value cannot be used.
    """
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


def _check_terms(options: TrainOptions) -> None:
    """Refuses settings of the loss and of mining that do not exist, do not fit or contradict.

    Raises:
        ModelError: If there is one.
    """
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


def mining_of(options: TrainOptions) -> MiningOptions:
    """The options of mining, over triplets by default.

    Raises:
        ModelError: If one is unknown or cannot be used.
    """
    arch = "triplet" if options.mining == "none" else options.mining
    try:
        return mining_options_from(MiningOptions(arch=arch), dict(options.mining_options))
    except SimexplainError as error:
        raise ModelError(str(error)) from error


def idle_options(options: TrainOptions, split: DataSplit) -> tuple[str, ...]:
    """Options without effect, a sentence each.

    A setting counts as given where it is not the default. Masks and groups count where the
    pictures have them.

    Args:
        options: Of the run.
        split: The pictures.
    """
    lines = list(without_effect(options))
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


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, (tuple, list)) else value


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        value = tuple(value.items())
    if isinstance(value, np.generic):
        return value.item()
    return tuple(_tuples(part) for part in value) if isinstance(value, (tuple, list)) else value
