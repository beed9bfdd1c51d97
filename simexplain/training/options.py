"""Every setting of a training run, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_type_hints

import numpy as np

from simexplain.arguments import typed
from simexplain.errors import ModelError
from simexplain.models.backbones import DEFAULT_MODEL
from simexplain.renaming import renamed, takes_old_names
from simexplain.training.limits import avsl_losses, check_terms, check_types, check_values

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


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, (tuple, list)) else value


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        value = tuple(value.items())
    if isinstance(value, np.generic):
        return value.item()
    return tuple(_tuples(part) for part in value) if isinstance(value, (tuple, list)) else value
