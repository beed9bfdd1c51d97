"""Methods on pixels against plain autograd and naive loops, and what every method must keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TinyNet
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain import Comparison, as_similarity_model, explain
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ComparisonError, ModelError
from simexplain.methods.pixel_gradients import (
    InputXGradient,
    IntegratedGradients,
    Saliency,
    SmoothGrad,
)
from simexplain.methods.pixel_methods import SBSM, Occlusion, RandomMasks, _enlarged, filled
from simexplain.metrics.curves import FILLS, baseline_of

QUICK = {
    "saliency": Saliency(),
    "input_x_gradient": InputXGradient(),
    "smoothgrad": SmoothGrad(samples=3),
    "integrated_gradients": IntegratedGradients(steps=8),
    "occlusion": Occlusion(window=0.3, stride=0.2),
    "sbsm": SBSM(window=0.3, stride=0.2),
    "random_masks": RandomMasks(masks=30, grid=4),
}
GRADIENTS = list(QUICK)[:4]
every = pytest.mark.parametrize("name", list(QUICK))


@pytest.fixture
def tiny(tiny: TinyNet) -> TinyNet:
    """In double precision: falls of a score are differences of nearly equal numbers."""
    return tiny.double()


@pytest.fixture
def images(images: Tensor) -> Tensor:
    return images.double()


def arranged(images: Tensor, kind: str) -> Comparison:
    """Images as a comparison of some arrangement."""
    if kind in ("pair", "different"):
        return Comparison.pair(images[:2], images[2:4], similar=kind == "pair")
    if kind == "triplet":
        return Comparison.triplet(images[:1], images[1:2], images[2:3])
    return Comparison(images[:1], images[None, 1:3], images[None, 3:5])


def plain_direction(rows: Tensor, kind: str) -> Tensor:
    """The directions ``(K,E)`` of one comparison, written out by hand."""
    if kind == "pair":
        return torch.stack((rows[1], rows[0]))
    if kind == "different":
        return torch.stack((-rows[1], -rows[0]))
    if kind == "triplet":
        a, p, n = rows
        return torch.stack((p - n, a, -a))
    a, p, q, m, n = rows
    return torch.stack(((p + q) / 2 - (m + n) / 2, a / 2, a / 2, -a / 2, -a / 2))


def unit(network: nn.Module, images: Tensor) -> Tensor:
    return F.normalize(network(images.clone()).flatten(1), dim=1)


def per_image(
    network: nn.Module,
    comparison: Comparison,
    kind: str,
    naive: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor],
) -> Tensor:
    """Maps ``(B,K,H,W)`` from ``naive(score, image)``, called for each image alone."""
    maps = []
    for stack in comparison.stacked():
        with torch.no_grad():
            directions = plain_direction(
                torch.cat([unit(network, image[None]) for image in stack]), kind
            )
        for image, direction in zip(stack, directions, strict=True):
            maps.append(naive(lambda x, d=direction: unit(network, x) @ d, image))
    return comparison.restacked(torch.stack(maps))


def gradient(score: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    point = image[None].clone().requires_grad_()
    return torch.autograd.grad(score(point).sum(), point)[0][0]


def same(result: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    assert result.shape == wanted.shape
    assert wanted.abs().max() > 0
    return torch.allclose(result, wanted, atol=tolerance * float(wanted.abs().max()), rtol=0)


KINDS = ["pair", "different", "triplet", "set"]


@pytest.mark.parametrize("kind", KINDS)
def test_saliency_is_the_gradient(tiny: TinyNet, images: Tensor, kind: str) -> None:
    comparison = arranged(images, kind)
    model = as_similarity_model(tiny)
    plain = per_image(tiny, comparison, kind, lambda s, x: gradient(s, x).abs().amax(dim=0))
    assert same(Saliency()(model, comparison).maps, plain)
    plain = per_image(tiny, comparison, kind, lambda s, x: gradient(s, x).abs().sum(dim=0))
    assert same(Saliency(channels="sum")(model, comparison).maps, plain)
    signed = per_image(tiny, comparison, kind, lambda s, x: gradient(s, x).sum(dim=0))
    assert signed.min() < 0
    assert same(Saliency(channels="sum", signed=True)(model, comparison).maps, signed)
    strongest = Saliency(signed=True)(model, comparison).maps
    assert torch.equal(strongest.abs(), Saliency()(model, comparison).maps)
    assert strongest.min() < 0


@pytest.mark.parametrize("kind", KINDS)
def test_smoothgrad(tiny: TinyNet, images: Tensor, kind: str) -> None:
    comparison = arranged(images, kind)
    model = as_similarity_model(tiny)
    quiet = SmoothGrad(noise=0.0, samples=3)(model, comparison).maps
    assert same(quiet, Saliency(channels="sum", signed=True)(model, comparison).maps)

    def naive(score: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        draws = [torch.randn(image.shape, generator=generator) for _ in range(4)]
        sigma = 0.3 * (image.max() - image.min())
        return sum(gradient(score, image + sigma * draw).sum(dim=0) for draw in draws) / 4

    plain = per_image(tiny, comparison, kind, naive)
    assert same(SmoothGrad(noise=0.3, samples=4, seed=5)(model, comparison).maps, plain)
    other = SmoothGrad(noise=0.3, samples=4, seed=6)(model, comparison).maps
    assert not same(other, plain, 1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_input_times_gradient(tiny: TinyNet, images: Tensor, kind: str) -> None:
    comparison = arranged(images, kind)
    plain = per_image(tiny, comparison, kind, lambda s, x: (x * gradient(s, x)).sum(dim=0))
    assert same(InputXGradient()(as_similarity_model(tiny), comparison).maps, plain)


@pytest.mark.parametrize(
    ("kind", "baseline"),
    [("pair", "mean"), ("different", "blur"), ("triplet", "black"), ("set", "blur")],
)
def test_integrated_gradients_by_a_loop(
    tiny: TinyNet, images: Tensor, kind: str, baseline: str
) -> None:
    comparison = arranged(images, kind)
    model = as_similarity_model(tiny)
    # Nodes of Gauss-Legendre on [0, 1].
    points, weights = (
        torch.from_numpy(part).float() / 2 for part in np.polynomial.legendre.leggauss(6)
    )

    def naive(score: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
        low = filled(model, image[None], baseline)[0]
        line = [
            weight * gradient(score, low + (0.5 + point) * (image - low))
            for point, weight in zip(points, weights, strict=True)
        ]
        return ((image - low) * sum(line)).sum(dim=0)

    result = IntegratedGradients(steps=6, baseline=baseline)(model, comparison)
    assert same(result.maps, per_image(tiny, comparison, kind, naive))


def smooth_network() -> nn.Module:
    """No kinks, so that few steps integrate it well."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.Tanh(), nn.Conv2d(6, 8, 3, stride=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).double().eval()  # fmt: skip


@pytest.mark.parametrize("baseline", list(FILLS))
def test_integrated_gradients_are_complete(images: Tensor, baseline: str) -> None:
    network = smooth_network()
    model = as_similarity_model(network)
    comparison = arranged(images, "triplet")
    result = IntegratedGradients(baseline=baseline)(model, comparison)
    assert result.warnings == ()
    flat = comparison.stacked()[0]
    with torch.no_grad():
        rows, low = unit(network, flat), unit(network, filled(model, flat, baseline))
        differences = ((rows - low) * plain_direction(rows, "triplet")).sum(dim=1)
    assert differences.abs().max() > 1e-4
    assert same(result.maps[0].sum(dim=(1, 2)), differences, 3e-4)


def test_what_is_missing_of_the_score_is_said(images: Tensor) -> None:
    class Step(nn.Module):
        """A colour that is squeezed so hard that one step misses where it changes."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(40 * (x.mean(dim=(2, 3)) - 0.3)) + torch.arange(3.0)

    comparison = arranged(images, "pair")
    (record,) = IntegratedGradients(steps=1, baseline="black")(
        as_similarity_model(Step()), comparison
    ).warnings
    assert "do not add up" in record
    assert "use more steps than 1," in record
    assert record.endswith(".")


def test_what_is_hidden_is_filled_as_in_curves(images: Tensor) -> None:
    shown = Preprocess(mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
    model = as_similarity_model(smooth_network(), preprocess=shown)
    for name in ("blur", "mean"):
        assert torch.equal(filled(model, images, name), baseline_of(images, name))
    black = filled(model, images, "black")
    assert black.shape == images.shape
    assert not shown.undo(black).any()
    flat = torch.full((1, 3, 9, 30), 0.3)
    assert same(filled(model, flat, "blur"), flat, 1e-6)
    ramp = torch.arange(32.0).expand(1, 3, 8, 32)
    blur = filled(model, ramp, "blur")[0, 0, 0]
    # Of a slope only inside pixels count at the border: their mean, not a mirrored image.
    weights = (-0.5 * torch.arange(32.0).square()).exp()  # an eighth of 8 is one pixel
    assert float(blur[0]) == pytest.approx(float((weights * ramp[0, 0, 0]).sum() / weights.sum()))


def hidden(image: Tensor, fill: Tensor, top: int, left: int, side: int) -> Tensor:
    copy = image.clone()
    copy[:, top : top + side, left : left + side] = fill[:, top : top + side, left : left + side]
    return copy


@pytest.mark.parametrize(
    ("kind", "fill"),
    [("pair", "blur"), ("different", "mean"), ("triplet", "black"), ("triplet", "mean"),
     ("set", "blur")],
)  # fmt: skip
def test_windows_by_a_loop(tiny: TinyNet, images: Tensor, kind: str, fill: str) -> None:
    comparison = arranged(images, kind)
    model = as_similarity_model(tiny)
    height, width, side, step = 24, 32, 10, 6  # of 24: windows 0.42, steps 0.25

    def naive(tops: list[int], lefts: list[int], change: Callable[[Tensor], Tensor]) -> Callable:
        @torch.no_grad()
        def maps(score: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
            low = filled(model, image[None], fill)[0]
            total, count = torch.zeros(2, height, width, dtype=torch.float64)
            for top in tops:
                for left in lefts:
                    drop = score(image[None]) - score(hidden(image, low, top, left, side)[None])
                    total[top : top + side, left : left + side] += change(drop)
                    count[top : top + side, left : left + side] += 1
            return total / count

        return maps

    options = {"window": 0.42, "stride": 0.25, "fill": fill}
    whole = ([0, 6, 12, 14], [0, 6, 12, 18, 22])
    plain = per_image(tiny, comparison, kind, naive(*whole, torch.relu))
    assert same(SBSM(**options)(model, comparison).maps, plain)
    plain = per_image(tiny, comparison, kind, naive(*whole, lambda drop: drop))
    assert plain.min() < 0
    assert same(SBSM(**options, signed=True)(model, comparison).maps, plain)
    # Captum lets the last window hang over the edge.
    over = ([0, 6, 12, 18], [0, 6, 12, 18, 24])
    assert [range(0, size - side + step, step)[-1] for size in (height, width)] == [18, 24]
    plain = per_image(tiny, comparison, kind, naive(*over, lambda drop: drop))
    assert same(Occlusion(**options)(model, comparison).maps, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_random_masks_by_a_loop(tiny: TinyNet, images: Tensor, kind: str) -> None:
    comparison = arranged(images, kind)
    model = as_similarity_model(tiny)
    method = RandomMasks(masks=40, grid=5, fill="mean", seed=2)
    masks = _enlarged(*method._drawn(), images)
    assert masks.shape == (40, 24, 32)
    assert masks.min() == 0
    assert masks.max() == 1
    assert 0.4 < masks.mean() < 0.6

    @torch.no_grad()
    def naive(score: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
        low = image.mean(dim=(1, 2), keepdim=True)
        scores = [float(score((image * mask + low * (1 - mask))[None])) for mask in masks]
        order = sorted(range(40), key=scores.__getitem__)
        return masks[order[-4:]].mean(dim=0) - masks[order[:4]].mean(dim=0)

    assert same(method(model, comparison).maps, per_image(tiny, comparison, kind, naive))
    assert not same(
        RandomMasks(masks=40, grid=5, fill="mean", seed=3)(model, comparison).maps,
        per_image(tiny, comparison, kind, naive),
        1e-2,
    )


class Corner(nn.Module):
    """The mean colour of the upper left corner, a constant beside it."""

    def forward(self, images: Tensor) -> Tensor:
        colour = images[:, :, :12, :12].mean(dim=(2, 3))
        return torch.cat((colour, torch.full_like(colour[:, :1], 0.5)), dim=1)


@every
@pytest.mark.parametrize("kind", ["pair", "triplet"])
def test_the_object_that_matters_is_found(name: str, kind: str) -> None:
    noise = torch.rand(3, 3, 40, 48, generator=torch.Generator().manual_seed(0)) - 0.5
    for image, colour in zip(noise, ((2.0, 0, 0), (2.0, 0.2, 0), (0, 0, 2.0)), strict=True):
        image[:, 2:9, 3:10] += torch.tensor(colour).view(3, 1, 1)  # the object that is looked at
        image[:, 25:36, 30:42] += 2  # and one that is not
    if kind == "pair":
        comparison = Comparison.pair(noise[:1], noise[1:2])
    else:
        comparison = Comparison.triplet(noise[:1], noise[1:2], noise[2:])
    more = {"random_masks": RandomMasks(masks=600, grid=4)}
    result = explain(as_similarity_model(Corner()), comparison, more.get(name, QUICK[name]))
    maps = result.maps[0, :2]  # of the two that are alike
    inside = maps[:, :12, :12].abs().mean(dim=(1, 2))
    outside = maps[:, 16:, 16:].abs().mean(dim=(1, 2))
    times = 2 if name == "random_masks" else 3  # chance leaves some of its masks everywhere
    assert bool((inside > times * outside).all()), (inside, outside)
    if name not in ("input_x_gradient", "smoothgrad"):  # whose colours may cancel
        assert bool((maps[:, :12, :12].mean(dim=(1, 2)) > 0).all())
    if name in GRADIENTS:
        assert maps[:, 12:].abs().max() == maps[:, :, 12:].abs().max() == 0


@every
def test_result_keeps_the_contract(name: str, tiny: TinyNet, images: Tensor) -> None:
    comparison = arranged(images, "set")
    result = QUICK[name](as_similarity_model(tiny), comparison, ("pixels",))
    assert list(result.layer_maps) == ["pixels"]
    assert result.layer_maps["pixels"] is result.maps
    assert result.maps.shape == (1, 5, 24, 32)
    assert result.weights.shape == result.embeddings.shape == (1, 5, 10)
    assert torch.allclose(result.scores, (result.weights * result.embeddings).sum(dim=2))
    rows = unit(tiny, images[:5]).detach()
    assert torch.allclose(result.embeddings[0], rows, atol=1e-6)
    assert torch.allclose(result.weights[0], plain_direction(rows, "set"), atol=1e-6)
    lines = explain(as_similarity_model(tiny), comparison, QUICK[name])
    assert lines.layers == ("pixels",)
    assert torch.equal(lines.maps, result.maps)
    with pytest.raises(ModelError, match="pixels"):
        explain(as_similarity_model(tiny), comparison, QUICK[name], layer="body")


@every
@pytest.mark.parametrize("at_once", [1, 4])
def test_batches_change_nothing(name: str, at_once: int, tiny: TinyNet, images: Tensor) -> None:
    model, method = as_similarity_model(tiny), QUICK[name]
    both = arranged(images, "pair")
    whole = method(model, both).maps
    assert same(method(model, both, max_batch=at_once).maps, whole)
    for index in range(2):
        single = Comparison.pair(images[index : index + 1], images[2 + index : 3 + index])
        assert same(method(model, single).maps[0], whole[index])
    # A program with a fixed batch gets exactly that.
    sizes = []

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return tiny(x)

    fixed = as_similarity_model(Fixed(), batch_size=3)
    assert same(method(fixed, both).maps, whole)
    assert set(sizes) == {3}


@every
def test_forwards_are_counted(name: str, tiny: TinyNet, images: Tensor) -> None:
    sizes = []

    class Counted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return tiny(x)

    comparison = arranged(images, "triplet")
    for method in (QUICK[name], type(QUICK[name])()):
        sizes.clear()
        method(as_similarity_model(Counted()), comparison, max_batch=7)
        assert max(sizes) <= 7
        assert sum(sizes) == method.forwards(comparison)


@every
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(name: str, fails: bool, images: Tensor) -> None:
    class InPlace(nn.Module):
        """Changes its input and modes matter; may break down after some calls."""

        def __init__(self) -> None:
            super().__init__()
            self.net = TinyNet().double()
            self.drop = nn.Dropout(0.5)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            torch.rand(1)
            if fails and self.calls > 1:
                raise RuntimeError("broken")
            return self.drop(self.net(x.mul_(1.5)))

    network = InPlace().train()
    network.net.norm.eval()
    modes = [m.training for m in network.modules()]
    state = {key: value.clone() for key, value in network.state_dict().items()}
    comparison = arranged(images, "triplet")
    before, random = comparison.stacked().clone(), torch.get_rng_state()
    with torch.no_grad():  # gradients are found also where the caller wants none
        if fails:
            with pytest.raises(RuntimeError, match="broken"):
                QUICK[name](as_similarity_model(network), comparison)
        else:
            result = QUICK[name](as_similarity_model(network), comparison)
            assert not result.maps.requires_grad
            assert not result.embeddings.requires_grad
            assert result.maps.abs().max() > 0
            again = QUICK[name](as_similarity_model(network), comparison)
            assert torch.equal(result.maps, again.maps)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(comparison.stacked(), before)
    assert not comparison.anchor.requires_grad
    assert [m.training for m in network.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    after = network.state_dict()
    assert all(torch.equal(after[key], value) for key, value in state.items())


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_number_types(name: str, dtype: torch.dtype, tiny: TinyNet, images: Tensor) -> None:
    comparison = arranged(images, "triplet")
    whole = QUICK[name](as_similarity_model(tiny), comparison).maps
    model = as_similarity_model(tiny.to(dtype))
    typed = comparison.like(comparison.stacked().to(dtype))
    result = QUICK[name](model, typed).maps
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.isfinite().all()
    close = F.cosine_similarity(result.flatten().double(), whole.flatten().double(), dim=0)
    ranked = name == "random_masks"  # a rounding may swap masks of nearly equal score
    if dtype != torch.bfloat16:
        assert close > (0.5 if ranked else 0.9)


@every
def test_undefined_embeddings_are_refused(name: str, tiny: TinyNet, images: Tensor) -> None:
    bad = images.clone()
    bad[1] = math.nan
    with pytest.raises(ModelError, match=r"positive .* is not finite"):
        QUICK[name](as_similarity_model(tiny), arranged(bad, "triplet"))


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("how", ["no_grad", "detached"])
def test_models_without_gradient(name: str, how: str, tiny: TinyNet, images: Tensor) -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(10, dtype=torch.float64))
            self.net = tiny

        def forward(self, x: Tensor) -> Tensor:
            if how == "detached":
                return self.net(x.detach()) * self.scale
            with torch.no_grad():
                return self.net(x) * self.scale

    with pytest.raises(ModelError, match="occlusion, sbsm, random_masks") as caught:
        QUICK[name](as_similarity_model(Cut()), arranged(images, "pair"))
    assert str(caught.value).endswith(".")


def test_masks_that_change_nothing_give_an_empty_map(images: Tensor) -> None:
    class Blind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(len(x), 4, dtype=x.dtype)

    result = QUICK["random_masks"](as_similarity_model(Blind()), arranged(images, "pair"))
    assert result.maps.abs().max() == 0


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (40, 3)])
@every
def test_any_size(name: str, size: tuple[int, int]) -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dim=(2, 3)) + x.square().mean(dim=(2, 3))

    images = torch.rand(2, 3, *size) + 0.1
    comparison = Comparison.pair(images[:1], images[1:])
    result = QUICK[name](as_similarity_model(Mean()), comparison)
    assert result.maps.shape == (1, 2, *size)
    assert result.maps.isfinite().all()


@pytest.mark.parametrize(
    ("made", "options"),
    [
        (Saliency, {"channels": "min"}),
        (IntegratedGradients, {"baseline": "white"}),
        (IntegratedGradients, {"steps": 0}),
        (SmoothGrad, {"samples": 0}),
        (SmoothGrad, {"noise": -1.0}),
        (Occlusion, {"fill": "white"}),
        (Occlusion, {"stride": 0.3}),
        (SBSM, {"window": 1.5}),
        (SBSM, {"stride": 0.0}),
        (RandomMasks, {"fill": "white"}),
        (RandomMasks, {"masks": 1}),
        (RandomMasks, {"keep": 2.0}),
    ],
)
def test_bad_options(made: type, options: dict) -> None:
    with pytest.raises(ComparisonError, match="Expected") as caught:
        made(**options)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("name", ["input_x_gradient", "smoothgrad", "integrated_gradients",
                                  "occlusion", "random_masks"])  # fmt: skip
def test_evidence_against_can_be_left_out(name: str, tiny: TinyNet, images: Tensor) -> None:
    model, comparison = as_similarity_model(tiny), arranged(images, "triplet")
    signed = QUICK[name](model, comparison).maps
    assert signed.min() < 0
    positive = replace(QUICK[name], keep_negative=False)(model, comparison).maps
    assert torch.equal(positive, signed.relu())
