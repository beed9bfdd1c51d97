"""The rows of a batch: which pictures are compared in each, from a CSV file or from Python."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simexplain.data.folders import without_index
from simexplain.errors import ComparisonError, missing

COLUMNS = ("anchor", "positives", "negatives", "id")
"""Of a CSV file; ``positive``, ``positive2``, ... and ``negative``, ... hold one path each."""

_NUMBERED = re.compile(r"(positive|negative)(\d*)")
_MASKS = ("anchor_mask", "positive_masks", "negative_masks")
"""Columns of ``simexplain evaluate faithfulness``, whose files can be explained as they are."""


@dataclass(frozen=True)
class BatchRow:
    """One comparison of a batch.

    Attributes:
        anchor: A picture file.
        positives: Picture files that are meant to be close to it.
        negatives: Picture files that are meant to be far from it.
        id: What to call the row; its number, counted from 0, unless given.
        line: Where it stands in its CSV file; 0 for rows from elsewhere.
        problem: Why it cannot be explained; empty where nothing is known against it.
    """

    anchor: str
    positives: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()
    id: str = ""
    line: int = 0
    problem: str = ""

    @property
    def paths(self) -> tuple[str, ...]:
        """Anchor, positives, negatives, as they were written."""
        return (self.anchor, *self.positives, *self.negatives)


Rows = str | Path | Sequence[BatchRow | Mapping[str, Any]]


def read_rows(source: Rows, root: str | Path | None = None) -> tuple[list[BatchRow], Path]:
    """The rows of a batch and the folder that their paths are relative to.

    Args:
        source: A CSV file in UTF-8 with a header, see :data:`COLUMNS`; or rows, or mappings with
            the keys ``anchor``, ``positives``, ``negatives`` and ``id``.
        root: What relative paths are relative to; the folder of the CSV file or the present one
            unless given.

    Returns:
        All rows in their order, those that cannot be explained with their ``problem``; and the
        folder, absolute.

    Raises:
        ComparisonError: If the file has no row, or it or its header cannot be used.
    """
    if isinstance(source, (str, Path)):
        rows = list(_from_csv(Path(source)))
        base = Path(root) if root is not None else Path(source).parent
        where = f"'{source}'"
    else:
        rows = [_from_python(row) for row in source]
        base, where = Path(root or "."), "the batch"
    if not rows:
        raise ComparisonError(f"Expected at least one row in {where}, found none.")
    return _named(rows), base.absolute()


def _named(rows: Iterable[BatchRow]) -> list[BatchRow]:
    """Rows with an id each; a repeated id is a problem of all rows but the first that has it."""
    seen: Counter[str] = Counter()
    named = []
    for number, row in enumerate(rows):
        own = row.id or str(number)
        twice = f"The id '{own}' is that of an earlier row; give each its own."
        named.append(replace(row, id=own, problem=row.problem or (twice if seen[own] else "")))
        seen[own] += 1
    return named


def _from_python(row: BatchRow | Mapping[str, Any]) -> BatchRow:
    if isinstance(row, Mapping):
        unknown = [key for key in row if key not in COLUMNS]
        if unknown:
            raise ComparisonError(
                f"Expected rows with the keys {', '.join(COLUMNS)}, got '{unknown[0]}'."
            )
        several = {key: row.get(key) or () for key in ("positives", "negatives")}
        texts = {
            key: (str(cell),) if isinstance(cell, (str, Path)) else tuple(map(str, cell))
            for key, cell in several.items()
        }
        own = row.get("id")
        row = BatchRow(
            str(row.get("anchor") or ""),
            texts["positives"],
            texts["negatives"],
            "" if own is None else str(own),
        )
    if not isinstance(row, BatchRow):
        raise ComparisonError(
            f"Expected rows as BatchRow or mappings with {', '.join(COLUMNS)}, got "
            f"{type(row).__name__}."
        )
    return replace(row, problem=row.problem or _problem(row))


def _from_csv(source: Path) -> Iterable[BatchRow]:
    try:
        with source.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.reader(opened, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            _check_header(source, without_index(header))
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    yield _from_cells(header, cells, reader.line_num)
    except OSError as error:
        reason = f"'{source}' cannot be read ({error.strerror or error})."
        raise ComparisonError(missing(source, reason)) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ComparisonError(
            f"'{source}' is not a CSV file in UTF-8 ({error}); save it as one."
        ) from error


def _check_header(source: Path, header: list[str]) -> None:
    near = "positives" in header or "positive" in header
    far = "negatives" in header or "negative" in header
    unknown = [
        name for name in header if name not in COLUMNS + _MASKS and not _NUMBERED.fullmatch(name)
    ]
    what = ""
    if len(header) == 1 and ";" in header[0]:
        what = "semicolons between columns; save it with commas"
    elif unknown:
        what = f"'{unknown[0]}'"
    elif "anchor" not in header or not (near or far):
        what = f"no '{'positives' if 'anchor' in header else 'anchor'}'"
    elif len(set(header)) != len(header):
        what = f"'{next(n for n, count in Counter(header).items() if count > 1)}' twice"
    if what:
        raise ComparisonError(
            "Expected the columns anchor, positives and negatives (or positive, positive2, ... and "
            f"negative, negative2, ...) and perhaps id in the header of '{source}', got {what}."
        )


def _from_cells(header: list[str], cells: list[str], line: int) -> BatchRow:
    named = dict(zip(header, cells, strict=False))
    row = BatchRow(
        named.get("anchor", "").strip(),
        _several(named, "positive"),
        _several(named, "negative"),
        named.get("id", "").strip(),
        line,
    )
    problem = _problem(row)
    if len(cells) > len(header):
        problem = (
            f"Expected {len(header)} cells as in the header, got {len(cells)}; put names that have "
            "commas in double quotes."
        )
    return replace(row, problem=problem)


def _several(named: Mapping[str, str], role: str) -> tuple[str, ...]:
    """The paths of one role: of the cell that may hold several, then of the numbered columns."""
    paths = [part.strip() for part in named.get(f"{role}s", "").split(";")]
    numbered = [name for name in named if re.fullmatch(rf"{role}\d*", name)]
    paths += [named[name].strip() for name in sorted(numbered, key=_number)]
    return tuple(path for path in paths if path)


def _number(name: str) -> int:
    digits = name.lstrip("abcdefghijklmnopqrstuvwxyz")
    return int(digits) if digits else 1


def _problem(row: BatchRow) -> str:
    if not row.anchor:
        return "Expected an anchor, got none."
    if not row.positives + row.negatives:
        return "Expected a positive or a negative beside the anchor, got neither."
    if not all(row.paths):
        return "Expected a path for every picture, got an empty one."
    return ""
