"""Comparisons of image tensors explained: the body of ``explain``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import OutOfMemoryError, Tensor, nn
from torch.nn import functional as F

from simexplain.checking import checked, joined_checks
from simexplain.comparison import Comparison
from simexplain.errors import ComparisonError, ModelError, first_line
from simexplain.explanation import Explanation, GivenVector, versions
from simexplain.frame_sets import by_frame, framed, is_framed
from simexplain.methods import PIXELS, ChoosesLayers, MethodLike
from simexplain.methods.method import AttentionMaps
from simexplain.methods.rows import Layers, Methods, Row, rows_of
from simexplain.models.avsl import AVSL
from simexplain.models.base import SimilarityModel
from simexplain.models.blackbox import pixel_methods
from simexplain.models.embedder import as_similarity_model
from simexplain.models.moving import WHOLE
from simexplain.models.pairs import PairModel
from simexplain.networks import full_precision
from simexplain.pair_explanation import PairExplanation
from simexplain.tracing import trace

SCORED = ("similarity_cam", "focus", *pixel_methods(differentiable=True))
"""Methods that explain a learned score of two images."""
_ROWS = SCORED[:2]
"""Those of them where none is named: the gradient of the score, and where in an image it is."""

_MOVED_FAR = 0.1
_BEYOND = 10
"""Images that reach so many times what preprocessed pictures do were not preprocessed."""


@dataclass(frozen=True)
class MapRequest:
    """What is to be explained in which way; the fields are the arguments of ``explain``.

    Raises:
        ComparisonError: If ``upscale`` is not between 0 and 16.
    """

    method: Methods = None
    layer: Layers = None
    upscale: float = 1
    scale: str = "image"
    max_batch: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    labels: str | Sequence[str] | None = ()
    pooling: str | None = None
    check: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.upscale <= 16:
            raise ComparisonError(f"Expected upscale between 0 and 16, got {self.upscale}.")

    def check_pair(self) -> None:
        """Refuses what pair models do not take.

        Raises:
            ComparisonError: If something of it was given.
        """
        if self.upscale != 1 or self.labels:
            raise ComparisonError("Pair models take neither upscale nor labels; leave them away.")


def explain_tensors(
    model: nn.Module,
    comparison: Comparison,
    method: Methods = None,
    layer: Layers = None,
    *,
    check: bool = True,
    **options: Any,
) -> Explanation:
    """Explains a comparison of preprocessed images; the options are those of ``explain``."""
    own = {entry.name: options.pop(entry.name) for entry in fields(MapRequest)
           if entry.name in options}  # fmt: skip
    request = MapRequest(method, layer, check=check, options=options, **own)
    return explain_comparison(model, comparison, request)


@full_precision()
def explain_comparison(
    model: nn.Module, comparison: Comparison, request: MapRequest
) -> Explanation:
    """Explains a comparison of preprocessed images."""
    wrapped = as_similarity_model(model)
    if not is_framed(comparison):
        check_images(comparison)
    comparison = checked_vectors(wrapped, comparison)
    view = comparison if request.upscale == 1 else _enlarged(comparison, request.upscale)
    return explain_items(wrapped, comparison, view, request)


def explain_items(
    model: SimilarityModel, comparison: Comparison, view: Comparison, request: MapRequest
) -> Explanation:
    """As :func:`explain_view`, of images or of sets of frames."""
    if not is_framed(comparison):
        return explain_view(model, comparison, view, request)
    how = (request.pooling or "mean", request.method, request.layer)
    sets, own = framed(model, comparison, *how)
    shown = own if view is comparison else framed(model, view, *how)[1]
    result = by_frame(explain_view(sets, own, shown, replace(request, check=False)), sets.frames)
    if not request.check:
        return result
    heats = [row.heatmaps for row in result.rows]
    checks = checked(sets, own, result.embeddings, heats, request.max_batch)
    first = torch.tensor([n == result.places.index(m) for n, m in enumerate(result.places)])
    each = [replace(row, check=one.at(first), others=())
            for row, one in zip(result.rows, checks, strict=True)]  # fmt: skip
    return replace(each[0], others=tuple(each[1:]))


@full_precision()
def explain_pair(model: PairModel, comparison: Comparison, request: MapRequest) -> PairExplanation:
    """Both sides of a pair model, each with the other one held.

    Args:
        model: A pair model.
        comparison: Preprocessed images.
        request: Of one layer for both towers, or of two, one for each.

    Raises:
        ComparisonError: If the images do not fit the model.
        ModelError: If the model or a layer cannot be used.
    """
    if not isinstance(comparison, Comparison) or comparison.given or comparison.anchor.dim() != 4:
        raise ComparisonError("Expected a Comparison of float images for a pair model.")
    layer = request.layer
    if layer is None or isinstance(layer, (str, nn.Module)):
        layers: tuple[Any, ...] = (layer, layer)
    else:
        layers = tuple(layer)
    if len(layers) != 2:
        raise ModelError(f"Expected one layer for each of two towers, got {list(layers)}.")
    with model.settled():
        if model.learned:
            return _explain_score(model, comparison, layers, request)
        anchor, others, near = comparison.anchor, *_others(comparison)
        first = _vectors(model.first, anchor, request.max_batch)
        second = _vectors(model.second, others.flatten(0, 1), request.max_batch)
        second = second.view(*others.shape[:2], -1)
        if first.shape[-1] != second.shape[-1]:
            raise ModelError(
                f"Expected towers with embeddings of one width, got {first.shape[-1]} and "
                f"{second.shape[-1]}; give the head that compares them: head=MODULE."
            )
        parts = (
            (model.first, Comparison(anchor, second[:, :near], second[:, near:])),
            (model.second, Comparison(first, others[:, :near], others[:, near:])),
        )
        sides = [
            explain_comparison(tower, part, replace(request, layer=names))
            for (tower, part), names in zip(parts, layers, strict=True)
        ]
    return PairExplanation(sides[0], sides[1])


def _explain_score(
    model: PairModel, comparison: Comparison, layers: Sequence[Any], request: MapRequest
) -> PairExplanation:
    """A learned score, one pair after the other: the gradient of the score itself."""
    others, _ = _others(comparison)
    if others.shape[1] != 1:
        raise ComparisonError(
            f"Expected pairs for a learned score, got {1 + others.shape[1]} images in a comparison;"
            " explain them pair by pair."
        )
    if "score" in request.options:
        raise ComparisonError("The score of a pair model is learned; leave the option score away.")
    plain = request.method is None and not request.options and not any(layers)
    chosen = _scoring(_ROWS if plain else request.method)
    try:
        return _scored(model, comparison.anchor, others[:, 0], layers, request, chosen)
    except ModelError as error:
        if not plain:
            raise
        result = _scored(model, comparison.anchor, others[:, 0], layers, request, chosen[:1])
        note = f"Only the gradient of the score is shown, since focus cannot be used here: {error}"
        first = replace(result.first, warnings=(*result.first.warnings, note))
        return replace(result, first=first)


def _scoring(method: Methods) -> tuple[str, ...]:
    """The methods for a learned score, by name.

    Raises:
        ModelError: If one does not apply.
    """
    several = isinstance(method, Sequence) and not isinstance(method, str)
    named: Sequence[Any] = list(method) if several else [method]  # type: ignore[arg-type]
    # One number has nothing to weigh.
    chosen = tuple(_ROWS[0] if one in (None, "sam") else one for one in named)
    for one in chosen:
        if one not in SCORED:
            raise ModelError(
                f"A learned score has no embeddings to compare, so method '{one}' does not apply; "
                f"use one of sam, {', '.join(SCORED)}."
            )
    return chosen


def _scored(
    model: PairModel,
    first_images: Tensor,
    second_images: Tensor,
    layers: Sequence[Any],
    request: MapRequest,
    methods: Sequence[str],
) -> PairExplanation:
    """Both images of each pair, one after the other with the other one held."""
    scored = {"score": "dot"} if _ROWS[0] in methods else {}
    request = replace(request, method=tuple(methods), options={**scored, **request.options})
    sides: tuple[list[Explanation], list[Explanation]] = ([], [])
    for one, two in zip(first_images, second_images, strict=True):
        for side, (own, other) in enumerate(((one, two), (two, one))):
            held = model.given(side, other[None])
            along = Comparison.along(own[None], torch.tensor([1.0, 0.0]))
            explanation = explain_comparison(held, along, replace(request, layer=layers[side]))
            first_row, *rest = map(_learned, explanation.rows)
            sides[side].append(replace(first_row, others=tuple(rest)))
    first, second = (_joined(parts) for parts in sides)
    return PairExplanation(first, second, first.scores[:, 0])


def _learned(row: Explanation) -> Explanation:
    """A row of a learned score, which has no embedding that could move."""
    seen = row.check and replace(row.check, moved=row.check.moved * torch.nan)
    options = {**row.options, "score": "learned"}
    return replace(row, options=options, check=seen, others=())


def _others(comparison: Comparison) -> tuple[Tensor, int]:
    """All images but the anchors ``(B,K-1,C,H,W)``, and how many are positives."""
    near, far = comparison.positives, comparison.negatives
    parts = [stack for stack in (near, far) if stack.shape[1]]
    if len({stack.shape[2:] for stack in parts}) > 1:
        raise ComparisonError(
            f"Expected positives and negatives of one size, got {tuple(near.shape[2:])} and "
            f"{tuple(far.shape[2:])}; the second tower takes one."
        )
    return torch.cat(parts, dim=1), near.shape[1]


def _vectors(model: SimilarityModel, images: Tensor, max_batch: int | None) -> Tensor:
    return trace(model, images, (), max_batch=max_batch).embeddings.detach()


def _joined(parts: Sequence[Explanation]) -> Explanation:
    """Explanations of one comparison each as one of all."""
    names = ("maps", "weights", "scores", "embeddings", "distances", "images")
    joined: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in names
    }
    layer_maps = {
        layer: torch.cat([part.layer_maps[layer] for part in parts]) for layer in parts[0].layers
    }
    warnings = tuple(dict.fromkeys(line for part in parts for line in part.warnings))
    rests = [part.unexplained for part in parts if part.unexplained is not None]
    joined["unexplained"] = torch.cat(rests) if len(rests) == len(parts) else None
    checks = [part.check for part in parts if part.check is not None]
    joined["check"] = joined_checks(checks) if checks else None
    rows = zip(*(part.others for part in parts), strict=True)
    joined["others"] = tuple(_joined(row) for row in rows)
    return replace(parts[0], layer_maps=layer_maps, warnings=warnings, **joined)


@full_precision()
def explain_view(
    model: SimilarityModel, comparison: Comparison, view: Comparison, request: MapRequest
) -> Explanation:
    """Explains ``view``, which shows the same images as ``comparison``, perhaps larger.

    The distances and embeddings reported are those of ``comparison``, the maps lie on ``view``.
    """
    check_images(comparison)
    vectors = _labelled(comparison, request.labels)
    layer, max_batch = request.layer, request.max_batch
    with _upscaled(view, request.upscale):
        made = rows_of(model, view, request.method, layer, request.options, max_batch)
    own, moved = model.rows_of(made[0].maps.embeddings), None
    if view is not comparison:
        own = embeddings_of(model, comparison, max_batch)
        moved = 1 - (own * made[0].maps.embeddings).sum(dim=2)
    members = comparison.joined(own)
    rows = _explanations(
        model, comparison, view, made, upscale=request.upscale, embeddings=members, moved=moved,
        scale=request.scale, vectors=vectors, named=layer is not None,
    )  # fmt: skip
    if request.check:
        heats = [row.heatmaps for row in rows]
        checks = checked(model, comparison, members, heats, max_batch)
        rows = [replace(row, check=one) for row, one in zip(rows, checks, strict=True)]
    return replace(rows[0], others=tuple(rows[1:]))


def _explanations(
    model: SimilarityModel,
    comparison: Comparison,
    view: Comparison,
    made: Sequence[Row],
    *,
    upscale: float,
    embeddings: Tensor,
    moved: Tensor | None,
    named: bool,
    **common: Any,
) -> list[Explanation]:
    """The explanations of all methods, with everything that they share."""
    rows = embeddings if comparison.unit else F.normalize(embeddings, dim=2)
    images = view.stacked()
    pictures = images.flatten(0, 1)
    same: dict[str, Any] = {
        "embeddings": embeddings,
        "distances": distances_of(model, rows),
        "positives": comparison.positives.shape[1],
        "images": images,
        "preprocess": model.preprocess,
        "model": model.name,
        "versions": versions(),
        "moved": moved,
        **common,
    }
    out_of_range = _out_of_range(model, pictures)
    explained = []
    for row in made:
        _check_finite(row.maps)
        # A method that names its layers itself may know them without a survey.
        surveyed = named or not isinstance(row.method, ChoosesLayers)
        known = row.layers != (PIXELS,) and (surveyed or model.is_surveyed(pictures))
        warnings = row.maps.warnings + _more_warnings(row.maps, moved, comparison) + out_of_range
        if known:
            own = row.maps.embeddings.flatten(0, 1)
            warnings += model.cautions(row.layers, pictures, own)
        explained.append(Explanation(
            maps=row.maps.maps,
            layer_maps=row.maps.layer_maps,
            weights=row.maps.weights,
            scores=row.maps.scores,
            unexplained=row.maps.unexplained,
            method=row.name,
            layers=row.layers,
            options=_stated_options(row.method, upscale),
            warnings=warnings,
            **_placing(model, row, pictures, known=known),
            **same,
        ))  # fmt: skip
    return explained


def _placing(model: SimilarityModel, row: Row, images: Tensor, *, known: bool) -> dict[str, Any]:
    """Where maps lie and what bypasses their layers, as fields of an explanation.

    Args:
        model: The model.
        row: A method and its maps.
        images: ``(M,C,H,W)``.
        known: The model lists the layers.
    """
    if not known:
        return {"region": row.maps.region}
    layers, own = row.layers, row.maps.region
    regions = model.regions(layers, images)
    return {
        "region": model.region(layers, images) if own == WHOLE else own,
        "bypass": model.bypass(layers, images),
        "layer_regions": dict(zip(layers, regions, strict=True)) if len(set(regions)) > 1 else {},
    }


def checked_vectors(model: SimilarityModel, comparison: Comparison) -> Comparison:
    """The comparison with given vectors of unit length, as the model's embeddings have it.

    Directions keep their length.

    Raises:
        ComparisonError: If a vector is zero or not finite.
        ModelError: If the model's embeddings cannot be compared with a vector.
    """
    given = [(role, getattr(comparison, role)) for role in comparison.given]
    if given and isinstance(model, AVSL):
        raise ModelError(
            "An AVSL model compares nodes of several levels, for which a given vector is not "
            "enough; give images, or explain the network it was made from."
        )
    for role, rows in given:
        finite, zero = bool(rows.isfinite().all()), bool((rows == 0).all(dim=-1).any())
        if not finite or zero:
            raise ComparisonError(
                f"A vector given as {role.removesuffix('s')} is {'zero' if zero else 'not finite'}"
                ", so its similarity is undefined; give another one."
            )
    if not comparison.unit:
        return comparison
    unit: dict[str, Any] = {role: F.normalize(rows, dim=-1) for role, rows in given}
    return replace(comparison, **unit)


def _labelled(
    comparison: Comparison, labels: str | Sequence[str] | None
) -> tuple[GivenVector, ...]:
    """The given vectors with their labels, numbered where they have none.

    Raises:
        ComparisonError: If there are labels, but not one for each vector.
    """
    members = [
        position for position in range(comparison.members) if position not in comparison.places
    ]
    labels = (labels,) if isinstance(labels, str) else labels or ()
    if labels and len(labels) != len(members):
        raise ComparisonError(
            f"Expected a label for each of {len(members)} given vectors, got {len(labels)} labels."
        )
    names = labels or [f"vector {number}" for number in range(1, 1 + len(members))]
    return tuple(
        GivenVector(position, str(name), direction=not comparison.unit)
        for position, name in zip(members, names, strict=True)
    )


@contextmanager
def _upscaled(view: Comparison, upscale: float) -> Iterator[None]:
    """Names the size that a network of fixed size was given."""
    try:
        yield
    except (AssertionError, RuntimeError, ModelError) as error:
        cause: BaseException | None = error.__cause__ if isinstance(error, ModelError) else error
        if upscale == 1 or not isinstance(cause, Exception) or isinstance(cause, OutOfMemoryError):
            raise
        height, width = view.image_size
        raise ModelError(
            f"The model does not take images of {height}x{width}, which upscale={upscale:g} calls "
            f"for ({first_line(cause)}); explain it at its own size."
        ) from error


def embeddings_of(model: SimilarityModel, comparison: Comparison, max_batch: int | None) -> Tensor:
    """Unit rows ``(B,K,E)`` of the images of a comparison, without any graph."""
    rows = trace(model, comparison.stacked().flatten(0, 1), (), max_batch=max_batch).embeddings
    return comparison.restacked(rows)


def distances_of(model: SimilarityModel, rows: Tensor) -> Tensor:
    """Distances ``(B,M-1)`` from the anchor to every other member, from rows ``(B,M,E)``."""
    with torch.no_grad():
        return torch.cat([model.distance(row[:1], row[1:]) for row in rows])


def check_images(comparison: Comparison) -> None:
    """Refuses anything that is not a comparison of image tensors.

    Raises:
        ComparisonError: If the items are not ``(C,H,W)`` floating-point images.
    """
    if not isinstance(comparison, Comparison):
        raise ComparisonError(
            f"Expected a Comparison of image tensors, got {type(comparison).__name__}; make one "
            "with Comparison.pair or Comparison.triplet, or give a list of pictures."
        )
    stack = comparison.stacked()
    if stack.dim() != 5 or not stack.is_floating_point():
        raise ComparisonError(
            f"Expected preprocessed float images of shape (B,3,H,W) as the anchor, got "
            f"{tuple(stack[:, 0].shape)} of {stack.dtype}; give pictures as a list."
        )


def _enlarged(comparison: Comparison, upscale: float) -> Comparison:
    """The same with larger images."""
    height, width = comparison.image_size
    size = [max(1, round(side * upscale)) for side in (height, width)]
    changed: dict[str, Any] = {}
    for role in ("anchor", "positives", "negatives"):
        stack = getattr(comparison, role)
        if role not in comparison.given and stack.numel():
            flat = stack.flatten(0, -4)
            grown = F.interpolate(flat, size=size, mode="bilinear", align_corners=False)
            changed[role] = grown.reshape(*stack.shape[:-2], *size)
        elif role not in comparison.given:
            changed[role] = stack.new_empty((*stack.shape[:-2], *size))
    return replace(comparison, **changed)


def _check_finite(maps: AttentionMaps) -> None:
    if not bool(maps.maps.isfinite().all()):
        raise ModelError(
            "A map is not finite although the embeddings are; look for overflow in half precision "
            "or in the method's options."
        )


def _stated_options(method: MethodLike, upscale: float) -> dict[str, Any]:
    """The options in plain JSON values, for the manifest."""
    chosen: dict[str, Any] = {}
    if is_dataclass(method) and not isinstance(method, type):
        chosen = asdict(method)
    stated = {k: list(v) if isinstance(v, tuple) else v for k, v in chosen.items()}
    return stated if upscale == 1 else {**stated, "upscale": upscale}


def _out_of_range(model: SimilarityModel, pictures: Tensor) -> tuple[str, ...]:
    """A warning for images that can hardly be preprocessed as the model's pictures are."""
    own = model.preprocess
    most = max(max(abs(m), abs(1 - m)) / s for m, s in zip(own.mean, own.std, strict=True))
    # Frames that an item does not have are NaN.
    reached = float(pictures.abs().nan_to_num(0, posinf=torch.inf).amax())
    if reached <= _BEYOND * max(most, 1):
        return ()
    return (
        f"The images reach {reached:.3g}, where pictures prepared as this model has them reach "
        f"{most:.3g}; divide pixels by 255 and normalise them (model.preprocess).",
    )


def _more_warnings(
    maps: AttentionMaps, moved: Tensor | None, comparison: Comparison
) -> tuple[str, ...]:
    warnings = []
    empty = (maps.maps.amax(dim=(2, 3)) <= 0).nonzero().tolist()
    if empty:
        index, position = empty[0]
        warnings.append(
            f"The map of the {comparison.roles[position]} (image {position + 1} of comparison "
            f"{index + 1}) is empty: nothing at this layer raises its score."
        )
    if moved is not None and float(moved.max()) > _MOVED_FAR:
        warnings.append(
            f"Upscaling moved an embedding by a cosine distance of {float(moved.max()):.2f}, so "
            "the maps explain a network that sees somewhat differently; try a smaller factor."
        )
    return tuple(warnings)
