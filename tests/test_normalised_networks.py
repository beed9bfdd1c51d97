"""Networks that normalise inside: explained as the same network without, against plain autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tails import Tailed, randomised
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain import Comparison, as_similarity_model, explain, match
from simexplain.methods.position_parts import position_parts


class Wrapped(nn.Module):
    """A network and what is done to its vectors."""

    def __init__(self, net: nn.Module, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.after = net, after

    def forward(self, images: Tensor) -> Tensor:
        return self.after(self.net(images))


class L2Norm(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return rows / (rows.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10)


def in_place(rows: Tensor) -> Tensor:
    rows = rows.clone()
    rows /= rows.norm(dim=1, keepdim=True)
    return rows


def in_double(rows: Tensor) -> Tensor:
    return F.normalize(rows.double(), dim=1)


WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "F.normalize": lambda rows: F.normalize(rows),
    "F.normalize(p=2, eps)": lambda rows: F.normalize(rows, p=2, dim=1, eps=1e-6),
    "x / x.norm": lambda rows: rows / rows.norm(dim=1, keepdim=True),
    "x / linalg.norm": lambda rows: rows / torch.linalg.norm(rows, dim=-1, keepdim=True),
    "x / vector_norm clamped": lambda rows: (
        rows / torch.linalg.vector_norm(rows, dim=1).clamp_min(1e-9)[:, None]
    ),
    "torch.div expanded": lambda rows: torch.div(
        rows, rows.norm(p=2, dim=1, keepdim=True).expand_as(rows)
    ),
    "rsqrt": lambda rows: rows * torch.rsqrt((rows * rows).sum(1, keepdim=True) + 1e-12),
    "inverse": lambda rows: rows * (1 / (rows**2).sum(1, keepdim=True) ** 0.5),
    "in place": in_place,
    "module": L2Norm(),
    "twice": lambda rows: F.normalize(F.normalize(rows)),
    "in float64": in_double,
    "times a scale": lambda rows: 16 * F.normalize(rows),
    "largest": lambda rows: rows / rows.abs().amax(dim=1, keepdim=True),
    "mean square": lambda rows: rows / rows.pow(2).mean(dim=1, keepdim=True).sqrt(),
    "as a map": lambda rows: F.normalize(rows[:, :, None, None]).flatten(1),
}  # fmt: skip
"""Every one leaves the direction of a vector alone, so that nothing else may change."""


@pytest.fixture
def plain() -> nn.Module:
    return randomised(Tailed("average", norm=True, linear=True, bias=True))


@pytest.mark.parametrize("kind", WHOLE)
def test_the_vector_before_the_network_s_own_normalisation_is_explained(
    images: Tensor, plain: nn.Module, kind: str
) -> None:
    network = Wrapped(plain, WHOLE[kind]).eval()
    triplet = Comparison.triplet(images[:2], images[2:4], images[4:6])
    for method, options in (
        ("decomposition", {}),
        ("similarity_cam", {"score": "held", "keep_negative": True}),
        ("similarity_cam", {"score": "held", "cam": "hires_cam", "keep_negative": True}),
        ("focus", {}),
    ):
        own = explain(plain, triplet, method, "act", **options)
        found = explain(network, triplet, method, "net.act", **options)
        torch.testing.assert_close(found.maps, own.maps.to(found.maps), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.scores.float(), own.scores, rtol=1e-4, atol=1e-5)
        assert found.warnings == own.warnings
    for score in ("cosine", "squared"):
        a = match(plain, images[:2], images[2:4], "act", score=score)
        b = match(network, images[:2], images[2:4], "net.act", score=score)
        torch.testing.assert_close(b.matrix, a.matrix.to(b.matrix), rtol=1e-4, atol=1e-5)
        assert float(b.residual.abs().max()) < 1e-5


@pytest.mark.parametrize("kind", [kind for kind in WHOLE if kind != "times a scale"])
def test_the_dot_product_is_that_of_the_vectors_before(
    images: Tensor, plain: nn.Module, kind: str
) -> None:
    network = Wrapped(plain, WHOLE[kind]).eval()
    a = match(plain, images[:2], images[2:4], "act", score="dot")
    b = match(network, images[:2], images[2:4], "net.act", score="dot")
    torch.testing.assert_close(b.matrix, a.matrix.to(b.matrix), rtol=1e-4, atol=1e-5)
    pair = Comparison.pair(images[:2], images[2:4])
    one = explain(plain, pair, "similarity_cam", "act", score="dot", keep_negative=True)
    other = explain(network, pair, "similarity_cam", "net.act", score="dot", keep_negative=True)
    torch.testing.assert_close(other.maps.float(), one.maps, rtol=1e-4, atol=1e-5)


class Middle(nn.Module):
    """A normalisation in the middle of a head: pooled, normalised, then an affine head."""

    def __init__(self, head: nn.Module, *, last: bool = False) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3, stride=4, padding=1)
        self.act = nn.ReLU()
        self.head, self.last = head, last

    def forward(self, images: Tensor) -> Tensor:
        pooled = F.normalize(self.act(self.body(images)).mean(dim=(2, 3)), dim=1)
        found = self.head(pooled)
        return F.normalize(found, dim=1) if self.last else found


HEADS: dict[str, Callable[[], nn.Module]] = {
    "linear without bias": lambda: nn.Linear(6, 9, bias=False),
    "linear with bias": lambda: nn.Linear(6, 9),
    "batch norm": lambda: nn.BatchNorm1d(6),
    "batch norm and linear": lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 9)),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("last", [False, True])
def test_a_length_in_the_middle_is_held(images: Tensor, head: str, last: bool) -> None:
    """By hand: the map of a position is the head's linear part of it over the held length."""
    network = randomised(Middle(HEADS[head](), last=last))
    found = explain(network, Comparison.pair(images[:1], images[1:2]), "decomposition", "act")
    with torch.no_grad():
        grids = network.act(network.body(images[:2]))
        lengths = grids.mean(dim=(2, 3)).norm(dim=1)
        rest = network.head(torch.zeros(1, 6))[0]
        cells = grids.shape[2] * grids.shape[3]
        vectors = network.head(F.normalize(grids.mean(dim=(2, 3)), dim=1))
        flat = grids[0].flatten(1).T / (cells * lengths[0])
        parts = network.head(flat) - rest + rest / cells
        expected = parts @ vectors[1] / (vectors[0].norm() * vectors[1].norm())
    torch.testing.assert_close(found.maps[0, 0].flatten(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.maps.sum(dim=(2, 3)), found.scores, rtol=1e-4, atol=1e-5)


class Intra(nn.Module):
    """NetVLAD-like: every position's vector is normalised before they are pooled."""

    def __init__(self, *, by_hand: bool) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3, stride=4, padding=1)
        self.act = nn.Tanh()
        self.head = nn.Linear(6, 5)
        self.by_hand = by_hand

    def forward(self, images: Tensor) -> Tensor:
        grid = self.act(self.body(images))
        unit = grid / grid.norm(dim=1, keepdim=True) if self.by_hand else F.normalize(grid, dim=1)
        return F.normalize(self.head(unit.mean(dim=(2, 3))), dim=1)


@pytest.mark.parametrize("by_hand", [False, True])
def test_positions_that_are_normalised_one_by_one(images: Tensor, by_hand: bool) -> None:
    network = Intra(by_hand=by_hand).eval()
    parts = position_parts(as_similarity_model(network), images[:2], "act")
    assert parts.steps == 0
    with torch.no_grad():
        grid = network.act(network.body(images[:2]))
        unit = grid / grid.norm(dim=1, keepdim=True)
        expected = torch.einsum("ec,mchw->mehw", network.head.weight, unit) / unit[0, 0].numel()
    torch.testing.assert_close(parts.parts, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts.rest, network.head.bias.detach().expand(2, -1))


class Halves(nn.Module):
    """Two parts of the vector, each brought to unit length, side by side."""

    def __init__(self, *, last: bool) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3, stride=4, padding=1)
        self.act = nn.ReLU()
        self.one, self.other = nn.Linear(6, 5), nn.Linear(6, 4)
        self.last = last

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.act(self.body(images)).mean(dim=(2, 3))
        a, b = self.one(pooled), self.other(pooled)
        found = torch.cat((F.normalize(a, dim=1), b / b.norm(dim=1, keepdim=True)), dim=1)
        return F.normalize(found, dim=1) if self.last else found


@pytest.mark.parametrize("last", [False, True])
def test_halves_that_are_normalised_one_by_one(images: Tensor, last: bool) -> None:
    network = Halves(last=last).eval()
    parts = position_parts(as_similarity_model(network), images[:2], "act")
    assert parts.steps == 0
    with torch.no_grad():
        grid = network.act(network.body(images[:2]))
        pooled = grid.mean(dim=(2, 3))
        a, b = network.one(pooled), network.other(pooled)
        scale = torch.cat(
            (a.norm(dim=1, keepdim=True).expand_as(a), b.norm(dim=1, keepdim=True).expand_as(b)), 1
        )
        weight = torch.cat((network.one.weight, network.other.weight))
        bias = torch.cat((network.one.bias, network.other.bias))
        expected = torch.einsum("ec,mchw->mehw", weight, grid) / grid[0, 0].numel()
    torch.testing.assert_close(
        parts.parts, expected / scale[:, :, None, None], rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(parts.rest, bias / scale, rtol=1e-4, atol=1e-6)


class Layered(nn.Module):
    """Tails that end as transformers and ConvNeXt do."""

    def __init__(self, norm: nn.Module, *, before: bool) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3, stride=4, padding=1)
        self.act = nn.ReLU()
        self.norm, self.before = norm, before

    def forward(self, images: Tensor) -> Tensor:
        grid = self.act(self.body(images))
        if self.before:
            return self.norm(grid.flatten(2).transpose(1, 2)).mean(dim=1)
        return F.normalize(self.norm(grid.mean(dim=(2, 3))), dim=1)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_layer_norm_is_linear_with_its_deviation_held(
    images: Tensor, before: bool, kind: type[nn.Module]
) -> None:
    norm = kind(6)
    for parameter in norm.parameters():
        parameter.data.normal_()
    network = Layered(norm, before=before).eval()
    parts = position_parts(as_similarity_model(network), images[:2], "act")
    assert parts.steps == 0
    with torch.no_grad():
        grid = network.act(network.body(images[:2])).flatten(2).transpose(1, 2)
        seen = grid if before else grid.mean(dim=1, keepdim=True)
        if kind is nn.LayerNorm:
            scale = (seen.var(dim=2, correction=0, keepdim=True) + norm.eps).rsqrt()
            expected = (grid - grid.mean(dim=2, keepdim=True)) * scale * norm.weight
        else:
            eps = torch.finfo(torch.float32).eps
            expected = grid * (seen.square().mean(dim=2, keepdim=True) + eps).rsqrt() * norm.weight
        expected = expected / grid.shape[1]
    torch.testing.assert_close(
        parts.parts.flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-6
    )
