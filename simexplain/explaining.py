"""The verb: explain a comparison of pictures or of image tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain.arguments import typed
from simexplain.comparison import Comparison, positives_of
from simexplain.data.folders import Batches, pictures_in, read_item
from simexplain.data.images import Picture, PictureSource, read_pictures
from simexplain.data.preprocessing import Geometry, Preprocess, notes_of, prepared
from simexplain.errors import ComparisonError, ImageError
from simexplain.explaining_tensors import (
    MapRequest,
    checked_vectors,
    explain_comparison,
    explain_items,
    explain_pair,
)
from simexplain.explanation import Explanation
from simexplain.methods.rows import Layers, Methods
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model
from simexplain.models.frames import padded_sets
from simexplain.models.pairs import PairModel
from simexplain.pair_explanation import PairExplanation
from simexplain.tracing import trace

Images = Comparison | Sequence[PictureSource | Tensor]
"""A comparison, or its images in a list: anchor, positives, negatives."""


@overload
def explain(
    model: PairModel,
    images: Images,
    method: Methods = None,
    layer: Layers = None,
    **options: Any,
) -> PairExplanation: ...


@overload
def explain(
    model: nn.Module,
    images: Images,
    method: Methods = None,
    layer: Layers = None,
    **options: Any,
) -> Explanation: ...


@typed
def explain(
    model: nn.Module | PairModel,
    images: Images,
    method: Methods = None,
    layer: Layers = None,
    *,
    arch: str | None = None,
    negative: bool = False,
    positives: int = 1,
    upscale: float = 1,
    scale: str = "image",
    labels: str | Sequence[str] | None = (),
    pooling: str | None = None,
    max_batch: int | None = None,
    check: bool = True,
    **options: Any,
) -> Explanation | PairExplanation:
    """Explains why the images of a comparison are alike or different to a model.

    One forward and one backward pass, down to the lowest requested layer, serve the whole batch.
    Members of a ``Comparison`` that are given as vectors have no map; of embeddings the length does
    not matter, of directions (:meth:`Comparison.along`) it does.

    Args:
        model: A similarity model, whose ``preprocess`` is used, or any ``nn.Module`` that returns
            an embedding. For several calls wrap it once with ``as_similarity_model``: that
            remembers the default layer. Of a model of two images (``as_pair_model``) the result is
            a ``PairExplanation``; each tower preprocesses its own pictures.
        images: Pictures, anchor first, then positives, then negatives: files, pictures of PIL or
            arrays, as ``read_picture`` takes them, mixed as you like; the heat is mapped back onto
            them. A folder is one item of several frames: a video clip, photographs of one thing.
            Or preprocessed tensors: a list of ``(C,H,W)``, or a ``Comparison`` of batches
            ``(B,C,H,W)``, of sets of frames ``(B,T,C,H,W)`` or with given vectors ``(E,)``.
        method: A name in ``METHODS``, an object like ``SimilarityAttention(weights="signed")``, or
            several, of which the first makes the result and the others its rows. None makes
            similarity attention as published and ``focus`` from one pass; with a layer or an
            option similarity attention alone, along a direction ``focus`` alone.
        layer: A layer, several to be multiplied, or None for the method's own choice, else the
            model's default. Of a pair model one for both towers, or two, one for each.
        arch: Of a list ``siamese``, ``triplet``, ``quadruplet`` or ``set``; unless given, two
            pictures are siamese and three a triplet.
        negative: The other image of a siamese list is a negative.
        positives: How many images after the anchor are positives, for ``set``.
        upscale: Shows the network this many times larger images, of pictures with their own finer
            detail; the result reports how far that moved the embeddings.
        scale: ``image`` draws every map to its own maximum, ``shared`` to that of its comparison.
        labels: What each given vector of a ``Comparison`` stands for, in order.
        pooling: How the unit embeddings of the frames of an item become one: ``mean`` or ``max``.
            Unless given ``mean``, and of files with several pages or frames the first alone.
        max_batch: Bounds the images in one forward pass; results do not depend on it.
        check: Hide what each map marks, and as much elsewhere, and run the model again
            (:func:`~simexplain.checking.checked`): ``2R + 1`` more passes of each image for ``R``
            methods.
        **options: Passed to the methods given by name, such as ``weights="relative"``.

    Raises:
        ImageError: If a picture cannot be read.
        ComparisonError: If images, vectors or options do not fit, or there are too few or too many
            images for ``arch``.
        ModelError: If the model or a layer cannot be used.
    """
    request = MapRequest(method, layer, upscale, scale, max_batch, options, labels, pooling, check)
    if isinstance(images, Comparison):
        if arch is not None or negative or positives != 1:
            raise ComparisonError(
                "A Comparison has its roles already; leave arch, negative and positives away."
            )
    else:
        if labels:
            raise ComparisonError("Labels name given vectors; a list of images has none.")
        count = positives_of(arch, len(images), negative=negative, positives=positives)
        if not all(isinstance(image, Tensor) for image in images):
            return _explain_pictures(model, images, count, request)
        images = _stacked([image for image in images if isinstance(image, Tensor)], count)
    if isinstance(model, PairModel):
        request.check_pair()
        return explain_pair(model, images, request)
    return explain_comparison(model, images, request)


def _explain_pictures(
    model: nn.Module | PairModel, images: Sequence[Any], count: int, request: MapRequest
) -> Explanation | PairExplanation:
    """Of pictures; ``count`` of them after the anchor are positives."""
    if isinstance(model, PairModel):
        request.check_pair()
        return _explain_pair(model, images, count, request)
    wrapped = as_similarity_model(model)
    items = [
        read_item(path, f"image {position}", pages=request.pooling is not None)
        for position, path in enumerate(images, start=1)
    ]
    pictures = [picture for item in items for picture in item]
    own, geometries = _tensors(wrapped, items, 1, count)
    view = own
    if request.upscale != 1:
        view, geometries = _tensors(wrapped, items, request.upscale, count)
    result = explain_items(wrapped, own, view, request)
    return _placed(result, wrapped, pictures, geometries)


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
        upscale: As for :func:`explain`.
        scale: ``image`` draws every map to its own maximum, ``shared`` to that of its comparison.
        pooling: As for :func:`explain`.
        max_batch: Bounds the images in one forward pass; results do not depend on it.
        check: Hide what each map marks, and as much elsewhere, and run the model again.
        **options: Passed to a method given by name, such as ``weights="relative"``.

    Raises:
        ImageError: If the picture cannot be read.
        ComparisonError: If no vector is given, or one does not fit the model.
        ModelError: If the model or a layer cannot be used.
    """
    wrapped = as_similarity_model(model)
    negatives = negatives or {}
    labels = [*positives, *negatives]
    request = MapRequest(method, layer, upscale, scale, max_batch, options, labels, pooling, check)
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
    result = explain_items(wrapped, own, view, request)
    return _placed(result, wrapped, pictures, geometries)


def _explain_pair(
    model: PairModel, images: Sequence[PictureSource], near: int, request: MapRequest
) -> PairExplanation:
    """The anchor for the first tower, all other pictures for the second."""
    read = read_pictures(images)
    towers, groups = (model.first, model.second), (read[:1], read[1:])
    parts = [prepared(tower.preprocess, own) for tower, own in zip(towers, groups, strict=True)]
    others = parts[1][0].unsqueeze(0)
    comparison = Comparison(parts[0][0], others[:, :near], others[:, near:])
    result = explain_pair(model, comparison, request)
    first, second = (
        _placed(side, tower, own, places)
        for side, tower, own, (_, places) in zip(result.sides, towers, groups, parts, strict=True)
    )
    return replace(result, first=first, second=second)


def _placed(
    result: Explanation,
    model: SimilarityModel,
    pictures: Sequence[Picture],
    geometries: Sequence[Geometry],
) -> Explanation:
    """A result on the pictures that were read, with what is to be known of them."""
    return result.placed(
        notes_of(model.preprocess, pictures),
        pictures=tuple(map(model.preprocess.drawn, pictures)),
        geometries=tuple(geometries),
    )


def _stacked(images: Sequence[Tensor], positives: int) -> Comparison:
    """Preprocessed images ``(C,H,W)`` of a list as one comparison."""
    if any(image.dim() != 3 for image in images):
        shapes = ", ".join(str(tuple(image.shape)) for image in images)
        raise ComparisonError(
            f"Expected preprocessed images (C,H,W) in a list, got {shapes}; batches of them make a "
            "Comparison."
        )
    anchor, *others = (image.unsqueeze(0) for image in images)
    empty = anchor.unsqueeze(1)[:, :0]
    sides = others[:positives], others[positives:]
    near, far = (torch.stack(side, dim=1) if side else empty for side in sides)
    return Comparison(anchor, near, far)


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
        ImageError: If the folder does not exist or has no picture, or one cannot be read.
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
