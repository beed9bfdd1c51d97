"""Explanations on disk: plain files without pickles, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simexplain.data.preprocessing import Geometry, Preprocess
from simexplain.explanation import Explanation, GivenVector
from simexplain.publishing import Kind, numbered, published, read_back
from simexplain.rendering.overlay import RENDERERS
from simexplain.rendering.panel import png_of

SCHEMA = 1
MANIFEST = "explanation.json"
_ARRAYS, _FIGURE = "maps.npz", "explanation.png"
_KIND = Kind("explanation", MANIFEST, _ARRAYS, ("heatmap_", "explanation_"), SCHEMA)
MAIN_FILES = (MANIFEST, _ARRAYS, _FIGURE)
"""What an explanation of one comparison writes beside its heatmaps."""
_TENSORS = ("maps", "weights", "scores", "embeddings", "distances")


def manifest(explanation: Explanation, files: dict[str, str]) -> dict[str, Any]:
    """The JSON contract of ``explain``; keys may be added in later versions, never changed."""
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
        "region": list(explanation.region),
        "bypass": dict(explanation.bypass),
        **comparisons[0],
        "warnings": list(explanation.warnings),
        "files": files,
        "versions": dict(explanation.versions),
        "preprocess": explanation.preprocess.to_json(),
        "comparisons": comparisons,
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
        "vectors": [asdict(vector) for vector in explanation.vectors],
        "distances": explanation.distances[index].tolist(),
        "scores": explanation.scores[index].tolist(),
        "condition": asdict(explanation.condition(index)),
        "moved": _listed(explanation.moved, index),
        "unexplained": _listed(explanation.unexplained, index),
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
            picture, heatmap = explanation.on_picture(place, index)
            drawn = Image.fromarray(RENDERERS[styles[0]](picture, heatmap))
            drawn.save(draft / names[f"heatmap{tag}_{place}"], compress_level=3)
    np.savez_compressed(draft / _ARRAYS, **arrays_of(explanation))
    text = json.dumps(said, indent=2, ensure_ascii=False)
    (draft / MANIFEST).write_text(text, encoding="utf-8")


def arrays_of(explanation: Explanation) -> dict[str, Any]:
    """Everything of an explanation that is no plain JSON, by name."""
    arrays = {name: getattr(explanation, name).cpu().numpy() for name in _TENSORS}
    for number, layer in enumerate(explanation.layers):
        arrays[f"layer_{number}"] = explanation.layer_maps[layer].cpu().numpy()
    if explanation.moved is not None:
        arrays["moved"] = explanation.moved.cpu().numpy()
    if explanation.unexplained is not None:
        arrays["unexplained"] = explanation.unexplained.cpu().numpy()
    if explanation.preprocess.channels != 3:  # a drawing does not hold all bands
        arrays["images"] = explanation.images.cpu().numpy()
    return {"views": explanation.views, **arrays}


def load_explanation(folder: Path) -> Explanation:
    """Reads an explanation; see ``Explanation.load``."""
    return read_back(folder, _KIND, restored)


def restored(said: dict[str, Any], arrays: dict[str, Any]) -> Explanation:
    """The explanation with this :func:`manifest` and these arrays (:func:`arrays_of`)."""
    preprocess = Preprocess.from_json(said["preprocess"])
    tensors: dict[str, Any] = {name: torch.from_numpy(arrays[name]) for name in _TENSORS}
    whole = said["comparisons"][0]
    first = whole["images"]
    places = [image.get("geometry") for image in first]  # which older versions did not write
    return Explanation(
        **tensors,
        layer_maps={
            layer: torch.from_numpy(arrays[f"layer_{number}"])
            for number, layer in enumerate(said["layers"])
        },
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
        method=said["method"],
        model=said["model"],
        layers=tuple(said["layers"]),
        options=said["options"],
        warnings=tuple(said["warnings"]),
        versions=said["versions"],
        moved=torch.from_numpy(arrays["moved"]) if "moved" in arrays else None,
        scale=said["scale"],
        unexplained=torch.from_numpy(arrays["unexplained"]) if "unexplained" in arrays else None,
        region=tuple(said.get("region", (0.0, 0.0, 1.0, 1.0))),
        bypass=said.get("bypass", {}),
        geometries=tuple(map(Geometry.from_json, places)) if all(places) else (),
        vectors=tuple(GivenVector(**vector) for vector in whole.get("vectors", ())),
    )
