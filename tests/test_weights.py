"""Weight vectors against naive loops, and their edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from simexplain.comparison import Comparison
from simexplain.errors import ComparisonError
from simexplain.methods.similarity_attention import (
    WEIGHTS,
    flat_factors,
    scaled_weights,
    similarity_weights,
)


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def naive(comparison: Comparison, rule: str) -> Tensor:
    """The weights one dimension at a time, straight from the formulas."""
    out = torch.empty_like(comparison.anchor)
    for b in range(out.shape[0]):
        for t in range(out.shape[1]):
            a, w = float(comparison.anchor[b, t]), 1.0
            for p in comparison.positives[b, :, t].tolist():
                w *= {
                    "paper": 1 - abs(a - p),
                    "relative": 1 - abs(a - p) / (abs(a) + abs(p)),
                    "signed": 1 - abs(a - p),
                }[rule]
            for n in comparison.negatives[b, :, t].tolist():
                w *= {"paper": abs(a - n), "relative": abs(a - n), "signed": max(a - n, 0.0)}[rule]
            out[b, t] = w
    return out


@pytest.mark.parametrize("rule", WEIGHTS)
@pytest.mark.parametrize(("p", "n"), [(1, 0), (0, 1), (1, 1), (1, 2), (3, 4)])
def test_every_rule_equals_the_formula(rule: str, p: int, n: int) -> None:
    comparison = Comparison(unit(3, 7), unit(3, p, 7), unit(3, n, 7))
    torch.testing.assert_close(similarity_weights(comparison, rule), naive(comparison, rule))


def test_the_table_is_known_to_the_naive_loop() -> None:
    assert set(WEIGHTS) == {"paper", "relative", "signed"}


def test_no_underflow_over_many_negatives() -> None:
    comparison = Comparison(unit(2, 50), unit(2, 1, 50), unit(2, 400, 50))
    single = Comparison(*(part.float() for part in (
        comparison.anchor, comparison.positives, comparison.negatives)))  # fmt: skip
    weights, log_scale = scaled_weights(single)
    assert torch.equal(weights.amax(dim=1), torch.ones(2))
    assert (log_scale < -200).all()
    wanted, wanted_scale = scaled_weights(comparison)
    torch.testing.assert_close(weights.double(), wanted, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(log_scale.double(), wanted_scale, rtol=1e-4, atol=1e-3)
    assert torch.equal(similarity_weights(single), torch.zeros(2, 50))


def test_gradient_equals_finite_differences() -> None:
    anchor, positive, negative = unit(1, 5), unit(1, 1, 5), unit(1, 2, 5)

    def weights(a: Tensor) -> Tensor:
        return similarity_weights(Comparison(a, positive, negative))

    assert torch.autograd.gradcheck(weights, anchor.requires_grad_())


def test_identical_images_give_defined_weights() -> None:
    a = unit(1, 6)
    assert torch.equal(similarity_weights(Comparison.pair(a, a)), torch.ones_like(a))
    for rule in WEIGHTS:
        apart = similarity_weights(Comparison.pair(a, a, similar=False), rule)
        assert torch.equal(apart, torch.zeros_like(a))


def test_relative_is_zero_where_neither_is_active() -> None:
    a = torch.tensor([[0.6, 0.8, 0.0]])
    p = torch.tensor([[0.8, 0.6, 0.0]])
    result = similarity_weights(Comparison.pair(a, p), "relative")
    torch.testing.assert_close(result, torch.tensor([[6 / 7, 6 / 7, 0.0]]))


def test_flatness_is_told_where_it_is() -> None:
    flat = Comparison.pair(unit(2, 600), unit(2, 600))
    assert len(flat_factors(flat, "paper")) == 1
    assert "positive in place 1" in flat_factors(flat, "paper")[0]
    assert flat_factors(flat, "relative") == []
    spread = Comparison.pair(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert flat_factors(spread, "relative") == []


def test_unknown_rule() -> None:
    with pytest.raises(ComparisonError, match="paper, relative, signed"):
        similarity_weights(Comparison.pair(unit(1, 3), unit(1, 3)), "best")
