"""Networks whose forward does more than call layers: half precision, chance, choices, sums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain import (
    Comparison,
    as_similarity_model,
    explain,
    load_model,
    match,
    save_model,
)
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ModelError
from simexplain.models.base import SimilarityModel

SIZE = (32, 48)
WIDTH = 12


class Trunk(nn.Module):
    """Two halvings and a linear layer; what happens to the last map is a test's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, WIDTH, 4, 4), nn.Conv2d(WIDTH, WIDTH, 2, 2)
        self.head = nn.Linear(WIDTH, 8)

    def maps(self, images: Tensor) -> Tensor:
        return self.last(self.first(images).tanh()).tanh()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.maps(images).mean((2, 3)))


def wrapped(network: nn.Module) -> SimilarityModel:
    return as_similarity_model(network.eval(), preprocess=Preprocess(size=SIZE))


@pytest.fixture
def pair() -> Comparison:
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    return Comparison.pair(images[:1], images[1:])


class Half(Trunk):
    """Enters autocast by itself."""

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(images).float()


def test_a_network_under_autocast_is_explained_exactly(pair: Comparison) -> None:
    torch.manual_seed(0)
    model = wrapped(Half())
    parts = explain(model, pair, method="decomposition", check=False)
    plain = wrapped(Trunk())
    plain.network.load_state_dict(model.network.state_dict())
    right = explain(plain, pair, method="decomposition", check=False)
    close = 0.06 * float(right.maps.abs().max())  # what bfloat16 rounds
    assert torch.allclose(parts.maps, right.maps, atol=close, rtol=0)
    images = pair.stacked()[0]
    result = match(model, images[:1], images[1:])
    assert float(result.residual.abs().max()) < 0.03 * float(result.score)


def test_a_program_under_autocast_is_refused_when_saved(tmp_path: Path, pair: Comparison) -> None:
    with pytest.raises(ModelError, match=r"enters torch\.autocast"):
        save_model(wrapped(Half()), tmp_path / "half.pt2")
    assert not list(tmp_path.iterdir())
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(
        Half().eval(), (torch.rand(2, 3, *SIZE),), dynamic_shapes=({0: batch},)
    )
    torch.export.save(program, tmp_path / "theirs.pt2")
    model = load_model(tmp_path / "theirs.pt2")
    assert any("torch.autocast" in note for note in model.preprocess.notes)
    assert explain(model, pair, method="saliency", check=False).maps.any()


class Dropping(Trunk):
    """The usual slip: a function for dropout takes it that it is trained."""

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.dropout(self.maps(images).mean((2, 3))))


class Noisy(Trunk):
    def forward(self, images: Tensor) -> Tensor:
        maps = self.maps(images)
        return self.head((maps + torch.randn_like(maps)).mean((2, 3)))


class Unused(Trunk):
    """Draws numbers that change nothing."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images + 0 * torch.rand(1))


@pytest.mark.parametrize("build", [Dropping, Noisy])
def test_a_network_that_draws_random_numbers_is_mentioned(
    build: type[Trunk], pair: Comparison
) -> None:
    model = wrapped(build())
    before = torch.get_rng_state()
    result = explain(model, pair, check=False)
    assert any("draws random numbers" in text for text in result.warnings)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("build", [Trunk, Unused])
def test_chance_without_effect_is_not_mentioned(build: type[Trunk], pair: Comparison) -> None:
    result = explain(wrapped(build()), pair, check=False)
    assert not any("random numbers" in text for text in result.warnings)


class Choosing(Trunk):
    """Keeps the cells above a threshold, and a layer for each of so many."""

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.maps(images).flatten(2).transpose(1, 2)
        rows = []
        for image in tokens:
            kept = image[image.mean(1) > image.mean()]
            rows.append(kept.reshape(len(kept), WIDTH).tanh().mean(0))
        return self.head(torch.stack(rows))


def test_a_tail_that_cannot_be_run_on_other_numbers_says_so(pair: Comparison) -> None:
    torch.manual_seed(0)
    model = wrapped(Choosing())
    result = explain(model, pair, layer="last", check=False)
    assert result.maps.any()
    with pytest.raises(ModelError, match="cannot be run again on others"):
        explain(model, pair, method="decomposition", layer="last", check=False, steps=4)


class Sums(nn.Module):
    """Residual sums that no layer returns, without a norm at the end.

    Args:
        add: How a block's output is added.
        pool: Whether a module pools, or a method of the tensor.
    """

    def __init__(self, add: Callable[[Tensor, nn.Module], Tensor], *, pool: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 8, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.Tanh()) for _ in range(3)
        )
        self.pool = nn.AdaptiveAvgPool2d(1) if pool else None
        self.head = nn.Linear(WIDTH, 8)
        self.add = add

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        for block in self.blocks:
            maps = self.add(maps, block)
        return self.finish(maps)

    def finish(self, maps: Tensor) -> Tensor:
        return self.head(maps.mean((2, 3)) if self.pool is None else self.pool(maps).flatten(1))


def added(maps: Tensor, block: nn.Module) -> Tensor:
    return maps + block(maps)


def added_in_place(maps: Tensor, block: nn.Module) -> Tensor:
    change = block(maps.clone())
    maps += change
    return maps


def scaled(maps: Tensor, block: nn.Module) -> Tensor:
    return torch.lerp(maps, block(maps), 0.7)


def viewed(maps: Tensor, block: nn.Module) -> Tensor:
    before = maps.view(maps.shape)
    return before + block(maps)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("add", [added, scaled])
def test_a_sum_that_no_layer_returns_is_the_last_map(
    add: Callable[[Tensor, nn.Module], Tensor], pool: bool, pair: Comparison
) -> None:
    torch.manual_seed(0)
    network = Sums(add, pool=pool)
    model = wrapped(network)
    result = explain(model, pair, method="sam", check=False)
    name = "pool:input" if pool else "blocks.2:input"
    assert result.layers == (name,)
    assert result.bypass == {name: 0.0}
    for index, image in enumerate(pair.stacked()[0]):
        maps = network.stem(image[None])
        for block in network.blocks[: 3 if pool else 2]:
            maps = add(maps, block)
        last = maps.detach().requires_grad_()
        row = F.normalize(network.finish(last if pool else add(last, network.blocks[2])), dim=1)
        (slopes,) = torch.autograd.grad((row @ result.weights[0]).sum(), last)
        right = (last * slopes.mean((2, 3), keepdim=True)).sum(1).clamp_min(0)[0]
        assert torch.allclose(result.maps[0, index], right.detach(), atol=1e-6)


def test_every_method_takes_the_input_of_a_layer(tmp_path: Path, pair: Comparison) -> None:
    torch.manual_seed(0)
    model = wrapped(Sums(added, pool=True))
    parts = explain(model, pair, method="decomposition", check=False)
    assert torch.allclose(parts.maps.sum((2, 3)) + 0, parts.scores, atol=1e-5)
    images = pair.stacked()[0]
    assert float(match(model, images[:1], images[1:]).residual.abs().max()) < 1e-5
    both = explain(model, pair)
    assert both.rows[0].layers == ("pool:input",)
    save_model(model, tmp_path / "sums.pt2")
    again = load_model(tmp_path / "sums.pt2")
    assert again.default_layer == "pool:input"
    assert torch.allclose(explain(again, pair, check=False).maps, both.maps, atol=1e-5)
    assert not model.network.pool._forward_pre_hooks


def test_a_view_made_before_is_not_passed_by(pair: Comparison) -> None:
    """The input of the block is not all that goes on, whatever the graph says of its numbers."""
    model = wrapped(Sums(viewed, pool=False))
    assert model.default_layer == "stem"
    pooled = wrapped(Sums(viewed, pool=True))
    assert pooled.default_layer == "pool:input"


class Computed(nn.Module):
    """Two layers on a stem; what its forward makes of them is a test's own."""

    def __init__(self, finish: Callable[[Tensor, Tensor, Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 4, 4)
        self.one, self.two = (nn.Conv2d(WIDTH, WIDTH, 3, 1, 1) for _ in range(2))
        self.head, self.finish = nn.Linear(width, 8), finish

    def forward(self, images: Tensor) -> Tensor:
        stem = self.stem(images).tanh()
        return self.head(self.finish(stem, self.one(stem), self.two(stem)))


def pooled(maps: Tensor) -> Tensor:
    return maps.mean((2, 3))


def twice(maps: Tensor) -> Tensor:
    return torch.cat([pooled(maps), maps.std((2, 3))], dim=1)


NOT_LAST: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], int]] = {
    "sum": (lambda _, a, b: pooled(a + b), 1),
    "joined": (lambda _, a, b: torch.cat([a, b], 1).mean((2, 3)), 2),
    "product": (lambda _, a, b: (a * b.sigmoid()).flatten(2).sum(-1), 1),
    "residual": (lambda s, a, _: F.adaptive_avg_pool2d(a + s, 1).flatten(1), 1),
    "einsum": (lambda _, a, b: torch.einsum("nchw->nc", a + b), 1),
    "two poolings": (lambda _, a, b: twice(a + b), 2),
    "powers": (lambda s, a, _: pooled((a + s).clamp_min(1e-3) ** 3) ** (1 / 3), 1),
}
"""What forward makes a last map of that no layer gives."""
LAST: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], int]] = {
    "plain": (lambda _s, a, _b: a.flatten(2).sum(-1), 1),
    "activation": (lambda _s, a, _b: pooled(a * a.sigmoid()), 1),
    "normalised": (lambda _s, a, _b: pooled(F.normalize(a, dim=1)), 1),
    "two poolings": (lambda _s, a, _b: twice(a), 2),
}
"""What it makes of the last layer alone."""
PASSED = "computed in the network's forward, and no layer gives it"


@pytest.mark.parametrize("name", NOT_LAST)
def test_a_map_that_forward_computes_is_mentioned(name: str, pair: Comparison) -> None:
    finish, times = NOT_LAST[name]
    network = Computed(finish, times * WIDTH)
    model = wrapped(network)
    result = explain(model, pair, check=False)
    assert result.layers == ("stem",)
    assert sum(PASSED in line for line in result.warnings) == 1
    named = explain(model, pair, layer="one", check=False)
    assert not any(PASSED in line for line in named.warnings)

    def handed(stem: Tensor, one: Tensor, two: Tensor) -> Tensor:
        return pooled(last(one + two))

    last = nn.Identity()
    advised = Computed(handed, WIDTH)
    advised.last = last
    result = explain(wrapped(advised), pair, check=False)
    assert result.layers == ("last",)
    assert not any(PASSED in line for line in result.warnings)


@pytest.mark.parametrize("name", LAST)
def test_what_forward_makes_of_the_last_layer_alone_is_not(name: str, pair: Comparison) -> None:
    finish, times = LAST[name]
    result = explain(wrapped(Computed(finish, times * WIDTH)), pair, check=False)
    assert result.layers == ("one",)
    assert not any(PASSED in line for line in result.warnings)


class Summing(nn.Module):
    """A layer of which every position depends on all earlier ones, then a convolution.

    Args:
        along: What it does to maps ``(M,C,h,w)``.
    """

    def __init__(self, along: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.along = nn.Conv2d(3, WIDTH, 4, 4), along
        self.mix, self.later = nn.Identity(), nn.Conv2d(WIDTH, WIDTH, 1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(WIDTH, 8)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.mix(self.along(self.first(images).tanh()))
        return self.head(self.pool(self.later(maps).tanh()).flatten(1))


def from_the_end(maps: Tensor) -> Tensor:
    return maps.flip(2).cumsum(2).flip(2)


def scanned(maps: Tensor) -> Tensor:
    return maps.flatten(2).cumsum(2).view(maps.shape)


def recurrent(maps: Tensor) -> Tensor:
    rows = [maps[..., 0]]
    for column in range(1, maps.shape[3]):
        rows.append(0.95 * rows[-1] + maps[..., column])
    return torch.stack(rows, dim=3)


EARLIER: dict[str, Callable[[Tensor], Tensor]] = {
    "columns": lambda maps: maps.cumsum(3),
    "rows": lambda maps: maps.cumsum(2),
    "from the end": from_the_end,
    "raster": scanned,
    "both": lambda maps: maps.cumsum(2).cumsum(3),
    "largest": lambda maps: maps.cummax(3).values,
    "logarithms": lambda maps: maps.logcumsumexp(2),
    "a product": lambda maps: maps @ torch.ones(maps.shape[3], maps.shape[3]).triu(),
    "sorted": lambda maps: maps.sort(3).values,
    "spectrum": lambda maps: torch.fft.fft2(maps).real,
}


@pytest.mark.parametrize("name", EARLIER)
def test_positions_that_depend_on_all_earlier_ones_are_no_map(name: str, pair: Comparison) -> None:
    result = explain(wrapped(Summing(EARLIER[name])), pair, method="sam", check=False)
    assert result.layers == ("first",)
    assert any("do not follow the parts of an image" in line for line in result.warnings)


class Chained(Trunk):
    """What pools is called with a function of what the last layer returns."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool1d(1)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.last(self.first(images)).relu().flatten(2)
        return self.head(self.pool(tokens)[..., 0])


def test_what_is_made_of_the_last_layer_alone_is_no_other_map() -> None:
    assert wrapped(Chained()).default_layer == "last"


def test_a_sum_whose_class_token_is_read_is_taken_where_its_patches_count() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, WIDTH, 8, 8)
            self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
            self.mixes = nn.ModuleList(
                nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in "abc") for _ in "ab"
            )
            self.mlps = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in "ab")

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.patch(images).flatten(2).transpose(1, 2)
            tokens = torch.cat((self.token.expand(len(images), -1, -1), tokens), dim=1)
            for (first, second, third), mlp in zip(self.mixes, self.mlps, strict=True):
                one, two = first(tokens), second(tokens)
                tokens = tokens + F.scaled_dot_product_attention(one, two, third(tokens))
                tokens = tokens + mlp(tokens).tanh()
            return tokens[:, 0]

    torch.manual_seed(0)
    model = wrapped(Reading())
    assert model.default_layer == "mixes.1.0:input"
    assert next(layer for layer in model.layers if layer.default).shape == (WIDTH, 4, 6)


class Looking(nn.Module):
    """A spatial transformer as it is made: its first look is the same for every image."""

    def __init__(self) -> None:
        super().__init__()
        self.where = nn.Sequential(
            nn.Conv2d(3, WIDTH, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 6)
        )
        nn.init.zeros_(self.where[-1].weight)
        self.where[-1].bias.data = torch.tensor([0.6, 0, 0.3, 0, 0.6, -0.3])
        self.trunk = Trunk()

    def forward(self, images: Tensor) -> Tensor:
        grid = F.affine_grid(self.where(images).view(-1, 2, 3), images.shape, align_corners=False)
        return self.trunk(F.grid_sample(images, grid, align_corners=False))


def test_gradients_that_are_zero_on_a_side_way_are_not_the_reason(pair: Comparison) -> None:
    with pytest.raises(ModelError, match="no layer with a map") as error:
        explain(wrapped(Looking()), pair)
    assert "zero at every layer" not in str(error.value)


class Covariances(Trunk):
    """Second-order pooling: nothing changes where a constant is added to a channel."""

    def forward(self, images: Tensor) -> Tensor:
        flat = self.last(self.first(images).tanh()).flatten(2)
        flat = flat - flat.mean(2, keepdim=True)
        return (flat @ flat.mT).flatten(1)


def test_gradients_that_cancel_out_leave_no_rounding_to_be_drawn(pair: Comparison) -> None:
    torch.manual_seed(0)
    model = wrapped(Covariances())
    result = explain(model, pair, method="sam", check=False)
    assert not result.maps.any()
    assert any("is empty" in text for text in result.warnings)
    by_place = explain(model, pair, method="sam", cam="hires_cam", check=False)
    assert float(by_place.maps.max()) > 1e-4
