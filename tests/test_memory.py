"""A thousand explanations by one process leave as much memory in use as the first few."""

from __future__ import annotations

import ctypes
import gc

import pytest
import torch
from numbers_of_methods import Convolutions

import simexplain
from simexplain import Comparison

COUNT, SIDE, BOUND = 1_000, 64, 8 * 2**20
"""One image of this side that stays behind after each would be six times the bound, in bytes."""


class Blocks(ctypes.Structure):
    """What the C library says of its memory (``mallinfo2``)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                     "uordblks", "fordblks", "keepcost")
    ]  # fmt: skip


def in_use() -> int:
    """Bytes that were asked of the C library and not given back; the heap itself may be larger."""
    asked = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if asked is None:
        pytest.skip("the C library does not count its memory")
    asked.restype = Blocks
    gc.collect()
    blocks = asked()
    return int(blocks.uordblks + blocks.hblkhd)


@pytest.mark.parametrize("method", ["sam", pytest.param("focus", marks=pytest.mark.slow)])
def test_memory_is_flat(method: str) -> None:
    model = simexplain.as_similarity_model(Convolutions().eval())
    before = objects = 0
    for number in range(COUNT + 100):
        if number == 100:
            before, objects = in_use(), len(gc.get_objects())
        pictures = torch.rand(2, 1, 3, SIDE, SIDE)
        simexplain.explain(model, Comparison.pair(*pictures), method, check=False)
    assert in_use() - before < BOUND
    assert len(gc.get_objects()) - objects < COUNT


def test_what_stays_behind_would_be_seen() -> None:
    before = in_use()
    kept = [torch.rand(3, SIDE, SIDE) for _ in range(COUNT)]
    assert in_use() - before > BOUND
    del kept
