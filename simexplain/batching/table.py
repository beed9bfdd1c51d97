"""The table of a batch: one row for each comparison, as Parquet."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from simexplain.batching.rows import BatchRow
from simexplain.comparison import architecture
from simexplain.errors import ModelError
from simexplain.explanation import Explanation

if TYPE_CHECKING:
    import pyarrow

OK, FAILED = "ok", "failed"
Record = dict[str, Any]


def check_extra() -> None:
    """Says what to install where tables cannot be written.

    Raises:
        ModelError: If so.
    """
    if find_spec("pyarrow") is None:
        raise ModelError(
            "Expected pyarrow for tables of results, which is not installed; run "
            "pip install 'simexplain[search]'."
        )


def schema() -> pyarrow.Schema:
    """The columns; see ``docs/batch.md``."""
    import pyarrow as pa

    several = pa.list_(pa.float64())
    texts = pa.list_(pa.string())
    point = pa.struct([("x", pa.float64()), ("y", pa.float64())])
    other = pa.struct(
        [
            ("method", pa.string()),
            ("peaks", pa.list_(point)),
            ("scores", several),
            ("overlaps", several),
            ("warnings", texts),
        ]
    )
    return pa.schema(
        [
            ("row", pa.int64()),
            ("id", pa.string()),
            ("line", pa.int64()),
            ("status", pa.string()),
            ("error", pa.string()),
            ("architecture", pa.string()),
            ("anchor", pa.string()),
            ("positives", texts),
            ("negatives", texts),
            ("distances", several),
            ("condition", pa.string()),
            ("holds", pa.bool_()),
            ("margin", pa.float64()),
            ("peaks", pa.list_(point)),
            ("scores", several),
            ("others", pa.list_(other)),
            ("moved", several),
            ("unexplained", several),
            ("warnings", texts),
            ("pictures", pa.list_(pa.int64())),
            ("maps_file", pa.string()),
            ("maps_key", pa.string()),
        ]
    )


def named(number: int, row: BatchRow) -> Record:
    """What is known of a row before it is explained; all else is null."""
    shape = (len(row.positives), len(row.negatives))
    return {
        "row": number,
        "id": row.id,
        "line": row.line or None,
        "architecture": architecture(*shape) if any(shape) else None,
        "anchor": row.anchor,
        "positives": list(row.positives),
        "negatives": list(row.negatives),
    }


def explained(
    number: int,
    row: BatchRow,
    pictures: Sequence[int],
    explanation: Explanation,
    maps: tuple[str, str],
) -> Record:
    """A row that was explained.

    Args:
        number: Of the row.
        row: The row.
        pictures: The numbers of its pictures in the batch.
        explanation: Its explanation.
        maps: The file of its maps, and its key in there.
    """
    condition = explanation.condition()
    return {
        **named(number, row),
        "status": OK,
        "distances": explanation.distances[0].tolist(),
        "condition": condition.text,
        "holds": condition.holds,
        "margin": condition.margin,
        "peaks": _points(explanation),
        "scores": explanation.scores[0].tolist(),
        "others": [
            {
                "method": other.method,
                "peaks": _points(other),
                "scores": other.scores[0].tolist(),
                "overlaps": list(agreement.overlaps),
                "warnings": list(other.warnings),
            }
            for other, agreement in zip(explanation.others, explanation.agreement(), strict=True)
        ],
        "moved": None if explanation.moved is None else explanation.moved[0].tolist(),
        "unexplained": None
        if explanation.unexplained is None
        else explanation.unexplained[0].tolist(),
        "warnings": list(explanation.warnings),
        "pictures": list(pictures),
        "maps_file": maps[0],
        "maps_key": maps[1],
    }


def _points(row: Explanation) -> list[dict[str, float] | None]:
    return [peak and {"x": peak[0], "y": peak[1]} for peak in row.peaks()]


def failed(number: int, row: BatchRow, error: str) -> Record:
    """A row that could not be explained."""
    return {**named(number, row), "status": FAILED, "error": error}


def table_of(records: Sequence[Mapping[str, Any]]) -> pyarrow.Table:
    """Records as a table; what a record lacks is null."""
    import pyarrow as pa

    return pa.Table.from_pylist([_spelled(record) for record in records], schema=schema())


def parquet_of(table: pyarrow.Table) -> bytes:
    """A table as the content of a Parquet file, the same for the same table."""
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _spelled(value: Any) -> Any:
    """Names of files that are not UTF-8 get escapes in place of their odd bytes."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {key: _spelled(own) for key, own in value.items()}
    return [_spelled(own) for own in value] if isinstance(value, list) else value
