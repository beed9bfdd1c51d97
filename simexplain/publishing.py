"""Results on disk: a folder of files written atomically, and read back safely."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from simexplain.errors import DAMAGED, OutputError, json_text
from simexplain.numpy_files import stored_arrays

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

Result = TypeVar("Result")
SCHEMA = 1
"""Of every manifest."""
_DRAFT = ".simexplain-draft-"
_ABANDONED = 60
"""Seconds after which an unlocked draft is taken for one of a killed run."""


@dataclass(frozen=True)
class Kind:
    """How a type of result lies on the disk.

    Attributes:
        what: What to call it in errors.
        files: The name of each file by its kind, in the order in which they are listed; the
            manifest is the one in JSON, which names all others, and arrays are in the ``.npz``.
        pictures: How the names of its numbered pictures start.
        drawn: The function that draws it, which lies above it: its module and name.
    """

    what: str
    files: Mapping[str, str]
    pictures: tuple[str, ...] = ()
    drawn: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all files of one result that has no numbered ones."""
        return tuple(self.files.values())

    @property
    def manifest(self) -> str:
        """The JSON file that names all others under ``files``."""
        return next(name for name in self.files.values() if name.endswith(".json"))

    @property
    def arrays(self) -> str:
        """The file of arrays; empty where it has none."""
        return next((name for name in self.files.values() if name.endswith(".npz")), "")


KINDS = {
    "Attribution": Kind(
        "attribution",
        {"manifest": "attribution.json", "arrays": "attribution.npz", "table": "nodes.csv",
         "ranking": "ranking.png", "graph": "graph.png"},
        ("graph",), "simexplain.attribution.pictures.draw_graph",
    ),
    "Evaluation": Kind(
        "evaluation",
        {"results": "results.json", "values": "values.csv", "figure": "results.png"},
        (), "simexplain.evaluation.pictures.draw_evaluation",
    ),
    "Explanation": Kind(
        "explanation",
        {"manifest": "explanation.json", "maps": "maps.npz", "figure": "explanation.png"},
        ("heatmap_", "explanation_"), "simexplain.picturing.draw_explanation",
    ),
    "FaithfulnessScores": Kind("measure of faithfulness", {"results": "faithfulness.json"}),
    "Matching": Kind(
        "matching",
        {"manifest": "matching.json", "arrays": "matching.npz", "figure": "matching.png"},
        ("matching",), "simexplain.matching.pictures.draw_matching",
    ),
    "MethodComparison": Kind(
        "comparison of methods",
        {"figure": "comparison.png", "manifest": "comparison.json", "maps": "comparison.npz"},
        (), "simexplain.evaluation.pictures.draw_methods",
    ),
    "PairExplanation": Kind(
        "pair explanation",
        {"manifest": "pair.json", "maps": "pair.npz", "figure": "pair_figure.png"}, ("pair_",),
    ),
    "Reidentification": Kind(
        "evaluation of re-identification",
        {"results": "reid.json", "queries": "queries.csv", "failures": "failures.csv",
         "figure": "failures.png", "arrays": "reid.npz"},
        ("failures",), "simexplain.evaluation.pictures.draw_failures",
    ),
    "Retrieval": Kind(
        "evaluation of retrieval",
        {"results": "retrieval.json", "queries": "queries.csv", "classes": "classes.csv",
         "arrays": "retrieval.npz"},
    ),
    "SanityScores": Kind("sanity check", {"results": "sanity.json"}),
    "SearchResult": Kind(
        "search", {"figure": "search.png", "manifest": "search.json", "arrays": "search.npz"},
        ("search",), "simexplain.searching.search_pictures.draw_search",
    ),
    "Segmentation": Kind(
        "segmentation",
        {"mask": "mask.png", "overlay": "overlay.png", "cutout": "cutout.png",
         "figure": "segmentation.png", "arrays": "segmentation.npz",
         "manifest": "segmentation.json"},
        (), "simexplain.segmentation.pictures.draw_segmentation",
    ),
    "SegmentationScores": Kind(
        "evaluation of segmentation",
        {"scores": "scores.json", "episodes": "episodes.csv", "arrays": "scores.npz"},
    ),
    "TrainResult": Kind("training run", {"results": "results.json"}),
}  # fmt: skip
"""A line for every type of result, by the name of its class."""

_NUMBERED = {
    "batch.json": {
        "heatmaps": re.compile(r"\d{6,}_\d+_(anchor|positive|negative)\.png"),
        "figures": re.compile(r"\d{6,}\.png"),
    },
    "options.json": {"attention": re.compile(r"epoch_\d{3,}\.png")},
}
"""Pictures of batches and of training, by the file that lists them."""


def written_pictures(manifest: Path) -> set[Path]:
    """The pictures that simexplain wrote with a manifest; empty for any other file."""
    folder = manifest.parent
    below = _NUMBERED.get(manifest.name, {})
    if manifest.name not in {kind.manifest for kind in KINDS.values()} and not below:
        return set()
    try:
        metadata = json.loads(manifest.read_text(encoding="utf-8"))
        files = metadata["files"].values() if not below else ()
        names = {Path(name).name for name in files if isinstance(metadata["schema"], int)}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return set()
    pictures = {folder / name for name in names if name.endswith(".png")}
    for inside, pattern in below.items() if "schema" in metadata else ():
        pictures |= {
            path for path in (folder / inside).glob("*.png") if pattern.fullmatch(path.name)
        }
    return pictures


def check_writable(folder: Path, names: Iterable[str], *, force: bool) -> None:
    """Refuses a folder that is a file or, without ``force``, holds any of these names.

    Raises:
        OutputError: If so; the error states what to do.
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
    """The prefix of the files of one of several results; empty for a single one."""
    return "" if count == 1 else f"_{index:04d}"


@contextmanager
def atomic_directory(folder: Path, names: list[str], kind: Kind, *, force: bool) -> Iterator[Path]:
    """Yields an empty folder to write into, whose files are then moved into place atomically.

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
        position = _existing(folder)
        _remove_drafts(position)
        with (
            tempfile.TemporaryDirectory(prefix=_DRAFT, dir=position) as temporary,
            ExitStack() as own,
        ):
            own.enter_context(locked(Path(temporary)))
            draft = Path(temporary) / "draft"
            draft.mkdir()
            yield draft
            _add_digests(draft, names, kind)
            # Another process may have written meanwhile.
            with locked(_existing(folder)):
                check_writable(folder, names, force=force)
                _publish(draft, folder, names, kind)
    except OSError as error:
        raise OutputError(
            f"'{folder}' cannot be written ({error.strerror or error}); choose another folder."
        ) from error


@contextmanager
def atomic_file(path: Path, *, force: bool) -> Iterator[Path]:
    """Yields where to write a file, which is then moved into place at once.

    Args:
        path: Where it goes.
        force: Replace what is there.

    Raises:
        OutputError: If a file is there already, perhaps written by another process meanwhile.
        OSError: If it cannot be written.
    """
    parent = path.absolute().parent
    with tempfile.TemporaryDirectory(prefix=".simexplain-", dir=parent) as temporary:
        draft = Path(temporary) / "draft"
        yield draft
        with locked(parent):
            check_new_file(path, force=force)
            draft.replace(path)


def check_new_file(path: Path, *, force: bool) -> None:
    """Refuses, without ``force``, a file that is there.

    Raises:
        OutputError: If so; the error states what to do.
    """
    if path.exists() and not force:
        raise OutputError(
            f"'{path}' is there already; choose another file or say --force (force=True)."
        )


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds a folder against other processes, which the system lets go of when this one dies.

    Without locks, as on Windows and some network drives, nothing is held.

    Raises:
        BlockingIOError: Without ``wait``, if another process holds it.
    """
    position = None
    try:
        if fcntl is not None:
            with suppress(OSError):  # it may be written and not listed
                position = os.open(folder, os.O_RDONLY)
        if position is not None:
            try:
                fcntl.flock(position, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:
                pass
        yield
    finally:
        if position is not None:
            os.close(position)


def _remove_drafts(position: Path) -> None:
    """Removes what runs that were killed left behind."""
    for old in position.glob(f"{_DRAFT}*"):
        with suppress(OSError):
            if old.is_dir() and time.time() - old.stat().st_mtime > _ABANDONED:
                with locked(old, wait=False):
                    shutil.rmtree(old)


def _add_digests(draft: Path, names: Iterable[str], kind: Kind) -> None:
    """Puts into the manifest the digests that separate its own files from those of another run."""
    others = sorted(set(names) - {kind.manifest})
    if not others:
        return
    manifest = draft / kind.manifest
    metadata = json.loads(manifest.read_text(encoding="utf-8"))
    metadata["digests"] = {name: digest_of(draft / name) for name in others}
    manifest.write_text(json_text(metadata), encoding="utf-8")


def digest_of(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
    # The manifest goes last: while it is the old one, it names files that all exist. The arrays go
    # first: stopped in between, their digest shows that the files are of two runs.
    for name in sorted(names, key=lambda name: (name == kind.manifest) - (name == kind.arrays)):
        (draft / name).replace(folder / name)
    for name in stale:
        (folder / name).unlink(missing_ok=True)


def _earlier_files(folder: Path, kind: Kind) -> set[str]:
    """The pictures that an earlier manifest in the folder claims as its own."""
    try:
        manifest = json.loads((folder / kind.manifest).read_text(encoding="utf-8"))
        names = {Path(name).name for name in manifest["files"].values()}
        if "digests" in manifest:  # a forged manifest may name pictures of the user's
            own = {n: folder / n for n in names if (folder / n).is_file()}
            names = {n for n, path in own.items() if manifest["digests"].get(n) == digest_of(path)}
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
        manifest = json.loads((folder / kind.manifest).read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA:
            raise OutputError(
                f"'{folder}' was written in schema {manifest['schema']}, but this version reads "
                f"schema {SCHEMA}; use a matching version of simexplain."
            )
        return restored(manifest, _arrays_of(folder, kind, manifest) if kind.arrays else {})
    except FileNotFoundError as error:
        raise OutputError(
            f"'{folder}' holds no {kind.what}: {error.filename} is missing."
        ) from error
    except (OSError, *DAMAGED) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"The {kind.what} in '{folder}' is damaged ({error}); make it again."
        ) from error


def _arrays_of(folder: Path, kind: Kind, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays that belong to a manifest; none where an earlier version wrote none."""
    # However the paths were written.
    names = {path.replace("\\", "/").rpartition("/")[2] for path in manifest["files"].values()}
    if not (folder / kind.arrays).exists() and kind.arrays not in names:
        return {}
    arrays = stored_arrays(folder / kind.arrays)
    known = manifest.get("digests", {}).get(kind.arrays)  # earlier versions wrote none
    if known is not None and known != digest_of(folder / kind.arrays):
        raise OutputError(
            f"'{folder}' holds files of two runs, since one was stopped while it replaced "
            f"another, or '{kind.arrays}' was changed; make the {kind.what} again with --force "
            "(force=True)."
        )
    return arrays
