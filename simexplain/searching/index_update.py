"""What has to be done for an index, and how its finished parts become the file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simexplain.data.folders import StageProgress
from simexplain.errors import ImageError
from simexplain.explanation import versions
from simexplain.models.base import SimilarityModel
from simexplain.searching.index_embedding import IndexSpec, Stat, absolute, digest_of
from simexplain.searching.index_file import (
    SCHEMA,
    Column,
    IndexWork,
    Part,
    SourceRows,
    gathered,
    packed_texts,
)
from simexplain.searching.index_gallery import Changes, GalleryIndex, open_index
from simexplain.searching.index_models import Identity, distance_name_of


@dataclass(frozen=True)
class IndexConfig:
    """How the rows of an index come to be.

    ``distance`` is the model's by name, empty for one of its own; ``width`` is that of a common
    basis that is still to be found.
    """

    identity: Identity
    keeping: IndexSpec
    distance: str
    width: int | None = None

    @classmethod
    def of(cls, model: SimilarityModel, keeping: IndexSpec, width: int | None) -> IndexConfig:
        """For a new index."""
        identity = Identity.of(model)
        return cls(identity, keeping, distance_name_of(model, len(identity.probe)), width)

    @classmethod
    def again(cls, old: GalleryIndex) -> IndexConfig:
        """As an index was made."""
        return cls(old.identity, old.keeping, old.distance_name)

    @property
    def key(self) -> str:
        """Equal for rows that may stand in one index."""
        settings = {**self.to_json(), "width": self.width, "schema": SCHEMA}
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
        if self.keeping.basis is not None:
            digest.update(self.keeping.basis.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The metadata of an index, without tensors."""
        return {
            "model": self.identity.name,
            "weights": self.identity.weights,
            "preprocess": self.identity.preprocess.to_json(),
            "keeping": self.keeping.to_json(),
            "distance": self.distance,
        }


@dataclass(frozen=True)
class UpdatePlan:
    """Which pictures an index shall have, and from where.

    Attributes:
        root: The folder they are in.
        paths: Absolute, in the order of the index.
        stats: The file system's present entry of each.
        old: The index that is brought up to date, if any.
        kept: Places in the old index of pictures that have not changed.
        known: Places in the old index of all pictures, by the path that they have now.
        broken: Pictures outside those given that could not be read earlier.
    """

    root: str
    paths: tuple[str, ...]
    stats: Mapping[str, Stat]
    old: GalleryIndex | None = None
    kept: Mapping[str, int] = field(default_factory=dict)
    known: Mapping[str, int] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)

    @property
    def alien(self) -> bool:
        """Whether an old index has none of the pictures."""
        return self.old is not None and not self.known.keys() & set(self.paths)

    def todo(self, work: IndexWork) -> list[str]:
        """Pictures that are neither kept nor done already, in order."""
        done = {
            path: stat
            for part in work.parts
            for path, stat in [
                *part.pictures.items(),
                *((p, s) for p, (s, _) in part.broken.items()),
            ]
        }
        return [p for p in self.paths if p not in self.kept and done.get(p) != self.stats[p]]


def planned(
    paths: Sequence[str],
    root: str,
    old: GalleryIndex | None,
    *,
    drop: bool,
    progress: StageProgress | None = None,
) -> UpdatePlan:
    """Compares a gallery with its index, if there is one.

    Without ``drop``, pictures of the index that are not among the absolute ``paths`` stay.
    """
    if old is None:
        return UpdatePlan(root, tuple(paths), {path: Stat.of(path) for path in paths})
    before = absolute([old.root])[0]
    known = _located(old, before)
    if drop and not known.keys() & set(paths):
        known = _located(old, root)  # the gallery may have been moved
    order, broken = list(paths), {}
    if not drop:
        order = list(dict.fromkeys((*known, *paths)))
        root = before
        given = set(paths)
        broken = {p: why for p, why in old.errors.items() if str(Path(root, p)) not in given}
    seen = _stats_of(old)
    stats, kept = {}, {}
    for done, path in enumerate(order):
        index = known.get(path)
        stats[path] = Stat.of(path)
        if index is None:
            continue
        if not drop and path not in given:
            stats[path], kept[path] = seen[index], index
        elif _same(path, stats[path], seen[index], old.tensors["digests"][index]):
            kept[path] = index
        if progress is not None:
            progress("Comparing pictures", done + 1, len(order))
    return UpdatePlan(root, tuple(order), stats, old, kept, known, broken)


def without(old: GalleryIndex, paths: Sequence[str]) -> UpdatePlan:
    """An index without some of its pictures; folders stand for all below them."""
    root = absolute([old.root])[0]
    known = _located(old, root)
    gone: set[str] = set()
    for path in paths:
        below = {name for name in known if _below(name, path)}
        if not below:
            raise ImageError(f"'{path}' is not in the index '{old.path}', nor anything below it.")
        gone |= below
    left = {path: index for path, index in known.items() if path not in gone}
    if not left:
        raise ImageError(
            f"Expected to leave a picture in the index '{old.path}', but that would take out all "
            f"{len(old)}; delete the file instead."
        )
    seen = _stats_of(old)
    stats = {path: seen[index] for path, index in left.items()}
    broken = {
        name: why
        for name, why in old.errors.items()
        if not any(_below(str(Path(root, name)), path) for path in paths)
    }
    return UpdatePlan(root, tuple(left), stats, old, left, known, broken)


def _below(name: str, path: str) -> bool:
    """Whether a file is this one, or lies below it."""
    return name == path or name.startswith(path.rstrip(os.sep) + os.sep)


def _located(old: GalleryIndex, root: str) -> dict[str, int]:
    """Absolute paths of the pictures of an index, if they are below this folder."""
    return {os.path.normpath(Path(root, name)): n for n, name in enumerate(old.paths)}


def _stats_of(old: GalleryIndex) -> list[Stat]:
    return [Stat(changed, size) for changed, size in old.tensors["stats"].tolist()]


def _same(path: str, now: Stat, then: Stat, digest: Tensor) -> bool:
    """Whether a picture is as it was: by its time and size, else by its content."""
    if now == then:
        return True
    if now.size != then.size:
        return False
    try:
        return digest_of(path) == bytes(digest.tolist())
    except OSError:
        return False


def relative_to(path: str, root: str) -> str:
    """Below the root with ``/``, else as it is."""
    if Path(path).is_relative_to(root):
        return Path(path).relative_to(root).as_posix()
    return path


_SHARED = ("basis", "probe", "texts", "text_ends", "broken", "stats")
"""Columns that are not one row for each picture, or are written anew."""


def publish(way: IndexConfig, plan: UpdatePlan, work: IndexWork, path: Path) -> GalleryIndex:
    """Puts the finished pieces together and the file into place.

    An index that would be the same as before is left alone.
    """
    part_rows = {p: (part, row) for part in work.parts for row, p in enumerate(part.pictures)
             if part.pictures[p] == plan.stats.get(p)}  # fmt: skip
    failed = {p: why for part in work.parts for p, (_, why) in part.broken.items()}
    order = [p for p in plan.paths if p in plan.kept or p in part_rows]
    broken = dict(plan.broken) | {
        relative_to(p, plan.root): failed[p]
        for p in plan.paths
        if p in failed and p not in part_rows
    }
    if not order:
        work.remove()
        first = next(iter(broken.values()), "the index would be empty")
        raise ImageError(f"No picture is left to index, of {len(plan.paths)} given: {first}")
    fresh = [p for p in order if p not in plan.kept]
    changed = sum(p in plan.known for p in fresh)
    changes = Changes(
        added=len(fresh) - changed,
        changed=changed,
        removed=len(plan.known.keys() - set(order)),
        kept=len(order) - len(fresh),
    )
    metadata = {
        **way.to_json(),
        "schema": SCHEMA,
        "versions": versions(),
        **_whereabouts(plan, path),
    }
    columns = _columns(way, plan, order, part_rows, broken)
    if not fresh and plan.old is not None and _unchanged(plan.old, metadata, order, plan, columns):
        work.remove()
        return replace(plan.old, changes=changes)
    work.publish(metadata, columns, path)
    return replace(open_index(path, root=plan.root), changes=changes)


def _columns(
    way: IndexConfig,
    plan: UpdatePlan,
    order: Sequence[str],
    part_rows: Mapping[str, tuple[Part, int]],
    broken: Mapping[str, str],
) -> dict[str, Column]:
    """Every column of the new file."""
    old = plan.old

    def origin(path: str) -> int:
        return -1 if path in plan.kept else id(part_rows[path][0])

    sources = []
    for _, group in groupby(order, key=origin):
        some = list(group)
        if some[0] in plan.kept:
            assert old is not None
            tensors: Callable[[], Mapping[str, Tensor]] = lambda: old.tensors  # noqa: E731
            indices = tuple(plan.kept[p] for p in some)
        else:
            tensors = part_rows[some[0]][0].tensors
            indices = tuple(part_rows[p][1] for p in some)
        sources.append(SourceRows(tensors, indices))
    names = [name for name in sources[0].tensors() if name not in _SHARED]
    columns = {name: gathered(name, sources) for name in names}
    stats = [[plan.stats[p].changed, plan.stats[p].size] for p in order]
    shared = {
        "stats": torch.tensor(stats, dtype=torch.int64),
        "probe": way.identity.probe,
        "broken": torch.tensor(list(json.dumps(broken).encode()), dtype=torch.uint8),
        **packed_texts([relative_to(p, plan.root) for p in order]),
    }
    if way.keeping.basis is not None:
        shared["basis"] = way.keeping.basis
    return columns | {name: Column.of(tensor) for name, tensor in shared.items()}


def _unchanged(
    old: GalleryIndex,
    metadata: Mapping[str, Any],
    order: Sequence[str],
    plan: UpdatePlan,
    columns: Mapping[str, Column],
) -> bool:
    """Whether the new file would say what the old one does."""
    if [plan.kept[p] for p in order] != list(range(len(old))):
        return False
    if metadata["root"] != old.metadata["root"]:
        return False
    return all(
        torch.equal(next(columns[name].pieces()), old.tensors[name])
        for name in ("stats", "broken", "texts")
    )


def _whereabouts(plan: UpdatePlan, path: Path) -> dict[str, str]:
    """The folder of the pictures, absolute and as seen from the file."""
    try:
        relative = os.path.relpath(plan.root, path.absolute().parent)
    except ValueError:  # on another drive
        relative = ""
    return {"root": plan.root, "root_from_here": Path(relative).as_posix() if relative else ""}
