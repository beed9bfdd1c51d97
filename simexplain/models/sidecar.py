"""What a model file cannot say of itself, in a JSON file beside it.

``model.pt2`` has ``model.pt2.json``, a folder has ``simexplain.json``. All keys may be left out::

    {"simexplain": 1,
     "preprocess": {"size": [112, 112], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
                    "interpolation": "bilinear", "fit": "squash"},
     "distance": "cosine",
     "output": "embedding",
     "layers": {"default": "stage4", "stages": ["stage3", "stage4"]}}
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ImageError, ModelError
from simexplain.models.base import DISTANCES
from simexplain.models.layers import Layer

SCHEMA = 1
IN_FOLDER = "simexplain.json"
_KEYS = ("simexplain", "preprocess", "distance", "output", "layers")
_FREE_TEXT = ("source", "notes")


@dataclass(frozen=True)
class LayerTable:
    """Which layers to use when none are named, as they were found before saving.

    Attributes:
        default: The default layer.
        stages: The layers of a sweep.
    """

    default: str
    stages: tuple[str, ...] = ()

    def marked(self, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
        """The same layers with these marks, or as they are where the default is not among them."""
        names = {layer.name for layer in layers}
        if self.default not in names:
            return layers
        known = names.intersection(self.stages)
        return tuple(
            replace(
                layer,
                default=layer.name == self.default,
                stage=layer.name in known if known else layer.stage,
            )
            for layer in layers
        )


@dataclass(frozen=True)
class Sidecar:
    """What lies beside a model file.

    Attributes:
        preprocess: Fields of ``Preprocess`` by name; those that are missing stay as they are.
        distance: As for ``load_model``, or None.
        output: As for ``as_similarity_model``, a word, key or index, or None.
        layers: Which layers to use when none are named, or None.
    """

    preprocess: dict[str, Any]
    distance: str | None = None
    output: str | int | None = None
    layers: LayerTable | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        content: dict[str, Any] = {"simexplain": SCHEMA, "preprocess": self.preprocess}
        content |= {"distance": self.distance} if self.distance is not None else {}
        content |= {"output": self.output} if self.output is not None else {}
        if self.layers is not None:
            stages = list(self.layers.stages)
            content["layers"] = {"default": self.layers.default, "stages": stages}
        return content


def sidecar_of(path: Path) -> Path:
    """Where the sidecar of a model file or folder lies."""
    return path / IN_FOLDER if path.is_dir() else path.with_name(f"{path.name}.json")


def read_sidecar(path: Path) -> Sidecar:
    """What lies beside a model file or in a folder; empty where there is nothing.

    A JSON file without any key of a sidecar is another program's, and is left alone.

    Raises:
        ModelError: If it is damaged, or a value is unknown or out of range; names the key.
    """
    file = sidecar_of(path)
    if not file.is_file():
        return Sidecar({})
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"'{file}' cannot be read as JSON; mend or remove it.") from error
    if not isinstance(content, dict) or not set(content) & set(_KEYS):
        return Sidecar({})
    unknown = [key for key in content if key not in _KEYS]
    if unknown:
        raise ModelError(
            f"'{file}' has the unknown key '{unknown[0]}'; expected {', '.join(_KEYS)}."
        )
    if content.get("simexplain", SCHEMA) != SCHEMA:
        raise ModelError(
            f"'{file}' has schema {content['simexplain']!r}, but this version reads {SCHEMA}."
        )
    preprocess = _preprocess(content.get("preprocess", {}), file)
    distance, output = content.get("distance"), content.get("output")
    if distance is not None and distance not in DISTANCES:
        raise _wrong(file, "distance", f"one of {', '.join(DISTANCES)}", distance)
    if output is not None and (not isinstance(output, (str, int)) or isinstance(output, bool)):
        raise _wrong(file, "output", "a word, a key or an index", output)
    return Sidecar(preprocess, distance, output, _layers(content.get("layers"), file))


def with_values(own: Preprocess, values: dict[str, Any]) -> Preprocess:
    """The preprocessing with some fields exchanged.

    Raises:
        ModelError: If they do not fit together, such as three means of a one-channel picture.
    """
    try:
        return replace(own, **values)
    except ImageError as error:
        raise ModelError(str(error)) from error


def _preprocess(values: Any, file: Path) -> dict[str, Any]:
    """Fields of ``Preprocess`` from JSON, each checked."""
    if not isinstance(values, dict):
        raise _wrong(file, "preprocess", "an object", values)
    known = [field.name for field in fields(Preprocess)]
    checked = {}
    for key, value in values.items():
        if key not in known:
            raise ModelError(
                f"'{file}' has the unknown key '{key}' under preprocess; expected some of "
                f"{', '.join(known)}."
            )
        checked[key] = tuple(value) if isinstance(value, list) else value
    _check_values(checked, file)
    with_values(Preprocess(), {k: v for k, v in checked.items() if k not in _FREE_TEXT})
    return checked


def _check_values(values: dict[str, Any], file: Path) -> None:
    for key in ("mean", "std"):
        numbers = values.get(key)
        if numbers is not None and not _are_numbers(numbers, above_zero=key == "std"):
            what = "a list of numbers above 0" if key == "std" else "a list of finite numbers"
            raise _wrong(file, key, what, numbers)
    size = values.get("size", (1, 1))
    sides = isinstance(size, tuple) and len(size) == 2
    if not sides or not all(type(side) is int and side > 0 for side in size):
        raise _wrong(file, "size", "[height, width] in pixels", size)
    fraction = values.get("crop_fraction", 1.0)
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
        raise _wrong(file, "crop_fraction", "a number", fraction)
    for key in ("fit", "interpolation", "resizing", "source"):
        if not isinstance(values.get(key, ""), str):
            raise _wrong(file, key, "text", values[key])
    notes = values.get("notes", ())
    if not isinstance(notes, tuple) or not all(isinstance(note, str) for note in notes):
        raise _wrong(file, "notes", "a list of texts", notes)


def _are_numbers(values: Any, *, above_zero: bool) -> bool:
    if not isinstance(values, tuple) or not values:
        return False
    plain = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    return plain and all(abs(v) < 1e30 and (v > 0 or not above_zero) for v in values)


def _layers(values: Any, file: Path) -> LayerTable | None:
    if values is None:
        return None
    default = values.get("default") if isinstance(values, dict) else None
    stages = values.get("stages", []) if isinstance(values, dict) else None
    if not isinstance(default, str) or not isinstance(stages, list):
        raise _wrong(file, "layers", "an object with 'default' and 'stages'", values)
    return LayerTable(default, tuple(map(str, stages)))


def _wrong(file: Path, key: str, wanted: str, got: Any) -> ModelError:
    shown = list(got) if isinstance(got, tuple) else got
    return ModelError(f"Expected {key} in '{file}' to be {wanted}, got {str(shown)[:60]!r}.")
