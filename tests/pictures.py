"""Sample pictures of every kind that users have, made on the spot."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture of random pixels: no two places are alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def square(height: int, width: int, centre: tuple[float, float], side: int) -> Image.Image:
    """A white square on black; ``centre`` is ``(x, y)`` in pixels from the top left corner."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    left, top = round(centre[0] - side / 2), round(centre[1] - side / 2)
    pixels[top : top + side, left : left + side] = 255
    return Image.fromarray(pixels)


def oriented(upright: Image.Image, orientation: int, path: Path) -> None:
    """Stores a picture turned, with the EXIF tag that tells how to turn it back."""
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    # Whole blocks of one colour then survive JPEG almost exactly.
    jpeg = {"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}
    stored.save(path, exif=exif, **jpeg)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG file chunk by chunk, for kinds that Pillow reads but does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG file with its checksum."""
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )
