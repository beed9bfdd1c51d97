"""From finished pieces to the file of an index."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simexplain.errors import ImageError
from simexplain.explanation import versions
from simexplain.searching.index_file import SCHEMA, Column, SourceRows, gathered, packed_texts
from simexplain.searching.index_gallery import Changes, GalleryIndex, open_index
from simexplain.searching.index_update import IndexConfig, UpdatePlan, relative_to
from simexplain.searching.index_work import IndexWork, Part

_SHARED = ("basis", "probe", "texts", "text_ends", "broken", "stats")
"""Columns that are not one row for each picture, or are written anew."""


def publish(way: IndexConfig, plan: UpdatePlan, work: IndexWork, path: Path) -> GalleryIndex:
    """Puts the finished pieces together and the file into place.

    An index that would be the same as before is left alone.

    Raises:
        ImageError: If no picture is left.
        OutputError: If the file cannot be written.
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
