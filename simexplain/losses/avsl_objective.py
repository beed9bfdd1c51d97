"""AVSL's objective ``J`` (Eq. 10): levels train the network, their whole alpha and beta."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.arguments import typed
from simexplain.errors import ModelError, check_choice
from simexplain.graph.distances import distances
from simexplain.graph.inference import Rows, pack
from simexplain.losses.distance_losses import DISTANCE_LOSSES, DistanceBatch, LossOnDistances
from simexplain.losses.objective import Batch, Term, check_settings
from simexplain.models.avsl import AVSL
from simexplain.models.avsl_options import AVSLOptions, avsl_options
from simexplain.models.avsl_runs import expected_avsl
from simexplain.models.base import SimilarityModel
from simexplain.networks import at_least_single

BEYOND = {
    "batch": "the proxies of the batch's classes (AVSL's code)",
    "positive": "those, and each image is only drawn to its own (AVSL's text)",
}
"""What is compared where there are more classes than proxies can be held at once."""


class Proxies(nn.Module):
    """One learned point per class and level, compared like an image.

    Attributes:
        levels: Per level ``(C,r)``; brought to unit length in use.
    """

    def __init__(
        self, classes: int, widths: Sequence[int], *, most: int = 1000, beyond: str = "batch"
    ) -> None:
        """Draws them.

        Args:
            classes: ``C``.
            widths: Nodes per level.
            most: With more classes than this, only some proxies are used in a step.
            beyond: Which, a key of :data:`BEYOND`.

        Raises:
            ModelError: If a number or name does not fit.
        """
        super().__init__()
        if classes < 1 or most < 0:
            raise ModelError(f"Expected at least 1 class and most >= 0, got {classes} and {most}.")
        check_choice("beyond", beyond, BEYOND, ModelError)
        self.classes, self.most, self.beyond = classes, most, beyond
        self.levels = nn.ParameterList(torch.empty(classes, width) for width in widths)
        for level in self.levels:
            nn.init.kaiming_normal_(level, mode="fan_out")

    @property
    def attract_only(self) -> bool:
        """Whether images are only drawn to their own proxies."""
        return self.classes > self.most and self.beyond == "positive"

    def columns(self, labels: Tensor) -> Tensor:
        """The classes ``(K,)`` whose proxies are compared with images of these labels ``(N,)``.

        Raises:
            ModelError: If a label is not the number of a class.
        """
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise ModelError(
                f"Expected class numbers from 0 to {self.classes - 1}, got "
                f"{int(labels.min())} to {int(labels.max())}; number the training classes anew."
            )
        if self.classes > self.most:
            present: Tensor = torch.unique(labels)
            return present
        return torch.arange(self.classes, device=labels.device)

    def rows(self, columns: Tensor, batch: Rows) -> Tensor:
        """Proxies as rows ``(K,E)`` of the model.

        A proxy has no CAMs: its certainty is the mean of the batch over images and nodes, level by
        level, as in AVSL's code.

        Args:
            columns: From :meth:`columns`.
            batch: The images they will be compared with.
        """
        chosen = [level[columns].to(batch.embeddings[0]) for level in self.levels]
        sure = [
            level.detach().mean().expand(own.shape)
            for level, own in zip(batch.certainties, chosen, strict=True)
        ]
        return pack(chosen, sure)


@dataclass(frozen=True)
class Ablation:
    """A row of the AVSL paper's Table 2.

    Attributes:
        inference: How the model infers a distance, a key of ``INFERENCES``.
        top_only: The model has the top level alone.
    """

    inference: str
    top_only: bool = False

    def levels(self, levels: Sequence[str]) -> tuple[str, ...]:
        """Those of these levels, the lowest first, that the model is built with."""
        return tuple(levels)[-1:] if self.top_only else tuple(levels)

    def options(self, preset: str | AVSLOptions = "paper") -> AVSLOptions:
        """The options of the model."""
        return replace(avsl_options(preset), inference=self.inference)


ABLATIONS = {
    "baseline": Ablation("top", top_only=True),
    "+M": Ablation("top"),
    "+M&R": Ablation("reliable"),
    "+M concat": Ablation("levels"),
    "full": Ablation("full"),
}
"""The rows of Table 2. All but the baseline train network and heads in exactly the same way: they
differ in alpha and beta, and in how a trained model measures."""


class AVSLLoss(Term):
    """``J = sum over levels of weight * L(d^l) + overall_weight * L(overall d)`` (Eq. 10).

    The levels' losses train the network, the heads and the proxies; the overall loss trains alpha
    and beta alone: embeddings, certainties, proxies and edges are constants for it. With an
    inference that has neither (``top`` and ``levels``, or one level) the overall loss is left out.

    In training mode each step updates the edges once (Eq. 4) by the correlations of all processes,
    before distances are taken. ``model(images)`` does that too: call the objective instead of it.

    Attributes:
        latest: The loss of every part in the latest step, before weights: ``level_0``, ... and
            ``overall``.
    """

    latest: dict[str, Tensor]

    @typed
    def __init__(
        self,
        model: AVSL,
        loss: str | Callable[..., LossOnDistances] = "proxy_anchor",
        *,
        classes: int | None = None,
        weights: float | Sequence[float] = 1.0,
        overall_weight: float = 1.0,
        level_settings: Mapping[str, Any] | None = None,
        overall_settings: Mapping[str, Any] | None = None,
        most_proxies: int = 1000,
        beyond: str = "batch",
        update_edges: bool = True,
    ) -> None:
        """Builds a loss for each level and one for the whole.

        Args:
            model: What is going to be trained; only its widths and options are read.
            loss: A name in ``DISTANCE_LOSSES``, or ``(classes, **settings) -> LossOnDistances``.
            classes: How many classes there are, where the loss has proxies or learns by class.
            weights: Of the levels, from the lowest. Eq. 10 has none; AVSL's code has.
            overall_weight: Of the overall loss.
            level_settings: For the levels' losses; a list or tuple has a value for each level.
            overall_settings: For the overall loss; the same as the last level's unless given.
            most_proxies: With more classes only proxies of the batch's classes are used.
            beyond: How, a key of ``BEYOND``.
            update_edges: Whether it updates the edges. Only one term of an objective may.

        Raises:
            ModelError: If a name, number or length does not fit.
        """
        super().__init__()
        expected_avsl(model, "to train with AVSLLoss")
        self.widths, count = model.widths, len(model.widths)
        factory = _factory(loss)
        each = [_of_level(level_settings or {}, n, count) for n in range(count)]
        self.level_weights = _weights(weights, count)
        self.overall_weight = _weights(overall_weight, 1)[0]
        own = each[-1] if overall_settings is None else dict(overall_settings)
        if isinstance(loss, str):
            for settings in (each[0], own):
                check_settings(loss, factory, settings)
        self.levels = nn.ModuleList(factory(classes, **settings) for settings in each)
        learns = count > 1 and model.options.inference in ("full", "reliable")
        self.overall = factory(classes, **own) if learns else None
        self.proxies: Proxies | None = None
        if self._level(0).uses_proxies:
            if classes is None:
                raise ModelError("Expected a number of classes for proxies; give classes.")
            self.proxies = Proxies(classes, model.widths, most=most_proxies, beyond=beyond)
        self.update_edges = update_edges
        self.loss_name = loss if isinstance(loss, str) else getattr(loss, "__name__", str(loss))
        self.latest = {}

    def layers(self, model: SimilarityModel) -> tuple[str, ...]:
        """The levels, whose CAMs the edges are made of."""
        return expected_avsl(model, "to train with AVSLLoss").levels

    def forward(self, batch: Batch) -> Tensor:
        """``J`` of a batch.

        Raises:
            ModelError: If the model is not an AVSL model of the shape this was built for.
        """
        model = self._expected(batch.model)
        # Half precision has too few digits for sums of hundreds of small squares.
        with torch.autocast(batch.images.device.type, enabled=False):
            if model.training and self.update_edges:
                self._update(model, batch)
            rows = at_least_single(batch.embeddings)
            others, columns = self._others(model, rows, batch.labels)
            parts = self._level_losses(model, rows, others, batch, columns)
            if self.overall is not None:
                parts["overall"] = self._overall_loss(model, rows, others, batch, columns)
        self.latest = {name: part.detach() for name, part in parts.items()}
        weights = [*self.level_weights, self.overall_weight]
        return torch.stack(
            [w * part for w, part in zip(weights, parts.values(), strict=False)]
        ).sum()

    def to_json(self) -> dict[str, Any]:
        """Everything that was chosen, as plain JSON values."""
        proxies = self.proxies
        return {
            "loss": self.loss_name,
            "weights": list(self.level_weights),
            "overall_weight": self.overall_weight,
            "levels": [self._level(number).settings for number in range(len(self.levels))],
            "overall": None if self.overall is None else self.overall.settings,
            "proxies": proxies
            and {"classes": proxies.classes, "most": proxies.most, "beyond": proxies.beyond},
        }

    def _level(self, number: int) -> LossOnDistances:
        level = self.levels[number]
        assert isinstance(level, LossOnDistances)
        return level

    def _expected(self, model: SimilarityModel) -> AVSL:
        avsl = expected_avsl(model, "to train with AVSLLoss")
        if avsl.widths != self.widths:
            raise ModelError(
                f"Expected a model with {self.widths} nodes, which this loss was built for, got "
                f"{avsl.widths}; build a loss for this model."
            )
        return avsl

    def _update(self, model: AVSL, batch: Batch) -> None:
        traced = batch.traced.maps
        maps = [at_least_single(traced[level].detach()) for level in model.levels]
        model.update_edges(maps, across=batch.processes.mean)
        model.update_scales(at_least_single(batch.embeddings.detach()))

    def _others(self, model: AVSL, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What the rows are compared with ``(K,E)``, proxies or themselves, and their classes."""
        if self.proxies is None:
            return rows, labels
        columns = self.proxies.columns(labels)
        return self.proxies.rows(columns, model.unpacked(rows)), columns

    def _measured(
        self, distances: Tensor, nodes: int, batch: Batch, columns: Tensor
    ) -> DistanceBatch:
        attract_only = self.proxies is not None and self.proxies.attract_only
        return DistanceBatch(distances, batch.labels, columns, nodes, batch.generator, attract_only)

    def _level_losses(
        self, model: AVSL, rows: Tensor, others: Tensor, batch: Batch, columns: Tensor
    ) -> dict[str, Tensor]:
        distances = model.level_distances(rows, others)
        return {
            f"level_{number}": loss(self._measured(distances[number], width, batch, columns))
            for number, (loss, width) in enumerate(zip(self.levels, self.widths, strict=True))
        }

    def _overall_loss(
        self, model: AVSL, rows: Tensor, others: Tensor, batch: Batch, columns: Tensor
    ) -> Tensor:
        """The only loss that alpha and beta see, and the only one that sees nothing else."""
        assert self.overall is not None
        q = model.unpacked(rows.detach())
        g = q if others is rows else model.unpacked(others.detach())
        values = distances(model.graph(), q, g)
        loss: Tensor = self.overall(self._measured(values, self.widths[-1], batch, columns))
        return loss


def _factory(loss: str | Callable[..., LossOnDistances]) -> Callable[..., LossOnDistances]:
    if not isinstance(loss, str):
        return loss
    if loss not in DISTANCE_LOSSES:
        raise ModelError(
            f"Expected a loss on distances of {', '.join(DISTANCE_LOSSES)}, got {loss!r}."
        )
    return DISTANCE_LOSSES[loss]


def _of_level(settings: Mapping[str, Any], number: int, count: int) -> dict[str, Any]:
    """The settings of one level: those with a list or tuple have a value for each."""
    own = {}
    for name, value in settings.items():
        if isinstance(value, (list, tuple)):
            if len(value) != count:
                raise ModelError(
                    f"Expected {name} as one value or {count}, one for each level, got {value}."
                )
            value = value[number]
        own[name] = value
    return own


def _weights(weights: float | Sequence[float], count: int) -> tuple[float, ...]:
    each = (weights,) * count if isinstance(weights, (int, float)) else tuple(weights)
    if len(each) != count or not all(0 <= weight < math.inf for weight in each):
        raise ModelError(
            f"Expected {count} weights of at least 0, one for each level, got {weights}."
        )
    return tuple(float(weight) for weight in each)
