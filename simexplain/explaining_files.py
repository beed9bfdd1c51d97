"""The verb for picture files: read, explain, and map the heat back onto the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from simexplain.comparison import Comparison, positives_of
from simexplain.data.images import Picture, read_picture
from simexplain.data.preprocessing import Geometry, prepared
from simexplain.explaining import Layers, check_magnify, explain_view
from simexplain.explanation import Explanation
from simexplain.methods import Method
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model


def explain_files(
    model: nn.Module,
    paths: Sequence[str | Path],
    arch: str = "triplet",
    method: str | Method = "sam",
    layer: Layers = None,
    *,
    different: bool = False,
    positives: int = 1,
    magnify: float = 1,
    scale: str = "image",
    max_batch: int | None = None,
    **options: Any,
) -> Explanation:
    """Reads pictures, explains them, and maps the heat back onto the pictures themselves.

    Args:
        model: A similarity model, whose ``preprocess`` is used, or any ``nn.Module`` that returns
            an embedding.
        paths: Picture files, anchor first, then positives, then negatives.
        arch: ``siamese``, ``triplet``, ``quadruplet`` or ``set``.
        method: A name in ``METHODS`` or an object like ``SimilarityAttention(weights="signed")``.
        layer: A layer, several to be multiplied, or None for the model's default.
        different: The other image of a siamese pair is a negative.
        positives: How many images after the anchor are positives, for ``set``.
        magnify: Shows the network this many times larger images, with the pictures' own finer
            detail; the result reports how far that moved the embeddings.
        scale: ``image`` draws every map to its own maximum, ``shared`` to that of its comparison.
        max_batch: Bounds the images in one forward pass; results do not depend on it.
        **options: Passed to a method given by name, such as ``weights="relative"``.

    Raises:
        ImageError: If a picture cannot be read.
        ComparisonError: If there are too few or too many pictures for ``arch``.
        ModelError: If the model or a layer cannot be used.
    """
    wrapped = as_similarity_model(model)
    check_magnify(magnify)
    count = positives_of(arch, len(paths), different=different, positives=positives)
    pictures = [read_picture(path) for path in paths]
    own, geometries = _tensors(wrapped, pictures, 1, count)
    view = own
    if magnify != 1:
        view, geometries = _tensors(wrapped, pictures, magnify, count)
    result = explain_view(
        wrapped, own, view, method, layer, magnify=magnify, scale=scale, max_batch=max_batch,
        **options,
    )  # fmt: skip
    notes = wrapped.preprocess.notes + tuple(n for picture in pictures for n in picture.notes)
    return replace(
        result,
        pictures=tuple(pictures),
        geometries=tuple(geometries),
        warnings=notes + result.warnings,
    )


def _tensors(
    model: SimilarityModel, pictures: Sequence[Picture], magnify: float, positives: int
) -> tuple[Comparison, list[Geometry]]:
    """The pictures as one comparison at ``magnify`` times the model's own size."""
    prepare = model.preprocess
    height, width = (max(1, round(side * magnify)) for side in prepare.size)
    prepare = replace(prepare, size=(height, width))
    views, geometries = prepared(prepare, pictures)
    stack = views.unsqueeze(0)
    comparison = Comparison(stack[:, 0], stack[:, 1 : 1 + positives], stack[:, 1 + positives :])
    return comparison, geometries
