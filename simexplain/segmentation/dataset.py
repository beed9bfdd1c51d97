"""What segmentation is measured on: where each class appears, and episodes drawn from that."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from simexplain.arguments import typed
from simexplain.data.datasets import read_dataset
from simexplain.data.folders import Record, mask_of
from simexplain.data.images import opened_picture
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
        if values.shape != size:
            raise ImageError(
                f"Expected the mask '{self.mask}' in the size of its picture, {size[1]}x{size[0]}, "
                f"got {values.shape[1]}x{values.shape[0]}."
            )
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
    """The values of a mask ``(H,W)`` as they are stored: numbers of classes, not colours.

    Args:
        path: A palette or grey picture, or a file of SBD's ``cls``.

    Raises:
        ImageError: If it cannot be read or has no single value for each pixel.
    """
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
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
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
