"""Which pictures a run trains on and is judged by, and what identifies them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simexplain.data.dataset_split import ALPHA, DataSplit, everything, relative
from simexplain.data.datasets import read_dataset
from simexplain.data.folders import Progress, Record
from simexplain.errors import OutputError
from simexplain.training.run_folder import FOLDERS


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

    def to_json(self) -> dict[str, Any]:
        """Plain values from which :meth:`from_json` makes an equal source, in any folder."""
        masks = self.masks
        if masks is not None and masks != ALPHA:
            masks = str(Path(masks).resolve())
        return {**asdict(self), "masks": masks}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Source:
        """The counterpart of :meth:`to_json`."""
        return cls(**values)

    def read(self, root: str | Path) -> DataSplit:
        """The data set; what does not match in it is kept for ``check_training``."""
        return read_dataset(
            self.kind, root, train_share=self.train_share, group=self.group, masks=self.masks,
            strict=False,
        )  # fmt: skip


def read_data(
    data: str | Path | DataSplit, source: Source | None, begun: Mapping[str, Any] | None
) -> tuple[DataSplit, dict[str, Any] | None]:
    """The data of a run and how they were read, for a checkpoint: as given, or as begun before."""
    if isinstance(data, DataSplit):
        return data, None
    chosen = source or (Source.from_json(begun) if begun else Source())
    return chosen.read(data), chosen.to_json()


def check_apart(folder: Path, data: str | Path | DataSplit, split: DataSplit) -> None:
    """Refuses a run within the data: its own pictures would be trained on by the next one."""
    own = folder.resolve()
    whole = Path() if isinstance(data, DataSplit) else Path(data)
    within = not isinstance(data, DataSplit) and whole.is_dir()
    if within and own.is_relative_to(whole.resolve()):
        raise OutputError(
            f"'{folder}' lies within the data '{whole}', where the next run would take what it "
            "draws for a class; choose a folder outside."
        )
    files = (path for r in everything(split) for path in (r.path, r.mask) if path is not None)
    # Names never contain a NUL; check_training reports it.
    parents = [path for path in {file.parent for file in files} if "\0" not in str(path)]
    kept = [own / name for name in FOLDERS]
    inside = [p for p in sorted(parents) if any(p.resolve().is_relative_to(k) for k in kept)]
    if inside:
        raise OutputError(
            f"There are pictures of the data in '{inside[0]}', where the run in '{folder}' keeps "
            "its own files; choose another folder."
        )


def parts_of(split: DataSplit) -> dict[str, tuple[Record, ...]]:
    """The pictures by what they are for; no gallery where queries are searched themselves."""
    gallery = {} if split.gallery is None else {"gallery": split.gallery}
    return {"train": split.train, "queries": split.queries, **gallery}


def fingerprint(split: DataSplit, progress: Progress | None = None) -> str:
    """The same for the same pictures and masks in the same classes, wherever they lie."""
    digest, known = hashlib.sha256(), dict[Path, str]()
    total = sum(map(len, parts_of(split).values()))
    done = 0
    for part, records in parts_of(split).items():
        for record in records:
            own = "" if record.mask is None else _content(record.mask, known)
            facts = (part, relative(record.path, split.root), record.label, record.group)
            digest.update(repr((*facts, _content(record.path, known), own)).encode())
            done += 1
            if progress is not None:
                progress(done, total)
    return digest.hexdigest()


def _content(path: Path, known: dict[Path, str]) -> str:
    """A digest of a file; empty where it cannot be read, which ``check_training`` reports."""
    if path not in known:
        try:
            known[path] = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        except (OSError, ValueError):
            known[path] = ""
    return known[path]


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
        counts = Counter((r.label, r.group if grouped else r.path) for r in split.queries)
        kinds = Counter(label for label, _ in counts)
        return any(count > 1 for count in kinds.values())
    there = {(r.label, r.group if grouped else r.path) for r in split.gallery}
    groups: dict[str | None, set[object]] = {}
    for label, group in there:
        groups.setdefault(label, set()).add(group)
    return any(groups.get(r.label, set()) - {r.group if grouped else r.path} for r in split.queries)
