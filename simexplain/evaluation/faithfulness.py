"""Does the margin follow what a map calls important? Deletion and insertion on comparisons."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from simexplain.arguments import typed
from simexplain.comparison import Comparison
from simexplain.errors import ComparisonError
from simexplain.evaluation.results import FaithfulnessScores
from simexplain.explaining_tensors import check_images, embeddings_of
from simexplain.explanation import Explanation
from simexplain.methods.directions import margin_directions
from simexplain.methods.scoring import black_of, check_range
from simexplain.metrics.curves import BASELINES, Curve, Score, deletion, insertion
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model
from simexplain.tracing import trace

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
    steps: int = 20,
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
        steps: Equal fractions into which the pixels are cut.
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
    options: dict[str, Any] = {"steps": steps, "baseline": ground, "max_batch": max_batch}
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
    settings = {"perturb": perturb, "steps": steps, "baseline": baseline, "least": least}
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
