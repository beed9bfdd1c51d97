"""Searches on disk: a figure, arrays and a manifest, without pickles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simexplain.data.preprocessing import Geometry
from simexplain.matching.points import PositionPair
from simexplain.models.moving import WHOLE
from simexplain.printing import json_text
from simexplain.publishing import Kind, published, read_back
from simexplain.rendering.panel import png_of
from simexplain.searching.search_result import Hit, Rival, SearchResult

SCHEMA = 1
MANIFEST, _ARRAYS, _FIGURE = "search.json", "search.npz", "search.png"
MAIN_FILES = (MANIFEST, _ARRAYS, _FIGURE)
_KIND = Kind("search", MANIFEST, _ARRAYS, ("search",), SCHEMA)
_TENSORS = ("query_maps", "hit_maps", "contrast_maps", "coverage")
_TEXTS = ("query", "model", "layer", "index", "gallery")


def manifest(result: SearchResult, files: dict[str, str]) -> dict[str, Any]:
    """The JSON contract of ``search``; keys may be added in later versions, never changed."""
    return {
        "schema": SCHEMA,
        **{name: getattr(result, name) for name in _TEXTS},
        "distance": result.distance_name,
        "close_limit": result.close_limit,
        "close_match": None if result.close_limit is None else any(h.close for h in result.hits),
        "region": None if result.region is None else list(result.region),
        "seen": _seen(result, result.query),
        "layer_region": list(result.layer_region),
        "bypass": dict(result.bypass),
        "hits": [{**_told(hit), "seen": _seen(result, hit.path)} for hit in result.hits],
        "warnings": list(result.warnings),
        "files": files,
        "versions": dict(result.versions),
        "pictures": [
            {"path": path, "geometry": result.geometries[path].to_json()}
            for path in result.pictures
        ],
    }


def _seen(result: SearchResult, path: str) -> float | None:
    """The share of a picture that the network saw, in [0, 1]."""
    geometry = result.geometries.get(path)
    return None if geometry is None else round(geometry.seen, 4)


def _told(hit: Hit) -> dict[str, Any]:
    said = asdict(hit)
    for name in ("peak", "query_peak", "box"):
        said[name] = said[name] and [round(value, 1) for value in said[name]]
    said["levels"] = [{"layer": layer, "adds": value} for layer, value in hit.levels]
    said["level_gaps"] = [{"layer": layer, "adds": value} for layer, value in hit.level_gaps]
    return said


def save_search(result: SearchResult, folder: Path, *, force: bool) -> dict[str, str]:
    """Writes a search; see ``SearchResult.save``."""
    names = {"figure": _FIGURE, "manifest": MANIFEST, "arrays": _ARRAYS}
    files = {kind: str(folder / name) for kind, name in names.items()}
    arrays: dict[str, Any] = {
        name: value.cpu().numpy()
        for name in _TENSORS
        if (value := getattr(result, name)) is not None
    }
    for number, picture in enumerate(result.pictures.values()):
        arrays[f"picture_{number}"] = picture
    with published(folder, list(names.values()), _KIND, force=force) as draft:
        (draft / _FIGURE).write_bytes(png_of(result.figure()))
        np.savez_compressed(draft / _ARRAYS, **arrays)
        text = json_text(manifest(result, files))
        (draft / MANIFEST).write_text(text, encoding="utf-8")
    return files


def load_search(folder: Path) -> SearchResult:
    """Reads a search; see ``SearchResult.load``."""
    return read_back(folder, _KIND, _restored)


def _restored(said: dict[str, Any], arrays: dict[str, Any]) -> SearchResult:
    tensors: dict[str, Any] = {
        name: torch.from_numpy(arrays[name]) if name in arrays else None for name in _TENSORS
    }
    pictures = said["pictures"]
    return SearchResult(
        **{name: said[name] for name in _TEXTS},
        **tensors,
        hits=tuple(_hit(hit) for hit in said["hits"]),
        region=None if said["region"] is None else _box(said["region"]),
        distance_name=said["distance"],
        close_limit=said.get("close_limit"),
        warnings=tuple(said["warnings"]),
        versions=said["versions"],
        layer_region=_box(said.get("layer_region", WHOLE)),  # older files do not say
        bypass=said.get("bypass", {}),
        pictures={one["path"]: arrays[f"picture_{n}"] for n, one in enumerate(pictures)},
        geometries={one["path"]: Geometry.from_json(one["geometry"]) for one in pictures},
    )


def _box(values: Sequence[float]) -> tuple[float, float, float, float]:
    x, y, width, height = values
    return x, y, width, height


def _hit(said: dict[str, Any]) -> Hit:
    made: dict[str, Any] = {name: value for name, value in said.items() if name != "seen"}
    made["pairs"] = tuple(
        PositionPair(**{**pair, "a": tuple(pair["a"]), "b": tuple(pair["b"])})
        for pair in said["pairs"]
    )
    made["rival"] = Rival(**said["rival"]) if said["rival"] else None
    for name in ("peak", "query_peak", "box"):
        made[name] = tuple(said[name]) if said[name] else None
    for name in ("levels", "level_gaps"):
        made[name] = tuple((one["layer"], one["adds"]) for one in said[name])
    return Hit(**made)
