"""The items of a data set: pictures to compare and masks, from a table or drawn from folders."""

from __future__ import annotations

import csv
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from simexplain.arguments import typed
from simexplain.comparison import architecture
from simexplain.data.folders import alpha_of, mask_values, opened_csv, pictures_in, without_index
from simexplain.data.images import PictureSource
from simexplain.errors import ComparisonError, ImageError
from simexplain.renaming import takes_old_names

_HALF = 127


@takes_old_names
@dataclass(frozen=True)
class Item:
    """One comparison of a data set.

    Attributes:
        paths: Picture files, pictures of PIL or arrays: anchor, then positives, then negatives.
        arch: ``siamese``, ``triplet``, ``quadruplet`` or ``set``.
        masks: For each picture the mask of what its map should point at, or None: a grey picture of
            the same size, light where it is, or one with an alpha channel, such as the picture
            itself where it is cut out. None for no masks at all.
        negative: As for ``explain``.
        positives: As for ``explain``.

    Raises:
        ComparisonError: If there are not as many masks as pictures.
    """

    paths: tuple[PictureSource, ...]
    arch: str = "triplet"
    masks: tuple[str | Path | None, ...] | None = None
    negative: bool = False
    positives: int = 1

    def __post_init__(self) -> None:
        if self.masks is not None and len(self.masks) != len(self.paths):
            raise ComparisonError(
                f"Expected one mask or None for each of {len(self.paths)} pictures, got "
                f"{len(self.masks)}."
            )


def read_mask(path: str | Path, size: tuple[int, int]) -> Tensor:
    """A mask ``(H,W)``, boolean: opaque, or light (above half) without an alpha channel.

    Args:
        path: The file; turned upright as the picture is.
        size: Height and width of the picture.

    Raises:
        ImageError: If it cannot be read, has another size or marks nothing.
    """
    mask = mask_values(Path(path), size) > _HALF
    if not mask.any():
        raise ImageError(
            f"The mask '{path}' marks nothing: expected values above {_HALF} where the object is."
        )
    return torch.from_numpy(mask)


COLUMNS = (
    "anchor", "positives", "negatives", "anchor_mask", "positive_masks", "negative_masks"
)  # fmt: skip
"""Of a table of comparisons; the first three must be there."""

SAMPLED = {"siamese": (1, 0), "triplet": (1, 1), "quadruplet": (1, 2)}
"""Positives and negatives of the arrangements that can be drawn from classes."""

_MASK = "_mask"
_TRIES = 50
_MISSED = 30


@typed
def read_comparisons(path: str | Path) -> list[Item]:
    """The comparisons in a CSV file, in UTF-8 with a header.

    Columns ``anchor``, ``positives``, ``negatives`` and, if wanted, ``anchor_mask``,
    ``positive_masks``, ``negative_masks``; several files in a cell are separated by ``;``, and in a
    list of masks an empty place means none. Paths are relative to the CSV file. A pair has one
    positive or one negative; whether the files can be read is checked when they are needed.

    Raises:
        ComparisonError: If the file, its header or a line cannot be used; names it.
    """
    source = Path(path)
    with opened_csv(source, ComparisonError) as opened:
        reader = csv.DictReader(opened, strict=True)
        _check_header(source, without_index(reader.fieldnames or ()))
        items = [
            _item(source, reader.line_num, row)
            for row in reader
            if any(str(cell).strip() for cell in row.values() if cell is not None)
        ]
    if not items:
        raise ComparisonError(f"Expected at least one comparison in '{source}', found none.")
    return items


@typed
def sample_comparisons(
    folder: str | Path, count: int = 50, *, arch: str = "triplet", seed: int = 0
) -> list[Item]:
    """Comparisons drawn from a folder with a sub-folder of pictures for each class.

    Anchor and positive are two pictures of one class, negatives come from other classes. The mask
    of ``cat.jpg`` is a picture ``cat_mask.png`` (or of another format) beside it; where there is
    none, a picture with transparent parts is its own mask.

    Args:
        folder: Holds the classes.
        count: How many to draw; fewer come where there are not so many different ones.
        arch: ``siamese`` (similar pairs), ``triplet`` or ``quadruplet``.
        seed: The same seed draws the same comparisons.

    Raises:
        ImageError: If the folder has no classes of pictures.
        ComparisonError: If no class has two pictures, or an option does not fit.
    """
    if arch not in SAMPLED or count < 1:
        raise ComparisonError(
            f"Expected arch to be one of {', '.join(SAMPLED)} and at least one comparison, got "
            f"'{arch}' and {count}."
        )
    classes, masks = _classes(folder)
    anchors = [(label, path) for label, own in classes.items() if len(own) > 1 for path in own]
    if not anchors:
        raise ComparisonError(
            f"Expected a class with at least two pictures in '{folder}', but every class has one."
        )
    draws = random.Random(seed)
    draws.shuffle(anchors)
    comparisons: dict[tuple[Path, ...], None] = {}
    missed = 0  # draws in a row that were known already
    for number in range(_TRIES * count):
        paths = _drawn(classes, *anchors[number % len(anchors)], *SAMPLED[arch], draws)
        missed = missed + 1 if paths is None or paths in comparisons else 0
        if paths is not None:
            comparisons.setdefault(paths)
        if len(comparisons) == count or missed > _MISSED * (len(comparisons) + len(anchors)):
            break
    if not comparisons:
        raise ComparisonError(f"Expected enough pictures of other classes in '{folder}'.")
    return [_masked(paths, arch, masks) for paths in comparisons]


def _drawn(
    classes: Mapping[str, Sequence[Path]],
    label: str,
    anchor: Path,
    positives: int,
    negatives: int,
    draws: random.Random,
) -> tuple[Path, ...] | None:
    near = [path for path in classes[label] if path != anchor]
    far = [path for other, own in classes.items() if other != label for path in own]
    if len(far) < negatives:
        return None
    return (anchor, *draws.sample(near, positives), *draws.sample(far, negatives))


def _classes(folder: str | Path) -> tuple[dict[str, list[Path]], dict[Path, Path]]:
    """The pictures of each class, and the mask files of those that have one."""
    records = pictures_in(folder, labelled=True)
    stems: dict[Path, Path] = {r.path.with_suffix(""): r.path for r in records}
    masks: dict[Path, Path] = {}
    for stem, path in stems.items():
        owner = stem.with_name(stem.name.removesuffix(_MASK))
        if owner != stem and owner in stems:
            masks[owner] = path
    taken = set(masks.values())
    classes: dict[str, list[Path]] = defaultdict(list)
    for record in records:
        if record.path not in taken:
            classes[record.label or ""].append(record.path)
    return dict(classes), masks


def _masked(paths: tuple[Path, ...], arch: str, masks: Mapping[Path, Path]) -> Item:
    own = [masks.get(path.with_suffix("")) or (path if _cut_out(path) else None) for path in paths]
    return Item(paths, arch, tuple(own) if any(own) else None)


@lru_cache(maxsize=4096)
def _cut_out(path: Path) -> bool:
    """Whether parts of a picture are transparent; one that cannot be read is reported later."""
    try:
        alpha = alpha_of(path)
    except ImageError:
        return False
    return alpha is not None and bool(alpha.min() < 128)


def _item(source: Path, line: int, row: Mapping[str, str | None]) -> Item:
    cells = [
        _cells(source, line, files, row.get(files), row.get(masks))
        for files, masks in zip(COLUMNS[:3], COLUMNS[3:], strict=True)
    ]
    anchor, near, far = (files for files, _ in cells)
    if None in row or len(anchor) != 1 or not near + far:
        what = "more cells than the header has" if None in row else (
            f"{len(anchor)} anchors, {len(near)} positives and {len(far)} negatives"
        )  # fmt: skip
        raise ComparisonError(
            f"Expected one anchor and at least one other picture in line {line} of '{source}', got "
            f"{what}."
        )
    arch = architecture(len(near), len(far))
    masks = tuple(mask for _, own in cells for mask in own)
    return Item(
        (*anchor, *near, *far),
        arch,
        masks if any(masks) else None,
        negative=arch == "siamese" and not near,
        positives=len(near) if arch == "set" else 1,
    )


def _cells(
    source: Path, line: int, column: str, files: str | None, masks: str | None
) -> tuple[list[Path], list[Path | None]]:
    """The files and the masks of one role in a line."""
    named = [part.strip() for part in (files or "").split(";")]
    paths = [source.parent / part for part in named if part]
    given = [part.strip() for part in masks.split(";")] if masks and masks.strip() else []
    if given and len(given) != len(paths):
        raise ComparisonError(
            f"Expected as many masks as {column} in line {line} of '{source}', got {len(given)} "
            f"for {len(paths)}; leave a place between ; empty where there is none."
        )
    cells = [source.parent / part if part else None for part in given]
    return paths, cells or [None] * len(paths)


def _check_header(source: Path, header: list[str]) -> None:
    missing = [name for name in COLUMNS[:3] if name not in header]
    unknown = [name for name in header if name not in COLUMNS]
    if missing or unknown or len(set(header)) != len(header):
        what = f"no '{missing[0]}'" if missing else f"'{(unknown or header)[0]}'"
        raise ComparisonError(
            f"Expected the columns {', '.join(COLUMNS[:3])} and perhaps {', '.join(COLUMNS[3:])} "
            f"in the header of '{source}', got {what}."
        )
