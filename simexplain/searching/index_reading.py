"""Pictures of a gallery as batches, with what shows later whether one has changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simexplain.data.folders import Batches, Record, pictures_in
from simexplain.data.images import read_picture
from simexplain.errors import ImageError

DIGEST = 16


@dataclass(frozen=True)
class Stat:
    """Size and time of change of a picture's file.

    Attributes:
        changed: When it was last changed, in nanoseconds; -1 for a missing file.
        size: In bytes.
    """

    changed: int
    size: int

    @classmethod
    def of(cls, path: str | Path) -> Stat:
        """Stats a file."""
        try:
            stat = Path(path).stat()
        except OSError:
            return cls(-1, -1)
        return cls(stat.st_mtime_ns, stat.st_size)


def digest_of(path: str | Path) -> bytes:
    """A digest of the content of a file, 16 bytes.

    Raises:
        OSError: If it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=DIGEST)
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.digest()


class Pictures(Batches):
    """Batches of pictures that note the size and the digest of every picture on the way.

    Attributes:
        sizes: ``(height, width)`` of each picture read, by its place in the records.
        digests: 16 bytes each.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sizes: dict[int, tuple[int, int]] = {}
        self.digests: dict[int, bytes] = {}

    def _read(self, index: int) -> tuple[int, Tensor] | None:
        path = self.records[index].path
        try:
            tensor, geometry = self.preprocess(read_picture(path).pixels)
            self.digests[index] = digest_of(path)
        except ImageError as error:
            self.broken[path] = str(error)
            return None
        except OSError as error:
            self.broken[path] = f"'{path}' cannot be read ({error.strerror or error})."
            return None
        self.sizes[index] = geometry.original
        return index, tensor

    def facts(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Columns ``sizes`` and ``digests`` of pictures that were read."""
        return {
            "sizes": torch.tensor([self.sizes[n] for n in indices], dtype=torch.int32),
            "digests": torch.tensor([list(self.digests[n]) for n in indices], dtype=torch.uint8),
        }


def pictures_of(source: str | Path | Sequence[Record | str | Path]) -> tuple[list[str], str]:
    """The absolute paths of a gallery, each once, and the folder that they are all in.

    Args:
        source: A folder, searched with all below, or pictures.

    Raises:
        ImageError: If the folder does not exist or has no picture.
    """
    if isinstance(source, (str, Path)):
        records: Sequence[Record | str | Path] = pictures_in(source, labelled=False)
        root = absolute([source])[0]
    else:
        records, root = source, ""
    paths = absolute([record.path if isinstance(record, Record) else record for record in records])
    if not paths:
        raise ImageError("Expected at least one picture to index, got none.")
    if not root:
        folders = [str(Path(path).parent) for path in paths]
        try:
            root = os.path.commonpath(folders)
        except ValueError:  # on different drives
            root = folders[0]
    return paths, root


def absolute(paths: Sequence[str | Path]) -> list[str]:
    """Absolute paths, each once; links stay links."""
    return list(dict.fromkeys(os.path.normpath(Path(path).absolute()) for path in paths))
