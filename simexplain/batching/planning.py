"""The plan of a batch: its options, its rows, and their order, which keeps shared pictures near."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from simexplain.arguments import typed
from simexplain.data.folders import StageProgress, opened_csv, without_index
from simexplain.data.images import opened_picture, read_picture
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ComparisonError, ImageError, ModelError
from simexplain.models.base import SimilarityModel

ACCELERATORS = ("auto", "cpu", "gpu", "mps")


@dataclass(frozen=True)
@typed
class BatchOptions:
    """How a batch is made, as far as it is not the method's business.

    Attributes:
        shard_rows: Rows that are written at a time; what an interruption costs at most.
        memory: Gigabytes of passes and pictures to keep between rows, in each process.
        batch_size: Pictures in one forward pass. None is 1 on a CPU, where more gain nothing, and
            16 elsewhere. What a picture gives depends on it by rounding alone.
        pictures: Draw a heatmap over every picture.
        figures: Draw a figure of every row.
        strict: Refuse to begin while any row is known not to work.
        devices: Processes on each host, each with a device; None is one, or as set by ``torchrun``.
        nodes: Hosts, which need to see one folder.
        accelerator: ``auto``, ``cpu``, ``gpu`` or ``mps``; None leaves the model where it is.

    Raises:
        ComparisonError: If a number or a name does not fit.
    """

    shard_rows: int = 64
    memory: float = 1.0
    batch_size: int | None = None
    pictures: bool = False
    figures: bool = False
    strict: bool = False
    devices: int | None = None
    nodes: int = 1
    accelerator: str | None = None

    def __post_init__(self) -> None:
        if self.shard_rows < 1 or not self.memory >= 0 or (self.batch_size or 1) < 1:
            raise ComparisonError(
                "Expected shard_rows and batch_size of at least 1 and memory of at least 0, got "
                f"{self.shard_rows}, {self.batch_size} and {self.memory}."
            )
        if self.accelerator not in (None, *ACCELERATORS):
            raise ComparisonError(
                f"Expected accelerator to be one of {', '.join(ACCELERATORS)}, got "
                f"'{self.accelerator}'."
            )


@contextmanager
def placed(model: SimilarityModel, accelerator: str | None, *, alone: bool) -> Iterator[str]:
    """Moves the model to the requested device, and back afterwards; yields the device's kind.

    Where there are several processes, lightning assigns the devices.
    """
    reference = next(model.parameters(), None)
    before = reference.device if reference is not None else torch.device("cpu")
    there = before.type
    if accelerator is not None:
        card = "cuda" if torch.cuda.is_available() else ""
        apple = "mps" if torch.backends.mps.is_available() else ""
        known = {"cpu": "cpu", "gpu": card or apple, "mps": apple, "auto": card or apple or "cpu"}
        there = known[accelerator]
        if not there:
            raise ModelError(
                f"Expected a device for accelerator {accelerator}, found none; say cpu or auto."
            )
    try:
        if alone and there != before.type:
            model.to(there)
        yield there
    finally:
        if reference is not None and reference.device != before:
            model.to(before)


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


RowSource = str | Path | Sequence[BatchRow | Mapping[str, Any]]


def read_rows(source: RowSource, root: str | Path | None = None) -> tuple[list[BatchRow], Path]:
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
    with opened_csv(source, ComparisonError) as opened:
        reader = csv.reader(opened, strict=True)
        header = [name.strip().lower() for name in next(reader, [])]
        _check_header(source, without_index(header))
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield _from_cells(header, cells, reader.line_num)


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


Stamp = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds of a file."""


@dataclass(frozen=True)
class BatchPlan:
    """What is to be done, the same in every process and after every interruption.

    Attributes:
        rows: All rows, in the order of the table.
        root: The folder that paths are relative to.
        order: The numbers of the rows to explain, those that share pictures near each other.
        pictures: The distinct picture files, in the order of their first use.
        images: For each row to explain the places of its pictures in ``pictures``.
        problems: For each row that cannot be explained the reason.
        stamps: Of the pictures.
        size: Rows in a shard.
    """

    rows: tuple[BatchRow, ...]
    root: Path
    order: tuple[int, ...]
    pictures: tuple[Path, ...]
    images: Mapping[int, tuple[int, ...]]
    problems: Mapping[int, str]
    stamps: tuple[Stamp, ...]
    size: int

    @property
    def shards(self) -> tuple[tuple[int, ...], ...]:
        """The rows of each shard; a shard is written atomically."""
        starts = range(0, len(self.order), self.size)
        return tuple(self.order[start : start + self.size] for start in starts)

    @property
    def digest(self) -> str:
        """The same for the same rows of the same pictures by name."""
        content = [(row.id, row.anchor, row.positives, row.negatives) for row in self.rows]
        return hashlib.sha256(json.dumps(content).encode("utf-8", "surrogatepass")).hexdigest()


def plan_rows(
    rows: Sequence[BatchRow],
    root: Path,
    preprocess: Preprocess,
    *,
    size: int,
    progress: StageProgress | None = None,
) -> BatchPlan:
    """Finds the distinct pictures, reads the header of each, and orders the rows.

    The same file under several names is one picture. A look reads the head of a file only: that it
    is cut off is checked when it is read. ``size`` is that of a shard.
    """
    real = _real_files(rows, root)
    looked: dict[Path, str] = {}
    names: dict[Path, Path] = {}
    for written, path in real.items():
        names.setdefault(path, root / written)
    files = list(names)
    for number, path in enumerate(files, start=1):
        looked[path] = problem_of(names[path], preprocess)
        if progress is not None:
            progress("Checking pictures", number, len(files))
    problems, good = {}, {}
    for number, row in enumerate(rows):
        own = [] if row.problem else [real[path] for path in row.paths]
        reasons = [row.problem, *(looked[path] for path in own)]
        if reason := next(filter(None, reasons), ""):
            problems[number] = reason
        else:
            good[number] = own
    order = nearest_first(good)
    places: dict[Path, int] = {}
    pictures: list[Path] = []
    for number in order:
        for path, written in zip(good[number], rows[number].paths, strict=True):
            if places.setdefault(path, len(places)) == len(pictures):
                pictures.append(root / written)
    return BatchPlan(
        rows=tuple(rows),
        root=root,
        order=tuple(order),
        pictures=tuple(pictures),
        images={number: tuple(places[path] for path in good[number]) for number in order},
        problems=problems,
        stamps=tuple(map(stamp_of, places)),
        size=size,
    )


def _real_files(rows: Sequence[BatchRow], root: Path) -> dict[str, Path]:
    """The file that each written path leads to, links and spellings resolved."""
    written = dict.fromkeys(path for row in rows if not row.problem for path in row.paths)
    return {path: _real(root / path) for path in written}


def _real(path: Path) -> Path:
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError):  # a null byte in a name, for instance
        return path


def stamp_of(path: Path) -> Stamp:
    """Size and time of the last change; zeros for a file that is not there."""
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return (0, 0)
    return (stat.st_size, stat.st_mtime_ns)


def problem_of(path: Path, preprocess: Preprocess) -> str:
    """Why a picture cannot be used, judged by the header of its file; empty if it can."""
    try:
        with opened_picture(path) as opened:
            width, height = opened.size
    except Exception:  # Pillow raises many kinds; reading it gives the sentence for the user
        try:
            image = read_picture(path).image
        except ImageError as error:
            return str(error)
        except (OSError, ValueError) as error:
            return f"'{path}' cannot be read ({error}); check the path."
        width, height = image.size
    try:
        preprocess.geometry((height, width))
    except ImageError as error:
        return f"'{path}': {error}"
    return ""


def nearest_first(rows: Mapping[int, Sequence[Path]]) -> list[int]:
    """The numbers of rows in an order in which rows that share pictures are near each other.

    Breadth first from the first row, as Cuthill and McKee (1969) order the rows of sparse matrices:
    after a row come all that share its anchor, then those that share its next picture, and so on.
    """
    users: dict[Path, list[int]] = {}
    for number, paths in rows.items():
        for path in dict.fromkeys(paths):
            users.setdefault(path, []).append(number)
    seen: set[int] = set()
    ordered = []
    for start in rows:
        waiting = deque([start] if start not in seen else [])
        seen.add(start)
        while waiting:
            number = waiting.popleft()
            ordered.append(number)
            for path in rows[number]:
                # A picture leads to its rows once: its list is empty afterwards.
                fresh = [other for other in users.pop(path, ()) if other not in seen]
                seen.update(fresh)
                waiting.extend(fresh)
    return ordered
