"""The folder of a training run: its files, its checkpoints, and the state to resume from."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simexplain.errors import DAMAGED, ModelError, OutputError, first_line, json_text
from simexplain.models.checkpoints import read_torch
from simexplain.publishing import check_writable
from simexplain.training.options import TrainOptions


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
        """The counterpart of :meth:`to_state`.

        Raises:
            ValueError: If something is missing, unknown or of another type.
        """
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
    """The seed of one step, from the run's: all chance of a step depends on nothing else.

    Args:
        seed: Of the run.
        step: Steps taken before.
        rank: Of the process, where processes shall draw differently.
    """
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
    """Says what stands in the way before anything is loaded.

    Raises:
        OutputError: If a run is there that is neither to be resumed nor replaced, or none is
            there to be resumed, or the folder cannot be written.
    """
    try:
        # UnicodeError: SummaryWriter and torch.save write paths as UTF-8.
        (folder / _LONGEST).as_posix().encode()
        _check_names(folder)
        there = [name for name in (*FILES, *FOLDERS) if _taken(folder / name)]
        able = (folder / CHECKPOINT).is_file()
        nearest = folder.absolute()
        while not nearest.exists():
            nearest = nearest.parent
        writable = nearest.is_dir() and os.access(nearest, os.W_OK)
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


class RunFolder:
    """Writes the files of a run, each atomically.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def clear(self) -> None:
        """Removes what an earlier run left but its checkpoint, and nothing else.

        Raises:
            OutputError: If it cannot be written.
        """
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
            raise self._unwritable(error) from error

    def tidy(self) -> None:
        """Removes what a run that was killed may have left half-written."""
        for folder in (self.path, *(self.path / name for name in FOLDERS)):
            for draft in folder.glob(f"{_DRAFT}*"):
                if draft.is_dir():
                    shutil.rmtree(draft, ignore_errors=True)
                else:
                    draft.unlink(missing_ok=True)

    def write(self, name: str, content: bytes) -> Path:
        """Writes a file atomically; it is on the disk when this returns.

        Raises:
            OutputError: If it cannot be written.
        """
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
            raise self._unwritable(error) from error
        finally:
            draft.unlink(missing_ok=True)
        return path

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """A JSON file; what is not UTF-8 in names of files becomes an escape of JSON's."""
        text = json_text(content)
        return self.write(name, text.encode())

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
        """The counterpart of :meth:`write_checkpoint`; no code in the file is run.

        Raises:
            OutputError: If it is damaged or of another version.
        """
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

    def files(self) -> dict[str, str]:
        """What the run has written, by kind."""
        kinds = {
            "model": MODEL, "last": LAST, "checkpoint": CHECKPOINT, "options": OPTIONS,
            "metrics": METRICS, "results": RESULTS, "attention": ATTENTION,
            "tensorboard": TENSORBOARD,
        }  # fmt: skip
        return {
            kind: str(self.path / name)
            for kind, name in kinds.items()
            if (self.path / name).exists()
        }

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(
            f"'{self.path}' cannot be written ({error.strerror or error}); choose another folder."
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
