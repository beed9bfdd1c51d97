"""Warped pictures whose map is known, and how answers about them are counted."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

pytest.importorskip("skimage", reason="scikit-image has photographs: pip install -e .[dev]")
pytest.importorskip("sklearn", reason="scikit-learn has photographs: pip install -e .[dev]")
pytest.importorskip("torchvision")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import correspondence as bench
import warps
from faithfulness_networks import Network
from test_benchmark_faithfulness import folder, network  # noqa: F401

from simexplain import Preprocess, as_similarity_model

SIDE = warps.SIDE
WHOLE = np.ones((SIDE, SIDE), dtype=bool)
NOTHING = np.full(bench.COLUMNS, np.nan)


def ramp() -> warps.Subject:
    """A picture whose red says how far right and whose green how far down a pixel is."""
    places = (np.arange(SIDE) + 0.5) / SIDE
    right, down = np.meshgrid(places, places)
    pixels = np.stack([255 * right, 255 * down, 0 * right], axis=-1).round().astype(np.uint8)
    return warps.Subject(Image.fromarray(pixels), WHOLE)


def test_the_warped_picture_shows_what_the_map_says() -> None:
    subject = ramp()
    made = warps.pairs(subject, np.random.default_rng(0))
    assert [f"{pair.kind}, {pair.level}" for pair in made] == list(bench.WARPS)
    for pair in made:
        points, partners = warps.counted(pair, subject.inside)
        assert len(points) > 20
        pixels = np.asarray(pair.first)
        columns, rows = (points * SIDE).astype(int).T
        # The point lies at the corner of four pixels at most: half a pixel off.
        shown = pixels[rows, columns, :2] / 255
        inner = ((partners > 0.02) & (partners < 0.98)).all(axis=1)
        assert abs(shown - partners)[inner].max() < 3 / SIDE


def test_stronger_levels_move_points_further() -> None:
    moved = {level: [] for level in warps.LEVELS}
    for seed in range(4):
        for pair in warps.pairs(ramp(), np.random.default_rng(seed)):
            points, partners = warps.counted(pair, WHOLE)
            moved[pair.level].append(np.linalg.norm(points - partners, axis=1).mean())
    mild, medium, strong = (np.mean(one) for one in moved.values())
    assert 0.01 < mild < medium < strong < 0.4


@pytest.mark.parametrize("controls", warps.CONTROLS.values())
def test_without_jitter_a_map_is_a_turn(controls: int) -> None:
    along = warps.random_map(controls, 0, 30, np.random.default_rng(1))
    points = np.random.default_rng(2).uniform(size=(9, 2))
    out, back = points - 0.5, along(points) - 0.5
    np.testing.assert_allclose(np.linalg.norm(out, axis=1), np.linalg.norm(back, axis=1))
    cosines = (out * back).sum(axis=1) / (out**2).sum(axis=1)
    angle = np.rad2deg(np.arccos(cosines))
    assert np.ptp(angle) < 1e-4
    assert 15 <= angle[0] <= 30


def test_points_count_where_partners_are_of_interest() -> None:
    (pair, *_) = warps.pairs(ramp(), np.random.default_rng(0))
    left = WHOLE.copy()
    left[:, SIDE // 2 :] = False
    points, partners = warps.counted(pair, left)
    every, _ = warps.counted(pair, WHOLE)
    assert 0 < len(points) < len(every)
    assert partners[:, 0].max() < 0.5
    nowhere = warps.counted(pair, ~WHOLE)[0]
    assert nowhere.shape == (0, 2)


def test_each_photograph_comes_once_in_three_seeds(tmp_path: Path) -> None:
    Image.new("RGB", (300, 260), "red").save(tmp_path / "own.png")
    every = len(warps.every_photograph(tmp_path))
    assert every == len(warps.every_photograph(None)) + 1
    result = [warps.subjects(tmp_path, None, 0, seed)["photographs"] for seed in range(3)]
    assert sum(map(len, result)) == every
    means = [np.asarray(one.picture).mean() for own in result for one in own]
    assert len(set(means)) == every
    assert {one.picture.size for own in result for one in own} == {(SIDE, SIDE)}


def corners(side: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Centres of the cells of a grid, as shares, and each one's weights over the cells."""
    places = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    points = torch.stack(torch.meshgrid(places, places, indexing="xy"), dim=-1).reshape(-1, 2)
    return points, list(torch.eye(side * side, dtype=torch.float64))


def test_answers_are_counted_by_distance() -> None:
    points, weights = corners(4)
    right = torch.eye(16, dtype=torch.float64)
    np.testing.assert_allclose(bench.judged(right, weights, points, points), [1, 1, 1, 1, 1])
    # Every answer a cell to the left, a quarter of the side; those of the first column stay.
    shifted = torch.zeros_like(right)
    shifted[range(16), [index - (index % 4 > 0) for index in range(16)]] = 1
    result = bench.judged(shifted, weights, points, points)
    # Two columns answer with the first one, which answers with itself: three of four are mutual.
    np.testing.assert_allclose(result, [0.25, 0.25, 0.25, 0.75, 1 / 3])
    np.testing.assert_array_equal(bench.judged(right, [], points, points[:0]), NOTHING)


def test_a_constant_does_not_change_an_answer() -> None:
    points, weights = corners(4)
    matrix = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).double()
    expected = bench.judged(matrix, weights, points, points)
    np.testing.assert_allclose(bench.judged(matrix - 9, weights, points, points), expected)


def test_chance_is_the_area_of_a_disc() -> None:
    middle = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    result = bench._free(middle, bench.PLACES[None])[:3]
    np.testing.assert_allclose(result, np.pi * np.array(bench.TOLERANCES) ** 2, rtol=0.03)
    np.testing.assert_allclose(bench._free(middle, middle[:, None] + 0.08)[:3], [0, 0, 1])
    np.testing.assert_allclose(bench._free(middle, middle[:, None] + 0.06)[:3], [0, 1, 1])


class Pooled(nn.Module):
    """Two convolutions and a mean: all that is measured of it can be written by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.below = nn.Conv2d(3, 6, 8, 8)
        self.above = nn.Conv2d(6, 8, 2, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.above(self.below(images).relu()).mean(dim=(2, 3))


def test_answers_by_hand() -> None:
    prepare = Preprocess(size=(64, 64), mean=(0.5,) * 3, std=(0.5,) * 3, fit="squash")
    pooled = Pooled().eval()
    small = Network.of("pooled", as_similarity_model(pooled, preprocess=prepare))
    firsts, second = torch.randn(2, 3, 64, 64), torch.randn(3, 64, 64)
    layer = small.layers[0]
    result, frame = bench.answers(small, layer, firsts, second, deep=False)
    with torch.no_grad():
        a, b = (pooled.above(pooled.below(x).relu()) for x in (firsts, second[None]))
    parts = [one.flatten(2) / 16 for one in (a, b.expand(2, -1, -1, -1))]
    products = torch.einsum("mcn,mcr->mnr", *parts)
    lengths = [one.sum(dim=2).norm(dim=1) for one in parts]
    values = products / (lengths[0] * lengths[1])[:, None, None]
    special = values - values.mean(1, keepdim=True) - values.mean(2, keepdim=True)
    special = special + values.mean((1, 2), keepdim=True)
    cosines = torch.einsum("mcn,mcr->mnr", *(F.normalize(one, dim=1) for one in parts))
    # The gradient of the dot product by a feature is the other picture's vector over 16.
    others = [parts[1].sum(dim=2), parts[0].sum(dim=2)]
    weighed = [F.normalize(p * o[:, :, None], dim=1) for p, o in zip(parts, others, strict=True)]
    relevance = torch.einsum("mcn,mcr->mnr", *weighed)
    expected = dict(zip((*bench.OWN, *bench.SEEN), (values, special, cosines, relevance),
                        strict=True))  # fmt: skip
    assert set(result) == set(expected)
    for name, matrix in expected.items():
        torch.testing.assert_close(result[name], matrix, rtol=1e-3, atol=1e-5, msg=name)
    assert (frame.view, frame.grid) == ((64, 64), (4, 4))
    finer, _ = bench.answers(small, small.layers[1], firsts, second, deep=False)
    assert set(finer) == set(bench.SEEN)


def test_the_page_and_the_record(network, folder, tmp_path, monkeypatch) -> None:  # noqa: F811
    named = [("narrow", "seed0", replace(network, name="narrow"))]
    monkeypatch.setattr(bench, "networks", lambda options: named)
    monkeypatch.setattr(warps, "every_photograph", lambda folder: warps.photographs()[:2])
    record, page = tmp_path / "found.json", tmp_path / "page.md"
    kept = ["--record", str(record), "--out", str(page)]
    requested = ["--stamps", str(folder), "--cache", str(tmp_path / "cache"), "--scenes", "1"]
    bench.main([*requested, "--seeds", "0", "1", *kept])
    printed, text = json.loads(record.read_text()), page.read_text()
    result = printed["networks"]["narrow"]["default"]
    assert result["all"]["match, adds"]["n"] == 24
    assert result["photographs"]["chance"]["n"] == 12
    assert result["thin plate, strong"]["nearest neighbour"]["n"] == 4
    assert result["all"]["nearest neighbour"]["mean"][-1] == 0
    assert "match, adds" not in printed["networks"]["narrow"]["finer"]["all"]
    assert str(tmp_path) not in text
    monkeypatch.setattr(bench, "measured_pairs", None)
    bench.main([*requested, "--seeds", "0", "1", *kept])
    assert json.loads(record.read_text()) == printed
    bench.main(kept)
    assert page.read_text() == text
