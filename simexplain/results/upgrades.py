"""Results as version 0.1.0 wrote them: the fields that are under other names or in other shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simexplain.errors import OutputError

Metadata = Mapping[str, Any]
Arrays = dict[str, Any]

_GRAPH = ("nodes", "reliabilities", "rectified", "inflows", "sensitivities")
_MAPS = ("query_maps", "hit_maps", "contrast_maps", "coverage")


def _attribution(metadata: Metadata, arrays: Arrays) -> dict[str, Any]:
    levels = metadata["levels"]

    def each(name: str, count: int = len(levels)) -> list[str]:
        return [f"{name}_{number}" for number in range(count)]

    biases = each("bias") if "bias_0" in arrays else [None] * len(levels)
    return {
        "levels": [level["layer"] for level in levels],
        "regions": {level["layer"]: level["region"] for level in levels if "region" in level},
        "pairs": {name: each(name) for name in _GRAPH},
        "edges": each("edges", len(levels) - 1),
        "embeddings": each("embeddings"),
        "features": each("features"),
        "heads": [list(head) for head in zip(each("weight"), biases, strict=True)],
        "images": "views",
        "roles": [pair["images"][1]["role"] for pair in metadata["pairs"]],
    }


def _comparison(metadata: Metadata, arrays: Arrays) -> dict[str, Any]:
    methods = []
    for position, one in enumerate(metadata["methods"]):
        start = f"method_{position}_"
        arrays[f"{start}maps"] = arrays[f"maps_{position}"][None]
        arrays.setdefault(f"{start}views", arrays["views"][None])
        arrays.setdefault(f"{start}layer_0", arrays[f"{start}maps"])
        own = json.loads(str(arrays[f"method_{position}"]))
        same = ("name", "asked", "agreement", "forwards", "seconds", "measuring")
        kept = {name: one[name] for name in same if name in one}
        explained = _explanation(own, arrays, start)
        methods.append({**kept, "scores": one["per_image"], "explanation": explained})
    places = range(len(metadata["images"]))
    return {
        "methods": methods,
        "skipped": {one["name"]: one["reason"] for one in metadata["skipped"]},
        "masks": {
            position: f"mask_{position}" for position in places if f"mask_{position}" in arrays
        },
        "notes": metadata["warnings"],
    }


def _explanation(metadata: Metadata, arrays: Arrays, start: str = "") -> dict[str, Any]:
    """Those of an explanation whose arrays have names that start so."""
    whole = metadata["comparisons"][0]
    places = [image.get("geometry") for image in whole["images"]]
    members = whole.get("members") or [image["role"] for image in whole["images"]]
    near = [role.partition(" ")[0] in ("positive", "direction") for role in members]
    rows = metadata.get("rows") or [metadata]
    own = {
        **{name: metadata[name] for name in ("model", "versions", "preprocess", "scale")},
        **_row({**metadata, "warnings": rows[0]["warnings"]}, arrays, start),
        "embeddings": f"{start}embeddings",
        "distances": f"{start}distances",
        "positives": sum(near),
        "images": f"{start}images" if f"{start}images" in arrays else f"{start}views",
        "moved": _there(f"{start}moved", arrays),
        "geometries": places if all(places) else [],
        "frames": whole.get("frames", []),
        "vectors": whole.get("vectors", []),
    }
    others = [
        {**own, **_row(row, arrays, f"{start}row{number}_")}
        for number, row in enumerate(rows[1:], start=2)
    ]
    return {**own, "others": others}


def _row(metadata: Metadata, arrays: Arrays, mark: str) -> dict[str, Any]:
    """What differs from row to row of an explanation."""
    plain = ("method", "layers", "options", "warnings", "region", "bypass", "layer_regions")
    layers = enumerate(metadata["layers"])
    return {
        **{name: f"{mark}{name}" for name in ("maps", "weights", "scores")},
        "unexplained": _there(f"{mark}unexplained", arrays),
        "layer_maps": {layer: f"{mark}layer_{number}" for number, layer in layers},
        "check": upgraded_check([one.get("check") for one in metadata["comparisons"]]),
        **{name: metadata[name] for name in plain if name in metadata},
    }


def upgraded_check(metadata: Sequence[Metadata | None]) -> dict[str, Any] | None:
    """The check of all comparisons from that of each."""
    present = [one for one in metadata if one is not None]
    if len(present) < len(metadata):
        return None
    names = ("falls", "controls", "moved", "spread")
    return {**present[0], **{name: [one.get(name) for one in present] for name in names}}


def _matching(metadata: Metadata, arrays: Arrays) -> dict[str, Any]:
    places = [[image["geometry"] for image in pair["images"]] for pair in metadata["matchings"]]
    shares = [pair.get("unexplained") for pair in metadata["matchings"]]
    if None not in shares:
        arrays["unexplained"] = np.array(shares, dtype=np.float32)
    regions = [image["region"] for image in metadata["images"] if "region" in image]
    return {
        "score_name": metadata["score"]["name"],
        "images": ["views_a", "views_b"],
        "geometries": [pair for pair in places if all(pair)],
        "unexplained": _there("unexplained", arrays),
        **({"regions": regions} if regions else {}),
    }


def _pair(metadata: Metadata, arrays: Arrays) -> dict[str, Any]:
    sides = ("first", "second")
    return {side: _explanation(metadata[side], arrays, f"{side}_") for side in sides}


def _search(metadata: Metadata, arrays: Arrays) -> dict[str, Any]:
    levels, elsewhere = ("levels", "level_gaps"), ("seen", "levels", "level_gaps")
    pictures = metadata["pictures"]
    return {
        **{name: _there(name, arrays) for name in _MAPS},
        "hits": [
            {
                **{name: value for name, value in hit.items() if name not in elsewhere},
                **{k: [[one["layer"], one["adds"]] for one in hit[k]] for k in levels},
            }
            for hit in metadata["hits"]
        ],
        "distance_name": metadata["distance"],
        "pictures": {one["path"]: f"picture_{n}" for n, one in enumerate(pictures)},
        "geometries": {one["path"]: one["geometry"] for one in pictures},
    }


def _segmentation(metadata: Metadata, arrays: Arrays) -> dict[str, Any]:
    width, height = metadata["test"]["size"]
    bits = np.unpackbits(arrays["mask"], count=width * height)
    arrays["mask"] = bits.reshape(height, width).astype(bool)
    for name in arrays:
        if arrays[name].dtype == np.float16:
            arrays[name] = arrays[name].astype(np.float32)
    named = [(name, role) for role in ("support", "other") for name in metadata[f"{role}s"]]
    return {
        "name": metadata["test"]["path"] or "",
        "marks": _there("marks", arrays),
        "images": [
            {"name": name or "", "role": role, "picture": f"image_{n}", "heat": f"heat_{n}"}
            for n, (name, role) in enumerate(named)
        ],
    }


def _refused(metadata: Metadata, arrays: Arrays) -> dict[str, Any]:
    """Of what version 0.1.0 wrote without a way to read it.

    Raises:
        OutputError: Always.
    """
    raise OutputError(
        "This evaluation was written by version 0.1.0, which did not keep all that loading needs; "
        "make it again with --force (force=True)."
    )


def _there(name: str, arrays: Arrays) -> str | None:
    return name if name in arrays else None


def _training(metadata: Metadata, arrays: Arrays) -> dict[str, Any]:
    return {"rows": metadata["epochs"], "folder": str(Path(metadata["files"]["results"]).parent)}


UPGRADES = {
    "Attribution": _attribution,
    "Explanation": _explanation,
    "Matching": _matching,
    "MethodComparison": _comparison,
    "PairExplanation": _pair,
    "Reidentification": _refused,
    "Retrieval": _refused,
    "SearchResult": _search,
    "Segmentation": _segmentation,
    "SegmentationScores": _refused,
    "TrainResult": _training,
}
"""For types whose JSON does not have all fields as they are, what gives the others."""
