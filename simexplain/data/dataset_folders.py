"""Data sets that lie as folders of classes, or as a table in a CSV file."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from simexplain.data.dataset_split import (
    ALPHA,
    DataSplit,
    Reading,
    few,
    grouped,
    masked,
    relative,
    zero_shot,
)
from simexplain.data.folders import Record, pictures_in, without_index
from simexplain.data.images import is_picture
from simexplain.errors import ImageError

COLUMNS = ("path", "label", "split", "group", "mask")
"""Of a CSV file; the first two must be there."""

SPLITS = ("train", "test", "query", "gallery")
"""Values of the column ``split``."""

HELD_OUT = ("test", "val", "valid", "validation")
"""Folders beside ``train`` that are searched among themselves; the first that is there counts."""


def read_folder(root: Path, reading: Reading) -> DataSplit:
    """Class folders, or ``train``, ``test`` (or ``query``, ``gallery``) with class folders each.

    Without ``test``, ``val`` takes its place; with both, ``val`` is left for the user's own use.

    Raises:
        ImageError: If it has no picture, or none in a class folder.
    """
    parts = [name for name in ("train", *HELD_OUT, "query", "gallery") if _has_classes(root / name)]
    searched = [name for name in HELD_OUT if name in parts][:1]
    if {"query", "gallery"} <= set(parts):
        searched = ["query", "gallery"]
    if not searched or (len(searched) == 1 and "train" not in parts):
        records, loose, empty = _labelled(root, root, reading)
        train, queries = zero_shot(records, reading.train_share)
        name = root.resolve().name
        split = DataSplit(train, queries, None, name, root, loose, empty, has_split=False)
        return masked(grouped(split, reading), reading)
    wanted = [name for name in ("train", *searched) if name in parts]
    labelled = {name: _labelled(root / name, root, reading) for name in wanted}
    split = DataSplit(
        train=labelled["train"][0] if "train" in labelled else (),
        queries=labelled[searched[0]][0],
        gallery=labelled["gallery"][0] if "gallery" in labelled else None,
        name=root.resolve().name,
        root=root,
        problems=tuple(problem for part in labelled.values() for problem in part[1]),
        empty=tuple(name for part in labelled.values() for name in part[2]),
    )
    return masked(grouped(split, reading), reading)


def _has_classes(folder: Path) -> bool:
    """Whether a folder has folders of pictures, so that it is a part and not a class.

    Pictures beside these belong to no class, which is reported when they are read.
    """
    try:
        inside = [child for child in folder.iterdir() if not child.name.startswith(".")]
        return any(_has_pictures(child) for child in inside if child.is_dir())
    except OSError:
        return False


def _has_pictures(folder: Path) -> bool:
    return any(is_picture(path) for path in folder.rglob("*") if path.is_file())


def _labelled(
    folder: Path, root: Path, reading: Reading
) -> tuple[tuple[Record, ...], tuple[str, ...], tuple[str, ...]]:
    """Pictures with their classes, what is wrong, and class folders without a picture."""
    # Masks may lie beside the class folders; they are not a class.
    masks = None if reading.masks in (None, ALPHA) else Path(str(reading.masks)).resolve()
    inside = [record.path.relative_to(folder) for record in pictures_in(folder, labelled=False)]
    if masks is not None:
        inside = [path for path in inside if not (folder / path).resolve().is_relative_to(masks)]
    records = tuple(Record(folder / path, path.parts[0]) for path in inside if len(path.parts) > 1)
    if not records:
        raise ImageError(
            f"Expected sub-folders in '{folder}', each a class of pictures, but all pictures lie "
            "directly in it."
        )
    loose = [relative(folder / path, root) for path in inside if len(path.parts) == 1]
    classes = {record.label for record in records}
    empty = [
        relative(child, root)
        for child in sorted(folder.iterdir())
        if child.is_dir() and child.name not in classes and child.resolve() != masks
        if not child.name.startswith(".")
    ]
    problem = (f"no class for {few(loose)}, which lie beside the class folders",) if loose else ()
    return records, problem, tuple(empty)


@dataclass(frozen=True)
class _Row:
    record: Record
    part: str
    line: int


def read_csv(path: Path, reading: Reading) -> DataSplit:
    """A table with the columns ``path``, ``label`` and, if wanted, the others of ``COLUMNS``.

    Raises:
        ImageError: If the file is none, has no such header or no row at all.
    """
    header, lines = _lines(path)
    problems: list[str] = []
    unknown = [name for name in without_index(header) if name not in COLUMNS]
    if unknown:
        problems.append(f"unknown columns {few(unknown)} (known: {', '.join(COLUMNS)})")
    wrong: dict[str, list[int]] = defaultdict(list)
    rows = [
        row for number, line in lines if (row := _row(path.parent, number, line, wrong)) is not None
    ]  # fmt: skip
    problems += [f"{what} in line{'s' * (len(n) > 1)} {_numbers(n)}" for what, n in wrong.items()]
    problems += _mismatches(rows, path.parent)
    split = _parted(path, rows, "split" in header, reading)
    split = grouped(replace(split, problems=tuple(problems)), reading)
    return masked(split, reading)


def _lines(path: Path) -> tuple[list[str], list[tuple[int, Mapping[str | None, object]]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened, strict=True)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            lines = [(reader.line_num, dict(line)) for line in reader]
    except OSError as error:
        raise ImageError(f"'{path}' cannot be read ({error.strerror or error}).") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ImageError(
            f"'{path}' is not a CSV file in UTF-8 ({error}); save it as one."
        ) from error
    if not {"path", "label"} <= set(header) or len(set(header)) < len(header):
        raise ImageError(
            f"Expected '{path}' to begin with a header of the columns path, label and, if wanted, "
            f"{', '.join(COLUMNS[2:])}, each once, got {', '.join(header) or 'nothing'}; "
            f"{_remedy(header)}."
        )
    if not lines:
        raise ImageError(f"Expected at least one picture in '{path}', found none below its header.")
    return header, [(number, {**line}) for number, line in lines]


def _remedy(header: Sequence[str]) -> str:
    """What to do about a header that does not fit."""
    for sign, what in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and sign in header[0]:
            return f"its columns are parted by {what}, save it with commas"
    return "correct its first line"


def _row(
    folder: Path, number: int, line: Mapping[str | None, object], wrong: dict[str, list[int]]
) -> _Row | None:
    """One line; what is wrong with it is written down."""
    if None in line or None in line.values():
        wrong["another number of cells than columns"].append(number)
        return None
    cells = {str(name): str(value).strip() for name, value in line.items()}
    for name in ("path", "label"):
        if not cells[name]:
            wrong[f"no {name}"].append(number)
    part = cells.get("split", "train")
    if part not in SPLITS:
        wrong[f"a split other than {', '.join(SPLITS)}"].append(number)
    if not (cells["path"] and cells["label"] and part in SPLITS):
        return None
    picture, mask = folder / cells["path"], cells.get("mask", "")
    own = picture if mask == ALPHA else folder / mask if mask else None
    record = Record(picture, cells["label"], cells.get("group") or None, own)
    return _Row(record, part, number)


def _mismatches(rows: Sequence[_Row], folder: Path) -> list[str]:
    """Pictures named more than once in one part, or with several classes."""
    named: dict[Path, list[_Row]] = defaultdict(list)
    for row in rows:
        named[row.record.path.resolve()].append(row)  # links and spellings lead to one file
    twice = [
        relative(path, folder)
        for path, same in named.items()
        if len({row.part for row in same}) < len(same) or len({r.record.label for r in same}) > 1
    ]
    return [f"{len(twice)} listed repeatedly: {few(twice)}"] if twice else []


def _parted(path: Path, rows: Sequence[_Row], has_split: bool, reading: Reading) -> DataSplit:
    parts = {name: tuple(row.record for row in rows if row.part == name) for name in SPLITS}
    if not has_split:
        train, queries = zero_shot(parts["train"], reading.train_share)
        return DataSplit(train, queries, None, path.stem, path.parent, has_split=False)
    gallery = parts["gallery"] or None
    if gallery and parts["test"]:
        raise ImageError(
            f"Expected the column split of '{path}' to have test, or query and gallery, got both; "
            "call queries that are searched among themselves test."
        )
    queries = (*parts["test"], *parts["query"])
    return DataSplit(parts["train"], queries, gallery, path.stem, path.parent)


def _numbers(lines: Sequence[int]) -> str:
    shown = ", ".join(map(str, lines[:5]))
    return shown if len(lines) <= 5 else f"{shown} and {len(lines) - 5} more"
