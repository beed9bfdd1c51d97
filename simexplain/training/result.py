"""What a training run came to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simexplain.models.base import SimilarityModel
from simexplain.models.loading import load_model
from simexplain.renaming import with_old_names
from simexplain.results.result import Kept
from simexplain.training.options import TrainOptions, best_column


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
