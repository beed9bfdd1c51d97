"""Similarity mining: masks, tuples, maps in a step, Eq. 3 to 6, and what training with it does."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from avsl_cases import small_avsl
from conftest import SharedNet
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain import Comparison, as_similarity_model
from simexplain.errors import ComparisonError, ModelError
from simexplain.losses.attention import attention_maps, attention_mask, linear_maps, soft_mask
from simexplain.losses.mining import (
    MINING,
    SHAPES,
    MiningOptions,
    SimilarityMiningLoss,
    disjoint_tuples,
    mining_loss,
)
from simexplain.losses.objective import MetricLoss, Objective
from simexplain.losses.parameter_groups import parameter_groups
from simexplain.methods.cams import CAMS
from simexplain.methods.similarity_attention import SimilarityAttention
from simexplain.metrics.curves import FILLS
from simexplain.tracing import trace


class LinearNet(nn.Module):
    """Convolutions, average pooling and a linear head: the closed form holds."""

    def __init__(self, width: int = 6, *, head: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.Softplus(), nn.Conv2d(8, 8, 3, 2, 1), nn.Softplus()
        )
        self.head = nn.Linear(8, width) if head else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).mean(dim=(2, 3)))


class StripedNet(LinearNet):
    """Upper and lower half are pooled apart, as in PCB: every position has its own gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 6)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.body(images), (2, 1)).flatten(1))


def seeded(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in net.parameters():
            part.copy_(torch.randn(part.shape, generator=generator, dtype=part.dtype) * 0.4)
    return net


def pictures(count: int, side: int = 12, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        count, 3, side, side, generator=torch.Generator().manual_seed(7), dtype=dtype
    )


@pytest.fixture
def linear():
    return as_similarity_model(seeded(LinearNet()).double())


def test_soft_mask_is_the_formula_pixel_by_pixel() -> None:
    maps = torch.tensor([[[0.0, 2.0], [4.0, 1.0]]])
    images = torch.ones(1, 3, 2, 2) * 3
    masked = soft_mask(images, maps, alpha=10, beta=0.5)
    for row in range(2):
        for column in range(2):
            hidden = 1 / (1 + torch.exp(-10 * (maps[0, row, column] / 4 - 0.5)))
            assert torch.allclose(masked[0, :, row, column], 3 * (1 - hidden).expand(3))


def test_hidden_pixels_show_the_ground() -> None:
    images, ground = pictures(2), pictures(4)[2:]
    maps = torch.rand(2, 3, 3, dtype=torch.float64)
    mask = attention_mask(maps, (12, 12)).unsqueeze(1)
    masked = soft_mask(images, maps, ground=ground)
    assert torch.allclose(masked, images + mask * (ground - images))
    nothing = torch.zeros_like(images)
    assert torch.equal(soft_mask(images, maps, ground=nothing), soft_mask(images, maps))


def test_soft_mask_hides_the_peak_and_spares_an_empty_map() -> None:
    maps = torch.zeros(2, 4, 4)
    maps[0, 1, 1] = 5
    mask = attention_mask(maps, (16, 16))
    assert mask[0].amax() > 0.9
    assert mask[1].amax() < 0.01
    assert not mask.isnan().any()


def test_soft_mask_refuses_maps_that_do_not_fit() -> None:
    with pytest.raises(ComparisonError, match="as many maps"):
        soft_mask(torch.ones(2, 3, 4, 4), torch.ones(1, 2, 2))


@pytest.mark.parametrize("arch", SHAPES)
def test_tuples_are_disjoint_and_rightly_labelled(arch: str) -> None:
    labels = torch.arange(8).repeat_interleave(2)
    rows = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    result = disjoint_tuples(rows, labels, arch, generator=torch.Generator().manual_seed(3))
    flat = result.places.flatten().tolist()
    assert len(set(flat)) == len(flat)
    assert len(result) == {"siamese": 8, "triplet": 5, "quadruplet": 4}[arch]
    for anchor, positive, *negatives in result.places.tolist():
        assert labels[anchor] == labels[positive]
        assert all(labels[other] != labels[anchor] for other in negatives)


def test_negatives_are_the_nearest_that_are_left() -> None:
    rows = torch.tensor([[0.0], [0.1], [5.0], [9.0], [3.0], [7.0]])
    labels = torch.tensor([0, 0, 1, 2, 3, 4])
    assert disjoint_tuples(rows, labels).places[0, 2] == 4


def test_the_hardest_share_violates_most() -> None:
    generator = torch.Generator().manual_seed(5)
    rows, labels = torch.randn(24, 4, generator=generator), torch.arange(12).repeat_interleave(2)

    def hardness(places: Tensor) -> Tensor:
        a, p, n = rows[places].unbind(1)
        return (a - p).norm(dim=1) - (a - n).norm(dim=1)

    seed = torch.Generator().manual_seed(2)
    whole = disjoint_tuples(rows, labels, generator=seed)
    half = disjoint_tuples(rows, labels, share=0.5, generator=torch.Generator().manual_seed(2))
    assert len(half) == round(len(whole) / 2)
    assert hardness(half.places).min() >= hardness(whole.places).sort().values[-len(half)]


def test_a_batch_without_a_pair_is_refused() -> None:
    with pytest.raises(ComparisonError, match="several images of several classes"):
        disjoint_tuples(torch.randn(3, 2), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("head", [True, False])
def test_closed_form_equals_autograd(head: bool) -> None:
    model = as_similarity_model(seeded(LinearNet(head=head)).double())
    traced = trace(model, pictures(4), ("body",), differentiable=True)
    rows, grid = traced.embeddings, traced.maps["body"]
    weights = torch.rand(4, rows.shape[1], dtype=torch.float64)
    result = linear_maps(grid, model.network.head if head else None, rows, weights)
    slopes = torch.autograd.grad((rows * weights).sum(), grid)[0]
    plain = torch.einsum("mc,mchw->mhw", slopes.mean(dim=(2, 3)), grid)
    assert result is not None
    assert torch.allclose(result, plain, atol=1e-12)


def test_closed_form_declines_another_end() -> None:
    model = as_similarity_model(SharedNet())
    layer = model.default_layer
    traced = trace(model, pictures(2, 16, torch.float32), (layer,), differentiable=True)
    linear_layer = nn.Linear(traced.maps[layer].shape[1], traced.embeddings.shape[1])
    weights = torch.rand_like(traced.embeddings)
    assert linear_maps(traced.maps[layer], linear_layer, traced.embeddings, weights) is None


def test_both_forms_train_alike(linear, monkeypatch: pytest.MonkeyPatch) -> None:
    """The double backward is the reference for the gradient through the closed form."""
    images = Comparison.triplet(*pictures(6).chunk(3))
    loss = SimilarityMiningLoss(layer="body")
    first = torch.autograd.grad(loss.on(linear, images), list(linear.parameters()))
    monkeypatch.setattr("simexplain.losses.attention.linear_maps", lambda *_: None)
    second = torch.autograd.grad(loss.on(linear, images), list(linear.parameters()))
    for one, other in zip(first, second, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("layers", [("body",), ("body", "body.1"), ("body.0", "body")])
def test_maps_are_those_of_similarity_attention(linear, layers: tuple[str, ...]) -> None:
    images = Comparison.triplet(*pictures(6).chunk(3))
    flat = images.stacked().flatten(0, 1)
    explained = SimilarityAttention()(linear, images, list(layers))
    traced = trace(linear, flat, layers, differentiable=True)
    weights = explained.weights.unsqueeze(1).expand(-1, 3, -1).flatten(0, 1)
    rows, which = traced.embeddings, torch.arange(6)
    maps = attention_maps(traced, rows, linear.network, layers, which, weights)
    assert torch.allclose(images.restacked(maps), explained.maps, atol=1e-10)


@pytest.mark.parametrize("cam", CAMS)
def test_maps_of_every_formula_train_as_plain_autograd(linear, cam: str) -> None:
    """Grad-CAM's closed form must not stand in for another formula, nor the other way round."""
    images, weights = pictures(4), torch.rand(4, 6, dtype=torch.float64)
    traced = trace(linear, images, ("body",), differentiable=True)
    rows, which = traced.embeddings, torch.arange(4)
    result = attention_maps(traced, rows, linear.network, ("body",), which, weights, cam)
    grid = linear.network.body(images)
    score = (F.normalize(linear.network.head(grid.mean(dim=(2, 3))), dim=1) * weights).sum()
    slopes = torch.autograd.grad(score, grid, create_graph=True)[0]
    plain = CAMS[cam](grid, slopes).relu()
    assert torch.allclose(result, plain, atol=1e-12)
    learnt, meant = (
        torch.autograd.grad((maps * maps).sum(), list(linear.parameters())[:2])
        for maps in (result, plain)
    )
    for one, other in zip(learnt, meant, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_mining_hides_what_its_formula_shows() -> None:
    """The option reaches the maps: in a network that ends in stripes both formulas differ."""
    model = as_similarity_model(seeded(StripedNet()).double())
    images = Comparison.triplet(*pictures(6).chunk(3))
    explained = SimilarityAttention(cam="hires_cam")(model, images, ["body"])
    flat, heat = images.stacked().flatten(0, 1), explained.maps.flatten(0, 1)
    masked = images.like(images.restacked(model.embed(soft_mask(flat, heat))))
    result = SimilarityMiningLoss(layer="body", cam="hires_cam").on(model, images)
    assert torch.allclose(result, mining_loss(masked), atol=1e-10)
    grad_cam = SimilarityMiningLoss(layer="body").on(model, images)
    assert not torch.allclose(result, grad_cam, rtol=1e-3)


@pytest.mark.parametrize("fill", ["border", "blur", "mean", "black"])
def test_hidden_pixels_show_what_is_asked_for(linear, fill: str) -> None:
    images = Comparison.triplet(*pictures(6).chunk(3))
    explained = SimilarityAttention()(linear, images, ["body"])
    flat, heat = images.stacked().flatten(0, 1), explained.maps.flatten(0, 1)
    prepare = linear.preprocess
    black = [-mean / std for mean, std in zip(prepare.mean, prepare.std, strict=True)]
    ground = FILLS[fill](flat, flat.new_tensor(black).view(3, 1, 1))
    masked = images.like(images.restacked(linear.embed(soft_mask(flat, heat, ground=ground))))
    result = SimilarityMiningLoss(layer="body", fill=fill).on(linear, images)
    assert torch.allclose(result, mining_loss(masked), atol=1e-10)
    assert not torch.allclose(result, SimilarityMiningLoss(layer="body").on(linear, images))


def naive(model, images: Comparison, rule: str, alpha: float, beta: float) -> Tensor:
    """The loss restated image by image from the paper, with autograd and no sharing."""
    total = torch.zeros((), dtype=torch.float64)
    for b in range(images.batch):
        stack = images.stacked()[b]
        f = F.normalize(model.network(stack), dim=1).detach()
        w = torch.ones_like(f[0])
        for index, role in enumerate(images.roles[1:], start=1):
            gap = (f[0] - f[index]).abs()
            w = w * ((1 - gap) if role == "positive" else gap)
        masked = []
        for image in stack:
            grid = model.network.body(image[None])
            row = F.normalize(model.network.head(grid.mean(dim=(2, 3))), dim=1)[0]
            slope = torch.autograd.grad((w * row).sum(), grid, create_graph=True)[0]
            alphas = slope.mean(dim=(2, 3))[0]
            heat = sum(alphas[c] * grid[0, c] for c in range(len(alphas))).relu()
            up = F.interpolate(heat[None, None], image.shape[1:], mode="bilinear")[0, 0]
            up = up / up.max()
            masked.append(image * (1 - torch.sigmoid(alpha * (up - beta))))
        g = F.normalize(model.network(torch.stack(masked)), dim=1)
        roles = images.roles
        near = [(g[0] - g[k]).norm() for k in range(1, len(g)) if roles[k] == "positive"]
        far = [(g[0] - g[k]).norm() for k in range(1, len(g)) if roles[k] == "negative"]
        if not far:
            total = total - sum(near)
        elif not near:
            total = total + sum(far)
        else:
            for p in near:
                for n in far:
                    gap = p - n
                    total = total + {
                        "absolute": gap.abs(), "printed": gap, "reversed": (-gap).relu(),
                        "held": (gap + 0.2).relu(),
                    }[rule]  # fmt: skip
    return total / images.batch


COMPARISONS = {
    "siamese": lambda x: Comparison.pair(*x[:4].chunk(2)),
    "different": lambda x: Comparison.pair(*x[:4].chunk(2), similar=False),
    "triplet": lambda x: Comparison.triplet(*x[:6].chunk(3)),
    "quadruplet": lambda x: Comparison.quadruplet(*x[:8].chunk(4)),
    "set": lambda x: Comparison(x[:2], x[2:6].view(2, 2, *x.shape[1:]), x[6:8, None]),
}


@pytest.mark.parametrize("rule", MINING)
@pytest.mark.parametrize("arch", COMPARISONS)
def test_the_loss_is_the_papers(linear, arch: str, rule: str) -> None:
    images = COMPARISONS[arch](pictures(8))
    options = MiningOptions(layer="body", rule=rule, alpha=8, beta=0.4)
    result = SimilarityMiningLoss(options).on(linear, images)
    assert torch.allclose(result, naive(linear, images, rule, 8, 0.4), atol=1e-10)


@pytest.mark.parametrize("layer", ["body", "body, body.1"])
@pytest.mark.parametrize("arch", ["siamese", "triplet"])
def test_its_gradient_is_that_of_finite_differences(linear, arch: str, layer: str) -> None:
    """In float64, through mask and maps; the weights of a step are constants, so they are held."""
    images = COMPARISONS[arch](pictures(6))
    loss = SimilarityMiningLoss(layer=layer)
    fixed = rows_of(linear, images)
    parameter = linear.network.body[2].weight
    gradient = torch.autograd.grad(held(loss, linear, images, fixed), parameter)[0]
    step = 1e-6
    for index in [(0, 0, 0, 0), (3, 5, 1, 2), (7, 2, 2, 1)]:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[index] += sign * step
            values.append(held(loss, linear, images, fixed).item())
            with torch.no_grad():
                parameter[index] -= sign * step
        assert gradient[index].item() == pytest.approx(
            (values[0] - values[1]) / (2 * step), rel=1e-4
        )


def rows_of(model, images: Comparison) -> Tensor:
    return model.embed(images.stacked().flatten(0, 1)).detach()


def held(loss: SimilarityMiningLoss, model, images: Comparison, rows: Tensor) -> Tensor:
    """The loss with the weight vectors of other rows, as if nothing moved them."""
    from simexplain.losses import mining

    original = mining.scaled_weights
    fixed = original(images.like(images.restacked(rows)), "paper")
    mining.scaled_weights = lambda *_: fixed  # type: ignore[assignment]
    try:
        return loss.on(model, images)
    finally:
        mining.scaled_weights = original


def masked_distances(model, images: Comparison) -> tuple[float, float]:
    """Mean distances of masked positive and masked negative to the masked anchor."""
    attention = SimilarityAttention()(model, images, ["body"])
    flat = soft_mask(images.stacked().flatten(0, 1), attention.maps.flatten(0, 1))
    with torch.no_grad():
        result = images.like(images.restacked(model.embed(flat)))
    positive = (result.anchor - result.positives[:, 0]).norm(dim=1).mean()
    if not result.negatives.shape[1]:
        return float(positive), 0.0
    return float(positive), float((result.anchor - result.negatives[:, 0]).norm(dim=1).mean())


def minimised(model, images: Comparison, **options: object) -> None:
    loss = SimilarityMiningLoss(layer="body", **options)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimiser.zero_grad()
        loss.on(model, images).backward()
        optimiser.step()


def test_minimising_drives_masked_distances_as_the_paper_says(linear) -> None:
    """Pairs come apart when masked (Eq. 4); a masked triplet becomes undecided (Eq. 3)."""
    pair = COMPARISONS["siamese"](pictures(8))
    before = masked_distances(linear, pair)[0]
    minimised(linear, pair)
    assert masked_distances(linear, pair)[0] > 1.5 * before

    other = as_similarity_model(seeded(LinearNet()).double())
    triplet = COMPARISONS["triplet"](pictures(8))
    near, far = masked_distances(other, triplet)
    minimised(other, triplet)
    after = masked_distances(other, triplet)
    assert abs(after[0] - after[1]) < 0.2 * abs(near - far)


def test_as_printed_the_triplet_is_made_to_hold_instead(linear) -> None:
    triplet = COMPARISONS["triplet"](pictures(8))
    near, far = masked_distances(linear, triplet)
    minimised(linear, triplet, rule="printed")
    after = masked_distances(linear, triplet)
    assert after[0] - after[1] < near - far


def test_without_the_mask_in_the_graph_the_gradient_differs(linear) -> None:
    images = COMPARISONS["triplet"](pictures(6))
    parameters = list(linear.parameters())
    through = torch.autograd.grad(SimilarityMiningLoss(layer="body").on(linear, images), parameters)
    stopped = SimilarityMiningLoss(layer="body", through_mask=False).on(linear, images)
    assert torch.allclose(stopped, SimilarityMiningLoss(layer="body").on(linear, images))
    cut = torch.autograd.grad(stopped, parameters)
    assert not torch.allclose(through[0], cut[0], rtol=1e-3)


@pytest.mark.parametrize("arch", SHAPES)
def test_attention_and_network_are_trained_apart(linear, arch: str) -> None:
    """What attention learns and what the second look learns add up to the whole gradient."""
    images = COMPARISONS[arch](pictures(12))
    parameters = list(linear.parameters())

    def of(**options: bool) -> tuple[Tensor, ...]:
        loss = SimilarityMiningLoss(arch=arch, layer="body", **options).on(linear, images)
        return torch.autograd.grad(loss, parameters)

    whole, network, attention = of(), of(through_mask=False), of(through_network=False)
    for total, one, other in zip(whole, network, attention, strict=True):
        assert torch.allclose(total, one + other, rtol=1e-9, atol=1e-14)
        assert other.abs().max() > 0
    assert all(part.requires_grad for part in parameters)


def test_mining_on_avsl_takes_all_levels_as_one_embedding() -> None:
    """Both papers at once: unit rows of all levels, maps at the top level, by plain autograd."""
    model = small_avsl()
    images = Comparison.triplet(*pictures(6, 32).chunk(3))
    result = SimilarityMiningLoss(layer="stage3").on(model, images)

    def unit(batch: Tensor) -> tuple[Tensor, Tensor]:
        maps = model.feature_maps(batch)
        levels = model.unpacked(model.rows(maps)).embeddings
        return torch.cat(levels, dim=1) / 3**0.5, maps[-1]

    total = torch.zeros((), dtype=torch.float64)
    for stack in images.stacked():
        a, p, n = unit(stack)[0].detach()
        weights = (1 - (a - p).abs()) * (a - n).abs()
        masked = []
        for image in stack:
            row, grid = unit(image[None])
            slope = torch.autograd.grad((row[0] * weights).sum(), grid, create_graph=True)[0]
            heat = (slope.mean(dim=(2, 3), keepdim=True) * grid).sum(dim=1).relu()
            masked.append(soft_mask(image[None], heat)[0])
        a, p, n = unit(torch.stack(masked))[0]
        total = total + ((a - p).norm() - (a - n).norm()).abs()
    assert torch.allclose(result, total / images.batch, atol=1e-10)
    result.backward()
    assert all(weight.grad is not None for weight, _ in model.weights[1:])


def test_stopping_at_the_mask_works_without_a_linear_end(linear, monkeypatch) -> None:
    images = COMPARISONS["triplet"](pictures(6))
    loss = SimilarityMiningLoss(layer="body", through_mask=False)
    expected = torch.autograd.grad(loss.on(linear, images), list(linear.parameters()))
    monkeypatch.setattr("simexplain.losses.attention.linear_maps", lambda *_: None)
    result = torch.autograd.grad(loss.on(linear, images), list(linear.parameters()))
    for one, other in zip(result, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_an_objective_adds_its_terms_in_one_pass(linear, monkeypatch) -> None:
    """Eq. 6, with a loss and a miner of pytorch-metric-learning: two forward passes in all."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    images, labels = pictures(12), torch.arange(6).repeat_interleave(2)
    metric = MetricLoss(losses.TripletMarginLoss(0.2), miners.BatchHardMiner())
    objective = Objective({"ml": (1.0, metric), "sm": (0.3, SimilarityMiningLoss(layer="body"))})
    calls: list[int] = []
    embed = type(linear).embed
    monkeypatch.setattr(type(linear), "embed", lambda s, x: (calls.append(len(x)), embed(s, x))[1])
    result = objective(linear, images, labels, seed=4)
    assert len(calls) == 2
    assert calls[1] <= calls[0]
    assert result.total.item() == pytest.approx(
        float(result.parts["ml"]) + 0.3 * float(result.parts["sm"])
    )
    miner = miners.BatchHardMiner()
    rows = linear.embed(images)
    own = losses.TripletMarginLoss(0.2)(rows, labels, miner(rows, labels))
    assert result.parts["ml"].item() == pytest.approx(own.item())
    result.total.backward()
    assert all(part.grad is not None for part in linear.parameters())


def test_a_step_depends_on_its_seed_alone(linear) -> None:
    images, labels = pictures(12), torch.arange(6).repeat_interleave(2)
    objective = Objective({"sm": (1.0, SimilarityMiningLoss(layer="body"))})
    state = torch.get_rng_state()
    values = [objective(linear, images, labels, seed=seed).total.item() for seed in (1, 1, 2)]
    assert values[0] == values[1] != values[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_batch_norm_learns_nothing_from_masked_images() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    model = as_similarity_model(nn.Sequential(net, nn.Flatten()).train())
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    images, labels = pictures(6, dtype=torch.float32), torch.tensor([0, 0, 1, 1, 2, 2])
    objective = Objective({"sm": (1.0, SimilarityMiningLoss(layer="0.2"))})
    objective(model, images, labels)
    after_one = [norm.running_mean.clone() for norm in norms]
    assert [int(norm.num_batches_tracked) for norm in norms] == [1]
    expected = 0.1 * net[0](images).mean(dim=(0, 2, 3))
    assert torch.allclose(after_one[0], expected, atol=1e-6)
    assert all(norm.momentum == 0.1 for norm in norms)


def test_half_resolution_and_half_of_the_comparisons(linear, monkeypatch) -> None:
    images, labels = pictures(12), torch.arange(6).repeat_interleave(2)
    shapes: list[torch.Size] = []
    embed = type(linear).embed
    monkeypatch.setattr(
        type(linear), "embed", lambda s, x: (shapes.append(x.shape), embed(s, x))[1]
    )
    whole = Objective({"sm": (1.0, SimilarityMiningLoss(layer="body"))})
    less = SimilarityMiningLoss(layer="body", masked_scale=0.5, share=0.5)
    whole(linear, images, labels)
    Objective({"sm": (1.0, less)})(linear, images, labels)
    assert shapes[3][2:] == (6, 6)
    assert shapes[3][0] <= (shapes[1][0] + 3) / 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rule": "both"}, "mining rule"),
        ({"share": 0.0}, "share and masked_scale"),
        ({"masked_scale": 2.0}, "share and masked_scale"),
        ({"weights": "mine"}, "weights"),
        ({"cam": "score_cam"}, "cam to be one of grad_cam"),
        ({"alpha": 0.0}, "alpha"),
        ({"through_mask": False, "through_network": False}, "would train nothing"),
    ],
)
def test_options_are_checked(options, said: str) -> None:
    with pytest.raises(ComparisonError, match=said):
        MiningOptions(**options)


def test_mining_loss_names_its_rules() -> None:
    rows = Comparison.pair(torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(ComparisonError, match="absolute, printed, reversed"):
        mining_loss(rows, "other")


def test_identical_masked_images_have_a_gradient() -> None:
    rows = torch.ones(2, 3, requires_grad=True)
    mining_loss(Comparison.pair(rows, rows.detach())).backward()
    assert rows.grad is not None
    assert not rows.grad.isnan().any()


def test_objective_refuses_what_does_not_fit(linear) -> None:
    with pytest.raises(ModelError, match="at least one term"):
        Objective({})
    with pytest.raises(ModelError, match="weight of 'sm' to be a finite number"):
        Objective({"sm": (float("nan"), SimilarityMiningLoss())})
    objective = Objective({"sm": (1.0, SimilarityMiningLoss(layer="body"))})
    with pytest.raises(ModelError, match="a label for each"):
        objective(linear, pictures(4), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ModelError, match="masks of shape"):
        objective(linear, pictures(4), torch.zeros(4, dtype=torch.long), masks=torch.ones(4, 2, 2))


# ---------------------------------------------------------------- any network, any loop


class Attending(nn.Module):
    """Patches, two layers of self-attention with the fused kernel, mean and a linear head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 12, dropout=0.0, batch_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(width, 6)

    def forward(self, images: Tensor) -> Tensor:
        rows = self.patches(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            rows = block(rows)
        return self.head(rows.mean(dim=1))


def written_out(q: Tensor, k: Tensor, v: Tensor, *args: object, **more: object) -> Tensor:
    """Attention as its formula, which autograd differentiates as often as wanted."""
    return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1) @ v


def test_transformers_are_trained_through_their_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    # The fused kernel has no second derivative.
    model = as_similarity_model(seeded(Attending().double()))
    images, labels = pictures(6), torch.tensor([0, 0, 0, 1, 1, 1])
    objective = Objective({"sm": (1.0, SimilarityMiningLoss(layer="patches"))})
    parameters = list(model.parameters())
    result = torch.autograd.grad(objective(model, images, labels).total, parameters)
    monkeypatch.setattr(F, "scaled_dot_product_attention", written_out)
    expected = torch.autograd.grad(objective(model, images, labels).total, parameters)
    assert float(expected[0].abs().max()) > 0
    for slope, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(slope, wanted)


def test_a_timm_transformer_takes_a_step() -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("test_vit", num_classes=8, img_size=64)
    labels = torch.arange(3).repeat_interleave(2)
    enabled = torch.backends.cuda.flash_sdp_enabled()
    objective = Objective({"sm": (1.0, SimilarityMiningLoss())})
    objective(network, pictures(6, 64, torch.float32), labels).total.backward()
    assert torch.backends.cuda.flash_sdp_enabled() == enabled
    slopes = [p.grad for p in network.parameters() if p.grad is not None]
    assert slopes
    assert all(bool(slope.isfinite().all()) for slope in slopes)


@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel, torch.compile])
def test_any_network_is_trained_as_the_model_it_becomes(wrap) -> None:
    network = seeded(LinearNet().double())
    images, labels = pictures(6), torch.tensor([0, 0, 1, 1, 2, 2])
    objective = Objective({"sm": (1.0, SimilarityMiningLoss())})
    expected = objective(as_similarity_model(network), images, labels).total
    wrapped = wrap(network)
    assert torch.equal(objective(wrapped, images, labels).total, expected)
    assert not list(objective.parameters()), "the network is no part of the objective"
    assert copy.deepcopy(objective)._known is None
    images_of_it = Comparison.triplet(images[[0]], images[[1]], images[[2]])
    loss = SimilarityMiningLoss()
    alone = loss.on(wrapped, images_of_it)
    assert torch.equal(alone, loss.on(as_similarity_model(network), images_of_it))
    names = {group["name"] for group in parameter_groups(objective, wrapped, learning_rate=0.1)}
    assert names == {"network", "heads"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": [0, 0, 1, 1]}, "labels as a tensor, got list"),
        ({"images": np.zeros((4, 3, 8, 8))}, "images as a tensor, got ndarray"),
        ({"masks": np.zeros((4, 8, 8))}, "masks as a tensor, got ndarray"),
        ({"images": torch.zeros(0, 3, 8, 8), "labels": torch.zeros(0)}, "at least one"),
        ({"images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}, "of torch.uint8"),
        ({"labels": torch.zeros(4)}, "whole numbers as labels"),
        ({"seed": None}, "whole number as the seed of this step, got None"),
        (
            {"model": "resnet18"},
            "Expected an nn.Module, got 'resnet18'; load files",
        ),
    ],
)
def test_raw_inputs_are_refused_in_a_sentence(linear, change: dict, said: str) -> None:
    objective = Objective({"sm": (1.0, SimilarityMiningLoss())})
    given = {"model": linear, "images": pictures(4, 8), "labels": torch.tensor([0, 0, 1, 1])}
    with pytest.raises(ModelError, match=re.escape(said)):
        objective(**given | change)


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ({"sm": SimilarityMiningLoss()}, "(weight, term) for 'sm', got SimilarityMiningLoss"),
        ({"ml": (1.0, nn.Linear(1, 1))}, "for 'ml', got (float, Linear)"),
        ({"a.b": (1.0, SimilarityMiningLoss())}, "an identifier as the name of a term, got 'a.b'"),
        ({"sm": ("1", SimilarityMiningLoss())}, "weight of 'sm' to be a finite number, got '1'"),
        ([SimilarityMiningLoss()], "{name: (weight, term)}"),
    ],
)
def test_terms_that_are_none_are_refused(terms, said: str) -> None:
    with pytest.raises(ModelError, match=re.escape(said)):
        Objective(terms)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": "none"}, "beta to be a finite number, got 'none'"),
        ({"alpha": float("nan")}, "alpha to be a finite number, got nan"),
        ({"through_mask": "maybe"}, "through_mask to be true or false, got 'maybe'"),
        ({"share": "x"}, "share to be a finite number, got 'x'"),
        ({"share": True}, "share to be a finite number, got True"),
        ({"layer": 3}, "layer to be a name, got 3"),
        ({"foo": 1}, "options of mining among arch, weights, rule"),
        ({"arch": "quintuplet"}, "arch to be one of siamese, triplet, quadruplet"),
    ],
)
def test_options_of_mining_have_kinds(options: dict, said: str) -> None:
    with pytest.raises(ComparisonError, match=re.escape(said)):
        SimilarityMiningLoss(**options)
