"""The state of a run: everything needed to resume it exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor


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
