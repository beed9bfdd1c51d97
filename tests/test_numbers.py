"""The same question in other arithmetic: every method keeps within what it promises."""

from __future__ import annotations

import pytest
from numbers_of_methods import CHANGES, EXACT, PROMISED, moved

from simexplain.methods import METHODS

TRAINED = {"avsl", "weight_bank"}
"""Methods that need something fitted first; their own tests compare them."""


def test_every_method_has_a_promise() -> None:
    assert set(PROMISED) == set(METHODS) - TRAINED


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", PROMISED)
def test_maps_stay(method: str, change: str) -> None:
    share = moved(method, change)
    assert share <= (0 if change in EXACT else PROMISED[method])
