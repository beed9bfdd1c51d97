"""Promise 1: every map equals plain autograd on that image alone, on every kind of network."""

from __future__ import annotations

import pytest
import timm
import torch
from conftest import SharedNet, TinyNet, plain_maps, varied
from torch import Tensor, nn

from simexplain import Comparison, explain

# name: options, image size (height, width), and how its default layer becomes a grid
NETWORKS = {
    "resnet18": ({}, (64, 96), "nchw"),
    "mobilenetv2_050": ({}, (64, 96), "nchw"),
    "tf_efficientnet_lite0": ({}, (64, 96), "nchw"),
    "convnext_atto": ({}, (64, 96), "nchw"),
    "densenet121": ({}, (64, 96), "nchw"),
    "vgg11": ({"mlp_ratio": 1 / 32}, (64, 96), "nchw"),
    "vit_tiny_patch16_224": ({"img_size": (64, 96)}, (64, 96), "tokens"),
    "swin_tiny_patch4_window7_224": (
        {"img_size": (64, 96), "window_size": 2, "embed_dim": 24, "num_heads": (1, 2, 4, 8)},
        (64, 96),
        "nhwc",
    ),
    "vit_small_patch14_reg4_dinov2": (
        {"img_size": (56, 84), "depth": 3}, (56, 84), "tokens"
    ),
}  # fmt: skip


def as_grid(kind: str, prefix: int, size: tuple[int, int], patch: int):
    """The grid of a layer's output, written down apart from simexplain."""

    def tokens(output: Tensor) -> Tensor:
        rows, columns = size[0] // patch, size[1] // patch
        cells = output[:, prefix:]
        assert cells.shape[1] == rows * columns
        return cells.reshape(len(cells), rows, columns, -1).permute(0, 3, 1, 2)

    return {
        "nchw": lambda output: output,
        "nhwc": lambda output: output.permute(0, 3, 1, 2),
        "tokens": tokens,
    }[kind]


@pytest.mark.parametrize("name", NETWORKS)
def test_timm_networks(name: str) -> None:
    options, size, kind = NETWORKS[name]
    network = varied(timm.create_model(name, num_classes=0, **options))
    patch = network.patch_embed.patch_size[0] if kind == "tokens" else 0
    grid = as_grid(kind, getattr(network, "num_prefix_tokens", 0), size, patch)
    comparison = Comparison.triplet(*torch.rand(3, 1, 3, *size))
    result = explain(network, comparison)
    layer = network.get_submodule(result.layers[0])
    assert float(result.maps.max()) > 0
    for index, image in enumerate(comparison.stacked()[0]):
        wanted, embedding, _ = plain_maps(network, layer, image[None], result.weights[0], grid=grid)
        torch.testing.assert_close(result.embeddings[0, index], embedding, rtol=1e-3, atol=1e-5)
        scale = float(wanted.max())
        torch.testing.assert_close(result.maps[0, index], wanted, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("call", [0, 1, 2])
@pytest.mark.parametrize("layer", ["block", "act"])
def test_a_network_with_shared_layers(layer: str, call: int, images: Tensor) -> None:
    network = SharedNet().eval()
    comparison = Comparison.triplet(*images[:3, None])
    result = explain(network, comparison, layer=f"{layer}@{call}", weights="relative")
    for index, image in enumerate(comparison.stacked()[0]):
        wanted, _, _ = plain_maps(
            network, network.get_submodule(layer), image[None], result.weights[0], call=call
        )
        torch.testing.assert_close(result.maps[0, index], wanted, rtol=1e-4, atol=1e-8)


def signed_maps(network: nn.Module, comparison: Comparison) -> Tensor:
    """Maps of a network, signed so that none is empty by chance."""
    return explain(network, comparison, layer="last", keep_negative=True).maps


def test_frozen(tiny: TinyNet, images: Tensor) -> None:
    comparison = Comparison.triplet(*images[:3, None])
    wanted = signed_maps(tiny, comparison)
    tiny.requires_grad_(False)
    assert torch.equal(signed_maps(tiny, comparison), wanted)


def test_data_parallel(tiny: TinyNet, images: Tensor) -> None:
    comparison = Comparison.triplet(*images[:3, None])
    assert torch.equal(
        signed_maps(nn.DataParallel(tiny), comparison), signed_maps(tiny, comparison)
    )


def test_float64_equals_float32(tiny: TinyNet, images: Tensor) -> None:
    comparison = Comparison.quadruplet(*images[:4, None])
    single = signed_maps(tiny, comparison)
    double = signed_maps(tiny.double(), comparison.like(comparison.stacked().double()))
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gives_float32_maps(tiny: TinyNet, images: Tensor, dtype) -> None:
    comparison = Comparison.pair(images[:1], images[1:2])
    wanted = signed_maps(tiny, comparison)
    result = signed_maps(tiny.to(dtype), comparison)
    assert result.dtype == torch.float32
    similar = torch.cosine_similarity(result.flatten(), wanted.flatten(), dim=0)
    assert similar > 0.99


def test_batch_of_one_equals_any_batch(tiny: TinyNet, images: Tensor) -> None:
    """Promise 4: batched equals one by one, and results do not depend on chunks."""
    several = Comparison.triplet(images[:4], images[1:5], images[2:])
    whole = explain(tiny, several)
    chunked = explain(tiny, several, max_batch=5)
    torch.testing.assert_close(chunked.maps, whole.maps)
    for index in range(4):
        alone = Comparison.triplet(
            *(i[index : index + 1] for i in (images[:4], images[1:5], images[2:]))
        )
        single = explain(tiny, alone)
        torch.testing.assert_close(single.maps[0], whole.maps[index], rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(single.distances[0], whole.distances[index])


def test_both_images_of_a_pair_have_their_own_map(tiny: TinyNet, images: Tensor) -> None:
    maps = signed_maps(tiny, Comparison.pair(images[:1], images[1:2]))[0]
    swapped = signed_maps(tiny, Comparison.pair(images[1:2], images[:1]))[0]
    assert not torch.allclose(maps[0], maps[1])
    torch.testing.assert_close(swapped, maps.flip(0))


@pytest.mark.parametrize("layer", ["layer4", "layer3"])
def test_against_captum_on_each_image(layer: str) -> None:
    captum = pytest.importorskip("captum.attr", reason="the captum package is missing")
    network = varied(timm.create_model("resnet18", num_classes=0))
    comparison = Comparison.quadruplet(*torch.rand(4, 1, 3, 64, 96))
    result = explain(network, comparison, layer=layer)
    weight = result.weights[0]

    def score(image: Tensor) -> Tensor:
        return nn.functional.normalize(network(image), dim=1) @ weight

    method = captum.LayerGradCam(score, network.get_submodule(layer))
    for index, image in enumerate(comparison.stacked()[0]):
        wanted = method.attribute(image[None], relu_attributions=True)[0, 0]
        scale = float(wanted.max())
        torch.testing.assert_close(
            result.maps[0, index], wanted.detach(), rtol=1e-3, atol=1e-4 * scale
        )
