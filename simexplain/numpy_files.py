"""NumPy files from anywhere: their headers are looked at before anything is believed."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from simexplain.errors import first_line

MOST_VALUES = 2**30
"""No array of more values is read."""


def stored_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of a ``.npy`` or ``.npz`` file by name; nothing in it is unpickled.

    A small file can claim any size, or hold a zipped array that fills the memory: sizes are
    compared with what is there, and with ``MOST_VALUES``, before an array is made.

    Args:
        path: The file; the array of a ``.npy`` file has the file's name without its ending.

    Raises:
        ValueError: If it is damaged, too large or holds Python objects.
        OSError: If it cannot be read.
    """
    try:
        if path.suffix.lower() == ".npy":
            with path.open("rb") as file:
                _check(file, os.fstat(file.fileno()).st_size)
            return {path.stem: np.load(path, allow_pickle=False)}
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                with archive.open(entry) as member:
                    _check(member, entry.file_size)
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, MemoryError):
        raise
    except Exception as error:  # headers are parsed as Python, members by several libraries
        raise ValueError(first_line(error)) from error


def _check(file: IO[bytes], size: int) -> None:
    """Compares what a header claims with the size of the file."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"it is of version {version[0]}.{version[1]} of the format")
    formats = np.lib.format
    read = formats.read_array_header_1_0 if version == (1, 0) else formats.read_array_header_2_0
    shape, _, kind = read(file)
    count = math.prod(shape)
    if kind.hasobject:
        raise ValueError("it holds pickled Python objects, which are not loaded")
    if count > MOST_VALUES:
        raise ValueError(f"it has the shape {shape}")
    if count * kind.itemsize > size:
        raise ValueError("it is cut off")
