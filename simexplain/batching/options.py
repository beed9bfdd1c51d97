"""What is computed for every row of a batch, and how the batch is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from simexplain.arguments import typed
from simexplain.errors import ComparisonError, ModelError
from simexplain.explaining_tensors import check_upscale
from simexplain.methods.rows import Methods
from simexplain.models.base import SimilarityModel

ACCELERATORS = ("auto", "cpu", "gpu", "mps")


@dataclass(frozen=True)
class MapRequest:
    """What is computed for every row; the fields are those of ``explain``."""

    method: Methods = None
    layer: Sequence[str] | None = None
    upscale: float = 1
    scale: str = "image"
    max_batch: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_upscale(self.upscale)


@dataclass(frozen=True)
@typed
class BatchOptions:
    """How a batch is made, as far as it is not the method's business.

    Attributes:
        shard_rows: Rows that are written at a time; what an interruption costs at most.
        memory: Gigabytes of passes and pictures to keep between rows, in each process.
        batch_size: Pictures in one forward pass. None is 1 on a CPU, where more gain nothing, and
            16 elsewhere. What a picture gives depends on it by rounding alone.
        pictures: Draw a heatmap over every picture.
        figures: Draw a figure of every row.
        strict: Refuse to begin while any row is known not to work.
        devices: Processes on each host, each with a device; None is one, or as set by ``torchrun``.
        nodes: Hosts, which need to see one folder.
        accelerator: ``auto``, ``cpu``, ``gpu`` or ``mps``; None leaves the model where it is.

    Raises:
        ComparisonError: If a number or a name does not fit.
    """

    shard_rows: int = 64
    memory: float = 1.0
    batch_size: int | None = None
    pictures: bool = False
    figures: bool = False
    strict: bool = False
    devices: int | None = None
    nodes: int = 1
    accelerator: str | None = None

    def __post_init__(self) -> None:
        if self.shard_rows < 1 or not self.memory >= 0 or (self.batch_size or 1) < 1:
            raise ComparisonError(
                "Expected shard_rows and batch_size of at least 1 and memory of at least 0, got "
                f"{self.shard_rows}, {self.batch_size} and {self.memory}."
            )
        if self.accelerator not in (None, *ACCELERATORS):
            raise ComparisonError(
                f"Expected accelerator to be one of {', '.join(ACCELERATORS)}, got "
                f"'{self.accelerator}'."
            )


@contextmanager
def placed(model: SimilarityModel, accelerator: str | None, *, alone: bool) -> Iterator[str]:
    """Moves the model to the requested device, and back afterwards; yields the device's kind.

    Where there are several processes, lightning assigns the devices.
    """
    reference = next(model.parameters(), None)
    before = reference.device if reference is not None else torch.device("cpu")
    there = before.type
    if accelerator is not None:
        card = "cuda" if torch.cuda.is_available() else ""
        apple = "mps" if torch.backends.mps.is_available() else ""
        known = {"cpu": "cpu", "gpu": card or apple, "mps": apple, "auto": card or apple or "cpu"}
        there = known[accelerator]
        if not there:
            raise ModelError(
                f"Expected a device for accelerator {accelerator}, found none; say cpu or auto."
            )
    try:
        if alone and there != before.type:
            model.to(there)
        yield there
    finally:
        if reference is not None and reference.device != before:
            model.to(before)
