"""Which methods run, with which layers, and their maps: one row for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from simexplain.arguments import described
from simexplain.comparison import Comparison
from simexplain.errors import ComparisonError, ModelError, meant
from simexplain.methods import (
    METHODS,
    PIXELS,
    ChoosesLayers,
    MethodLike,
    check_method,
    options_of,
    takes_layers,
)
from simexplain.methods.focus import Focus, Shots
from simexplain.methods.kinds import rows_for
from simexplain.methods.method import AttentionMaps
from simexplain.methods.raw_vectors import trace_vectors
from simexplain.methods.similarity_attention import SimilarityAttention
from simexplain.models.base import SimilarityModel
from simexplain.models.frames import FrameSets
from simexplain.networks import layer_name, unit_rows

Attending = SimilarityAttention | Focus


def attended(
    model: SimilarityModel,
    images: Comparison,
    methods: Sequence[tuple[Attending, Sequence[str]]],
    *,
    max_batch: int | None = None,
) -> list[AttentionMaps]:
    """What each method finds by itself, from one forward pass for all of them.

    Args:
        model: The model; its unit rows are its vectors at unit length (:func:`shares`).
        images: Images ``(3,H,W)`` in a comparison.
        methods: Each with its layers. Gradients go down to the lowest layer of each.
        max_batch: Bounds the images of one forward pass.

    Raises:
        ModelError: If a layer cannot be used or the embeddings are zero or not finite.
    """
    every = tuple(dict.fromkeys(layer for _, layers in methods for layer in layers))
    flat = images.stacked().flatten(0, 1)
    by_rows = model.of_tokens(every, flat)
    traced = trace_vectors(model, flat, every, max_batch=max_batch, middle=False, by_rows=by_rows)
    model.measure(flat, traced.recorded, unit_rows)
    return [
        method.follow(model, Shots(images), traced.trace.at(layers), max_batch=max_batch)
        if isinstance(method, Focus)
        else method.attend(
            traced.units.at(layers), images, apart=model.apart(layers, flat)
        ).detached()
        for method, layers in methods
    ]


def shares(model: SimilarityModel) -> bool:
    """Whether one pass serves both: the model's rows are its vectors, brought to unit length."""
    framed = isinstance(model, FrameSets)  # of which focus looks at every frame by itself
    return type(model).vectors is not SimilarityModel.vectors and not framed


Layers = str | nn.Module | Sequence[str | nn.Module] | None
"""Layers by name or as modules of the network."""
Methods = str | MethodLike | Sequence[str | MethodLike] | None
"""A name in ``METHODS`` or an object, several to make rows, or None for the default rows of the
kind of network."""


@dataclass(frozen=True)
class Row:
    """One method and its maps.

    Attributes:
        name: Its name in ``METHODS``, or its class's.
        method: The method.
        layers: Its layers.
        maps: Its maps.
    """

    name: str
    method: MethodLike
    layers: tuple[str, ...]
    maps: AttentionMaps


def rows_of(
    model: SimilarityModel,
    view: Comparison,
    method: Methods,
    layer: Layers,
    options: Mapping[str, Any],
    max_batch: int | None,
) -> list[Row]:
    """Asks one or several methods; similarity attention and focus share a forward pass.

    Where no method is named and the second of the default cannot be used with a model, the first
    one has a warning about it.

    Args:
        model: The model.
        view: The images that maps are made for.
        method: Which methods.
        layer: For all of them that take layers.
        options: Of the methods given by name, each for those that have it.
        max_batch: Bounds the images of one forward pass.

    Raises:
        ComparisonError: If a method or an option does not exist.
        ModelError: If the model or a layer cannot be used.
    """
    chosen = request_of(model, method, layer, options, direction=not view.unit)
    try:
        return _rows_of(model, view, chosen, layer, max_batch)
    except ModelError as error:
        if method is not None or len(chosen) == 1:
            raise
        (first,) = _rows_of(model, view, chosen[:1], layer, max_batch)
        note = f"Only similarity attention is shown, since focus cannot be used here: {error}"
        maps = replace(first.maps, warnings=(*first.maps.warnings, note))
        return [replace(first, maps=maps)]


def request_of(
    model: SimilarityModel,
    method: Methods,
    layer: Layers,
    options: Mapping[str, Any],
    *,
    direction: bool = False,
) -> list[tuple[str | MethodLike, MethodLike]]:
    """The methods that are meant, as they were given and as objects.

    Args:
        model: The model.
        method: Which methods.
        layer: The layers that were named.
        options: Of the methods given by name.
        direction: Images are scored along a direction.

    Raises:
        ComparisonError: If a method or an option does not exist.
    """
    named = _named(model, method, layer, options, direction=direction)
    return list(zip(named, _made(named, options), strict=True))


def _named(
    model: SimilarityModel,
    method: Methods,
    layer: Layers,
    options: Mapping[str, Any],
    *,
    direction: bool,
) -> Sequence[str | MethodLike]:
    """The methods that are meant, by name or as objects."""
    if method is None:
        return rows_for(model, direction=direction, chosen=bool(options) or layer is not None)
    if isinstance(method, str) or not isinstance(method, Sequence):
        return (method,)
    if not method:
        raise ComparisonError(f"Expected one or more methods of {', '.join(METHODS)}, got none.")
    return method


def _made(named: Sequence[str | MethodLike], options: Mapping[str, Any]) -> list[MethodLike]:
    """The methods as objects, each of those given by name with the options that it has."""
    for name in named:
        if isinstance(name, str):
            check_method(name)
        elif isinstance(name, (type, nn.Module)):
            raise ComparisonError(
                f"Expected the name of a method or an object like SimilarityAttention(), got "
                f"{described(name)}; the model comes first, then the comparison, then the method."
            )
    known = {
        name: [field.name for field in options_of(METHODS[name])]
        for name in named
        if isinstance(name, str)
    }
    if options and not known:
        raise ComparisonError(
            f"Expected options {', '.join(options)} inside the method object, not beside it."
        )
    for option in options:
        if not any(option in fields for fields in known.values()):
            has = "; ".join(
                f"Method '{name}' has the options {', '.join(fields)}"
                for name, fields in known.items()
            )
            hint = meant(option, [one for fields in known.values() for one in fields])
            raise ComparisonError(f"{has}, got '{option}'{hint or '.'}")
    return [
        METHODS[name](**{key: value for key, value in options.items() if key in known[name]})
        if isinstance(name, str)
        else name
        for name in named
    ]


def _rows_of(
    model: SimilarityModel,
    view: Comparison,
    chosen: Sequence[tuple[str | MethodLike, MethodLike]],
    layer: Layers,
    max_batch: int | None,
) -> list[Row]:
    """A row of each method, those that can from one pass."""
    taken = [layer if len(chosen) == 1 or takes_layers(method) else None for _, method in chosen]
    layers = [
        _layers(model, view, own, method) for own, (_, method) in zip(taken, chosen, strict=True)
    ]
    sharing = [
        (method, own)
        for (_, method), own in zip(chosen, layers, strict=True)
        if isinstance(method, SimilarityAttention | Focus)
    ]
    shared: list[AttentionMaps] = []
    if len(sharing) > 1 and shares(model):
        shared = attended(model, view, sharing, max_batch=max_batch)
    rows = []
    for (name, method), own in zip(chosen, layers, strict=True):
        if shared and isinstance(method, SimilarityAttention | Focus):
            maps = shared.pop(0)
        else:
            maps = method(model, view, own, max_batch=max_batch)
        rows.append(Row(name if isinstance(name, str) else _name(method), method, own, maps))
    return rows


def _layers(
    model: SimilarityModel, view: Comparison, layer: Layers, method: MethodLike
) -> tuple[str, ...]:
    own = None
    if isinstance(method, ChoosesLayers) and (layer is None or not takes_layers(method)):
        own = method.layers_for(model, view.stacked()[:, 0])
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
        return (model.default_for(view.stacked()[:, 0]),)
    layers = layer_names(model, layer)
    if not layers or len(set(layers)) != len(layers):
        raise ModelError(f"Expected one or more different layers, got {list(layers)}.")
    if len(layers) > 1:
        model.regions(layers, view.stacked().flatten(0, 1))  # whose maps are joined where they look
    return layers


def layer_names(
    model: SimilarityModel, layer: str | nn.Module | Sequence[str | nn.Module]
) -> tuple[str, ...]:
    """The names of layers that are given by name or as modules of the network.

    Raises:
        ModelError: If a module is not part of the network.
    """
    several = (layer,) if isinstance(layer, (str, nn.Module)) else layer
    return tuple(layer_name(model.network, one) for one in several)


def _name(method: MethodLike) -> str:
    for name, made in METHODS.items():
        if isinstance(made, type) and isinstance(method, made):
            return name
    return type(method).__name__
