"""Gradients by rows are those of autograd, and cost what their rows cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from simexplain.row_gradients import RowGradients
from simexplain.tapes import Tape

TOKENS, WIDTH = 10, 8


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


WEIGHT, BIAS = nn.Parameter(seeded(6, WIDTH)), nn.Parameter(seeded(6))
MASK = seeded(1, 1, TOKENS, TOKENS)


def heads(tokens: Tensor) -> Tensor:
    return tokens.unflatten(-1, (2, 4)).transpose(1, 2)


def written_out(tokens: Tensor) -> Tensor:
    scores = heads(tokens) @ heads(tokens.sin()).transpose(2, 3)
    return (scores.softmax(3) @ heads(tokens.cos())).transpose(1, 2).flatten(2)


def attended(tokens: Tensor, **options: object) -> Tensor:
    result = F.scaled_dot_product_attention(
        heads(tokens), heads(tokens.sin()), heads(tokens.cos()), **options
    )
    return result.transpose(1, 2).flatten(2)


def few_heads(tokens: Tensor) -> Tensor:
    own = heads(tokens)
    return F.scaled_dot_product_attention(own, own[:, :1], own.sin()[:, :1], enable_gqa=True)


def in_place(tokens: Tensor) -> Tensor:
    result = F.linear(tokens * 1, WEIGHT, BIAS)
    result += 1
    return F.relu_(result)


def overwritten(tokens: Tensor) -> Tensor:
    own = tokens * 1
    result = F.linear(own, WEIGHT.detach())
    own.mul_(3)
    return result


def by_queries(tokens: Tensor) -> Tensor:
    queries = nn.Parameter(seeded(1, 2, TOKENS, 4))
    return F.scaled_dot_product_attention(queries, heads(tokens), heads(tokens))


def module(tokens: Tensor) -> Tensor:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(WIDTH, 2, batch_first=True).eval()
    return layer(tokens, tokens, tokens, need_weights=False)[0]


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda t: F.linear(t, WEIGHT, BIAS),
    "linear by name": lambda t: F.linear(t, weight=WEIGHT, bias=BIAS),
    "operator": lambda t: torch.ops.aten.linear.default(t, WEIGHT, BIAS),
    "tokens first": lambda t: F.linear(t.transpose(0, 1), WEIGHT).transpose(0, 1),
    "weights of the tokens": lambda t: F.linear(t, t[0, :6] * 2),
    "product": lambda t: t @ t.transpose(1, 2),
    "product with a vector": lambda t: (t @ seeded(WIDTH))[..., None],
    "two axes": lambda t: torch.mm(t[0], t[1].T),
    "batched product": lambda t: torch.bmm(t, t.transpose(1, 2)),
    "one for all": lambda t: t[:, None] @ seeded(2, WIDTH, 3),
    "written out": written_out,
    "attention": attended,
    "masked": lambda t: attended(t, attn_mask=MASK),
    "masked for all": lambda t: attended(t, attn_mask=MASK[..., :1, :]),
    "mask of the tokens": lambda t: attended(t, attn_mask=t[:, None, :, :1] * MASK),
    "scaled": lambda t: attended(t, scale=0.1),
    "causal": lambda t: attended(t, is_causal=True),
    "few heads": few_heads,
    "in place": in_place,
    "overwritten": overwritten,
    "learned queries": by_queries,
    "module": module,
}
READ: dict[str, Callable[[Tensor], Tensor]] = {
    "one": lambda out: out.movedim(-2, 0)[0],
    "some": lambda out: out.movedim(-2, 0)[[1, 4, 2]],
    "all": lambda out: out,
    "none": lambda out: out.movedim(-2, 0)[:0],
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("taped", [False, True])
def test_gradients_are_those_of_autograd(name: str, read: str, taped: bool) -> None:
    def gradient(*, by_rows: bool) -> tuple[Tensor, list[Tensor]]:
        tokens = seeded(2, TOKENS, WIDTH).requires_grad_()
        tape = Tape()
        with RowGradients() if by_rows else torch.enable_grad():
            if taped:
                with tape:
                    tape.start(tokens)
                    out = FUNCTIONS[name](tokens * 1)
                assert not tape.broken
                assert tape.number_of(out) is not None
            else:
                out = FUNCTIONS[name](tokens * 1)
        score = READ[read](out.tanh()).square().sum()
        twice = [torch.autograd.grad(score, tokens, retain_graph=True)[0] for _ in range(2)]
        return out.detach(), twice

    (out, own), (expected, plain) = gradient(by_rows=True), gradient(by_rows=False)
    assert torch.equal(out, expected)
    for one in own:
        torch.testing.assert_close(one, plain[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "tokens first", "written out", "attention", "module"])
def test_the_gradient_of_one_token_costs_less(name: str) -> None:
    def cost(*, by_rows: bool) -> int:
        tokens = seeded(1, 20 * TOKENS, WIDTH).requires_grad_()
        with RowGradients() if by_rows else torch.enable_grad():
            score = FUNCTIONS[name](tokens * 1)[:, 0].sum()
        with FlopCounterMode(display=False) as counted:
            torch.autograd.grad(score, tokens)
        return int(counted.get_total_flops())

    # Of a module of attention, keys and values of every token have a gradient.
    assert cost(by_rows=True) <= (0.5 if name == "module" else 0.05) * cost(by_rows=False)


def test_a_gradient_of_a_gradient_is_refused() -> None:
    tokens = seeded(1, TOKENS, WIDTH).requires_grad_()
    with RowGradients():
        score = F.linear(tokens * 1, WEIGHT)[:, 0].square().sum()
    (result,) = torch.autograd.grad(score, tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        result.sum().backward()
