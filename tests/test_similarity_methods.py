"""The Grad-CAM family on similarities, and the exact decomposition, against plain autograd."""

from __future__ import annotations

import pytest
import timm
import torch
from conftest import TinyNet, plain_maps, varied
from tails import POOLS, Curved, Tailed, randomised
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain import Comparison, as_similarity_model, explain
from simexplain.errors import ComparisonError, ModelError
from simexplain.methods import METHODS
from simexplain.methods.decomposition import position_parts
from simexplain.methods.method import margin_directions


def arranged(images: Tensor, count: int) -> list[Comparison]:
    """The first images as a pair, a dissimilar pair, a triplet, or a set."""
    stack = images.unsqueeze(1)
    return {
        2: [
            Comparison.pair(images[:2], images[2:4]),
            Comparison.pair(images[:2], images[2:4], False),
        ],
        3: [Comparison.triplet(images[:2], images[2:4], images[4:6])],
        5: [Comparison(images[:1], stack[1:3].transpose(0, 1), stack[3:5].transpose(0, 1))],
    }[count]


def test_directions_are_the_derivative_of_the_margin() -> None:
    rows = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    comparison = Comparison(rows[:, 0], rows[:, 1:3], rows[:, 3:])
    a, p, n = comparison.anchor, comparison.positives, comparison.negatives
    margin = (a[:, None] * p).sum(dim=2).mean(dim=1) - (a[:, None] * n).sum(dim=2).mean(dim=1)
    (gradient,) = torch.autograd.grad(margin.sum(), rows)
    torch.testing.assert_close(margin_directions(comparison), gradient)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_cosine_maps_equal_plain_autograd_on_each_image_alone(
    tiny: TinyNet, images: Tensor, count: int
) -> None:
    for comparison in arranged(images, count):
        result = explain(tiny, comparison, "similarity_cam", "last")
        stack = comparison.stacked()
        rows = F.normalize(tiny(stack.flatten(0, 1)), dim=1).view(*stack.shape[:2], -1)
        directions = margin_directions(comparison.like(rows.detach()))
        torch.testing.assert_close(result.weights, directions, rtol=1e-5, atol=1e-6)
        for index in range(stack.shape[0]):
            for position in range(count):
                expected, row, _ = plain_maps(
                    tiny, tiny.last, stack[index, position][None], directions[index, position]
                )
                torch.testing.assert_close(
                    result.maps[index, position], expected, rtol=1e-4, atol=1e-6
                )
                score = float(row @ directions[index, position])
                assert float(result.scores[index, position]) == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("score", ["dot", "held"])
def test_other_scores_equal_plain_autograd(tiny: TinyNet, images: Tensor, score: str) -> None:
    result = explain(
        tiny, Comparison.pair(images[:1], images[1:2]), "similarity_cam", "last",
        score=score, keep_negative=True,
    )  # fmt: skip
    kept: list[Tensor] = []
    handle = tiny.last.register_forward_hook(lambda _m, _a, out: kept.append(out))
    vectors = tiny(images[:2])
    handle.remove()
    one, other = vectors.detach()
    length, other_length = one.norm(), other.norm()
    value = vectors[0] @ other
    if score == "held":
        value = value / (length * other_length)
    (gradient,) = torch.autograd.grad(value, kept[0])
    expected = torch.einsum("c,chw->hw", gradient[0].mean(dim=(1, 2)), kept[0][0].detach())
    torch.testing.assert_close(result.maps[0, 0], expected, rtol=1e-4, atol=1e-6)
    assert float(result.scores[0, 0]) == pytest.approx(float(value), rel=1e-4)


def test_the_cosine_s_map_cancels_and_says_so(images: Tensor) -> None:
    """Average pooling and a head without bias: the trap of Grad-CAM on a cosine."""
    network = TinyNet().eval()
    network.head = nn.Linear(12, 10, bias=False)
    pair = Comparison.pair(images[:1], images[1:2])
    cosine = explain(network, pair, "similarity_cam", "last", keep_negative=True)
    assert float(cosine.maps.sum(dim=(2, 3)).abs().max()) < 1e-4 * float(cosine.maps.abs().sum())
    assert any("cancels exactly" in warning for warning in cosine.warnings)
    held = explain(network, pair, "similarity_cam", "last", keep_negative=True, score="held")
    assert held.warnings == ()
    # With the length held, what the positions add up to is the cosine itself.
    torch.testing.assert_close(held.maps.sum(dim=(2, 3)), held.scores, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    ("norm", "linear", "bias"),
    [(False, False, False), (False, True, False), (True, False, True), (True, True, True)],
)
def test_decomposition_adds_up_for_every_tail(
    images: Tensor, pool: str, norm: bool, linear: bool, bias: bool
) -> None:
    network = randomised(Tailed(pool, norm=norm, linear=linear, bias=bias))
    comparison = Comparison.triplet(images[:2], images[2:4], images[4:6])
    result = explain(network, comparison, "decomposition", "act")
    difference = (result.maps.sum(dim=(2, 3)) - result.scores).abs()
    assert float(difference.max()) < 1e-5 * max(1.0, float(result.scores.abs().max()))
    assert not any("Jacobians" in warning for warning in result.warnings)
    parts = position_parts(as_similarity_model(network), images, "act")
    assert parts.steps == 0
    assert float(parts.residual.max()) < 1e-5


def test_average_pooling_gives_the_published_formula(images: Tensor) -> None:
    """``(W u_p) . e_r`` plus an even share of the bias, over both lengths (Zhu et al.)."""
    network = Tailed("average", norm=False, linear=True, bias=True).eval()
    result = explain(network, Comparison.pair(images[:1], images[1:2]), "decomposition", "act")
    with torch.no_grad():
        features = network.act(network.body(images[:2]))
        one, other = network(images[:2])
        cells = features.shape[2] * features.shape[3]
        projected = torch.einsum("ec,chw->ehw", network.head.weight, features[0]) / cells
        local = projected + network.head.bias[:, None, None] / cells
        expected = torch.einsum("ehw,e->hw", local, other) / (one.norm() * other.norm())
    torch.testing.assert_close(result.maps[0, 0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "densenet121"])
def test_residual_is_rounding_on_networks_of_timm(name: str) -> None:
    network = varied(timm.create_model(name, num_classes=0))
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    result = explain(network, Comparison.pair(images[:1], images[1:]), "decomposition")
    assert float((result.maps.sum(dim=(2, 3)) - result.scores).abs().max()) < 1e-5


def test_tails_that_are_not_linear_are_integrated_and_said_to_be(images: Tensor) -> None:
    network = Curved("average", norm=False, linear=True, bias=True).eval()
    pair = Comparison.pair(images[:1], images[1:2])
    result = explain(network, pair, "decomposition", "act")
    torch.testing.assert_close(result.maps.sum(dim=(2, 3)), result.scores, rtol=1e-4, atol=1e-4)
    rough = explain(network, pair, "decomposition", "act", steps=1)
    assert any("1 Jacobians were averaged" in warning for warning in rough.warnings)
    error = (rough.maps.sum(dim=(2, 3)) - rough.scores).abs().max()
    assert float(error) > 1e-4


def test_a_layer_beside_a_skip_connection_still_adds_up(images: Tensor) -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 6, 3, stride=4, padding=1)
            self.side = nn.Conv2d(6, 6, 3, padding=1)
            self.last = nn.ReLU()

        def forward(self, images: Tensor) -> Tensor:
            features = self.body(images)
            return (features + self.last(self.side(features))).mean(dim=(2, 3))

    result = explain(
        Skip().eval(), Comparison.pair(images[:1], images[1:2]), "decomposition", "last"
    )
    torch.testing.assert_close(result.maps.sum(dim=(2, 3)), result.scores, rtol=1e-4, atol=1e-5)


def test_results_do_not_depend_on_the_batch_and_nothing_is_touched(
    tiny: TinyNet, images: Tensor
) -> None:
    comparison = Comparison.triplet(images[:2], images[2:4], images[4:6])
    modes = [module.training for module in tiny.train().modules()]
    before, kept = torch.get_rng_state(), images.clone()
    for method in ("similarity_cam", "decomposition"):
        whole = explain(tiny, comparison, method, "last")
        small = explain(tiny, comparison, method, "last", max_batch=2)
        torch.testing.assert_close(whole.maps, small.maps, rtol=1e-4, atol=1e-6)
    assert [module.training for module in tiny.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(images, kept)
    assert all(parameter.grad is None for parameter in tiny.parameters())
    assert not any(module._forward_hooks for module in tiny.modules())


def test_wrong_options_are_told(tiny: TinyNet, images: Tensor) -> None:
    pair = Comparison.pair(images[:1], images[1:2])
    with pytest.raises(ComparisonError, match="score to be one of cosine, dot, held"):
        METHODS["similarity_cam"](score="euclid")
    with pytest.raises(ComparisonError, match="Expected cam"):
        METHODS["similarity_cam"](cam="x_cam")
    with pytest.raises(ModelError, match="steps of at least 1"):
        METHODS["decomposition"](steps=0)
    with pytest.raises(ComparisonError, match="has the options"):
        explain(tiny, pair, "decomposition", "last", weights="signed")
    with pytest.raises(ModelError, match="no layer"):
        explain(tiny, pair, "decomposition", "lost")
