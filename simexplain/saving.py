"""Explanations on disk: plain files without pickles, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simexplain.checking import Check
from simexplain.data.preprocessing import Geometry, Preprocess
from simexplain.explanation import Explanation, GivenVector
from simexplain.models.moving import WHOLE
from simexplain.picturing import notes_of
from simexplain.printing import json_text
from simexplain.publishing import Kind, numbered, published, read_back
from simexplain.renaming import renamed
from simexplain.rendering.overlay import RENDERERS
from simexplain.rendering.panel import png_of

SCHEMA = 1
MANIFEST = "explanation.json"
_ARRAYS, _FIGURE = "maps.npz", "explanation.png"
_KIND = Kind("explanation", MANIFEST, _ARRAYS, ("heatmap_", "explanation_"), SCHEMA)
MAIN_FILES = (MANIFEST, _ARRAYS, _FIGURE)
"""What an explanation of one comparison writes beside its heatmaps."""
_OF_ROWS = ("maps", "weights", "scores")
_TENSORS = (*_OF_ROWS, "embeddings", "distances")


def manifest(explanation: Explanation, files: dict[str, str]) -> dict[str, Any]:
    """The JSON contract of ``explain``; keys may be added in later versions, never changed.

    What stands at the top is that of the first row, ``rows`` has all of them.
    """
    comparisons = [_comparison(explanation, index) for index in range(len(explanation))]
    return {
        "schema": SCHEMA,
        "architecture": explanation.architecture,
        "model": explanation.model,
        "method": explanation.method,
        "layer": explanation.layer,
        "layers": list(explanation.layers),
        "options": dict(explanation.options),
        "scale": explanation.scale,
        **placing(explanation),
        **comparisons[0],
        "warnings": list(
            dict.fromkeys(
                n for index in range(len(explanation)) for n in notes_of(explanation, index)
            )
        ),
        "files": files,
        "versions": dict(explanation.versions),
        "preprocess": explanation.preprocess.to_json(),
        "comparisons": comparisons,
        "rows": [_row(row) for row in explanation.rows],
    }


def _row(row: Explanation) -> dict[str, Any]:
    """What differs from row to row."""
    every = range(len(row))
    return {
        "title": row.title,
        "method": row.method,
        "layer": row.layer,
        "layers": list(row.layers),
        "options": dict(row.options),
        **placing(row),
        "warnings": list(row.warnings),
        "comparisons": [
            {
                "peaks": [peak and [round(v, 1) for v in peak] for peak in row.peaks(index)],
                "scores": row.scores[index].tolist(),
                "unexplained": _listed(row.unexplained, index),
                "check": row.check and row.check.to_json(index),
            }
            for index in every
        ],
    }


def _comparison(explanation: Explanation, index: int) -> dict[str, Any]:
    peaks = explanation.peaks(index)
    paths: list[str | None] = [picture.path for picture in explanation.pictures]
    paths = paths or [None] * len(peaks)
    places: list[dict[str, Any] | None] = [place.to_json() for place in explanation.geometries]
    places = places or [None] * len(peaks)
    return {
        "images": [
            {
                "path": path,
                "role": role,
                "peak": peak and [round(v, 1) for v in peak],
                "geometry": place,
            }
            for path, role, peak, place in zip(paths, explanation.roles, peaks, places, strict=True)
        ],
        "members": list(explanation.members),
        "frames": list(explanation.frames),
        "vectors": [asdict(vector) for vector in explanation.vectors],
        "distances": explanation.distances[index].tolist(),
        "scores": explanation.scores[index].tolist(),
        "condition": asdict(explanation.condition(index)),
        "moved": _listed(explanation.moved, index),
        "unexplained": _listed(explanation.unexplained, index),
        "check": explanation.check and explanation.check.to_json(index),
        "agreement": [
            {**asdict(agreement), "degree": agreement.degree}
            for agreement in explanation.agreement(index)
        ],
        "doubt": explanation.doubt(index),
    }


def _listed(values: Tensor | None, index: int) -> list[float] | None:
    return None if values is None else values[index].tolist()


def save_explanation(
    explanation: Explanation, folder: Path, *, force: bool, styles: Sequence[str]
) -> dict[str, str]:
    """Writes an explanation; see ``Explanation.save``."""
    names = file_names(explanation)
    files = {kind: str(folder / name) for kind, name in names.items()}
    with published(folder, list(names.values()), _KIND, force=force) as draft:
        _write(explanation, draft, names, manifest(explanation, files), styles)
    return files


def file_names(explanation: Explanation) -> dict[str, str]:
    """The name of each file by its kind; numbered where there are several comparisons."""
    names = {"manifest": MANIFEST, "maps": _ARRAYS}
    for index in range(len(explanation)):
        tag = numbered(index, len(explanation))
        names[f"figure{tag}"] = f"explanation{tag}.png"
        for place, role in enumerate(explanation.roles):
            names[f"heatmap{tag}_{place}"] = f"heatmap{tag}_{place}_{role}.png"
            for number, row in enumerate(explanation.others, start=2):
                name = f"heatmap{tag}_{place}_{role}_row{number}_{row.method}.png"
                names[f"heatmap{tag}_{place}_row{number}"] = name
    return names


def _write(
    explanation: Explanation,
    draft: Path,
    names: dict[str, str],
    said: dict[str, Any],
    styles: Sequence[str],
) -> None:
    for index in range(len(explanation)):
        tag = numbered(index, len(explanation))
        figure = explanation.figure(index, styles=styles, by_layer=True)
        (draft / names[f"figure{tag}"]).write_bytes(png_of(figure))
        for place in range(len(explanation.roles)):
            for number, row in enumerate(explanation.rows, start=1):
                name = names[f"heatmap{tag}_{place}" + (f"_row{number}" if number > 1 else "")]
                picture, heatmap = row.on_picture(place, index)
                drawn = Image.fromarray(RENDERERS[styles[0]](picture, heatmap))
                drawn.save(draft / name, compress_level=3)
    np.savez_compressed(draft / _ARRAYS, **arrays_of(explanation))
    text = json_text(said)
    (draft / MANIFEST).write_text(text, encoding="utf-8")


def arrays_of(explanation: Explanation) -> dict[str, Any]:
    """Everything of an explanation that is no plain JSON, by name."""
    arrays = _row_arrays(explanation, _TENSORS)
    if explanation.moved is not None:
        arrays["moved"] = explanation.moved.cpu().numpy()
    for number, row in enumerate(explanation.others, start=2):
        own = _row_arrays(row, _OF_ROWS)
        arrays |= {f"row{number}_{name}": array for name, array in own.items()}
    if explanation.preprocess.channels != 3:  # a drawing does not hold all bands
        arrays["images"] = explanation.images.cpu().numpy()
    return {"views": explanation.views, **arrays}


def _row_arrays(row: Explanation, names: Sequence[str]) -> dict[str, Any]:
    """Some tensors of a row, the maps of its layers, and what it leaves unexplained."""
    arrays = {name: getattr(row, name).cpu().numpy() for name in names}
    for number, layer in enumerate(row.layers):
        arrays[f"layer_{number}"] = row.layer_maps[layer].cpu().numpy()
    if row.unexplained is not None:
        arrays["unexplained"] = row.unexplained.cpu().numpy()
    return arrays


def load_explanation(folder: Path) -> Explanation:
    """Reads an explanation; see ``Explanation.load``."""
    return read_back(folder, _KIND, restored)


def placing(explanation: Explanation) -> dict[str, Any]:
    """Where the maps lie and what bypasses their layers, for a manifest."""
    return {
        "region": list(explanation.region),
        "bypass": dict(explanation.bypass),
        "layer_regions": {name: list(own) for name, own in explanation.layer_regions.items()},
    }


def placing_of(said: Mapping[str, Any]) -> dict[str, Any]:
    """The counterpart, as fields of an explanation; older manifests do not say."""
    return {
        "region": tuple(said.get("region", WHOLE)),
        "bypass": said.get("bypass", {}),
        "layer_regions": {name: tuple(own) for name, own in said.get("layer_regions", {}).items()},
    }


def restored(said: dict[str, Any], arrays: dict[str, Any]) -> Explanation:
    """The explanation with this :func:`manifest` and these arrays (:func:`arrays_of`)."""
    preprocess = Preprocess.from_json(said["preprocess"])
    whole = said["comparisons"][0]
    first = whole["images"]
    places = [image.get("geometry") for image in first]  # which older versions did not write
    rows = said.get("rows") or [said]  # likewise
    own = Explanation(
        **_row_restored(said | {"warnings": rows[0]["warnings"]}, arrays, ""),
        embeddings=torch.from_numpy(arrays["embeddings"]),
        distances=torch.from_numpy(arrays["distances"]),
        positives=sum(
            role.partition(" ")[0] in ("positive", "direction")
            for role in whole.get("members") or [image["role"] for image in first]
        ),
        images=(
            torch.from_numpy(arrays["images"])
            if "images" in arrays
            else preprocess.redo(arrays["views"])
        ),
        preprocess=preprocess,
        model=said["model"],
        versions=said["versions"],
        moved=torch.from_numpy(arrays["moved"]) if "moved" in arrays else None,
        scale=said["scale"],
        geometries=tuple(map(Geometry.from_json, places)) if all(places) else (),
        frames=tuple(whole.get("frames", ())),
        vectors=tuple(GivenVector(**vector) for vector in whole.get("vectors", ())),
    )
    others = tuple(
        replace(own, **_row_restored(row, arrays, f"row{number}_"))
        for number, row in enumerate(rows[1:], start=2)
    )
    return replace(own, others=others)


def _row_restored(said: dict[str, Any], arrays: dict[str, Any], mark: str) -> dict[str, Any]:
    """The fields of an explanation that differ from row to row."""
    stored = {
        name: torch.from_numpy(arrays[f"{mark}{name}"])
        for name in (*_OF_ROWS, "unexplained")
        if f"{mark}{name}" in arrays
    }
    return {
        "unexplained": None,
        **stored,
        "layer_maps": {
            layer: torch.from_numpy(arrays[f"{mark}layer_{number}"])
            for number, layer in enumerate(said["layers"])
        },
        "method": said["method"],
        "layers": tuple(said["layers"]),
        "options": renamed(said["options"], ("upscale",)),
        "warnings": tuple(said["warnings"]),
        **placing_of(said),
        "check": Check.from_json([one.get("check") for one in said["comparisons"]]),
    }
