"""Whether a file has all that an index must have, and where its pictures are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from simexplain.errors import OutputError
from simexplain.searching.index_embedding import LEVELS, PARTS, IndexSpec

_DIMENSIONS = {
    PARTS: {"parts": 4, "rest": 2, "scales": 1, "lengths": 1, "residuals": 1},
    LEVELS: {"level_scales": 2},
}


def check_columns(keeping: IndexSpec, tensors: Mapping[str, Tensor], count: int) -> None:
    """Whether a file has all columns for as many pictures, of the right kind.

    Raises:
        ValueError: If not.
        KeyError: If one is missing.
    """
    wanted = {"embeddings": 2, "sizes": 2, "stats": 2, "digests": 2}
    for name, dimensions in {**wanted, **_DIMENSIONS.get(keeping.kind, {})}.items():
        if tensors[name].dim() != dimensions or len(tensors[name]) != count or count == 0:
            raise ValueError(f"its column '{name}' does not fit")
    if tensors["probe"].shape != tensors["embeddings"].shape[1:]:
        raise ValueError("its column 'probe' does not fit")


def root_of(path: Path, recorded: str, relative: str, given: str | Path | None) -> Path:
    """The folder of the pictures; the recorded one unless the other is all that is there.

    Args:
        path: The index.
        recorded: Where it was, absolute.
        relative: The same as seen from the index; may be empty.
        given: What the caller states, which takes precedence.

    Raises:
        OutputError: If that is not a folder.
    """
    if given is not None:
        if not Path(given).is_dir():
            raise OutputError(f"There is no folder '{given}' for the pictures of '{path}'.")
        return Path(given)
    beside = Path(os.path.normpath(path.absolute().parent / relative)) if relative else None
    if not Path(recorded).is_dir() and beside is not None and beside.is_dir():
        return beside
    return Path(recorded)
