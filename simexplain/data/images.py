"""Reading pictures of any common kind as plain RGB, with a note of what was changed."""

from __future__ import annotations

import re
import struct
import threading
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from simexplain.data.arrays import (
    as_rgb,
    bands_last,
    bands_of,
    check_no_pipe,
    is_banded,
    read_bands,
)
from simexplain.errors import ImageError, missing

if TYPE_CHECKING:
    from torch import Tensor

_RULE = ("ignore", None, Warning, re.compile(r"PIL(\.|$)"), 0)
_LOCK = threading.Lock()
_inside = 0
_changed: list[list[Any]] = []


@contextmanager
def pillow_quiet() -> Iterator[None]:
    """Silences warnings that Pillow gives, of damaged metadata for example.

    ``warnings.catch_warnings`` saves and restores the filters of the whole process: where two
    threads do so at a time, the last to leave may restore what the other had set, for good. Here
    one rule, of Pillow's modules alone, is put in by the first thread that comes and taken out by
    the last that leaves, of every list of filters that was in use meanwhile.
    """
    global _inside
    with _LOCK:
        _inside += 1
        present = _filters()
        # Nothing but a rule is added, and what is ignored is never remembered by Python, so that
        # its caches of earlier decisions need no renewal.
        if _RULE not in present:
            present.insert(0, _RULE)
            if not any(known is present for known in _changed):
                _changed.append(present)
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            # A caller's own catch_warnings copies the list.
            for filters in (*_changed, _filters()) if not _inside else ():
                while _RULE in filters:
                    filters.remove(_RULE)
            if not _inside:
                _changed.clear()


def _filters() -> list[Any]:
    return warnings.filters  # type: ignore[return-value]


Taken = TypeVar("Taken")

_WHITE = (255, 255, 255, 255)
_DEEP_MODES = ("I", "F")
_NOT_READ = ("EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF")
DAMAGE = (OSError, RuntimeError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
DAMAGED_PICTURE = (*DAMAGE, Image.DecompressionBombError)
LARGE = 2**25
"""Pixels from which a picture of a file is not held in memory, but read again when it is used."""
_ROWS = 256
_ORIENTATION = 0x0112
MOST_SCANS = 100
"""Of a JPEG; encoders write about ten, and each takes as long as decoding the whole picture."""
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SCAN, _END, _ALONE = 0xDA, 0xD9, (0xD8, 0x01)


@dataclass(frozen=True)
class Picture:
    """A picture as it looks on a screen.

    Attributes:
        path: Where it came from, as the user wrote it; ``image 1`` or the like for pictures from
            memory.
        image: Upright RGB, 8 bits a channel.
        notes: What had to be changed, for the user to read.
        bands: The values ``(H,W,C)``, float32, of a picture that is more or other than RGB: an
            array from a file or a TIFF of many bands. ``image`` is then a view of it.
    """

    path: str
    image: Image.Image
    notes: tuple[str, ...] = ()
    bands: NDArray[np.float32] | None = None

    @property
    def pixels(self) -> Image.Image | NDArray[np.float32]:
        """What a network sees: the bands where there are any, else the image."""
        return self.image if self.bands is None else self.bands


class LargePicture(Picture):
    """A picture of a file whose pixels are read again whenever they are used.

    A hundred million pixels take 400 MB, so that the pictures of a comparison and what is made of
    them would not fit. What reading gave is there for the first use; then the open file stands for
    them, also where it is removed or replaced by another.
    """

    def __init__(self, name: str, image: Image.Image, notes: tuple[str, ...], file: BinaryIO):
        fields = {"path": name, "notes": notes, "bands": None, "_file": file, "_fresh": image}
        for key, value in {**fields, "_size": image.size, "_turn": threading.Lock()}.items():
            object.__setattr__(self, key, value)
        weakref.finalize(self, file.close)

    @property
    def image(self) -> Image.Image:
        """As of :class:`Picture`, a new one each time.

        Raises:
            ImageError: If the file was changed meanwhile.
        """
        values = vars(self)
        with values["_turn"], _reasons(self.path):
            fresh: Image.Image | None
            fresh, values["_fresh"] = values["_fresh"], None
            if fresh is not None:
                return fresh
            values["_file"].seek(0)
            with pillow_quiet(), Image.open(values["_file"], formats=_formats()) as opened:
                image = _read(self.path, opened).image
            if image.size != values["_size"]:
                raise ValueError("it was changed while it was in use")
            return image

    def __reduce__(self) -> tuple[Any, ...]:
        return Picture, (self.path, self.image, self.notes)


PictureSource = str | Path | Image.Image | NDArray[Any] | Picture
"""What verbs on pictures take: a file, a picture of PIL, or an array."""


def read_pictures(sources: Sequence[PictureSource | Tensor]) -> list[Picture]:
    """Several pictures; those without a path are called ``image 1`` and so on, by their place.

    Raises:
        ImageError: As for :func:`read_picture`; also if one of them is a tensor.
    """
    named: list[Any] = list(sources)
    return [_picture(one, f"image {index + 1}") for index, one in enumerate(named)]


def read_picture(path: PictureSource, name: str = "image 1") -> Picture:
    """Reads a picture file, or takes a picture from memory, which is left as it is.

    EXIF rotation is applied, transparency is laid on white, CMYK, palette, grey and 16-bit
    pictures become 8-bit RGB, and of an animation the first frame is taken, with a note. Arrays
    and TIFF files of many bands keep their bands (:func:`read_bands`).

    Args:
        path: Any format that Pillow reads, up to 178 million pixels (twice
            ``PIL.Image.MAX_IMAGE_PIXELS``); ``.npy``, ``.npz``. Or a picture of PIL, of an
            animation its present frame. Or an array ``(H,W)``, ``(H,W,C)``
            or ``(C,H,W)``: grey, RGB or RGBA of 8 bits as such a picture, others as bands, floats
            in [0, 1].
        name: What to call a picture without a path.

    Raises:
        ImageError: If the file is missing, not a picture, cut off or too large, or the source is
            not a picture.
    """
    return _picture(path, name)


def _picture(path: PictureSource, name: str) -> Picture:
    if not isinstance(path, (str, Path)):
        return _in_memory(path, name)
    if is_banded(path):
        bands, notes = read_bands(path)
        return Picture(str(path), Image.fromarray(as_rgb(bands)), notes, bands)
    return _taken(path, partial(_kept, Path(path)))


def read_pages(path: str | Path) -> list[Picture]:
    """Reads every frame of an animation or page of a file; see :func:`read_picture`.

    Their paths end with ``#1``, ``#2`` and so on.

    Raises:
        ImageError: As for :func:`read_picture`.
    """
    if is_banded(path):
        return [read_picture(path)]
    return _taken(path, _pages)


@contextmanager
def opened_picture(path: str | Path) -> Iterator[Image.Image]:
    """A picture file as Pillow has it, quietly; Pillow warns of damaged metadata, for instance.

    Raises:
        ImageError: If it is a pipe or a device, which might never end.
        Exception: Whatever Pillow raises.
    """
    check_no_pipe(Path(path))
    with pillow_quiet(), Image.open(path, formats=_formats()) as opened:
        if opened.format in ("JPEG", "MPO"):
            with (
                Path(path).open("rb") as file,
                mmap(file.fileno(), 0, access=ACCESS_READ) as all_of,
            ):
                check_scans(str(path), all_of)
        yield opened


def check_scans(name: str, content: bytes | mmap) -> None:
    """Refuses a JPEG of so many scans that a small file would take minutes.

    Raises:
        ImageError: If it is one.
    """
    count, position = 0, 2
    while count <= MOST_SCANS and (found := _MARKER.search(content, position)):
        position, code = found.end(), content[found.end() - 1]
        if code == _END:
            break
        if code not in _ALONE:
            count += code == _SCAN
            position += max(2, int.from_bytes(content[position : position + 2], "big"))
    if count > MOST_SCANS:
        raise ImageError(
            f"'{name}' is a JPEG of more than {MOST_SCANS} scans, which would take very long to "
            "decode; save it again."
        )


def _taken(path: str | Path, take: Callable[[str, Image.Image], Taken]) -> Taken:
    """What is taken out of an open picture file."""
    name = str(path)
    if not name:
        raise ImageError("Expected a picture, got an empty name; give the path of a file.")
    # Pillow warns from 89 million pixels and refuses twice that.
    with _reasons(name), opened_picture(path) as opened:
        return take(name, opened)


@contextmanager
def _reasons(name: str) -> Iterator[None]:
    """Whatever Pillow raises becomes one sentence on the picture of this name."""
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(missing(name, f"There is no file '{name}'; check the path.")) from error
    except IsADirectoryError as error:
        raise ImageError(f"Expected a picture, but '{name}' is a folder.") from error
    except PermissionError as error:
        raise ImageError(f"'{name}' may not be read; check its permissions.") from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"'{name}' is not a picture in a format that can be read; save it as PNG or JPEG."
        ) from error
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 10**6
        raise ImageError(
            f"'{name}' has more than {int(most) if most > 10 else most} million pixels; reduce it, "
            "or allow more with SIMEXPLAIN_MAX_MEGAPIXELS in the environment."
        ) from error
    except DAMAGE as error:
        raise ImageError(
            f"'{name}' is damaged or cut off ({error}); export or download it again."
        ) from error


def _in_memory(given: Image.Image | NDArray[Any] | Picture, name: str) -> Picture:
    if isinstance(given, Picture):
        return given
    try:
        if isinstance(given, Image.Image):
            return _upright(name, given.copy(), ())
        if isinstance(given, np.ndarray):
            return _of_array(name, given)
    except (*DAMAGE, AssertionError, AttributeError) as error:  # Pillow, of a closed file
        raise ImageError(f"'{name}' cannot be read ({error}); open or make it again.") from error
    raise ImageError(
        f"Expected a path, a picture of PIL or an array for '{name}', got {type(given).__name__}; "
        "preprocessed tensors are for the verbs without 'files' in their names."
    )


def _of_array(name: str, values: NDArray[Any]) -> Picture:
    pixels = bands_last(name, values)
    if pixels.dtype == np.uint8 and pixels.shape[2] in (1, 3, 4):
        plain = pixels[..., 0] if pixels.shape[2] == 1 else pixels
        return Picture(name, _on_white(Image.fromarray(np.ascontiguousarray(plain))))
    # 8-bit values of another type: 2 and more are not overshoot.
    whole = pixels.max() >= 2 and (pixels == np.round(pixels)).all()
    if pixels.dtype.kind == "f" and pixels.shape[2] == 3 and whole:
        raise ImageError(
            f"Expected floats in [0, 1] in '{name}', got whole numbers up to {pixels.max():g}; "
            "give them as 8 bits (astype('uint8')), or divide them by 255."
        )
    bands, notes = bands_of(name, values)
    return Picture(name, Image.fromarray(as_rgb(bands)), notes, bands)


def _kept(path: Path, name: str, opened: Image.Image) -> Picture:
    """A picture, of which large ones are not held in memory."""
    file = path.open("rb") if opened.width * opened.height >= LARGE else None
    picture = _read(name, opened)
    return picture if file is None else LargePicture(name, picture.image, picture.notes, file)


def _read(name: str, opened: Image.Image) -> Picture:
    frames = getattr(opened, "n_frames", 1)
    if frames == 1:
        opened.load()
        return _upright(name, opened, ())
    note = f"'{name}' has {frames} frames; the first one is used."
    return _page(name, opened, 0, (note,))


def _pages(name: str, opened: Image.Image) -> list[Picture]:
    count = getattr(opened, "n_frames", 1)
    if count == 1:
        return [_read(name, opened)]
    return [_page(f"{name}#{number + 1}", opened, number, ()) for number in range(count)]


def _page(name: str, opened: Image.Image, number: int, notes: tuple[str, ...]) -> Picture:
    """One of several, as an image of its own."""
    opened.seek(number)
    opened.load()
    picture = _upright(name, opened, notes)
    return replace(picture, image=picture.image.copy()) if picture.image is opened else picture


def _upright(name: str, image: Image.Image, notes: tuple[str, ...]) -> Picture:
    """A loaded picture, which may be kept, as RGB."""
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(_DEEP_MODES):
        hidden = image.info.get("transparency")
        image, note = _to_8_bits(image, hidden if isinstance(hidden, int) else None)
        notes = (*notes, f"'{name}' {note}")
    return Picture(name, _on_white(image), notes)


def in_strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Some rows of a picture at a time, with the number of the first of them."""
    for top in range(0, image.height, _ROWS):
        yield top, image.crop((0, top, image.width, min(top + _ROWS, image.height)))


def pixels_of(image: Image.Image) -> NDArray[np.uint8]:
    """An RGB picture as an array ``(H,W,3)`` of its own."""
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    for top, part in in_strips(image):  # NumPy would hold it twice on the way
        pixels[top : top + part.height] = np.asarray(part)
    return pixels


def _on_white(image: Image.Image) -> Image.Image:
    if not set("Aa") & set(image.getbands()) and "transparency" not in image.info:
        return image if image.mode == "RGB" else image.convert("RGB")
    whole = Image.new("RGB", image.size)
    for top, part in in_strips(image):
        rgba = part.convert("RGBA")
        white = Image.new("RGBA", rgba.size, _WHITE)
        whole.paste(Image.alpha_composite(white, rgba).convert("RGB"), (0, top))
    return whole


def _formats() -> list[str]:
    """Everything that Pillow reads by itself.

    EPS would be handed to another program, of the others it reads the header alone.
    """
    Image.init()
    return [name for name in Image.OPEN if name not in _NOT_READ]


@cache
def endings() -> frozenset[str]:
    """The endings of picture files that can be read, such as ``.jpg``, in small letters."""
    readable = set(_formats())
    known = Image.registered_extensions() | {".mpo": "JPEG"}  # its reader finds that there are more
    return frozenset(end for end, kind in known.items() if kind in readable)


def is_picture(path: Path) -> bool:
    """Whether a file is a picture by its ending or, where it has none, by its content."""
    if path.suffix:
        return path.suffix.lower() in endings()
    try:
        with opened_picture(path):
            return True
    except DAMAGED_PICTURE:
        return False


def _to_8_bits(image: Image.Image, hidden: int | None) -> tuple[Image.Image, str]:
    """Deep grey pictures as 8-bit grey: black is 0 or their minimum below it, white their maximum.

    White is at least 255 for integers and 1 for floats, so that dark pictures stay dark. The value
    ``hidden``, if any, is transparent and becomes white.
    """
    low, high = 0.0, 1.0 if image.mode == "F" else 255.0
    for _, values, transparent in _deep_strips(image, hidden):
        if not np.isfinite(values).all():
            raise ValueError("it holds values that are not finite")
        seen = values[~transparent]
        low, high = float(seen.min(initial=low)), float(seen.max(initial=high))
    grey = Image.new("L", image.size)
    for top, values, transparent in _deep_strips(image, hidden):
        levels = np.round(((values - low) / (high - low)).clip(0, 1) * 255)
        levels[transparent] = 255
        grey.paste(Image.fromarray(levels.astype(np.uint8)), (0, top))
    return grey, f"has deep grey values; {low:g} to {high:g} became 8 bits."


def _deep_strips(
    image: Image.Image, hidden: int | None
) -> Iterator[tuple[int, NDArray[np.float64], NDArray[np.bool_]]]:
    for top, part in in_strips(image):
        values = np.asarray(part).astype(np.float64)
        yield top, values, values == hidden if hidden is not None else np.zeros(values.shape, bool)
