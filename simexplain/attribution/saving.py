"""Attributions on disk: figures, a table, arrays and a manifest, without pickles."""

from __future__ import annotations

import csv
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simexplain.attribution.result import Attribution
from simexplain.data.preprocessing import Preprocess
from simexplain.graph.inference import PairGraph
from simexplain.models.avsl_options import ORIGINS
from simexplain.models.moving import WHOLE
from simexplain.printing import json_text
from simexplain.publishing import Kind, numbered, published, read_back
from simexplain.rendering.panel import png_of

SCHEMA = 1
MANIFEST = "attribution.json"
_ARRAYS, _GRAPH, _RANKING, _TABLE = "attribution.npz", "graph.png", "ranking.png", "nodes.csv"
MAIN_FILES = (MANIFEST, _ARRAYS, _GRAPH, _RANKING, _TABLE)
"""What an attribution of one pair writes."""
_KIND = Kind("attribution", MANIFEST, _ARRAYS, ("graph",), SCHEMA)
_PAIR_PARTS = ("nodes", "reliabilities", "rectified", "inflows", "sensitivities")


def manifest(
    attribution: Attribution,
    files: dict[str, str],
    top: int = 8,
    node: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """The JSON contract of ``attribute``; keys may be added in later versions, never changed."""
    pairs = [_pair(attribution, index, top, node) for index in range(len(attribution))]
    return {
        "schema": SCHEMA,
        "model": attribution.model,
        "origin": attribution.origin,
        "origin_text": ORIGINS[attribution.origin],
        **pairs[0],
        "options": dict(attribution.options),
        "warnings": list(attribution.warnings),
        "files": files,
        "versions": dict(attribution.versions),
        "preprocess": attribution.preprocess.to_json(),
        "pairs": pairs,
    }


def _pair(
    attribution: Attribution, index: int, top: int, node: tuple[int, int] | None
) -> dict[str, Any]:
    paths: list[str | None] = [None, None]
    if attribution.pictures:
        paths = [picture.path for picture in attribution.pictures[index]]
    seen: list[float | None] = [None, None]
    if attribution.geometries:
        seen = [round(geometry.seen, 4) for geometry in attribution.geometries[index]]
    parts = attribution.level_contributions[index].tolist()
    shares = attribution.shares[index].tolist()
    return {
        "images": [
            {"path": paths[0], "role": "anchor", "seen": seen[0]},
            {"path": paths[1], "role": attribution.roles[index], "seen": seen[1]},
        ],
        "distance": float(attribution.distances[index]),
        "residual": float(attribution.residual[index]),
        "levels": [
            {
                "level": number,
                "layer": layer,
                "contribution": part,
                "share": share,
                "nodes": count,
                "region": list(attribution.regions.get(layer, WHOLE)),
            }
            for number, (layer, part, share, count) in enumerate(
                zip(attribution.levels, parts, shares, _counts(attribution), strict=True)
            )
        ],
        "nodes": [asdict(found) for found in attribution.top(top, index)],
        "decomposition": None if node is None else asdict(attribution.decompose(*node, index)),
    }


def _counts(attribution: Attribution) -> list[int]:
    return [int(level.shape[1]) for level in attribution.nodes]


def save_attribution(
    attribution: Attribution, folder: Path, *, force: bool, top: int, node: tuple[int, int] | None
) -> dict[str, str]:
    """Writes an attribution; see ``Attribution.save``."""
    names = file_names(attribution)
    files = {kind: str(folder / name) for kind, name in names.items()}
    with published(folder, list(names.values()), _KIND, force=force) as draft:
        for index in range(len(attribution)):
            tag = numbered(index, len(attribution))
            level, taken = node or (-1, None)
            figure = attribution.figure(index, level=level, node=taken)
            (draft / names[f"graph{tag}"]).write_bytes(png_of(figure))
        (draft / _RANKING).write_bytes(png_of(attribution.ranking()))
        _write_table(attribution, draft / _TABLE)
        np.savez_compressed(draft / _ARRAYS, **_arrays(attribution))
        said = manifest(attribution, files, top, node)
        text = json_text(said)
        (draft / MANIFEST).write_text(text, encoding="utf-8")
    return files


def file_names(attribution: Attribution) -> dict[str, str]:
    """The name of each file by its kind; graphs are numbered where there are several pairs."""
    names = {"manifest": MANIFEST, "arrays": _ARRAYS, "table": _TABLE, "ranking": _RANKING}
    for index in range(len(attribution)):
        tag = numbered(index, len(attribution))
        names[f"graph{tag}"] = f"graph{tag}.png"
    return names


def _write_table(attribution: Attribution, path: Path) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        for index in range(len(attribution)):
            table = attribution.table(index)
            if index == 0:
                writer.writerow(["pair", *table])
            writer.writerows([index, *row] for row in zip(*table.values(), strict=True))


def _arrays(attribution: Attribution) -> dict[str, Any]:
    levels: dict[str, tuple[Tensor, ...]] = {
        "edges": attribution.edges,
        "embeddings": attribution.embeddings,
        "features": attribution.features,
        "weight": tuple(weight for weight, _ in attribution.heads),
        "bias": tuple(b for _, b in attribution.heads if b is not None),
    }
    levels |= {name: getattr(attribution.pairs, name) for name in _PAIR_PARTS}
    arrays = {
        f"{name}_{number}": part.cpu().numpy()
        for name, parts in levels.items()
        for number, part in enumerate(parts)
    }
    return {
        **arrays,
        "distances": attribution.distances.cpu().numpy(),
        "views": attribution.views,
    }


def load_attribution(folder: Path) -> Attribution:
    """Reads an attribution; see ``Attribution.load``."""
    return read_back(folder, _KIND, _restored)


def _restored(said: dict[str, Any], arrays: dict[str, Any]) -> Attribution:
    levels = tuple(level["layer"] for level in said["levels"])

    def each(name: str, count: int = len(levels)) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(arrays[f"{name}_{number}"]) for number in range(count))

    preprocess = Preprocess.from_json(said["preprocess"])
    weights = each("weight")
    biases: tuple[Tensor | None, ...] = (None,) * len(levels)
    if "bias_0" in arrays:
        biases = each("bias")
    return Attribution(
        distances=torch.from_numpy(arrays["distances"]),
        pairs=PairGraph(*(each(name) for name in _PAIR_PARTS)),
        edges=each("edges", len(levels) - 1),
        levels=levels,
        embeddings=each("embeddings"),
        features=each("features"),
        heads=tuple(zip(weights, biases, strict=True)),
        images=preprocess.redo(arrays["views"]),
        preprocess=preprocess,
        roles=tuple(pair["images"][1]["role"] for pair in said["pairs"]),
        model=said["model"],
        origin=said["origin"],
        options=said["options"],
        warnings=tuple(said["warnings"]),
        versions=said["versions"],
        regions={level["layer"]: tuple(level.get("region", WHOLE)) for level in said["levels"]},
    )
