"""The file of an index: one safetensors file, written piece by piece and opened by memory map.

The library that reads safetensors wants all tensors in memory to write them, and a gallery may have
more of them than that. The format is simple enough to be written as it comes: eight bytes with the
length of a JSON header, the header, the numbers of one tensor after the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simexplain.errors import DAMAGED, OutputError, first_line

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
    """Writes a safetensors file; never more of a column than one piece is in memory.

    Raises:
        OSError: If the disk is full or the like.
        ValueError: If the pieces of a column are not as many numbers as in its shape.
    """
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

    Raises:
        OutputError: If the file does not exist, is damaged, is not one of ours or is of another
            version.
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
    """Consecutive rows of some tensors, wherever those are: in an index or in a part of one.

    Attributes:
        tensors: Opens them.
        places: The rows, in the order in which they are wanted.
    """

    tensors: Callable[[], Mapping[str, Tensor]]
    places: tuple[int, ...]


def gathered(name: str, sources: Sequence[SourceRows]) -> Column:
    """A column with rows from several places, copied in blocks.

    Args:
        name: Of the column, which all sources have.
        sources: At least one with a row.
    """
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
