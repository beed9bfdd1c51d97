"""How far to believe a map: deletion and insertion, pointing, and sanity under random weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.arguments import typed
from simexplain.comparison import Comparison, positives_of
from simexplain.data.images import Picture, read_pictures
from simexplain.data.preprocessing import Geometry, prepared
from simexplain.errors import ComparisonError, ModelError
from simexplain.evaluation.items import Item, read_mask
from simexplain.evaluation.results import FaithfulnessScores, SanityScores
from simexplain.explaining_tensors import check_images, embeddings_of, explain_tensors
from simexplain.explanation import Explanation
from simexplain.methods import MethodLike, takes_layers
from simexplain.methods.method import margin_directions
from simexplain.methods.pixel_methods import black_of, check_range
from simexplain.methods.rows import Layers
from simexplain.metrics.curves import BASELINES, Curve, Score, deletion, insertion
from simexplain.metrics.maps import chance, energy, mean_valid, pointing
from simexplain.metrics.stability import AGREEMENTS, randomisable, randomised
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model
from simexplain.tracing import listening, trace

PERTURBATIONS = ("single", "joint")
"""Which images lose pixels at the same time: one while all others are held, or all."""

LEAST = 0.05
"""The share of the largest possible score that covering has to cost for areas to be normalised."""


@typed
def faithfulness(
    model: nn.Module,
    comparison: Comparison,
    maps: Explanation | Tensor,
    *,
    perturb: str = "single",
    curve_steps: int = 20,
    baseline: str = "blur",
    least: float = LEAST,
    max_batch: int | None = None,
) -> FaithfulnessScores:
    """How much of the margin of similarities goes with the hottest pixels, and comes with them.

    With ``single`` the score of image ``i`` is ``d_i . f(x_i)``, the part of the margin that the
    image has a say in: ``d_i`` is its direction (``margin_directions``) at the embeddings of the
    whole images, which are held. With ``joint`` all images lose the same share of their pixels
    at once, and the score is the margin itself; for a pair, the similarity of the two. Beware that
    two deleted pictures may be alike as well: two black ones are one and the same, and their
    similarity of 1 leaves nothing to lose, so that normalised areas are NaN; ``mean`` and ``blur``
    keep the tone of each picture.

    Areas are normalised by what covering the whole image costs. Where that is little, the quotient
    grows without bound, so it is NaN where the cost is below ``least`` times the largest score that
    a row of that length could have, ``|d_i| |f(x_i)|`` (joint: that of the anchor). This depends
    on the images alone, so the same ones are left out whatever the maps.

    Args:
        model: A similarity model, or any ``nn.Module`` that returns an embedding.
        comparison: Preprocessed images ``(3,H,W)``.
        maps: An explanation of these images, or maps ``(B,K,h,w)`` of any range; where they are
            signed, negative heat counts as the least important.
        perturb: ``single`` or ``joint``.
        curve_steps: Equal fractions into which the pixels are cut.
        baseline: ``blur``, ``mean``, ``black`` or ``border``; black before the model's
            normalisation.
        least: See above, in [0, 1]; 0 normalises whatever falls at all.
        max_batch: Bounds the images in one forward pass; results do not depend on it.

    Raises:
        ComparisonError: If images, maps or options do not fit.
        ModelError: If the model cannot be used.
    """
    wrapped = as_similarity_model(model)
    check_images(comparison)
    heat = maps.maps if isinstance(maps, Explanation) else maps
    stack = comparison.stacked()
    if heat.dim() != 4 or heat.shape[:2] != stack.shape[:2]:
        raise ComparisonError(
            f"Expected maps ({stack.shape[0]},{stack.shape[1]},h,w) for these comparisons, got "
            f"{tuple(heat.shape)}."
        )
    if perturb not in PERTURBATIONS or baseline not in BASELINES:
        raise ComparisonError(
            f"Expected perturb of {', '.join(PERTURBATIONS)} and baseline of "
            f"{', '.join(BASELINES)}, got '{perturb}' and '{baseline}'."
        )
    check_range("least", least, 0, 1)
    ground = black_of(wrapped) if baseline == "black" else baseline
    options: dict[str, Any] = {"steps": curve_steps, "baseline": ground, "max_batch": max_batch}
    rows = embeddings_of(wrapped, comparison, max_batch)
    directions = margin_directions(comparison.like(rows))
    gaps = (least * directions.norm(dim=2) * rows.norm(dim=2)).tolist()
    curves = []
    for index, scores in enumerate(_scores(wrapped, comparison, directions, perturb, max_batch)):
        parts = [(stack[index], heat[index])]
        if perturb == "single":
            parts = list(zip(stack[index], heat[index], strict=True))
        curves.append(
            [
                tuple(curve(score, *part, least=gap, **options) for curve in (deletion, insertion))
                for score, part, gap in zip(scores, parts, gaps[index], strict=False)
            ]
        )
    roles = comparison.roles if perturb == "single" else ("all",)
    settings = {"perturb": perturb, "steps": curve_steps, "baseline": baseline, "least": least}
    return _collected(curves, roles, settings)


def _scores(
    model: SimilarityModel,
    comparison: Comparison,
    directions: Tensor,
    perturb: str,
    max_batch: int | None,
) -> list[list[Score]]:
    """The scores of each comparison, one for each image or one for all."""
    if perturb == "single":
        return [[_along(model, direction, max_batch) for direction in own] for own in directions]
    return [[_margin(model, comparison, max_batch)] for _ in range(comparison.batch)]


def _along(model: SimilarityModel, direction: Tensor, max_batch: int | None) -> Score:
    def score(images: Tensor) -> Tensor:
        return trace(model, images, (), max_batch=max_batch).embeddings @ direction

    return score


def _margin(model: SimilarityModel, comparison: Comparison, max_batch: int | None) -> Score:
    """The margin of whole groups ``(M,K,3,H,W)`` with the roles of the comparison."""
    cut = 1 + comparison.positives.shape[1]

    def score(groups: Tensor) -> Tensor:
        rows = trace(model, groups.flatten(0, 1), (), max_batch=max_batch).embeddings
        stack = rows.view(*groups.shape[:2], -1)
        embeddings = Comparison(stack[:, 0], stack[:, 1:cut], stack[:, cut:])
        return (margin_directions(embeddings)[:, 0] * stack[:, 0]).sum(dim=1)

    return score


def _collected(
    all_curves: list[list[tuple[Curve, ...]]], roles: tuple[str, ...], settings: dict[str, Any]
) -> FaithfulnessScores:
    def each(number: int, name: str) -> Tensor:
        rows = [[getattr(curves[number], name) for curves in row] for row in all_curves]
        return torch.tensor(rows, dtype=torch.float64)

    return FaithfulnessScores(
        roles=roles,
        deletion=each(0, "area"),
        insertion=each(1, "area"),
        raw_deletion=each(0, "raw_area"),
        raw_insertion=each(1, "raw_area"),
        whole=each(0, "whole"),
        empty=each(0, "empty"),
        settings=settings,
    )


METRICS = ("deletion", "insertion", "gain", "pointing", "energy")
"""What is measured; all but deletion are the better the higher."""

_AREAS = METRICS[:3]
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


def controlled(sample: Explanation, control: str, seed: int) -> Explanation:
    """An explanation with the maps of a control in place of its own."""
    maps = CONTROLS[control](sample.maps, torch.Generator().manual_seed(seed))
    return replace(sample, maps=maps.to(sample.maps.device))


@dataclass(frozen=True)
class LoadedItem:
    """One comparison as tensors: what all methods are measured on.

    Attributes:
        comparison: Preprocessed images.
        masks: For the places that have one, a boolean mask ``(H0,W0)`` in the size of the picture.
        pictures: Where files are compared.
        geometries: Where the images lie in the pictures; empty where tensors are compared.
    """

    comparison: Comparison
    masks: Mapping[int, Tensor]
    pictures: tuple[Picture, ...] = ()
    geometries: tuple[Geometry, ...] = ()

    def mask(self, index: int) -> Tensor:
        """The mask of an image, in the part that the network saw."""
        return self.seen(index, self.masks[index])

    def seen(self, index: int, picture: Tensor) -> Tensor:
        """The part of a picture ``(H0,W0)`` that the network saw."""
        if not self.geometries:
            return picture
        left, top, right, bottom = self.geometries[index].box
        rows = slice(math.floor(top), math.ceil(bottom))
        return picture[rows, math.floor(left) : math.ceil(right)]

    def chances(self, tolerance: float) -> dict[str, float]:
        """What random points (``pointing``) and flat maps (``energy``) reach; {} without masks."""
        masks = [self.mask(index)[None] for index in self.masks]
        if not masks:
            return {}
        hits = torch.cat([chance(mask, tolerance) for mask in masks])
        areas = torch.cat([chance(mask) for mask in masks])
        return {"pointing": mean_valid(hits), "energy": mean_valid(areas)}


def load_item(model: SimilarityModel, item: Item) -> LoadedItem:
    """Reads the pictures and masks of an item."""
    near = positives_of(
        item.arch, len(item.paths), negative=item.negative, positives=item.positives
    )
    pictures = read_pictures(item.paths)
    views, geometries = prepared(model.preprocess, pictures)
    comparison = Comparison(views[:1], views[None, 1 : 1 + near], views[None, 1 + near :])
    masks = {
        index: read_mask(path, geometry.original)
        for index, (path, geometry) in enumerate(zip(item.masks or (), geometries, strict=False))
        if path is not None
    }
    return LoadedItem(comparison, masks, tuple(pictures), tuple(geometries))


@dataclass(frozen=True)
class Measures:
    """How explanations are measured, the same for all that are compared.

    ``perturb``, ``steps`` (its ``curve_steps``) and ``baseline`` are those of :func:`faithfulness`,
    ``tolerance`` is that of the pointing game in pixels of the pictures, ``max_batch`` bounds the
    images in one forward pass, and ``seed`` is that of control maps.
    """

    perturb: str
    steps: int
    baseline: str
    tolerance: float
    max_batch: int | None
    seed: int

    @property
    def curves(self) -> dict[str, Any]:
        """How deletion and insertion are made, as it is written to results."""
        return {"perturb": self.perturb, "steps": self.steps, "baseline": self.baseline}

    def __call__(
        self, model: SimilarityModel, question: LoadedItem, explanation: Explanation
    ) -> dict[str, tuple[float, ...]]:
        """Every metric of an explanation of one comparison.

        Returns:
            Areas of all images, one number where they are masked together; with masks ``pointing``
            and ``energy``, NaN for images without one.
        """
        scores = faithfulness(
            model,
            question.comparison,
            explanation,
            perturb=self.perturb,
            curve_steps=self.steps,
            baseline=self.baseline,
            max_batch=self.max_batch,
        )
        areas = {name: tuple(getattr(scores, name)[0].tolist()) for name in _AREAS}
        if not question.masks:
            return areas
        hits = [math.nan] * question.comparison.count
        shares = list(hits)
        for index in question.masks:
            heat = torch.from_numpy(explanation.on_picture(index, raw=True)[1])
            pair = question.seen(index, heat)[None], question.mask(index)[None]
            hits[index] = float(pointing(*pair, self.tolerance))
            shares[index] = float(energy(*pair))
        return {**areas, "pointing": tuple(hits), "energy": tuple(shares)}


def timed(
    model: SimilarityModel, explained: Callable[[], Explanation]
) -> tuple[Explanation, float, int]:
    """An explanation, its seconds, and how many images passed forward for it."""
    passed: list[int] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        first = args[0] if args else None
        passed.append(len(first) if isinstance(first, Tensor) else 1)

    start = time.perf_counter()
    with listening(model.network, {"": note}):
        explanation = explained()
        explanation.maps.cpu()  # an accelerator may still be at work
    return explanation, time.perf_counter() - start, sum(passed)


@typed
def sanity_check(
    model: nn.Module,
    comparison: Comparison,
    method: str | MethodLike = "sam",
    layer: Layers = None,
    *,
    depths: int | Sequence[int] = 8,
    order: Sequence[str] | None = None,
    seed: int = 0,
    max_batch: int | None = None,
    **options: Any,
) -> SanityScores:
    """How alike a method's maps stay under cascading randomisation of the network's parameters.

    Maps that stay alike show edges or the middle of the picture rather than the network. The
    similarity is that of the raw maps, with their sign. The network is as before afterwards.

    Args:
        model: A similarity model, or any ``nn.Module`` that returns an embedding.
        comparison: Preprocessed images ``(3,H,W)``.
        method: As for ``explain``.
        layer: As for ``explain``; the default is found before anything is forgotten.
        depths: How many layers to forget each time, or in how many even strides to forget all.
        order: Layers from the last to the first; by default in reverse order of registration.
        seed: Of the new values.
        max_batch: Bounds the images in one forward pass.
        **options: As for ``explain``.

    Raises:
        ModelError: If the network has nothing to forget, or a layer cannot be used.
    """
    wrapped = as_similarity_model(model)
    network = wrapped.network
    names = tuple(order) if order is not None else randomisable(network)
    if not names:
        raise ModelError(f"{wrapped.name} has no parameters that could be randomised.")
    chosen = _depths(depths, len(names))
    given: dict[str, Any] = {"max_batch": max_batch, "check": False, **options}
    own = explain_tensors(wrapped, comparison, method, layer, **given)
    used = own.layers if layer is None and takes_layers(method) else layer
    similarities: list[Tensor] = []
    errors: dict[str, str] = {}
    for depth in chosen:
        maps = None
        with randomised(network, depth, seed, names):
            try:
                maps = explain_tensors(wrapped, comparison, method, used, **given).maps
            except ModelError as error:  # such as an embedding that is zero now
                errors[str(depth)] = str(error)
        similarities.append(_alike(own.maps, maps))
    values = torch.stack(similarities)
    return SanityScores(
        depths=chosen,
        layers=tuple(names[depth - 1] if depth else "" for depth in chosen),
        agreement={name: values[..., number] for number, name in enumerate(AGREEMENTS)},
        roles=comparison.roles,
        errors=errors,
        settings={"method": own.method, "layers": own.layers, "model": own.model, "seed": seed},
    )


def _depths(depths: int | Sequence[int], most: int) -> tuple[int, ...]:
    """Which numbers of layers to forget, always beginning with none."""
    if isinstance(depths, int):
        count = max(1, min(depths, most))
        depths = [round(step * most / count) for step in range(1, count + 1)]
    if any(not 0 <= depth <= most for depth in depths):
        raise ModelError(f"Expected depths between 0 and {most} layers, got {list(depths)}.")
    return tuple(sorted({0, *depths}))


def _alike(own: Tensor, maps: Tensor | None) -> Tensor:
    """Every measure for every image, ``(B,K,A)``; NaN without maps."""
    batch, count = own.shape[:2]
    values = torch.full((batch, count, len(AGREEMENTS)), torch.nan, dtype=torch.float64)
    if maps is None or not bool(maps.isfinite().all()):
        return values
    for index in range(batch):
        for position in range(count):
            for number, measure in enumerate(AGREEMENTS.values()):
                pair = own[index, position], maps[index, position]
                values[index, position, number] = measure(*pair)
    return values
