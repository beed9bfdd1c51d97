"""More than 300 files that somebody calls pictures, made on the spot: most of them are none."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from pictures import chunk, noise, oriented, png
from PIL import Image, PngImagePlugin, features

FORMATS = tuple(
    kind
    for kind in ("jpg", "png", "gif", "webp", "tiff", "bmp", "jp2", "avif", "ppm", "tga")
    if kind not in ("webp", "avif", "jp2") or features.check({"jp2": "jpg_2000"}.get(kind, kind))
)
ENDINGS = ("jpg", "jpeg", "png", "gif", "webp", "tiff", "bmp", "jp2", "npy", "npz")
NAMES = (
    'it\'s "a" `b` $(c).png', "two\nlines\r.png", "\x1b[31mred\x1b]0;title\x07.png",
    os.fsdecode(b"\x9b31m.png"), "<img src=x onerror=alert(1)>.png", "&amp;[red]x[b]{0}%s$a$.png",
    os.fsdecode(b"caf\xe9\xff.png"), f"{'n' * 246}.png", "-x.png", "--out.png",
    "\u202egnp.png", "\U0001f469\u200d\U0001f680.png", "=1+1,a;b\t.png", "*[a]?.png",
    "  a  .png", "PICTURE.PNG", "no ending", ".hidden.png", "a.png.png", "nul\u0085.png",
)  # fmt: skip


def encoded(kind: str, image: Image.Image | None = None) -> bytes:
    """A picture as the bytes of a file of this kind."""
    buffer = io.BytesIO()
    (image or noise(40, 60)).save(buffer, {"jpg": "jpeg", "jp2": "jpeg2000"}.get(kind, kind))
    return buffer.getvalue()


def cut() -> Iterator[tuple[str, bytes]]:
    """Every format, cut at every tenth of its length."""
    for kind in FORMATS:
        content = encoded(kind)
        for tenth in range(10):
            yield f"cut-{tenth}.{kind}", content[: len(content) * tenth // 10]


def flipped() -> Iterator[tuple[str, bytes]]:
    """Every format with eight bytes changed, most of them near its head."""
    for kind in FORMATS:
        for seed in range(8):
            random, content = np.random.default_rng(seed), bytearray(encoded(kind))
            for index in random.integers(0, min(len(content), 400 if seed % 2 else 10_000), 8):
                content[index] = random.integers(0, 256)
            yield f"flipped-{seed}.{kind}", bytes(content)


def misnamed() -> Iterator[tuple[str, bytes]]:
    """A picture under the ending of another format, and other things under endings of pictures."""
    for kind in ("jpg", "png", "gif", "bmp"):
        for ending in ("jpg", "png", "webp", "tiff", "npy"):
            if kind != ending:
                yield f"is-{kind}.{ending}", encoded(kind)
    others = {
        "text": b"no picture\n", "html": b"<html><script>alert(1)</script></html>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://example.org/a"/></svg>',
        "json": b'{"version": 1}', "pdf": b"%PDF-1.4\n%", "zip": b"PK\x05\x06" + bytes(18),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) run\n",
        "elf": b"\x7fELF" + bytes(100), "zeros": bytes(5000), "ones": b"\xff" * 5000,
    }  # fmt: skip
    for name, content in others.items():
        for ending in ("jpg", "png"):
            yield f"is-{name}.{ending}", content
    for ending in ENDINGS:
        yield f"empty.{ending}", b""


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that claim or hold far more than they should."""
    yield "claims-400-million.png", png(20_000, 20_000, 8, 0, b"")
    yield "claims-everything.png", png(2**31 - 1, 2**31 - 1, 8, 2, b"")
    yield "claims-nothing.png", png(0, 0, 8, 2, b"")
    # 170 million pixels in 165 kB would be allowed; its rows are missing.
    yield "claims-170-million.png", png(17_000, 10_000, 8, 0, zlib.compress(b""))
    yield "huge-screen.gif", b"GIF89a\xff\xff\xff\xff\x00\x00\x00;"
    yield "huge.bmp", b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**30, 2**30, 1,
                                          24, 0, 0, 1, 1, 0, 0)  # fmt: skip
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80 * 2**20)))
    yield "text-bomb.png", png(2, 2, 8, 0, bytes(6), text)
    yield "icc-bomb.png", png(2, 2, 8, 0, bytes(6), chunk(b"iCCP", b"a\0\0" + zlib.compress(b"x")))


def arrays() -> Iterator[tuple[str, bytes]]:
    """NumPy files of all types and shapes, and some that unpickle."""
    random = np.random.default_rng(0)
    for kind in ("uint8", "int8", "uint16", "int32", "int64", "uint64", "float16", "float32",
                 "float64", "bool", "complex64", "S4", "U4", "M8[s]"):  # fmt: skip
        yield (
            f"type-{kind[:9].replace('[', '-').rstrip(']')}.npy",
            _npy(random.integers(0, 2, (20, 30, 3)).astype(kind)),
        )
    for shape in ((), (0,), (5,), (20, 30), (20, 30, 1), (20, 30, 2), (20, 30, 4), (3, 20, 30),
                  (20, 30, 5), (2, 20, 30, 3), (0, 30, 3), (1, 1, 3), (20, 30, 300)):  # fmt: skip
        yield f"shape-{'x'.join(map(str, shape))}.npy", _npy(np.full(shape, 0.5, np.float32))
    for name, value in {"nan": np.nan, "infinite": np.inf, "huge": 1e30, "below": -3.0}.items():
        yield f"value-{name}.npy", _npy(np.full((20, 30, 3), value, np.float32))
    yield "pickled.npy", _npy(np.array([Springing()], dtype=object), allow_pickle=True)
    header = b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f8', 'fortran_order': False, 'shape': "
    yield "claims-all-memory.npy", header + b"(99999, 99999, 99), }".ljust(70 - 53) + b"\n"
    yield "version.npy", b"\x93NUMPY\x09\x00" + bytes(50)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, a=np.zeros((3000, 3000, 3), np.uint8), b=np.zeros(3))
    yield "two.npz", buffer.getvalue()


class Springing:
    """Leaves a file called ``sprung`` in the current folder when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return (open, ("sprung", "w"))


def _npy(values: np.ndarray, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=allow_pickle)
    return buffer.getvalue()


def modes() -> Iterator[tuple[str, bytes]]:
    """Every kind of pixel, all of which are pictures."""
    plain = noise(40, 60)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        yield f"mode-{mode}.png", encoded("png", plain.convert(mode))
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16"):
        source = plain.convert("L") if mode in ("I", "F", "I;16") else plain
        yield f"mode-{mode.replace(';', '-')}.tiff", encoded("tiff", source.convert(mode))
    for mode in ("L", "RGB", "CMYK"):
        yield f"mode-{mode}.jpg", encoded("jpg", plain.convert(mode))
    yield "deep.png", png(4, 4, 16, 2, bytes(4 * (1 + 24)))
    yield "deep-grey.png", png(4, 4, 16, 0, bytes(range(36)))
    for width, height in ((1, 1), (2, 2), (1, 40), (40, 1), (3, 5), (7, 900), (900, 7)):
        yield f"size-{width}x{height}.png", encoded("png", noise(height, width))
    for kind in ("gif", "webp", "png", "tiff"):
        buffer = io.BytesIO()
        plain.save(buffer, kind, save_all=True, append_images=[noise(40, 60, 1), noise(40, 60, 2)])
        yield f"animated.{kind}", buffer.getvalue()
    marked = PngImagePlugin.PngInfo()
    marked.add_text("Comment", "\x1b[31m<b>", zip=True)
    buffer = io.BytesIO()
    plain.save(buffer, "png", pnginfo=marked)
    yield "commented.png", buffer.getvalue()
    buffer = io.BytesIO()
    plain.save(buffer, "jpeg", icc_profile=b"not a profile")
    yield "odd-profile.jpg", buffer.getvalue()


def _turned(folder: Path) -> Iterator[Path]:
    for kind in ("jpg", "png", "webp"):
        for orientation in range(1, 9):
            path = folder / f"exif-{orientation}.{kind}"
            oriented(noise(40, 60), orientation, path)
            yield path
    for value in (0, 9, 65_535):
        exif = Image.Exif()
        exif[0x0112] = value
        path = folder / f"exif-{value}.jpg"
        noise(40, 60).save(path, exif=exif)
        yield path


def _special(folder: Path) -> Iterator[Path]:
    """What a folder may hold that is no file, or no file of its own."""
    places = {name: folder / f"{name}.png" for name in (
        "pipe", "zero-device", "null-device", "folder", "dangling", "itself", "link", "socket",
    )}  # fmt: skip
    os.mkfifo(places["pipe"])
    places["zero-device"].symlink_to("/dev/zero")
    places["null-device"].symlink_to("/dev/null")
    places["folder"].mkdir()
    places["dangling"].symlink_to("nowhere.png")
    places["itself"].symlink_to("itself.png")
    places["link"].symlink_to("exif-1.png")
    with socket.socket(socket.AF_UNIX) as bound:
        here = Path.cwd()
        os.chdir(folder)  # a socket's path may have 108 bytes only
        try:
            bound.bind("socket.png")
        finally:
            os.chdir(here)
    yield from places.values()


GOOD = ("mode-", "size-2", "size-3", "animated", "commented", "odd-profile", "exif-", "name-")
"""What every command must take: names of files that begin like this."""


def write_pictures(folder: Path) -> list[Path]:
    """Makes all of them in a folder, in order of kind."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for make in (cut, flipped, misnamed, bombs, arrays, modes):
        for name, content in make():
            paths.append(folder / name)
            paths[-1].write_bytes(content)
    paths += [*_turned(folder), *_special(folder)]
    for number, name in enumerate(NAMES):
        own = folder / f"name-{number}"
        own.mkdir()
        paths.append(own / name)
        noise(40, 60).save(paths[-1], "png")
    return paths
