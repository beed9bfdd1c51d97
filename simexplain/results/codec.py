"""Dataclasses as plain JSON and arrays, and back, by the type hints of their fields.

Tensors and arrays lie in a file of arrays, and their names stand where they were; all else is plain
JSON. No code in a file is run: only the types that the hints name are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simexplain.arguments import fits
from simexplain.data.images import Picture
from simexplain.data.preprocessing import Preprocess
from simexplain.renaming import renamed

Made = TypeVar("Made")
Arrays = dict[str, NDArray[Any]]

PIXELS = "views"
"""Marks images ``(...,C,H,W)`` as the network takes them, by ``Annotated``: three channels are kept
as the pixels that they show. Any other text is what the arrays of a field are called."""
Views = Annotated[Tensor, PIXELS]
_RENAMED = ("aggregate", "upscale")
"""Keys of ``options`` that had other names."""


def plain(value: Any) -> Any:
    """The same as lists, dicts, strings and finite numbers; NaN and infinity become None."""
    return _plain(value, None, "")


def encoded(made: Any, arrays: Arrays | None, path: str = "") -> dict[str, Any]:
    """The fields of a dataclass as plain JSON.

    Original pictures are left out: they can be larger than all else.

    Args:
        made: The dataclass.
        arrays: Where tensors and arrays are put, by name; None writes them as lists.
        path: How their names start.
    """
    values = {}
    kind: Any = type(made)
    for name, hint in _hints(kind).items():
        if _holds(hint, Picture):
            continue
        value, mark = getattr(made, name), _mark(hint)
        if mark == PIXELS:
            small = arrays is not None and made.preprocess.channels == 3
            mark, value = (PIXELS, _each(made.preprocess.undo, value)) if small else (None, value)
        values[name] = _plain(value, arrays, _joined(path, name if mark is None else mark))
    return values


def decoded(of: type[Made], record: Mapping[str, Any], arrays: Arrays) -> Made:
    """The counterpart of :func:`encoded`; what is missing has its default, other keys are ignored.

    Raises:
        ValueError: If a value does not match the hint of its field; or another of ``DAMAGED``.
    """
    kind: Any = of
    hints = _hints(kind)
    record = renamed(record, hints)
    made = {
        name: _decoded(record[name], hint, arrays)
        for name, hint in hints.items()
        if name in record and not _holds(hint, Picture)
    }
    if "options" in hints and isinstance(made["options"], Mapping):
        made["options"] = renamed(made["options"], _RENAMED)
    for name, hint in hints.items():
        if _mark(hint) == PIXELS and name in made:
            made[name] = _each(lambda own: _seen(own, made["preprocess"]), made[name])
    return of(**made)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, with what ``Annotated`` adds."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def _mark(hint: Any) -> str | None:
    """The ``Annotated`` metadata of a field or of the items of its tuple."""
    if get_origin(hint) is Annotated:
        return str(hint.__metadata__[0])
    return _mark(get_args(hint)[0]) if get_origin(hint) is tuple else None


def _holds(hint: Any, kind: type) -> bool:
    return hint is kind or any(_holds(own, kind) for own in get_args(hint))


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    return tuple(map(change, value)) if isinstance(value, tuple) else change(value)


def _seen(images: Tensor, preprocess: Preprocess) -> Tensor:
    """Images from the pixels that were kept of them."""
    return preprocess.redo(images.numpy()) if images.dtype == torch.uint8 else images


def _joined(path: str, name: str) -> str:
    return f"{path}{name}" if not path or path.endswith(".") else f"{path}_{name}".rstrip("_")


def _plain(value: Any, arrays: Arrays | None, path: str) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return _plain(value.tolist(), None, "") if arrays is None else _kept(value, arrays, path)
    if is_dataclass(value) and not isinstance(value, type):
        return encoded(value, arrays, path if not path or path.endswith(".") else f"{path}.")
    if isinstance(value, Mapping):
        parts = enumerate(value.items())
        return {str(key): _plain(own, arrays, _joined(path, f"{n}")) for n, (key, own) in parts}
    if isinstance(value, (list, tuple)):
        return [_plain(own, arrays, _joined(path, f"{n}")) for n, own in enumerate(value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def _kept(array: NDArray[Any], arrays: Arrays, path: str) -> str:
    """Puts an array among the others, of records inside a record only where it is not there."""
    if "." in path:
        for name, other in arrays.items():
            if other.dtype == array.dtype and np.array_equal(other, array):
                return name
    arrays[path] = array
    return path


def _decoded(value: Any, hint: Any, arrays: Arrays) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _decoded(value, inner[0], arrays)
    if origin in (Union, UnionType):
        own = [one for one in inner if one is not NoneType]
        if value is None and len(own) < len(inner):
            return None
        return _decoded(value, own[0], arrays) if len(own) == 1 else _checked(value, hint)
    if hint is Tensor or origin is np.ndarray:
        return _array(value, hint, arrays)
    if origin is tuple:
        return _tuple(value, inner, arrays)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        key = int if inner[0] is int else str
        return {key(k): _decoded(v, inner[1], arrays) for k, v in _checked(value, dict).items()}
    if is_dataclass(hint) and isinstance(hint, type):
        known = _hints(hint)
        value = renamed(_checked(value, dict), known)
        odd = [name for name in value if name not in known and not hasattr(hint, name)]
        if odd:
            raise ValueError(f"{odd[0]!r:.60} in a {hint.__name__}")
        return decoded(hint, value, arrays)
    if hint is float:
        return math.nan if value is None else float(_checked(value, float))
    return Path(value) if hint is Path else _checked(value, hint)


def _array(value: Any, hint: Any, arrays: Arrays) -> Any:
    """The array of a name, or of the numbers in a list: whole ones or float64, None for NaN."""
    if isinstance(value, list):
        numbers = np.array(value)
        arrays = {"": numbers.astype(np.float64) if numbers.dtype == object else numbers}
        value = ""
    return torch.from_numpy(arrays[value]) if hint is Tensor else arrays[value]


def _tuple(value: Any, inner: tuple[Any, ...], arrays: Arrays) -> tuple[Any, ...]:
    parts = _checked(value, list)
    hints = [inner[0]] * len(parts) if inner[1:] == (Ellipsis,) else inner
    return tuple(_decoded(own, one, arrays) for own, one in zip(parts, hints, strict=True))


def _checked(value: Any, hint: Any) -> Any:
    if not fits(value, hint):
        raise ValueError(f"{value!r:.60} where {getattr(hint, '__name__', hint)} belongs")
    return value
