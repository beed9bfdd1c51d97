"""The numbers that say how far to believe a map, on cases whose answers are known."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from simexplain.errors import ComparisonError, ModelError
from simexplain.metrics.curves import (
    BASELINES,
    FILLS,
    baseline_of,
    blurred,
    border_colour,
    deletion,
    insertion,
    ranks,
)
from simexplain.metrics.intervals import bootstrap_difference, bootstrap_mean
from simexplain.metrics.maps import (
    best_iou,
    chance,
    correspondences,
    energy,
    grown,
    iou,
    mean_valid,
    peak_of,
    pointing,
    widened,
)
from simexplain.metrics.stability import (
    cosine,
    infidelity,
    randomisable,
    randomised,
    sensitivity,
    spearman,
    top_overlap,
)

NAN = math.nan


def total(images: Tensor) -> Tensor:
    """A score whose right map is known: the sum of all values."""
    return images.flatten(1).sum(dim=1)


def ramp() -> tuple[Tensor, Tensor]:
    """An image of 4x5 pixels worth 3, 6, ... 60, and its perfect heatmap."""
    heat = torch.arange(1.0, 21.0)[torch.randperm(20, generator=torch.Generator().manual_seed(3))]
    return heat.view(1, 4, 5).expand(3, 4, 5).clone(), heat.view(4, 5)


# ------------------------------------------------------------------------------------- curves


def test_areas_of_a_sum_of_pixels_are_exact() -> None:
    image, heat = ramp()
    lost = deletion(total, image, heat, steps=20, baseline="black")
    won = insertion(total, image, heat, steps=20, baseline="black")
    values = [3.0 * v for v in range(20, 0, -1)]
    left = [sum(values[n:]) for n in range(21)]
    assert lost.raw.tolist() == left
    assert won.raw.tolist() == [630 - value for value in left]
    area = sum((a + b) / 2 for a, b in pairwise(left)) / 20
    assert lost.raw_area == pytest.approx(area, abs=1e-9)
    assert lost.area == pytest.approx(area / 630, abs=1e-12)
    assert won.area == pytest.approx(1 - area / 630, abs=1e-12)
    assert (lost.whole, lost.empty, won.whole, won.empty) == (630, 0, 630, 0)
    assert lost.fractions.tolist() == [n / 20 for n in range(21)]


def test_the_perfect_order_beats_every_random_one_and_the_reversed_order_loses_to_all() -> None:
    image, heat = ramp()
    generator = torch.Generator().manual_seed(0)
    options = {"steps": 7, "baseline": "black"}
    random = [torch.rand(4, 5, generator=generator) for _ in range(20)]
    for curve, sign in ((deletion, 1), (insertion, -1)):
        perfect, reverse = (sign * curve(total, image, h, **options).area for h in (heat, -heat))
        others = [sign * curve(total, image, h, **options).area for h in random]
        assert perfect < min(others)
        assert max(others) < reverse


def test_normalised_is_one_for_the_whole_image_and_zero_for_the_deleted_one() -> None:
    image, heat = ramp()
    result = deletion(lambda x: 5 * total(x) - 100, image, heat, baseline="mean", steps=3)
    assert math.isnan(result.area)  # the mean colour has the same sum: there is nothing to lose
    result = deletion(lambda x: 5 * total(x) - 100, image, heat, baseline="black", steps=3)
    assert (result.normalised[0], result.normalised[-1]) == (1, 0)
    assert result.whole == 5 * 630 - 100
    assert result.empty == -100
    assert result.area == pytest.approx(float(torch.trapezoid(result.normalised, result.fractions)))
    rises = deletion(lambda x: -total(x), image, heat, baseline="black", steps=3)
    assert math.isnan(rises.area)
    assert math.isfinite(rises.raw_area)


def test_areas_are_not_normalised_by_less_than_asked() -> None:
    image, heat = ramp()
    for curve in (deletion, insertion):
        options = {"baseline": "black", "steps": 3}
        plain = curve(total, image, heat, **options)  # from 630 to 0
        above = curve(total, image, heat, least=629.9, **options)
        assert above.area == plain.area
        below = curve(total, image, heat, least=630, **options)
        assert math.isnan(below.area)
        assert bool(below.normalised.isnan().all())
        assert below.raw_area == plain.raw_area
    with pytest.raises(ComparisonError, match="least to be at least 0"):
        deletion(total, image, heat, least=-1)


def test_fractions_are_those_of_whole_pixels() -> None:
    image, heat = ramp()
    result = insertion(total, image, heat, steps=3, baseline="black")
    assert result.fractions.tolist() == [0, 7 / 20, 13 / 20, 1]
    many = insertion(total, image, heat, steps=50, baseline="black")
    assert many.area == pytest.approx(insertion(total, image, heat, baseline="black").area)


def test_ties_are_broken_by_index_and_maps_are_upsampled() -> None:
    assert ranks(torch.zeros(2, 3), (2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]
    heat = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    assert ranks(heat, (2, 2)).tolist() == [[2, 0], [1, 3]]
    corner = ranks(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), (4, 6))
    assert corner[0, 0] == 0
    assert corner[-1, -1] == 23
    assert sorted(corner.flatten().tolist()) == list(range(24))


@pytest.mark.parametrize("max_batch", [1, 2, 5, 100])
def test_curves_do_not_depend_on_max_batch(max_batch: int) -> None:
    image, heat = ramp()
    sizes = []

    def score(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return images.square().flatten(1).sum(dim=1)

    whole = insertion(score, image, heat, steps=9)
    sizes.clear()
    part = insertion(score, image, heat, steps=9, max_batch=max_batch)
    assert torch.equal(whole.raw, part.raw)
    assert max(sizes) == min(max_batch, 10)
    assert sum(sizes) == 10


def test_two_images_lose_the_same_share_at_once() -> None:
    image, heat = ramp()
    pair, heats = torch.stack((image, image.flip(-1))), torch.stack((heat, heat.flip(-1)))
    seen = []

    def product(groups: Tensor) -> Tensor:
        seen.append(len(groups))
        return total(groups[:, 0]) * total(groups[:, 1])

    both = deletion(product, pair, heats, steps=20, baseline="black", max_batch=6)
    alone = deletion(total, image, heat, steps=20, baseline="black")
    assert torch.allclose(both.raw, alone.raw.square())
    assert max(seen) == 3


def test_baselines() -> None:
    image = torch.rand(2, 3, 12, 9)
    assert torch.allclose(
        baseline_of(image, "mean")[1, 2], image[1, 2].mean().expand(12, 9), atol=1e-6
    )
    assert not baseline_of(image, "black").any()
    flat = torch.full((3, 12, 9), 0.7)
    assert torch.allclose(blurred(flat), flat, atol=1e-6)
    assert float(blurred(image).std()) < 0.4 * float(image.std())
    colour = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    assert baseline_of(image, colour)[1, :, 4, 5].tolist() == [1, 2, 3]
    first = image[0]
    edge = torch.cat([first[:, 0], first[:, -1], first[:, 1:-1, 0], first[:, 1:-1, -1]], dim=1)
    bordered = baseline_of(image, "border")
    assert bordered.shape == image.shape
    assert torch.allclose(bordered[0], edge.mean(dim=1)[:, None, None].expand(3, 12, 9), atol=1e-5)
    assert torch.allclose(border_colour(flat[:, :1, :2]), flat[:, :1, :2])
    half = torch.full((3, 300, 300), 1.5, dtype=torch.float16)
    assert torch.equal(border_colour(half), half), "the sum of all pixels is no number in half"
    assert set(BASELINES) == {"blur", "mean", "black", "border"}
    assert BASELINES is FILLS


def test_curves_refuse_what_does_not_fit() -> None:
    image, heat = ramp()
    with pytest.raises(ComparisonError, match="one heatmap"):
        deletion(total, image, heat[None])
    with pytest.raises(ComparisonError, match="blur, mean, black"):
        deletion(total, image, heat, baseline="white")
    with pytest.raises(ComparisonError, match="broadcasts"):
        deletion(total, image, heat, baseline=torch.ones(3))
    with pytest.raises(ComparisonError, match="finite"):
        deletion(total, image, heat * NAN)
    with pytest.raises(ComparisonError, match="one score"):
        deletion(lambda x: x, image, heat)
    with pytest.raises(ComparisonError, match="step"):
        deletion(total, image, heat, steps=0)


def test_scoring_records_no_graph_and_leaves_the_image_alone() -> None:
    image, heat = ramp()
    before = image.clone()

    def greedy(images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return total(images.mul_(2))

    deletion(greedy, image.requires_grad_(), heat)
    insertion(greedy, image, heat)
    assert torch.equal(image, before)
    assert image.grad is None


# -------------------------------------------------------------------------------------- masks


def drawn() -> tuple[Tensor, Tensor]:
    """Five maps on 6x8 pixels and a mask of 2x3 pixels, the last one empty."""
    masks = torch.zeros(5, 6, 8, dtype=torch.bool)
    masks[:4, 1:3, 2:5] = True
    heat = torch.zeros(5, 6, 8)
    heat[0, 1, 4], heat[0, 5, 5] = 3.0, 1.0
    heat[1, 3, 6] = 2.0  # a row below and two columns beside it
    heat[2] = -1.0
    heat[3] = masks[3].float()
    return heat, masks


def same(result: Tensor, expected: list[float]) -> bool:
    return torch.allclose(result, torch.tensor(expected).double(), equal_nan=True)


def test_pointing_and_energy() -> None:
    heat, masks = drawn()
    assert same(pointing(heat, masks), [1, 0, 0, 1, NAN])
    assert same(pointing(heat, masks, tolerance=2.2), [1, 0, 0, 1, NAN])
    assert same(pointing(heat, masks, tolerance=2.24), [1, 1, 0, 1, NAN])
    assert same(energy(heat, masks), [0.75, 0, 0, 1, NAN])
    assert mean_valid(pointing(heat, masks)) == 0.5


def test_maps_are_upsampled_to_the_masks() -> None:
    heat = torch.zeros(1, 3, 4)
    heat[0, 0, 1] = 1
    masks = torch.zeros(1, 6, 8, dtype=torch.bool)
    masks[0, :2, 2:4] = True
    assert same(pointing(heat, masks), [1])
    assert 0.2 < float(energy(heat, masks)) < 1


def test_iou_at_a_threshold_and_at_the_best() -> None:
    heat, masks = drawn()
    heat[0] = masks[0] * 0.5
    heat[0, 5, 5] = 1.0
    assert same(iou(heat, masks, 0.5), [6 / 7, 0, 0, 1, NAN])
    assert same(iou(heat, masks, 0.9), [0, 0, 0, 1, NAN])
    best, at = best_iou(heat, masks)
    assert same(best, [6 / 7, 0, 0, 1, NAN])
    assert same(at[[0, 3]], [0.5, 1])
    random = torch.rand(5, 6, 8)
    swept = torch.stack([iou(random, masks, float(t)) for t in torch.linspace(1e-3, 1, 2000)])
    assert torch.allclose(best_iou(random, masks)[0][:4], swept.amax(dim=0)[:4])


def test_equally_hot_pixels_pass_a_threshold_together() -> None:
    masks = torch.zeros(1, 2, 2, dtype=torch.bool)
    masks[0, 0, 0] = True
    assert same(best_iou(torch.ones(1, 2, 2), masks)[0], [0.25])


@pytest.mark.parametrize("tolerance", [0, 1, 1.5, 3, 20])
def test_chance_is_what_random_points_reach(tolerance: float) -> None:
    _, masks = drawn()
    pixels = torch.eye(48).view(48, 6, 8)
    hits = pointing(pixels, masks[:1].expand(48, 6, 8), tolerance)
    assert float(chance(masks, tolerance)[0]) == pytest.approx(float(hits.mean()))
    assert torch.equal(widened(masks[:1], tolerance)[0].flatten(), hits.bool())
    assert math.isnan(chance(masks, tolerance)[4])


def at(points: Tensor, size: tuple[int, int] = (20, 30)) -> Tensor:
    """Maps with one hot pixel at each point ``(x, y)``."""
    maps = torch.zeros(len(points), *size)
    for one, (x, y) in zip(maps, points.tolist(), strict=True):
        one[int(y), int(x)] = 1
    return maps


def test_correspondences_by_points() -> None:
    points = torch.tensor([[2.5, 3.5], [10.5, 4.5], [20.5, 10.5], [5.5, 5.5]])
    partners = points + torch.tensor([4.0, 3.0])
    partners[3] = torch.tensor([31.0, 5.0])  # not in the picture
    maps = at(torch.tensor([[6.5, 6.5], [14.5, 9.5], [0.5, 0.5], [0.5, 0.5]]))
    result = correspondences(maps, points, partners, (20, 30), tolerance=2)
    assert same(result.hits, [1, 1, 0, NAN])
    assert result.distances[:2].tolist() == [0, 2]
    assert result.share == pytest.approx(2 / 3)
    assert result.same_place == 0
    assert correspondences(maps, points, partners, (20, 30), tolerance=5).same_place == 1
    assert result.chance == pytest.approx(13 / 600)  # pixels in a disc of radius two
    empty = correspondences(maps * 0, points, partners, (20, 30), tolerance=99)
    assert empty.share == 0


def test_correspondences_by_a_matrix_and_a_function() -> None:
    points = torch.tensor([[2.5, 3.5], [8.5, 4.5], [12.5, 6.5]])
    affine = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 1.0]])
    places = torch.stack((points[:, 1] + 2, points[:, 0] + 1), dim=1)
    by_map = correspondences(at(places), points, affine, (20, 30), tolerance=0.1)
    assert by_map.share == 1
    assert torch.allclose(by_map.expected, places.double())
    homography = torch.cat((affine * 2, torch.tensor([[0.0, 0.0, 2.0]])))
    assert correspondences(at(places), points, homography, (20, 30), tolerance=0.1).share == 1
    requested = []

    def maps(x: float, y: float) -> Tensor:
        requested.append((x, y))
        return at(torch.tensor([[y + 2, x + 1]]))[0]

    assert correspondences(maps, points, affine, (20, 30), tolerance=0.1).share == 1
    assert requested == [tuple(point) for point in points.tolist()]
    with pytest.raises(ComparisonError, match="matrix"):
        correspondences(maps, points, torch.ones(4, 2), (20, 30), tolerance=1)


def test_masks_refuse_what_does_not_fit() -> None:
    heat, masks = drawn()
    with pytest.raises(ComparisonError, match="boolean"):
        pointing(heat, masks.float())
    with pytest.raises(ComparisonError, match="one heatmap"):
        energy(heat[:2], masks)
    with pytest.raises(ComparisonError, match="threshold"):
        iou(heat, masks, 0)


def test_larger_maps_are_averaged() -> None:
    checks = (torch.arange(16).view(4, 4) + torch.arange(4)[:, None]).remainder(2).float()
    assert float(grown(checks, (2, 2)).std()) < 0.2
    assert grown(checks, (4, 4)) is not None


# ---------------------------------------------------------------------------------- stability


def test_spearman_is_that_of_scipy_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    for levels in (3, 10, 1000):
        one, other = (torch.randint(levels, (7, 9), generator=generator).float() for _ in range(2))
        other = other + one
        expected = stats.spearmanr(one.flatten().numpy(), other.flatten().numpy()).statistic
        assert spearman(one, other) == pytest.approx(expected, abs=1e-12)
    assert spearman(one, (one / 100).exp()) == pytest.approx(1)
    assert spearman(one, -one) == pytest.approx(-1)
    assert math.isnan(spearman(one, torch.ones(7, 9)))


def test_top_overlap_and_cosine() -> None:
    one = torch.arange(20.0).view(4, 5)
    assert top_overlap(one, one) == 1
    assert top_overlap(one, -one) == 0
    assert top_overlap(one, one.roll(1), share=0.25) == pytest.approx(0.8)
    assert cosine(one, 3 * one) == pytest.approx(1)
    assert cosine(torch.eye(2), torch.eye(2).flip(0)) == 0
    assert math.isnan(cosine(one, 0 * one))
    assert spearman(torch.rand(2, 2), torch.rand(5, 7)) <= 1  # brought to one size


def test_infidelity_is_zero_for_the_true_map_and_grows_with_error() -> None:
    images = torch.rand(2, 3, 8, 8)
    truth = images.sum(dim=1)  # what each pixel gives to the sum, on black
    options = {"baseline": "black", "samples": 30}
    state = torch.get_rng_state()
    exact = infidelity(total, images, truth, scaled=False, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert float(exact.max()) < 1e-8
    assert float(infidelity(total, images, 7 * truth, **options).max()) < 1e-8
    wrong = infidelity(total, images, truth.flip(1), **options)
    assert float(wrong.min()) > 1e-3
    again = infidelity(total, images, truth.flip(1), max_batch=7, **options)
    assert torch.allclose(wrong, again, rtol=1e-3)


def test_sensitivity_of_maps_that_move_by_a_known_factor() -> None:
    images = torch.rand(2, 3, 6, 6)
    state = torch.get_rng_state()
    result = sensitivity(lambda x: x.mean(dim=1), images, radius=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    assert result.shape == (2,)
    assert 0.02 < float(result.min()) <= float(result.max()) < 0.2
    assert float(sensitivity(lambda x: torch.ones(len(x), 3, 3), images).max()) == 0

    def differentiating(x: Tensor) -> Tensor:
        x = x.requires_grad_()
        return torch.autograd.grad(x.square().sum(), x)[0].mean(dim=1)

    assert torch.allclose(sensitivity(differentiating, images, radius=0.1), result, rtol=1e-4)


# -------------------------------------------------------------------------------- randomising


class Odd(nn.Module):
    """Everything that makes forgetting hard: buffers, own values, tied and replaced parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(5))
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.norm.running_mean.normal_()
        self.norm.weight.data.uniform_()
        self.replacing = Replacing()
        self.head = nn.Linear(5, 5)
        self.tied = nn.Linear(5, 5)
        self.tied.weight = self.head.weight
        self.register_buffer("index", torch.arange(7))
        self.register_buffer("spread", torch.ones(1).expand(4))
        self.head.bias.data[:2] = torch.tensor([-0.0, torch.nan])

    def reset_parameters(self) -> None:
        raise AssertionError("would reset its parts as well")

    def forward(self, images: Tensor) -> Tensor:
        return self.tied(self.head(self.norm(self.conv(images)).mean(dim=(2, 3)) + self.token))


class Replacing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def reset_parameters(self) -> None:
        self.weight = nn.Parameter(torch.randn(3))


def bits(network: nn.Module) -> list[tuple[str, int, bytes]]:
    """Names, identities and exact values of everything in a network."""
    named = [*network.named_parameters(remove_duplicate=False), *network.named_buffers()]
    return [(n, id(t), t.detach().contiguous().numpy().tobytes()) for n, t in named]


def test_randomised_restores_bit_for_bit_after_success_and_failure() -> None:
    network = Odd().train()
    network(torch.rand(2, 3, 6, 6))[:, 2:].sum().backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in network.parameters()]
    before, state = bits(network), torch.get_rng_state()
    modes = [module.training for module in network.modules()]
    most = len(randomisable(network))
    for how_far in range(most + 1):
        with randomised(network, how_far, seed=4) as names:
            assert len(names) == how_far
            assert (bits(network) != before) == (how_far > 0)
        assert bits(network) == before
    with pytest.raises(KeyboardInterrupt), randomised(network, most):
        raise KeyboardInterrupt
    assert bits(network) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in network.modules()] == modes
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        assert gradient is None or torch.equal(parameter.grad.nan_to_num(), gradient.nan_to_num())
    assert not any(m._forward_hooks or m._backward_hooks for m in network.modules())


def test_randomised_goes_from_the_last_layer_to_the_first_and_adds_up() -> None:
    network = Odd()
    names = randomisable(network)
    assert names == ("tied", "head", "replacing", "norm", "conv", "")
    own = {name: value.clone() for name, value in network.state_dict().items()}
    earlier: dict[str, Tensor] = {}
    for how_far in (3, 4, 6):
        with randomised(network, how_far, seed=1):
            now = {name: value.clone() for name, value in network.state_dict().items()}
        for name, value in earlier.items():
            assert torch.equal(now[name], value), name
        forgotten = names[:how_far]
        for name in ("norm.running_mean", "norm.weight", "conv.weight", "token"):
            changed = not torch.equal(now[name], own[name])
            assert changed == (name.rpartition(".")[0] in forgotten), name
        earlier = {n: v for n, v in now.items() if n.startswith(("replacing", "tied.bias"))}
    assert torch.equal(now["token"].sort().values, own["token"].sort().values)  # permuted
    assert not torch.equal(now["norm.running_mean"], own["norm.running_mean"])


def test_randomised_depends_on_its_seed_alone() -> None:
    network = Odd()
    result = []
    for seed in (1, 1, 2):
        torch.rand(seed)
        with randomised(network, 5, seed):
            result.append(network.conv.weight.detach().clone())
    assert torch.equal(result[0], result[1])
    assert not torch.equal(result[0], result[2])


def test_randomised_refuses_layers_that_are_not_there() -> None:
    with pytest.raises(ModelError, match="6 layers"), randomised(Odd(), 7):
        pass
    with pytest.raises(ModelError, match="no layer 'nose'"), randomised(Odd(), 1, 0, ["nose"]):
        pass


# ---------------------------------------------------------------------------------- intervals


def test_bootstrap_covers_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(300, 40, generator=generator).exp()
    truth = math.exp(0.5)
    inside = 0
    for number, values in enumerate(samples):
        result = bootstrap_mean(values, level=0.9, samples=400, seed=number)
        inside += result.low <= truth <= result.high
        assert result.low < result.mean < result.high
    assert 0.78 < inside / 300 < 0.95


def test_bootstrap_width_is_that_of_the_normal_approximation() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(2))
    result = bootstrap_mean(values, samples=5000)
    expected = 2 * 1.96 * float(values.std()) / 20
    assert result.high - result.low == pytest.approx(expected, rel=0.07)


def test_bootstrap_is_reproducible_and_leaves_invalid_values_out() -> None:
    state = torch.get_rng_state()
    values = [0.1, NAN, 0.4, 0.9]
    assert bootstrap_mean(values) == bootstrap_mean([0.1, 0.4, 0.9])
    many = torch.rand(30, generator=torch.Generator().manual_seed(0))
    assert bootstrap_mean(many, seed=1) == bootstrap_mean(many, seed=1)
    assert bootstrap_mean(many, seed=1) != bootstrap_mean(many, seed=2)
    assert bootstrap_mean(values).count == 3
    assert torch.equal(torch.get_rng_state(), state)
    one = bootstrap_mean([0.5, NAN])
    assert (one.mean, one.count) == (0.5, 1)
    assert math.isnan(one.low)
    assert math.isnan(bootstrap_mean([]).mean)
    with pytest.raises(ComparisonError, match="level"):
        bootstrap_mean(values, level=95)


def test_paired_differences_are_surer_than_two_means() -> None:
    generator = torch.Generator().manual_seed(0)
    hard = torch.randn(50, generator=generator) * 10
    one = hard + 0.5 + 0.1 * torch.randn(50, generator=generator)
    result = bootstrap_difference(one, hard)
    assert 0.4 < result.low < 0.5 < result.high < 0.6
    assert bootstrap_difference([1.0, NAN, 3.0], [0.0, 1.0, NAN]).count == 1
    with pytest.raises(ComparisonError, match="as many"):
        bootstrap_difference([1.0], [1.0, 2.0])


# --------------------------------------------------------------------------- peaks


def test_the_peak_of_a_flat_maximum_is_its_middle() -> None:
    heat = torch.zeros(9, 12)
    heat[2:7, 1:4] = 1
    heat[8, 9:] = 1  # as high, but another one
    assert peak_of(heat) == (4, 2)
    heat[3, 2] = 2
    assert peak_of(heat) == (3, 2)
    ring = torch.zeros(7, 7)
    ring[1:6, 1:6], ring[2:5, 2:5] = 1, 0
    assert peak_of(ring) == (1, 3)  # on it, not in the hole
    assert peak_of(torch.zeros(3, 3)) is None
    assert peak_of(-torch.ones(3, 3)) is None


def test_the_peak_of_an_upsampled_map_at_the_border_is_no_corner() -> None:
    coarse = torch.zeros(4, 4)
    coarse[0, 3] = 0.7
    assert peak_of(grown(coarse, (64, 64))) == (3, 59)  # of the flat part of 8 x 8 pixels
    coarse[2, 1] = 0.8
    assert peak_of(grown(coarse, (64, 64))) == (39, 23)  # of four around the cell's centre
