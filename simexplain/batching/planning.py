"""The plan of a batch: its distinct pictures, and rows in an order that keeps shared ones near."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from simexplain.batching.rows import BatchRow
from simexplain.data.images import opened_picture, read_picture
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ImageError

Progress = Callable[[str, int, int], None]
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

    def path(self, written: str) -> Path:
        """Where a picture of a row is."""
        return self.root / written


def plan_rows(
    rows: Sequence[BatchRow],
    root: Path,
    preprocess: Preprocess,
    *,
    size: int,
    progress: Progress | None = None,
) -> BatchPlan:
    """Finds the distinct pictures, reads the header of each, and orders the rows.

    The same file under several names is one picture. A look reads the head of a file only: that it
    is cut off is checked when it is read.

    Args:
        rows: All rows, also those with problems.
        root: The folder that paths are relative to.
        preprocess: Of the model.
        size: Rows in a shard.
        progress: Called with what is done, how far it is, and how far it goes.
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
