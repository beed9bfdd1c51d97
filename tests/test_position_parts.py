"""Vectors by positions: both ways to multiply a Jacobian, any batch, one forward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from conftest import TinyNet
from tails import POOLS, Curved, Tailed, randomised
from torch import Tensor, nn

from simexplain import Comparison, SimilarityModel, as_similarity_model, explain
from simexplain.errors import ModelError
from simexplain.methods import METHODS
from simexplain.methods.decomposition import JacobianProducts, PositionParts, position_parts


def backwards(monkeypatch: pytest.MonkeyPatch, *arguments: object, **options: object):
    """The same parts by backward passes, one for each dimension."""
    original = JacobianProducts.__init__

    def without(self, *given: object) -> None:
        original(self, *given)
        self.forward = False

    with monkeypatch.context() as patched:
        patched.setattr(JacobianProducts, "__init__", without)
        return position_parts(*arguments, **options)


def same(a: PositionParts, b: PositionParts, **tolerance: float) -> None:
    for name in ("parts", "rest", "vectors", "lengths"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), **tolerance)
    assert a.steps == b.steps


class Wide(nn.Module):
    """More dimensions than positions."""

    def __init__(self, pool: str, *, curved: bool = False) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3, stride=8, padding=1)
        self.act = nn.ReLU()
        self.pool = POOLS[pool]()
        self.head = nn.Linear(6 * 3 * 4 if pool == "flatten" else 6, 40)
        self.curved = curved

    def forward(self, images: Tensor) -> Tensor:
        vectors = self.head(self.pool(self.act(5 * self.body(images))))
        return vectors.sin() if self.curved else vectors


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("curved", [False, True])
def test_forward_and_backward_products_give_the_same_parts(
    images: Tensor, pool: str, curved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = as_similarity_model(Wide(pool, curved=curved).eval())
    forward = position_parts(model, images, "act", steps=3)
    assert forward.parts.shape == (6, 40, 3, 4)
    assert forward.steps == (3 if curved else 0)
    same(forward, backwards(monkeypatch, model, images, "act", steps=3), rtol=1e-4, atol=1e-5)


def test_parts_are_those_of_the_jacobian_that_torch_computes(images: Tensor) -> None:
    network = Wide("flatten").eval()
    result = position_parts(as_similarity_model(network), images[:2], "act")
    with torch.no_grad():
        features = network.act(5 * network.body(images[:2]))
    for image in range(2):
        jacobian = torch.autograd.functional.jacobian(
            lambda grid: network.head(network.pool(grid[None]))[0], features[image]
        )
        expected = (jacobian * features[image]).sum(dim=1)
        torch.testing.assert_close(result.parts[image], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.rest, network.head.bias.detach().expand(2, -1))


def test_tokens_and_attention_that_has_no_second_derivative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The class token is no position; fused attention takes the way of backward passes."""
    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=48, depth=2, embed_dim=24, num_heads=2
    ).eval()
    model = as_similarity_model(network)
    images = torch.rand(2, 3, 48, 48)
    layer = model.layers_for(images)[0].name
    result = position_parts(model, images, layer, steps=2)
    assert result.parts.shape == (2, 24, 3, 3)
    same(result, backwards(monkeypatch, model, images, layer, steps=2), rtol=1e-3, atol=1e-5)
    # And where it is not fused, forward products work below it.
    for block in network.blocks:
        block.attn.fused_attn = False
    plain = position_parts(model, images, layer, steps=2)
    same(result, plain, rtol=1e-3, atol=1e-5)


class Fixed(nn.Module):
    """Takes a batch of exactly two, as exported programs do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        assert len(images) == 2
        return self.network(images)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", [Tailed, Curved])
def test_a_fixed_batch_takes_any_number_of_images(
    images: Tensor, count: int, kind: type[Tailed]
) -> None:
    network = randomised(kind("average", norm=True, linear=True, bias=True))
    fixed = as_similarity_model(Fixed(network), batch_size=2)
    free = as_similarity_model(network)
    some = images[:count]
    a = position_parts(fixed, some, "network.act", steps=4)
    b = position_parts(free, some, "act", steps=4)
    same(a, b, rtol=1e-4, atol=1e-6)
    directions = torch.randn(2, count, 9)
    a = position_parts(fixed, some, "network.act", directions=directions, steps=4)
    b = position_parts(free, some, "act", directions=directions, steps=4)
    assert a.parts.shape == (count, 2, 6, 8)
    same(a, b, rtol=1e-4, atol=1e-6)


def test_a_fixed_batch_is_decomposed(images: Tensor) -> None:
    network = randomised(Tailed("gem", norm=False, linear=True, bias=True))
    triplet = Comparison.triplet(images[:1], images[1:2], images[2:3])
    fixed = as_similarity_model(Fixed(network), batch_size=2)
    a = explain(fixed, triplet, "decomposition", "network.act")
    b = explain(network, triplet, "decomposition", "act")
    torch.testing.assert_close(a.maps, b.maps, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [Tailed, Curved])
def test_parts_do_not_depend_on_the_batch(images: Tensor, kind: type[Tailed]) -> None:
    model = as_similarity_model(kind("average", norm=False, linear=True, bias=True).eval())
    whole = position_parts(model, images, "act", steps=4)
    for size in (1, 4):
        same(position_parts(model, images, "act", steps=4, max_batch=size), whole,
             rtol=1e-4, atol=1e-6)  # fmt: skip


def test_decomposition_runs_the_network_once_and_only_what_follows_a_layer_again(
    tiny: TinyNet, images: Tensor
) -> None:
    runs: list[int] = []
    pair = Comparison.pair(images[:2], images[2:4])
    model = as_similarity_model(tiny)
    explain(model, pair, "sam", check=False)  # the survey, which the model remembers
    tiny.stem.register_forward_hook(lambda _m, _a, output: runs.append(len(output)))
    explain(model, pair, "decomposition", "last", check=False)
    assert sum(runs) == 4
    runs.clear()
    explain(model, pair, "decomposition", ("body", "last"), check=False)
    # The lower layer's tail has a ReLU, yet is homogeneous: no blank image was run.
    assert sum(runs) == 4


def test_progress_counts_groups_up_to_the_last(images: Tensor) -> None:
    model = as_similarity_model(Curved("average", norm=False, linear=True, bias=True).eval())
    heard: list[tuple[int, int]] = []
    position_parts(
        model, images, "act", steps=3, max_batch=3,
        progress=lambda done, work: heard.append((done, work)),
    )  # fmt: skip
    # Six images, each alone; then three points of the quadrature for each.
    assert heard == [(n, 6) for n in range(1, 7)] + [(n, 18) for n in range(1, 19)]


def test_layers_that_do_not_feed_the_vector_are_refused(images: Tensor) -> None:
    class Aside(Tailed):
        def forward(self, images: Tensor) -> Tensor:
            grid = self.body(images)
            self.act(grid)
            return self.head(self.pool(grid))

    model: SimilarityModel = as_similarity_model(
        Aside("average", norm=False, linear=True, bias=True).eval()
    )
    with pytest.raises(ModelError, match="does not depend on layer 'act'"):
        position_parts(model, images, "act")

    class Cut(Tailed):
        def forward(self, images: Tensor) -> Tensor:
            grid = self.act(self.body(images))
            with torch.no_grad():
                return self.head(self.pool(grid))

    model = as_similarity_model(Cut("average", norm=False, linear=True, bias=True).eval())
    with pytest.raises(ModelError, match="no gradient reaches it"):
        position_parts(model, images, "act")


def test_rounding_in_half_precision_is_no_curve(tiny: TinyNet, images: Tensor) -> None:
    parts = position_parts(as_similarity_model(tiny.bfloat16()), images.bfloat16(), "last")
    assert parts.steps == 0
    assert 1e-5 < float(parts.residual.max()) < 0.05


def test_maps_that_are_not_finite_are_refused(tiny: TinyNet, images: Tensor) -> None:
    def broken(
        model: SimilarityModel, pair: Comparison, layers: tuple[str, ...], **options: object
    ):
        result = METHODS["sam"]()(model, pair, layers, **options)
        return replace(result, maps=result.maps * torch.nan)

    with pytest.raises(ModelError, match="A map is not finite"):
        explain(tiny, Comparison.pair(images[:1], images[1:2]), broken, "last")
