"""What came of a batch: its table, and the maps and the explanation of any row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simexplain.arguments import typed
from simexplain.batching.folder import OK, RESULTS, BatchFolder, check_extra, is_maps_file
from simexplain.batching.planning import stamp_of
from simexplain.batching.shards import OF_ROWS, PICTURE, TENSORS
from simexplain.data.images import read_picture
from simexplain.data.preprocessing import Geometry, Preprocess, prepared
from simexplain.errors import DAMAGED, ComparisonError, OutputError, first_line
from simexplain.explanation import Explanation
from simexplain.results.codec import decoded
from simexplain.results.result import Kept

if TYPE_CHECKING:
    import pyarrow

_SHARED = ("versions", "scale", "region", "bypass", "layer_regions")
_SHOWN = 20
"""Warnings in the summary, the most common ones; all are in the table."""


@dataclass(frozen=True)
class WorkDone:
    """What a run did, which is less than the batch where it was resumed.

    Attributes:
        rows: Rows that this run explained or tried to.
        shared: Whether pictures were embedded once for all their rows.
        forwards: Pictures that went through the network for them, by all processes; None where
            they are not shared and the method decides.
        separate: As many as rows explained one by one send through.
        seconds: From the first row to the last.
    """

    rows: int
    shared: bool
    forwards: int | None
    separate: int
    seconds: float


@dataclass(frozen=True)
class BatchResult(Kept):
    """A batch on disk, whose table and maps are read on demand.

    Attributes:
        folder: Where it is.
        manifest: How it was made: settings, model, layers, versions.
        work: What the run that just ended did; None for a batch that was opened.
    """

    folder: Path
    manifest: Mapping[str, Any] = field(repr=False)
    work: WorkDone | None = None

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @cached_property
    def table(self) -> pyarrow.Table:
        """One row for each row of the CSV file, in its order; the columns are in the docs.

        Raises:
            OutputError: If it cannot be read.
        """
        from pyarrow import ArrowException, parquet

        try:
            return parquet.read_table(self.folder / RESULTS)
        except (OSError, ArrowException) as error:
            raise OutputError(
                f"'{self.folder / RESULTS}' cannot be read ({first_line(error)}); make the batch "
                "again."
            ) from error

    @property
    def failures(self) -> dict[str, str]:
        """The reason for each row that could not be explained, by its id."""
        columns = (self.table[name].to_pylist() for name in ("id", "status", "error"))
        return {own: error for own, status, error in zip(*columns, strict=True) if status != OK}

    def record(self, row: int | str) -> dict[str, Any]:
        """A row of the table.

        Args:
            row: Its number, counted from 0, or its id.

        Raises:
            ComparisonError: If the row does not exist.
        """
        number = row
        if isinstance(row, str):
            number = self._numbers.get(row, -1)
        if not isinstance(number, int) or not 0 <= number < len(self):
            raise ComparisonError(
                f"Expected the number of a row, 0 to {len(self) - 1}, or its id, got {row!r}."
            )
        entry: dict[str, Any] = self.table.slice(number, 1).to_pylist()[0]
        return entry

    @cached_property
    def _numbers(self) -> dict[str, int]:
        ids = self.table["id"].to_pylist()
        return {own: number for number, own in reversed(list(enumerate(ids)))}

    def maps(self, row: int | str) -> Tensor:
        """The raw maps of a row ``(K,h,w)``: anchor, positives, negatives.

        Raises:
            ComparisonError: If the row does not exist, or was not explained.
            OutputError: If the maps cannot be read.
        """
        return self._tensors(self._good(row), ("maps",))["maps"]

    def explanation(self, row: int | str) -> Explanation:
        """The explanation of a row as ``explain`` gives it; its pictures are read again.

        Raises:
            ComparisonError: If the row does not exist, or was not explained.
            OutputError: If a picture has changed since, or the maps cannot be read.
            ImageError: If a picture cannot be read.
        """
        record, manifest = self._good(row), self.manifest
        shapes = manifest.get("maps") or [manifest]  # which older versions did not write
        names = _stored_names(shapes)
        pictures = [f"{PICTURE}/{number}" for number in record["pictures"]]
        stored = self._tensors(record, (*TENSORS, *names), pictures)
        images, originals, geometries = self._views(record)
        arrays = {name: value[None].numpy() for name, value in stored.items()}
        arrays["embeddings"] = torch.stack([stored[name] for name in pictures])[None].numpy()
        arrays["images"] = images.numpy()
        kept = ("embeddings", "images", "distances", "moved", "unexplained")
        base = {
            **{key: manifest[key] for key in _SHARED if key in manifest},
            **{name: name if name in arrays else None for name in kept},
            "model": manifest["model"]["name"],
            "preprocess": manifest["model"]["preprocess"],
            "positives": len(record["positives"]),
            "warnings": list(record["warnings"]),
        }
        rows = [{**base, **_row(shapes[0], arrays, "")}]
        rows += [
            {
                **base,
                **_row(shape, arrays, f"row{number}_"),
                "warnings": list(row_record["warnings"]),
            }
            for number, (shape, row_record) in enumerate(
                zip(shapes[1:], record.get("others") or (), strict=True), start=2
            )
        ]
        batch = decoded(Explanation, {**rows[0], "others": rows[1:]}, arrays)
        return batch.placed(pictures=originals, geometries=geometries)

    def _views(self, record: Mapping[str, Any]) -> tuple[Tensor, tuple[Any, ...], tuple[Any, ...]]:
        """The pictures of a row as the network saw them, themselves, and where the views lie."""
        pictures = []
        for number in record["pictures"]:
            path, *stamp = self.manifest["pictures"][number]
            if list(stamp_of(Path(path))) != stamp:
                raise OutputError(
                    f"'{path}' is not what it was when the batch was made; restore it or make the "
                    "batch again."
                )
            pictures.append(read_picture(path))
        height, width = self.manifest["view"]
        manifest = {**self.manifest["model"]["preprocess"], "size": [height, width]}
        views, geometries = prepared(Preprocess.from_json(manifest), pictures)
        places: tuple[Geometry, ...] = tuple(geometries)
        return views[None], tuple(pictures), places

    def _good(self, row: int | str) -> dict[str, Any]:
        record = self.record(row)
        if record["status"] != OK:
            raise ComparisonError(
                f"Row {record['row']} ('{record['id']}') was not explained: {record['error']}"
            )
        return record

    def _tensors(
        self, record: Mapping[str, Any], names: tuple[str, ...], others: list[str] | None = None
    ) -> dict[str, Tensor]:
        """Those of some tensors of a row that there are, and others of its shard, by name."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / record["maps_file"]
        if not is_maps_file(record["maps_file"]):
            raise OutputError(
                f"Expected maps of the batch in '{self.folder}', but its table names "
                f"'{record['maps_file']}' for row {record['row']}; make the batch again."
            )
        try:
            with safe_open(path, framework="pt") as file:
                there = set(file.keys())
                keys = {name: f"{record['maps_key']}/{name}" for name in names}
                keys |= {name: name for name in others or []}
                return {name: file.get_tensor(k) for name, k in keys.items() if k in there}
        except (OSError, SafetensorError, *DAMAGED) as error:
            raise OutputError(
                f"'{path}' cannot be read ({first_line(error)}); make the batch again."
            ) from error

    @classmethod
    def load(cls, folder: str | Path) -> BatchResult:
        """The batch in a folder; see :func:`open_batch`."""
        return open_batch(folder)

    def summary(self, **options: Any) -> dict[str, Any]:
        """What became of its rows."""
        statuses = Counter(self.table["status"].to_pylist())
        warnings = Counter(
            warning for several in self.table["warnings"].to_pylist() for warning in several or ()
        )
        holds = [value for value in self.table["holds"].to_pylist() if value is not None]
        return {
            "rows": len(self),
            "explained": statuses[OK],
            "failed": len(self) - statuses[OK],
            "conditions": {"holds": sum(holds), "of": len(holds)},
            "model": self.manifest["model"]["name"],
            "method": self.manifest["method"],
            "layers": self.manifest["layers"],
            "bypass": self.manifest.get("bypass", {}),
            "pictures": len(self.manifest["pictures"]),
            "failures": self.failures,
            "warnings": dict(warnings.most_common(_SHOWN)),
            "work": self.work,
            "files": BatchFolder(self.folder).files(),
            "versions": self.manifest["versions"],
        }


def _stored_names(shapes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What shards may have of each row of maps beside the tensors of the first."""
    names = []
    for number, shape in enumerate(shapes, start=1):
        mark = f"row{number}_" if number > 1 else ""
        names += [f"{mark}{name}" for name in OF_ROWS if mark]
        names += [f"{mark}layer_{layer}" for layer in range(len(shape["layers"]))]
    return names


def _row(shape: Mapping[str, Any], stored: Container[str], mark: str) -> dict[str, Any]:
    """The fields of an explanation that differ from one row of maps to another, by their arrays."""
    layers = [f"{mark}layer_{number}" for number in range(len(shape["layers"]))]
    return {
        **{name: f"{mark}{name}" for name in OF_ROWS},
        "layer_maps": {
            layer: own if own in stored else f"{mark}maps"
            for layer, own in zip(shape["layers"], layers, strict=True)
        },
        **{name: shape[name] for name in ("method", "layers", "options")},
    }


@typed
def open_batch(folder: str | Path) -> BatchResult:
    """Opens what :func:`~simexplain.batching.batching.explain_batch` wrote.

    Raises:
        OutputError: If the folder has no batch, a damaged one, or one that is not finished.
        ModelError: If pyarrow is not installed.
    """
    check_extra()
    batch = BatchFolder(Path(folder))
    manifest = batch.read_manifest()
    if not batch.complete:
        raise OutputError(f"The batch in '{folder}' is not done; go on with it (--resume).")
    return BatchResult(Path(folder), manifest)
