"""The one store of what benchmarks measured, and what all of them share in writing pages.

``benchmarks/records`` has a JSON file for each page of the documentation; ``pages.py`` writes them
from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "records"
Record = dict[str, np.ndarray]


def load(name: str, file: Path | None = None) -> Any:
    """What was measured, by the name of its record; an empty mapping where nothing was."""
    file = file or RECORDS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def keep(name: str, record: Any, file: Path | None = None) -> None:
    """Keeps what was measured, atomically."""
    file = file or RECORDS / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".part")
    draft.write_text(json.dumps(record, separators=(",", ":")) + "\n", encoding="utf-8")
    draft.replace(file)


def publish(text: str, out: Path | None, *, numbers: bool = True) -> None:
    """Writes a page to a file; prints it where no file is named.

    Args:
        text: The page.
        out: The file.
        numbers: Keep the numbers of a page of the documentation, which has no finer record.
    """
    if out is None:
        print(text)
        return
    if numbers and out.resolve().is_relative_to(ROOT / "docs"):
        keep(out.stem, record_of(text))
        text = page_of(record_of(text))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")


def record_of(page: str) -> list[Any]:
    """A page as its lines of text, and its tables as lists of rows of cells."""
    result: list[Any] = []
    for text in page.split("\n"):
        if not re.fullmatch(r"\|.*\|", text):
            result.append(text)
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", text)[1:-1]]
        if not result or isinstance(result[-1], str):
            result.append([])
        result[-1].append(cells)
    return result


def page_of(record: Sequence[Any]) -> str:
    """The counterpart of :func:`record_of`."""
    parts = [[one] if isinstance(one, str) else [line(cells) for cells in one] for one in record]
    return "\n".join(text.replace("|  |", "| |") for part in parts for text in part)


@dataclass(frozen=True)
class Store:
    """Records on disk, one file for each network, data, seed and row; none without a folder.

    A record counts only if it was made as it would be made now: same row, same numbers of scenes.
    """

    folder: Path | None

    def read(self, index: Sequence[object], made: str) -> Record | None:
        """The record, if there is one."""
        if self.folder is None or not self._path(index).is_file():
            return None
        with np.load(self._path(index)) as file:
            result = {name: file[name] for name in file.files}
        return result if str(result.pop("made")) == made else None

    def write(self, index: Sequence[object], made: str, record: Mapping[str, object]) -> None:
        """Keeps a record, whole or not at all."""
        if self.folder is None:
            return
        path = self._path(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".part.npz")
        np.savez(draft, made=made, **record)
        draft.replace(path)

    def _path(self, index: Sequence[object]) -> Path:
        assert self.folder is not None
        parts = [re.sub(r"[^A-Za-z0-9]+", "_", str(part)) for part in index]
        return self.folder.joinpath(*parts[:-1], f"{parts[-1]}.npz")


def added_memory(run: Callable[[], object]) -> float | None:
    """MiB that one call adds to the resident set of this process; None if not told."""
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of what came before
        before = _kibibytes(status.read_text(), "VmRSS")
        run()
        return (_kibibytes(status.read_text(), "VmHWM") - before) / 1024
    except OSError:
        return None


def _kibibytes(status: str, field: str) -> int:
    result = re.search(rf"{field}:\s+(\d+)", status)
    if not result:
        raise OSError(f"{field} is not in the status of the process.")
    return int(result[1])


def header(cells: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [line(cells), line(["---"] * len(cells))]


def line(cells: Sequence[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def told(values: np.ndarray) -> list[str]:
    """Means with their standard errors, column by column."""
    cells = []
    for column in values.T:
        valid = column[~np.isnan(column)]
        if not len(valid):
            cells.append("–")
            continue
        error = valid.std() / len(valid) ** 0.5
        cells.append(f"{valid.mean():.2f} ± {error:.2f}")
    return cells
