"""The quadruplet loss and its miner, against loops over images and against another library."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from simexplain.errors import ComparisonError, ModelError
from simexplain.losses.metric_losses import QuadrupletLoss, QuadrupletMiner, Quadruplets


def rows_of(count: int, size: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, size, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1)


LABELS = torch.tensor([2, 0, 1, 2, 1, 0, 0, 3])


def naive_quadruplets(rows: Tensor, labels: Tensor) -> list[tuple[int, int, int, int | None]]:
    """Every ordered pair of a class with its hardest negatives, image by image."""
    result = []
    for a in range(len(rows)):
        for p in range(len(rows)):
            if a == p or labels[a] != labels[p]:
                continue
            others = [n for n in range(len(rows)) if labels[n] != labels[a]]
            if not others:
                continue
            first = min(others, key=lambda n, a=a: float((rows[a] - rows[n]).norm()))
            third = [n for n in others if labels[n] != labels[first]]
            second = min(
                third, key=lambda n, m=first: float((rows[m] - rows[n]).norm()), default=None
            )
            result.append((a, p, first, second))
    return result


def naive_loss(
    rows: Tensor, result: list[tuple[int, int, int, int | None]], m1: float, m2: float, power: int
) -> float:
    def distance(one: int, other: int) -> float:
        return float((rows[one] - rows[other]).norm()) ** power

    first = [distance(a, p) - distance(a, n) + m1 for a, p, n, _ in result]
    second = [distance(a, p) - distance(n, k) + m2 for a, p, n, k in result if k is not None]
    return sum(
        sum(gap for gap in part if gap > 0) / max(1, sum(gap > 0 for gap in part))
        for part in (first, second)
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_miner_finds_the_hardest_of_three_classes(seed: int) -> None:
    rows = rows_of(8, seed=seed)
    result = QuadrupletMiner()(rows, LABELS)
    assert result.others is not None
    columns = (result.anchors, result.positives, result.negatives, result.others)
    listed = list(zip(*(column.tolist() for column in columns), strict=True))
    assert listed == naive_quadruplets(rows, LABELS)
    for a, p, n, k in listed:
        assert LABELS[a] == LABELS[p]
        assert len({int(LABELS[index]) for index in (a, n, k)}) == 3


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("margins", [(0.2, 0.1), (0.0, 0.0), (2.5, -0.3)])
def test_the_loss_is_that_of_a_loop(margins: tuple[float, float], squared: bool) -> None:
    rows = rows_of(8, seed=3)
    expected = naive_loss(rows, naive_quadruplets(rows, LABELS), *margins, 2 if squared else 1)
    loss = QuadrupletLoss(*margins, squared=squared)
    assert loss(rows, LABELS).item() == pytest.approx(expected, abs=1e-12)
    assert loss(rows, LABELS, QuadrupletMiner()(rows, LABELS)).item() == pytest.approx(expected)


def test_its_gradient_is_that_of_finite_differences() -> None:
    rows = rows_of(8, seed=1).requires_grad_()
    result = QuadrupletMiner()(rows, LABELS)
    loss = QuadrupletLoss(0.4, 0.3)
    assert torch.autograd.gradcheck(lambda x: loss(x, LABELS, result), (rows,))


def test_triplets_of_another_library_are_completed() -> None:
    """The first part alone is that library's triplet loss; its triplets get a second negative."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    rows = rows_of(8, seed=2)
    triplets = miners.BatchHardMiner()(rows, LABELS)
    alone = QuadrupletLoss(0.3, -100.0)(rows, LABELS, triplets)
    assert alone.item() == pytest.approx(
        losses.TripletMarginLoss(0.3)(rows, LABELS, triplets).item()
    )
    anchors, positives, negatives = (places.tolist() for places in triplets)
    whole = []
    for a, p, n in zip(anchors, positives, negatives, strict=True):
        third = [k for k in range(8) if LABELS[k] not in (LABELS[a], LABELS[n])]
        whole.append((a, p, n, min(third, key=lambda k, n=n: float((rows[n] - rows[k]).norm()))))
    result = QuadrupletLoss(0.3, 0.2)(rows, LABELS, triplets)
    assert result.item() == pytest.approx(naive_loss(rows, whole, 0.3, 0.2, 1))


def test_two_classes_leave_the_triplet_loss() -> None:
    rows, labels = rows_of(4), torch.tensor([0, 0, 1, 1])
    assert QuadrupletMiner()(rows, labels).others is None
    expected = naive_loss(rows, naive_quadruplets(rows, labels), 0.5, 9.0, 1)
    assert expected > 0
    assert QuadrupletLoss(0.5, 9.0)(rows, labels).item() == pytest.approx(expected)


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3]])
def test_nothing_to_compare_is_zero_and_still_in_the_graph(labels: list[int]) -> None:
    rows = rows_of(4).requires_grad_()
    loss = QuadrupletLoss()(rows, torch.tensor(labels))
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(rows.grad, torch.zeros_like(rows))


def test_equal_rows_have_a_gradient() -> None:
    rows = torch.ones(8, 3, dtype=torch.float64, requires_grad=True)
    QuadrupletLoss()(rows, LABELS).backward()
    assert not rows.grad.isnan().any()


def test_descending_brings_classes_together_and_negatives_apart() -> None:
    rows = rows_of(12, seed=5).requires_grad_()
    labels = torch.arange(4).repeat_interleave(3)
    optimiser = torch.optim.Adam([rows], lr=0.05)
    loss = QuadrupletLoss(0.5, 0.3)
    for _ in range(200):
        optimiser.zero_grad()
        loss(rows, labels).backward()
        optimiser.step()
    assert loss(rows, labels).item() == 0
    distances = torch.cdist(rows, rows).detach()
    same = labels[:, None] == labels
    assert distances[same].max() + 0.3 <= distances[~same].min()


def test_what_does_not_fit_is_refused() -> None:
    rows = rows_of(8)
    pairs = tuple(torch.zeros(1, dtype=torch.long) for _ in range(4))
    with pytest.raises(ComparisonError, match="use QuadrupletMiner"):
        QuadrupletLoss()(rows, LABELS, pairs)
    with pytest.raises(ModelError, match="a number as margin, got nan; give a finite number"):
        QuadrupletLoss(float("nan"))
    with pytest.raises(ModelError, match="finite margins"):
        QuadrupletLoss(float("inf"))


def test_given_quadruplets_are_taken_as_they_are() -> None:
    rows = rows_of(8, seed=4)
    one = Quadruplets(*(torch.tensor([index]) for index in (0, 3, 1, 2)))
    expected = naive_loss(rows, [(0, 3, 1, 2)], 1.0, 1.5, 1)
    assert QuadrupletLoss(1.0, 1.5)(rows, LABELS, one).item() == pytest.approx(expected)
