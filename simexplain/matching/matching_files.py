"""The verb for picture files: read, match, and count in pixels of the pictures."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from simexplain.arguments import typed
from simexplain.data.images import PictureSource, read_pictures
from simexplain.data.preprocessing import prepared
from simexplain.matching.matching import match
from simexplain.matching.result import Matching
from simexplain.methods.jacobians import Progress
from simexplain.models.embedder import as_similarity_model


@typed
def match_files(
    model: nn.Module,
    a: PictureSource,
    b: PictureSource,
    layer: str | nn.Module | None = None,
    *,
    score: str = "cosine",
    style: str = "exact",
    steps: int = 16,
    max_batch: int | None = None,
    progress: Progress | None = None,
) -> Matching:
    """Reads two pictures and tells which region of the first answers to which of the second.

    Points of the result are in pixels of the pictures.

    Args:
        model: A similarity model, whose ``preprocess`` is used, or any ``nn.Module`` that returns
            an embedding.
        a: A picture file, a picture of PIL or an array, as ``read_picture`` takes them.
        b: Another one.
        layer: As for :func:`~simexplain.matching.matching.match`, like all that follow.
        score: ``cosine``, ``dot`` or ``squared``.
        style: ``exact`` or ``zhu``.
        steps: Points of the quadrature where the network above the layer is not linear.
        max_batch: Bounds the images in one forward pass.
        progress: Called with how much of the work is done and how much there is.

    Raises:
        ImageError: If a picture cannot be read.
        ComparisonError: If a choice is unknown.
        ModelError: If the model or the layer cannot be used.
    """
    wrapped = as_similarity_model(model)
    pictures = read_pictures((a, b))
    views, (first, second) = prepared(wrapped.preprocess, pictures)
    result = match(
        wrapped, views[:1], views[1:], layer, score=score, style=style, steps=steps,
        max_batch=max_batch, progress=progress,
    )  # fmt: skip
    notes = wrapped.preprocess.notes + tuple(n for picture in pictures for n in picture.notes)
    return replace(
        result,
        pictures=((pictures[0], pictures[1]),),
        geometries=((first, second),),
        warnings=notes + result.warnings,
    )
