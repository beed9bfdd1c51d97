"""Results on disk: a folder of files written whole or not at all, and read back safely."""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from simexplain.errors import DAMAGED, OutputError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Kind:
    """A kind of result.

    Attributes:
        what: What to call it in errors.
        manifest: The JSON file that names all others under ``files``.
        arrays: The ``.npz`` file.
        pictures: How the names of its numbered pictures start.
        schema: Of the manifest.
    """

    what: str
    manifest: str
    arrays: str
    pictures: tuple[str, ...]
    schema: int


MANIFESTS = (
    "explanation.json", "pair.json", "attribution.json", "matching.json", "search.json",
    "segmentation.json", "comparison.json", "results.json", "reid.json",
)  # fmt: skip
"""Files that name the pictures of a result beside them."""

_NUMBERED = {
    "batch.json": {
        "heatmaps": re.compile(r"\d{6,}_\d+_(anchor|positive|negative)\.png"),
        "figures": re.compile(r"\d{6,}\.png"),
    },
    "options.json": {"attention": re.compile(r"epoch_\d{3,}\.png")},
}
"""Pictures of batches and of training, by the file that tells of them."""


def written_pictures(manifest: Path) -> set[Path]:
    """The pictures that simexplain wrote with a manifest; empty for any other file."""
    folder = manifest.parent
    below = _NUMBERED.get(manifest.name, {})
    if manifest.name not in MANIFESTS and not below:
        return set()
    try:
        said = json.loads(manifest.read_text(encoding="utf-8"))
        files = said["files"].values() if not below else ()
        names = {Path(name).name for name in files if isinstance(said["schema"], int)}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return set()
    found = {folder / name for name in names if name.endswith(".png")}
    for inside, pattern in below.items() if "schema" in said else ():
        found |= {path for path in (folder / inside).glob("*.png") if pattern.fullmatch(path.name)}
    return found


def check_writable(folder: Path, names: Iterable[str], *, force: bool) -> None:
    """Refuses a folder that is a file or, without ``force``, holds any of these names.

    Raises:
        OutputError: If so; says what to do.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"Expected a folder for the results, but '{folder}' is a file.")
    there = [name for name in names if (folder / name).exists()]
    blocked = [name for name in there if (folder / name).is_dir()]
    if blocked:
        raise OutputError(
            f"'{folder / blocked[0]}' is a folder where a file must go; choose another folder."
        )
    if there and not force:
        raise OutputError(
            f"'{folder / there[0]}' is there already; choose another folder or say --force "
            "(force=True) to replace it."
        )


def numbered(index: int, count: int) -> str:
    """What tells the files of one of several results apart; nothing where there is only one."""
    return "" if count == 1 else f"_{index:04d}"


@contextmanager
def published(folder: Path, names: list[str], kind: Kind, *, force: bool) -> Iterator[Path]:
    """Gives an empty folder to write into; afterwards its files are in place, all or none.

    Args:
        folder: Where they go; made if missing.
        names: The files that will be written.
        kind: What they are.
        force: Replace the files of an earlier result of that kind; others stay.

    Raises:
        OutputError: If files are there already, or the folder cannot be written.
    """
    check_writable(folder, names, force=force)
    try:
        with tempfile.TemporaryDirectory(prefix=".simexplain-", dir=_existing(folder)) as temporary:
            draft = Path(temporary) / "draft"
            draft.mkdir()
            yield draft
            _publish(draft, folder, names, kind)
    except OSError as error:
        raise OutputError(
            f"'{folder}' cannot be written ({error.strerror or error}); choose another folder."
        ) from error


def _existing(folder: Path) -> Path:
    """The nearest folder above that exists: the draft lies on the same disk as the result."""
    parent = folder.absolute()
    while not parent.is_dir():
        parent = parent.parent
    return parent


def _publish(draft: Path, folder: Path, names: list[str], kind: Kind) -> None:
    """Moves the finished files into place: at once into a new folder, else one by one."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft.replace(folder)
        return
    stale = _earlier_files(folder, kind) - set(names)
    # The manifest goes last: while it is the old one, it names files that all exist.
    for name in sorted(names, key=lambda name: name == kind.manifest):
        (draft / name).replace(folder / name)
    for name in stale:
        (folder / name).unlink(missing_ok=True)


def _earlier_files(folder: Path, kind: Kind) -> set[str]:
    """The pictures that an earlier manifest in the folder claims as its own."""
    try:
        files = json.loads((folder / kind.manifest).read_text(encoding="utf-8"))["files"]
        names = {Path(name).name for name in files.values()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return set()
    return {n for n in names if n.startswith(kind.pictures) and n.endswith(".png")}


def read_back(
    folder: Path, kind: Kind, restored: Callable[[dict[str, Any], dict[str, Any]], Result]
) -> Result:
    """Makes a result again from the manifest and the arrays in a folder; no code in it is run.

    Raises:
        OutputError: If the folder holds none, a damaged one, or one of another version.
    """
    try:
        said = json.loads((folder / kind.manifest).read_text(encoding="utf-8"))
        if said["schema"] != kind.schema:
            raise OutputError(
                f"'{folder}' was written in schema {said['schema']}, but this version reads "
                f"schema {kind.schema}; use a matching version of simexplain."
            )
        with np.load(folder / kind.arrays, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        return restored(said, arrays)
    except FileNotFoundError as error:
        raise OutputError(
            f"'{folder}' holds no {kind.what}: {error.filename} is missing."
        ) from error
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, *DAMAGED) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"The {kind.what} in '{folder}' is damaged ({error}); make it again."
        ) from error
