"""What is done already of an index: parts on the disk, each whole or not there at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from simexplain.errors import DAMAGED, OutputError
from simexplain.searching.index_file import (
    SCHEMA,
    Column,
    packed_texts,
    read_columns,
    unpacked_texts,
    write_columns,
)
from simexplain.searching.index_reading import Stat

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two processes apart
    fcntl = None  # type: ignore[assignment]

_BASIS, _DRAFT, _LOCK = "basis.safetensors", "draft", "lock"


@dataclass(frozen=True)
class Part:
    """Pictures that were embedded together.

    Attributes:
        path: The file.
        pictures: Absolute paths of those with a row, in the order of the rows, with their stats.
        broken: Those without, each with its stat and the reason.
    """

    path: Path
    pictures: Mapping[str, Stat]
    broken: Mapping[str, tuple[Stat, str]]

    def tensors(self) -> Mapping[str, Tensor]:
        """The columns of the pictures with a row."""
        return read_columns(self.path, "part of an index")[1]


class IndexWork:
    """The folder with the parts of an index that is being made; beside it and hidden.

    Every part records what it was made with, so that parts of another model or other options are
    never taken for ours, even if others write here.
    """

    def __init__(self, index: Path, key: str) -> None:
        """Reads what is there; nothing is written yet.

        Args:
            index: The file that is to be made.
            key: Equal for parts that may stand in one index.
        """
        self.path = work_folder(index)
        self.key = key
        self.parts = [part for file in self._files() if (part := self._read(file)) is not None]
        self._next = 1 + max((int(file.stem) for file in self._files()), default=-1)

    def add(
        self,
        columns: Mapping[str, Tensor],
        pictures: Mapping[str, Stat],
        broken: Mapping[str, tuple[Stat, str]],
    ) -> None:
        """Writes a part; when this returns, it will be there after a kill."""
        path = self.path / f"{self._next:08d}.safetensors"
        self._next += 1
        metadata = {
            "schema": SCHEMA,
            "key": self.key,
            "stats": [[stat.changed, stat.size] for stat in pictures.values()],
            "broken": [[name, s.changed, s.size, why] for name, (s, why) in broken.items()],
        }
        kept = dict(columns) | packed_texts(list(pictures))
        self._write(path, metadata, {name: Column.of(tensor) for name, tensor in kept.items()})
        self.parts.append(Part(path, dict(pictures), dict(broken)))

    def basis(self) -> tuple[Tensor, float] | None:
        """The basis that was chosen when the work began, and the share that it holds."""
        with contextlib.suppress(OutputError, *DAMAGED):
            metadata, tensors = read_columns(self.path / _BASIS)
            if metadata["key"] == self.key:
                return tensors["basis"].clone(), float(metadata["held"])
        return None

    def keep_basis(self, basis: Tensor, held: float) -> None:
        """Writes it, so that work resumed has the same."""
        metadata = {"schema": SCHEMA, "key": self.key, "held": held}
        self._write(self.path / _BASIS, metadata, {"basis": Column.of(basis)})

    def publish(
        self, metadata: Mapping[str, object], columns: Mapping[str, Column], to: Path
    ) -> None:
        """Writes the index and puts it into place; then what it was made of is removed."""
        self._write(to, metadata, columns)
        self.remove()

    def remove(self) -> None:
        """Removes all that is unfinished, and nothing that is not ours."""
        for file in (*self._files(), self.path / _BASIS, self.path / _DRAFT):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def _write(
        self, path: Path, metadata: Mapping[str, object], columns: Mapping[str, Column]
    ) -> None:
        """Writes a file atomically: the draft lies on the same disk."""
        draft = self.path / _DRAFT
        try:
            self.path.mkdir(exist_ok=True)
            write_columns(draft, dict(metadata), columns)
            with draft.open("rb+") as file:
                os.fsync(file.fileno())
            draft.replace(path)
        except OSError as error:
            raise OutputError(
                f"'{path}' cannot be written ({error.strerror or error}); what is done is kept in "
                f"'{self.path}'."
            ) from error

    def _files(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        return sorted(path for path in self.path.glob("*.safetensors") if path.stem.isdigit())

    def _read(self, path: Path) -> Part | None:
        """A part, or None for one of another index or a damaged one."""
        with contextlib.suppress(OutputError, *DAMAGED):
            metadata, tensors = read_columns(path, "part of an index")
            if metadata["key"] == self.key:
                names = unpacked_texts(tensors)
                pictures = dict(
                    zip(names, (Stat(*pair) for pair in metadata["stats"]), strict=True)
                )
                broken = {name: (Stat(at, size), why) for name, at, size, why in metadata["broken"]}
                return Part(path, pictures, broken)
        return None


@contextlib.contextmanager
def alone(index: Path) -> Iterator[None]:
    """Keeps all others from writing an index; the system ends that with the process, if killed.

    Where a folder cannot be written or has no locks, nothing is kept from anyone: writing will say.

    Raises:
        OutputError: If another process, or another thread, is writing it.
    """
    lock, file = work_folder(index) / _LOCK, _locked(index)
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                lock.unlink(missing_ok=True)
                lock.parent.rmdir()
            file.close()


def _locked(index: Path) -> BinaryIO | None:
    """The lock of an index, taken; None without locks."""
    lock = work_folder(index) / _LOCK
    try:
        lock.parent.mkdir(exist_ok=True)
        file = lock.open("wb")
    except OSError:
        return None
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had it may have removed it since it was opened here.
        if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        file.close()
        return None
    file.close()
    raise OutputError(f"'{index}' is being written by another process; wait until that has ended.")


def work_folder(index: Path) -> Path:
    """Where the parts of an unfinished index lie."""
    return index.absolute().parent / f".{index.name}.unfinished"
