"""What a data set is split into, and how folders of classes and CSV tables are read."""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from simexplain.data.folders import Record, opened_csv, pictures_in, without_index
from simexplain.data.images import is_picture
from simexplain.errors import ImageError

ALPHA = "alpha"
"""In place of a folder of masks: each picture's own alpha channel."""

_FEW = 3


@dataclass(frozen=True)
class DataSplit:
    """A data set, taken apart for training and for the retrieval that judges it.

    Attributes:
        train: Pictures to train on.
        queries: Pictures to search with.
        gallery: Pictures to search in; None if the queries are searched among themselves.
        name: What to call it.
        root: The folder that paths are reported relative to.
        problems: What does not fit in the files that describe it, for ``check_training``.
        empty: Class folders without a picture.
        has_split: Whether the data set defines its own split into training and test; else the share
            of the classes decides.
        junk: Pictures of the gallery that count neither for nor against a query: bad boxes of
            persons in Market-1501. They are in no other part.
    """

    train: tuple[Record, ...]
    queries: tuple[Record, ...]
    gallery: tuple[Record, ...] | None = None
    name: str = "data set"
    root: Path = Path()
    problems: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    has_split: bool = True
    junk: tuple[Record, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes to train on, sorted: a class's place is its number in training."""
        return tuple(sorted({record.label for record in self.train if record.label is not None}))


@dataclass(frozen=True)
class Reading:
    """How a data set is read, where that is left open.

    Attributes:
        train_share: Of the sorted classes, the first of which train, in (0, 1).
        group: None; ``name`` for the file name without its ending; or a regular expression with
            one group, searched in the path relative to the data set, with ``/``.
        masks: None; a folder with a picture of the same relative path for each that has a mask,
            whatever its ending; or ``alpha``.

    Raises:
        ImageError: If a value is not possible.
    """

    train_share: float = 0.5
    group: str | None = None
    masks: str | Path | None = None

    def __post_init__(self) -> None:
        if not 0 < self.train_share < 1:
            raise ImageError(
                f"Expected train_share, the share of classes to train on, between 0 and 1, got "
                f"{self.train_share}."
            )
        self.grouping()
        if self.masks not in (None, ALPHA) and not Path(str(self.masks)).is_dir():
            raise ImageError(
                f"Expected masks to be a folder or '{ALPHA}', but '{self.masks}' is not a folder."
            )

    def grouping(self) -> Callable[[str], str | None]:
        """The group of a relative path; None where the rule does not match."""
        if self.group is None:
            return lambda _: None
        if self.group == "name":
            return lambda path: PurePosixPath(path).stem
        try:
            rule = re.compile(self.group)
        except re.error as error:
            raise ImageError(
                f"'{self.group}' is not a regular expression ({error}); correct the rule of groups."
            ) from error
        if rule.groups != 1:
            raise ImageError(
                f"Expected the rule of groups to be 'name' or a regular expression with one group "
                f"in parentheses, got '{self.group}' with {rule.groups}."
            )

        return lambda path: match.group(1) if (match := rule.search(path)) else None


def zero_shot(
    records: Sequence[Record], share: float
) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Training and test pictures without a common class: the first classes by name train.

    Both parts get at least one class, if there are two.
    """
    classes = sorted({record.label for record in records if record.label is not None})
    # 0.29 * 100 is a little less than 29.
    count = min(max(math.floor(share * len(classes) + 1e-9), 1), max(len(classes) - 1, 1))
    first = set(classes[:count])
    train = tuple(record for record in records if record.label in first)
    return train, tuple(record for record in records if record.label not in first)


def grouped(split: DataSplit, reading: Reading) -> DataSplit:
    """With the group of each picture by the rule, if there is one."""
    if reading.group is None:
        return split
    rule = reading.grouping()

    changed = _each(
        split, lambda r: replace(r, group=rule(relative(r.path, split.root)) or r.group)
    )
    without = [relative(r.path, split.root) for r in everything(changed) if r.group is None]
    if not without:
        return changed
    problem = f"the rule of groups '{reading.group}' does not match {few(without)}"
    return replace(changed, problems=(*split.problems, problem))


def masked(split: DataSplit, reading: Reading) -> DataSplit:
    """With the mask of each picture that has one."""
    if reading.masks is None:
        return split
    folder = Path(reading.masks)
    files = [] if reading.masks == ALPHA else sorted(folder.rglob("*"))
    stems = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in files
        if path.is_file() and is_picture(path)
    }

    def find(record: Record) -> Path | None:
        if record.mask is not None:
            return record.mask
        if reading.masks == ALPHA:
            return record.path
        place = PurePosixPath(relative(record.path, split.root))
        return stems.get(place.with_suffix("").as_posix())

    changed = _each(split, lambda record: replace(record, mask=find(record)))
    if any(record.mask for record in everything(changed)):
        return changed
    problem = f"no picture has a mask of the same relative path in '{folder}'"
    return replace(changed, problems=(*split.problems, problem))


def everything(split: DataSplit) -> tuple[Record, ...]:
    """All pictures: training, queries, gallery."""
    return (*split.train, *split.queries, *(split.gallery or ()))


def relative(path: Path, root: Path) -> str:
    """A path below a folder, with ``/``; whole where it lies elsewhere."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def few(names: Sequence[object], quote: str = "'") -> str:
    """The first few of many names, and how many more there are."""
    more = len(names) - _FEW
    # "and 1 more" is not shorter than the name itself.
    shown = names if more <= 1 else names[:_FEW]
    text = ", ".join(f"{quote}{name}{quote}" for name in shown)
    return text if more <= 1 else f"{text} and {more} more"


def _each(split: DataSplit, change: Callable[[Record], Record]) -> DataSplit:
    """With every picture but junk changed."""
    parts = {"train": split.train, "queries": split.queries, "gallery": split.gallery}
    changed: dict[str, Any] = {
        name: tuple(map(change, part)) for name, part in parts.items() if part is not None
    }
    return replace(split, **changed)


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
        files = (path for child in inside if child.is_dir() for path in child.rglob("*"))
        return any(is_picture(path) for path in files if path.is_file())
    except OSError:
        return False


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
    with opened_csv(path, ImageError) as opened:
        reader = csv.DictReader(opened, strict=True)
        header = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = header
        lines = [(reader.line_num, dict(line)) for line in reader]
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
