"""Comparisons of methods and evaluations on disk: folders written whole or not at all."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simexplain.evaluation.results import SCHEMA, Evaluation
from simexplain.publishing import Kind, published
from simexplain.rendering.panel import png_of

if TYPE_CHECKING:
    from simexplain.evaluation.comparison_result import MethodComparison

_COMPARISON = {
    "figure": "comparison.png",
    "manifest": "comparison.json",
    "maps": "comparison.npz",
}
COMPARISON_FILES = tuple(_COMPARISON.values())
"""What a comparison of methods writes."""

_EVALUATION = {"results": "results.json", "values": "values.csv", "figure": "results.png"}
EVALUATION_FILES = tuple(_EVALUATION.values())
"""What an evaluation writes."""


def save_comparison(
    result: MethodComparison, folder: Path, *, force: bool, style: str
) -> dict[str, str]:
    """Writes a comparison of methods; see ``MethodComparison.save``."""
    names = _COMPARISON
    files = {what: str(folder / name) for what, name in names.items()}
    kind = Kind("comparison of methods", names["manifest"], names["maps"], (), SCHEMA)
    with published(folder, list(names.values()), kind, force=force) as draft:
        (draft / names["figure"]).write_bytes(png_of(result.figure(style)))
        arrays: dict[str, Any] = {
            f"maps_{place}": method.explanation.maps[0].cpu().numpy()
            for place, method in enumerate(result.methods)
        }
        np.savez_compressed(draft / names["maps"], views=result.first.views[0], **arrays)
        _write_json(draft / names["manifest"], result.to_json(files))
    return files


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
        _write_json(draft / names["results"], {**result.to_json(), "files": files})
        with (draft / names["values"]).open("w", encoding="utf-8", newline="") as opened:
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


def _write_json(path: Path, said: dict[str, Any]) -> None:
    text = json.dumps(said, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
