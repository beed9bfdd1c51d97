"""Arrays instead of RGB pictures: grey networks, many bands, and vectors that others computed."""

from __future__ import annotations

import json
import logging
import math
import stat
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from simexplain.errors import ComparisonError, ImageError, SimexplainError, first_line, missing
from simexplain.numpy_files import MOST_VALUES, stored_arrays

ARRAYS = (".npy", ".npz")
_TIFF = (".tif", ".tiff")
_MOST_BANDS = 1024
_LOW, _HIGH = 2, 98
"""Percentiles between which bands of unknown range are drawn."""
_SAMPLES_PER_PIXEL = 277


def check_no_pipe(
    path: Path, what: str = "picture", error: type[SimexplainError] = ImageError
) -> None:
    """Refuses what is neither a file nor a folder: reading a pipe or a device might never end.

    Raises:
        SimexplainError: Of the type ``error``, if it is one.
        OSError: If there is nothing of that name.
    """
    kind = path.stat().st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise error(
            f"Expected a {what} file, but '{path}' is a pipe or a device; save what comes out of "
            "it as a file."
        )


def is_banded(path: str | Path) -> bool:
    """Whether a file holds bands rather than a picture as Pillow has it: arrays, TIFFs of many."""
    ending = Path(str(path)).suffix.lower()
    if ending in _TIFF:
        return _samples(Path(path)) > 4
    return ending in ARRAYS


def read_bands(path: str | Path) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """The bands ``(H,W,C)``, float32, and notes for the user; no code in the file is ever run.

    Whole numbers of 8 and 16 bits become [0, 1]; floats stay as they are. Arrays are ``(H,W)``,
    ``(H,W,C)`` or ``(C,H,W)``: the shorter end is that of the bands.

    Raises:
        ImageError: If the file is missing, damaged, or no such array.
    """
    path = Path(path)
    if not path.exists():
        raise ImageError(f"There is no file '{path}'; check the path.")
    check_no_pipe(path)
    try:
        values = _read(path)
    except (OSError, ValueError) as error:
        raise ImageError(
            f"'{path}' cannot be read as bands ({error}); save (H,W), (H,W,C) or (C,H,W) again."
        ) from error
    return bands_of(str(path), values)


def bands_of(name: str, values: NDArray[Any]) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """As :func:`read_bands`, of an array in memory, which is left as it is.

    Raises:
        ImageError: If it is not such an array.
    """
    values = bands_last(name, values)
    top = {"u1": 255.0, "u2": 65535.0}.get(values.dtype.str[1:])
    if not np.isfinite(values).all():
        raise ImageError(f"'{name}' holds values that are not finite; fill or mask them.")
    bands = values.astype(np.float32)
    if top is None:
        return bands, ()
    deep = (f"'{name}' has 16-bit values; 0 to 65535 became 0 to 1.",) if top > 255 else ()
    return bands / np.float32(top), deep


def fitting_bands(image: Image.Image | NDArray[np.float32], channels: int) -> NDArray[np.float32]:
    """What a network of this many channels sees of a picture, ``(H,W,channels)``.

    RGB becomes grey for one channel, one band three alike for three.

    Raises:
        ImageError: If the picture has another number of bands.
    """
    bands: NDArray[np.float32]
    if isinstance(image, Image.Image):
        kind = "L" if channels == 1 else "RGB"
        values: NDArray[np.float32] = np.asarray(image.convert(kind)).astype(np.float32)
        bands = (values[..., None] if channels == 1 else values) / np.float32(255)
    elif image.shape[2] == 1 and channels == 3:
        bands = np.concatenate((image, image, image), axis=2)
    elif image.shape[2] == 3 and channels == 1:
        weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # as Pillow's mode L has them
        bands = np.asarray((image * weights).sum(axis=2, keepdims=True), dtype=np.float32)
    else:
        bands = image
    if bands.shape[2] != channels:
        raise ImageError(
            f"Expected a picture of {channels} channels as the network takes, got "
            f"{bands.shape[2]}; give a file with {channels} bands (.npy, .npz or TIFF)."
        )
    return bands


def as_rgb(bands: NDArray[np.float32], shown: tuple[int, ...] = ()) -> NDArray[np.uint8]:
    """Bands ``(H,W,C)`` as RGB ``(H,W,3)`` to look at.

    One is drawn as grey, of two or more the first three or those in ``shown``. Values of one or
    three bands in [0, 1] are taken as they are; all others are stretched between percentiles.
    """
    count = bands.shape[2]
    chosen = list(shown) or [min(index, count - 1) for index in range(3)]
    picked = bands[..., chosen].astype(np.float64)
    # Rounding and what antialiasing overshoots are not another range.
    if count not in (1, 3) or float(np.abs(picked - picked.clip(0, 1)).max()) >= 0.01:
        low, high = np.percentile(picked, (_LOW, _HIGH), axis=(0, 1))
        picked = (picked - low) / np.where(high > low, high - low, 1)
    rgb: NDArray[np.uint8] = np.round(picked.clip(0, 1) * 255).astype(np.uint8)
    return rgb


def _read(path: Path) -> NDArray[Any]:
    if path.suffix.lower() in (".npy", ".npz"):
        arrays = list(stored_arrays(path).values())
        if len(arrays) != 1:
            raise ValueError(f"it holds {len(arrays)} arrays instead of one")
        return arrays[0]
    try:
        import tifffile
    except ImportError as error:
        raise ImageError(
            f"'{path}' is a TIFF of many bands, which needs tifffile: "
            "pip install 'simexplain[tiff]'; or save it as .npy."
        ) from error
    log = logging.getLogger("tifffile")  # damage is reported by the error, not by its log
    quiet, log.disabled = log.disabled, True
    try:
        with tifffile.TiffFile(path) as file:
            page: Any = file.pages[0]
            series: Any = file.series[0]
            if not 0 < math.prod(series.shape) <= MOST_VALUES or page.imagelength < 1:
                raise ValueError(f"it has the shape {series.shape}")
            return np.asarray(series.asarray())
    except Exception as error:  # tifffile raises a dozen classes over damaged files
        raise ValueError(first_line(error)) from error
    finally:
        log.disabled = quiet


def bands_last(path: str, values: NDArray[Any]) -> NDArray[Any]:
    """An array ``(H,W)``, ``(H,W,C)`` or ``(C,H,W)`` as ``(H,W,C)``.

    Raises:
        ImageError: If it has another shape or holds no numbers.
    """
    if values.dtype.kind not in "fiu" or values.ndim not in (2, 3) or not values.size:
        raise ImageError(
            f"Expected numbers of shape (H,W), (H,W,C) or (C,H,W) in '{path}', got "
            f"{values.shape} of {values.dtype}."
        )
    if values.ndim == 2:
        return values[..., None]
    bands = np.moveaxis(values, 0, -1) if values.shape[0] < values.shape[2] else values
    if bands.shape[2] > _MOST_BANDS:
        raise ImageError(
            f"Expected at most {_MOST_BANDS} bands in '{path}', got {values.shape}; is one axis "
            "that of the bands?"
        )
    return bands


def _samples(path: Path) -> int:
    """How many bands a TIFF has by its own word; 0 where it cannot be read."""
    try:
        check_no_pipe(path)
        with path.open("rb") as file:
            head = file.read(8)
            order = {b"II": "<", b"MM": ">"}.get(head[:2], "")
            if not order or struct.unpack(order + "H", head[2:4])[0] != 42:
                return 0
            file.seek(struct.unpack(order + "I", head[4:8])[0])
            count = struct.unpack(order + "H", file.read(2))[0]
            for _ in range(count):
                tag, _kind, _count, value, _ = struct.unpack(order + "HHIHH", file.read(12))
                if tag == _SAMPLES_PER_PIXEL:
                    return int(value)
    except (OSError, ImageError, struct.error):
        return 0
    return 0


ENDINGS = (".npy", ".npz", ".safetensors", ".json")


def read_vectors(path: str | Path) -> dict[str, Tensor]:
    """The vectors ``(E,)``, float32, in a file, by name; no code in it is ever run.

    ``.npy`` and ``.json`` hold one vector or a list of them; ``.npz``, ``.safetensors`` and a JSON
    object hold such by name. Unnamed ones are called after the file, numbered from 0 where there
    are several.

    Raises:
        ComparisonError: If the file cannot be read, holds no vector, or one that is zero or not
            finite.
    """
    path = Path(path)
    if not path.is_file():
        raise ComparisonError(
            missing(path, f"There is no file '{path}' with a vector; check the path.")
        )
    try:
        arrays = _arrays(path)
        vectors = dict(pair for name, array in arrays.items() for pair in _rows(name, array))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ComparisonError(
            f"'{path}' does not hold vectors of numbers ({error}); write (E,) or (N,E) as "
            f"{', '.join(ENDINGS)}."
        ) from error
    if not vectors:
        raise ComparisonError(f"'{path}' holds no vector; write one with E numbers into it.")
    for name, vector in vectors.items():
        if not bool(vector.isfinite().all()) or not bool((vector != 0).any()):
            what = "zero" if bool(vector.isfinite().all()) else "not finite"
            raise ComparisonError(
                f"Vector '{name}' in '{path}' is {what}, so its similarity is undefined; write "
                "another one."
            )
    return vectors


def _arrays(path: Path) -> dict[str, Any]:
    ending = path.suffix.lower()
    if ending in (".npy", ".npz"):
        return stored_arrays(path)
    if ending == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return {name: one.float().numpy() for name, one in load_file(path).items()}
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    if ending == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {path.stem: content}
    raise ValueError(f"its name ends in '{ending}'")


def _rows(name: str, array: Any) -> list[tuple[str, Tensor]]:
    """The vectors of one array with their names."""
    values = np.asarray(array)
    if values.dtype.kind not in "fiu":
        raise ValueError(f"'{name}' is of type {values.dtype}")
    if values.ndim not in (1, 2) or not values.size:
        raise ValueError(f"'{name}' has the shape {values.shape}")
    rows = torch.from_numpy(np.atleast_2d(values).astype(np.float32))
    if len(rows) == 1:
        return [(name, rows[0])]
    return [(f"{name}[{number}]", row) for number, row in enumerate(rows)]
