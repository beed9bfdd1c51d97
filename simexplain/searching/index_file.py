"""The file of an index, opened by memory map, and the parts on the disk that it is made from."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simexplain.errors import DAMAGED, OutputError, first_line
from simexplain.publishing import locked
from simexplain.searching.index_embedding import Stat

FORMAT_KEY, SCHEMA = "simexplain_index", 1
_CODES = {
    torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.float16: "F16",
    torch.uint8: "U8",
}  # fmt: skip
_BLOCK = 2**26
"""Bytes copied at a time."""


@dataclass(frozen=True)
class Column:
    """A tensor that is still to be put together.

    Attributes:
        kind: Its number type.
        shape: Its shape.
        pieces: Gives its content from the first row to the last, as tensors of that type.
    """

    kind: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]

    @classmethod
    def of(cls, tensor: Tensor) -> Column:
        """A tensor that is there already."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: iter((tensor,)))

    @property
    def size(self) -> int:
        """In bytes."""
        return torch.Size(self.shape).numel() * self.kind.itemsize


def write_columns(path: Path, metadata: Mapping[str, Any], columns: Mapping[str, Column]) -> None:
    """Writes a safetensors file; never more of a column than one piece is in memory."""
    # Wide numbers first, so that every tensor starts at a multiple of its item's size.
    order = sorted(columns, key=lambda name: (-columns[name].kind.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {FORMAT_KEY: json.dumps(metadata, sort_keys=True)}}
    start = 0
    for name in order:
        column = columns[name]
        end = start + column.size
        header[name] = {
            "dtype": _CODES[column.kind], "shape": list(column.shape), "data_offsets": [start, end]
        }  # fmt: skip
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            begun = file.tell()
            for piece in columns[name].pieces():
                file.write(piece.contiguous().numpy().tobytes())
            if file.tell() - begun != columns[name].size:
                raise ValueError(f"column '{name}' has another length than expected")


def is_written_here(path: Path) -> bool:
    """Whether a file begins as :func:`write_columns` begins it, cut off or not; or is empty."""
    begins = b'{"__metadata__":{"' + FORMAT_KEY.encode()
    with path.open("rb") as file:
        start = file.read(8 + len(begins))
    return not start or start[8:] == begins


def read_columns(path: Path, what: str = "index") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata of a file and its tensors, mapped into memory: read when they are used.

    No code in the file is ever run.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise OutputError(f"There is no {what} '{path}'; make one with simexplain index.")
    try:
        with safe_open(path, framework="pt") as file:
            content = (file.metadata() or {}).get(FORMAT_KEY)
            if content is None:
                raise OutputError(
                    f"Expected the {what} of a gallery, got '{path}'; see simexplain index."
                )
            metadata = json.loads(content)
            if metadata["schema"] != SCHEMA:
                raise OutputError(
                    f"'{path}' was written in schema {metadata['schema']}, but this version reads "
                    f"schema {SCHEMA}; make the {what} again."
                )
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, *DAMAGED) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"Expected the {what} of a gallery, got '{path}', damaged ({first_line(error)}); make"
            " it again with simexplain index."
        ) from error


@dataclass(frozen=True)
class SourceRows:
    """Rows, in the order they are wanted, of tensors that lie in an index or in a part of one."""

    tensors: Callable[[], Mapping[str, Tensor]]
    places: tuple[int, ...]


def gathered(name: str, sources: Sequence[SourceRows]) -> Column:
    """A column with rows from several places, copied in blocks."""
    first = sources[0].tensors()[name]
    count = sum(len(source.places) for source in sources)
    step = max(1, _BLOCK // max(1, first[:1].numel() * first.dtype.itemsize))

    def pieces() -> Iterator[Tensor]:
        for source in sources:
            tensor = source.tensors()[name]
            for start in range(0, len(source.places), step):
                yield tensor[list(source.places[start : start + step])]

    return Column(first.dtype, (count, *first.shape[1:]), pieces)


def packed_texts(texts: Sequence[str]) -> dict[str, Tensor]:
    """Texts as the two columns ``texts`` (UTF-8, joined) and ``text_ends``."""
    codes = [text.encode("utf-8", "surrogateescape") for text in texts]
    ends = torch.tensor([len(code) for code in codes], dtype=torch.int64).cumsum(0)
    joined = bytearray(b"".join(codes))
    return {
        "texts": torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0).byte(),
        "text_ends": ends,
    }


def unpacked_texts(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The counterpart of :func:`packed_texts`."""
    joined, ends = tensors["texts"].numpy().tobytes(), tensors["text_ends"].tolist()
    return tuple(
        joined[start:end].decode("utf-8", "surrogateescape")
        for start, end in zip([0, *ends], ends, strict=False)
    )


_BASIS, _DRAFT = "basis.safetensors", "draft"


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
        """Reads what is there of parts with this key; nothing is written yet."""
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
    """
    folder, ours = work_folder(index), True
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
        if folder.is_dir():
            try:
                before = folder.stat()
                stack.enter_context(locked(folder, wait=False))
                # Whoever had it may have removed it since it was opened here.
                ours = os.path.samestat(before, folder.stat())
            except (BlockingIOError, FileNotFoundError):
                ours = False
        if not ours:
            raise OutputError(
                f"'{index}' is being written by another process; wait until that has ended."
            )
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()


def work_folder(index: Path) -> Path:
    """Where the parts of an unfinished index lie."""
    return index.absolute().parent / f".{index.name}.unfinished"
