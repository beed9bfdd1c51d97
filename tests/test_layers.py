"""Finding layers: the default, the listing, and turning outputs into grids."""

from __future__ import annotations

import pytest
import timm
import torch
from conftest import TinyNet
from torch import Tensor, nn

from simexplain import as_similarity_model
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ModelError
from simexplain.models.layers import GridHints, to_grid

DEFAULTS = {
    "resnet18": ("layer4", (512, 2, 2), 32),
    "mobilenetv2_050": ("bn2", (1280, 2, 2), 32),
    "convnext_atto": ("stages.3", (320, 2, 2), 32),
    "densenet121": ("features.norm5", (1024, 2, 2), 32),
    "regnetx_002": ("final_conv", (368, 2, 2), 32),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_last_map_before_the_embedding(name: str) -> None:
    model = as_similarity_model(timm.create_model(name, num_classes=0))
    layers = model.layers_for(torch.rand(1, 3, 64, 64))
    (chosen,) = [layer for layer in layers if layer.default]
    wanted, shape, stride = DEFAULTS[name]
    assert (chosen.shape, chosen.stride) == (shape, (stride, stride))
    assert chosen.name == wanted or name == "regnetx_002"


def test_torchvision_networks() -> None:
    from torchvision.models import get_model

    for name, wanted in (("resnet18", "layer4"), ("mobilenet_v2", "features.18")):
        network = get_model(name, weights=None)
        model = as_similarity_model(network)
        layers = model.layers_for(torch.rand(1, 3, 64, 64))
        assert [layer.name for layer in layers if layer.default] == [wanted]


def test_a_class_token_network_uses_the_last_layer_whose_patches_count() -> None:
    token = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64, depth=3)
    mean = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=64, depth=3, global_pool="avg"
    )
    image = torch.rand(1, 3, 64, 64)
    result = {}
    for kind, network in (("token", token), ("mean", mean)):
        layers = as_similarity_model(network).layers_for(image)
        (result[kind],) = [layer for layer in layers if layer.default]
        assert result[kind].shape == (192, 4, 4)
        names = [layer.name for layer in layers]
        assert ("blocks.2" in names) is (kind == "mean")  # after it only the class token is read
    assert result["token"].name == "blocks.2.norm1"
    assert result["mean"].name in ("blocks", "blocks.2", "norm")


def test_every_listed_layer_can_be_explained(images: Tensor) -> None:
    from simexplain import Comparison, explain

    model = as_similarity_model(TinyNet().eval())
    for layer in model.layers_for(images):
        result = explain(model, Comparison.pair(images[:1], images[1:2]), layer=layer.name)
        assert tuple(result.maps.shape[2:]) == layer.shape[1:]
        assert layer.stride == (24 / layer.shape[1], 32 / layer.shape[2])


def test_heads_and_pooled_outputs_are_not_listed(images: Tensor) -> None:
    names = {layer.name for layer in as_similarity_model(TinyNet()).layers_for(images)}
    assert names == {"stem", "norm", "act", "body", "last"}


def test_no_map_at_all() -> None:
    flat = as_similarity_model(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5)))
    with pytest.raises(ModelError, match="no layer with a map"):
        flat.layers_for(torch.rand(1, 3, 8, 8))


def test_the_dry_run_moves_no_random_state_and_leaves_no_trace() -> None:
    network = TinyNet().train()
    model = as_similarity_model(network)
    state = torch.get_rng_state()
    statistics = network.norm.running_mean.clone()
    assert model.default_layer == "last"
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(network.norm.running_mean, statistics)
    assert network.norm.training
    assert all(parameter.grad is None for parameter in network.parameters())


def numbered(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


class Grid:
    """A stand-in for timm's patch embedding."""

    def __init__(self, stride: int) -> None:
        self.stride = stride

    def dynamic_feat_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // self.stride, size[1] // self.stride


NONE = GridHints()


@pytest.mark.parametrize(
    ("shape", "hints", "grid"),
    [
        ((2, 5, 4, 6), NONE, (2, 5, 4, 6)),
        ((2, 4, 6, 50), NONE, (2, 50, 4, 6)),
        ((2, 4, 6, 50), GridHints(Grid(16), 0, True), (2, 50, 4, 6)),
        ((2, 24, 7), NONE, (2, 7, 4, 6)),
        ((2, 25, 7), NONE, (2, 7, 4, 6)),
        ((2, 29, 7), GridHints(Grid(16), 5), (2, 7, 4, 6)),
        ((2, 24, 7), GridHints(Grid(16), 5), (2, 7, 4, 6)),
        ((2, 6, 7), GridHints(Grid(16), 0), (2, 7, 2, 3)),
        ((2, 23, 7), GridHints(Grid(16), 1), None),
        ((2, 12, 29, 29), GridHints(Grid(16), 5), None),
        ((2, 7), NONE, None),
    ],
)
def test_outputs_become_grids(shape, hints: GridHints, grid) -> None:
    result = to_grid(numbered(*shape), (64, 96), hints)
    assert (None if result is None else tuple(result.shape)) == grid


def test_tokens_are_laid_out_row_by_row_after_the_prefix() -> None:
    tokens = numbered(1, 26, 2)
    grid = to_grid(tokens, (64, 96), GridHints(Grid(16), 2))
    for row in range(4):
        for column in range(6):
            assert torch.equal(grid[0, :, row, column], tokens[0, 2 + row * 6 + column])


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet18", ("layer1", "layer2", "layer3", "layer4")),
        ("vgg11", ("features.9", "features.14", "features.19", "features")),
    ],
)
def test_stages_are_the_last_maps_of_the_coarsest_resolutions(name: str, stages) -> None:
    narrow = {"mlp_ratio": 1 / 32} if name == "vgg11" else {}  # dense layers, which are no stage
    network = timm.create_model(name, num_classes=0, **narrow)
    model = as_similarity_model(network, preprocess=Preprocess(size=(64, 64)))
    assert model.stages == stages
    assert model.default_layer == stages[-1]


def test_stages_of_one_resolution_are_spread_over_the_depth() -> None:
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64, depth=8)
    model = as_similarity_model(network, preprocess=Preprocess(size=(64, 64)))
    assert len(model.stages) == 4
    depths = [int(name.split(".")[1]) for name in model.stages]
    assert depths == sorted(set(depths))
    assert model.stages[-1] == model.default_layer
