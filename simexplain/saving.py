"""Explanations on disk: plain files without pickles, written whole or not at all."""

from __future__ import annotations

import json
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from simexplain.data.preprocessing import Preprocess
from simexplain.errors import DAMAGED, OutputError
from simexplain.explanation import Explanation
from simexplain.rendering.overlay import RENDERERS
from simexplain.rendering.panel import png_of

SCHEMA = 1
MANIFEST = "explanation.json"
_ARRAYS, _FIGURE = "maps.npz", "explanation.png"
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
    return {
        "images": [
            {"path": path, "role": role, "peak": peak and [round(v, 1) for v in peak]}
            for path, role, peak in zip(paths, explanation.roles, peaks, strict=True)
        ],
        "distances": explanation.distances[index].tolist(),
        "scores": explanation.scores[index].tolist(),
        "condition": asdict(explanation.condition(index)),
        "moved": None if explanation.moved is None else explanation.moved[index].tolist(),
    }


def save_explanation(
    explanation: Explanation, folder: Path, *, force: bool, styles: Sequence[str]
) -> dict[str, str]:
    """Writes an explanation; see ``Explanation.save``."""
    names = file_names(explanation)
    check_writable(folder, names.values(), force=force)
    parent = _existing(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=".simexplain-", dir=parent) as temporary:
            draft = Path(temporary) / "draft"
            draft.mkdir()
            files = {kind: str(folder / name) for kind, name in names.items()}
            _write(explanation, draft, names, manifest(explanation, files), styles)
            _publish(draft, folder, list(names.values()))
    except OSError as error:
        raise OutputError(
            f"'{folder}' cannot be written ({error.strerror or error}); choose another folder."
        ) from error
    return files


def check_writable(folder: Path, names: Any, *, force: bool) -> None:
    """Refuses a folder that is a file or, without ``force``, holds any of these names.

    Raises:
        OutputError: If so; says what to do.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"Expected a folder for the results, but '{folder}' is a file.")
    there = [name for name in names if (folder / name).exists()]
    blocked = [name for name in there if (folder / name).is_dir()]
    if blocked:
        raise OutputError(
            f"'{folder / blocked[0]}' is a folder where a file must go; choose another folder."
        )
    if there and not force:
        raise OutputError(
            f"'{folder / there[0]}' is there already; choose another folder or say --force "
            "(force=True) to replace it."
        )


def file_names(explanation: Explanation) -> dict[str, str]:
    """The name of each file by its kind; numbered where there are several comparisons."""
    names = {"manifest": MANIFEST, "maps": _ARRAYS}
    for index in range(len(explanation)):
        tag = "" if len(explanation) == 1 else f"_{index:04d}"
        names[f"figure{tag}"] = f"explanation{tag}.png"
        for place, role in enumerate(explanation.roles):
            names[f"heatmap{tag}_{place}"] = f"heatmap{tag}_{place}_{role}.png"
    return names


def _existing(folder: Path) -> Path:
    """The nearest folder above that exists: the draft lies on the same disk as the result."""
    parent = folder.absolute()
    while not parent.is_dir():
        parent = parent.parent
    return parent


def _write(
    explanation: Explanation,
    draft: Path,
    names: dict[str, str],
    said: dict[str, Any],
    styles: Sequence[str],
) -> None:
    for index in range(len(explanation)):
        tag = "" if len(explanation) == 1 else f"_{index:04d}"
        figure = explanation.figure(index, styles=styles, by_layer=True)
        (draft / names[f"figure{tag}"]).write_bytes(png_of(figure))
        for place in range(len(explanation.roles)):
            picture, heatmap = explanation.on_picture(place, index)
            drawn = Image.fromarray(RENDERERS[styles[0]](picture, heatmap))
            drawn.save(draft / names[f"heatmap{tag}_{place}"], compress_level=3)
    arrays = {name: getattr(explanation, name).cpu().numpy() for name in _TENSORS}
    for number, layer in enumerate(explanation.layers):
        arrays[f"layer_{number}"] = explanation.layer_maps[layer].cpu().numpy()
    if explanation.moved is not None:
        arrays["moved"] = explanation.moved.cpu().numpy()
    np.savez_compressed(draft / _ARRAYS, views=explanation.views, **arrays)
    text = json.dumps(said, indent=2, ensure_ascii=False)
    (draft / MANIFEST).write_text(text, encoding="utf-8")


def _publish(draft: Path, folder: Path, names: list[str]) -> None:
    """Moves the finished files into place: at once into a new folder, else one by one."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft.replace(folder)
        return
    stale = _earlier_files(folder) - set(names)
    # The manifest goes last: while it is the old one, it names files that all exist.
    for name in sorted(names, key=lambda name: name == MANIFEST):
        (draft / name).replace(folder / name)
    for name in stale:
        (folder / name).unlink(missing_ok=True)


def _earlier_files(folder: Path) -> set[str]:
    """The pictures that an earlier manifest in the folder claims as its own."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        names = {Path(name).name for name in files.values()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return set()
    return {n for n in names if n.startswith(("heatmap_", "explanation_")) and n.endswith(".png")}


def load_explanation(folder: Path) -> Explanation:
    """Reads an explanation; see ``Explanation.load``."""
    try:
        said = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if said["schema"] != SCHEMA:
            raise OutputError(
                f"'{folder}' was written in schema {said['schema']}, but this version reads "
                f"schema {SCHEMA}; use a matching version of simexplain."
            )
        with np.load(folder / _ARRAYS, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        return _restored(said, arrays)
    except FileNotFoundError as error:
        raise OutputError(
            f"'{folder}' holds no explanation: {error.filename} is missing."
        ) from error
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, *DAMAGED) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"The explanation in '{folder}' is damaged ({error}); make it again."
        ) from error


def _restored(said: dict[str, Any], arrays: dict[str, Any]) -> Explanation:
    preprocess = Preprocess.from_json(said["preprocess"])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocess.mean, preprocess.std))
    views = torch.from_numpy(arrays["views"]).movedim(-1, -3)
    tensors: dict[str, Any] = {name: torch.from_numpy(arrays[name]) for name in _TENSORS}
    first = said["comparisons"][0]["images"]
    return Explanation(
        **tensors,
        layer_maps={
            layer: torch.from_numpy(arrays[f"layer_{number}"])
            for number, layer in enumerate(said["layers"])
        },
        positives=sum(image["role"] == "positive" for image in first),
        images=(views / 255 - mean) / std,
        preprocess=preprocess,
        method=said["method"],
        model=said["model"],
        layers=tuple(said["layers"]),
        options=said["options"],
        warnings=tuple(said["warnings"]),
        versions=said["versions"],
        moved=torch.from_numpy(arrays["moved"]) if "moved" in arrays else None,
        scale=said["scale"],
    )
