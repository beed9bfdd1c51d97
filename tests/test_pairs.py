"""Models of two images: unshared towers, learned scores, template and search image."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import DEMO, TinyNet
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain import (
    Comparison,
    PairExplanation,
    Preprocess,
    as_pair_model,
    as_similarity_model,
    build_index,
    explain,
)
from simexplain.data.images import read_picture
from simexplain.errors import ComparisonError, ModelError
from simexplain.explaining_tensors import SCORED
from simexplain.methods.focus import Focus
from simexplain.metrics.curves import elsewhere, hidden, hottest


class Head(nn.Module):
    """A learned score of two vectors; random in training mode."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.mix = nn.Linear(3 * width, 12)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(12, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        both = torch.cat((a, b, (a - b).abs()), dim=1)
        return self.out(self.drop(self.mix(both).tanh()))


class Tracker(nn.Module):
    """One tower for a template and a larger search image, correlated as in SiamFC."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.act = nn.ReLU()
        self.last = nn.Conv2d(8, 6, 3, stride=2)

    def forward(self, template: Tensor, search: Tensor) -> Tensor:
        z, x = (self.last(self.act(self.stem(images))) for images in (template, search))
        response = F.conv2d(x.reshape(1, -1, *x.shape[-2:]), z, groups=len(x))
        return response[0].flatten(1).amax(dim=1)


def grad_cam(score: Tensor, activation: Tensor) -> Tensor:
    """Grad-CAM of one score at one activation ``(1,C,h,w)``, by plain autograd."""
    (gradient,) = torch.autograd.grad(score.sum(), activation, retain_graph=True)
    return (gradient.mean((2, 3), keepdim=True) * activation).sum(1).relu()[0].detach()


def outputs_of(layer: nn.Module, into: list[Tensor]):
    return layer.register_forward_hook(lambda _m, _a, out: into.append(out))


def test_template_and_search_image_of_two_sizes_equal_plain_autograd() -> None:
    net = Tracker().eval()
    templates, searches = torch.rand(2, 3, 31, 31), torch.rand(2, 3, 63, 63)
    result = explain(as_pair_model(net), Comparison.pair(templates, searches))
    assert result.maps[0].shape == (2, 1, 7, 7)
    assert result.maps[1].shape == (2, 1, 15, 15)
    assert result.heatmaps[1].shape == (2, 1, 63, 63)
    for index in range(2):
        kept: list[Tensor] = []
        handle = outputs_of(net.last, kept)
        score = net(templates[index, None], searches[index, None])
        handle.remove()
        torch.testing.assert_close(result.score[index], score[0].detach())
        for side in range(2):
            wanted = grad_cam(score, kept[side])
            torch.testing.assert_close(result.maps[side][index, 0], wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shared", [True, False])
def test_a_learned_head_on_towers_equals_plain_autograd(shared: bool) -> None:
    one, two, head = TinyNet().eval(), TinyNet(width=9).eval(), Head().eval()
    two = one if shared else two
    pair = as_pair_model(one, None if shared else two, head=head)
    a, b = torch.rand(1, 3, 24, 32), torch.rand(1, 3, 40, 40)
    result = explain(pair, Comparison.pair(a, b), keep_negative=False)
    kept: list[Tensor] = []
    handles = [outputs_of(tower.last, kept) for tower in ([one] if shared else [one, two])]
    score = head(one(a), two(b))
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(result.score, score[:, 0].detach())
    torch.testing.assert_close(pair.score(a, b), score[:, 0])
    for side in range(2):
        wanted = grad_cam(score, kept[side])
        torch.testing.assert_close(result.maps[side][0, 0], wanted, rtol=1e-4, atol=1e-8)
    assert result.first.layers == ("last",)


def focus_by_hand(score: Tensor, act: Tensor, last: Tensor) -> Tensor:
    """``focus`` along the gradient of a score, without Gaussian and detail."""
    (slope,) = torch.autograd.grad(score.sum(), last, retain_graph=True)
    cells = F.cosine_similarity(slope.mean((2, 3), keepdim=True), last, dim=1)
    cells = cells - cells.detach().mean()
    evidence = (F.softplus(20 * cells) * last.detach().norm(dim=1)).sum()
    (gradient,) = torch.autograd.grad(evidence, act, retain_graph=True)
    cam = (gradient.relu() * act).sum(1)[0].detach()
    grown = F.interpolate(cells[None].detach(), act.shape[2:], mode="bilinear")[0, 0]
    own = cam / cam.max() * torch.sigmoid(20 * grown)
    return (own / own.max()) ** 3


def test_where_a_learned_score_comes_from_and_its_check() -> None:
    """Two rows, and what hiding costs the score, by plain autograd and the head itself."""
    one, head = TinyNet().eval(), Head().eval()
    pair = as_pair_model(one, head=head)
    images = torch.rand(2, 3, 24, 32)
    a, b = images[:1], images[1:]
    options = {"smoothing": 0, "detail": 0, "peak": 3, "positions": 1}
    focus = explain(pair, Comparison.pair(a, b), "focus", **options)
    assert focus.first.layers == ("act", "last")
    both = explain(pair, Comparison.pair(a, b))
    for side, image, other in ((0, a, b), (1, b, a)):
        kept: dict[str, list[Tensor]] = {"act": [], "last": []}
        handles = [outputs_of(getattr(one, name), into) for name, into in kept.items()]
        vector = one(image)
        for handle in handles:
            handle.remove()
        vectors = (vector, one(other)) if side == 0 else (one(other), vector)
        wanted = focus_by_hand(head(*vectors), kept["act"][0], kept["last"][0])
        torch.testing.assert_close(focus.maps[side][0, 0], wanted, rtol=1e-3, atol=1e-6)
        explained = both.sides[side]
        assert [row.method for row in explained.rows] == ["similarity_cam", "focus"]
        assert explained.agreement()[0].text
        for row in explained.rows:
            for where, falls in ((hottest, "falls"), (lambda x: elsewhere(hottest(x)), "controls")):
                veiled = hidden(image[0], where(row.heatmaps[0, 0]))[None]
                with torch.no_grad():
                    pairs = ((a, b), (veiled, b) if side == 0 else (a, veiled))
                    whole, after = (float(head(one(x), one(y))) for x, y in pairs)
                found = float(getattr(row.check, falls)[0, 0])
                assert found == pytest.approx(whole - after, abs=1e-6)
                assert row.check.moved.isnan().all()


def test_a_pair_model_that_focus_cannot_explain_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ModelError("No positions here.")

    monkeypatch.setattr(Focus, "attribute", refuse)
    images = torch.rand(2, 3, 31, 31)
    result = explain(as_pair_model(TinyNet(), head=Head()), Comparison.pair(images[:1], images[1:]))
    assert result.first.others == ()
    assert any("focus cannot be used here: No positions" in line for line in result.warnings)


def test_two_towers_share_the_weights_of_a_triplet() -> None:
    """Similarity attention of a query tower and a gallery tower, by plain autograd."""
    query, gallery = TinyNet().eval(), TinyNet(width=9).eval()
    a, p, n = torch.rand(1, 3, 24, 32), torch.rand(1, 3, 40, 40), torch.rand(1, 3, 40, 40)
    result = explain(as_pair_model(query, gallery), Comparison.triplet(a, p, n))
    kept: list[Tensor] = []
    handles = [outputs_of(tower.last, kept) for tower in (query, gallery)]
    rows = [F.normalize(tower(x), dim=1) for tower, x in ((query, a), (gallery, p), (gallery, n))]
    for handle in handles:
        handle.remove()
    fa, fp, fn = (row.detach() for row in rows)
    weight = (1 - (fa - fp).abs()) * (fa - fn).abs()
    maps = (result.maps[0][0, 0], *result.maps[1][0])
    for actual, row, activation in zip(maps, rows, kept, strict=True):
        wanted = grad_cam((weight * row).sum(), activation)
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-9)
    distances = torch.cat([(fa - fp).norm(dim=1), (fa - fn).norm(dim=1)])
    torch.testing.assert_close(result.distances[0], distances)
    assert result.condition().holds is bool(distances[0] < distances[1])


@pytest.mark.parametrize("method", ["sam", *SCORED])
def test_every_method_for_scores_gives_a_map_and_touches_nothing(method: str) -> None:
    one, head = TinyNet(), Head().train()
    weight = head.out.weight.detach().clone()
    images = torch.rand(2, 3, 24, 32)
    options = {"random_masks": {"masks": 9}, "smoothgrad": {"samples": 2}}.get(method, {})
    pair = as_pair_model(one, head=head)
    first = explain(pair, Comparison.pair(images[:1], images[1:]), method, **options)
    again = explain(pair, Comparison.pair(images[:1], images[1:]), method, **options)
    assert torch.equal(first.maps[0], again.maps[0])
    assert float(first.maps[1].abs().max()) > 0
    assert head.training
    assert head.drop.training
    assert torch.equal(head.out.weight, weight)
    assert all(p.grad is None for p in [*one.parameters(), *head.parameters()])


def test_the_random_state_is_left_alone() -> None:
    pair = as_pair_model(Tracker())
    images = Comparison.pair(torch.rand(1, 3, 31, 31), torch.rand(1, 3, 63, 63))
    before = torch.get_rng_state()
    explain(pair, images)
    assert torch.equal(torch.get_rng_state(), before)


def test_results_save_load_and_draw(tmp_path: Path) -> None:
    two = explain(
        as_pair_model(TinyNet(), TinyNet()),
        Comparison.triplet(torch.rand(1, 3, 24, 32), *torch.rand(2, 1, 3, 40, 40)),
    )
    learned = explain(
        as_pair_model(Tracker()),
        Comparison.pair(torch.rand(2, 3, 31, 31), torch.rand(2, 3, 63, 63)),
    )
    for name, result in (("two", two), ("learned", learned)):
        files = result.save(tmp_path / name)
        assert all(Path(path).exists() for path in files.values())
        again = PairExplanation.load(tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(again.maps, result.maps, strict=True))
        assert again.condition() == result.condition()
        again.figure()


def test_what_cannot_work_is_one_sentence(tmp_path: Path) -> None:
    pair = as_pair_model(Tracker())
    images = torch.rand(3, 3, 31, 31)
    for call, record in (
        (lambda: build_index(pair, DEMO, tmp_path / "x"), "A pair model compares two images"),
        (lambda: as_similarity_model(Tracker()), "takes template, search; for a score of two"),
        (lambda: as_pair_model("net"), "Expected an nn.Module as first, got 'net'; load"),
        (lambda: explain(pair, Comparison.pair(*images[:2, None]), "avsl"), "method 'avsl' does"),
        (lambda: as_pair_model(TinyNet(), TinyNet()).score(images, images), "no learned score"),
    ):
        with pytest.raises(ModelError, match=record) as caught:
            call()
        assert str(caught.value).endswith(".")
    with pytest.raises(ComparisonError, match="pairs for a learned score"):
        explain(pair, Comparison.triplet(*images[:, None]))
    narrow = as_pair_model(TinyNet(), TinyNet(embedding=4))
    with pytest.raises(ModelError, match="one width, got 10 and 4"):
        explain(narrow, Comparison.pair(*images[:2, None]))


def test_picture_files_of_two_sizes(tmp_path: Path) -> None:
    pair = as_pair_model(
        Tracker(),
        preprocess=Preprocess(size=(31, 31), fit="squash"),
        second_preprocess=Preprocess(size=(63, 63), fit="squash"),
    )
    paths = [DEMO / f"{role}.jpg" for role in ("anchor", "positive")]
    result = explain(pair, [paths[0], *paths[1:]], arch="set", positives=len(paths[1:]))
    tensors = [
        tower.preprocess(read_picture(path).image)[0][None]
        for tower, path in zip((pair.first, pair.second), paths, strict=True)
    ]
    wanted = explain(pair, Comparison.pair(*tensors))
    assert all(torch.equal(a, b) for a, b in zip(result.maps, wanted.maps, strict=True))
    shown, heat = result.second.on_picture(0)
    assert shown.shape[:2] == heat.shape == read_picture(paths[1]).image.size[::-1]
    result.save(tmp_path / "out")
