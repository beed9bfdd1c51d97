"""Several methods on a data set of comparisons: how faithful, how well pointed, at what cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.comparison import Comparison, positives_of
from simexplain.data.images import read_picture
from simexplain.data.preprocessing import Geometry, prepared
from simexplain.errors import ComparisonError, SimexplainError
from simexplain.evaluation.faithfulness import faithfulness
from simexplain.evaluation.items import Item, read_mask
from simexplain.evaluation.results import Evaluation, MethodScores
from simexplain.explaining import Layers
from simexplain.explaining_files import explain_files
from simexplain.explanation import Explanation
from simexplain.methods import Method
from simexplain.metrics.intervals import bootstrap_mean
from simexplain.metrics.masks import chance, energy, mean_valid, pointing
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model
from simexplain.tracing import listening

Recipe = tuple[str | Method, Layers, Mapping[str, Any]]
"""A method, its layers and its options, as ``explain_files`` takes them."""

METRICS = ("deletion", "insertion", "gain", "pointing", "energy")
"""What is measured; all but deletion are the better the higher."""

_COARSE = 7


def _random(maps: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand((*maps.shape[:2], _COARSE, _COARSE), generator=generator)


def _centre(maps: Tensor, generator: torch.Generator) -> Tensor:
    """A hill in the middle, where photographers put things."""
    side = torch.linspace(-1, 1, 4 * _COARSE)
    hill = (-2 * (side[:, None].square() + side[None].square())).exp()
    return hill.expand(*maps.shape[:2], -1, -1)


CONTROLS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "random": _random,
    "centre": _centre,
}
"""Maps that know nothing of the network: what a method must beat."""


@dataclass
class _Tally:
    """What one method reached so far, one entry an item."""

    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in METRICS})
    seconds: list[float] = field(default_factory=list)
    forwards: list[float] = field(default_factory=list)

    def add(self, found: Mapping[str, float]) -> None:
        for name, values in self.values.items():
            values.append(found.get(name, float("nan")))

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
        )


def evaluate_faithfulness(
    model: nn.Module,
    items: Sequence[Item | tuple[Any, ...]],
    methods: Mapping[str, Recipe],
    *,
    controls: Sequence[str] = ("random",),
    masking: str = "each",
    steps: int = 20,
    baseline: str = "blur",
    tolerance: float = 0,
    max_batch: int | None = None,
    seed: int = 0,
    level: float = 0.95,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measures methods on the same comparisons, with the same score for all of them.

    Deletion and insertion run on the pictures at the model's own size, whatever size a method
    magnified them to. Masks are compared with the maps at the pictures' own resolution, in the part
    that the network saw. An item with several images counts once, with the mean over them.

    Args:
        model: A similarity model, or any ``nn.Module`` that returns an embedding.
        items: ``Item`` or tuples ``(paths, arch, masks)``, the masks optional.
        methods: By name ``(method, layer, options)`` as ``explain_files`` takes them.
        controls: Names in ``CONTROLS``, measured beside the methods.
        masking: As for ``faithfulness``.
        steps: As for ``faithfulness``.
        baseline: As for ``faithfulness``.
        tolerance: Of the pointing game, in pixels of the pictures.
        max_batch: Bounds the images in one forward pass.
        seed: Of random control maps and of the bootstrap.
        level: Of the confidence intervals.
        progress: Called with the number of items done and of all after each of them.

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
    run = _Run(wrapped, methods, controls, masking, steps, baseline, tolerance, max_batch, seed)
    for number, item in enumerate(records):
        run.measure(number, item)
        if progress is not None:
            progress(number + 1, len(records))
    if run.errors and not any(run.tallies[name].seconds for name in methods):
        raise next(iter(run.errors.values()))
    return Evaluation(
        methods={
            name: tally.summed(level=level, seed=seed) for name, tally in run.tallies.items()
        },
        items=tuple(tuple(str(path) for path in item.paths) for item in records),
        chance={
            "pointing": bootstrap_mean(run.hits).mean, "energy": bootstrap_mean(run.areas).mean,
        },
        broken={where: str(error) for where, error in run.errors.items()},
        settings={
            "model": wrapped.name, "masking": masking, "steps": steps, "baseline": baseline,
            "tolerance": tolerance, "seed": seed, "level": level,
        },
    )  # fmt: skip


class _Run:
    """Everything that one evaluation gathers, item by item."""

    def __init__(
        self,
        model: SimilarityModel,
        methods: Mapping[str, Recipe],
        controls: Sequence[str],
        masking: str,
        steps: int,
        baseline: str,
        tolerance: float,
        max_batch: int | None,
        seed: int,
    ) -> None:
        self.model, self.methods, self.controls = model, methods, controls
        self.curves: dict[str, Any] = {"masking": masking, "steps": steps, "baseline": baseline}
        self.tolerance, self.max_batch, self.seed = tolerance, max_batch, seed
        self.tallies = {name: _Tally() for name in (*methods, *map(_bracketed, controls))}
        self.errors: dict[str, SimexplainError] = {}
        self.hits: list[float] = []
        self.areas: list[float] = []

    def measure(self, number: int, item: Item) -> None:
        """All methods on one item; what cannot be measured is noted."""
        try:
            asked = _asked(self.model, item)
        except SimexplainError as error:
            self.errors[f"item {number}"] = error
            for tally in self.tallies.values():
                tally.add({})
            return
        self._count_chance(asked)
        sample: Explanation | None = None
        for name, recipe in self.methods.items():
            found: dict[str, float] = {}
            try:
                explanation, seconds, forwards = self._explained(item, recipe)
                found = self._scored(asked, explanation)
            except SimexplainError as error:
                self.errors[f"item {number}, {name}"] = error
            else:
                sample = explanation
                self.tallies[name].seconds.append(seconds)
                self.tallies[name].forwards.append(forwards)
            self.tallies[name].add(found)
        for name in self.controls:
            generator = torch.Generator().manual_seed(self.seed + number)
            found = {}
            if sample is not None:
                maps = CONTROLS[name](sample.maps, generator).to(sample.maps.device)
                found = self._scored(asked, replace(sample, maps=maps))
            self.tallies[_bracketed(name)].add(found)

    def _explained(self, item: Item, recipe: Recipe) -> tuple[Explanation, float, int]:
        method, layer, options = recipe
        start = time.perf_counter()
        with _counted(self.model.network) as passed:
            explanation = explain_files(
                self.model, item.paths, item.arch, method, layer, different=item.different,
                positives=item.positives, max_batch=self.max_batch, **options,
            )  # fmt: skip
            explanation.maps.cpu()  # an accelerator may still be at work
        return explanation, time.perf_counter() - start, sum(passed)

    def _scored(self, asked: _Asked, explanation: Explanation) -> dict[str, float]:
        """Every metric of one item, as the mean over its images."""
        scores = faithfulness(
            self.model, asked.comparison, explanation, max_batch=self.max_batch, **self.curves
        )
        found = {name: mean_valid(getattr(scores, name)) for name in METRICS[:3]}
        heats = [(place, explanation.on_picture(place)[1]) for place in asked.masks]
        pairs = [
            (asked.seen(place, torch.from_numpy(heat))[None], asked.mask(place)[None])
            for place, heat in heats
        ]
        if pairs:
            hits = torch.cat([pointing(heat, mask, self.tolerance) for heat, mask in pairs])
            shares = torch.cat([energy(heat, mask) for heat, mask in pairs])
            found |= {"pointing": mean_valid(hits), "energy": mean_valid(shares)}
        return found

    def _count_chance(self, asked: _Asked) -> None:
        masks = [asked.mask(place)[None] for place in asked.masks]
        if masks:
            hits = torch.cat([chance(mask, self.tolerance) for mask in masks])
            self.hits.append(mean_valid(hits))
            self.areas.append(mean_valid(torch.cat([chance(mask) for mask in masks])))


@dataclass(frozen=True)
class _Asked:
    """One item as tensors: what all methods are measured on."""

    comparison: Comparison
    masks: Mapping[int, Tensor]
    geometries: Sequence[Geometry]

    def mask(self, place: int) -> Tensor:
        return self.seen(place, self.masks[place])

    def seen(self, place: int, picture: Tensor) -> Tensor:
        """The part of a picture ``(H,W)`` that the network saw."""
        left, top, right, bottom = self.geometries[place].box
        rows = slice(math.floor(top), math.ceil(bottom))
        return picture[rows, math.floor(left) : math.ceil(right)]


def _asked(model: SimilarityModel, item: Item) -> _Asked:
    near = positives_of(
        item.arch, len(item.paths), different=item.different, positives=item.positives
    )
    pictures = [read_picture(path) for path in item.paths]
    views, geometries = prepared(model.preprocess, pictures)
    comparison = Comparison(views[:1], views[None, 1 : 1 + near], views[None, 1 + near :])
    masks = {
        place: read_mask(path, (picture.image.height, picture.image.width))
        for place, (path, picture) in enumerate(zip(item.masks or (), pictures, strict=False))
        if path is not None
    }
    return _Asked(comparison, masks, geometries)


@contextmanager
def _counted(network: nn.Module) -> Iterator[list[int]]:
    """Notes how many images each forward pass through the network takes."""
    passed: list[int] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        first = args[0] if args else None
        passed.append(len(first) if isinstance(first, Tensor) else 1)

    with listening(network, {"": note}):
        yield passed


def _bracketed(name: str) -> str:
    return f"({name})"
