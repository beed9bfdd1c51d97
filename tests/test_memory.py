"""A thousand explanations by one process leave as much memory as the first few."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from numbers_of_methods import Convolutions

import simexplain
from simexplain import Comparison

COUNT, SIDE, BOUND = 1_000, 64, 16 * 2**20
"""One image of this side that stays behind after each would be three times the bound, in bytes."""


def resident() -> int:
    """Bytes of memory that this process holds."""
    gc.collect()
    return 4096 * int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("method", ["sam", "focus"])
def test_memory_is_flat(method: str) -> None:
    model = simexplain.as_similarity_model(Convolutions().eval())
    before = 0
    for number in range(COUNT + 100):
        if number == 100:
            before = resident()
        pictures = torch.rand(2, 1, 3, SIDE, SIDE)
        simexplain.explain(model, Comparison.pair(*pictures), method, check=False)
    assert resident() - before < BOUND


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_stays_behind_would_be_seen() -> None:
    before, kept = resident(), []
    for _ in range(COUNT):
        kept.append(torch.rand(3, SIDE, SIDE))
    assert resident() - before > BOUND
