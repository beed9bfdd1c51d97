"""Gradients taken for those rows alone that have any, as where one token of many is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from simexplain.tapes import OPENED, plain_name, unwatched

_LINEAR = (F.linear, torch.ops.aten.linear.default)
_PRODUCTS = (
    torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm,
    torch.ops.aten.matmul.default, torch.ops.aten.bmm.default,
)  # fmt: skip
_ATTENTION = (
    F.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
_OPTIONS = ("attn_mask", "dropout_p", "is_causal")
Run = Callable[..., Tensor]


class RowGradients(TorchFunctionMode):
    """Lets gradients go through linear layers, products and attention for few rows, while entered.

    Each row of what these give comes from one row of their first argument: a token, or a query.
    Where the class token alone is read, the gradient of all other rows of the last block is zero,
    yet autograd multiplies it. Here the rows that have a gradient are looked for on the way back,
    and if they are less than half of all, the others are left out. Results are those of autograd to
    rounding; what the functions give on the way up is theirs to the bit.

    One gradient at a time, and none of a gradient; weights get none.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Calls a function, by rows where that is possible."""
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():  # below the layers, where most of a network is
            return func(*args, **kwargs)
        if plain_name(func) in OPENED:
            with self:
                return unwatched(func)(*args, **kwargs)
        if args and isinstance(args[0], Tensor):
            if func in _LINEAR and _is_linear(args, kwargs):
                return _ByRows.apply(lambda _, rows: func(rows, *args[1:], **kwargs), True, args[0])
            if func in _PRODUCTS and _is_product(args):
                return _ByRows.apply(lambda _, *given: func(*given), False, *args)
            if func in _ATTENTION:
                given, options = args[:3], {**dict(zip(_OPTIONS, args[3:], strict=False)), **kwargs}
                if _is_attention(given, options):
                    return _ByRows.apply(_attention(func, options), False, *given)
        return func(*args, **kwargs)


def _is_linear(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    rest = [*args[1:], *kwargs.values()]
    fixed = all(value is None or value.grad_fn is None for value in rest)
    return args[0].grad_fn is not None and args[0].dim() > 1 and fixed and _plain(args[:1])


def _is_product(args: Sequence[Any]) -> bool:
    wide = len(args) == 2 and all(isinstance(one, Tensor) and one.dim() > 1 for one in args)
    return wide and any(one.grad_fn is not None for one in args) and _plain(args)


def _is_attention(given: Sequence[Any], options: dict[str, Any]) -> bool:
    if len(given) != 3 or options.get("is_causal") or options.get("dropout_p"):
        return False
    mask = options.get("attn_mask")
    fixed = mask is None or mask.grad_fn is None
    return fixed and any(one.grad_fn is not None for one in given) and _plain(given)


def _plain(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing else happens to them on the way, such as a change of type by autocast."""
    return not any(torch.is_autocast_enabled(one.device.type) for one in tensors)


def _attention(func: Run, options: dict[str, Any]) -> Run:
    mask = options.get("attn_mask")

    def run(rows: Tensor | None, *given: Tensor) -> Tensor:
        if rows is None or mask is None or mask.shape[-2] == 1:
            return func(*given, **options)
        return func(*given, **{**options, "attn_mask": mask.index_select(-2, rows)})

    return run


class _ByRows(torch.autograd.Function):
    """A function whose rows come from those of its first argument each."""

    @staticmethod
    def forward(ctx: Any, run: Run, flat: bool, *given: Tensor) -> Tensor:
        """Runs it in a graph of its own.

        Args:
            ctx: Of autograd.
            run: Takes the numbers of rows, or None for all, and the arguments.
            flat: Whether all axes but the last have rows, and not the last but one alone.
            *given: The arguments ``(...,n,c)``.
        """
        inputs = [one.detach().requires_grad_(one.grad_fn is not None) for one in given]
        with torch.enable_grad():
            result = run(None, *inputs)
        ctx.kept = run, flat, inputs, [one._version for one in inputs], result
        return result.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of its arguments."""
        run, flat, inputs, versions, result = ctx.kept

        def listed(tensor: Tensor) -> Tensor:
            return tensor.flatten(0, -2) if flat else tensor

        felt = listed(gradient).ne(0).any(dim=-1)
        rows = felt.flatten(0, -2).any(dim=0) if felt.dim() > 1 else felt
        few = rows.nonzero().flatten()
        as_they_were = versions == [one._version for one in inputs]
        as_they_were = as_they_were and inputs[0].shape[:-1] == result.shape[:-1]
        wanted = [one for one in inputs if one.requires_grad]
        if 2 * len(few) >= len(rows) or not as_they_were:
            gradients = torch.autograd.grad(result, wanted, gradient, retain_graph=True)
        else:
            own = listed(inputs[0].detach()).index_select(-2, few)
            own.requires_grad_(inputs[0].requires_grad)
            with torch.enable_grad():
                part = run(few, own, *inputs[1:])
            wanted = [own if one is inputs[0] else one for one in wanted]
            share = listed(gradient).index_select(-2, few)
            gradients = torch.autograd.grad(part, wanted, share)
            if own.requires_grad:
                whole = torch.zeros_like(listed(inputs[0])).index_copy_(-2, few, gradients[0])
                gradients = (whole.view(inputs[0].shape), *gradients[1:])
        each = iter(gradients)
        return None, None, *(next(each) if one.requires_grad else None for one in inputs)
