"""Arguments compared with their type hints: one sentence in place of whatever would fail later."""

from __future__ import annotations

import collections.abc
import inspect
import math
import os
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, wraps
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from simexplain.errors import ArgumentError
from simexplain.renaming import todays

Made = TypeVar("Made", bound=Callable[..., Any])

_LOOKED_AT = 1000
"""So many items of a long sequence are looked at."""
_NETWORKS = ("model", "module")
_WITH_PICTURES = ("explain", "match", "attribute", "segment", "compare")
"""Functions that take pictures and tensors alike."""
_COUNTS = ("max_batch", "batch_size")
"""What counts images in one forward pass, wherever it is an argument."""
_TIMES = ("steps", "samples", "count", "masks", "triplets", "epochs", "iterations")
"""Arguments that count something, wherever they occur."""
_MOST_TIMES = 1_000_000


def typed(made: Made) -> Made:
    """Compares the arguments of a function with its type hints before it runs.

    A class is decorated below ``@dataclass``: its fields are compared before its own checks.
    Numbers of numpy count as numbers, lists as tuples; NaN is none; extra options are left alone.

    Arguments under names of the last version are taken, with a warning; see ``renaming``.

    Networks are left to ``as_similarity_model``, whose errors are more specific, and the items of a
    list of pictures to ``read_pictures``, which names the position of a bad one.

    Raises:
        ArgumentError: In a call, if an argument is not of its kind.
    """
    if isinstance(made, type):
        after: Callable[[Any], None] | None = getattr(made, "__post_init__", None)

        def check_fields(self: Any) -> None:
            for name, hint in _hints(made).items():
                if name in type(self).__dataclass_fields__ and hasattr(self, name):
                    _check(name, getattr(self, name), hint, made.__name__)
            if after is not None:
                after(self)

        made.__post_init__ = check_fields  # type: ignore[attr-defined]
        return made

    @wraps(made)
    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs = todays(kwargs, _signature(made).parameters)
        try:
            bound = _signature(made).bind(*args, **kwargs)
        except TypeError:
            return made(*args, **kwargs)  # whose own error is more specific
        hints = _hints(made)
        for name, value in bound.arguments.items():
            if name in hints:
                _check(name, value, hints[name], made.__qualname__.removesuffix(".__init__"))
        return made(*args, **kwargs)

    return call  # type: ignore[return-value]


@cache
def _signature(made: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(made)


@cache
def _hints(made: Any) -> dict[str, Any]:
    """The hints of what is passed by name; those of ``*args`` and ``**options`` are not."""
    hints: dict[str, Any] = {}
    for owner in reversed(made.__mro__) if isinstance(made, type) else (made,):
        for name, hint in inspect.get_annotations(owner).items():
            alone = type("", (), {"__annotations__": {name: hint}, "__module__": owner.__module__})
            with suppress(NameError):  # of what is imported for type checkers alone
                hints |= get_type_hints(alone)
    hints.pop("return", None)
    if isinstance(made, type):
        return {name: hint for name, hint in hints.items() if get_origin(hint) is not ClassVar}
    gathered = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, parameter in _signature(made).parameters.items():
        if parameter.kind in gathered:
            hints.pop(name, None)
    return hints


def _check(name: str, value: Any, hint: Any, owner: str) -> None:
    if name in _NETWORKS and (hint is nn.Module or nn.Module in get_args(hint)):
        return
    if not fits(value, hint):
        raise ArgumentError(
            f"Expected {_named(hint)} as {name}, got {described(value)}; "
            f"{_advice(value, hint, owner)}."
        )
    if name in _COUNTS and value is not None and value < 1:
        raise ArgumentError(f"Expected {name} of at least 1, got {value}.")
    if name in _TIMES and isinstance(value, int) and value > _MOST_TIMES:
        raise ArgumentError(
            f"Expected {name} of at most {_MOST_TIMES:,}, got {value}; so many would never end."
        )


def fits(value: Any, hint: Any) -> bool:
    """Whether a value matches a type hint; true for hints that cannot be checked."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return any(value is one or (type(value) is type(one) and value == one) for one in inner)
    if origin is tuple:
        return _fits_tuple(value, inner)
    if isinstance(origin, type):
        return _fits_container(value, origin, inner)
    if hint in _NUMBERS:
        return _NUMBERS[hint](value)
    if isinstance(hint, type) and not getattr(hint, "_is_protocol", False):
        return isinstance(value, hint)
    return True


_NUMBERS: dict[Any, Callable[[Any], bool]] = {
    bool: lambda value: isinstance(value, (bool, np.bool_)),
    int: lambda value: isinstance(value, (int, np.integer)) and not isinstance(value, bool),
    float: lambda value: (
        isinstance(value, (int, float, np.integer, np.floating))
        and not isinstance(value, bool)
        and not math.isnan(value)
    ),
}


def _fits_tuple(value: Any, inner: tuple[Any, ...]) -> bool:
    if not isinstance(value, (tuple, list)):
        return False
    if len(inner) == 2 and inner[1] is Ellipsis:
        return all(fits(one, inner[0]) for one in value[:_LOOKED_AT])
    return len(value) == len(inner) and all(map(fits, value, inner))


def _fits_container(value: Any, origin: Any, inner: tuple[Any, ...]) -> bool:
    if origin is collections.abc.Callable:
        return callable(value)
    if issubclass(origin, Sequence):
        if not isinstance(value, origin) or (isinstance(value, str) and _wants(inner[0], str)):
            return False  # a text is a sequence of letters, which is never meant
        if _wants(inner[0], Image.Image):
            return True
        return all(fits(one, inner[0]) for one in value[:_LOOKED_AT])
    return isinstance(value, origin)


def _wants(hint: Any, kind: type) -> bool:
    """Whether a hint names this class, or one of its own kind, itself or in a union."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_wants(one, kind) for one in get_args(hint))
    return isinstance(hint, type) and issubclass(hint, kind)


_PLAIN: dict[Any, tuple[str, str]] = {
    str: ("a string", "strings"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "booleans"),
    Tensor: ("a tensor", "tensors"),
    nn.Module: ("an nn.Module", "modules"),
    type(None): ("None", "None"),
}


def _named(hint: Any, *, many: bool = False) -> str:
    """What a hint stands for, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if _wants(hint, Image.Image):
        none = " or None" if type(None) in inner else ""
        kinds = "(files, PIL pictures or arrays)" if many else "(a file, PIL picture or array)"
        return f"{'pictures' if many else 'a picture'} {kinds}{none}"
    if origin in (Union, types.UnionType):
        *rest, last = dict.fromkeys(_named(one, many=many) for one in inner)
        return f"{', '.join(rest)} or {last}" if rest else last
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if inner == (str, Any):
        return "pairs (name, value)" if many else "a pair (name, value)"
    if origin is tuple and Ellipsis not in inner:
        return f"({', '.join(_named(one) for one in inner)})"
    if origin is tuple or (isinstance(origin, type) and issubclass(origin, Sequence)):
        return f"a list of {_named(inner[0], many=True)}"
    if origin is collections.abc.Callable:
        return "callables" if many else "a callable"
    if isinstance(origin, type):
        return "a mapping" if issubclass(origin, Mapping) else f"a {origin.__name__}"
    if _wants(hint, os.PathLike):
        return "paths" if many else "a path"
    if hint in _PLAIN:
        return _PLAIN[hint][many]
    name = str(getattr(hint, "__name__", hint))
    return f"{name}s" if many else f"{'an' if name[:1] in 'AEIO' else 'a'} {name}"


def described(value: Any) -> str:
    """What a value is, in a few words: itself where it is short, else its kind and shape."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    if isinstance(value, Image.Image):
        return f"a PIL picture of {value.width}x{value.height}"
    if value is None or isinstance(value, (bool, int, float, str, bytes, os.PathLike)):
        return text if len(text := repr(value)) <= 60 else f"{text[:57]}..."
    if isinstance(value, (tuple, list)) and 0 < len(value) <= 4:
        inside = ", ".join(map(described, value))
        inside += "," * (isinstance(value, tuple) and len(value) == 1)
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    kind = value.__name__ if isinstance(value, type) else type(value).__name__
    return f"the class {kind}" if isinstance(value, type) else f"an object of {kind}"


def check_pixels(what: str, images: Any, axes: int = 1) -> None:
    """Raises unless a value is a dense tensor of real numbers that is not empty after some axes.

    Raises:
        ArgumentError: If so.
    """
    if not isinstance(images, Tensor):
        _check(what, images, Tensor, "simexplain.Comparison")
        return
    kind = f"{images.dtype}".removeprefix("torch.")
    layout = f"{images.layout}".removeprefix("torch.").replace("_", " ")
    for wrong, problem, mend in (
        (images.is_meta, "no values (device 'meta')", "give it values"),
        (images.layout is not torch.strided, f"the layout {layout}", "call to_dense() on it"),
        (images.is_quantized, f"quantised numbers ({kind})", "call dequantize() on it"),
        (images.is_complex(), f"complex numbers ({kind})", "take its real part or its size"),
        (0 in images.shape[axes:], "nothing in it", "give images of at least one pixel"),
    ):
        if wrong:
            raise ArgumentError(
                f"Expected {what} as an ordinary tensor of real numbers, got one of shape "
                f"{tuple(images.shape)} with {problem}; {mend}."
            )


def _advice(value: Any, hint: Any, owner: str) -> str:
    """What to do about it."""
    text, words = _named(hint), isinstance(value, str)
    if _is_nan(value):
        return "give a finite number"
    if isinstance(value, (tuple, list)) and any(map(_is_nan, value)):
        return "give finite numbers"
    if owner in _WITH_PICTURES and isinstance(value, Tensor):
        return "put tensors into Comparison.pair or Comparison.triplet, or into a list"
    if owner in _WITH_PICTURES and _fits_in(value, hint):
        return "put it into a list"
    if owner in _WITH_PICTURES and (_wants(hint, Tensor) or "a Comparison" in text):
        return "give pictures (files, PIL, arrays) or preprocessed tensors"
    if _wants(hint, Tensor):
        return "pictures become tensors with model.preprocess"
    if "a Comparison" in text:
        return "make one with Comparison.pair or Comparison.triplet"
    if "SimilarityModel" in text:
        return "wrap a network with as_similarity_model, load files with load_model"
    if isinstance(value, nn.Module):
        return "give the name that the layer has in named_modules()"
    if _wants(hint, nn.Module) and isinstance(value, (str, os.PathLike)):
        return "load files with load_model"
    if _fits_in(value, hint):
        return "put it into a list"
    if words and ("number" in text or "true" in text):
        return "write it without quotes"
    return f"help({owner}) describes it"


def _is_nan(value: Any) -> bool:
    return isinstance(value, (float, np.floating)) and math.isnan(value)


def _fits_in(value: Any, hint: Any) -> bool:
    """Whether a value is one item of the list that a hint stands for."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits_in(value, one) for one in inner)
    if not isinstance(origin, type) or not issubclass(origin, (Sequence, tuple)):
        return False
    return (origin is not tuple or Ellipsis in inner) and fits(value, inner[0])
