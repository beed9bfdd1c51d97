"""Methods for transformers give what plain autograd gives, whatever computes the attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import TinyViT, by_hand, opened
from conftest import TinyNet
from odd_networks import Cells, Patches, Tokens, by_columns, snake, snake_by_index, spiral
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from simexplain import Comparison, as_similarity_model, explain, load_model
from simexplain.attention_recording import _Recorder, record_attention
from simexplain.errors import ComparisonError, ModelError, SimexplainError
from simexplain.methods.attention import token_cells

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("attention", {}),
    "rollout": ("attention", {"rollout": True}),
    "attention_relevance": ("attention_relevance", {}),
    "grad_eclip": ("grad_eclip", {}),
}


def refused(network: nn.Module, images: Tensor, method: str, **options: Any) -> str:
    with pytest.raises(SimexplainError) as caught:
        explain(network, Comparison.pair(images[:1], images[1:2]), method, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


# ----------------------------------------------------------------------- values, by hand


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("pool", ["class", "mean", "probe"])
@pytest.mark.parametrize("name", WAYS)
def test_maps_are_those_of_plain_autograd(
    name: str, pool: str, fused: bool, images: Tensor
) -> None:
    network = TinyViT(pool=pool, fused=fused)
    triplets = Comparison.triplet(images[:2], images[2:4], images[4:6])
    method, options = WAYS[name]
    result = explain(network, triplets, method, **options)
    units = F.normalize(network(images).detach(), dim=1)
    for number in range(2):
        anchor, positive, negative = units[number], units[number + 2], units[number + 4]
        for index, direction in enumerate((positive - negative, anchor, -anchor)):
            image = images[number + 2 * index : number + 2 * index + 1]
            wanted = by_hand(network, image, direction)[name]
            torch.testing.assert_close(result.maps[number, index], wanted, rtol=1e-4, atol=1e-7)
            score = float(units[number + 2 * index] @ direction)
            assert float(result.scores[number, index]) == pytest.approx(score, abs=1e-5)


def test_one_block_and_one_head(images: Tensor) -> None:
    network, pair = TinyViT(), Comparison.pair(images[:1], images[1:2])
    _, seen = opened(network, images[:1])
    for block in (0, 1, -1):
        weights = seen[block]["a"][0, :, 0, 1:].detach().view(3, 3, 4)
        for heads, wanted in (
            ("1", weights[1]),
            ("max", weights.amax(0)),
            ("mean", weights.mean(0)),
        ):
            result = explain(network, pair, "attention", block=block, heads=heads).maps[0, 0]
            torch.testing.assert_close(result, wanted)
    later = explain(network, pair, "attention_relevance", first_block=-1).maps[0, 0]
    direction = F.normalize(network(images[1:2]), dim=1)[0].detach()
    unit, seen = opened(network, images[:1])
    (slope,) = torch.autograd.grad(unit @ direction, seen[-1]["a"])
    wanted = (slope * seen[-1]["a"]).relu().mean(1)[0, 0, 1:].view(3, 4)
    torch.testing.assert_close(later, wanted, rtol=1e-4, atol=1e-7)


def test_scores_are_those_of_similarity_cam(images: Tensor) -> None:
    pair = Comparison.pair(images[:2], images[2:4])
    network = TinyViT()
    for score in ("cosine", "dot", "held"):
        wanted = explain(network, pair, "similarity_cam", score=score)
        for method in ("attention_relevance", "grad_eclip"):
            result = explain(network, pair, method, score=score)
            torch.testing.assert_close(result.scores, wanted.scores)
            torch.testing.assert_close(result.weights, wanted.weights)
    same = Comparison.pair(images[:1], images[:1])  # its cosine has no gradient
    assert float(explain(network, same, "attention_relevance").maps.abs().max()) < 1e-6
    assert float(explain(network, same, "attention_relevance", score="held").maps.max()) > 1e-4


def test_class_token_and_mean_share_by_their_gradients(images: Tensor) -> None:
    network = TinyViT(pool="both")
    network.head.weight.data[:, :12] = 0  # only the mean counts
    pair = Comparison.pair(images[:1], images[1:2])
    weights = opened(network, images[:1])[1][-1]["a"][0].mean(0).detach()
    result = explain(network, pair, "attention").maps[0, 0]
    torch.testing.assert_close(result, weights[1:, 1:].mean(0).view(3, 4))
    network = TinyViT(pool="both")
    network.head.weight.data[:, 12:] = 0
    result = explain(network, pair, "attention").maps[0, 0]
    torch.testing.assert_close(result, weights[0, 1:].view(3, 4))


# --------------------------------------------------------------------- other people's code


class Picked(nn.Module):
    """A network and what is taken of its output."""

    def __init__(self, inner: nn.Module, pick: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.inner, self.pick = inner, pick

    def forward(self, images: Tensor) -> Tensor:
        return self.pick(self.inner(images))


SMALL = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32}
HUGGING_FACE = {
    "ViT": ({"intermediate_size": 64}, lambda out: out.last_hidden_state[:, 0], 1),
    "DeiT": ({"intermediate_size": 64}, lambda out: out.last_hidden_state[:, 0], 2),
    "CLIPVision": ({"intermediate_size": 64}, lambda out: out.pooler_output, 1),
    "Dinov2": ({}, lambda out: out.last_hidden_state[:, 0], 1),
    "Dinov2WithRegisters": ({}, lambda out: out.last_hidden_state[:, 0], 5),
    "SiglipVision": ({"intermediate_size": 64}, lambda out: out.last_hidden_state.mean(1), 0),
}


def hugging_face(kind: str, way: str) -> tuple[nn.Module, int]:
    transformers = pytest.importorskip("transformers")
    more, pick, prefix = HUGGING_FACE[kind]
    patch = {"patch_size": 14} if "Dino" in kind else {"patch_size": 16}
    config = getattr(transformers, f"{kind}Config")(image_size=64, **SMALL, **more, **patch)
    torch.manual_seed(0)
    inner = getattr(transformers, f"{kind}Model")._from_config(config, attn_implementation=way)
    for name, parameter in inner.named_parameters():
        if "query" in name or "q_proj" in name:
            nn.init.normal_(parameter, std=0.8)  # else attention is uniform
    return Picked(inner.eval(), pick), prefix


@pytest.mark.parametrize("way", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_transformers_own_attentions_are_the_oracle(kind: str, way: str) -> None:
    network, prefix = hugging_face(kind, way)
    side = 4 if "Dino" in kind else 5
    size = 64 if "Dino" in kind else 80
    more = {"interpolate_pos_encoding": True} if "Dino" not in kind else {}
    torch.manual_seed(1)
    images = torch.rand(2, 3, size, size)
    plain, _ = hugging_face(kind, "eager")
    plain.load_state_dict(network.state_dict())
    if more:  # positions for another size than the configured one
        for one in (network, plain):
            one.inner.forward = lambda *a, f=one.inner.forward, **k: f(*a, **k, **more)
    out = plain.inner(images, output_attentions=True)
    units = F.normalize(plain.pick(out), dim=1)
    score = units[0] @ units[1].detach() + units[1] @ units[0].detach()
    slopes = torch.autograd.grad(score, out.attentions)
    relevance = torch.eye(side * side + prefix).repeat(2, 1, 1)
    for weights, slope in zip(out.attentions, slopes, strict=True):
        relevance = relevance + (slope * weights).clamp(min=0).mean(1) @ relevance
    relevance = relevance - torch.eye(side * side + prefix)
    wanted = relevance[:, prefix:] if prefix == 0 else relevance[:, :1]
    wanted = wanted[:, :, prefix:].mean(1).view(2, side, side)
    raw = out.attentions[-1].mean(1)
    raw = raw[:, prefix:] if prefix == 0 else raw[:, :1]
    pair = Comparison.pair(images[:1], images[1:])
    result = explain(network, pair, "attention_relevance")
    scale = float(wanted.detach().abs().max())
    torch.testing.assert_close(result.maps[0] / scale, wanted / scale, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(result.embeddings[0], units.detach(), rtol=1e-5, atol=1e-6)
    result = explain(network, pair, "attention")
    torch.testing.assert_close(
        result.maps[0],
        raw[:, :, prefix:].mean(1).view(2, side, side).detach(),
        rtol=1e-4,
        atol=1e-6,
    )


def timm_vit(
    pool: str = "token", fused: bool = True, name: str = "vit_tiny_patch16_224"
) -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model(
        name, img_size=(48, 64), depth=3, embed_dim=24, num_heads=3, num_classes=0, global_pool=pool
    )
    for block in network.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.3)
        block.attn.fused_attn = fused
    return network.eval()


@pytest.mark.parametrize(
    ("pool", "name"),
    [("token", "vit_tiny_patch16_224"), ("avg", "vit_tiny_patch16_224"),
     ("map", "vit_tiny_patch16_224"), ("token", "deit_tiny_distilled_patch16_224")],
)  # fmt: skip
@pytest.mark.parametrize("method", WAYS)
def test_timm_fused_and_not(pool: str, name: str, method: str) -> None:
    images = torch.rand(4, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    pairs = Comparison.pair(images[:2], images[2:])
    way, options = WAYS[method]
    if method == "grad_eclip":
        options = {"keep_negative": True}
    fused, plain = timm_vit(pool, True, name), timm_vit(pool, False, name)
    if pool == "map":
        plain.attn_pool.fused_attn = False
    one, other = (explain(network, pairs, way, **options).maps for network in (fused, plain))
    assert one.shape == (2, 2, 3, 4)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    assert all(block.attn.fused_attn for block in fused.blocks)


def test_timm_by_its_own_dropout(images: Tensor) -> None:
    """What its attention dropout gives out is what multiplies the values there."""
    network, kept = timm_vit(fused=False), []
    images = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    hooks = [
        block.attn.attn_drop.register_forward_hook(lambda m, a, out: kept.append(out))
        for block in network.blocks
    ]
    units = F.normalize(network(images), dim=1)
    slopes = torch.autograd.grad((units[0] * units[1].detach()).sum(), kept)
    for hook in hooks:
        hook.remove()
    relevance = torch.eye(13)
    for weights, slope in zip(kept, slopes, strict=True):
        relevance = relevance + (slope[0] * weights[0]).clamp(min=0).mean(0) @ relevance
    result = explain(network, Comparison.pair(images[:1], images[1:]), "attention_relevance")
    torch.testing.assert_close(result.maps[0, 0], relevance[0, 1:].view(3, 4), rtol=1e-3, atol=1e-7)


class Encoder(nn.Module):
    """torch's own layers, tokens first or second."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 16, 8, 8)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.batch_first = batch_first

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2)
        tokens = tokens.transpose(1, 2) if self.batch_first else tokens.permute(2, 0, 1)
        return self.encoder(tokens).mean(dim=1 if self.batch_first else 0)


def torchvision_vit() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    network = models.VisionTransformer(64, 16, 3, 4, 32, 64, num_classes=8)
    network.heads = nn.Identity()
    return network


def open_clip_vit(**options: Any) -> nn.Module:
    module = pytest.importorskip("open_clip.transformer")
    return module.VisionTransformer(64, 16, 32, 3, 4, 2.0, output_dim=16, **options)


MULTI_HEAD = {
    "torchvision": (torchvision_vit, 64),
    "open_clip": (open_clip_vit, 64),
    "tokens first": (lambda: Encoder(False), 32),
    "batch first": (lambda: Encoder(True), 32),
}


@pytest.mark.parametrize("name", MULTI_HEAD)
def test_multi_head_attention_as_it_reports_itself(name: str) -> None:
    """``nn.MultiheadAttention`` called again with ``need_weights`` on what it was given."""
    torch.manual_seed(0)
    made, size = MULTI_HEAD[name]
    network = made().eval()
    images, given = torch.rand(2, 3, size, size), []
    *_, last = (m for m in network.modules() if isinstance(m, nn.MultiheadAttention))
    nn.init.normal_(last.in_proj_weight, std=0.5)
    hook = last.register_forward_pre_hook(
        lambda module, args, named: given.append((args, named)), with_kwargs=True
    )
    units = F.normalize(network(images), dim=1)
    hook.remove()
    args, named = given[0]
    named = {**named, "need_weights": True, "average_attn_weights": False}
    weights = last(*args, **named)[1].mean(1)
    prefix = weights.shape[1] - 16
    rows = weights[:, :1] if prefix else weights
    wanted = rows[:, :, prefix:].mean(1).view(2, 4, 4).detach()
    pair = Comparison.pair(images[:1], images[1:])
    result = explain(network, pair, "attention")
    torch.testing.assert_close(result.maps[0], wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.embeddings[0], units.detach(), rtol=1e-5, atol=1e-6)
    for method in ("attention_relevance", "grad_eclip"):
        assert explain(network, pair, method).maps.shape == (1, 2, 4, 4)


def test_an_exported_program(tmp_path: Path, images: Tensor) -> None:
    network = TinyViT()
    program = torch.export.export(network, (images[:4],))
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = load_model(tmp_path / "net.pt2")
    pairs = Comparison.pair(images[:2], images[2:4])
    for name, (method, options) in WAYS.items():
        wanted = explain(network, pairs, method, **options).maps
        result = explain(loaded, pairs, method, **options).maps
        torch.testing.assert_close(result, wanted, rtol=1e-3, atol=1e-6, msg=name)


# --------------------------------------------------------------------------- the recording


MASK = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) > 0.4
ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "boolean mask": {"attn_mask": MASK},
    "a query that sees nothing": {"attn_mask": MASK & (torch.arange(5) != 2).unsqueeze(1)},
    "additive mask": {"attn_mask": torch.randn(5, 7)},
    "causal": {"is_causal": True},
    "grouped queries": {"enable_gqa": True},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_fused_attention_in_the_open(name: str) -> None:
    options = ARGUMENTS[name]
    heads = 2 if "enable_gqa" in options else 4
    q, k, v = (torch.randn(3, h, t, 8) for h, t in ((4, 5), (heads, 7), (heads, 7)))
    wanted = F.scaled_dot_product_attention(q, k, v, **options)
    recorder = _Recorder()
    with torch.no_grad(), recorder:
        result = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(result.detach(), wanted)
    (call,) = recorder.recorded
    values = v.repeat_interleave(4 // heads, dim=1)
    torch.testing.assert_close((call.weights @ values).detach(), wanted)
    assert result.requires_grad


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_half_precision(kind: torch.dtype, fused: bool, images: Tensor) -> None:
    pair = Comparison.pair(images[:1], images[1:2])
    for name, (method, options) in WAYS.items():
        wanted = explain(TinyViT(fused=fused), pair, method, **options).maps
        result = explain(TinyViT(fused=fused).to(kind), pair, method, **options).maps
        assert result.dtype == torch.float32
        close = F.cosine_similarity(result.flatten(), wanted.flatten(), dim=0)
        assert float(close) > (0.99 if kind == torch.float16 else 0.9), name


def test_nothing_remains_after_an_error(images: Tensor) -> None:
    class Broken(TinyViT):
        def pooled(self, tokens: Tensor) -> Tensor:
            raise RuntimeError("on purpose")

    network = Broken().train()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="on purpose"):
        record_attention(as_similarity_model(network), images)
    assert torch.overrides._get_current_function_mode_stack() == []
    assert torch.is_grad_enabled()
    assert all(module.training for module in network.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_gradient_that_does_not_arrive_is_named(images: Tensor) -> None:
    class Frozen(TinyViT):
        def forward(self, given: Tensor) -> Tensor:
            with torch.no_grad():
                result = super().forward(given)
            return self.kv(F.pad(result, (0, 2)))

    class Partly(TinyViT):
        def forward(self, given: Tensor) -> Tensor:
            with torch.no_grad():
                tokens = self.blocks[0](self.embedded(given)).detach()
            return self.pooled(self.blocks[2](self.blocks[1](tokens)))

    for method in ("attention", "attention_relevance", "grad_eclip"):
        assert "torch.no_grad()" in refused(Frozen(), images, method)
    assert "torch.no_grad()" in refused(Partly(), images, "attention_relevance")
    pair = Comparison.pair(images[:1], images[1:2])
    assert explain(Partly(), pair, "grad_eclip", keep_negative=True).maps.abs().max() > 0


def test_gradient_checkpointing_is_named(images: Tensor) -> None:
    class Checkpointed(TinyViT):
        def forward(self, given: Tensor) -> Tensor:
            tokens = self.embedded(given)
            for block in self.blocks:
                tokens = checkpoint(block, tokens, use_reentrant=False)
            return self.pooled(tokens)

    assert "checkpointing" in refused(Checkpointed(), images, "attention_relevance")


@pytest.mark.slow
def test_modules_compiled_in_place_run_as_written(images: Tensor) -> None:
    network, pair = TinyViT(), Comparison.pair(images[:1], images[1:2])
    wanted = explain(network, pair, "attention_relevance").maps
    network.compile(backend="eager")
    result = explain(network, pair, "attention_relevance").maps
    torch.testing.assert_close(result, wanted)
    assert network._compiled_call_impl is not None


def test_attention_for_another_output_does_not_count(images: Tensor) -> None:
    class Aside(TinyViT):
        def forward(self, given: Tensor) -> Tensor:
            result = super().forward(given)
            self.blocks[0](self.embedded(given))  # such as a head that nobody reads
            return result

    pair = Comparison.pair(images[:1], images[1:2])
    for method, options in WAYS.values():
        wanted = explain(TinyViT(), pair, method, **options).maps
        torch.testing.assert_close(explain(Aside(), pair, method, **options).maps, wanted)


def test_tokens_find_their_places(images: Tensor) -> None:
    model = as_similarity_model(TinyNet())
    cells = token_cells(model, 29, [(12, 16), (4, 6)], (24, 36))
    assert cells is not None
    assert cells.tolist() == (5 + torch.arange(24).view(4, 6)).tolist()
    assert token_cells(model, 64, [(14, 14)], (224, 224)) is None
    # Where no convolution ran, the model says what so many tokens are.
    result = token_cells(model, 17, [], (32, 32))
    assert result is not None
    assert result.tolist() == (1 + torch.arange(16).view(4, 4)).tolist()


# ------------------------------------------------------------------------------- refusals


def test_networks_without_attention_over_the_image_are_refused(tiny: TinyNet) -> None:
    images = torch.rand(2, 3, 64, 64)
    for method in ("attention", "attention_relevance", "grad_eclip"):
        assert "no attention" in refused(tiny, images, method)
    swin = pytest.importorskip("torchvision").models.SwinTransformer(
        [4, 4], 8, [1, 1], [2, 2], [4, 4], num_classes=8
    )
    for method in ("attention", "attention_relevance", "grad_eclip"):
        assert "within windows" in refused(swin, images, method)


def test_relevance_through_other_than_one_chain_is_refused(images: Tensor) -> None:
    class Twice(TinyViT):
        def forward(self, given: Tensor) -> Tensor:
            return super().forward(given) + super().forward(given.flip(3))

    class Halved(TinyViT):
        def forward(self, given: Tensor) -> Tensor:
            tokens = self.blocks[0](self.embedded(given))
            return self.pooled(self.blocks[1](torch.cat((tokens[:, :1], tokens[:, 1::4]), 1)))

    class Mixed(TinyViT):
        def forward(self, given: Tensor) -> Tensor:
            tokens = self.embedded(given)
            heads = (tokens @ tokens.mT).unsqueeze(1).repeat(1, 2, 1, 1).softmax(-1)
            mixed = torch.stack([heads.sum(1)], dim=-1).squeeze(-1).permute(0, 2, 1).mT
            return self.pooled(
                self.blocks[0](tokens + mixed.contiguous().permute(0, 1, 2) @ tokens)
            )

    assert "do not follow" in refused(Twice(), images, "attention_relevance")
    result = explain(Twice(), Comparison.pair(images[:1], images[1:2]), "attention", block=3)
    assert "parallel ways" in result.warnings[0]
    assert "number of tokens changes" in refused(Halved(), images, "attention_relevance")
    assert "could not be followed" in refused(Mixed(), images, "attention_relevance")


def test_options_are_checked(images: Tensor) -> None:
    network = TinyViT()
    assert "from -3 to 2, got 3" in refused(network, images, "attention", block=3)
    assert "heads 0 to 2" in refused(network, images, "attention", heads="3")
    assert "heads to be mean" in refused(network, images, "attention", heads="all")
    assert "from -3 to 2" in refused(network, images, "attention_relevance", first_block=-4)
    for method in ("attention_relevance", "grad_eclip"):
        with pytest.raises(ComparisonError, match="cosine, dot, held"):
            explain(network, Comparison.pair(images[:1], images[1:2]), method, score="euclid")
    with pytest.raises(ModelError, match="takes no layer"):
        explain(network, Comparison.pair(images[:1], images[1:2]), "attention", "blocks.0")


@pytest.mark.parametrize("method", ["attention", "attention_relevance", "grad_eclip"])
@pytest.mark.parametrize("order", [snake, snake_by_index, by_columns, spiral])
def test_tokens_lie_where_their_patches_are_whatever_their_order(method: str, order: Cells) -> None:
    """Attention does not see the order of tokens: maps are those of raster order."""
    torch.manual_seed(0)
    plain = Tokens(Patches(8, 8)).eval()
    other = Tokens(Patches(8, 8), order).eval()
    other.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 48, 64)
    pair = Comparison.pair(images[:1], images[1:])
    wanted, result = (
        explain(as_similarity_model(net), pair, method, check=False).maps for net in (plain, other)
    )
    torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-6)
    assert wanted.std() > 0


@pytest.mark.parametrize("method", ["attention", "attention_relevance", "grad_eclip"])
def test_the_rim_that_no_patch_sees_gets_no_heat(method: str) -> None:
    torch.manual_seed(0)
    model = as_similarity_model(Tokens(Patches(8, 8)).eval())
    images = torch.randn(2, 3, 54, 70)
    pair = Comparison.pair(images[:1], images[1:])
    whole = explain(model, Comparison.pair(*(part[:1, :, :48, :64] for part in images.split(1))),
                    method, check=False)  # fmt: skip
    result = explain(model, pair, method, check=False).heatmaps
    assert result.shape[-2:] == (54, 70)
    assert result[..., :48, :64].amax() > 0
    assert result[..., 48:, :].eq(0).all()
    assert result[..., 64:].eq(0).all()
    torch.testing.assert_close(
        result[..., 4:44, 4:60], whole.heatmaps[..., 4:44, 4:60], rtol=1e-3, atol=2e-2
    )
