"""Data sets by kind, in the folders that their authors publish: to train on, and to search in."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simexplain.arguments import typed
from simexplain.data.dataset_split import (
    DataSplit,
    Reading,
    few,
    masked,
    read_csv,
    read_folder,
    relative,
)
from simexplain.data.dataset_split import everything as everything
from simexplain.data.folders import Record, pictures_in
from simexplain.errors import ImageError, first_line, meant, missing

CUB_FOLDER = "CUB_200_2011"
SOP_FOLDER = "Stanford_Online_Products"

MARKET_FOLDER = "Market-1501-v15.09.15"

# 0002_c1s1_000451_03.jpg of Market-1501, 0001_c1_1.png of CUHK03-NP.
_PERSON = re.compile(r"^(?P<person>-1|\d+)_c(?P<camera>\d+)(?=[s_.])")
JUNK = "-1"
"""The label of bad detections in Market-1501."""


def is_distractor(label: str | None) -> bool:
    """Whether a person is none of those that are known, ``0000`` in Market-1501."""
    return label is not None and label.isdigit() and int(label) == 0


def read_cub(root: Path, reading: Reading) -> DataSplit:
    """CUB-200-2011: the first 100 species train, the others are searched among themselves.

    Raises:
        ImageError: If pytorch-metric-learning is missing or the folder lies otherwise.
    """
    outer = root.parent if root.name == CUB_FOLDER else root
    train, test = _published("CUB", outer, f"{CUB_FOLDER}/images.txt")
    split = _by_folders(train, test, "CUB-200-2011", outer / CUB_FOLDER / "images")
    lines = (outer / CUB_FOLDER / "images.txt").read_text(encoding="utf-8").split("\n")
    listed, count = sum(bool(line.strip()) for line in lines), len(train) + len(test)
    if count != listed:  # pytorch-metric-learning leaves lines out that differ between the lists
        problem = f"images.txt lists {listed} pictures, but only {count} of them have a class"
        split = replace(split, problems=(*split.problems, problem))
    return masked(split, reading)


def read_cars(root: Path, reading: Reading) -> DataSplit:
    """Cars196: the first 98 models train, the others are searched among themselves.

    The reader of pytorch-metric-learning supports the layout with class folders
    (``anno_train.csv``, ``names.csv``, ``car_data/car_data/train``), not Stanford's
    ``cars_annos.mat``.

    Raises:
        ImageError: If pytorch-metric-learning is missing or the folder lies otherwise.
    """
    lists = ("cars_annos.mat", "devkit", "stanford_cars/devkit", "cars_train_annos.mat")
    if not (root / "names.csv").is_file() and any((root / name).exists() for name in lists):
        raise ImageError(
            f"Expected Cars196 with class folders and anno_train.csv in '{root}', got Stanford's "
            "lists (.mat, as torchvision has them), for which pytorch-metric-learning has no "
            "reader; write their paths and labels into a CSV file and read that (csv)."
        )
    train, test = _published("Cars196", root, "names.csv, anno_train.csv, anno_test.csv")
    return masked(_by_folders(train, test, "Cars196", root / "car_data" / "car_data"), reading)


def read_sop(root: Path, reading: Reading) -> DataSplit:
    """Stanford Online Products: the authors' lists of 11,318 and 11,316 classes.

    Raises:
        ImageError: If pytorch-metric-learning is missing or the folder lies otherwise.
    """
    outer = root.parent if root.name == SOP_FOLDER else root
    train, test = _published("StanfordOnlineProducts", outer, f"{SOP_FOLDER}/Ebay_train.txt")
    split = DataSplit(
        tuple(Record(path, str(label)) for path, label in train),
        tuple(Record(path, str(label)) for path, label in test),
        name="Stanford Online Products",
        root=outer / SOP_FOLDER,
    )
    return masked(split, reading)


def _published(
    name: str, root: Path, needed: str
) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    """Paths and labels of both parts, as pytorch-metric-learning finds them."""
    try:
        from pytorch_metric_learning import datasets
    except ImportError as error:
        raise ImageError(
            f"Reading {name} needs pytorch-metric-learning 2.7 or newer; install it with "
            "pip install 'simexplain[train]'."
        ) from error
    kind: Any = getattr(datasets, name)
    try:
        parts = [kind(str(root), split=part, download=False) for part in ("train", "test")]
    except (OSError, ValueError, IndexError) as error:
        raise ImageError(
            f"Expected {name} with {needed} in '{root}', but it cannot be read "
            f"({first_line(error)}); unpack the published archive there."
        ) from error
    train, test = (list(zip(map(Path, p.paths), p.labels, strict=True)) for p in parts)
    if not train and not test:
        raise ImageError(f"Expected {name} in '{root}', but its lists name no picture.")
    return train, test


def _by_folders(
    train: Sequence[tuple[Path, int]], test: Sequence[tuple[Path, int]], name: str, root: Path
) -> DataSplit:
    """Classes called as their folders, once it is certain that folders and numbers agree."""
    called: dict[int, set[str]] = {}
    for path, label in (*train, *test):
        called.setdefault(label, set()).add(path.parent.name)
    names = {label: min(folders) for label, folders in called.items()}
    unclear = [sorted(folders)[1] for folders in called.values() if len(folders) > 1]
    problems: tuple[str, ...] = ()
    if len(set(names.values())) < len(names) or unclear:
        odd = few(unclear) if unclear else "several numbers for one folder"
        problems = (f"class numbers that do not match the folders ({odd})",)
    first, second = (
        tuple(Record(path, names[label]) for path, label in part) for part in (train, test)
    )
    return DataSplit(first, second, None, name, root, problems)


def read_market1501(root: Path, reading: Reading) -> DataSplit:
    """Market-1501: ``bounding_box_train``, ``query`` and ``bounding_box_test``.

    Persons are the classes. A group is a person before a camera (``0002_c1``), so that leaving out
    the query's own group is the protocol: neither counts without the other. Junk (``-1``) lies in
    ``junk`` and in no other part, as the protocol has it; distractors (``0000``) stay in the
    gallery and are right for no query. DukeMTMC-reID has the same folders and names.

    Raises:
        ImageError: If the folder lies otherwise.
    """
    inner = root / MARKET_FOLDER
    return masked(_persons(inner if inner.is_dir() else root, "Market-1501"), reading)


def read_cuhk03(root: Path, reading: Reading) -> DataSplit:
    """CUHK03 in its new protocol (CUHK03-NP): ``detected`` or ``labeled``, each as Market-1501.

    Raises:
        ImageError: If the folder lies otherwise, or holds both and does not say which.
    """
    both = [name for name in ("detected", "labeled") if (root / name).is_dir()]
    if len(both) == 2:
        raise ImageError(
            f"'{root}' holds CUHK03-NP twice; give '{root / both[0]}' or '{root / both[1]}'."
        )
    inner = root / both[0] if both else root
    return masked(_persons(inner, f"CUHK03-NP {inner.name}"), reading)


def _persons(root: Path, name: str) -> DataSplit:
    folders = [root / part for part in ("bounding_box_train", "query", "bounding_box_test")]
    missing = [folder.name for folder in folders if not folder.is_dir()]
    if missing:
        raise ImageError(
            f"Expected {name} with bounding_box_train, query and bounding_box_test in '{root}', "
            f"but {few(missing)} {'is' if len(missing) == 1 else 'are'} not there."
        )
    odd: list[str] = []
    train, queries, gallery = (_seen(folder, root, odd) for folder in folders)
    # Distractors and junk have no identity: they can only be found wrongly, never trained on.
    known = [
        tuple(r for r in part if r.label != JUNK and not is_distractor(r.label))
        for part in (train, queries)
    ]
    problems = (f"names without person and camera: {few(odd)}",) if odd else ()
    junk = tuple(record for record in gallery if record.label == JUNK)
    persons = tuple(record for record in gallery if record.label != JUNK)
    return DataSplit(known[0], known[1], persons, name, root, problems, junk=junk)


def _seen(folder: Path, root: Path, odd: list[str]) -> tuple[Record, ...]:
    """The pictures of a folder with person and camera from their names; others are noted."""
    records = []
    for record in pictures_in(folder, labelled=False):
        match = _PERSON.match(record.path.name)
        if match is None:
            odd.append(relative(record.path, root))
        else:
            # Numbers, however many zeros they begin with.
            person, camera = match["person"], str(int(match["camera"]))
            person = person if person == JUNK else f"{int(person):04d}"
            records.append(Record(record.path, person, f"{person}_c{camera}", camera=camera))
    return tuple(records)


@dataclass(frozen=True)
class DatasetKind:
    """A kind of data set.

    Attributes:
        about: What it is, in a line.
        layout: How it must lie.
        read: ``(root, reading) -> DataSplit``.
        grouped: Whether a rule of groups may be given.
    """

    about: str
    layout: str
    read: Callable[[Path, Reading], DataSplit]
    grouped: bool = False


DATASETS: dict[str, DatasetKind] = {
    "folder": DatasetKind(
        "folders of pictures, one for each class",
        "CLASS/picture, or train/CLASS/picture beside test/ or val/ (or query/ and gallery/)",
        read_folder,
        grouped=True,
    ),
    "csv": DatasetKind(
        "a table of pictures and their classes",
        "a CSV file: path,label[,split][,group][,mask], paths relative to it",
        read_csv,
        grouped=True,
    ),
    "cub": DatasetKind(
        "CUB-200-2011: birds, 100 species to train on and 100 others to test",
        "CUB_200_2011/images.txt, CUB_200_2011/images/CLASS/picture",
        read_cub,
    ),
    "cars": DatasetKind(
        "Cars196: car models, 98 to train on and 98 others to test",
        "names.csv, anno_train.csv, anno_test.csv, car_data/car_data/train/CLASS/picture",
        read_cars,
    ),
    "sop": DatasetKind(
        "Stanford Online Products: 11,318 products to train on and 11,316 others to test",
        "Stanford_Online_Products/Ebay_train.txt, Stanford_Online_Products/Ebay_test.txt",
        read_sop,
    ),
    "market1501": DatasetKind(
        "Market-1501: persons before six cameras",
        "bounding_box_train/, query/, bounding_box_test/ with 0002_c1s1_000451_03.jpg",
        read_market1501,
    ),
    "cuhk03": DatasetKind(
        "CUHK03-NP, detected or labeled: persons before two cameras",
        "detected/ or labeled/, each with bounding_box_train/, query/, bounding_box_test/",
        read_cuhk03,
    ),
}
"""The kinds of data sets that are read."""


@typed
def read_dataset(
    kind: str,
    root: str | Path,
    *,
    train_share: float = 0.5,
    group: str | None = None,
    masks: str | Path | None = None,
    strict: bool = True,
) -> DataSplit:
    """Reads where the pictures of a data set lie, and what they are; opens none.

    Args:
        kind: A name in ``DATASETS``.
        root: Its folder, or the CSV file.
        train_share: Of the sorted classes, the first of which train, in (0, 1); where the data set
            has no split of its own (``folder``, ``csv``).
        group: For ``folder`` and ``csv``: ``name`` for the file name without its ending, or a
            regular expression with one group, searched in the relative path.
        masks: A folder with a mask of the same relative path for each picture that has one, or
            ``alpha`` for the pictures' own alpha channels.
        strict: Raise what does not match; else it is kept in ``problems``, so that
            ``check_training`` reports it along with everything else.

    Raises:
        ImageError: If the kind or folder does not exist, or its files do not match: all problems at
            once.
    """
    if kind not in DATASETS:
        hint = meant(kind, DATASETS) or "."
        raise ImageError(f"Expected a kind of data set ({', '.join(DATASETS)}), got '{kind}'{hint}")
    source, known = Path(root), DATASETS[kind]
    if group is not None and not known.grouped:
        able = ", ".join(name for name, other in DATASETS.items() if other.grouped)
        raise ImageError(f"A rule of groups is for {able}; '{kind}' has its own groups or none.")
    if not (source.is_file() if kind == "csv" else source.is_dir()):
        what = "a CSV file" if kind == "csv" else "a folder"
        raise ImageError(
            missing(
                source,
                f"Expected {what} for '{kind}' ({known.layout}), but '{source}' is none; check the "
                "path.",
            )
        )
    split = known.read(source, Reading(train_share, group, masks))
    if strict and (problems := [*split.problems, *_missing(split)]):
        raise ImageError(f"'{source}' does not match: {'; '.join(problems)}.")
    return split


def _missing(split: DataSplit) -> list[str]:
    """Files that are named but not there."""
    records = everything(split)
    files = [record.path for record in records if not record.path.is_file()]
    masks = [record.mask for record in records if record.mask and record.mask != record.path]
    masks = [mask for mask in masks if not mask.is_file()]
    kinds = (("picture", files), ("mask", masks))
    return [
        f"{len(paths)} {what}{'s' * (len(paths) > 1)} not there: "
        f"{few([relative(path, split.root) for path in paths])}"
        for what, paths in kinds
        if paths
    ]
