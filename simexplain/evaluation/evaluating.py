"""Several methods on a data set of comparisons: how faithful, how well pointed, at what cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from torch import nn

from simexplain.arguments import typed
from simexplain.data.folders import Progress
from simexplain.data.images import PictureSource
from simexplain.errors import ComparisonError, SimexplainError
from simexplain.evaluation.comparing import MethodSetup, settled
from simexplain.evaluation.faithfulness import (
    CONTROLS,
    METRICS,
    LoadedItem,
    Measures,
    controlled,
    load_item,
    timed,
)
from simexplain.evaluation.items import Item
from simexplain.evaluation.results import Evaluation, MethodScores, means
from simexplain.explaining import explain
from simexplain.explanation import Explanation
from simexplain.metrics.intervals import bootstrap_mean
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model


@dataclass
class _Tally:
    """What one method reached so far, one entry an item."""

    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in METRICS})
    seconds: list[float] = field(default_factory=list)
    forwards: list[float] = field(default_factory=list)
    measuring: list[float] = field(default_factory=list)

    def add(self, scores: Mapping[str, float]) -> None:
        for name, values in self.values.items():
            values.append(scores.get(name, float("nan")))

    def summed(self, *, level: float, seed: int) -> MethodScores:
        """Means with intervals; a control costs nothing."""
        return MethodScores(
            values={name: tuple(values) for name, values in self.values.items()},
            intervals={
                name: bootstrap_mean(values, level=level, seed=seed)
                for name, values in self.values.items()
            },
            seconds=median(self.seconds) if self.seconds else 0.0,
            forwards=median(self.forwards) if self.forwards else 0.0,
            measuring=median(self.measuring) if self.measuring else 0.0,
        )


@typed
def evaluate_faithfulness(
    model: nn.Module,
    items: Sequence[Item | tuple[Any, ...]],
    methods: Mapping[str, MethodSetup],
    *,
    controls: Sequence[str] = ("random",),
    perturb: str = "single",
    curve_steps: int = 20,
    baseline: str = "blur",
    tolerance: float = 0,
    max_batch: int | None = None,
    seed: int = 0,
    level: float = 0.95,
    progress: Progress | None = None,
    estimate: Callable[[float], None] | None = None,
) -> Evaluation:
    """Measures methods on the same comparisons, with the same score for all of them.

    Deletion and insertion run on the pictures at the model's own size, whatever size a method
    upscaled them to. Masks are compared with the maps at the pictures' own resolution, in the part
    that the network saw. An item with several images counts once, with the mean over them.

    Args:
        model: A similarity model, or any ``nn.Module`` that returns an embedding.
        items: ``Item`` or tuples ``(paths, arch, masks)``, the masks optional.
        methods: By name ``(method, layer, options)`` as ``explain`` takes them.
        controls: Names in ``CONTROLS``, measured beside the methods.
        perturb: As for ``faithfulness``.
        curve_steps: As for ``faithfulness``.
        baseline: As for ``faithfulness``.
        tolerance: Of the pointing game, in pixels of the pictures.
        max_batch: Bounds the images in one forward pass.
        seed: Of random control maps and of the bootstrap.
        level: Of the confidence intervals.
        progress: Called with the number of items done and of all after each of them.
        estimate: Called once, after the first item of several, with the seconds that the others
            will take if each takes as long.

    Raises:
        SimexplainError: If no item could be measured by any method, with the reason of the first;
            the reasons of some are in the result.
    """
    wrapped = as_similarity_model(model)
    records = [item if isinstance(item, Item) else Item(*item) for item in items]
    unknown = [name for name in controls if name not in CONTROLS]
    if unknown or not records or not methods:
        raise ComparisonError(
            f"Expected at least one item and one method, and controls of {', '.join(CONTROLS)}, "
            f"got {len(records)} items, {len(methods)} methods and {list(controls)}."
        )
    measures = Measures(perturb, curve_steps, baseline, tolerance, max_batch, seed)
    run = _Run(wrapped, methods, controls, measures)
    start = time.perf_counter()
    for number, item in enumerate(records):
        run.measure(number, item)
        if estimate is not None and number == 0 and len(records) > 1:
            estimate((time.perf_counter() - start) * (len(records) - 1))
        if progress is not None:
            progress(number + 1, len(records))
    if run.errors and not any(run.tallies[name].seconds for name in methods):
        raise next(iter(run.errors.values()))
    return Evaluation(
        methods={
            name: tally.summed(level=level, seed=seed) for name, tally in run.tallies.items()
        },
        items=tuple(tuple(map(_name, range(len(item.paths)), item.paths)) for item in records),
        chance={
            "pointing": bootstrap_mean(run.hits).mean, "energy": bootstrap_mean(run.areas).mean,
        },
        errors={where: str(error) for where, error in run.errors.items()},
        settings={
            "model": wrapped.name, **measures.curves,
            "tolerance": tolerance, "seed": seed, "level": level,
        },
        seconds=time.perf_counter() - start,
    )  # fmt: skip


class _Run:
    """Everything that one evaluation gathers, item by item."""

    def __init__(
        self,
        model: SimilarityModel,
        methods: Mapping[str, MethodSetup],
        controls: Sequence[str],
        measures: Measures,
    ) -> None:
        self.model, self.controls, self.measures = model, controls, measures
        self.methods = {name: _settled(setup) for name, setup in methods.items()}
        self.tallies = {name: _Tally() for name in (*methods, *map(_bracketed, controls))}
        self.errors: dict[str, SimexplainError] = {}
        self.hits: list[float] = []
        self.areas: list[float] = []

    def measure(self, number: int, item: Item) -> None:
        """All methods on one item; what cannot be measured is noted."""
        try:
            question = load_item(self.model, item)
        except SimexplainError as error:
            self.errors[f"item {number}"] = error
            for tally in self.tallies.values():
                tally.add({})
            return
        if levels := question.chances(self.measures.tolerance):
            self.hits.append(levels["pointing"])
            self.areas.append(levels["energy"])
        sample: Explanation | None = None
        for name, setup in self.methods.items():
            scores: dict[str, float] = {}
            try:
                explanation, seconds, forwards = self._explained(item, setup)
                scores = self._scored(question, explanation, name)
            except SimexplainError as error:
                self.errors[f"item {number}, {name}"] = error
            else:
                sample = explanation
                self.tallies[name].seconds.append(seconds)
                self.tallies[name].forwards.append(forwards)
            self.tallies[name].add(scores)
        for name in self.controls:
            scores = {}
            if sample is not None:
                control = controlled(sample, name, self.measures.seed + number)
                scores = self._scored(question, control, _bracketed(name))
            self.tallies[_bracketed(name)].add(scores)

    def _explained(self, item: Item, setup: MethodSetup) -> tuple[Explanation, float, int]:
        method, layer, options = setup
        return timed(
            self.model,
            lambda: explain(
                self.model, item.paths, method, layer, arch=item.arch, negative=item.negative,
                positives=item.positives, max_batch=self.measures.max_batch, check=False, **options,
            ),
        )  # fmt: skip

    def _scored(
        self, question: LoadedItem, explanation: Explanation, name: str
    ) -> dict[str, float]:
        """Every metric of one item, as the mean over its images; notes what it took."""
        start = time.perf_counter()
        scores = self.measures(self.model, question, explanation)
        self.tallies[name].measuring.append(time.perf_counter() - start)
        return means(scores)


def _settled(setup: MethodSetup) -> MethodSetup:
    """The setup with its files read once; where its options do not fit, every item reports it."""
    try:
        return settled(setup)
    except (SimexplainError, TypeError):
        return setup


def _name(index: int, source: PictureSource) -> str:
    """The path of a picture; one from memory has none."""
    return str(source) if isinstance(source, (str, Path)) else f"image {index + 1}"


def _bracketed(name: str) -> str:
    return f"({name})"
