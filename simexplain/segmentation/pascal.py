"""PASCAL-5i (Shaban et al. 2017): the 20 classes of PASCAL VOC 2012 in four folds of five."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from simexplain.arguments import typed
from simexplain.errors import ImageError
from simexplain.segmentation.dataset import VOID, Appearance, SegmentationData, label_map

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle",
    "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person",
    "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""In the order of their values in the masks, which begin at 1."""

FOLDS = 4
PARTS = ("test", "train")

_PLACES = ("", "VOC2012", "VOCdevkit/VOC2012")
_SBD = ("SBD/dataset", "sbd/dataset", "benchmark_RELEASE/dataset", "dataset", "SBD", "sbd")
_SPLITS = ("splits/pascal", "data/splits/pascal", "splits", "fss_list")
_SETS = "ImageSets/Segmentation"
_EACH = len(CLASSES) // FOLDS


def fold_classes(fold: int, part: str = "test") -> tuple[str, ...]:
    """The classes of a fold, ``5 fold + 1`` to ``5 fold + 5``, or with ``train`` all others.

    Raises:
        ImageError: If the fold or the part does not exist.
    """
    if fold not in range(FOLDS) or part not in PARTS:
        raise ImageError(
            f"Expected a fold from 0 to {FOLDS - 1} and {' or '.join(PARTS)}, got {fold} and "
            f"'{part}'."
        )
    own = CLASSES[_EACH * fold : _EACH * (fold + 1)]
    return own if part == "test" else tuple(name for name in CLASSES if name not in own)


def is_pascal(root: Path) -> bool:
    """Whether PASCAL VOC 2012 lies in a folder."""
    return _voc(root) is not None


@typed
def read_pascal(root: str | Path, fold: int, part: str = "test") -> SegmentationData:
    """A fold of PASCAL-5i.

    ``test`` has the fold's five classes in VOC's ``val``; ``train`` the other fifteen in VOC's
    ``train`` and, where the Semantic Boundaries Dataset is there, in all of its pictures that are
    not in ``val``. Masks come from ``SegmentationClassAug`` where that is there, else from
    ``SegmentationClass``, else from SBD's ``cls``. Which picture shows which class is read from
    the community's lists ``splits/pascal/val/fold0.txt`` (``trn`` for training), with lines such as
    ``2007_000033__01``, where those are there, else from the masks.

    Args:
        root: ``VOCdevkit``, what holds it, or ``VOC2012`` itself; SBD as ``SBD/dataset`` or as it
            unpacks, beside it.
        fold: From 0 to 3.
        part: ``test`` or ``train``.

    Raises:
        ImageError: If the files lie elsewhere or are damaged.
    """
    classes = fold_classes(fold, part)
    base, voc = Path(root), _voc(Path(root))
    if voc is None:
        raise ImageError(
            f"Expected PASCAL VOC 2012 in '{root}' (VOCdevkit/VOC2012 with JPEGImages and {_SETS}),"
            " found none; unpack it there."
        )
    reader = _Reader(voc, _first(_around(base, voc), _SBD, "cls"))
    listed = _listed(base, voc, fold, part)
    if listed is None:
        listed = list(reader.scanned(reader.names(part)))
    appearances = tuple(
        Appearance(reader.picture(name), CLASSES[value - 1], reader.mask(name), value)
        for name, value in listed
        if CLASSES[value - 1] in classes
    )
    if not appearances:
        raise ImageError(
            f"Expected pictures of {', '.join(classes)} in '{voc}', found none in its {part} lists."
        )
    return SegmentationData(f"PASCAL-5i fold {fold} ({part})", appearances)


class _Reader:
    """Where the files of VOC and SBD are."""

    def __init__(self, voc: Path, sbd: Path | None) -> None:
        self.voc, self.sbd = voc, sbd

    def names(self, part: str) -> list[str]:
        """Pictures of the test, or all to train on that are not in it."""
        held = _lines(self.voc / _SETS / "val.txt")
        if part == "test":
            return held
        more = self.voc / _SETS / "trainaug.txt"
        names = dict.fromkeys(_lines(more if more.is_file() else self.voc / _SETS / "train.txt"))
        for name in ("train.txt", "val.txt") if self.sbd else ():
            names |= dict.fromkeys(_lines(Path(str(self.sbd)) / name))
        # The other lists of names may have the picture and the mask in a line.
        return [name for name in names if name not in set(held)]

    def picture(self, name: str) -> Path:
        own = self.voc / "JPEGImages" / f"{name}.jpg"
        if self.sbd is not None and not own.is_file():
            return self.sbd / "img" / f"{name}.jpg"
        return own

    def mask(self, name: str) -> Path:
        places = [self.voc / "SegmentationClassAug", self.voc / "SegmentationClass"]
        for index in places:
            if (index / f"{name}.png").is_file():
                return index / f"{name}.png"
        if self.sbd is not None and (self.sbd / "cls" / f"{name}.mat").is_file():
            return self.sbd / "cls" / f"{name}.mat"
        return places[-1] / f"{name}.png"

    def scanned(self, names: Iterable[str]) -> Iterator[tuple[str, int]]:
        """Which classes the masks have."""
        for name in names:
            for value in np.unique(label_map(self.mask(name))).tolist():
                if value not in (0, VOID):
                    yield name, _checked(value, self.mask(name))


def _checked(value: int, source: Path) -> int:
    if not 1 <= value <= len(CLASSES):
        raise ImageError(
            f"Expected values from 0 to {len(CLASSES)} and {VOID} in '{source}', got {value}."
        )
    return value


def _listed(base: Path, voc: Path, fold: int, part: str) -> list[tuple[str, int]] | None:
    """Pictures and values from the community's lists, if they are there."""
    kind = "val" if part == "test" else "trn"
    folds = [fold] if part == "test" else [other for other in range(FOLDS) if other != fold]
    index = _first(_around(base, voc), _SPLITS, f"{kind}/fold{folds[0]}.txt")
    if index is None:
        return None
    names = []
    for number in folds:
        source = index / kind / f"fold{number}.txt"
        for line in _lines(source):
            name, mark, value = line.partition("__")
            if not mark or not value.isdigit():
                raise ImageError(
                    f"Expected lines such as 2007_000033__01 in '{source}', got '{line}'."
                )
            names.append((name, _checked(int(value), source)))
    return names


def _voc(root: Path) -> Path | None:
    for index in _PLACES:
        folder = root / index
        if (folder / "JPEGImages").is_dir() and (folder / _SETS).is_dir():
            return folder
    return None


def _around(base: Path, voc: Path) -> list[Path]:
    return list(dict.fromkeys((base, voc, voc.parent, voc.parent.parent)))


def _first(places: Iterable[Path], names: Iterable[str], inside: str) -> Path | None:
    known = tuple(names)
    for index in places:
        for name in known:
            if (index / name / inside).exists():
                return index / name
    return None


def _lines(path: Path) -> list[str]:
    """The first word of each line, without folders and ending: ``JPEGImages/2007_000033.jpg``."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(f"'{path}' cannot be read ({error}); check the data set.") from error
    words = [line.split()[0] for line in lines if line.strip()]
    return [Path(word).name.removesuffix(".jpg") for word in words]
