"""The folder of a batch: shards written atomically, and resumed where a run stopped."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from simexplain.batching.planning import BatchPlan
from simexplain.batching.table import Record, failed, parquet_of, table_of
from simexplain.errors import DAMAGED, OutputError, first_line
from simexplain.publishing import locked
from simexplain.training.run_folder import RunFolder

if TYPE_CHECKING:
    import pyarrow

MANIFEST, RESULTS = "batch.json", "results.parquet"
MAPS, PARTS, HEATMAPS, FIGURES = "maps", "parts", "heatmaps", "figures"
SCHEMA = 1
_OURS = {
    MAPS: re.compile(r"shard_\d{5,}\.safetensors"),
    PARTS: re.compile(r"shard_\d{5,}\.parquet"),
    HEATMAPS: re.compile(r"\d{6,}_\d+_(anchor|positive|negative)\.png"),
    FIGURES: re.compile(r"\d{6,}\.png"),
}


def maps_name(shard: int) -> str:
    """The file with the maps of a shard."""
    return f"{MAPS}/shard_{shard:05d}.safetensors"


def is_maps_file(name: str) -> bool:
    """Whether that is the name of a file of maps, which is inside the batch's folder."""
    folder, _, file = name.partition("/")
    return folder == MAPS and _OURS[MAPS].fullmatch(file) is not None


def part_name(shard: int) -> str:
    """The file with the rows of a finished shard, while others are still to do."""
    return f"{PARTS}/shard_{shard:05d}.parquet"


class BatchFolder:
    """Reads and writes the files of a batch.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = RunFolder(path)

    def check(self, *, resume: bool, force: bool) -> None:
        """Says what stands in the way before anything is loaded.

        Raises:
            OutputError: If a batch is there that is neither to be resumed nor replaced, none is
                there to be resumed, or the folder cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"Expected a folder for the batch, but '{self.path}' is a file.")
        if linked := [name for name in _OURS if (self.path / name).is_symlink()]:
            raise OutputError(
                f"'{self.path / linked[0]}' is a link to elsewhere, where nothing is written or "
                "removed; remove the link or choose another folder."
            )
        there = [name for name in (MANIFEST, RESULTS, *_OURS) if self._taken(name)]
        if resume and MANIFEST not in there:
            raise OutputError(
                f"Expected a batch to resume in '{self.path}', but it has no {MANIFEST}; leave "
                "--resume away to begin one."
            )
        if there and not (resume or force):
            raise OutputError(
                f"'{self.path}' holds a batch already ({there[0]}); say --resume to go on with it, "
                "--force to replace it, or choose another folder."
            )
        nearest = self.path.absolute()
        while not nearest.exists():
            nearest = nearest.parent
        if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
            raise OutputError(f"'{self.path}' cannot be written; choose another folder.")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other processes of this host from working on the batch, until the end of this one.

        Where folders cannot be locked, as on some network drives, nothing is kept from anything.

        Raises:
            OutputError: If another process works on it, or the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"'{self.path}' cannot be written ({error.strerror or error}); choose another "
                "folder."
            ) from error
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.path, wait=False))
            except BlockingIOError as error:
                raise OutputError(
                    f"Another process works on the batch in '{self.path}'; wait until it is done, "
                    "or choose another folder."
                ) from error
            yield

    def _taken(self, name: str) -> bool:
        path = self.path / name
        return any(path.iterdir()) if path.is_dir() else path.exists()

    def clear(self) -> None:
        """Removes what an earlier batch wrote, and nothing else.

        Raises:
            OutputError: If it cannot be removed.
        """
        try:
            for name in (RESULTS, MANIFEST):
                (self.path / name).unlink(missing_ok=True)
            for folder in _OURS:
                self._remove(folder)
        except OSError as error:
            raise OutputError(
                f"'{self.path}' cannot be written ({error.strerror or error}); choose another "
                "folder."
            ) from error

    def _remove(self, folder: str) -> None:
        """Removes our files of one kind, and the folder if nothing else is in it."""
        own = self.path / folder
        for path in own.glob("*") if own.is_dir() else ():
            if _OURS[folder].fullmatch(path.name) or path.name.startswith(".simexplain-"):
                path.unlink()
        with suppress(OSError):
            own.rmdir()

    def write(self, name: str, content: bytes) -> Path:
        """Writes a file atomically.

        Raises:
            OutputError: If it cannot be written.
        """
        return self._files.write(name, content)

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """What the batch is; while it is there, the batch can be resumed."""
        self._files.write_json(MANIFEST, manifest)

    def read_manifest(self) -> dict[str, Any]:
        """What the batch is.

        Raises:
            OutputError: If there is none, or a damaged one, or one of another version.
        """
        path = self.path / MANIFEST
        if not path.is_file():
            raise OutputError(f"'{self.path}' holds no batch: {MANIFEST} is missing.")
        try:
            manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            schema = manifest["schema"]
        except (OSError, *DAMAGED) as error:
            raise OutputError(
                f"'{path}' is damaged ({first_line(error)}); make it again."
            ) from error
        if schema != SCHEMA:
            raise OutputError(
                f"'{path}' was written in schema {schema}, but this version reads schema {SCHEMA}; "
                "use a matching version of simexplain."
            )
        return manifest

    def pending(self, shards: int) -> list[int]:
        """The shards that are not done; none where the results are whole."""
        if self.complete:
            return []
        return [number for number in range(shards) if self._part(number) is None]

    @property
    def complete(self) -> bool:
        """Whether every row is in the table of results."""
        return (self.path / RESULTS).is_file()

    def _part(self, shard: int) -> pyarrow.Table | None:
        """The rows of a shard, if they and their maps are there."""
        from pyarrow import ArrowException, parquet

        path = self.path / part_name(shard)
        if not path.is_file():
            return None
        try:
            table = parquet.read_table(path)
            files = {file for file in table["maps_file"].to_pylist() if file}
        except (OSError, KeyError, ArrowException):
            return None
        return table if all((self.path / file).is_file() for file in files) else None

    def write_shard(
        self, shard: int, records: Sequence[Record], tensors: Mapping[str, Tensor]
    ) -> None:
        """The rows of a shard, after their maps.

        Raises:
            OutputError: If they cannot be written.
        """
        from safetensors.torch import save

        if tensors:
            self.write(maps_name(shard), save(dict(tensors)))
        self.write(part_name(shard), parquet_of(table_of(records)))

    def merge(self, plan: BatchPlan) -> None:
        """Makes one table of all shards and the rows that could not be tried, in their order.

        Raises:
            OutputError: If a shard is missing, or the table cannot be written.
        """
        import pyarrow as pa

        if self.complete:
            return  # another run has gone on with it meanwhile
        bad = [failed(n, plan.rows[n], reason) for n, reason in plan.problems.items()]
        parts = [table_of(bad)]
        for number in range(len(plan.shards)):
            part = self._part(number)
            if part is None:
                raise OutputError(
                    f"Shard {number} of the batch in '{self.path}' is missing; all hosts need one "
                    "folder that each of them sees."
                )
            parts.append(part)
        whole = pa.concat_tables(parts).sort_by("row").combine_chunks()
        self.write(RESULTS, parquet_of(whole))
        self._remove(PARTS)

    def files(self) -> dict[str, str]:
        """What is there, by kind."""
        kinds = {
            "results": RESULTS, "manifest": MANIFEST, "maps": MAPS, "heatmaps": HEATMAPS,
            "figures": FIGURES,
        }  # fmt: skip
        return {
            kind: str(self.path / name)
            for kind, name in kinds.items()
            if (self.path / name).exists()
        }
