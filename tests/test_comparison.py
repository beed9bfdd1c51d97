"""The container: roles, order, and refusals."""

from __future__ import annotations

import pytest
import torch

from simexplain.comparison import Comparison, arch_of, architecture, positives_of, roles
from simexplain.errors import ComparisonError


def batch(value: float, count: int = 2) -> torch.Tensor:
    return torch.full((count, 3, 4, 5), value)


def test_pair_triplet_quadruplet_are_one_thing() -> None:
    a, b, c, d = (batch(v) for v in (0.0, 1.0, 2.0, 3.0))
    assert Comparison.pair(a, b).roles == ("anchor", "positive")
    assert Comparison.pair(a, b, similar=False).roles == ("anchor", "negative")
    assert Comparison.triplet(a, b, c).roles == ("anchor", "positive", "negative")
    four = Comparison.quadruplet(a, b, c, d)
    assert four.roles == ("anchor", "positive", "negative", "negative")
    assert (four.batch, four.count) == (2, 4)
    assert four.stacked()[1, :, 0, 0, 0].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_like_and_restacked_undo_stacked() -> None:
    comparison = Comparison(torch.rand(2, 5), torch.rand(2, 3, 5), torch.rand(2, 2, 5))
    again = comparison.like(comparison.stacked())
    assert torch.equal(again.anchor, comparison.anchor)
    assert torch.equal(again.positives, comparison.positives)
    assert torch.equal(again.negatives, comparison.negatives)
    flat = comparison.stacked().flatten(0, 1)
    assert torch.equal(comparison.restacked(flat), comparison.stacked())
    with pytest.raises(ComparisonError, match="6 items"):
        comparison.like(torch.rand(2, 5, 7))


@pytest.mark.parametrize(
    ("anchor", "positives", "negatives", "said"),
    [
        (torch.rand(2, 4), torch.rand(2, 4), torch.rand(2, 1, 4), "one axis more"),
        (torch.rand(2, 4), torch.rand(2, 1, 5), torch.rand(2, 1, 4), "one size"),
        (torch.rand(2, 4), torch.rand(3, 1, 4), torch.rand(2, 1, 4), "one size"),
        (torch.rand(2, 4), torch.rand(2, 1, 4).double(), torch.rand(2, 1, 4), "float64"),
        (torch.rand(2, 4), torch.rand(2, 0, 4), torch.rand(2, 0, 4), "at least one"),
        (torch.rand(0, 4), torch.rand(0, 1, 4), torch.rand(0, 0, 4), "at least one"),
    ],
)
def test_what_does_not_fit_is_refused(anchor, positives, negatives, said: str) -> None:
    with pytest.raises(ComparisonError, match=said):
        Comparison(anchor, positives, negatives)


def test_images_without_a_batch_axis_are_refused() -> None:
    with pytest.raises(ComparisonError, match="unsqueeze"):
        Comparison.pair(torch.rand(4), torch.rand(4))
    with pytest.raises(ComparisonError, match="one size"):
        Comparison.quadruplet(batch(0), batch(0), batch(0), batch(0)[:, :, :2])


@pytest.mark.parametrize(
    ("arch", "count", "options", "positives"),
    [
        ("siamese", 2, {}, 1),
        ("siamese", 2, {"negative": True}, 0),
        ("triplet", 3, {}, 1),
        ("quadruplet", 4, {}, 1),
        ("set", 5, {"positives": 3}, 3),
        ("set", 2, {"positives": 0}, 0),
        (None, 2, {}, 1),
        (None, 2, {"negative": True}, 0),
        (None, 3, {}, 1),
    ],
)
def test_positives_of(arch: str, count: int, options: dict, positives: int) -> None:
    assert positives_of(arch, count, **options) == positives


@pytest.mark.parametrize(
    ("arch", "count", "options"),
    [
        ("siamese", 3, {}),
        ("triplet", 2, {}),
        ("triplet", 4, {}),
        ("quadruplet", 3, {}),
        ("set", 1, {}),
        ("set", 3, {"positives": 3}),
        ("set", 3, {"positives": -1}),
        ("pair", 2, {}),
        ("triplet", 3, {"negative": True}),
        ("triplet", 3, {"positives": 2}),
        (None, 1, {}),
        (None, 3, {"negative": True}),
        (None, 3, {"positives": 2}),
    ],
)
def test_positives_of_refuses(arch: str, count: int, options: dict) -> None:
    with pytest.raises(ComparisonError, match="Expected"):
        positives_of(arch, count, **options)


def test_the_number_of_images_says_pairs_and_triplets_alone() -> None:
    assert [arch_of(2), arch_of(3)] == ["siamese", "triplet"]
    with pytest.raises(ComparisonError, match=r"4 need an arch \(--arch\): quadruplet .* or set "):
        arch_of(4)
    with pytest.raises(ComparisonError, match=r"5 need an arch \(--arch\): set "):
        arch_of(5)


def test_names_of_arrangements() -> None:
    assert [architecture(*pn) for pn in ((1, 0), (0, 1), (1, 1), (1, 2), (2, 1), (0, 3))] == [
        "siamese", "siamese", "triplet", "quadruplet", "set", "set",
    ]  # fmt: skip
    assert roles(2, 1) == ("anchor", "positive", "positive", "negative")
