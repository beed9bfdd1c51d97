"""The matrix of real networks: right, or a warning with the reason, or an error that says why."""

from __future__ import annotations

from functools import lru_cache

import pytest
from compat_checks import CHECKS, Case, check_refused, checks_of
from compat_files import check_file
from compat_net import Net
from compat_table import NETS, missing

QUICK_FILES = ("timm resnet18", "head: mean", "torchvision mobilenet_v2")


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


@pytest.mark.parametrize(
    "net",
    [
        pytest.param(
            net,
            id=net.name,
            marks=[*([pytest.mark.skip(reason=missing(net))] if missing(net) else [])]
            + ([] if net.name in QUICK_FILES else [pytest.mark.compat]),
        )
        for net in NETS
        if net.route
    ],
)
def test_through_a_file_and_the_command_line(net: Net) -> None:
    check_file(net)


def test_a_third_of_the_matrix_goes_through_a_file() -> None:
    assert sum(net.route is not None for net in NETS) * 3 >= len(NETS)


def test_names_are_unique() -> None:
    names = [net.name for net in NETS]
    assert len(set(names)) == len(names)
