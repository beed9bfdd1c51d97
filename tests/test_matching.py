"""Which region answers to which: the matrix against naive loops, and what is read off it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from conftest import TinyNet, varied
from PIL import Image
from tails import POOLS, Curved, Tailed, randomised
from torch import Tensor, nn

from simexplain import Matching, as_similarity_model, match
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ComparisonError, ImageError, ModelError
from simexplain.matching.factors import SCORES, Factors, pair_matrix
from simexplain.matching.matching import Patience, factors_of, matching_from
from simexplain.methods.decomposition import position_parts
from simexplain.methods.method import unexplained_share_warning
from simexplain.models.avsl import AVSL


def linear(seed: int = 0) -> Tailed:
    torch.manual_seed(seed)
    return randomised(Tailed("average", norm=True, linear=True, bias=True))


def pieces(network: Tailed, images: Tensor) -> tuple[Tensor, Tensor]:
    """Each position's vector ``(B,E,h,w)`` with its share of the biases, and the vectors.

    Average pooling, batch norm and the linear layer, written out.
    """
    with torch.no_grad():
        grid = network.act(network.body(images))
        norm = network.norm
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        weight = network.head.weight * gain
        bias = network.head.weight @ (norm.bias - gain * norm.running_mean) + network.head.bias
        cells = grid.shape[2] * grid.shape[3]
        parts = torch.einsum("ec,bchw->behw", weight, grid) / cells
        return parts + bias[:, None, None] / cells, network(images)


def looped(score: str, one: Tensor, other: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """The matrix ``(h,w,h',w')`` of one pair by four loops."""
    if score != "dot":
        one, other, v, u = one / v.norm(), other / u.norm(), v / v.norm(), u / u.norm()
    result = torch.zeros(*one.shape[1:], *other.shape[1:])
    here, there = one[0].numel(), other[0].numel()
    for i in range(one.shape[1]):
        for j in range(one.shape[2]):
            for k in range(other.shape[1]):
                for m in range(other.shape[2]):
                    t, s = one[:, i, j], other[:, k, m]
                    product = t @ s
                    if score == "squared":
                        product = t @ v / there + s @ u / here - 2 * product
                    result[i, j, k, m] = product
    return result


@pytest.mark.parametrize("score", SCORES)
def test_the_matrix_equals_a_naive_loop(images: Tensor, score: str) -> None:
    network = linear()
    result = match(network, images[:2], images[2:4], "act", score=score)
    assert result.matrix.shape == (2, 6, 8, 6, 8)
    one, v = pieces(network, images[:2])
    other, u = pieces(network, images[2:4])
    for index in range(2):
        expected = looped(score, one[index], other[index], v[index], u[index])
        torch.testing.assert_close(result.matrix[index], expected, rtol=1e-3, atol=1e-6)
    unit = [torch.nn.functional.normalize(side, dim=1) for side in (v, u)]
    expected = {
        "cosine": (unit[0] * unit[1]).sum(dim=1),
        "dot": (v * u).sum(dim=1),
        "squared": (unit[0] - unit[1]).square().sum(dim=1),
    }[score]
    torch.testing.assert_close(result.score, expected, rtol=1e-5, atol=1e-6)
    assert result.warnings == said_of_biases(result)


def said_of_biases(result: Matching) -> tuple[str, ...]:
    """The only warning that an exact matching may have: by hand, a large share of biases."""
    sums = result.matrix.sum(dim=(1, 2, 3, 4))
    torch.testing.assert_close(sums, result.score, rtol=1e-4, atol=1e-5)
    assert result.unexplained is not None
    return unexplained_share_warning(float(result.unexplained.max()), result.layer)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    ("norm", "head", "bias"),
    [(False, False, False), (False, True, False), (True, False, True), (True, True, True)],
)
def test_the_matrix_adds_up_for_every_tail(
    images: Tensor, pool: str, norm: bool, head: bool, bias: bool
) -> None:
    network = randomised(Tailed(pool, norm=norm, linear=head, bias=bias))
    for score in SCORES:
        result = match(network, images[:3], images[3:], "act", score=score)
        assert (result.residual.abs() < 1e-5 * result.score.abs()).all()
        assert result.warnings == said_of_biases(result)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "densenet121"])
@pytest.mark.parametrize("score", ["cosine", "squared"])
def test_the_residual_is_rounding_on_networks_of_timm(name: str, score: str) -> None:
    network = varied(timm.create_model(name, num_classes=0))
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    result = match(network, images[0], images[1], score=score)
    assert abs(float(result.residual[0])) < 1e-5 * float(result.score[0])
    # Only MobileNet has an activation between the pooling and the embedding.
    assert bool(result.warnings) == name.startswith("mobilenet")
    first, second = result.marginals()
    for side in (first, second):
        torch.testing.assert_close(side.sum(dim=(1, 2)), result.score, rtol=1e-5, atol=1e-6)


def test_stylianou_s_maps_are_the_marginals_for_average_pooling_without_a_head(
    images: Tensor,
) -> None:
    network = Tailed("average", norm=False, linear=False, bias=False).eval()
    result = match(network, images[:1], images[1:2], "act")
    with torch.no_grad():
        one, other = network.act(network.body(images[:2]))
    total = float(one.mean(dim=(1, 2)).norm() * other.mean(dim=(1, 2)).norm())
    naive_a, naive_b = torch.zeros(6, 8), torch.zeros(6, 8)
    for i in range(6):
        for j in range(8):
            cells = (6 * 8) ** 2 * total
            naive_a[i, j] = (one[:, i, j, None, None] * other).sum() / cells
            naive_b[i, j] = (other[:, i, j, None, None] * one).sum() / cells
    first, second = result.marginals()
    torch.testing.assert_close(first[0], naive_a, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(second[0], naive_b, rtol=1e-4, atol=1e-7)


def test_zhu_s_style_drops_biases_scales_and_cuts(images: Tensor) -> None:
    network = linear()
    result = match(network, images[:1], images[1:2], "act", formula="zhu")
    with torch.no_grad():
        grid = network.act(network.body(images[:2]))
        norm = network.norm
        weight = network.head.weight * norm.weight / (norm.running_var + norm.eps).sqrt()
        one, other = torch.einsum("ec,bchw->behw", weight, grid) / 48
        lengths = network(images[:2]).norm(dim=1).prod()
    matrix = torch.einsum("ehw,ekl->hwkl", one, other) / lengths
    torch.testing.assert_close(result.matrix[0], matrix, rtol=1e-3, atol=1e-6)
    overall = matrix.relu().sum(dim=(2, 3))  # pairs are cut before they are summed
    expected = overall / overall.max()
    torch.testing.assert_close(result.marginals()[0][0], expected, rtol=1e-3, atol=1e-5)
    point = matrix[2, 3]
    at = result.at(3.5 * 4, 2.5 * 4)
    torch.testing.assert_close(at, (point / point.max()).relu(), rtol=1e-3, atol=1e-5)
    assert any("leaves biases out" in warning for warning in result.warnings)
    missing = matrix.sum() - result.score
    torch.testing.assert_close(result.residual.float(), missing, rtol=1e-3, atol=1e-5)


def test_zhu_s_style_cuts_pairs_before_it_sums(images: Tensor) -> None:
    """Two positions against two, as in the code of the paper: ``[[3, -3], [1, 1]]``."""
    matrix = torch.tensor([[3.0, -3.0], [1.0, 1.0]]).view(1, 1, 2, 1, 2)
    result = replace(match(linear(), images[:1], images[1:2], "act"), matrix=matrix, style="zhu")
    first, second = result.marginals()
    torch.testing.assert_close(first, torch.tensor([[[1.0, 2 / 3]]]))
    torch.testing.assert_close(second, torch.tensor([[[1.0, 1 / 4]]]))
    signed = replace(result, style="exact").marginals()[0]
    torch.testing.assert_close(signed, torch.tensor([[[0.0, 2.0]]]))


def bilinear(grid: Tensor, x: float, y: float) -> Tensor:
    """Of ``(h,w,...)`` at a place in cells, whose centres are at halves; the edge goes on."""
    height, width = grid.shape[:2]
    x, y = x - 0.5, y - 0.5
    left, top = int(np.floor(x)), int(np.floor(y))
    total = torch.zeros_like(grid[0, 0])
    for row, down in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, across in ((left, 1 - (x - left)), (left + 1, x - left)):
            cell = grid[min(max(row, 0), height - 1), min(max(column, 0), width - 1)]
            total = total + down * across * cell
    return total


@pytest.mark.parametrize("place", [(2, 2), (13.2, 9.7), (0, 0), (32, 24), (31.5, 0.3), (16, 12)])
def test_a_point_s_map_is_interpolated_as_by_hand(
    images: Tensor, place: tuple[float, float]
) -> None:
    result = match(linear(), images[:2], images[2:4], "act")
    x, y = place
    forth, back = result.at(x, y, index=1), result.at(x, y, side="b", index=1)
    matrix = result.matrix[1]
    torch.testing.assert_close(forth, bilinear(matrix, x / 4, y / 4), rtol=1e-5, atol=1e-7)
    other = bilinear(matrix.permute(2, 3, 0, 1), x / 4, y / 4)
    torch.testing.assert_close(back, other, rtol=1e-5, atol=1e-7)
    answer = result.best(x, y, index=1)
    row, column = divmod(int(forth.argmax()), 8)
    assert answer.b == ((column + 0.5) * 4, (row + 0.5) * 4)
    assert answer.value == pytest.approx(float(forth.max()), rel=1e-5)
    assert answer.share == pytest.approx(float(forth.max() / result.score[1]), rel=1e-4)
    assert result.best(x, y, side="b", index=1).b == place


@pytest.mark.parametrize("place", [(-0.1, 3), (32.1, 3), (3, 24.5), (float("nan"), 3)])
def test_points_outside_are_refused(images: Tensor, place: tuple[float, float]) -> None:
    result = match(linear(), images[:1], images[1:2], "act")
    for ask in (result.at, result.best):
        with pytest.raises(ComparisonError, match=r"x from 0\.0 to 32\.0 and y from 0.0 to 24.0"):
            ask(*place)


def test_images_of_different_sizes_can_be_matched(images: Tensor) -> None:
    network = linear()
    tall = torch.rand(2, 3, 40, 20, generator=torch.Generator().manual_seed(5))
    result = match(network, images[:2], tall, "act")
    assert result.matrix.shape == (2, 6, 8, 10, 5)
    one, v = pieces(network, images[:2])
    other, u = pieces(network, tall)
    expected = torch.einsum("behw,bekl->bhwkl", one, other) / (v.norm(dim=1) * u.norm(dim=1)).view(
        2, 1, 1, 1, 1
    )
    torch.testing.assert_close(result.matrix, expected, rtol=1e-3, atol=1e-6)
    assert result.residual.abs().max() < 1e-5
    assert result.at(20, 40, side="b").shape == (6, 8)
    with pytest.raises(ComparisonError, match="of image b"):
        result.at(21, 3, side="b")
    assert result.figure().axes
    squared = match(network, images[:2], tall, "act", score="squared")
    assert squared.residual.abs().max() < 1e-5


def test_one_image_with_many_and_any_batch_give_the_same(images: Tensor) -> None:
    network = linear()
    whole = match(network, images[:1].expand(3, -1, -1, -1), images[3:], "act")
    for a in (images[0], images[:1]):
        torch.testing.assert_close(
            match(network, a, images[3:], "act").matrix, whole.matrix, rtol=1e-4, atol=1e-6
        )
    turned = match(network, images[3:], images[0], "act", max_batch=2)
    torch.testing.assert_close(
        turned.matrix.permute(0, 3, 4, 1, 2), whole.matrix, rtol=1e-4, atol=1e-6
    )
    for index in range(3):
        alone = match(network, images[0], images[3 + index], "act")
        torch.testing.assert_close(alone.matrix[0], whole.matrix[index], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("score", SCORES)
def test_cached_factors_give_the_same_matching(images: Tensor, score: str) -> None:
    model = as_similarity_model(linear())
    direct = match(model, images[:2], images[2:4], "act", score=score)
    sides = [factors_of(position_parts(model, side, "act")) for side in (images[:2], images[2:4])]
    # Any orthonormal basis does, as long as both sides have the same one.
    basis = torch.linalg.qr(torch.randn(9, 9)).Q
    turned = [
        Factors(torch.einsum("de,behw->bdhw", basis, side.parts), side.rest @ basis.T,
                side.vectors @ basis.T)
        for side in sides
    ]  # fmt: skip
    half = [Factors(side.parts.half(), side.rest.half(), side.vectors.half()) for side in sides]
    for pair, tolerance in ((sides, 1e-6), (turned, 1e-5), (half, 1e-3)):
        cached = matching_from(
            *pair, (images[:2], images[2:4]), model.preprocess, score=score, layer="act"
        )
        scale = float(direct.matrix.abs().max())
        assert float((cached.matrix - direct.matrix).abs().max()) <= tolerance * scale
        largest = max(1.0, float(direct.score.abs().max()))
        assert float((cached.score - direct.score).abs().max()) <= tolerance * largest
        assert cached.matrix.dtype == torch.float32
        assert cached.layer == direct.layer


def test_the_interaction_is_what_marginals_do_not_explain(images: Tensor) -> None:
    result = match(linear(), images[:2], images[2:4], "act")
    parts = result.interaction()
    assert parts.sum(dim=(3, 4)).abs().max() < 1e-5
    assert parts.sum(dim=(1, 2)).abs().max() < 1e-5
    first, second = result.marginals()
    mean = result.matrix.mean(dim=(1, 2, 3, 4)).view(2, 1, 1, 1, 1)
    again = first[:, :, :, None, None] / 48 + second[:, None, None] / 48 - mean + parts
    torch.testing.assert_close(again, result.matrix, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("score", ["cosine", "squared"])
def test_top_pairs_equal_a_naive_search(images: Tensor, score: str) -> None:
    result = match(linear(), images[:2], images[2:4], "act", score=score)
    sign = -1 if score == "squared" else 1
    matrix = sign * result.matrix[1].reshape(48, 48)
    order = sorted(
        ((float(matrix[p, r]), p, r) for p in range(48) for r in range(48)), reverse=True
    )

    def pixel(index: int) -> tuple[float, float]:
        return (index % 8 + 0.5) * 4, (index // 8 + 0.5) * 4

    top = result.top(5, 1)
    for pair, (value, p, r) in zip(top, order[:5], strict=True):
        assert (pair.a, pair.b) == (pixel(p), pixel(r))
        assert pair.value == pytest.approx(sign * value)
    for by, ranked in (
        ("value", matrix),
        ("specific", sign * result.interaction()[1].reshape(48, 48)),
    ):
        mutual = {
            (pixel(p), pixel(int(ranked[p].argmax())))
            for p in range(48)
            if int(ranked[:, int(ranked[p].argmax())].argmax()) == p
            and (by == "value" or matrix[p, int(ranked[p].argmax())] > matrix.mean())
        }
        pairs = result.top(100, 1, mutual=True, by=by)
        assert {(pair.a, pair.b) for pair in pairs} == mutual
        assert all(pair.mutual for pair in pairs)
        assert len({pair.a for pair in pairs}) == len(pairs)
    assert result.top(0, 1) == ()
    assert len(result.top(10_000, 1)) == 48 * 48
    answer = result.best(*pixel(9), index=1)
    assert answer.value == pytest.approx(sign * float(matrix[9].max()), abs=1e-7)


def test_a_patch_that_both_images_show_is_matched_to_itself() -> None:
    """The same patch at another place, for a network whose positions see only their own pixels."""
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Conv2d(3, 32, 8, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    a, b = 0.05 * torch.randn(2, 1, 3, 48, 64)
    patch = 3 * torch.randn(3, 8, 8)
    a[0, :, 8:16, 16:24] = patch
    b[0, :, 32:40, 40:48] = patch
    result = match(network, a, b, "1")
    for pair in (
        result.top(1)[0],
        result.top(1, mutual=True, by="specific")[0],
        result.best(20, 12),
    ):
        assert (pair.a, pair.b) == ((20, 12), (44, 36))
        assert pair.mutual


def test_tails_that_are_not_linear_are_integrated_and_told(images: Tensor) -> None:
    network = Curved("average", norm=False, linear=True, bias=True).eval()
    good = match(network, images[:2], images[2:4], "act", jacobians=32)
    assert good.residual.abs().max() < 1e-3
    assert any("32 Jacobians were averaged" in warning for warning in good.warnings)
    rough = match(network, images[:2], images[2:4], "act", jacobians=1)
    assert rough.residual.abs().max() > 1e-3
    (record,) = (warning for warning in rough.warnings if "Jacobians" in warning)
    assert "network above act is not linear" in record
    assert f"{float(rough.residual.abs().max()):.1g} of the score" in record


def test_nothing_of_the_user_s_is_touched(tiny: TinyNet, images: Tensor) -> None:
    tiny.train()
    tiny.norm.eval()
    modes = [module.training for module in tiny.modules()]
    state = {key: value.clone() for key, value in tiny.state_dict().items()}
    before, kept = torch.get_rng_state(), images.clone()
    with torch.no_grad():  # nor does the caller's mode matter
        result = match(tiny, images[:2], images[2:4], "last")
        assert not torch.is_grad_enabled()
    assert result.residual.abs().max() < 1e-5
    assert not result.matrix.requires_grad
    assert [module.training for module in tiny.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in tiny.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny.parameters())
    assert not any(module._forward_hooks for module in tiny.modules())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(images, kept)


def test_wrong_arguments_are_told(tiny: TinyNet, images: Tensor) -> None:
    a, b = images[:1], images[1:2]
    for expected, call in (
        ("score to be one of cosine, dot, squared", lambda: match(tiny, a, b, score="l2")),
        ("formula to be one of exact, zhu", lambda: match(tiny, a, b, formula="plain")),
        ("has no distances", lambda: match(tiny, a, b, score="squared", formula="zhu")),
        ("jacobians of at least 1", lambda: match(tiny, a, b, jacobians=0)),
        ("max_batch of at least 1", lambda: match(tiny, a, b, max_batch=0)),
        ("as many or one on a side", lambda: match(tiny, images[:2], images[:3])),
        ("as many or one on a side", lambda: match(tiny, a.long(), b)),
        ("as many or one on a side", lambda: match(tiny, images[:0], b)),
        ("side to be one of a, b", lambda: match(tiny, a, b).at(1, 1, side="c")),
        ("a pair below 1", lambda: match(tiny, a, b).at(1, 1, index=1)),
        ("by to be one of value, specific", lambda: match(tiny, a, b).top(by="norm")),
        ("a pair below 1", lambda: match(tiny, a, b).figure(3)),
        ("lines from 0", lambda: match(tiny, a, b).figure(lines=-1)),
    ):
        with pytest.raises(ComparisonError, match=expected) as caught:
            call()
        assert str(caught.value).count("\n") == 0
        assert str(caught.value).endswith(".")
    with pytest.raises(ModelError, match="no layer 'nowhere'"):
        match(tiny, a, b, "nowhere")
    with pytest.raises(ImageError, match=r"no file 'a\.png'"):
        match(tiny, "a.png", "b.png")
    with pytest.raises(ImageError, match="preprocessed tensors"):
        match(tiny, a, "b.png")


def test_vectors_without_a_direction_are_refused(tiny: TinyNet, images: Tensor) -> None:
    tiny.head = nn.Linear(12, 10, bias=False)
    tiny.last = nn.Threshold(1e9, 0.0)
    with pytest.raises(ModelError, match="first image of pair 1 is the zero vector"):
        match(tiny, images[:1], images[1:2], "last")
    assert float(match(tiny, images[:1], images[1:2], "last", score="dot").score[0]) == 0
    tiny.head.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="is not finite"):
        match(tiny, images[:1], images[1:2], "last", score="dot")


def test_factors_that_do_not_fit_are_refused() -> None:
    def factors(count: int, width: int) -> Factors:
        return Factors(
            torch.rand(count, width, 2, 3), torch.rand(count, width), torch.rand(count, width)
        )

    with pytest.raises(ComparisonError, match="of one width"):
        pair_matrix(factors(2, 4), factors(2, 5))
    with pytest.raises(ComparisonError, match="as many images"):
        pair_matrix(factors(2, 4), factors(3, 4))
    with pytest.raises(ComparisonError, match="parts"):
        Factors(torch.rand(2, 4, 3), torch.rand(2, 4), torch.rand(2, 4))
    with pytest.raises(ComparisonError, match="images"):
        matching_from(
            factors(2, 4), factors(2, 4), (torch.rand(3, 3, 8, 8), torch.rand(2, 3, 8, 8)),
            Preprocess(),
        )  # fmt: skip


def test_avsl_is_sent_to_attribute(tiny: TinyNet, images: Tensor) -> None:
    avsl = AVSL(tiny, levels=("act", "last"), nodes=4)
    with pytest.raises(ModelError, match="attribute takes its distance apart"):
        match(avsl, images[:1], images[1:2])


def test_long_work_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("simexplain.matching.matching.time.monotonic", lambda: now[0])
    record: list[str] = []
    patience = Patience(record.append)
    for done in range(1, 11):  # quick work
        now[0] += 0.5
        patience(done, 10)
    assert record == []
    for done in range(1, 4):  # the same again, but ten times as slow
        now[0] += 5
        patience(done, 10)
    assert len(record) == 1
    assert "about 45 seconds" in record[0]


def test_points_are_pixels_of_the_pictures(tmp_path, tiny: TinyNet) -> None:
    generator = np.random.default_rng(0)
    for name, size in (("a", (60, 100, 3)), ("b", (90, 50, 3))):
        Image.fromarray(generator.integers(0, 255, size, dtype=np.uint8)).save(
            tmp_path / f"{name}.png"
        )
    model = as_similarity_model(tiny, preprocess=Preprocess(size=(24, 24)))
    result = match(model, tmp_path / "a.png", tmp_path / "b.png", "last")
    # 100 x 60 is reduced to 40 x 24, of which the middle 24 columns are seen; 50 x 90 to 24 x 43.
    assert result.frame("a").box == pytest.approx((20, 0, 80, 60))
    weights = bilinear(result.matrix[0], (45 * 0.4 - 8) / 4, 31 * 0.4 / 4)
    torch.testing.assert_close(result.at(45, 31), weights, rtol=1e-5, atol=1e-7)
    answer = result.best(45, 31)
    left, top, right, bottom = result.frame("b").box
    assert left <= answer.b[0] <= right
    assert top <= answer.b[1] <= bottom
    row, column = divmod(int(result.at(45, 31).argmax()), 6)
    above = round((43 - 24) / 2)
    expected = ((column + 0.5) * 4 * 50 / 24, ((row + 0.5) * 4 + above) * 90 / 43)
    assert answer.b == pytest.approx(expected)
    with pytest.raises(ComparisonError, match=r"a.png' that the network saw, x from 20.0 to 80.0"):
        result.at(10, 31)
    with pytest.raises(ImageError, match="no file"):
        match(model, tmp_path / "a.png", tmp_path / "none.png")
    assert result.figure(points=[(45, 31)]).axes


def test_a_matching_is_saved_and_read_back(tmp_path, tiny: TinyNet, images: Tensor) -> None:
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    model = as_similarity_model(tiny, preprocess=Preprocess(size=(24, 32)))
    pictures = match(model, tmp_path / "0.png", tmp_path / "1.png", "last")
    tensors = match(model, images[:3], torch.rand(3, 3, 16, 40), "last", score="squared")
    for name, result in (("files", pictures), ("tensors", tensors)):
        files = result.save(tmp_path / name, points=[(12, 9)])
        assert set(files) >= {"manifest", "arrays"}
        again = Matching.load(tmp_path / name)
        assert torch.equal(again.matrix, result.matrix)
        assert torch.equal(again.score, result.score)
        for field in ("score_name", "style", "layer", "model", "preprocess", "warnings"):
            assert getattr(again, field) == getattr(result, field)
        assert again.geometries == result.geometries
        # Points mean the same, although the pictures are not stored.
        torch.testing.assert_close(again.at(12, 9), result.at(12, 9))
        assert again.figure(points=[(12, 9)]).axes
        assert [side.shape for side in again.images] == [side.shape for side in result.images]
    assert (tmp_path / "tensors" / "matching_0002.png").stat().st_size > 10_000
    assert "<img" in pictures._repr_html_()
    assert tensors._repr_html_().count("<img") == 3


def test_zero_maps_stay_zero_and_lines_may_be_none(images: Tensor) -> None:
    network = Tailed("average", norm=False, linear=True, bias=False).eval()
    actual = match(network, torch.zeros(1, 3, 24, 32), images[:1], "act", score="dot")
    network.body.bias.data.zero_()
    blank = match(network, torch.zeros(1, 3, 24, 32), images[:1], "act", score="dot")
    assert blank.matrix.abs().max() == 0
    assert blank.best(3, 3).share == 0
    assert blank.top(2, mutual=True, by="specific") == ()
    for result in (actual, blank):
        assert result.figure(points=[], lines=0).axes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_gpu_gives_the_same(tiny: TinyNet, images: Tensor) -> None:
    wanted = match(tiny, images[:2], images[2:4], "last", score="squared")
    result = match(tiny.cuda(), images[:2], images[2:4], "last", score="squared")
    assert result.matrix.device.type == "cuda"
    torch.testing.assert_close(result.matrix.cpu(), wanted.matrix, rtol=1e-3, atol=1e-6)
    assert result.residual.abs().max() < 1e-4
    assert result.top(3, mutual=True, by="specific") is not None
    assert result.figure(points=[(12, 9)]).axes
