"""Which outputs are maps over the image, what everything passes, and where cells look."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from conftest import TinyNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from simexplain import Comparison, as_similarity_model, explain, match
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ModelError
from simexplain.losses.mining import SimilarityMiningLoss
from simexplain.models.avsl import AVSL
from simexplain.models.base import SimilarityModel
from simexplain.models.layers import Layer
from simexplain.tracing import trace

SIZE = (48, 64)
PATCH = 8
GRID = (6, 8)
WIDTH = 24


def wrapped(network: nn.Module, size: tuple[int, int] = SIZE) -> SimilarityModel:
    return as_similarity_model(network.eval(), preprocess=Preprocess(size=size))


def default(model: SimilarityModel, images: Tensor) -> Layer:
    (chosen,) = [layer for layer in model.layers_for(images) if layer.default]
    return chosen


def follows(model: SimilarityModel, layer: str, size: tuple[int, int]) -> int:
    """In how many of sixteen places a change of one cell's pixels changes that cell the most."""
    plain = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(3))
    grid = trace(model, plain, [layer]).maps[layer].detach()
    rows, columns = grid.shape[2:]
    hits = 0
    for number in range(16):
        row, column = (number // 4) * rows // 4, (number % 4) * columns // 4
        top, bottom = row * size[0] // rows, (row + 1) * size[0] // rows
        left, right = column * size[1] // columns, (column + 1) * size[1] // columns
        changed = plain.clone()
        changed[:, :, top:bottom, left:right] = 1 - changed[:, :, top:bottom, left:right]
        moved = trace(model, changed, [layer]).maps[layer].detach()
        change = (moved - grid).square().sum(dim=1)[0]
        hits += int(change.argmax()) == row * columns + column
    return hits


class Encoder(nn.Module):
    """Patches as tokens, with tokens before and after them, in either order of axes."""

    def __init__(
        self,
        *,
        first: bool = False,
        before: int = 0,
        after: int = 0,
        read: str = "mean",
        patch: int = PATCH,
        grid: tuple[int, int] = GRID,
        depth: int = 3,
    ) -> None:
        super().__init__()
        self.first, self.before, self.read = first, before, read
        self.cells = grid[0] * grid[1]
        self.patch = nn.Conv2d(3, WIDTH, patch, patch)
        self.extra = nn.Parameter(torch.randn(1, before + after, WIDTH))
        self.places = nn.Parameter(0.1 * torch.randn(1, self.cells, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 48, dropout=0, batch_first=not first, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2) + self.places
        extra = self.extra.expand(len(images), -1, -1)
        tokens = torch.cat((extra[:, : self.before], tokens, extra[:, self.before :]), dim=1)
        tokens = self.encoder(tokens.transpose(0, 1) if self.first else tokens)
        tokens = tokens.transpose(0, 1) if self.first else tokens
        if self.read == "class":
            return tokens[:, 0]
        return tokens[:, self.before : self.before + self.cells].mean(dim=1)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 0), (5, 0), (0, 1), (0, 4), (20, 0)])
def test_tokens_become_the_grid_of_the_patch_convolution(
    first: bool, before: int, after: int
) -> None:
    model = wrapped(Encoder(first=first, before=before, after=after))
    chosen = default(model, torch.zeros(1, 3, *SIZE))
    assert chosen.shape == (WIDTH, *GRID)
    assert chosen.name == "encoder"
    assert chosen.stride == (PATCH, PATCH)
    assert follows(model, chosen.name, SIZE) >= 15


def stays_behind(network: nn.Module, layer: str, images: Tensor, *, first: bool) -> float:
    """The share that bypasses a layer by hand: the first image with the second one's patches."""
    seen: list[Tensor] = []

    def exchange(module: nn.Module, args: object, output: Tensor) -> Tensor | None:
        tokens = output.transpose(0, 1) if first else output
        seen.append(tokens.clone())
        if len(seen) == 2:
            mixed = torch.cat((seen[1][:, :1], seen[0][:, 1:]), dim=1)
            return mixed.transpose(0, 1) if first else mixed
        return None

    with torch.no_grad():
        own = F.normalize(network(images[:1]), dim=1)
        handle = network.get_submodule(layer).register_forward_hook(exchange)
        other, mixed = (F.normalize(network(images[n : n + 1]), dim=1) for n in (1, 0))
        handle.remove()
    return float((mixed - other).norm() / (own - other).norm())


@pytest.mark.parametrize("first", [False, True])
def test_a_class_token_reads_the_input_of_the_last_block(first: bool) -> None:
    model = wrapped(Encoder(first=first, before=1, read="class"))
    images = torch.rand(2, 3, *SIZE)
    chosen = default(model, images)
    assert (chosen.name, chosen.shape) == ("encoder.layers.2.norm1", (WIDTH, *GRID))
    assert follows(model, chosen.name, SIZE) >= 15
    assert 0 < chosen.bypass <= 1  # on pictures of noise
    (caution,) = model.cautions([chosen.name], images)
    assert f"{chosen.bypass:.0%} of the embedding bypasses" in caution
    result = explain(model, Comparison.pair(images[:1], images[1:]))
    share = stays_behind(model.network, chosen.name, images, first=first)
    assert result.bypass[chosen.name] == pytest.approx(share, abs=2e-4)
    assert any(f"{share:.0%} of the embedding bypasses" in text for text in result.warnings)
    assert chosen.bypass == pytest.approx(share, abs=2e-4)  # from then on
    assert result.bypass == {chosen.name: round(chosen.bypass, 4)}


@pytest.mark.parametrize(
    ("size", "patch", "grid"), [((64, 64), 14, (4, 4)), ((80, 60), 14, (5, 4))]
)
def test_a_patch_that_does_not_divide_the_image(
    size: tuple[int, int], patch: int, grid: tuple[int, int]
) -> None:
    model = wrapped(Encoder(before=1, patch=patch, grid=grid), size)
    assert default(model, torch.zeros(1, 3, *size)).shape == (WIDTH, *grid)


class Queries(nn.Module):
    """Learned queries or cluster centres that look at the patches: as many as a square has."""

    def __init__(self, count: int, size: int = 64) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.norm = nn.LayerNorm(WIDTH)
        self.queries = nn.Parameter(torch.randn(1, count, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.after = nn.Linear(WIDTH, WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.norm(self.patch(images).flatten(2).transpose(1, 2))
        queries = self.queries.expand(len(images), -1, -1)
        result = self.after(queries + self.attention(queries, tokens, tokens)[0])
        return F.gelu(result).mean(dim=1)


@pytest.mark.parametrize("count", [4, 16, 36, 64, 65, 100])
@pytest.mark.parametrize("size", [64, 96])
def test_learned_queries_are_not_places(count: int, size: int) -> None:
    model = wrapped(Queries(count), (size, size))
    layers = model.layers_for(torch.zeros(1, 3, size, size))
    assert {layer.name for layer in layers} <= {"patch", "norm"}
    assert default(model, torch.zeros(1, 3, size, size)).name == "norm"


class Tables(nn.Module):
    """Attention by hand, each of whose parts is a module: tables, heads and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.heads, self.scores, self.weights = nn.Identity(), nn.Identity(), nn.Identity()
        self.bias, self.mixed = nn.Identity(), nn.Identity()
        self.table = nn.Parameter(torch.randn(1, 4, 64, 64))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        parts = self.qkv(tokens).unflatten(2, (3, 4, WIDTH // 4)).permute(2, 0, 3, 1, 4)
        query, key, value = (self.heads(part * 1) for part in parts)
        scores = self.scores(query @ key.transpose(2, 3)) + self.bias(self.table * 1)
        weights = self.weights(scores.softmax(dim=3))
        mixed = self.mixed((weights @ value).transpose(1, 2).flatten(2))
        return self.norm(tokens + mixed).mean(dim=1)


def test_tables_of_attention_are_no_maps() -> None:
    model = wrapped(Tables(), (64, 64))
    images = torch.rand(2, 3, 64, 64)
    names = {layer.name.partition("@")[0] for layer in model.layers_for(images)}
    assert names <= {"patch", "qkv", "norm", "mixed"}
    assert default(model, images).name == "norm"
    for layer in ("weights", "scores", "bias"):
        with pytest.raises(ModelError, match="not a map over an image"):
            explain(model, Comparison.pair(images[:1], images[1:]), layer=layer)


class Shuffled(Encoder):
    """Tokens in an order of their own, as in windows; the last layer puts them right again."""

    def __init__(self, *, right: bool) -> None:
        super().__init__()
        order = torch.randperm(self.cells, generator=torch.Generator().manual_seed(1))
        self.order = order
        self.back = order.argsort()
        self.right = right
        self.again = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2) + self.places
        tokens = self.encoder(tokens[:, self.order])
        return self.again(tokens[:, self.back] if self.right else tokens * 1).mean(dim=1)


@pytest.mark.parametrize("right", [True, False])
def test_tokens_out_of_order_lie_where_their_patches_are(right: bool) -> None:
    model = wrapped(Shuffled(right=right))
    names = [layer.name for layer in model.layers_for(torch.zeros(1, 3, *SIZE))]
    assert {"patch", "encoder", "encoder.layers.1", "again"} <= {*names}
    assert model.default_layer == "again"
    for layer in ("encoder.layers.1", "encoder", "again"):
        assert follows(model, layer, SIZE) >= 15, layer


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 7, PATCH, PATCH)
        self.mix = nn.Linear(7, 9)

    def forward(self, images: Tensor) -> Tensor:
        return self.mix(self.patch(images).permute(0, 2, 3, 1)).mean(dim=(1, 2))


def test_channels_last() -> None:
    chosen = default(wrapped(ChannelsLast()), torch.zeros(1, 3, *SIZE))
    assert (chosen.name, chosen.shape) == ("mix", (9, *GRID))


class Branches(nn.Module):
    """Two parallel ways of unlike weight out of one trunk."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.a, self.b = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.trunk(images)
        a, b = self.a(maps).mean(dim=(2, 3)), self.b(maps).mean(dim=(2, 3))
        return torch.cat((a, self.share * b), dim=1)


@pytest.mark.parametrize("share", [0.01, 1.0, 3.0])
def test_the_default_is_what_everything_passes(share: float) -> None:
    model = wrapped(Branches(share))
    images = torch.rand(2, 3, *SIZE)
    assert model.default_layer == "trunk"
    layers = {layer.name: layer for layer in model.layers_for(images)}
    assert layers["trunk"].bypass == layers["trunk.0"].bypass == 0
    a, b = layers["a"].bypass, layers["b"].bypass
    # The squared shares of both ways add up, but for the common length of unit vectors.
    assert a**2 + b**2 == pytest.approx(1, abs=0.25)
    assert (a < 0.05 and b > 0.95) if share == 0.01 else (a > 0.3)
    result = explain(model, Comparison.pair(images[:1], images[1:]), "decomposition", layer="b")
    b = layers["b"].bypass  # now of these images
    assert b > 0.1
    assert any(f"{b:.0%} of the embedding bypasses layer 'b'" in text for text in result.warnings)
    assert result.bypass["b"] == pytest.approx(b, abs=1e-4)
    assert any("bypasses" in text for text in match(model, images[0], images[1], "b").warnings)
    clean = explain(model, Comparison.pair(images[:1], images[1:]), "decomposition")
    assert not any("bypasses" in text for text in clean.warnings)
    assert clean.bypass == {"trunk": 0.0}


class Cut(nn.Module):
    """A layer that sees a part of the picture."""

    def __init__(self, part: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.part = part
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.part_of = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        return self.part_of(self.part(self.trunk(images))).amax(dim=(2, 3))


@pytest.mark.parametrize(
    ("part", "region"),
    [
        (lambda maps: maps[:, :, 12:], (0.25, 0, 1, 1)),
        (lambda maps: maps[:, :, :, 16:], (0, 0.25, 1, 1)),
        (lambda maps: maps[:, :, :36], (0, 0, 0.75, 1)),
        (lambda maps: maps[..., -32:], (0, 0.5, 1, 1)),
        (lambda maps: maps.narrow(2, 6, 36), (0.125, 0, 0.875, 1)),
        (lambda maps: maps.chunk(2, dim=3)[1], (0, 0.5, 1, 1)),
        (lambda maps: maps.split((12, 36), dim=2)[1], (0.25, 0, 1, 1)),
        (lambda maps: F.max_pool2d(maps[:, :, 12:], 2), (0.25, 0, 1, 1)),
        (lambda maps: maps, (0, 0, 1, 1)),
    ],
)
def test_a_part_is_drawn_where_it_lies(part, region) -> None:
    model = wrapped(Cut(part))
    images = torch.zeros(2, 3, *SIZE)
    images[:, :, 30:33, 45:48] = torch.rand(3, 1, 1) + 1  # row 31, column 46 of every part
    chosen = default(model, images)
    assert (chosen.name, chosen.region) == ("part_of", pytest.approx(region))
    result = explain(model, Comparison.pair(images[:1], images[1:] * 0.9), "sam", cam="layer_cam")
    for peak in result.peaks():
        assert peak is not None
        assert abs(peak[0] - 46.5) <= 3.5
        assert abs(peak[1] - 31.5) <= 3.5


def test_what_a_layer_does_not_see_is_drawn_empty_and_saved(tmp_path) -> None:
    model = wrapped(Cut(lambda maps: maps[:, :, 12:]))
    images = torch.rand(2, 3, *SIZE)
    result = explain(model, Comparison.pair(images[:1], images[1:]))
    assert not result.heatmaps[..., :12, :].any()
    assert result.heatmaps[..., 12:, :].any()
    result.save(tmp_path)
    again = type(result).load(tmp_path)
    assert again.region == result.region == (0.25, 0, 1, 1)
    assert torch.equal(again.heatmaps, result.heatmaps)
    assert again.bypass == result.bypass


def test_convolutions_without_padding_are_drawn_where_they_look() -> None:
    """Three valid convolutions of 5x5 with dilation 3: the cells lie 18 pixels inside."""
    layers = [nn.Conv2d(3, 8, 5, dilation=3), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(8, 8, 5, dilation=3), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    chosen = default(wrapped(network), torch.zeros(1, 3, *SIZE))
    assert chosen.shape == (8, 12, 28)
    assert chosen.region == pytest.approx((18 / 48, 18 / 64, 30 / 48, 46 / 64), abs=1e-3)
    assert chosen.stride == pytest.approx((1, 1), abs=1e-2)


class Valid(nn.Module):
    """A residual block whose strided convolution is not padded: 3x3 inside of 4x4 and 2x2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(width, width, 3, 2)
        self.grow = nn.Conv2d(width, width, 2, 1, padding=1)
        self.skip = nn.Conv2d(width, width, 1, 2)

    def forward(self, maps: Tensor) -> Tensor:
        inner = F.relu(self.grow(F.relu(self.down(maps))))
        skip = self.skip(maps)
        return F.relu(inner[:, :, : skip.shape[2], : skip.shape[3]] + skip)


def test_stages_are_ends_of_blocks() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), Valid(8), Valid(8), Valid(8), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )  # fmt: skip
    model = wrapped(network, (64, 64))
    assert model.stages == ("0", "1", "2", "3")
    shapes = [layer.shape[1:] for layer in model.layers if layer.stage]
    assert shapes == [(32, 32), (16, 16), (8, 8), (4, 4)]


class PoolBlock(nn.Module):
    """A block that mixes by pooling and has it in its name, as in PoolFormer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, 1)
        self.mlp = nn.Conv2d(width, width, 1)

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.mlp(self.pool(maps) - maps)


def test_a_name_with_pool_in_it_is_a_name() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), PoolBlock(8), nn.Conv2d(8, 8, 2, 2), PoolBlock(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    model = wrapped(network)
    assert model.default_layer == "3"
    assert model.stages == ("1", "3")


def test_a_pyramid_at_its_real_depth() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=224, embed_dim=8, depths=[2, 2, 6, 2], num_heads=[1, 1, 2, 4]
    )

    model = as_similarity_model(transformers.SwinModel(config).eval(), output="pooler_output")
    layers = model.layers
    assert [layer.shape[1:] for layer in layers if layer.stage] == [
        (56, 56), (28, 28), (14, 14), (7, 7),
    ]  # fmt: skip
    assert next(layer for layer in layers if layer.default).name == "layernorm"


def test_a_class_token_transformer_is_that_of_timm() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        image_size=32, patch_size=8,
    )  # fmt: skip
    network = transformers.ViTModel(config, add_pooling_layer=False).eval()
    model = as_similarity_model(network, output=lambda out: out.last_hidden_state[:, 0])
    assert model.preprocess.size == (32, 32)
    assert model.default_layer.endswith("2.layernorm_before")
    assert default(model, model.example()).shape == (WIDTH, 4, 4)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_channels_come_from_the_network(channels: int) -> None:
    network = TinyNet()
    network.stem = nn.Conv2d(channels, 8, 3, stride=2, padding=1)
    model = as_similarity_model(network.eval())
    assert model.default_layer == "last"
    images = torch.rand(3, channels, 24, 32)
    result = explain(model, Comparison.pair(images[:1], images[1:2]), "focus")
    assert result.maps.isfinite().all()


def small_resnet() -> nn.Module:
    return timm.create_model("resnet18", num_classes=8).eval()


def small_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    network = VisionTransformer(32, 8, 3, 2, 16, 32)
    network.heads = nn.Identity()
    return network.eval()


@pytest.mark.parametrize("build", [small_resnet, small_vit])
def test_every_choice_is_made_for_the_images_at_hand(build: Callable[[], nn.Module]) -> None:
    images = torch.rand(4, 3, 32, 32)
    pair = Comparison.pair(images[:1], images[1:2])
    triplet = Comparison.triplet(images[:1], images[1:2], images[2:3])
    for method in ("sam", "focus", "decomposition"):
        result = explain(build(), pair, method)
        assert all(maps.shape[2:].numel() > 1 for maps in result.layer_maps.values())
    assert len(match(build(), images[0], images[1])) == 1
    model = as_similarity_model(build(), preprocess=Preprocess(size=(32, 32)))
    assert SimilarityMiningLoss().on(build(), triplet).isfinite()
    assert AVSL(model, nodes=4).embed(images).isfinite().all()
    larger = as_similarity_model(build(), preprocess=Preprocess(size=(64, 64)))
    if build is small_resnet:
        levels = AVSL(larger, nodes=4, size=(32, 32)).levels
        assert levels == AVSL(model, nodes=4).levels != AVSL(larger, nodes=4).levels
    assert as_similarity_model(small_vit()).default_layer == "encoder.layers.encoder_layer_2.ln_1"


class Heads(nn.Module):
    """A trunk that runs in some way without gradients."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        if self.how == "attribute":
            return self.missing(images)
        if self.how == "rounding":
            return (1000 * self.head(self.trunk(images).mean(dim=(2, 3)))).round()
        if self.how == "detach":
            return self.head(self.trunk(images).detach().mean(dim=(2, 3)))
        with torch.no_grad() if self.how == "no_grad" else torch.inference_mode():
            maps = self.trunk(images).mean(dim=(2, 3))
        return self.head(maps.clone())


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("no_grad", r"layer 'trunk.0' runs under torch.no_grad\(\)"),
        ("inference", r"layer 'trunk.0' runs under torch.inference_mode\(\)"),
        ("detach", "the embedding is detached from trunk"),
        ("rounding", "it is zero at every layer, as behind rounding"),
        ("attribute", "AttributeError: .*missing"),
    ],
)
def test_why_there_is_no_layer(how: str, reason: str) -> None:
    model = as_similarity_model(Heads(how).eval())
    for ask in (lambda: model.layers, lambda: model.default_layer, lambda: model.stages):
        with pytest.raises(ModelError, match=reason) as caught:
            ask()
        assert str(caught.value).endswith(".")
        assert "\n" not in str(caught.value)


class Failing(nn.Module):
    """Raises in one of its calls."""

    def __init__(self, at: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU())
        self.mix = nn.Linear(8, 8)
        self.calls, self.at = 0, at

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise ValueError("no luck")
        tokens = self.trunk(images).flatten(2).transpose(1, 2)
        return self.mix((tokens @ tokens.transpose(1, 2)).softmax(2) @ tokens).mean(dim=1)


@pytest.mark.parametrize("layer", [None, "trunk"])
@pytest.mark.parametrize("at", range(1, 6))
def test_a_network_that_fails_in_a_call_is_never_explained_silently(
    at: int, layer: str | None
) -> None:
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    try:
        result = explain(wrapped(Failing(at)), Comparison.pair(images[:1], images[1:]), layer=layer)
        lines = result.warnings
    except ModelError as error:
        lines = (str(error),)
    assert any("no luck" in text for text in lines)


class Overwriting(nn.Module):
    """Overwrites what autograd needs."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 8, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.trunk(images)
        kept = maps.sigmoid()
        kept.mul_(2)
        return (kept * maps).mean((2, 3))


def test_a_network_that_autograd_cannot_go_through_says_so() -> None:
    with pytest.raises(ModelError, match=r"no gradients at its layers .*inplace"):
        _ = wrapped(Overwriting()).default_layer


class Poor(nn.Module):
    """Embeddings in which nothing can be explained."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU())
        self.head = nn.Linear(8, 1 if how == "single" else 6)
        self.how = how

    def forward(self, images: Tensor) -> Tensor:
        result = self.head(self.trunk(images).mean((2, 3)))
        kinds = {
            "single": result,
            "zero": result * 0,
            "constant": result * 0 + torch.arange(result.shape[1]),
            "ignoring": self.head.bias.expand(len(images), -1),
            "dead": self.head((self.trunk(images) - 1000).relu().mean((2, 3))),
        }
        return kinds[self.how]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("single", "is a single number"),
        ("zero", "is the zero vector"),
        ("constant", "is the same for every image"),
        ("ignoring", "is the same for every image"),
        ("dead", "is the same for every image"),
    ],
)
def test_embeddings_with_nothing_to_explain_are_refused_by_name(how: str, reason: str) -> None:
    images = torch.rand(2, 3, *SIZE)
    with pytest.raises(ModelError, match=reason):
        explain(wrapped(Poor(how)), Comparison.pair(images[:1], images[1:]))
    if how == "single":
        for method in ("saliency", "occlusion"):
            with pytest.raises(ModelError, match=reason):
                explain(wrapped(Poor(how)), Comparison.pair(images[:1], images[1:]), method)


def test_a_quantised_network_says_so() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    fixed = torch.ao.quantization.quantize_dynamic(network.eval(), {nn.Linear})
    with pytest.raises(ModelError, match="quantised"):
        _ = wrapped(fixed).default_layer


def test_only_early_layers_that_everything_passes() -> None:
    def way() -> nn.Module:
        blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(6)]
        return nn.Sequential(*blocks)

    class Ways(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = nn.Conv2d(3, 8, 3, 2, 1), way(), way()

        def forward(self, images: Tensor) -> Tensor:
            maps = self.stem(images)
            return torch.cat((self.one(maps).mean((2, 3)), self.two(maps).amax((2, 3))), dim=1)

    model = wrapped(Ways())
    images = torch.rand(2, 3, *SIZE)
    assert model.default_layer == "stem"
    result = explain(model, Comparison.pair(images[:1], images[1:]))
    assert any("after 1 of 25 operations" in text for text in result.warnings)


class Convolutions(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *[nn.Conv2d(3 if n == 0 else 16, 16, 3, 2 if n < 3 else 1, 1) for n in range(6)]
        )

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).mean(dim=(2, 3))


PASSES = {
    "class token": (lambda: Encoder(before=1, read="class", depth=12), [1, 3]),
    "tokens first": (lambda: Encoder(before=1, read="class", depth=12, first=True), [1, 3]),
    "mean of tokens": (lambda: Encoder(depth=12), [1, 3]),
    "convolutions": (Convolutions, [1]),
}
"""Networks, and how many images the passes of a survey have."""


@pytest.fixture
def countable() -> Iterator[None]:
    """Without torch's fast path for encoders, whose operations are not counted."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.usefixtures("countable")
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("method", ["sam", None])
def test_the_survey_costs_three_forward_passes_and_is_remembered(
    name: str, method: str | None
) -> None:
    """Four images and one backward pass; what bypasses a layer takes no pass, but runs what follows
    it once more."""
    build, passes = PASSES[name]
    network, seen = build().eval(), list[int]()
    network.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    images = torch.rand(2, 3, *SIZE)
    pair = Comparison.pair(images[:1], images[1:])
    plain = operations(lambda: network(images))
    model = wrapped(network)
    seen.clear()
    survey = operations(lambda: model.layers_for(images))
    assert seen == passes
    assert sum(seen) <= 3 * len(images)
    seen.clear()
    first = operations(lambda: explain(model, pair, method, check=False))
    assert seen == [1, 1]
    again = operations(lambda: explain(model, pair, method, check=False))
    assert seen == [1, 1] * 2
    assert survey <= 3.0 * plain  # the backward pass of one image with it
    if method is None:  # focus has several layers
        assert first - again <= 0.5 * plain
    else:
        assert first - again <= 0.1 * plain
        assert survey + first - again <= 3.0 * plain
        assert again <= 1.05 * plain


def operations(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counted:
        run()
    return int(counted.get_total_flops())


def test_the_survey_leaves_the_model_as_it_was() -> None:
    network = Encoder(before=1, read="class").train()
    before = [parameter.clone() for parameter in network.parameters()]
    state = torch.get_rng_state()
    model = as_similarity_model(network)
    _ = [layer.bypass for layer in model.layers_for(torch.zeros(1, 3, *SIZE))]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in network.modules())
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert not any(module._forward_hooks for module in network.modules())
