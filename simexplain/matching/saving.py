"""Matchings on disk: figures, arrays and a manifest, without pickles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simexplain.data.preprocessing import Geometry, Preprocess
from simexplain.matching.pictures import default_points
from simexplain.matching.points import Point, PositionPair
from simexplain.matching.result import Matching
from simexplain.models.moving import WHOLE, Region
from simexplain.printing import json_text
from simexplain.publishing import Kind, numbered, published, read_back
from simexplain.rendering.panel import png_of

SCHEMA = 1
MANIFEST = "matching.json"
_ARRAYS, _FIGURE = "matching.npz", "matching.png"
MAIN_FILES = (MANIFEST, _ARRAYS, _FIGURE)
"""What a matching of one pair writes."""
_KIND = Kind("matching", MANIFEST, _ARRAYS, ("matching",), SCHEMA)
_NAMES = ("style", "layer", "model")


def manifest(
    matching: Matching,
    files: dict[str, str],
    points: Sequence[Point] | None = None,
    top: int = 8,
) -> dict[str, Any]:
    """The JSON contract of ``match``; keys may be added in later versions, never changed."""
    pairs = [_pair(matching, index, points, top) for index in range(len(matching))]
    return {
        "schema": SCHEMA,
        **{name: getattr(matching, name) for name in _NAMES},
        **pairs[0],
        "bypass": dict(matching.bypass),
        "warnings": list(matching.warnings),
        "files": files,
        "versions": dict(matching.versions),
        "preprocess": matching.preprocess.to_json(),
        "matchings": pairs,
    }


def _pair(
    matching: Matching, index: int, points: Sequence[Point] | None, top: int
) -> dict[str, Any]:
    shown = default_points(matching, index) if points is None else points
    answers = [matching.best(*point, index=index) for point in shown]
    return {
        "score": {"name": matching.score_name, "value": float(matching.score[index])},
        "residual": float(matching.residual[index]),
        "unexplained": None
        if matching.unexplained is None
        else float(matching.unexplained[index]),
        "images": [_image(matching, index, place) for place in range(2)],
        "points": [
            {"at": list(point), "best": _rounded(answer.b), "value": answer.value,
             "share": answer.share}
            for point, answer in zip(shown, answers, strict=True)
        ],
        "pairs": [_told(pair) for pair in matching.top(top, index)],
        "mutual_pairs": [
            _told(pair) for pair in matching.top(top, index, mutual=True, by="specific")
        ],
    }  # fmt: skip


def _image(matching: Matching, index: int, place: int) -> dict[str, Any]:
    frame = matching.frame("ab"[place], index)
    return {
        "path": matching.pictures[index][place].path if matching.pictures else None,
        "grid": list(frame.grid),
        "region": list(frame.region),
        "seen": _rounded(frame.box),
        "geometry": frame.geometry and frame.geometry.to_json(),
    }


def _told(pair: PositionPair) -> dict[str, Any]:
    return {**asdict(pair), "a": _rounded(pair.a), "b": _rounded(pair.b)}


def _rounded(numbers: Sequence[float]) -> list[float]:
    return [round(number, 1) for number in numbers]


def save_matching(
    matching: Matching, folder: Path, *, force: bool, points: Sequence[Point] | None, top: int
) -> dict[str, str]:
    """Writes a matching; see ``Matching.save``."""
    names = file_names(matching)
    files = {kind: str(folder / name) for kind, name in names.items()}
    said = manifest(matching, files, points, top)
    with published(folder, list(names.values()), _KIND, force=force) as draft:
        for index in range(len(matching)):
            figure = matching.figure(index, points=points)
            name = names[f"figure{numbered(index, len(matching))}"]
            (draft / name).write_bytes(png_of(figure))
        first, second = (matching.preprocess.undo(side) for side in matching.images)
        np.savez_compressed(
            draft / _ARRAYS,
            matrix=matching.matrix.cpu().numpy(),
            score=matching.score.cpu().numpy(),
            views_a=first,
            views_b=second,
        )
        text = json_text(said)
        (draft / MANIFEST).write_text(text, encoding="utf-8")
    return files


def file_names(matching: Matching) -> dict[str, str]:
    """The name of each file by its kind; figures are numbered where there are several pairs."""
    names = {"manifest": MANIFEST, "arrays": _ARRAYS}
    for index in range(len(matching)):
        tag = numbered(index, len(matching))
        names[f"figure{tag}"] = f"matching{tag}.png"
    return names


def load_matching(folder: Path) -> Matching:
    """Reads a matching; see ``Matching.load``."""
    return read_back(folder, _KIND, _restored)


def _restored(said: dict[str, Any], arrays: dict[str, Any]) -> Matching:
    preprocess = Preprocess.from_json(said["preprocess"])
    geometries = []
    for pair in said["matchings"]:
        kept = [image["geometry"] for image in pair["images"]]
        if all(kept):
            first, second = (Geometry.from_json(one) for one in kept)
            geometries.append((first, second))
    return Matching(
        matrix=torch.from_numpy(arrays["matrix"]),
        score=torch.from_numpy(arrays["score"]),
        score_name=said["score"]["name"],
        **{name: said[name] for name in _NAMES},
        images=(preprocess.redo(arrays["views_a"]), preprocess.redo(arrays["views_b"])),
        preprocess=preprocess,
        warnings=tuple(said["warnings"]),
        versions=said["versions"],
        geometries=tuple(geometries),
        unexplained=_shares([pair.get("unexplained") for pair in said["matchings"]]),
        regions=(_region(said["images"][0]), _region(said["images"][1])),
        bypass=said.get("bypass", {}),
    )


def _region(image: dict[str, Any]) -> Region:
    """The whole, of files that an older version wrote."""
    top, left, bottom, right = image.get("region", WHOLE)
    return top, left, bottom, right


def _shares(values: Sequence[float | None]) -> torch.Tensor | None:
    """None of files that an older version wrote."""
    known = [value for value in values if value is not None]
    return torch.tensor(known) if len(known) == len(values) else None
