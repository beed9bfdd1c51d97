"""Segmentations on disk: mask, overlay, cut-out, figure, arrays and a manifest, no pickles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from simexplain.data.preprocessing import Geometry
from simexplain.evaluation.saving import write_json, write_table
from simexplain.printing import json_text
from simexplain.publishing import Kind, published, read_back
from simexplain.renaming import renamed, with_old_names
from simexplain.rendering.panel import png_of
from simexplain.segmentation.result import Segmentation, SupportImage
from simexplain.segmentation.scores import SegmentationScores

SCHEMA = 1
MANIFEST = "segmentation.json"
_NAMES = {
    "mask": "mask.png",
    "overlay": "overlay.png",
    "cutout": "cutout.png",
    "figure": "segmentation.png",
    "arrays": "segmentation.npz",
    "manifest": MANIFEST,
}
MAIN_FILES = tuple(_NAMES.values())
"""What a segmentation writes."""
_SCORES = {"scores": "scores.json", "episodes": "episodes.csv"}
SCORE_FILES = tuple(_SCORES.values())
"""What an evaluation of segmentation writes."""
_KIND = Kind("segmentation", MANIFEST, _NAMES["arrays"], (), SCHEMA)
_PLAIN = ("refine", "method", "model")


def manifest(result: Segmentation, files: dict[str, str]) -> dict[str, Any]:
    """The JSON contract of ``segment``; keys may be added in later versions, never changed."""
    height, width = result.mask.shape
    said = {
        "schema": SCHEMA,
        **{name: getattr(result, name) for name in _PLAIN},
        "layers": list(result.layers),
        "bypass": dict(result.bypass),
        "test": {"path": result.name or None, "size": [width, height]},
        "seen": round(result.geometries[0].seen, 4) if result.geometries else None,
        "geometries": [geometry.to_json() for geometry in result.geometries],
        "supports": [image.name or None for image in result.images if image.role == "support"],
        "others": [image.name or None for image in result.images if image.role == "other"],
        "share": result.share,
        "box": None if result.box is None else list(result.box),
        "options": dict(result.options),
        "warnings": list(result.warnings),
        "files": files,
        "versions": dict(result.versions),
    }
    return with_old_names(said, "by")


def save_segmentation(result: Segmentation, folder: Path, *, force: bool) -> dict[str, str]:
    """Writes a segmentation; see ``Segmentation.save``."""
    files = {kind: str(folder / name) for kind, name in _NAMES.items()}
    said = manifest(result, files)
    with published(folder, list(MAIN_FILES), _KIND, force=force) as draft:
        Image.fromarray(result.mask.astype(np.uint8) * 255).save(draft / _NAMES["mask"])
        Image.fromarray(result.overlay()).save(draft / _NAMES["overlay"])
        Image.fromarray(result.cutout()).save(draft / _NAMES["cutout"])
        (draft / _NAMES["figure"]).write_bytes(png_of(result.figure()))
        np.savez_compressed(draft / _NAMES["arrays"], **_arrays(result))
        text = json_text(said)
        (draft / MANIFEST).write_text(text, encoding="utf-8")
    return files


def _arrays(result: Segmentation) -> dict[str, Any]:
    """The mask as bits, all else at most as large as the cut sees it."""
    longest = int(result.options["cut"]["longest"])
    found: dict[str, Any] = {
        "mask": np.packbits(result.mask),
        "heat": _reduced(result.heat, longest).astype(np.float16),
        "picture": _reduced(result.picture, longest),
    }
    if result.marks is not None:
        found["marks"] = result.marks
    for place, image in enumerate(result.images):
        found[f"image_{place}"] = image.picture
        found[f"heat_{place}"] = image.heat.astype(np.float16)
    return found


def _reduced(values: NDArray[Any], longest: int) -> NDArray[Any]:
    height, width = values.shape[:2]
    share = longest / max(height, width)
    if share >= 1:
        return values
    size = max(1, round(width * share)), max(1, round(height * share))
    return np.asarray(cv2.resize(values, size, interpolation=cv2.INTER_AREA))


def load_segmentation(folder: Path) -> Segmentation:
    """Reads a segmentation; see ``Segmentation.load``."""
    return read_back(folder, _KIND, _restored)


def _restored(said: dict[str, Any], arrays: dict[str, Any]) -> Segmentation:
    said = renamed(said, _PLAIN)
    width, height = (int(side) for side in said["test"]["size"])
    bits = np.unpackbits(arrays["mask"], count=width * height)
    names = [*said["supports"], *said["others"]]
    roles = ["support"] * len(said["supports"]) + ["other"] * len(said["others"])
    return Segmentation(
        mask=bits.reshape(height, width).astype(bool),
        heat=_enlarged(arrays["heat"].astype(np.float32), (width, height)),
        marks=arrays.get("marks"),
        picture=_enlarged(arrays["picture"], (width, height)),
        name=said["test"]["path"] or "",
        images=tuple(
            SupportImage(
                name or "", role, arrays[f"image_{place}"],
                arrays[f"heat_{place}"].astype(np.float32),
            )
            for place, (name, role) in enumerate(zip(names, roles, strict=True))
        ),
        **{name: said[name] for name in _PLAIN},
        layers=tuple(said["layers"]),
        options=renamed(said["options"], ("aggregate", "upscale")),
        warnings=tuple(said["warnings"]),
        versions=said["versions"],
        geometries=tuple(map(Geometry.from_json, said.get("geometries", ()))),
        bypass=said.get("bypass", {}),
    )  # fmt: skip


def _enlarged(values: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    if values.shape[1::-1] == size:
        return values
    return np.asarray(cv2.resize(values, size, interpolation=cv2.INTER_LINEAR))


def save_scores(result: SegmentationScores, folder: Path, *, force: bool) -> dict[str, str]:
    """Writes ``scores.json`` and ``episodes.csv``, a line for each way of each episode.

    Args:
        result: What was measured.
        folder: Made if missing.
        force: Replace these files; others stay.

    Returns:
        What was written, by kind.

    Raises:
        OutputError: If files are there already, or the folder cannot be written.
    """
    files = {what: str(folder / name) for what, name in _SCORES.items()}
    kind = Kind("evaluation of segmentation", _SCORES["scores"], "", (), SCHEMA)
    with published(folder, list(SCORE_FILES), kind, force=force) as draft:
        write_json(draft / _SCORES["scores"], {**result.to_json(), "files": files})
        rows = result.table()
        write_table(draft / _SCORES["episodes"], list(rows[0]), rows)
    return files
