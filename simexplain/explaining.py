"""The verb: explain a comparison of image tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain.comparison import Comparison
from simexplain.errors import ComparisonError, ModelError, first_line
from simexplain.explanation import Explanation, versions
from simexplain.methods import METHODS, PIXELS, ChoosesLayers, Method, options_of, takes_layers
from simexplain.methods.similarity_attention import AttentionMaps
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model
from simexplain.models.moving import WHOLE
from simexplain.tracing import trace

Layers = str | Sequence[str] | None

_MOVED_FAR = 0.1


def explain(
    model: nn.Module,
    comparison: Comparison,
    method: str | Method = "sam",
    layer: Layers = None,
    *,
    magnify: float = 1,
    scale: str = "image",
    max_batch: int | None = None,
    **options: Any,
) -> Explanation:
    """Explains why the images of each comparison are alike or different to a model.

    One forward and one backward pass, down to the lowest layer asked for, serve the whole batch.

    Args:
        model: A similarity model, or any ``nn.Module`` that returns an embedding. For several
            calls wrap it once with ``as_similarity_model``: that remembers the default layer.
        comparison: Preprocessed images ``(3,H,W)``; they are moved to the model's device and type.
        method: A name in ``METHODS`` or an object like ``SimilarityAttention(weights="signed")``.
        layer: A layer, several to be multiplied, or None for the
            method's own choice, else the model's default.
        magnify: Enlarges the images by this factor before the network, for finer maps; the
            result reports how far that moved the embeddings.
        scale: ``image`` draws every map to its own maximum, ``shared`` to that of its comparison.
        max_batch: Bounds the images in one forward pass; results do not depend on it.
        **options: Passed to a method given by name, such as ``weights="relative"``.

    Raises:
        ComparisonError: If images or options do not fit.
        ModelError: If the model or a layer cannot be used.
    """
    wrapped = as_similarity_model(model)
    view = comparison
    if magnify != 1:
        check_magnify(magnify)
        view = comparison.like(_enlarged(comparison.stacked(), magnify))
    return explain_view(
        wrapped, comparison, view, method, layer, magnify=magnify, scale=scale,
        max_batch=max_batch, fresh=wrapped is not model, **options,
    )  # fmt: skip


def explain_view(
    model: SimilarityModel,
    comparison: Comparison,
    view: Comparison,
    method: str | Method,
    layer: Layers,
    *,
    magnify: float,
    scale: str,
    max_batch: int | None,
    fresh: bool = False,
    **options: Any,
) -> Explanation:
    """Explains ``view``, which shows the same images as ``comparison``, perhaps larger.

    The distances and embeddings reported are those of ``comparison``, the maps lie on ``view``.
    A ``fresh`` model was wrapped for this call, so no survey is made only for warnings.
    """
    check_images(comparison)
    chosen = _method(method, options)
    with _magnified(view, magnify):
        layers = _layers(model, view, layer, chosen)
        found = chosen(model, view, layers, max_batch=max_batch)
    _check_finite(found)
    own, moved = found.embeddings, None
    if view is not comparison:
        own = embeddings_of(model, comparison, max_batch)
        moved = 1 - (own * found.embeddings).sum(dim=2)
    name = method if isinstance(method, str) else _name(method)
    known = layers != (PIXELS,) and not (fresh and not model.is_surveyed(view.anchor))
    return Explanation(
        maps=found.maps,
        layer_maps=found.layer_maps,
        weights=found.weights,
        scores=found.scores,
        embeddings=own,
        distances=distances_of(model, own),
        positives=comparison.positives.shape[1],
        images=view.stacked(),
        preprocess=model.preprocess,
        method=name,
        model=model.name,
        layers=layers,
        options=_told(chosen, magnify),
        warnings=found.warnings
        + _more_warnings(found, moved, comparison)
        + (model.cautions(layers, view.anchor) if known else ()),
        versions=versions(),
        moved=moved,
        scale=scale,
        region=model.region(layers, view.anchor) if known else WHOLE,
        bypass=model.bypass(layers, view.anchor) if known else {},
    )


@contextmanager
def _magnified(view: Comparison, magnify: float) -> Iterator[None]:
    """Says which size a network of fixed size was asked to take."""
    try:
        yield
    except (AssertionError, RuntimeError, ModelError) as error:
        cause: BaseException | None = error.__cause__ if isinstance(error, ModelError) else error
        if magnify == 1 or not isinstance(cause, Exception) or _out_of_memory(cause):
            raise
        height, width = view.anchor.shape[-2:]
        raise ModelError(
            f"The model does not take images of {height}x{width}, which magnify={magnify:g} asks "
            f"for ({first_line(cause)}); explain it at its own size."
        ) from error


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError)


def embeddings_of(model: SimilarityModel, comparison: Comparison, max_batch: int | None) -> Tensor:
    """Unit rows ``(B,K,E)`` of a comparison of images, without any graph."""
    rows = trace(model, comparison.stacked().flatten(0, 1), (), max_batch=max_batch).embeddings
    return comparison.restacked(rows)


def distances_of(model: SimilarityModel, rows: Tensor) -> Tensor:
    """Distances ``(B,K-1)`` from the anchor to every other image, from rows ``(B,K,E)``."""
    with torch.no_grad():
        return torch.cat([model.distance(row[:1], row[1:]) for row in rows])


def check_images(comparison: Comparison) -> None:
    """Refuses anything that is not a comparison of image tensors.

    Raises:
        ComparisonError: If the items are not ``(3,H,W)`` floating-point images.
    """
    shape = comparison.anchor.shape
    if len(shape) != 4 or not comparison.anchor.is_floating_point():
        raise ComparisonError(
            f"Expected preprocessed float images of shape (B,3,H,W) as the anchor, got "
            f"{tuple(shape)} of {comparison.anchor.dtype}; use explain_files for picture files."
        )


def check_magnify(magnify: float) -> None:
    """Refuses a factor that is not sensible.

    Raises:
        ComparisonError: If it is not between 0 and 16.
    """
    if not 0 < magnify <= 16:
        raise ComparisonError(f"Expected magnify between 0 and 16, got {magnify}.")


def _enlarged(stack: Tensor, magnify: float) -> Tensor:
    size = [max(1, round(side * magnify)) for side in stack.shape[-2:]]
    flat = F.interpolate(stack.flatten(0, 1), size=size, mode="bilinear", align_corners=False)
    return flat.view(*stack.shape[:3], *size)


def _check_finite(found: AttentionMaps) -> None:
    if not bool(found.maps.isfinite().all()):
        raise ModelError(
            "A map is not finite although the embeddings are; look for overflow in half precision "
            "or in the method's options."
        )


def _method(method: str | Method, options: dict[str, Any]) -> Method:
    if not isinstance(method, str):
        if options:
            raise ComparisonError(
                f"Expected options {', '.join(options)} inside the method object, not beside it."
            )
        return method
    if method not in METHODS:
        raise ComparisonError(f"Expected method to be one of {', '.join(METHODS)}, got '{method}'.")
    made = METHODS[method]
    known = [field.name for field in options_of(made)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ComparisonError(
            f"Method '{method}' has the options {', '.join(known)}, got '{unknown[0]}'."
        )
    return made(**options)


def _layers(
    model: SimilarityModel, view: Comparison, layer: Layers, method: Method
) -> tuple[str, ...]:
    own = None
    if isinstance(method, ChoosesLayers) and (layer is None or not takes_layers(method)):
        own = method.layers_for(model, view.anchor)
    if layer is not None and not takes_layers(method):
        what = f"has layers of its own ({', '.join(own)})" if own else "works on pixels"
        known = ", ".join(field.name for field in options_of(method))
        raise ModelError(
            f"Method '{_name(method)}' {what} and takes no layer, got {layer!r}; leave it away "
            f"(the method's options are {known or 'none'})."
        )
    if own is not None:
        return own
    if not takes_layers(method):
        return (PIXELS,)
    if layer is None:
        return (model.default_for(view.anchor),)
    layers = (layer,) if isinstance(layer, str) else tuple(layer)
    if not layers or len(set(layers)) != len(layers):
        raise ModelError(f"Expected one or more different layers, got {list(layers)}.")
    return layers


def _name(method: Method) -> str:
    for name, made in METHODS.items():
        if isinstance(made, type) and isinstance(method, made):
            return name
    return type(method).__name__


def _told(method: Method, magnify: float) -> dict[str, Any]:
    """The options in plain JSON values, for the manifest."""
    chosen: dict[str, Any] = {}
    if is_dataclass(method) and not isinstance(method, type):
        chosen = asdict(method)
    told = {k: list(v) if isinstance(v, tuple) else v for k, v in chosen.items()}
    return told if magnify == 1 else {**told, "magnify": magnify}


def _more_warnings(
    found: AttentionMaps, moved: Tensor | None, comparison: Comparison
) -> tuple[str, ...]:
    said = []
    empty = (found.maps.amax(dim=(2, 3)) <= 0).nonzero().tolist()
    if empty:
        index, place = empty[0]
        said.append(
            f"The map of the {comparison.roles[place]} (image {place + 1} of comparison "
            f"{index + 1}) is empty: nothing at this layer raises its score."
        )
    if moved is not None and float(moved.max()) > _MOVED_FAR:
        said.append(
            f"Magnifying moved an embedding by a cosine distance of {float(moved.max()):.2f}, so "
            "the maps explain a network that sees somewhat differently; try a smaller factor."
        )
    return tuple(said)
