"""Data sets by kind, each as pictures to train on, to search with and to search in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from simexplain.arguments import typed
from simexplain.data.dataset_folders import read_csv, read_folder
from simexplain.data.dataset_published import (
    read_cars,
    read_cub,
    read_cuhk03,
    read_market1501,
    read_sop,
)
from simexplain.data.dataset_split import DataSplit as DataSplit
from simexplain.data.dataset_split import Reading, few, relative
from simexplain.data.dataset_split import everything as everything
from simexplain.errors import ImageError, meant, missing


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
    problems = [*split.problems, *_missing(split)] if strict else []
    if problems:
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
