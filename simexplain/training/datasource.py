"""Which pictures a run trains on and is judged by, and what identifies them."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simexplain.data.dataset_split import DataSplit, relative
from simexplain.data.datasets import read_dataset
from simexplain.data.folders import Record


@dataclass(frozen=True)
class Source:
    """How a data set is read; see ``read_dataset``.

    Attributes:
        kind: A name in ``DATASETS``.
        train_share: Share of the classes to train on, where the data set does not say.
        group: The rule of groups, or None.
        masks: A folder of masks, ``alpha``, or None.
    """

    kind: str = "folder"
    train_share: float = 0.5
    group: str | None = None
    masks: str | Path | None = None

    def read(self, root: str | Path) -> DataSplit:
        """The data set; what does not match in it is kept for ``check_training``."""
        return read_dataset(
            self.kind, root, train_share=self.train_share, group=self.group, masks=self.masks,
            strict=False,
        )  # fmt: skip


def parts_of(split: DataSplit) -> dict[str, tuple[Record, ...]]:
    """The pictures by what they are for; no gallery where queries are searched themselves."""
    gallery = {} if split.gallery is None else {"gallery": split.gallery}
    return {"train": split.train, "queries": split.queries, **gallery}


def fingerprint(split: DataSplit) -> str:
    """The same for the same pictures in the same classes, wherever they lie."""
    digest = hashlib.sha256()
    for part, records in parts_of(split).items():
        for record in records:
            told = (part, relative(record.path, split.root), record.label, record.group)
            digest.update(repr(told).encode())
    return digest.hexdigest()


def counts_of(split: DataSplit) -> dict[str, Any]:
    """How many pictures and classes there are for what, plain JSON values."""
    return {
        "name": split.name,
        **{
            part: {"pictures": len(records), "classes": len({r.label for r in records})}
            for part, records in parts_of(split).items()
        },
    }


def searchable(split: DataSplit, *, grouped: bool) -> bool:
    """Whether any query has a picture of its class to be found, so that retrieval is defined."""
    if split.gallery is None:
        found = Counter((r.label, r.group if grouped else r.path) for r in split.queries)
        kinds = Counter(label for label, _ in found)
        return any(count > 1 for count in kinds.values())
    there = {(r.label, r.group if grouped else r.path) for r in split.gallery}
    groups: dict[str | None, set[object]] = {}
    for label, group in there:
        groups.setdefault(label, set()).add(group)
    return any(groups.get(r.label, set()) - {r.group if grouped else r.path} for r in split.queries)
