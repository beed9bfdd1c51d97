"""What segmentation is measured on: PASCAL-5i and folders, and episodes drawn from them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simexplain.arguments import typed
from simexplain.data.datasets import read_dataset
from simexplain.data.folders import Record, check_mask_size, mask_of
from simexplain.data.images import DAMAGED_PICTURE, opened_picture
from simexplain.errors import ComparisonError, ImageError

VOID = 255
"""Value of pixels that PASCAL VOC leaves out of every measure, such as contours."""
PARTS = ("all", "train", "test")
"""Of pictures of one's own."""
_HALF = 127
_TWICE = "listed repeatedly"


@dataclass(frozen=True)
class Appearance:
    """A class in a picture.

    Attributes:
        path: The picture.
        label: The class.
        mask: Where it is: a picture of the same size, or None where that is not known, so that it
            can only be a support.
        value: The value of the class's pixels in ``mask``, whose other values are other classes and
            :data:`VOID`; None for a mask that is light, or opaque, where the object is.
    """

    path: Path
    label: str
    mask: Path | None = None
    value: int | None = None

    def truth(self, size: tuple[int, int]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Where the class is ``(H,W)``, and which pixels count ``(H,W)``.

        Args:
            size: Height and width of the picture.

        Raises:
            ImageError: If the mask is missing, cannot be read or has another size.
        """
        if self.mask is None:
            raise ImageError(f"Expected a mask of '{self.path}', but there is none.")
        if self.value is None:
            grey = mask_of(Record(self.path, mask=self.mask), size)
            if grey is None:
                raise ImageError(f"Expected an alpha channel in '{self.path}' as its mask.")
            return grey > _HALF, np.ones(size, dtype=bool)
        values = label_map(self.mask)
        check_mask_size(self.mask, values, size)
        return values == self.value, values != VOID


@dataclass(frozen=True)
class SegmentationData:
    """A data set or a fold of one.

    Attributes:
        name: What to call it.
        tests: The pictures to segment, with masks.
        supports: What can be shown as a support; None for the tests themselves.
    """

    name: str
    tests: tuple[Appearance, ...]
    supports: tuple[Appearance, ...] | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes of the tests, sorted."""
        return tuple(sorted({one.label for one in self.tests}))


@dataclass(frozen=True)
class Episode:
    """A test picture and what is looked for in it.

    Attributes:
        truths: For each way the class in the test picture, which is the same in all.
        supports: For each way the pictures of its shots.
    """

    truths: tuple[Appearance, ...]
    supports: tuple[tuple[Path, ...], ...]

    @property
    def test(self) -> Path:
        """The test picture."""
        return self.truths[0].path

    @property
    def labels(self) -> tuple[str, ...]:
        """The class of each way."""
        return tuple(truth.label for truth in self.truths)


def draw_episodes(
    data: SegmentationData, count: int = 1000, *, ways: int = 1, shots: int = 1, seed: int = 0
) -> list[Episode]:
    """Episodes in which every class is the target equally often, as far as its pictures allow.

    A support shows the way's class, is not the test picture and, where there are enough of those,
    shows none of the other ways' classes. With two ways the test picture has both classes.

    Args:
        data: What to draw from.
        count: How many; the default is that of Shaban et al. 2017, for each fold.
        ways: Classes that are looked for, 1 or 2.
        shots: Supports for each.
        seed: The same seed draws the same episodes.

    Raises:
        ComparisonError: If a number is not possible, or no picture and supports fit.
    """
    if ways not in (1, 2) or shots < 1 or count < 1:
        raise ComparisonError(
            f"Expected 1 or 2 ways, at least 1 shot and at least 1 episode, got {ways}, {shots} "
            f"and {count}."
        )
    draws = random.Random(seed)
    pool: dict[str, list[Path]] = defaultdict(list)
    for one in data.tests if data.supports is None else data.supports:
        pool[one.label].append(one.path)
    shown = {label: set(paths) for label, paths in pool.items()}
    candidates = _candidates(data.tests, ways, pool, shots)
    if not candidates:
        raise ComparisonError(_nothing(data, ways, shots))
    for own in candidates.values():
        draws.shuffle(own)
    labels = sorted(candidates)
    episodes = []
    for number in range(count):
        own = candidates[labels[number % len(labels)]]
        truths = own[number // len(labels) % len(own)]
        episodes.append(Episode(truths, _supports(truths, pool, shown, shots, draws)))
    return episodes


def _candidates(
    tests: Sequence[Appearance], ways: int, pool: Mapping[str, Sequence[Path]], shots: int
) -> dict[str, list[tuple[Appearance, ...]]]:
    """Candidates for the test picture, by the first class."""
    together: dict[Path, list[Appearance]] = defaultdict(list)
    for one in tests:
        if len([path for path in pool.get(one.label, ()) if path != one.path]) >= shots:
            together[one.path].append(one)
    candidates: dict[str, list[tuple[Appearance, ...]]] = defaultdict(list)
    for own in together.values():
        for first in own:
            if ways == 1:
                candidates[first.label].append((first,))
            else:
                others = [other for other in own if other.label != first.label]
                candidates[first.label] += [(first, other) for other in others]
    return {label: own for label, own in candidates.items() if own}


def _supports(
    truths: Sequence[Appearance],
    pool: Mapping[str, Sequence[Path]],
    shown: Mapping[str, set[Path]],
    shots: int,
    draws: random.Random,
) -> tuple[tuple[Path, ...], ...]:
    supports = []
    for truth in truths:
        rivals = [shown[other.label] for other in truths if other is not truth]
        own = [path for path in pool[truth.label] if path != truth.path]
        pure = [path for path in own if not any(path in rival for rival in rivals)]
        supports.append(tuple(draws.sample(pure if len(pure) >= shots else own, shots)))
    return tuple(supports)


def _nothing(data: SegmentationData, ways: int, shots: int) -> str:
    if ways == 2 and not any(
        len({one.label for one in data.tests if one.path == path}) > 1
        for path in {one.path for one in data.tests}
    ):
        return (
            f"Expected pictures with masks of two classes in {data.name} for two ways, found none; "
            "list such a picture once for each class, or ask for one way."
        )
    return (
        f"Expected {shots} pictures beside the test picture for some class of {data.name}, found "
        "none; ask for fewer shots."
    )


@typed
def read_masked(
    kind: str, root: str | Path, *, masks: str | Path | None = None, part: str = "all"
) -> SegmentationData:
    """Pictures with classes and masks of one's own.

    Args:
        kind: ``csv`` for a table of ``path,label,mask``, in which a picture with two classes has
            two lines; ``folder`` for class folders.
        root: The CSV file or the folder.
        masks: For folders: a folder with a mask of the same relative path for each picture, or
            ``alpha``. A picture without a mask can only be a support.
        part: A name in :data:`PARTS`: the classes or pictures to segment.

    Raises:
        ImageError: If the data do not fit together, the part does not exist, or no picture in it
            has a mask.
    """
    if part not in PARTS:
        raise ImageError(f"Expected a part ({', '.join(PARTS)}), got '{part}'.")
    split = read_dataset(kind, root, masks=masks, strict=False)
    # Elsewhere a picture has one class; here its classes each have a line and a mask.
    problems = [problem for problem in split.problems if _TWICE not in problem]
    if problems:
        raise ImageError(f"'{root}' does not match: {'; '.join(problems)}.")
    chosen = {"train": split.train, "test": split.queries}
    everything = (*split.train, *split.queries, *(split.gallery or ()))
    records = chosen.get(part, everything)
    if not records:
        raise ImageError(
            f"Expected pictures in the part '{part}' of {split.name}, found none; ask for another "
            "part, or all (--split all)."
        )
    # A picture may be listed in several parts; for each class it counts once.
    known = {(record.path, record.label): record for record in records if record.label}
    supports = tuple(Appearance(r.path, str(r.label), r.mask) for r in known.values())
    tests = tuple(one for one in supports if one.mask is not None)
    if not tests:
        raise ImageError(
            f"Expected masks of the pictures in {split.name}, found none; name the folder of masks "
            "(--masks), say that alpha channels are masks (--masks alpha) or give a CSV file the "
            "column mask."
        )
    return SegmentationData(split.name, tests, supports)


def label_map(path: Path) -> NDArray[np.uint8]:
    """The values ``(H,W)`` of a palette or grey picture or of SBD's ``cls``: class numbers."""
    if path.suffix == ".mat":
        return _boundaries(path)
    try:
        with opened_picture(path) as opened:
            if opened.mode not in ("P", "L"):
                raise ImageError(
                    f"Expected the mask '{path}' as a palette or grey picture of class numbers, "
                    f"got mode {opened.mode}."
                )
            return np.array(opened, dtype=np.uint8)
    except ImageError:
        raise
    except DAMAGED_PICTURE as error:
        raise ImageError(f"The mask '{path}' cannot be read ({error}); check the file.") from error


def _boundaries(path: Path) -> NDArray[np.uint8]:
    """The classes ``(H,W)`` in a file of the Semantic Boundaries Dataset."""
    try:
        loadmat = import_module("scipy.io").loadmat
    except ImportError as error:
        raise ImageError(
            f"Reading '{path}' needs scipy, which is not installed; run pip install scipy, or put "
            "SegmentationClassAug in its place."
        ) from error
    try:
        return np.asarray(loadmat(str(path))["GTcls"][0]["Segmentation"][0], dtype=np.uint8)
    except Exception as error:  # scipy has no base class for what damaged files raise
        raise ImageError(f"The mask '{path}' cannot be read ({error}); check the file.") from error


CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle",
    "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person",
    "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""In the order of their values in the masks, which begin at 1."""

FOLDS = 4
PASCAL_PARTS = ("test", "train")

_PLACES = ("", "VOC2012", "VOCdevkit/VOC2012")
_SBD = ("SBD/dataset", "sbd/dataset", "benchmark_RELEASE/dataset", "dataset", "SBD", "sbd")
_SPLITS = ("splits/pascal", "data/splits/pascal", "splits", "fss_list")
_SETS = "ImageSets/Segmentation"
_EACH = len(CLASSES) // FOLDS


def fold_classes(fold: int, part: str = "test") -> tuple[str, ...]:
    """The classes of a fold, ``5 fold + 1`` to ``5 fold + 5``, or with ``train`` all others."""
    if fold not in range(FOLDS) or part not in PASCAL_PARTS:
        raise ImageError(
            f"Expected a fold from 0 to {FOLDS - 1} and {' or '.join(PASCAL_PARTS)}, got {fold} "
            f"and '{part}'."
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
