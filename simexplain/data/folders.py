"""Folders of pictures: which there are, their labels and masks, and tensors of them in batches."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ImageOps
from torch import Tensor

from simexplain.data.arrays import ARRAYS, check_no_pipe
from simexplain.data.images import (
    DAMAGED_PICTURE,
    Picture,
    PictureSource,
    is_picture,
    opened_picture,
    read_pages,
    read_picture,
)
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ImageError, SimexplainError, missing
from simexplain.publishing import written_pictures

Progress = Callable[[int, int], None]
"""Called with how far something is and how far it goes."""

StageProgress = Callable[[str, int, int], None]
"""Called with what is being done, how far it is, and how far it goes."""

_READERS = 2
_NAMED = 5


@dataclass(frozen=True)
class Record:
    """One picture of a data set.

    Attributes:
        path: Where it is.
        label: Its class, or None without labels.
        group: What it was taken with or comes from (a camera, a vendor), where that is known:
            retrieval can leave a query's own group out.
        mask: A picture of the same size, white where the object is, or ``path`` itself where its
            alpha channel is the mask.
        camera: Which camera took it, where that is known, as re-identification wants it.
    """

    path: Path
    label: str | None = None
    group: str | None = None
    mask: Path | None = None
    camera: str | None = None


def pictures_in(folder: str | Path, *, labelled: bool) -> list[Record]:
    """Every picture in a folder and below, in the order of their names.

    Args:
        folder: Where to look; hidden files and folders are left out, and so is what
            :func:`left_out_of` names.
        labelled: Each sub-folder directly in ``folder`` is a class; pictures outside any of them
            are then an error, since they would have no label.

    Raises:
        ImageError: If the folder does not exist, has no picture, or no classes where they are
            required.
    """
    if not str(folder):
        raise ImageError("Expected a folder of pictures, got an empty name; give its path.")
    root = Path(folder)
    if not root.is_dir():
        raise ImageError(
            missing(root, f"Expected a folder of pictures, but '{root}' is none; check the path.")
        )
    files = _below(root)
    own = _written(files)
    paths = sorted(path for path in files if is_picture(path) and path not in own)
    # Arrays beside pictures are rather embeddings or masks.
    paths = paths or sorted(path for path in files if path.suffix.lower() in ARRAYS)
    inside = [path for path in paths if path.is_file() and not _hidden(path, root)]
    seen = [path.relative_to(root) for path in inside]
    if not seen:
        raise ImageError(f"Expected pictures in '{root}', found none. {left_out_of(root)}".strip())
    if not labelled:
        return [Record(root / path) for path in seen]
    loose = [path for path in seen if len(path.parts) < 2]
    classes = {path.parts[0] for path in seen}
    if loose or len(classes) < 2:
        what = f"'{loose[0]}' beside them" if loose else f"only '{classes.pop()}'"
        raise ImageError(
            f"Expected at least two sub-folders in '{root}', each a class of pictures, got {what}; "
            "only fit works without labels (--unlabelled, labelled=False)."
        )
    return [Record(root / path, path.parts[0]) for path in seen]


def left_out_of(folder: str | Path) -> str:
    """What :func:`pictures_in` leaves out of a folder, in a line for the user, or nothing.

    That is what simexplain wrote there as results, files that are not pictures by their ending or,
    where they have none, by their content, and folders in it without any picture.

    Raises:
        ImageError: If the folder cannot be read.
    """
    root = Path(folder)
    files = [path for path in _below(root) if path.is_file() and not _hidden(path, root)]
    own = _written(files)
    results = {path.parent for path in own}
    pictures = {path for path in files if path not in own and is_picture(path)}
    parts = []
    if own:
        written = f"{len(own)} pictures" if len(own) > 1 else "1 picture"
        places = _few([f"'{index}'" for index in sorted(map(str, results))])
        parts.append(f"{written} that simexplain wrote as results, in {places}")
    others = Counter(
        path.suffix.lower() or "no ending"
        for path in {*files} - pictures - own
        if path.suffix not in ARRAYS and not results & {*path.parents}
    )
    if others:
        kinds = [f"{kind} {count}" for kind, count in sorted(others.items())]
        parts.append(f"files that are not pictures ({_few(kinds)})")
    used = {path.relative_to(root).parts[0] for path in (*pictures, *(results - {root}))}
    inside = sorted(path for path in root.iterdir() if path.is_dir() and not _hidden(path, root))
    if empty := [path.name for path in inside if path.name not in used]:
        parts.append(f"folders without a picture, {_few(empty)}")
    return f"Left out: {'; '.join(parts)}." if parts else ""


def _few(names: Sequence[str]) -> str:
    """The first of some names."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _below(root: Path) -> list[Path]:
    """All that is in a folder and below, in no order."""
    try:
        # Folders may be links to elsewhere, which rglob follows only where it starts.
        below = [path for child in root.iterdir() if child.is_dir() for path in child.rglob("*")]
        return [*root.iterdir(), *below]
    except OSError as error:
        raise ImageError(f"'{root}' cannot be read ({error.strerror or error}).") from error


def _written(files: Sequence[Path]) -> set[Path]:
    """Which pictures simexplain wrote as part of a result."""
    manifests = [path for path in files if path.suffix == ".json"]
    return {picture for path in manifests for picture in written_pictures(path)}


@contextmanager
def opened_csv(path: Path, error: type[SimexplainError]) -> Iterator[TextIO]:
    """A CSV file in UTF-8, open for reading.

    Raises:
        SimexplainError: Of the type ``error``, if it cannot be read or is not such a file.
    """
    try:
        check_no_pipe(path, "CSV", error)
        with path.open(encoding="utf-8-sig", newline="") as opened:
            yield opened
    except OSError as reason:
        why = f"'{path}' cannot be read ({reason.strerror or reason})."
        raise error(missing(path, why)) from reason
    except (UnicodeDecodeError, csv.Error) as reason:
        raise error(f"'{path}' is not a CSV file in UTF-8 ({reason}); save it as one.") from reason


def without_index(header: Sequence[str]) -> list[str]:
    """The columns of a table without the nameless index that pandas writes before them."""
    own = [name for name in header[:1] if name.strip() and not name.lower().startswith("unnamed:")]
    return [*own, *header[1:]]


def read_item(path: PictureSource, name: str = "image 1", *, pages: bool) -> list[Picture]:
    """The pictures that one argument stands for: those of a folder, the pages of a file, or one.

    Args:
        path: A picture file, or a folder, all pictures of which show one thing; or a picture from
            memory.
        name: What to call a picture without a path.
        pages: Take every page or frame of a file that has several, not the first alone.

    Raises:
        ImageError: If a picture cannot be read, or there is none.
    """
    if not isinstance(path, (str, Path)):
        return [read_picture(path, name)]
    if str(path) and Path(path).is_dir():
        return [read_picture(record.path) for record in pictures_in(path, labelled=False)]
    return read_pages(path) if pages else [read_picture(path)]


@dataclass
class Batches:
    """Preprocessed tensors of pictures, read a little ahead of their use.

    Iterate as often as wanted: each pass yields ``(places, images)``, the places of the pictures
    in ``records`` and a tensor ``(M,3,H,W)``. Broken pictures are left out and listed.

    Attributes:
        records: The pictures.
        preprocess: As the network expects.
        size: Pictures in one batch.
        broken: What could not be read in the passes so far, with the reason.
    """

    records: Sequence[Record]
    preprocess: Preprocess
    size: int = 32

    def __post_init__(self) -> None:
        self.broken: dict[Path, str] = {}

    def __len__(self) -> int:
        return -(-len(self.records) // self.size)

    def __iter__(self) -> Iterator[tuple[list[int], Tensor]]:
        return self.over(range(len(self.records)))

    def over(self, places: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        """Batches of some of the pictures only."""
        parts = iter([places[at : at + self.size] for at in range(0, len(places), self.size)])
        with ThreadPoolExecutor(_READERS) as pool:
            waiting = [pool.map(self._read, part) for part in islice(parts, 2)]
            while waiting:
                items = [item for item in waiting.pop(0) if item is not None]
                waiting += [pool.map(self._read, part) for part in islice(parts, 1)]
                if items:
                    yield [index for index, _ in items], torch.stack([image for _, image in items])

    def _read(self, index: int) -> tuple[int, Tensor] | None:
        path = self.records[index].path
        try:
            return index, self.preprocess(read_picture(path).pixels)[0]
        except ImageError as error:
            self.broken[path] = str(error)
            return None


def mask_of(record: Record, size: tuple[int, int]) -> NDArray[np.uint8] | None:
    """The mask of a picture ``(H,W)``, 255 where the object is; None where it has none.

    A file with an alpha channel is its alpha channel, another its brightness; both are turned
    upright as pictures are. A picture that is to be its own mask but has no alpha channel has none.

    Args:
        record: The picture.
        size: Its height and width.

    Raises:
        ImageError: If the file cannot be read or has another size than the picture.
    """
    if record.mask is None:
        return None
    values = alpha_of(record.mask)
    if values is None:
        if record.mask == record.path:
            return None
        values = np.array(read_picture(record.mask).image.convert("L"))
    check_mask_size(record.mask, values, size)
    return values


def mask_values(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A mask file of its own, as :func:`mask_of` reads it."""
    values = mask_of(Record(Path(), mask=path), size)
    assert values is not None
    return values


def check_mask_size(path: Path, values: NDArray[np.uint8], size: tuple[int, int]) -> None:
    """Raises an ImageError unless a mask has the height and width of its picture."""
    if values.shape != size:
        raise ImageError(
            f"Expected the mask '{path}' in the size of its picture, {size[1]}x{size[0]}, got "
            f"{values.shape[1]}x{values.shape[0]}."
        )


def alpha_of(path: Path) -> NDArray[np.uint8] | None:
    """The alpha channel of a mask file, upright; None without one.

    Raises:
        ImageError: If the file cannot be read.
    """
    try:
        with opened_picture(path) as opened:
            if "A" not in opened.getbands() and "transparency" not in opened.info:
                return None
            upright = ImageOps.exif_transpose(opened) or opened
            return np.array(upright.convert("RGBA").getchannel("A"))
    except DAMAGED_PICTURE as error:
        raise ImageError(f"The mask '{path}' cannot be read ({error}); check the file.") from error
