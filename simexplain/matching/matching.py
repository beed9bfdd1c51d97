"""The verb: which region of one image answers to which region of another."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.arguments import typed
from simexplain.comparison import paired
from simexplain.data.images import PictureSource, read_pictures
from simexplain.data.preprocessing import Preprocess, notes_of, prepared
from simexplain.errors import ComparisonError, ModelError
from simexplain.explanation import versions
from simexplain.matching.factors import (
    SCORES,
    Factors,
    check_choices,
    pair_matrix,
    unexplained_of,
)
from simexplain.matching.result import Matching
from simexplain.methods.decomposition import MOST_STEPS, PositionParts, Progress, position_parts
from simexplain.methods.method import unexplained_share_warning
from simexplain.models.avsl import AVSL
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model
from simexplain.networks import full_precision, layer_name, unit_rows

_LONG = 20.0
_TRIED = 1.0
_FAR_OFF = 0.05


@typed
def match(
    model: nn.Module,
    a: Tensor | PictureSource,
    b: Tensor | PictureSource,
    layer: str | nn.Module | None = None,
    *,
    score: str = "cosine",
    formula: str = "exact",
    jacobians: int = 16,
    max_batch: int | None = None,
    progress: Progress | None = None,
) -> Matching:
    """Takes the score of pairs of images apart into all pairs of their positions (Zhu et al. 2019).

    Each image's vector is a sum over the positions of a layer (``position_parts``), so the score of
    two images is a sum over pairs of positions. It is exact, with biases spread evenly over the
    positions, wherever the network above the layer is linear, and but for an integration error,
    which is reported, where it is not. The model is left as it was.

    Args:
        model: A similarity model, whose ``preprocess`` is used, or any ``nn.Module`` that returns
            an embedding.
        a: A picture: a file, a picture of PIL or an array, as ``read_picture`` takes them; points
            of the result are then in its pixels. Or preprocessed images ``(B,3,H,W)``, or one
            ``(3,H,W)`` for all pairs.
        b: What each is compared with: a picture where ``a`` is one, else images ``(B,3,H',W')``,
            perhaps of another size.
        layer: A layer, or None for the model's default.
        score: ``cosine``; ``dot`` of the vectors as they are; ``squared``, the squared Euclidean
            distance of the unit embeddings.
        formula: ``exact``, or ``zhu``: no biases, pairs cut off at zero, then maps scaled to their
            maximum.
        jacobians: Points of the quadrature where the network above the layer is not linear.
        max_batch: Bounds the images in one forward pass; results do not depend on it.
        progress: Called with how much of the work is done and how much there is. Without it, a
            Python warning announces work that will take longer than 20 seconds.

    Raises:
        ImageError: If a picture cannot be read.
        ComparisonError: If images or choices do not fit.
        ModelError: If the model or the layer cannot be used.
    """
    chosen: dict[str, Any] = {
        "score": score, "formula": formula, "jacobians": jacobians, "max_batch": max_batch,
        "progress": progress,
    }  # fmt: skip
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _match(model, a, b, layer, **chosen)
    wrapped = _expected(model)
    pictures = read_pictures((a, b))
    views, (first, second) = prepared(wrapped.preprocess, pictures)
    result = _match(wrapped, views[:1], views[1:], layer, **chosen)
    return result.placed(
        notes_of(wrapped.preprocess, pictures),
        pictures=((pictures[0], pictures[1]),),
        geometries=((first, second),),
    )


@full_precision()
def _match(
    model: nn.Module,
    a: Tensor,
    b: Tensor,
    layer: str | nn.Module | None,
    *,
    score: str,
    formula: str,
    jacobians: int,
    max_batch: int | None,
    progress: Progress | None,
) -> Matching:
    """Of preprocessed images; see :func:`match`."""
    check_choices(score, formula)
    wrapped = _expected(model)
    first, second = paired(a, b)
    for name, number in (("jacobians", jacobians), ("max_batch", max_batch)):
        if number is not None and number < 1:
            raise ComparisonError(f"Expected {name} of at least 1, got {number}.")
    if jacobians > MOST_STEPS:
        raise ComparisonError(f"Expected jacobians of at most {MOST_STEPS}, got {jacobians}.")
    if layer is None:
        layer = wrapped.default_for(first)
    layer = layer_name(wrapped.network, layer)
    waited = progress or Patience(lambda text: warnings.warn(text, stacklevel=4))
    all_parts = [
        position_parts(wrapped, side, layer, steps=jacobians, max_batch=max_batch, progress=waited)
        for side in (first, second)
    ]
    result = matching_from(
        factors_of(all_parts[0]),
        factors_of(all_parts[1]),
        images=(first, second),
        preprocess=wrapped.preprocess,
        score=score,
        style=formula,
        layer=layer,
        model=wrapped.name,
    )
    more = _integration(all_parts, result, layer)
    if first.shape[1:] == second.shape[1:]:
        rows = torch.cat([unit_rows(parts.vectors) for parts in all_parts])
        more += wrapped.cautions((layer,), torch.cat((first, second)), rows)
    else:
        more += wrapped.cautions((layer,), first)
    return replace(
        result,
        warnings=result.warnings + more,
        regions=(wrapped.region((layer,), first), wrapped.region((layer,), second)),
        bypass=wrapped.bypass((layer,), first),
    )


@full_precision()
def matching_from(
    a: Factors,
    b: Factors,
    images: tuple[Tensor, Tensor],
    preprocess: Preprocess,
    *,
    score: str = "cosine",
    style: str = "exact",
    layer: str = "",
    model: str = "",
) -> Matching:
    """A matching from what the positions of both sides add to their vectors; no model is run.

    Args:
        a: Factors of the first images, such as an index keeps; float16 will do.
        b: Factors of the second images, in the same basis. One image on either side is compared
            with all of the other.
        images: Preprocessed images of both sides ``(B,3,H,W)`` or ``(1,3,H,W)``, whose pixels are
            counted and which figures show.
        preprocess: How they were preprocessed.
        score: As for :func:`match`.
        style: As for :func:`match`.
        layer: The layer of the factors.
        model: Name of the model.

    Raises:
        ComparisonError: If names are unknown or factors or images do not fit together.
        ModelError: If a vector is not finite, or zero where its direction counts.
    """
    check_choices(score, style)
    for side, factors in (("first", a), ("second", b)):
        _check_vectors(factors.vectors, side, unit=SCORES[score].unit)
    matrix, values = pair_matrix(a, b, score=score, style=style)
    count = len(matrix)
    if any(len(side) not in (1, count) or side.dim() != 4 for side in images):
        raise ComparisonError(
            f"Expected images (B,3,H,W) of {count} pairs, got {tuple(images[0].shape)} and "
            f"{tuple(images[1].shape)}."
        )
    expanded = [side.detach().expand(count, *side.shape[1:]) for side in images]
    share = unexplained_of(a, b, score=score, values=values)
    note = "Style zhu leaves biases out: the matrix adds up to the score but for the residual."
    return Matching(
        matrix=matrix,
        score=values,
        score_name=score,
        style=style,
        layer=layer,
        model=model,
        images=(expanded[0], expanded[1]),
        preprocess=preprocess,
        warnings=((note,) if style == "zhu" else ())
        + unexplained_share_warning(float(share.max()), layer),
        versions=versions(),
        unexplained=share,
    )


def factors_of(parts: PositionParts) -> Factors:
    """What the positions of images add to their vectors, as factors of a matching."""
    return Factors(parts.parts.detach(), parts.rest.detach(), parts.vectors.detach())


class Patience:
    """Tells once, a second into the work, that it will take long."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell: Callable[[str], None] | None = tell
        self.started = self.latest = time.monotonic()
        self.done = 0

    def __call__(self, done: int, work: int) -> None:
        """Listens to how much of the work is done; where it begins again, so does the clock."""
        if done <= self.done:
            self.started = self.latest
        self.done, self.latest = done, time.monotonic()
        spent = self.latest - self.started
        ahead = spent / done * (work - done)
        if self.tell is not None and spent > _TRIED and ahead > _LONG:
            self.tell(
                f"Taking the vectors of one side apart will take about {ahead:.0f} seconds more; a "
                "later layer or fewer steps is quicker."
            )
            self.tell = None


def _expected(model: nn.Module) -> SimilarityModel:
    wrapped = as_similarity_model(model)
    if isinstance(wrapped, AVSL):
        raise ModelError(
            f"Expected a network with one vector for each image, got the AVSL model "
            f"{wrapped.name}; attribute takes its distance apart."
        )
    return wrapped


def _check_vectors(vectors: Tensor, side: str, *, unit: bool) -> None:
    for bad, what in (
        (~vectors.isfinite().all(dim=1), "is not finite"),
        ((vectors == 0).all(dim=1) & unit, "is the zero vector, which has no direction"),
    ):
        if bool(bad.any()):
            raise ModelError(
                f"The vector of the {side} image of pair {int(bad.nonzero()[0, 0]) + 1} {what}; "
                "look for NaN in the weights or the input, or for dead weights."
            )


def _integration(all_parts: list[PositionParts], result: Matching, layer: str) -> tuple[str, ...]:
    """What to know where Jacobians were averaged."""
    steps = max(parts.steps for parts in all_parts)
    worst = max(float(parts.residual.max()) for parts in all_parts)
    if steps == 0:
        return ()
    missing = float(result.residual.abs().max())
    advice = "; more steps or a later layer bring it down" if worst > _FAR_OFF else ""
    return (
        f"The network above {layer} is not linear, so {steps} Jacobians were averaged on the way "
        f"from a blank image; that leaves out {worst:.1g} of a vector's length and {missing:.1g} "
        f"of the score{advice}.",
    )
