"""The folder of a batch: shards written atomically, and the table of all rows."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from simexplain.batching.planning import BatchPlan, BatchRow
from simexplain.comparison import architecture
from simexplain.errors import DAMAGED, ModelError, OutputError, first_line
from simexplain.explanation import Explanation
from simexplain.publishing import locked
from simexplain.training.run_folder import JobFolder, can_be_made

if TYPE_CHECKING:
    import pyarrow

OK, FAILED = "ok", "failed"
TableRecord = dict[str, Any]


def check_extra() -> None:
    """Says what to install where tables cannot be written."""
    if find_spec("pyarrow") is None:
        raise ModelError(
            "Expected pyarrow for tables of results, which is not installed; run "
            "pip install 'simexplain[search]'."
        )


def schema() -> pyarrow.Schema:
    """The columns; see ``docs/batch.md``."""
    import pyarrow as pa

    several = pa.list_(pa.float64())
    texts = pa.list_(pa.string())
    point = pa.struct([("x", pa.float64()), ("y", pa.float64())])
    other = pa.struct(
        [
            ("method", pa.string()),
            ("peaks", pa.list_(point)),
            ("scores", several),
            ("overlaps", several),
            ("warnings", texts),
        ]
    )
    return pa.schema(
        [
            ("row", pa.int64()),
            ("id", pa.string()),
            ("line", pa.int64()),
            ("status", pa.string()),
            ("error", pa.string()),
            ("architecture", pa.string()),
            ("anchor", pa.string()),
            ("positives", texts),
            ("negatives", texts),
            ("distances", several),
            ("condition", pa.string()),
            ("holds", pa.bool_()),
            ("margin", pa.float64()),
            ("peaks", pa.list_(point)),
            ("scores", several),
            ("others", pa.list_(other)),
            ("moved", several),
            ("unexplained", several),
            ("warnings", texts),
            ("pictures", pa.list_(pa.int64())),
            ("maps_file", pa.string()),
            ("maps_key", pa.string()),
        ]
    )


def named(number: int, row: BatchRow) -> TableRecord:
    """What is known of a row before it is explained; all else is null."""
    shape = (len(row.positives), len(row.negatives))
    return {
        "row": number,
        "id": row.id,
        "line": row.line or None,
        "architecture": architecture(*shape) if any(shape) else None,
        "anchor": row.anchor,
        "positives": list(row.positives),
        "negatives": list(row.negatives),
    }


def explained(
    number: int,
    row: BatchRow,
    pictures: Sequence[int],
    explanation: Explanation,
    maps: tuple[str, str],
) -> TableRecord:
    """A row that was explained; ``maps`` are the file of its maps and its key in there."""
    condition = explanation.condition()
    return {
        **named(number, row),
        "status": OK,
        "distances": explanation.distances[0].tolist(),
        "condition": condition.text,
        "holds": condition.holds,
        "margin": condition.margin,
        "peaks": _points(explanation),
        "scores": explanation.scores[0].tolist(),
        "others": [
            {
                "method": other.method,
                "peaks": _points(other),
                "scores": other.scores[0].tolist(),
                "overlaps": list(agreement.overlaps),
                "warnings": list(other.warnings),
            }
            for other, agreement in zip(explanation.others, explanation.agreement(), strict=True)
        ],
        "moved": None if explanation.moved is None else explanation.moved[0].tolist(),
        "unexplained": None
        if explanation.unexplained is None
        else explanation.unexplained[0].tolist(),
        "warnings": list(explanation.warnings),
        "pictures": list(pictures),
        "maps_file": maps[0],
        "maps_key": maps[1],
    }


def _points(row: Explanation) -> list[dict[str, float] | None]:
    return [peak and {"x": peak[0], "y": peak[1]} for peak in row.peaks()]


def failed(number: int, row: BatchRow, error: str) -> TableRecord:
    """A row that could not be explained."""
    return {**named(number, row), "status": FAILED, "error": error}


def table_of(records: Sequence[Mapping[str, Any]]) -> pyarrow.Table:
    """Records as a table; what a record lacks is null."""
    import pyarrow as pa

    return pa.Table.from_pylist([_spelled(record) for record in records], schema=schema())


def parquet_of(table: pyarrow.Table) -> bytes:
    """A table as the content of a Parquet file, the same for the same table."""
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _spelled(value: Any) -> Any:
    """Names of files that are not UTF-8 get escapes in place of their odd bytes."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {key: _spelled(own) for key, own in value.items()}
    return [_spelled(own) for own in value] if isinstance(value, list) else value


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


class BatchFolder(JobFolder):
    """The files of a batch."""

    kinds: ClassVar = {
        "results": RESULTS, "manifest": MANIFEST, "maps": MAPS, "heatmaps": HEATMAPS,
        "figures": FIGURES,
    }  # fmt: skip

    def check(self, *, resume: bool, force: bool) -> None:
        """Says what stands in the way before anything is loaded."""
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
        if not can_be_made(self.path):
            raise OutputError(f"'{self.path}' cannot be written; choose another folder.")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other processes of this host from working on the batch, until the end of this one.

        Where folders cannot be locked, as on some network drives, nothing is kept from anything.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self.unwritable(error) from error
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
        """Removes what an earlier batch wrote, and nothing else."""
        try:
            for name in (RESULTS, MANIFEST):
                (self.path / name).unlink(missing_ok=True)
            for folder in _OURS:
                self._remove(folder)
        except OSError as error:
            raise self.unwritable(error) from error

    def _remove(self, folder: str) -> None:
        """Removes our files of one kind, and the folder if nothing else is in it."""
        own = self.path / folder
        for path in own.glob("*") if own.is_dir() else ():
            if _OURS[folder].fullmatch(path.name) or path.name.startswith(".simexplain-"):
                path.unlink()
        with suppress(OSError):
            own.rmdir()

    def read_manifest(self) -> dict[str, Any]:
        """What the batch is."""
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
        self, shard: int, records: Sequence[TableRecord], tensors: Mapping[str, Tensor]
    ) -> None:
        """The rows of a shard, after their maps."""
        from safetensors.torch import save

        if tensors:
            self.write(maps_name(shard), save(dict(tensors)))
        self.write(part_name(shard), parquet_of(table_of(records)))

    def merge(self, plan: BatchPlan) -> None:
        """Makes one table of all shards and the rows that could not be tried, in their order."""
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
