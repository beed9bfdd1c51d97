"""Tails of class-token transformers, run for the tokens that are read alone: the same numbers."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from simexplain import as_similarity_model, match
from simexplain.methods import position_parts as module
from simexplain.methods.position_parts import position_parts
from simexplain.methods.raw_vectors import trace_vectors


class Unit(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.network(images), dim=1)


def transformer(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 0}
    network = timm.create_model(name, **{**sizes, **options}).eval()
    for parameter in network.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return network


NETWORKS = {
    "class token": ("vit_tiny_patch16_224", {}),
    "class and distillation token": ("deit_tiny_distilled_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"patch_size": 16, "init_values": 0.5}),
    "queries and keys normalised": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "more places than dimensions": ("vit_tiny_patch16_224", {"embed_dim": 12}),
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_short_tail_gives_what_the_whole_one_gives(
    kind: str, wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options = NETWORKS[kind]
    network = transformer(name, **options)
    network = Unit(network).eval() if wrapped else network
    images = torch.rand(3, 3, 64, 64)
    model = as_similarity_model(network)
    layer = ("network." if wrapped else "") + "blocks.2.norm1"
    assert trace_vectors(model, images, (layer,)).short(layer, 0) is not None
    short = position_parts(model, images, layer, steps=3, max_batch=2)
    with monkeypatch.context() as patched:
        patched.setattr(module, "_FEW", 10**9)
        whole = position_parts(model, images, layer, steps=3, max_batch=2)
    assert short.steps == whole.steps == 3
    size = float(whole.parts.abs().max())
    torch.testing.assert_close(short.parts, whole.parts, rtol=1e-3, atol=1e-4 * size)
    for part in ("rest", "vectors", "lengths"):
        torch.testing.assert_close(getattr(short, part), getattr(whole, part))


def test_tails_that_read_every_token_are_run_whole() -> None:
    network = transformer("vit_tiny_patch16_224", global_pool="avg")
    images = torch.rand(2, 3, 64, 64)
    model = as_similarity_model(network)
    for layer in ("blocks.2.norm1", "blocks.1", "blocks.2"):
        assert trace_vectors(model, images, (layer,)).short(layer, 0) is None


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_a_matching_costs_at_most_eight_forward_passes(name: str) -> None:
    """Floating-point operations of products, which no load on the machine changes."""
    network = timm.create_model(name, num_classes=0, img_size=112).eval()
    images = torch.rand(2, 3, 112, 112)
    model = as_similarity_model(network)
    with FlopCounterMode(display=False) as plain, torch.no_grad():
        network(images)
    match(model, images[:1], images[1:], "blocks.11.norm1")  # the layers are looked up once
    with FlopCounterMode(display=False) as counted:
        match(model, images[:1], images[1:], "blocks.11.norm1")
    assert counted.get_total_flops() <= 8 * plain.get_total_flops()


def test_queries_keys_and_values_may_be_made_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers has it: three linear layers read the layer, not one."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
    config = transformers.ViTConfig(
        **sizes, intermediate_size=192, image_size=64, initializer_range=0.2
    )
    network = transformers.ViTModel(config, add_pooling_layer=False).eval()
    images = torch.rand(2, 3, 64, 64)
    model, layer = as_similarity_model(network), "layers.2.layernorm_before"
    found = trace_vectors(model, images, (layer,)).short(layer, 0)
    assert found is not None
    assert len(found.linears) == 3
    short = position_parts(model, images, layer, steps=3)
    with monkeypatch.context() as patched:
        patched.setattr(module, "_FEW", 10**9)
        whole = position_parts(model, images, layer, steps=3)
    size = float(whole.parts.abs().max())
    torch.testing.assert_close(short.parts, whole.parts, rtol=1e-3, atol=1e-4 * size)
