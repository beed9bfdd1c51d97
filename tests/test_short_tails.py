"""Tails of class-token transformers, run for the tokens that are read alone: the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer

from simexplain import Comparison, as_similarity_model, explain, match
from simexplain.methods import decomposition as module
from simexplain.methods.decomposition import position_parts
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


class Encoder(nn.Module):
    """``nn.TransformerEncoder``, which asks ``nn.MultiheadAttention`` for everything."""

    def __init__(
        self,
        depth: int,
        *,
        tokens_first: bool = False,
        last: bool = False,
        heads: int = 3,
        causal: bool = False,
        unread: tuple[int, ...] = (),
        **options: Any,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 16, 16)
        self.causal, self.unread = causal, list(unread)
        self.extra = nn.Parameter(torch.randn(1, 1, 48))
        self.places = nn.Parameter(torch.randn(1, 17, 48))
        self.tokens_first, self.last = tokens_first, last
        layer = nn.TransformerEncoderLayer(
            48, heads, 192, batch_first=not tokens_first, activation=F.gelu, **options
        )
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        extra = self.extra.expand(len(tokens), -1, -1)
        both = (tokens, extra) if self.last else (extra, tokens)
        tokens = torch.cat(both, dim=1) + self.places
        index = 16 if self.last else 0
        masks: dict[str, Any] = {}
        if self.causal:
            masks["mask"] = nn.Transformer.generate_square_subsequent_mask(17)
        if self.unread:
            masks["src_key_padding_mask"] = torch.zeros(len(tokens), 17, dtype=torch.bool)
            masks["src_key_padding_mask"][:, self.unread] = True
        if self.tokens_first:
            return self.blocks(tokens.transpose(0, 1), **masks)[index]
        return self.blocks(tokens, **masks)[:, index]


class Grouped(nn.Module):
    """Queries of several heads read one head of keys and values, as in language models.

    Args:
        depth: Blocks.
        attend: From queries ``(n,4,T,d)``, keys and values ``(n,2,T,d)``.
    """

    def __init__(self, depth: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.patches, self.attend = nn.Conv2d(3, 48, 16, 16), attend
        self.places = nn.Parameter(torch.randn(1, 17, 48))
        self.norms = nn.ParameterList(torch.ones(48) for _ in range(2 * depth))
        self.makes = nn.ModuleList(nn.Linear(48, 48 + 24 + 24) for _ in range(depth))
        self.joins = nn.ModuleList(nn.Linear(48, 48) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(48, 192), nn.SiLU(), nn.Linear(192, 48)) for _ in range(depth)
        )
        self.ends = nn.ModuleList(nn.Identity() for _ in range(depth))

    def forward(self, images: Tensor) -> Tensor:
        def normed(tokens: Tensor, scale: Tensor) -> Tensor:
            return scale * (tokens * torch.rsqrt(tokens.pow(2).mean(-1, keepdim=True) + 1e-6))

        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat((tokens, tokens.new_ones(len(tokens), 1, 48)), dim=1) + self.places
        for n, (make, join) in enumerate(zip(self.makes, self.joins, strict=True)):
            made = make(normed(tokens, self.norms[2 * n]))
            query, key, value = (
                part.unflatten(-1, (-1, 12)).transpose(1, 2)
                for part in made.split((48, 24, 24), dim=-1)
            )
            tokens = tokens + join(self.attend(query, key, value).transpose(1, 2).flatten(2))
            tokens = self.ends[n](tokens + self.mlps[n](normed(tokens, self.norms[2 * n + 1])))
        return tokens[:, -1]


def repeated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = (part[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for part in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def grouped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, scale=0.2)


def grouped_and_causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = (part.repeat_interleave(2, dim=1) for part in (key, value))
    later = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
    scores = (query @ key.transpose(2, 3) / 12**0.5).masked_fill(later, -torch.inf)
    return scores.softmax(dim=3) @ value


def clip_resnet(depth: int, side: int = 64, width: int = 8) -> nn.Module:
    """The convolutional tower of CLIP: its attention asks with the mean of a map."""
    pytest.importorskip("open_clip")
    from open_clip.modified_resnet import ModifiedResNet

    layers = (3, 4, 6, 3) if depth > 3 else (1, 1, 1, 1)
    network: nn.Module = ModifiedResNet(layers, 64, heads=8, image_size=side, width=width)
    return network


def pooled(depth: int, pool: str) -> nn.Module:
    """Convolutions below one of timm's pools by attention, which ask with the mean, too."""
    from timm.layers import AttentionPool2d, RotAttentionPool2d

    trunk = [nn.Conv2d(3, 48, 16, 16)]
    for _ in range(depth):
        trunk += [nn.Conv2d(48, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU()]
    made = {
        "plain": lambda: AttentionPool2d(48, 4, 40, head_dim=12, qkv_separate=True),
        "rotary": lambda: RotAttentionPool2d(48, 40, head_dim=12, qkv_separate=True),
    }
    return nn.Sequential(nn.Sequential(*trunk), made[pool]())


def open_clip(depth: int, **vision: Any) -> nn.Module:
    package = pytest.importorskip("open_clip")
    sizes = {"image_size": 64, "patch_size": 16, "layers": depth, "width": 48, "head_width": 16}
    config = {
        "embed_dim": 40,
        "vision_cfg": {**sizes, **vision},
        "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
    }
    # Made by hand: a name would stay known to the tests that come after.
    network: nn.Module = package.CLIP(**config).visual
    return network


def hugging_face(depth: int, kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=48, num_hidden_layers=depth, num_attention_heads=3, intermediate_size=192,
        image_size=64, patch_size=16,
    )  # fmt: skip
    name = f"{kind}Model" if "Vision" in kind else kind + "Model"
    network: nn.Module = getattr(transformers, name)(config)
    return network


OPAQUE: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "open_clip": ("transformer.resblocks.{}.ln_1", open_clip),
    "open_clip, pooled by attention": (
        "transformer",
        lambda depth: open_clip(
            depth, attentional_pool=True, attn_pooler_heads=4, attn_pooler_queries=1
        ),
    ),
    "SigLIP": ("post_layernorm", lambda depth: hugging_face(depth, "SiglipVision")),
    "DINOv2": ("encoder.layer.{}.norm1", lambda depth: hugging_face(depth, "Dinov2")),
    "torchvision": (
        "encoder.layers.encoder_layer_{}.ln_1",
        lambda depth: VisionTransformer(64, 16, depth, 3, 48, 192),
    ),
    "torch": ("blocks.layers.{-}", lambda depth: Encoder(depth)),
    "torch, normalised first": (
        "blocks.layers.{}.norm1",
        lambda depth: Encoder(depth, norm_first=True),
    ),
    "torch, tokens first": (
        "blocks.layers.{-}",
        lambda depth: Encoder(depth, tokens_first=True),
    ),
    "torch, last token": ("blocks.layers.{-}", lambda depth: Encoder(depth, last=True)),
    "causal mask, last token": (
        "blocks.layers.{-}",
        lambda depth: Encoder(depth, last=True, causal=True),
    ),
    "padding mask": (
        "blocks.layers.{}.norm1",
        lambda depth: Encoder(depth, norm_first=True, unread=(3, 4, 16)),
    ),
    "both masks, tokens first": (
        "blocks.layers.{-}",
        lambda depth: Encoder(depth, tokens_first=True, last=True, causal=True, unread=(2, 5)),
    ),
    "heads in groups": ("ends.{-}", lambda depth: Grouped(depth, grouped)),
    "heads in groups, causal": ("ends.{-}", lambda depth: Grouped(depth, grouped_and_causal)),
    "heads repeated, causal": ("ends.{-}", lambda depth: Grouped(depth, repeated)),
    "heads repeated, mask written out": ("ends.{-}", lambda depth: Grouped(depth, written_out)),
    "CLIP RN50": ("layer4", clip_resnet),
    "pool of timm": ("0", lambda depth: pooled(depth, "plain")),
    "pool of timm, rotary": ("0", lambda depth: pooled(depth, "rotary")),
}
"""Networks whose attention is one function or another module's, and the default layer of each."""


def opaque(name: str, depth: int) -> tuple[str, nn.Module]:
    torch.manual_seed(0)
    layer, build = OPAQUE[name]
    network = build(depth).eval()
    if name == "torchvision":
        network.heads = nn.Identity()
    for parameter in network.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return layer.replace("{}", str(depth - 1)).replace("{-}", str(depth - 2)), network


@pytest.mark.parametrize("name", OPAQUE)
def test_attention_in_one_function_is_looked_into(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, network = opaque(name, 3)
    images = torch.rand(2, 3, 64, 64)
    model = as_similarity_model(network)
    assert model.default_for(images) == layer
    assert trace_vectors(model, images, (layer,)).short(layer, 0) is not None
    short = position_parts(model, images, layer, steps=8)
    with monkeypatch.context() as patched:
        patched.setattr(module, "_FEW", 10**9)
        whole = position_parts(model, images, layer, steps=8)
    with torch.no_grad():
        rows = torch.cat([model.vectors(image[None]) for image in images])
    torch.testing.assert_close(short.vectors, rows, rtol=1e-4, atol=1e-5)
    size = float(whole.parts.abs().max())
    torch.testing.assert_close(short.parts, whole.parts, rtol=1e-3, atol=1e-4 * size)
    assert short.steps == whole.steps
    assert float((short.residual - whole.residual).abs().max()) <= 1e-5


@pytest.mark.parametrize("name", OPAQUE)
def test_exact_methods_cost_at_most_eight_forward_passes(name: str) -> None:
    """Floating-point operations of products, which no load on the machine changes."""
    layer, network = opaque(name, 12)
    side = 64
    if name == "CLIP RN50":  # four positions are too few to be spared anything
        torch.manual_seed(0)
        side, network = 112, clip_resnet(12, 112, 16).eval()
    images = torch.rand(2, 3, side, side)
    model = as_similarity_model(network)
    pair = Comparison.pair(images[:1], images[1:])
    explain(model, pair, "decomposition", layer, check=False)  # the layers are looked up once
    with torch.no_grad():
        plain = operations(lambda: network(images))
    assert operations(lambda: match(model, images[:1], images[1:], layer)) <= 8 * plain
    result = operations(lambda: explain(model, pair, "decomposition", layer, check=False))
    assert result <= 8 * plain


def operations(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counted:
        run()
    return int(counted.get_total_flops())


class Attending(nn.Module):
    """One attention and nothing else, so that its averaged Jacobians can be written down."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 16, 16)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True, **options)

    def tail(self, tokens: Tensor) -> Tensor:
        return self.attention(tokens, tokens, tokens, need_weights=False)[0][:, 0]

    def forward(self, images: Tensor) -> Tensor:
        maps = self.patches(images)
        return self.tail(maps.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"bias": False}])
def test_averaged_jacobians_of_one_attention_written_down(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = Attending(**options).eval()
    images = 3 * torch.rand(1, 3, 64, 64)
    result = position_parts(as_similarity_model(network), images, "patches", steps=6)
    with torch.no_grad():
        start, end = (
            network.patches(x).flatten(2).transpose(1, 2)
            for x in (torch.zeros_like(images), images)
        )
    expected = torch.zeros(1, 12, 16)
    for index, weight in zip(*np.polynomial.legendre.leggauss(6), strict=True):
        between = start + (index + 1) / 2 * (end - start)
        slopes = torch.autograd.functional.jacobian(network.tail, between)[0, :, 0]
        expected += weight / 2 * (slopes * (end - start)[0]).sum(dim=2)
    assert result.steps == 6
    torch.testing.assert_close(result.parts.flatten(2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_a_matching_costs_at_most_eight_forward_passes(name: str) -> None:
    """Floating-point operations of products, which no load on the machine changes."""
    network = timm.create_model(name, num_classes=0, img_size=112).eval()
    images = torch.rand(2, 3, 112, 112)
    model = as_similarity_model(network)
    with torch.no_grad():
        plain = operations(lambda: network(images))
    match(model, images[:1], images[1:], "blocks.11.norm1")  # the layers are looked up once
    cost = operations(lambda: match(model, images[:1], images[1:], "blocks.11.norm1"))
    assert cost <= 8 * plain


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
    result = trace_vectors(model, images, (layer,)).short(layer, 0)
    assert result is not None
    assert len(result.front.ends) == 3
    short = position_parts(model, images, layer, steps=3)
    with monkeypatch.context() as patched:
        patched.setattr(module, "_FEW", 10**9)
        whole = position_parts(model, images, layer, steps=3)
    size = float(whole.parts.abs().max())
    torch.testing.assert_close(short.parts, whole.parts, rtol=1e-3, atol=1e-4 * size)
