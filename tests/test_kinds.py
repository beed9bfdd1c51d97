"""What is shown of each kind of network: the rule, and networks of every kind under it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import TinyNet

from simexplain import Comparison, as_similarity_model, explain
from simexplain.methods.focus import Focus
from simexplain.methods.kinds import (
    GRID,
    KINDS,
    LEAST_SIDE,
    NODES,
    SMALL,
    STAGES,
    kind_of,
    rows_for,
)
from simexplain.models.avsl import AVSL

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.mark.parametrize(
    ("grids", "kind"),
    [
        ([(28, 28), (14, 14), (7, 7)], STAGES),
        ([(16, 16), (8, 8), (4, 4)], STAGES),
        ([(12, 12), (6, 6), (3, 3)], SMALL),
        ([(8, 24), (4, 12), (2, 6)], SMALL),
        ([(14, 14)] * 3, GRID),
        ([(7, 7)], STAGES),
        ([(2, 2)] * 3, SMALL),
    ],
)
def test_the_kind_by_the_grids(grids: list[tuple[int, int]], kind: object) -> None:
    assert kind_of(grids) is kind


@pytest.mark.parametrize(
    ("name", "side", "kind"),
    [
        ("resnet18", 128, STAGES),
        ("resnet18", 64, SMALL),
        ("convnext_atto", 128, STAGES),
        ("vit_tiny_patch16_224", 64, GRID),
        ("mixer_s32_224", 160, GRID),
    ],
)
def test_networks_of_every_kind_are_shown_by_its_rule(name: str, side: int, kind: object) -> None:
    size = {"img_size": side} if kind is GRID else {}
    small = {"embed_dim": 48, "num_heads": 3, "depth": 4} if name.startswith("vit") else {}
    network = timm.create_model(name, num_classes=0, **size, **small).eval()
    model = as_similarity_model(network)
    images = torch.rand(2, 3, side, side)
    result = explain(model, Comparison.pair(images[:1], images[1:]), check=False)
    assert tuple(row.method for row in result.rows) == kind.rows
    focus = result.rows[1]
    assert focus.layers == model.stages_for(images)[-3:]
    grids = [tuple(maps.shape[2:]) for maps in focus.layer_maps.values()]
    assert min(map(min, grids)) >= LEAST_SIDE
    assert (len(set(grids)) == 1) == (kind is GRID)
    assert any("enlarged" in line for line in focus.warnings) == (kind is SMALL)


def test_an_avsl_model_has_nodes_of_its_own() -> None:
    model = AVSL(timm.create_model("resnet10t", num_classes=0), nodes=4).eval()
    for direction in (True, False):
        assert rows_for(model, direction=direction, chosen=False) == NODES.rows == ("sam",)


def test_what_the_rule_says_of_the_options(tiny: TinyNet, images: torch.Tensor) -> None:
    assert Focus().positions == LEAST_SIDE
    triplet = Comparison.triplet(*images[:3, None])
    assert [row.method for row in explain(tiny, triplet, check=False).rows] == ["sam", "focus"]
    along = Comparison.along(images[:1], torch.rand(10))
    assert [row.method for row in explain(tiny, along, check=False).rows] == ["focus"]


def test_the_page_has_the_rule_and_the_records() -> None:
    pytest.importorskip("skimage", reason="scikit-image has the backgrounds")
    import kinds_page

    folder = ROOT / "docs" / "benchmarks"
    trained, transformers = (
        json.loads((ROOT / "benchmarks" / "records" / name).read_text("utf-8"))
        for name in ("trained_pointing.json", "vit_pointing.json")
    )
    written = (folder / "kinds.md").read_text("utf-8")
    assert written == kinds_page.page(trained, transformers)
    for kind in KINDS:
        assert f"| {kind.name} |" in written
        assert kind.why in written
    for group in kinds_page.GROUPS:
        best = {
            row: sum(float(part[0][:, 0].mean() - part[0][:, 1].mean()) for part in own.values())
            for row, own in kinds_page.points_of(group, trained, transformers).items()
            if len(own) == 2 and len(own["same"][0]) == len(own["category"][0])
            if not row.startswith("nearest")  # what the network knows, which is no method
        }
        first = max(best, key=best.__getitem__)
        # The rule is what was measured, but where it would cost a second pass, as it says.
        assert first.startswith("focus") or group.pool == "avg", group.title
