"""The verb for picture files: read, explain, and map the heat back onto the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain.arguments import typed
from simexplain.comparison import Comparison, positives_of
from simexplain.data.folders import Batches, pictures_in, read_item
from simexplain.data.images import Picture, PictureSource, read_pictures
from simexplain.data.preprocessing import Geometry, Preprocess, prepared
from simexplain.errors import ComparisonError, ImageError
from simexplain.explaining import check_upscale, checked_vectors, explain, explain_items
from simexplain.explanation import Explanation
from simexplain.methods.rows import Layers, Methods
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model
from simexplain.models.frames import padded_sets
from simexplain.models.pairs import PairModel
from simexplain.pair_explanation import PairExplanation
from simexplain.tracing import trace


@typed
def explain_files(
    model: nn.Module,
    paths: Sequence[PictureSource],
    arch: str | None = None,
    method: Methods = None,
    layer: Layers = None,
    *,
    negative: bool = False,
    positives: int = 1,
    upscale: float = 1,
    scale: str = "image",
    pooling: str | None = None,
    max_batch: int | None = None,
    check: bool = True,
    **options: Any,
) -> Explanation:
    """Reads pictures, explains them, and maps the heat back onto the pictures themselves.

    Args:
        model: A similarity model, whose ``preprocess`` is used, or any ``nn.Module`` that returns
            an embedding.
        paths: Picture files, anchor first, then positives, then negatives; or pictures of PIL or
            arrays, as ``read_picture`` takes them, mixed with files as you like. A folder is one
            item of several frames: a video clip, photographs of one thing.
        arch: ``siamese``, ``triplet``, ``quadruplet`` or ``set``; unless given, two pictures are
            siamese and three a triplet.
        method: As for :func:`~simexplain.explaining.explain`: a name, an object, several to make
            rows, or None for similarity attention as published and ``focus``.
        layer: A layer, several to be multiplied, or None for the model's default.
        negative: The other image of a siamese pair is a negative.
        positives: How many images after the anchor are positives, for ``set``.
        upscale: Shows the network this many times larger images, with the pictures' own finer
            detail; the result reports how far that moved the embeddings.
        scale: ``image`` draws every map to its own maximum, ``shared`` to that of its comparison.
        pooling: ``mean`` or ``max`` of the frames of an item; unless given ``mean``, and of files
            with several pages or frames the first alone is taken.
        max_batch: Bounds the images in one forward pass; results do not depend on it.
        check: Hide what each map marks, and as much elsewhere, and ask the model again.
        **options: Passed to a method given by name, such as ``weights="relative"``.

    Raises:
        ImageError: If a picture cannot be read.
        ComparisonError: If there are too few or too many pictures for ``arch``.
        ModelError: If the model or a layer cannot be used.
    """
    wrapped = as_similarity_model(model)
    check_upscale(upscale)
    count = positives_of(arch, len(paths), negative=negative, positives=positives)
    items = [
        read_item(path, f"image {place}", pages=pooling is not None)
        for place, path in enumerate(paths, start=1)
    ]
    pictures = [picture for item in items for picture in item]
    own, geometries = _tensors(wrapped, items, 1, count)
    view = own
    if upscale != 1:
        view, geometries = _tensors(wrapped, items, upscale, count)
    result = explain_items(
        wrapped, own, view, method, layer, upscale=upscale, scale=scale, max_batch=max_batch,
        check=check, pooling=pooling or "mean", **options,
    )  # fmt: skip
    return result.placed(
        wrapped.preprocess.notes + tuple(n for picture in pictures for n in picture.notes),
        pictures=tuple(map(wrapped.preprocess.drawn, pictures)),
        geometries=tuple(geometries),
    )


@typed
def explain_against(
    model: nn.Module,
    path: PictureSource,
    positives: Mapping[str, Tensor],
    negatives: Mapping[str, Tensor] | None = None,
    method: Methods = None,
    layer: Layers = None,
    *,
    direction: bool = False,
    upscale: float = 1,
    scale: str = "image",
    pooling: str | None = None,
    max_batch: int | None = None,
    check: bool = True,
    **options: Any,
) -> Explanation:
    """Reads a picture and explains it against given vectors: texts, centroids, stored rows.

    Args:
        model: A similarity model, whose ``preprocess`` is used, or any ``nn.Module`` that returns
            an embedding.
        path: The picture: a file, a picture of PIL or an array; or a folder of several frames of
            one item.
        positives: Vectors ``(E,)`` that the picture should be like, by their labels.
        negatives: Vectors that it should not be like.
        method: As for :func:`~simexplain.explaining.explain`: a name, an object, several to make
            rows, or None for similarity attention as published and ``focus``.
        layer: A layer, several to be multiplied, or None for the model's default.
        direction: The one positive is a direction, whose score is ``f . d``.
        upscale: As for :func:`explain_files`.
        scale: ``image`` draws every map to its own maximum, ``shared`` to that of its comparison.
        pooling: As for :func:`explain_files`.
        max_batch: Bounds the images in one forward pass; results do not depend on it.
        check: Hide what each map marks, and as much elsewhere, and ask the model again.
        **options: Passed to a method given by name, such as ``weights="relative"``.

    Raises:
        ImageError: If the picture cannot be read.
        ComparisonError: If there is no vector, or one does not fit the model.
        ModelError: If the model or a layer cannot be used.
    """
    wrapped = as_similarity_model(model)
    check_upscale(upscale)
    negatives = negatives or {}
    if not positives and not negatives:
        raise ComparisonError("Expected at least one vector to explain the picture against.")
    if direction and (len(positives) != 1 or negatives):
        raise ComparisonError(
            f"Expected one direction and no negatives, got {len(positives) + len(negatives)} "
            "vectors."
        )
    pictures = read_item(path, pages=pooling is not None)

    def against(images: Tensor) -> Comparison:
        width = next(iter([*positives.values(), *negatives.values()])).shape[-1]
        near, far = (_rows(side, width) for side in (positives, negatives))
        images = images if len(pictures) == 1 else images.unsqueeze(0)
        return checked_vectors(wrapped, Comparison(images, near, far, unit=not direction))

    views, geometries = prepared(wrapped.preprocess, pictures)
    own = view = against(views)
    if upscale != 1:
        views, geometries = prepared(_upscaled(wrapped.preprocess, upscale), pictures)
        view = against(views)
    result = explain_items(
        wrapped, own, view, method, layer, upscale=upscale, scale=scale, max_batch=max_batch,
        labels=[*positives, *negatives], pooling=pooling or "mean", check=check, **options,
    )  # fmt: skip
    return result.placed(
        wrapped.preprocess.notes + tuple(n for picture in pictures for n in picture.notes),
        pictures=tuple(map(wrapped.preprocess.drawn, pictures)),
        geometries=tuple(geometries),
    )


@typed
def explain_pair_files(
    model: PairModel,
    anchor: PictureSource,
    positives: Sequence[PictureSource],
    negatives: Sequence[PictureSource] = (),
    method: Methods = None,
    layer: Layers = None,
    **options: Any,
) -> PairExplanation:
    """Reads pictures for a model of two towers and maps the heat back onto the pictures.

    Args:
        model: A pair model; each tower has a ``preprocess`` of its own.
        anchor: The picture for the first tower.
        positives: Pictures for the second tower that should be close.
        negatives: Pictures for the second tower that should be far.
        method: As for :func:`~simexplain.explaining.explain`.
        layer: One layer for both towers, two for one each, or None for the models' defaults.
        **options: ``scale``, ``max_batch``, ``check`` and the options of the method.

    Raises:
        ImageError: If a picture cannot be read.
        ComparisonError: If the pictures or options do not fit the model.
        ModelError: If the model or a layer cannot be used.
    """
    read = read_pictures([anchor, *positives, *negatives])
    groups = [read[:1], read[1:]]
    towers, pictures, views, geometries = (model.first, model.second), [], [], []
    for tower, own in zip(towers, groups, strict=True):
        if not own:
            raise ComparisonError("Expected at least one picture beside the anchor, got none.")
        pictures.append(own)
        stack, places = prepared(tower.preprocess, pictures[-1])
        views.append(stack)
        geometries.append(tuple(places))
    near, others = len(positives), views[1].unsqueeze(0)
    comparison = Comparison(views[0], others[:, :near], others[:, near:])
    result = explain(model, comparison, method, layer, **options)
    first, second = (
        side.placed(
            tower.preprocess.notes + tuple(note for picture in shown for note in picture.notes),
            pictures=tuple(map(tower.preprocess.drawn, shown)),
            geometries=places,
        )
        for side, tower, shown, places in zip(
            result.sides, towers, pictures, geometries, strict=True
        )
    )
    return replace(result, first=first, second=second)


def _rows(vectors: Mapping[str, Tensor], width: int) -> Tensor:
    """Labelled vectors as one stack ``(1,n,E)``."""
    for label, vector in vectors.items():
        if vector.shape != (width,) or not vector.is_floating_point():
            raise ComparisonError(
                f"Expected vectors of one width ({width},) of floating-point numbers, got "
                f"{tuple(vector.shape)} of {vector.dtype} for '{label}'."
            )
    rows = [vector.detach().cpu() for vector in vectors.values()]
    return torch.stack(rows).unsqueeze(0) if rows else torch.empty(1, 0, width)


@typed
def centroid(model: nn.Module, folder: str | Path, *, max_batch: int = 32) -> Tensor:
    """The mean direction ``(E,)`` of the embeddings of all pictures in a folder, of unit length.

    Args:
        model: A similarity model, or any ``nn.Module`` that returns an embedding.
        folder: Pictures of one class, in it and below.
        max_batch: Pictures in one forward pass.

    Raises:
        ImageError: If there is no such folder, no picture in it, or one cannot be read.
    """
    wrapped = as_similarity_model(model)
    batches = Batches(pictures_in(folder, labelled=False), wrapped.preprocess, max_batch)
    total: Tensor | None = None
    for _, images in batches:
        rows = trace(wrapped, images, (), max_batch=max_batch).embeddings.detach().double().sum(0)
        total = rows if total is None else total + rows
    if batches.broken or total is None:
        raise ImageError(next(iter(batches.broken.values())))
    return F.normalize(total, dim=0).float().cpu()


def _upscaled(prepare: Preprocess, upscale: float) -> Preprocess:
    height, width = (max(1, round(side * upscale)) for side in prepare.size)
    return replace(prepare, size=(height, width))


def _tensors(
    model: SimilarityModel, items: Sequence[Sequence[Picture]], upscale: float, positives: int
) -> tuple[Comparison, list[Geometry]]:
    """Items of one or more pictures as one comparison at ``upscale`` times the model's size."""
    pictures = [picture for item in items for picture in item]
    views, geometries = prepared(_upscaled(model.preprocess, upscale), pictures)
    stack = views.unsqueeze(0)
    if len(pictures) > len(items):
        stack = padded_sets(torch.split(views, [len(item) for item in items])).unsqueeze(0)
    comparison = Comparison(stack[:, 0], stack[:, 1 : 1 + positives], stack[:, 1 + positives :])
    return comparison, geometries
