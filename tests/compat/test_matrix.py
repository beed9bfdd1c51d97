"""The matrix of real networks: right, or a warning with the reason, or an error that says why."""

from __future__ import annotations

from functools import lru_cache

import pytest
from compat_checks import CHECKS, Case, check_refused, checks_of
from compat_net import Net
from compat_table import NETS, missing


@lru_cache(maxsize=1)
def built(net_name: str) -> Case:
    """The rows run one after the other, so the last one is all that is kept."""
    return Case(next(net for net in NETS if net.name == net_name))


def rows() -> list[object]:
    found: list[object] = []
    for net in NETS:
        marks = [] if net.quick else [pytest.mark.compat]
        if reason := missing(net):
            marks.append(pytest.mark.skip(reason=reason))
        found += [
            pytest.param(net, check, id=f"{net.name}-{check}", marks=marks)
            for check in checks_of(net)
        ]
    return found


@pytest.mark.parametrize(("net", "check"), rows())
def test_network(net: Net, check: str) -> None:
    if check == "refused":
        if check_refused(net) is None:  # it can be explained after all: then it must be right
            for name in ("default", "maps", "clear"):
                CHECKS[name](built(net.name))
        return
    CHECKS[check](built(net.name))
