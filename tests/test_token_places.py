"""Where the cells of a map are in a sequence, and what is taken where no layer has all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from simexplain import Comparison, as_similarity_model, explain
from simexplain.data.preprocessing import Preprocess
from simexplain.models.base import SimilarityModel
from simexplain.models.orders import orders_of, tokens_of
from simexplain.tracing import trace

SIZE = (64, 64)
GRID = (8, 8)
WIDTH = 24


def wrapped(network: nn.Module, size: tuple[int, int] = SIZE) -> SimilarityModel:
    torch.manual_seed(0)
    return as_similarity_model(network.eval(), preprocess=Preprocess(size=size))


def pair(size: tuple[int, int] = SIZE) -> Comparison:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    return Comparison.pair(images[:1], images[1:])


def unrolled(cells: Tensor) -> Tensor:
    """Tokens ``(M,8,8,C)`` as Hiera has them before two poolings: each pools a leading axis."""
    m, _, _, c = cells.shape
    cut = cells.view(m, 2, 2, 2, 2, 2, 2, c)  # coarse to fine, rows and columns
    return cut.permute(0, 3, 6, 2, 5, 1, 4, 7).reshape(m, 64, c)


def windows(cells: Tensor) -> Tensor:
    cut = cells.view(len(cells), 2, 4, 2, 4, -1).permute(0, 1, 3, 2, 4, 5)
    return cut.reshape(len(cells), 64, -1)


def columns(cells: Tensor) -> Tensor:
    return cells.transpose(1, 2).reshape(len(cells), 64, -1)


def halves(cells: Tensor) -> Tensor:
    tokens = cells.reshape(len(cells), 64, -1)
    return torch.cat((tokens[:, :32], 0 * tokens[:, :3] + 1, tokens[:, 32:]), dim=1)


class Ordered(nn.Module):
    """Patches in an order of their own, with a layer for every token."""

    def __init__(self, order: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 8, 8)
        self.mix = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.order = order

    def forward(self, images: Tensor) -> Tensor:
        return self.mix(self.order(self.patch(images).permute(0, 2, 3, 1))).mean(dim=1)


@pytest.mark.parametrize("order", [unrolled, windows, columns, halves])
def test_tokens_in_any_usual_order_lie_where_their_patches_are(
    order: Callable[[Tensor], Tensor],
) -> None:
    network = Ordered(order)
    model, images = wrapped(network), pair().stacked()[0]
    assert model.default_for(images) == "mix"
    actual = trace(model, images, ["mix"]).maps["mix"]
    with torch.no_grad():
        right = network.mix(network.patch(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.allclose(actual, right, atol=1e-6)
    # The gradient goes back to the same places: by hand, one for every token.
    result = explain(model, pair(), "decomposition")
    assert result.bypass["mix"] == (pytest.approx(0, abs=0.1) if order is halves else 0)


@pytest.mark.parametrize("grid", [(8, 8), (4, 6), (7, 7), (1, 4), (16, 8)])
def test_orders_are_permutations_and_differ(grid: tuple[int, int]) -> None:
    cells = grid[0] * grid[1]
    orders = list(orders_of(grid))
    result = {tokens_of(cells, order=order) for order in orders}
    assert all(sorted(numbers) == list(range(cells)) for numbers in result)
    assert len(result) == len(orders) or min(grid) < 3
    assert tokens_of(4, prefix=2, split=1) == (0, 3, 4, 5)


class Attending(nn.Module):
    """Attention that makes a coarser grid, the only way there: near alone, or all alike."""

    def __init__(self, *, near: bool) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 8, 8)
        ends = [torch.linspace(0, 7, sides) for sides in (4, 8)]
        coarse, fine = (torch.cartesian_prod(end, end) for end in ends)
        self.register_buffer("bias", -3 * torch.cdist(coarse, fine) * near)
        self.mix = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        return self.mix(self.bias.softmax(1) @ tokens).mean(dim=1)


def test_tokens_that_follow_no_place_are_mentioned() -> None:
    result = explain(wrapped(Attending(near=True)), pair())
    assert result.layers == ("mix",)
    assert not any("follow" in text for text in result.warnings)
    result = explain(wrapped(Attending(near=False)), pair())
    assert result.layers == ("patch",)
    assert any("'mix'" in text and "grid of 4x4" in text for text in result.warnings)


class Prepared(nn.Module):
    """Normalises pictures in a layer, from where two ways go."""

    def __init__(self) -> None:
        super().__init__()
        self.prepare = nn.BatchNorm2d(3)
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        images = self.prepare(images)
        return (self.a(images) + self.b(images)).mean(dim=(2, 3))


def test_the_picture_itself_is_no_default() -> None:
    model = wrapped(Prepared())
    result = explain(model, pair())
    assert result.layers[0] in ("a", "b", "a.1", "b.1")
    assert any("of the embedding bypasses" in text for text in result.warnings)
    assert "prepare" in {layer.name for layer in model.layers}


class Flipped(nn.Module):
    """An image and its mirror image through one network: no map is passed by everything."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.one(images).mean((2, 3)) + self.one(images.flip(3)).mean((2, 3))


def test_where_nothing_is_passed_by_everything_the_default_is_the_only_stage() -> None:
    model = wrapped(Flipped())
    images = pair().stacked()[0]
    assert model.stages_for(images) == (model.default_for(images),)
    result = explain(model, pair(), "focus")
    assert result.maps.isfinite().all()
    assert any("of the embedding bypasses" in text for text in result.warnings)


class Summing(nn.Module):
    """Residual sums that no layer returns or is called with alone, and few layers in all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.ways = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(5))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        for way in self.ways:
            before = maps.view(maps.shape)
            maps = (before + way(maps)).relu()
        return maps.mean((2, 3))


def test_an_early_default_is_mentioned_in_a_small_network_too() -> None:
    result = explain(wrapped(Summing()), pair())
    assert result.layers == ("stem",)
    assert any("after 1 of 6 operations" in text for text in result.warnings)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *(
        nn.Linear(8, 8) for _ in range(5)
    ))  # fmt: skip
    assert not any("operations" in text for text in explain(wrapped(plain), pair()).warnings)


class Half(nn.Module):
    """Reads the right half of its map alone."""

    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Conv2d(3, 8, 4, 4)
        self.d = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        return self.d(self.t(images)[..., 8:]).mean((2, 3))


def test_a_plain_module_with_a_named_layer_is_drawn_where_that_looks() -> None:
    torch.manual_seed(0)
    network = Half().eval()
    plain = explain(network, pair(), layer="d")
    assert plain.region == explain(wrapped(network), pair(), layer="d").region
    assert plain.region[1] == pytest.approx(0.5, abs=0.05)
    assert float(plain.heatmaps[0][:, :, :30].max()) == 0
