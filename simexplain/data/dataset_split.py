"""What reading a data set gives: pictures to train on, pictures to search with and in."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from simexplain.data.folders import Record
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

        def group(path: str) -> str | None:
            match = rule.search(path)
            return match.group(1) if match else None

        return group


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

    def tell(records: Iterable[Record]) -> tuple[Record, ...]:
        return tuple(
            replace(r, group=rule(relative(r.path, split.root)) or r.group) for r in records
        )

    changed = _each(split, tell)
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
    stems = {} if reading.masks == ALPHA else _by_stem(folder)

    def find(record: Record) -> Path | None:
        if record.mask is not None:
            return record.mask
        if reading.masks == ALPHA:
            return record.path
        return stems.get(
            PurePosixPath(relative(record.path, split.root)).with_suffix("").as_posix()
        )

    def tell(records: Iterable[Record]) -> tuple[Record, ...]:
        return tuple(replace(record, mask=find(record)) for record in records)

    changed = _each(split, tell)
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


def _by_stem(folder: Path) -> dict[str, Path]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and is_picture(path)]
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def _each(split: DataSplit, change: Callable[[Iterable[Record]], tuple[Record, ...]]) -> DataSplit:
    gallery = None if split.gallery is None else change(split.gallery)
    return replace(split, train=change(split.train), queries=change(split.queries), gallery=gallery)
