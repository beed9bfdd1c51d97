"""Comparisons of methods and evaluations on disk: folders written whole or not at all."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from simexplain.evaluation.results import SCHEMA, Evaluation
from simexplain.printing import json_text
from simexplain.publishing import Kind, published, read_back
from simexplain.rendering.panel import png_of
from simexplain.saving import arrays_of, manifest, restored

if TYPE_CHECKING:
    from simexplain.evaluation.comparison_result import MethodComparison
    from simexplain.evaluation.reid_result import Reidentification
    from simexplain.evaluation.results import Row
    from simexplain.evaluation.retrieval_result import Retrieval

_COMPARISON = {
    "figure": "comparison.png",
    "manifest": "comparison.json",
    "maps": "comparison.npz",
}
_KIND = Kind(
    "comparison of methods", _COMPARISON["manifest"], _COMPARISON["maps"], (), SCHEMA
)  # fmt: skip
COMPARISON_FILES = tuple(_COMPARISON.values())
"""What a comparison of methods writes."""

_EVALUATION = {"results": "results.json", "values": "values.csv", "figure": "results.png"}
EVALUATION_FILES = tuple(_EVALUATION.values())
"""What an evaluation writes."""

_RETRIEVAL = {"results": "retrieval.json", "queries": "queries.csv", "classes": "classes.csv"}
RETRIEVAL_FILES = tuple(_RETRIEVAL.values())
"""What an evaluation of retrieval writes."""

_REID = {
    "results": "reid.json", "queries": "queries.csv", "failures": "failures.csv",
    "figure": "failures.png",
}  # fmt: skip
REID_FILES = tuple(_REID.values())
"""What an evaluation of re-identification writes; the last one where a query failed."""


def save_comparison(
    result: MethodComparison, folder: Path, *, force: bool, style: str
) -> dict[str, str]:
    """Writes a comparison of methods; see ``MethodComparison.save``."""
    names = _COMPARISON
    files = {what: str(folder / name) for what, name in names.items()}
    with published(folder, list(names.values()), _KIND, force=force) as draft:
        (draft / names["figure"]).write_bytes(png_of(result.figure(style)))
        np.savez_compressed(draft / names["maps"], **_arrays(result))
        write_json(draft / names["manifest"], result.to_json(files))
    return files


def _arrays(result: MethodComparison) -> dict[str, Any]:
    """The views, the maps of each method, and under ``method_N...`` what is left of it."""
    first = result.first
    found: dict[str, Any] = {"views": first.views[0]}
    for place, method in enumerate(result.methods):
        arrays = arrays_of(method.explanation)
        found[f"maps_{place}"] = arrays.pop("maps")[0]
        known = {"views"} if np.array_equal(arrays["views"], first.views) else set()
        if len(method.explanation.layers) == 1:
            known.add("layer_0")
        found[f"method_{place}"] = np.array(json.dumps(manifest(method.explanation, {})))
        found |= {f"method_{place}_{k}": part for k, part in arrays.items() if k not in known}
    for place, mask in result.masks.items():
        seen = mask.numpy()
        if first.pictures:  # else, as after loading, masks lie on the views already
            seen = first.geometries[place].from_original(seen)
        found[f"mask_{place}"] = seen
    return found


def load_comparison(folder: Path) -> MethodComparison:
    """Reads a comparison of methods; see ``MethodComparison.load``."""
    return read_back(folder, _KIND, _restored)


def _restored(said: dict[str, Any], arrays: dict[str, Any]) -> MethodComparison:
    from simexplain.evaluation.comparison_result import ComparedMethod, MethodComparison

    methods = []
    for place, one in enumerate(said["methods"]):
        own = {"views": arrays["views"][None], "maps": arrays[f"maps_{place}"][None]}
        own["layer_0"] = own["maps"]
        start = f"method_{place}_"
        own |= {k.removeprefix(start): part for k, part in arrays.items() if k.startswith(start)}
        explanation = restored(json.loads(str(arrays[f"method_{place}"])), own)
        scores = {name: tuple(map(_float, values)) for name, values in one["per_image"].items()}
        same = {name: one[name] for name in ("name", "asked", "forwards", "seconds")}
        same["measuring"] = one.get("measuring", 0.0)
        agreement = {name: _float(value) for name, value in one["agreement"].items()}
        methods.append(
            ComparedMethod(explanation=explanation, scores=scores, agreement=agreement, **same)
        )
    return MethodComparison(
        methods=tuple(methods),
        random={name: _float(value) for name, value in said["random"].items()},
        chance={name: _float(value) for name, value in said["chance"].items()},
        skipped={one["name"]: one["reason"] for one in said["skipped"]},
        masks={
            place: torch.from_numpy(arrays[f"mask_{place}"])
            for place in range(len(said["images"]))
            if f"mask_{place}" in arrays
        },
        notes=tuple(said["warnings"]),
        settings=said["settings"],
        seconds=said.get("seconds", 0.0),
    )


def _float(value: float | None) -> float:
    """The counterpart of what ``plain`` makes of NaN."""
    return math.nan if value is None else value


def save_evaluation(result: Evaluation, folder: Path, *, force: bool) -> dict[str, str]:
    """Writes ``results.json``, ``values.csv`` with a line an item and method, ``results.png``.

    Args:
        result: What was measured.
        folder: Made if missing.
        force: Replace these files; others stay.

    Returns:
        What was written, by kind.

    Raises:
        OutputError: If files are there already, or the folder cannot be written.
    """
    names = _EVALUATION
    files = {what: str(folder / name) for what, name in names.items()}
    kind = Kind("evaluation", names["results"], "", (), SCHEMA)
    with published(folder, list(names.values()), kind, force=force) as draft:
        write_json(draft / names["results"], {**result.to_json(), "files": files})
        with (draft / names["values"]).open(
            "w", encoding="utf-8", errors="backslashreplace", newline=""
        ) as opened:
            writer = csv.writer(opened)
            writer.writerow(("item", "anchor", "method", *result.metrics))
            writer.writerows(_values(result))
        (draft / names["figure"]).write_bytes(png_of(result.figure()))
    return files


def _values(result: Evaluation) -> list[list[Any]]:
    """One row an item and method; what is undefined is left empty."""
    rows = []
    for place, paths in enumerate(result.items):
        for name, scores in result.methods.items():
            found = [scores.values[metric][place] for metric in result.metrics]
            cells = ["" if value != value else repr(value) for value in found]
            rows.append([place, paths[0], name, *cells])
    return rows


def save_retrieval(result: Retrieval, folder: Path, *, force: bool) -> dict[str, str]:
    """Writes ``retrieval.json``, ``queries.csv`` and ``classes.csv``, a line a query and a class.

    Args:
        result: What was measured.
        folder: Made if missing.
        force: Replace these files; others stay.

    Returns:
        What was written, by kind.

    Raises:
        OutputError: If files are there already, or the folder cannot be written.
    """
    names = _RETRIEVAL
    files = {what: str(folder / name) for what, name in names.items()}
    kind = Kind("evaluation of retrieval", names["results"], "", (), SCHEMA)
    tables = {"queries": result.table(), "classes": result.class_table()}
    with published(folder, list(names.values()), kind, force=force) as draft:
        write_json(draft / names["results"], {**result.to_json(), "files": files})
        for what, rows in tables.items():
            write_table(draft / names[what], list(rows[0]), rows)
    return files


def save_reid(result: Reidentification, folder: Path, *, force: bool) -> dict[str, str]:
    """Writes ``reid.json``, ``queries.csv``, ``failures.csv`` and, if any failed, ``failures.png``.

    Args:
        result: What was measured.
        folder: Made if missing.
        force: Replace these files; others stay.

    Returns:
        What was written, by kind.

    Raises:
        OutputError: If files are there already, or the folder cannot be written.
        ImageError: If a picture of a failure cannot be read any more.
    """
    from simexplain.evaluation.reid_result import FAILURE_COLUMNS

    names = {k: name for k, name in _REID.items() if result.failures or k != "figure"}
    files = {what: str(folder / name) for what, name in names.items()}
    kind = Kind("evaluation of re-identification", names["results"], "", ("failures",), SCHEMA)
    with published(folder, list(names.values()), kind, force=force) as draft:
        write_json(draft / names["results"], {**result.to_json(), "files": files})
        queries = result.table()
        write_table(draft / names["queries"], list(queries[0]), queries)
        failures = [one.row() for one in result.failures]
        write_table(draft / names["failures"], FAILURE_COLUMNS, failures)
        if result.failures:
            (draft / names["figure"]).write_bytes(png_of(result.figure()))
    return files


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """A CSV file; what is undefined is left empty."""
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as opened:
        writer = csv.DictWriter(opened, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: "" if v != v else v for k, v in row.items()})


def write_json(path: Path, said: dict[str, Any]) -> None:
    """A manifest, with the end of its last line."""
    text = json_text(said)
    path.write_text(text + "\n", encoding="utf-8")
