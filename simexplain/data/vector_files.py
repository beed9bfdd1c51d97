"""Vectors in files: embeddings, directions and rows of an index that others computed."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simexplain.errors import ComparisonError, missing

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
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
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
    if ending == ".npy":
        return {path.stem: np.load(path, allow_pickle=False)}
    if ending == ".npz":
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
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
