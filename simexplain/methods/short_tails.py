"""Tails that read a few tokens of one attention alone, run for those tokens only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from simexplain.tapes import Call, Held, Tape

_SAME = 1e-4
_MOST = 4
"""Tokens that a class token, a distillation token and registers make."""


@dataclass(frozen=True)
class ShortTail:
    """What a network does above a layer, for the tokens alone that its vector reads.

    The last block of a class-token transformer attends for every token, but only the class token is
    read. Its query alone is needed of the attention, and everything above it for one token instead
    of all. The gradient is taken at the output of the linear layers that make queries, keys and
    values, one for all of them or one each: they act on each token by itself, so a change of a
    token goes through them by one product.
    Both make the same numbers as the whole tail, which is checked on every call.

    Attributes:
        tape: What was recorded.
        source: The layer's output, as recorded.
        attention: The number of the call of attention.
        tokens: How many tokens there are.
        read: How many of them, from the first on, are read.
        linears: The numbers of the calls of the linear layers; empty where others read the layer.
    """

    tape: Tape
    source: Tensor
    attention: int
    tokens: int
    read: int
    linears: tuple[int, ...]

    def run(
        self, output: Tensor, change: Tensor, held: Mapping[int, Held]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The vectors ``(n,E)`` when the layer gives another output, ready to be differentiated.

        Args:
            output: What the layer shall give ``(n,T,C)``.
            change: A change of it.
            held: Calls to be run in another way.

        Returns:
            The vectors, the tensor ``(n,T,C')`` that they are differentiable in, and the change of
            that tensor.
        """
        assert self.tape.result is not None
        point, sizes = output.detach(), [output.shape[-1]]
        ends = [self.source]
        if self.linears:
            calls = [self.tape.calls[number] for number in self.linears]
            ends = [call.outputs[0] for call in calls]
            sizes = [end.shape[-1] for end in ends]
            with torch.no_grad():
                point = torch.cat([call.run([point, *call.flat[1:]]) for call in calls], dim=-1)
                change = torch.cat([F.linear(change, call.flat[1]) for call in calls], dim=-1)
        point = point.requires_grad_()
        cut = {
            number: self._cut(held.get(number))
            for number in range(self.attention + 1, len(self.tape.calls))
        }
        ways = {**held, **cut, self.attention: self._attend}
        with torch.enable_grad():
            parts = torch.split(point.clone(), sizes, dim=-1)
        found = self.tape.replay(dict(zip(map(id, ends), parts, strict=True)), ways)
        return found[id(self.tape.result)], point, change

    def _attend(self, call: Call, flat: Sequence[Any]) -> Tensor:
        """Attention of the first queries, written out."""
        query, key, value = flat[:3]
        _, kwargs = call.arguments()
        scale = kwargs.get("scale") or query.shape[-1] ** -0.5
        weights = (query[..., : self.read, :] * scale) @ key.transpose(-2, -1)
        found: Tensor = weights.softmax(dim=-1) @ value
        return found

    def _cut(self, inner: Held | None) -> Held:
        """Runs a call above the attention for the tokens that are read."""

        def run(call: Call, flat: Sequence[Any]) -> Any:
            shorter = [
                self._shortened(new, call.name) if new is old else new
                for new, old in zip(flat, call.flat, strict=True)
            ]
            return call.run(shorter) if inner is None else inner(call, shorter)

        return run

    def _shortened(self, value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tokens = value.dim() >= 3 and value.shape[1] == self.tokens
            return value[:, : self.read] if tokens else value
        sized = name == "view" and type(value) is int and value == self.tokens
        return self.read if sized else value


def short_tail(tape: Tape, source: Tensor, held: Mapping[int, Held]) -> ShortTail | None:
    """Finds the tail of a layer that may be run for a few tokens; None where it may not.

    Args:
        tape: What was recorded.
        source: The layer's output, as recorded.
        held: Calls that are run in another way.
    """
    attention = [
        number
        for number, call in enumerate(tape.calls)
        if call.name == "scaled_dot_product_attention"
    ]
    if source.dim() != 3 or len(attention) != 1 or tape.result is None:
        return None
    number = attention[0]
    call = tape.calls[number]
    read = _rows_read(call, tape.result)
    if _masked(call) or not 0 < read <= _MOST or not _only_through(tape, number):
        return None
    found = ShortTail(
        tape, source, number, int(call.flat[0].shape[-2]), read, _linears(tape, source)
    )
    try:
        again = found.run(source.detach(), source.detach(), held)[0].detach()
        whole = tape.replay({id(source): source.detach()}, held)[id(tape.result)].detach()
    except (RuntimeError, ValueError, IndexError, KeyError):
        return None
    close = again.shape == whole.shape and bool((again - whole).norm() <= _SAME * whole.norm())
    return found if close else None


def _masked(call: Call) -> bool:
    args, kwargs = call.arguments()
    names = ("attn_mask", "dropout_p", "is_causal")
    others = [
        args[n + 3] if len(args) > n + 3 else kwargs.get(name) for n, name in enumerate(names)
    ]
    return any(other is not None and bool(torch.as_tensor(other).any()) for other in others)


def _rows_read(call: Call, result: Tensor) -> int:
    """How many rows of an attention, from the first on, a vector depends on; 0 for others."""
    output = call.outputs[0]
    if not (result.requires_grad and output.requires_grad) or output.dim() != 4:
        return 0
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randn(result.shape, generator=generator).to(result)
    (found,) = torch.autograd.grad(result, output, slopes, retain_graph=True, allow_unused=True)
    if found is None:
        return 0
    rows = (found != 0).any(dim=3).any(dim=1).any(dim=0).nonzero().flatten().tolist()
    return len(rows) if rows == list(range(len(rows))) else 0


def _only_through(tape: Tape, attention: int) -> bool:
    """Whether all that follows the attention depends on the layer through it alone."""
    above = set(tape.calls[attention].values)
    for call in tape.calls[attention + 1 :]:
        if not above.issuperset(call.inputs.values()):
            return False
        above.update(call.values)
    return True


def _linears(tape: Tape, source: Tensor) -> tuple[int, ...]:
    """The linear layers that read a layer's output, as it is, where nothing else reads it."""
    value = tape.number_of(source)
    for _ in range(2):  # the copy of the output, and what reads it
        users = [n for n, call in enumerate(tape.calls) if value in call.inputs.values()]
        calls = [tape.calls[number] for number in users]
        if all(
            call.name == "linear" and call.inputs.keys() == {0} and call.outputs[0].dim() == 3
            for call in calls
        ):
            return tuple(users)
        if len(calls) != 1 or getattr(calls[0].func, "__name__", "") != "clone":
            return ()
        value = calls[0].values[0]
    return ()
