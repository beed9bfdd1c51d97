"""AVSL maps as a method: sums, a naive loop over nodes, and the account of a distance."""

from __future__ import annotations

import pytest
import torch
from avsl_cases import LEVELS, small_avsl
from conftest import TinyNet
from torch import Tensor
from torch.nn import functional as F

from simexplain import Comparison, attribute, explain
from simexplain.errors import ComparisonError, ModelError
from simexplain.evaluation.faithfulness import sanity_check
from simexplain.graph.inference import directed_cams
from simexplain.models.avsl import AVSL

PRESETS = pytest.mark.parametrize("preset", ["paper", "official"])


@pytest.fixture
def images() -> Tensor:
    """Grids of stages are whole multiples of each other at this size."""
    return torch.rand(5, 3, 32, 48, generator=torch.Generator().manual_seed(4)).double()


def everything(images: Tensor) -> Comparison:
    """Two positives and two negatives."""
    return Comparison(images[:1], images[None, 1:3], images[None, 3:])


def agreements(model: AVSL, a: Tensor, b: Tensor) -> list[Tensor]:
    """``lambda a b`` of every node, per level, from the rows of one pair."""
    with torch.no_grad():
        pair = model.pairs(a[None], b[None])
        units = [model.unpacked(row[None]).embeddings for row in (a, b)]
        return [s[0] * x[0] * y[0] for s, x, y in zip(pair.sensitivities, *units, strict=True)]


@PRESETS
def test_maps_add_up_to_agreements(preset: str, images: Tensor) -> None:
    model = small_avsl(preset)
    result = explain(model, everything(images), "avsl", keep_negative=True)
    rows = result.embeddings[0]
    alike = [float(sum(part.sum() for part in agreements(model, rows[0], row))) for row in rows[1:]]
    expected = [sum(alike[:2]) / 2 - sum(alike[2:]) / 2, alike[0] / 2, alike[1] / 2,
                -alike[2] / 2, -alike[3] / 2]  # fmt: skip
    assert result.scores[0].tolist() == pytest.approx(expected, rel=1e-9)
    assert result.maps[0].sum(dim=(1, 2)).tolist() == pytest.approx(expected, rel=1e-9)
    products = (result.weights * result.embeddings).sum(dim=2)
    torch.testing.assert_close(products, result.scores)


@PRESETS
def test_maps_of_evidence_distance_add_up_to_the_distances(preset: str, images: Tensor) -> None:
    model = small_avsl(preset)
    result = explain(
        model, everything(images), "avsl", evidence="distance", keep_negative=True, max_batch=2
    )
    near, far = result.distances[0, :2].mean(), result.distances[0, 2:].mean()
    torch.testing.assert_close(result.maps.sum(), far - near, rtol=1e-9, atol=1e-12)
    assert near > 0.01


@PRESETS
@pytest.mark.parametrize("level", range(3))
def test_one_level_of_a_pair_is_that_of_the_account(
    preset: str, level: int, images: Tensor
) -> None:
    model = small_avsl(preset)
    account = attribute(model, images[0], images[1])
    result = explain(
        model, Comparison.pair(images[:1], images[1:2]), "avsl", evidence="distance",
        level=LEVELS[level], keep_negative=True,
    )  # fmt: skip
    torch.testing.assert_close(result.maps[0], -account.level_maps(level))
    assert result.maps.shape[-2:] == account.features[level].shape[-2:]


@PRESETS
def test_layers_are_the_levels_with_their_own_maps(preset: str, images: Tensor) -> None:
    model = small_avsl(preset)
    result = explain(model, everything(images), "avsl", keep_negative=True)
    assert result.layers == LEVELS == tuple(result.layer_maps)
    assert result.layer == "stage1 + stage2 + stage3"  # added, not multiplied
    sizes = [tuple(maps.shape[-2:]) for maps in result.layer_maps.values()]
    assert len(set(sizes)) > 1, "each level keeps its own grid"
    sums = torch.stack([maps.sum(dim=(2, 3)) for maps in result.layer_maps.values()])
    torch.testing.assert_close(sums.sum(dim=0), result.scores)
    cut = explain(model, everything(images), "avsl")
    for level in LEVELS:
        one = explain(model, everything(images), "avsl", level=level, keep_negative=True)
        assert one.layers == (level,)
        torch.testing.assert_close(one.maps, result.layer_maps[level])
        assert torch.equal(cut.layer_maps[level], one.maps.relu())


def test_sanity_check_takes_the_model_s_own_levels(images: Tensor) -> None:
    pair = Comparison.pair(images[:1], images[1:2])
    result = sanity_check(small_avsl(), pair, "avsl", depths=[2])
    assert result.settings["layers"] == LEVELS
    assert not result.errors


def test_agreement_by_a_loop_over_nodes(images: Tensor) -> None:
    model = small_avsl()
    comparison = Comparison.triplet(images[:1], images[1:2], images[2:3])
    result = explain(model, comparison, "avsl", keep_negative=True)
    rows = result.embeddings[0]
    with torch.no_grad():
        features = model.feature_maps(images[:3])
    naive = torch.zeros(16, 24, dtype=torch.float64)
    for level, (weight, _) in enumerate(model.weights):
        with torch.no_grad():
            lambdas = [
                model.pairs(rows[:1], rows[n : n + 1]).sensitivities[level][0] for n in (1, 2)
            ]
        own = features[level][0]
        units = [model.unpacked(rows[n : n + 1]).embeddings[level][0] for n in range(3)]
        length = (weight @ own.mean(dim=(1, 2))).norm()
        grid = torch.zeros(own.shape[1:], dtype=torch.float64)
        for node in range(len(weight)):
            cam = sum(w * channel for w, channel in zip(weight[node], own, strict=True)) / length
            pull = lambdas[0][node] * units[1][node] - lambdas[1][node] * units[2][node]
            grid += pull * cam.detach() / cam.numel()
        factor = 16 // grid.shape[0]
        grown = F.interpolate(grid[None, None], scale_factor=factor, mode="bilinear")[0, 0]
        naive += grown / factor**2
    torch.testing.assert_close(result.maps[0, 0], naive)
    assert torch.equal(explain(model, comparison, "avsl").maps, result.maps.relu())


def test_directed_cams_add_up_for_every_pooling() -> None:
    features, weight, bias = torch.rand(2, 5, 3, 4), torch.randn(6, 5), torch.randn(6)
    pulls = torch.randn(2, 6)
    means = features.mean(dim=(2, 3)), features.amax(dim=(2, 3))
    for pooling, pooled in (("avg", means[0]), ("max", means[1]), ("avg+max", sum(means))):
        for offset in (None, bias):
            unit = F.normalize(F.linear(pooled, weight, offset), dim=1)
            maps = directed_cams(features, weight, offset, pulls, pooling)
            torch.testing.assert_close(maps.sum(dim=(1, 2)), (pulls * unit).sum(dim=1))


def test_refusals(tiny: TinyNet, images: Tensor) -> None:
    pair = Comparison.pair(images[:1], images[1:2])
    with pytest.raises(ModelError, match=r"Expected an AVSL model.*simexplain fit") as caught:
        explain(tiny, pair, "avsl")
    assert "\n" not in str(caught.value)
    with pytest.raises(ComparisonError, match="stage1, stage2, stage3"):
        explain(small_avsl(), pair, "avsl", level="stem")
    with pytest.raises(ComparisonError, match="agreement, distance"):
        explain(small_avsl(), pair, "avsl", evidence="x")
    with pytest.raises(ModelError) as caught:
        explain(small_avsl(), pair, "avsl", "stage1")
    assert str(caught.value) == (
        "Method 'avsl' has layers of its own (stage1, stage2, stage3) and takes no layer, got "
        "'stage1'; leave it away (the method's options are evidence, level, keep_negative)."
    )
    record = explain(small_avsl(), pair, "avsl").warnings
    assert "never trained" in record[0]
