"""The folder of a training run: its files, its checkpoints, and going on where one stands."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from simexplain.errors import DAMAGED, ModelError, OutputError, first_line
from simexplain.models.checkpoints import read_torch
from simexplain.publishing import check_writable

MODEL, LAST = "model.pt", "last.pt"
OPTIONS, RESULTS, METRICS = "options.json", "results.json", "metrics.csv"
CHECKPOINT = "checkpoints/last.ckpt"
ATTENTION, TENSORBOARD = "attention", "tensorboard"
FILES = (MODEL, LAST, OPTIONS, RESULTS, METRICS, CHECKPOINT)
SCHEMA = 1


def first_process() -> bool:
    """Whether this is the process that writes and tells; lightning starts the others itself."""
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(os.environ.get(rank, "0") == "0" for rank in ranks)


def check_folder(folder: Path, *, resume: bool, force: bool) -> None:
    """Says what stands in the way before anything is loaded.

    Raises:
        OutputError: If a run is there that is neither to be resumed nor replaced, or none is
            there to be resumed, or the folder cannot be written.
    """
    there = [name for name in FILES if (folder / name).exists()]
    if resume and not (folder / CHECKPOINT).is_file():
        raise OutputError(
            f"Expected a run to resume in '{folder}', but there is no {CHECKPOINT}; leave "
            "--resume away to begin one."
        )
    if there and not resume and not force:
        raise OutputError(
            f"'{folder}' holds a run already ({there[0]}); say --resume to go on with it, --force "
            "to replace it, or choose another folder."
        )
    check_writable(folder, FILES, force=True)
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not os.access(nearest, os.W_OK):
        raise OutputError(f"'{folder}' cannot be written; choose another folder.")


class RunFolder:
    """Writes the files of a run, each whole or not at all.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self) -> None:
        """Makes the folder and removes what an earlier run left in it, and nothing else.

        Raises:
            OutputError: If it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.tidy()
            for name in FILES:
                (self.path / name).unlink(missing_ok=True)
            for picture in (self.path / ATTENTION).glob("epoch_*.png"):
                picture.unlink()
            shutil.rmtree(self.path / TENSORBOARD, ignore_errors=True)
            (self.path / CHECKPOINT).parent.mkdir(exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def tidy(self) -> None:
        """Removes what a run that was killed may have left half-written."""
        for draft in self.path.rglob("*.part"):
            draft.unlink(missing_ok=True)
        for folder in self.path.glob(".simexplain-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def write(self, name: str, content: bytes) -> Path:
        """A file, whole or not at all, on the disk when this returns.

        Raises:
            OutputError: If it cannot be written.
        """
        path = self.path / name
        draft = path.with_name(f"{path.name}.part")
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

    def write_json(self, name: str, said: Mapping[str, Any]) -> Path:
        """A JSON file."""
        return self.write(name, json.dumps(said, indent=2, ensure_ascii=False).encode())

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
        except (OSError, ModelError, *DAMAGED) as error:
            raise OutputError(
                f"The checkpoint '{path}' is damaged ({first_line(error)}); say --force to begin "
                "anew."
            ) from error
        if schema != SCHEMA:
            raise OutputError(
                f"'{path}' was written in schema {schema}, but this version reads schema {SCHEMA}; "
                "use a matching version of simexplain."
            )
        return state

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
