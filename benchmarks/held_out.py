"""The part of a folder of emoji, or any classes, that no run of the benchmarks trains on."""

from __future__ import annotations

from pathlib import Path

from simexplain.data.datasets import read_dataset
from simexplain.data.folders import Record

TRAINED = 0.6
"""The share of the classes, in order of their names, that training may see."""


def held_out(folder: Path, group: str = "name") -> tuple[Record, ...]:
    """The pictures of the other classes; ``group`` is what a query leaves out of its gallery."""
    return read_dataset("folder", folder, train_share=TRAINED, group=group).queries
