"""The matrix of real networks: right, or a warning with the reason, or an error that says why."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from compat_checks import CHECKS, Case, check_refused, checks_of
from compat_files import check_file
from compat_heads import Part
from compat_known import KNOWN
from compat_net import Net
from compat_table import NETS, missing

from simexplain import Comparison, as_similarity_model, explain

QUICK_FILES = ("timm resnet18", "head: mean", "torchvision mobilenet_v2")


@lru_cache(maxsize=1)
def built(net_name: str) -> Case:
    """The rows run one after the other, so the last one is all that is kept."""
    return Case(next(net for net in NETS if net.name == net_name))


def known(name: str, check: str) -> list[pytest.MarkDecorator]:
    """A known fault must be there until its line is removed."""
    reason = KNOWN.get((name, check))
    return [pytest.mark.xfail(reason=reason, strict=True)] if reason else []


def rows() -> list[object]:
    result: list[object] = []
    for net in NETS:
        marks = [] if net.quick else [pytest.mark.compat]
        if reason := missing(net):
            marks.append(pytest.mark.skip(reason=reason))
        result += [
            pytest.param(
                net, check, id=f"{net.name}-{check}", marks=[*marks, *known(net.name, check)]
            )
            for check in checks_of(net)
        ]
    return result


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
            marks=[
                *([pytest.mark.skip(reason=missing(net))] if missing(net) else []),
                *([] if net.name in QUICK_FILES else [pytest.mark.compat]),
                *known(net.name, "file"),
            ],
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


@pytest.mark.parametrize("side", ["low", "right"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_layer_that_sees_a_part_is_drawn_on_that_part(side: str, alone: bool) -> None:
    """Layer `d` reads half of a map: no heat may be drawn where it does not look."""
    torch.manual_seed(0)
    network = Part(side, alone=alone).eval()
    images = torch.rand(2, 3, 64, 96)
    model = as_similarity_model(network)
    heat = explain(model, Comparison.pair(images[:1], images[1:]), layer="d").heatmaps[0]
    # A cell of d covers 4 pixels, and sees 10 more on either side.
    unseen = heat[:, :16] if side == "low" else heat[:, :, :32]
    assert float(heat.max()) == 1
    assert float(unseen.sum() / heat.sum()) < 0.02


def test_every_known_fault_names_a_row() -> None:
    names = {net.name for net in NETS}
    assert {name for name, _ in KNOWN} <= names
    assert all(reason for reason in KNOWN.values())
