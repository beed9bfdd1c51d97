"""The folder of a training run: its files, its checkpoints, its state, and what came of it."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from simexplain.errors import DAMAGED, ModelError, OutputError, first_line, json_text
from simexplain.models.base import SimilarityModel
from simexplain.models.checkpoints import read_torch
from simexplain.models.loading import load_model
from simexplain.publishing import check_writable
from simexplain.renaming import with_old_names
from simexplain.results.result import Kept
from simexplain.training.options import TrainOptions, best_column


@dataclass
class TrainState:
    """The progress of a run; the only state beside tensors of model, objective and optimiser.

    Attributes:
        epoch: Finished epochs.
        batch: Finished batches of the current epoch.
        step: Steps taken in all.
        sums: Of the losses of the current epoch by name, in double precision.
        rows: What was measured after each epoch, plain JSON values.
        best: The best score so far, or None.
        best_epoch: Its epoch; 0 for none.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    best: float | None = None
    best_epoch: int = 0

    def count(self, losses: Mapping[str, Tensor]) -> None:
        """Notes one step and its losses."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, torch.zeros(())).to(value.device) + value.double()
        self.batch += 1
        self.step += 1

    def means(self) -> dict[str, float]:
        """The mean of each loss over the present epoch so far."""
        # Terms that began within the epoch are averaged over all of it, as they were added.
        return {name: float(value) / max(1, self.batch) for name, value in self.sums.items()}

    def turn(self) -> None:
        """Ends the epoch."""
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, {}

    def to_state(self) -> dict[str, Any]:
        """Tensors and plain values from which :meth:`from_state` makes an equal object."""
        sums = {name: value.detach().cpu() for name, value in self.sums.items()}
        return {**vars(self), "sums": sums, "rows": [dict(row) for row in self.rows]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> TrainState:
        """The counterpart of :meth:`to_state`."""
        kinds: dict[str, type | tuple[type, ...]] = {
            "sums": dict,
            "rows": list,
            "best": (int, float, type(None)),
        }
        for entry in fields(cls):
            if not isinstance(state.get(entry.name, cls), kinds.get(entry.name, int)):
                raise ValueError(f"it has no {entry.name} of its place")
        unknown = [name for name in state if name not in {entry.name for entry in fields(cls)}]
        if unknown:
            raise ValueError(f"its place has the unknown '{unknown[0]}'")
        return cls(**{**state, "rows": [dict(row) for row in state["rows"]]})


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The seed of a step: of the run's seed alone, and of the rank where processes differ."""
    return (seed * 1_000_003 + step * 1_009 + rank) % 2**63


MODEL, LAST = "model.pt", "last.pt"
OPTIONS, RESULTS, METRICS = "options.json", "results.json", "metrics.csv"
CHECKPOINT = "checkpoints/last.ckpt"
ATTENTION, TENSORBOARD = "attention", "tensorboard"
FOLDERS = ("checkpoints", ATTENTION, TENSORBOARD)
FILES = (MODEL, LAST, OPTIONS, RESULTS, METRICS, CHECKPOINT)
SCHEMA = 1
_DRAFT = ".simexplain-"
_LONGEST = f"{ATTENTION}/{_DRAFT}epoch_000000.png.part"
_PICTURE = re.compile(r"epoch_\d{3,}\.png")
_EVENTS = re.compile(r"events\.out\.tfevents\..+")
_STATE: dict[str, type | tuple[type, ...]] = {
    "options": dict, "data": str, "source": (dict, type(None)), "recipe": (str, type(None)),
    "model": dict, "objective": dict, "optimiser": dict, "precision": dict, "place": dict,
}  # fmt: skip
"""What a checkpoint holds."""


def first_process() -> bool:
    """Whether this process writes and reports; lightning starts the others itself."""
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(os.environ.get(rank, "0") == "0" for rank in ranks)


def check_folder(folder: Path, *, resume: bool, force: bool) -> None:
    """Says what stands in the way before anything is loaded."""
    try:
        # UnicodeError: SummaryWriter and torch.save write paths as UTF-8.
        (folder / _LONGEST).as_posix().encode()
        _check_names(folder)
        there = [name for name in (*FILES, *FOLDERS) if _taken(folder / name)]
        able = (folder / CHECKPOINT).is_file()
        writable = can_be_made(folder)
    except UnicodeError as error:
        raise OutputError(
            f"Expected a folder with a name in UTF-8, got {str(folder)!a}; choose another folder."
        ) from error
    except OutputError:
        raise
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise OutputError(f"'{folder}' cannot be written ({why}); choose another folder.") from None
    if resume and not able:
        raise OutputError(
            f"Expected a run to resume in '{folder}', but it has no {CHECKPOINT}; leave "
            "--resume away to begin one."
        )
    if there and not resume and not force:
        go_on = "--resume to go on with it, " if able else ""
        raise OutputError(
            f"'{folder}' holds a run already ({there[0]}); say {go_on}--force to replace it, or "
            "choose another folder."
        )
    if not writable:
        raise OutputError(f"'{folder}' cannot be written; choose another folder.")


def can_be_made(folder: Path) -> bool:
    """Whether a folder can be written, or made with all above it that are missing."""
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    return nearest.is_dir() and os.access(nearest, os.W_OK)


def _check_names(folder: Path) -> None:
    """Refuses files where folders go, folders where files go, and names that are too long."""
    check_writable(folder, FILES, force=True)
    with suppress(FileNotFoundError, NotADirectoryError):
        (folder / _LONGEST).lstat()
    for name in FOLDERS:
        if (folder / name).exists() and not (folder / name).is_dir():
            raise OutputError(
                f"'{folder / name}' is a file where a folder must go; choose another folder."
            )


def _taken(path: Path) -> bool:
    """Whether a file is there, or a folder with more in it than half-written files of a run."""
    if path.is_dir():
        return any(not inside.name.startswith(_DRAFT) for inside in path.iterdir())
    return path.exists()


class JobFolder:
    """A folder whose files are written one by one, each atomically.

    Attributes:
        path: The folder.
        kinds: Its files and folders, by what they are called to the user.
    """

    kinds: ClassVar[Mapping[str, str]]

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, content: bytes) -> Path:
        """Writes a file atomically; it is on the disk when this returns."""
        path = self.path / name
        draft = path.with_name(f"{_DRAFT}{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except OSError as error:
            raise self.unwritable(error) from error
        finally:
            draft.unlink(missing_ok=True)
        return path

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """A JSON file; what is not UTF-8 in names of files becomes an escape of JSON's."""
        return self.write(name, json_text(content).encode())

    def files(self) -> dict[str, str]:
        """What has been written, by kind."""
        paths = {kind: self.path / name for kind, name in self.kinds.items()}
        return {kind: str(path) for kind, path in paths.items() if path.exists()}

    def unwritable(self, error: OSError) -> OutputError:
        """The error of a folder that cannot be written."""
        return OutputError(
            f"'{self.path}' cannot be written ({error.strerror or error}); choose another folder."
        )


class RunFolder(JobFolder):
    """The files of a training run."""

    kinds: ClassVar = {
        "model": MODEL, "last": LAST, "checkpoint": CHECKPOINT, "options": OPTIONS,
        "metrics": METRICS, "results": RESULTS, "attention": ATTENTION, "tensorboard": TENSORBOARD,
    }  # fmt: skip

    def clear(self) -> None:
        """Removes what an earlier run left but its checkpoint, and nothing else."""
        try:
            self.tidy()
            for name in FILES:
                if name != CHECKPOINT:
                    (self.path / name).unlink(missing_ok=True)
            for name, pattern in ((ATTENTION, _PICTURE), (TENSORBOARD, _EVENTS)):
                for path in (self.path / name).glob("*"):
                    if pattern.fullmatch(path.name) and not path.is_dir():
                        path.unlink()
        except OSError as error:
            raise self.unwritable(error) from error

    def tidy(self) -> None:
        """Removes what a run that was killed may have left half-written."""
        for folder in (self.path, *(self.path / name for name in FOLDERS)):
            for draft in folder.glob(f"{_DRAFT}*"):
                if draft.is_dir():
                    shutil.rmtree(draft, ignore_errors=True)
                else:
                    draft.unlink(missing_ok=True)

    def write_rows(self, rows: Sequence[Mapping[str, Any]]) -> Path:
        """``metrics.csv``: one row an epoch; cells without a value are empty."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        buffer = io.StringIO()
        table = csv.DictWriter(buffer, names, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        return self.write(METRICS, buffer.getvalue().encode())

    def write_checkpoint(self, state: Mapping[str, Any]) -> Path:
        """``checkpoints/last.ckpt``: tensors and plain values."""
        buffer = io.BytesIO()
        torch.save({"training": SCHEMA, **state}, buffer)
        return self.write(CHECKPOINT, buffer.getvalue())

    def read_checkpoint(self) -> dict[str, Any]:
        """The counterpart of :meth:`write_checkpoint`; no code in the file is run."""
        path = self.path / CHECKPOINT
        try:
            state: dict[str, Any] = read_torch(path, trust_pickle=False)
            schema = state["training"]
            if schema == SCHEMA:
                _check_state(state)
        except (OSError, ModelError, *DAMAGED) as error:
            raise self.damaged(error) from error
        if schema != SCHEMA:
            raise OutputError(
                f"'{path}' was written in schema {schema}, but this version reads schema {SCHEMA}; "
                "use a matching version of simexplain."
            )
        return state

    def damaged(self, error: Exception) -> OutputError:
        """What to say of a checkpoint that cannot be used."""
        reason = first_line(error).rstrip(".:")
        return OutputError(
            f"The checkpoint '{self.path / CHECKPOINT}' is damaged ({reason}); say --force to begin"
            " anew."
        )


def _check_state(state: Mapping[str, Any]) -> None:
    """Raises one of ``DAMAGED`` where a checkpoint lacks something or has it in another shape."""
    for name, kind in _STATE.items():
        if name not in state:
            raise ValueError(f"it has no {name}")
        if not isinstance(state[name], kind):
            raise ValueError(f"its {name} is a {type(state[name]).__name__}")
    TrainOptions.from_json(state["options"])
    TrainState.from_state(state["place"])


@dataclass(frozen=True)
class TrainResult(Kept):
    """A finished run.

    Attributes:
        folder: Where its files are.
        options: Its settings.
        rows: What was measured: one row before training (epoch 0), then one after each epoch.
        best_epoch: The epoch of ``model.pt``.
        best: Its score, that of ``options.best``.
        files: What was written, by kind.
        warnings: What to know of the run.
    """

    folder: Path
    options: TrainOptions
    rows: tuple[dict[str, Any], ...]
    best_epoch: int
    best: float
    files: dict[str, str]
    warnings: tuple[str, ...] = ()

    @property
    def untrained(self) -> dict[str, float]:
        """Recall@K and MAP@R before training, in [0, 1]."""
        return _measured(self.rows[0])

    @property
    def reached(self) -> dict[str, float]:
        """Recall@K and MAP@R of the best epoch, whose model was kept, in [0, 1]."""
        return _measured(next(row for row in self.rows if row["epoch"] == self.best_epoch))

    @property
    def improved(self) -> bool:
        """Whether the best epoch is better than the network before training."""
        if not self.untrained:
            return True
        return self.best > self.untrained[best_column(self.options)]

    def model(self) -> SimilarityModel:
        """The model of the best epoch, from its file."""
        return load_model(self.files["model"])

    @classmethod
    def read(cls, folder: Path, alone: str = "") -> TrainResult:
        """The run in a folder, wherever that is now."""
        result = super().read(folder, alone)
        files = {
            what: str(folder / Path(path).relative_to(result.folder))
            for what, path in result.files.items()
        }
        return replace(result, folder=folder, files=files)

    def summary(self, **options: Any) -> dict[str, Any]:
        """What was measured, and how."""
        return {
            "kind": "training",
            "best_epoch": self.best_epoch,
            "best": self.best,
            "chosen_by": self.options.best,
            "untrained": self.untrained,
            "reached": self.reached,
            "epochs": self.rows,
            "options": with_old_names(
                self.options.to_json(), "classes", "each", "k", "ks", "steps", "watch"
            ),
            "warnings": self.warnings,
            "files": self.files,
        }


def _measured(row: dict[str, Any]) -> dict[str, float]:
    return {n: v for n, v in row.items() if n.startswith("recall@") or n == "map_at_r"}
