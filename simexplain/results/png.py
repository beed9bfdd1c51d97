"""PNG files of large pictures, written in strips: Pillow would hold each twice."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

_KINDS = {1: 0, 3: 2, 4: 6}
_UP = 2
_LEVEL = 3
_ROWS = 256


def write_png(file: BinaryIO, pixels: NDArray[np.uint8]) -> None:
    """Writes grey ``(H,W)``, RGB or RGBA ``(H,W,C)`` as a PNG file.

    Each row is stored as its difference from the one above.

    Raises:
        OSError: If the file cannot be written.
    """
    height, width = pixels.shape[:2]
    kind = _KINDS[pixels.shape[2] if pixels.ndim == 3 else 1]
    file.write(b"\x89PNG\r\n\x1a\n")
    _chunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
    packer = zlib.compressobj(_LEVEL)
    for rows in _differences(pixels.reshape(height, -1)):
        _chunk(file, b"IDAT", packer.compress(rows.tobytes()))
    _chunk(file, b"IDAT", packer.flush())
    _chunk(file, b"IEND", b"")


def _differences(rows: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Strips of rows ``(n,1+W*C)`` as they are stored, the filter in front."""
    above = np.zeros_like(rows[:1])
    for top in range(0, len(rows), _ROWS):
        strip = rows[top : top + _ROWS]
        stored = np.full((len(strip), 1 + strip.shape[1]), _UP, dtype=np.uint8)
        stored[:, 1:] = strip - np.concatenate((above, strip[:-1]))
        above = strip[-1:]
        yield stored


def _chunk(file: BinaryIO, name: bytes, content: bytes) -> None:
    if content or name == b"IEND":
        file.write(struct.pack(">I", len(content)) + name + content)
        file.write(struct.pack(">I", zlib.crc32(name + content)))
