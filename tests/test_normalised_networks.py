"""Networks that normalise inside: explained as the same network without, against plain autograd."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from pictures import noise
from tails import Tailed, randomised
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain import (
    Comparison,
    Explanation,
    Matching,
    Preprocess,
    SimilarityModel,
    as_similarity_model,
    build_index,
    explain,
    load_model,
    match,
    search,
)
from simexplain.methods.decomposition import position_parts
from simexplain.searching.index_gallery import report_of


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
        result = explain(network, triplet, method, "net.act", **options)
        torch.testing.assert_close(result.maps, own.maps.to(result.maps), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.scores.float(), own.scores, rtol=1e-4, atol=1e-5)
        lines = [w.replace("net.act", "act") for w in result.warnings]
        if kind == "in place":  # which has no gradient of its own, so that no survey is made
            assert "modified by an inplace operation" in lines.pop()
        assert lines == list(own.warnings)
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
        result = self.head(pooled)
        return F.normalize(result, dim=1) if self.last else result


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
    result = explain(network, Comparison.pair(images[:1], images[1:2]), "decomposition", "act")
    with torch.no_grad():
        grids = network.act(network.body(images[:2]))
        lengths = grids.mean(dim=(2, 3)).norm(dim=1)
        rest = network.head(torch.zeros(1, 6))[0]
        cells = grids.shape[2] * grids.shape[3]
        vectors = network.head(F.normalize(grids.mean(dim=(2, 3)), dim=1))
        flat = grids[0].flatten(1).T / (cells * lengths[0])
        parts = network.head(flat) - rest + rest / cells
        expected = parts @ vectors[1] / (vectors[0].norm() * vectors[1].norm())
    torch.testing.assert_close(result.maps[0, 0].flatten(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.maps.sum(dim=(2, 3)), result.scores, rtol=1e-4, atol=1e-5)


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
        result = torch.cat((F.normalize(a, dim=1), b / b.norm(dim=1, keepdim=True)), dim=1)
        return F.normalize(result, dim=1) if self.last else result


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


def exported(network: nn.Module, path: Path) -> SimilarityModel:
    batch = torch.export.Dim("batch", min=1, max=64)
    example = torch.rand(2, 3, 24, 32)
    program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    return load_model(path)


@pytest.mark.parametrize("kind", ["F.normalize", "rsqrt", "in place", "twice", "in float64"])
def test_an_exported_file_gives_the_same(
    images: Tensor, plain: nn.Module, kind: str, tmp_path: Path
) -> None:
    network = Wrapped(plain, WHOLE[kind]).eval()
    model = exported(network, tmp_path / "model.pt2")
    pair = Comparison.pair(images[:2], images[2:4])
    for method, options in (("decomposition", {}), ("similarity_cam", {"score": "held"})):
        own = explain(plain, pair, method, "act", **options)
        result = explain(model, pair, method, "net.act", **options)
        torch.testing.assert_close(result.maps, own.maps.to(result.maps), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            result.unexplained, own.unexplained.to(result.unexplained), rtol=1e-4, atol=1e-4
        )
    a = match(plain, images[:2], images[2:4], "act")
    b = match(model, images[:2], images[2:4], "net.act")
    torch.testing.assert_close(b.matrix, a.matrix.to(b.matrix), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["layer norm", "rms norm", "group norm"])
def test_exported_normalisations_of_one_call_are_held(
    images: Tensor, kind: str, tmp_path: Path
) -> None:
    norm: nn.Module = {
        "layer norm": lambda: nn.LayerNorm(6),
        "rms norm": lambda: nn.RMSNorm(6),
        "group norm": lambda: nn.GroupNorm(2, 6),
    }[kind]()
    for parameter in norm.parameters():
        parameter.data.normal_()
    network = Layered(norm, before=False).eval()
    own = position_parts(as_similarity_model(network), images[:2], "act")
    result = position_parts(exported(network, tmp_path / "model.pt2"), images[:2], "act")
    assert own.steps == result.steps == 0
    torch.testing.assert_close(result.parts, own.parts, rtol=1e-4, atol=1e-6)


def test_an_index_and_a_search_give_what_the_plain_network_gives(
    plain: nn.Module, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        noise(24, 32, seed=number).save(folder / f"{number}.png")
    prepare = Preprocess((24, 32), fit="squash")
    result = []
    for name, network in (
        ("plain", plain),
        ("unit", Wrapped(plain, WHOLE["F.normalize"]).eval()),
        ("middle", Wrapped(plain, WHOLE["x / x.norm"]).eval()),
    ):
        model = as_similarity_model(network, preprocess=prepare)
        index = build_index(model, folder, tmp_path / f"{name}.index")
        assert index.keeping.kind == "parts"
        report = report_of(index)
        assert report["basis"] is not None
        result.append((search(model, folder / "0.png", index, 3), report["basis"]["unexplained"]))
    (own, share), *others = result
    for other, unexplained in others:
        assert unexplained == pytest.approx(share, abs=1e-3)
        for mine, theirs in zip(own.hits, other.hits, strict=True):
            assert mine.path == theirs.path
            assert theirs.similarity == pytest.approx(mine.similarity, abs=1e-5)
            assert theirs.unexplained == pytest.approx(mine.unexplained, abs=1e-3)
        for name in ("query_maps", "hit_maps", "contrast_maps"):
            a, b = getattr(own, name), getattr(other, name)
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_what_positions_do_not_account_for_is_measured_and_told(images: Tensor) -> None:
    """By hand: everything but the bias comes from positions."""
    network = Tailed("average", norm=False, linear=True, bias=True).eval()
    pair = Comparison.pair(images[:1], images[1:2])
    for size, warned in ((0.01, False), (30.0, True)):
        network.head.bias.data = size * torch.ones(9)
        with torch.no_grad():
            v, u = network(images[:2])
            lengths = v.norm() * u.norm()
            own = (v - network.head.bias) @ u / lengths
            both = (v - network.head.bias) @ (u - network.head.bias) / lengths
            score = v @ u / lengths
        expected = (score - own).abs() / ((score - own).abs() + own.abs())
        for method, options in (("decomposition", {}), ("similarity_cam", {"score": "held"})):
            result = explain(network, pair, method, "act", **options)
            assert float(result.unexplained[0, 0]) == pytest.approx(float(expected), abs=1e-3)
            assert any("belongs to no place" in record for record in result.warnings) == warned
        matched = match(network, images[:1], images[1:2], "act")
        expected = (score - both).abs() / ((score - both).abs() + both.abs())
        assert float(matched.unexplained[0]) == pytest.approx(float(expected), abs=1e-3)
        assert any("belongs to no place" in record for record in matched.warnings) == warned


def test_the_share_is_kept_on_disk(images: Tensor, plain: nn.Module, tmp_path: Path) -> None:
    result = explain(plain, Comparison.pair(images[:1], images[1:2]), "decomposition", "act")
    result.save(tmp_path / "a")
    record = json.loads((tmp_path / "a" / "explanation.json").read_text())
    assert record["unexplained"] == pytest.approx(result.unexplained[0].tolist())
    torch.testing.assert_close(Explanation.load(tmp_path / "a").unexplained, result.unexplained)
    matched = match(plain, images[:1], images[1:2], "act")
    matched.save(tmp_path / "b")
    record = json.loads((tmp_path / "b" / "matching.json").read_text())
    assert record["unexplained"] == pytest.approx(float(matched.unexplained[0]))
    torch.testing.assert_close(Matching.load(tmp_path / "b").unexplained, matched.unexplained)
    other = explain(plain, Comparison.pair(images[:1], images[1:2]), "saliency")
    other.save(tmp_path / "c")
    assert json.loads((tmp_path / "c" / "explanation.json").read_text())["unexplained"] is None


def deranged(network: nn.Module) -> nn.Module:
    """Statistics that are not trivial, so that a wrong formula shows."""
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return network.eval()


def test_facenet_by_hand() -> None:
    """Average pooling, a linear layer, batch norm, unit length: by its own modules."""
    facenet = pytest.importorskip("facenet_pytorch")
    network = deranged(facenet.InceptionResnetV1(pretrained=None))
    images = torch.rand(2, 3, 112, 112)
    kept: list[Tensor] = []
    handle = network.block8.register_forward_hook(lambda _m, _a, output: kept.append(output))
    with torch.no_grad():
        network(images)
    handle.remove()
    with torch.no_grad():
        grid, norm = kept[0], network.last_bn
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        bias = norm.bias - norm.running_mean * gain
        parts = torch.einsum("ec,mchw->mehw", network.last_linear.weight * gain[:, None], grid)
        parts = parts / grid[0, 0].numel()
        vectors = parts.sum(dim=(2, 3)) + bias
        lengths = vectors.norm(dim=1)
        spread = parts + bias[:, None, None] / grid[0, 0].numel()
        maps = torch.einsum("ehw,e->hw", spread[0], vectors[1]) / lengths.prod()
        matrix = torch.einsum("ehw,ekl->hwkl", spread[0], spread[1])
    pair = Comparison.pair(images[:1], images[1:])
    result = explain(network, pair, "decomposition", "block8")
    torch.testing.assert_close(result.maps[0, 0], maps, rtol=1e-3, atol=1e-5)
    held = explain(network, pair, "similarity_cam", "block8", score="held", keep_negative=True)
    own = torch.einsum("ehw,e->hw", parts[0], vectors[1]) / lengths.prod()
    torch.testing.assert_close(held.maps[0, 0], own, rtol=1e-3, atol=1e-5)
    dot = match(network, images[:1], images[1:], "block8", score="dot")
    torch.testing.assert_close(dot.matrix[0], matrix, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["osnet", "lite0"])
def test_networks_of_other_packages_wrapped_and_plain(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "osnet":
        # Which it needs to download weights.
        monkeypatch.setitem(sys.modules, "gdown", sys.modules.get("gdown", ModuleType("gdown")))
        osnet = pytest.importorskip("torchreid.reid.models.osnet")
        network = osnet.osnet_x0_25(num_classes=4, pretrained=False)
        layer = "conv5"
    else:
        network, layer = timm.create_model("tf_efficientnet_lite0", num_classes=0), "bn2"
    plain = deranged(network)
    images = torch.rand(2, 3, 64, 64)
    pair = Comparison.pair(images[:1], images[1:])
    wrapped = Wrapped(plain, WHOLE["F.normalize"]).eval()
    for method, options in (
        ("decomposition", {}),
        ("similarity_cam", {"score": "held", "keep_negative": True}),
        ("similarity_cam", {"score": "dot", "keep_negative": True}),
    ):
        own = explain(plain, pair, method, layer, **options)
        result = explain(wrapped, pair, method, f"net.{layer}", **options)
        size = float(own.maps.abs().max())
        torch.testing.assert_close(result.maps, own.maps, rtol=1e-4, atol=1e-5 * size)


def test_networks_that_normalise_cost_no_more(plain: nn.Module, images: Tensor) -> None:
    """Counted, not timed: the network runs once, and nothing is integrated."""
    runs: list[int] = []
    network = Wrapped(plain, WHOLE["module"]).eval()
    plain.body.register_forward_hook(lambda _m, _a, output: runs.append(len(output)))
    model = as_similarity_model(network)
    pair = Comparison.pair(images[:1], images[1:2])
    explain(model, pair, "decomposition", "net.act")  # the layers are looked up once
    for method, options in (("decomposition", {}), ("similarity_cam", {"score": "held"})):
        runs.clear()
        explain(model, pair, method, "net.act", check=False, **options)
        assert sum(runs) == 2
    runs.clear()
    match(model, images[:1], images[1:2], "net.act")
    assert sum(runs) == 2


def test_what_cannot_be_recorded_still_adds_up(images: Tensor) -> None:
    """A function of the user's own hides what it does: nothing is held, and the network reruns."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, rows):
            return rows * 2

        @staticmethod
        def backward(ctx, slopes):
            return slopes * 2

    plain = Tailed("average", norm=False, linear=True, bias=False).eval()
    own = position_parts(as_similarity_model(Wrapped(plain, Own.apply).eval()), images, "net.act")
    expected = position_parts(as_similarity_model(plain), images, "act")
    torch.testing.assert_close(own.parts, 2 * expected.parts, rtol=1e-4, atol=1e-6)
    unit = Wrapped(plain, lambda rows: F.normalize(Own.apply(rows))).eval()
    result = explain(unit, Comparison.pair(images[:1], images[1:2]), "decomposition", "net.act")
    torch.testing.assert_close(result.maps.sum(dim=(2, 3)), result.scores, rtol=0.05, atol=0.05)


def test_nothing_of_the_user_s_is_touched(plain: nn.Module, images: Tensor) -> None:
    network = Wrapped(plain, WHOLE["in place"]).train()
    plain.norm.eval()
    modes = [module.training for module in network.modules()]
    before, kept = torch.get_rng_state(), images.clone()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        explain(network, Comparison.pair(images[:1], images[1:2]), "decomposition", "net.act")
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(images, kept)
    assert all(torch.equal(state[n], tensor) for n, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())
    assert not torch.overrides._get_current_function_mode_stack()
