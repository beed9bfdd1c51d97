"""Every attention of one forward pass, in the autograd graph, whatever library computes it.

A ``TorchFunctionMode`` sees the calls of torch's functions while a network runs. Fused attention
(``F.scaled_dot_product_attention``) hides its probabilities, so they are computed openly instead,
and ``nn.MultiheadAttention`` runs torch's own code with the mode active inside. A softmax over the
last axis counts as attention once its result multiplies values. No module is changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError
from torch.utils.weak import WeakTensorKeyDictionary

from simexplain.errors import ModelError
from simexplain.networks import at_least_single, preserve_state
from simexplain.tapes import unwatched
from simexplain.tracing import Traceable, chunks_of

UNREACHED = (
    "No gradient of the embedding reaches all attention of the network: a part of it runs under "
    "torch.no_grad(), is detached or does not feed the embedding; change that or use a method that "
    "needs no attention."
)

_HALF_SCALE = 1024.0
_FUSED = "scaled_dot_product_attention"
_SOFTMAX = ("softmax", "_softmax", "_safe_softmax")
_PRODUCTS = ("matmul", "bmm", "baddbmm", "__matmul__")
_CONVOLUTIONS = ("conv2d", "convolution", "_convolution")
# What exchanges the axes of a square matrix of attention keeps its shape and not its meaning.
_EXCHANGING = {
    "transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "adjoint",
    "__get__",
}  # fmt: skip


@dataclass(frozen=True)
class Attention:
    """One call of attention for one chunk of images, as the network shaped it.

    Attributes:
        weights: The probabilities ``(...,Tq,Tk)``, in the graph.
        output: The mean of the values that they weigh ``(...,Tq,d)``, in the graph, or None where
            its axes are not known (``einsum``).
        queries: ``(...,Tq,c)``, detached, or None where they are not known.
        keys: ``(...,Tk,c)``, likewise.
        values: ``(...,Tk,d)``, likewise.
        grids: Rows and columns of the convolutions' outputs so far, the latest last.
    """

    weights: Tensor
    output: Tensor | None
    queries: Tensor | None
    keys: Tensor | None
    values: Tensor | None
    grids: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class AttentionTrace:
    """One forward pass with all its attention.

    Attributes:
        embeddings: Rows ``(M,E)`` in the graph.
        calls: For each call in order of execution one entry a chunk of images.
        sizes: How many images each chunk had, fillers included.
        hidden: How many more times a softmax of queries times keys did not multiply values in any
            way that could be followed, such as heads that are mixed in between.
    """

    embeddings: Tensor
    calls: tuple[tuple[Attention, ...], ...]
    sizes: tuple[int, ...]
    hidden: int

    def feeds(self, first: int, second: int) -> bool:
        """Whether the probabilities of one call depend on those of an earlier one."""
        given, made = (self.calls[number][0].weights for number in (first, second))
        if not made.requires_grad:
            return False
        with torch.enable_grad():
            total = made.square().sum()  # the sum itself is constant
        (slope,) = _gradients(total, [given])
        return slope is not None

    def gradients(self, score: Tensor, chosen: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """The gradient of a score with respect to tensors of the calls.

        Args:
            score: Numbers computed from :attr:`embeddings`, whose sum is meant.
            chosen: Weights or outputs, for each call one tensor a chunk.

        Returns:
            As ``chosen``, in float32 or float64.

        Raises:
            ModelError: If the score does not depend on one of them.
        """
        inputs = [tensor for call in chosen for tensor in call]
        slopes = [one for one in self._slopes(score, inputs) if one is not None]
        if len(slopes) < len(inputs):
            raise ModelError(UNREACHED)
        ready = (at_least_single(one) / _HALF_SCALE for one in slopes)
        return [[next(ready) for _ in call] for call in chosen]

    def reached(self, score: Tensor, calls: Sequence[int]) -> list[bool]:
        """For some calls whether a score depends on their probabilities, by its gradient."""
        given = [self.calls[number][0].weights for number in calls]
        return [slope is not None for slope in self._slopes(score, given)]

    def _slopes(self, score: Tensor, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Gradients times a constant, since small ones of half precision would become zero."""
        if not score.requires_grad:
            return [None] * len(inputs)
        with torch.enable_grad():  # also where the caller has switched it off
            scaled = score.sum() * _HALF_SCALE
        return _gradients(scaled, inputs)


def _gradients(total: Tensor, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Gradients of a scalar, None where it does not depend on an input.

    Raises:
        ModelError: If a part of the network is computed again in the backward pass.
    """
    try:
        return torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True)
    except CheckpointError as error:
        raise ModelError(
            "The network uses gradient checkpointing, which computes its attention again in the "
            "backward pass, where it cannot be recorded; switch checkpointing off."
        ) from error


@contextmanager
def _uncompiled(network: nn.Module) -> Iterator[None]:
    """Runs modules that ``module.compile()`` compiled as they were written."""
    if all(module._compiled_call_impl is None for module in network.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def record_attention(
    model: Traceable, images: Tensor, *, max_batch: int | None = None
) -> AttentionTrace:
    """Runs the model once and keeps all its attention in the autograd graph.

    The graph begins at the first attention; nothing below it is tracked. Modes, gradients, images
    and random state are as before afterwards.

    Args:
        model: The model; it is evaluated with every submodule in eval mode.
        images: Preprocessed images ``(M,3,H,W)``.
        max_batch: Bounds the images in one forward pass; results do not depend on it.

    Raises:
        ModelError: If the model has no visible layers or its calls differ between images.
    """
    if reason := getattr(model.network, "sealed", ""):  # a black box
        raise ModelError(reason)
    size = model.pass_size(len(images), max_batch)
    rows, recorded, sizes, hidden = [], [], [], 0
    for chunk in chunks_of(images, size, fixed=model.batch_size is not None):
        recorder = _Recorder()
        with preserve_state(model.network), _uncompiled(model.network), torch.no_grad(), recorder:
            # A copy: a network may normalise its input in place.
            rows.append(model.embed(chunk.detach().clone()))
        recorded.append(recorder.recorded)
        sizes.append(len(chunk))
        hidden = recorder.hidden
    if len({len(maps) for maps in recorded}) > 1:
        raise ModelError(
            "The model does not attend equally often in every forward pass, so its attention "
            "cannot be compared between images; use a method on pixels."
        )
    with torch.enable_grad():  # a caller's no_grad must not cut what was just recorded
        embeddings = torch.cat(rows)[: len(images)] if len(rows) > 1 else rows[0][: len(images)]
    calls = tuple(zip(*recorded, strict=True))
    return AttentionTrace(embeddings, calls, tuple(sizes), hidden)


@dataclass(frozen=True)
class _Logits:
    """Marks what came of queries times keys."""

    queries: Tensor | None
    keys: Tensor | None


@dataclass(frozen=True)
class _Weights:
    """Marks what came of a softmax over such products."""

    weights: Tensor
    logits: _Logits
    number: int


class _Recorder(TorchFunctionMode):
    """Keeps the attention of what runs inside, and starts the autograd graph at the first."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[Attention] = []
        self._grids: list[tuple[int, int]] = []
        self._pending: set[int] = set()
        self._softmaxes = 0
        self._marks: Any = WeakTensorKeyDictionary()
        self._handlers: dict[str, Callable[..., Any]] = {
            _FUSED: self._fused,
            "multi_head_attention_forward": self._multi_head,
            "einsum": self._einsum,
            **dict.fromkeys(_SOFTMAX, self._softmax),
            **dict.fromkeys(_PRODUCTS, self._product),
            **dict.fromkeys(_CONVOLUTIONS, self._convolution),
        }

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # Exported programs call `softmax.int` where modules call `softmax`.
        name = str(getattr(func, "__name__", "")).partition(".")[0]
        named = dict(kwargs or {})
        if handler := self._handlers.get(name):
            return handler(func, *args, **named)
        result = func(*args, **named)
        if isinstance(result, Tensor) and name not in _EXCHANGING and self._marks:
            for given in (*args, *named.values()):
                same = isinstance(given, Tensor) and given.shape[-2:] == result.shape[-2:]
                if same and (mark := self._mark(given)) is not None:
                    self._marks[result] = mark
        return result

    @property
    def hidden(self) -> int:
        """Softmaxes of queries times keys that were not seen to multiply values."""
        return len(self._pending)

    def _mark(self, given: Any) -> _Logits | _Weights | None:
        mark: _Logits | _Weights | None = None
        if isinstance(given, Tensor):
            mark = self._marks.get(given)
        return mark

    def _convolution(self, func: Callable[..., Any], *args: Any, **named: Any) -> Any:
        result = func(*args, **named)
        if isinstance(result, Tensor) and result.dim() == 4:
            grid = (int(result.shape[2]), int(result.shape[3]))
            if not self._grids or self._grids[-1] != grid:
                self._grids.append(grid)
        return result

    def _multi_head(self, func: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Torch's own function, seen from inside."""
        with self:
            return unwatched(func)(*args, **named)

    def _fused(self, func: Callable[..., Any], *args: Any, **named: Any) -> Tensor:
        logits, query, key, value, dropout = _fused_logits(*args, **named)
        weights = self._opened(_safe_softmax(logits))
        shown = weights.clone()
        if dropout:
            shown = F.dropout(shown, dropout)
        output = (shown @ value.to(shown.dtype)).to(query.dtype)
        return self._kept(weights, output, _Logits(query.detach(), key.detach()), value)

    def _softmax(self, func: Callable[..., Any], *args: Any, **named: Any) -> Any:
        result = func(*args, **named)
        given = args[0] if args else named.get("input", named.get("self"))
        dim = named.get("dim", args[1] if len(args) > 1 else None)
        if not isinstance(result, Tensor) or result.dim() < 3:
            return result
        if dim not in (-1, result.dim() - 1):
            return result
        mark = self._mark(given)
        weights = self._opened(result)
        shown = weights.clone()  # a later in-place operation works on the copy
        known = _Logits(None, None)
        if isinstance(mark, _Logits):
            known = mark
        if isinstance(mark, _Logits) or (result.dim() == 4 and min(result.shape[2:]) > 1):
            self._pending.add(self._softmaxes)
        self._marks[shown] = _Weights(weights, known, self._softmaxes)
        self._softmaxes += 1
        return shown

    def _product(self, func: Callable[..., Any], *args: Any, **named: Any) -> Any:
        result = func(*args, **named)
        left, right = args[-2:] if len(args) > 1 else (None, None)
        if not (isinstance(left, Tensor) and isinstance(right, Tensor)) or left.dim() < 3:
            return result
        mark = self._mark(left)
        if isinstance(mark, _Weights):
            self._pending.discard(mark.number)
            return self._kept(mark.weights, result, mark.logits, right)
        if right.dim() == left.dim():
            self._marks[result] = _Logits(left.detach(), right.detach().transpose(-2, -1))
        return result

    def _einsum(self, func: Callable[..., Any], *args: Any, **named: Any) -> Any:
        result = func(*args, **named)
        for given in args[1:]:
            mark = self._mark(given)
            if isinstance(mark, _Weights):
                self._pending.discard(mark.number)
                self.recorded.append(
                    Attention(mark.weights, None, None, None, None, tuple(self._grids))
                )
        return result

    def _opened(self, weights: Tensor) -> Tensor:
        """Probabilities from which the graph goes on to the end of this forward pass."""
        if weights.is_inference():
            raise ModelError(
                "The model attends under torch.inference_mode(), where no gradient exists; leave "
                "that mode around the call, or remove it from the model's forward."
            )
        torch.set_grad_enabled(True)
        return weights if weights.requires_grad else weights.detach().requires_grad_()

    def _kept(self, weights: Tensor, output: Tensor, logits: _Logits, values: Tensor) -> Tensor:
        self.recorded.append(
            Attention(
                weights, output, logits.queries, logits.keys, values.detach(), tuple(self._grids)
            )
        )
        return output.clone()


def _fused_logits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """What ``F.scaled_dot_product_attention`` takes a softmax of; at least float32.

    Returns:
        Logits ``(...,Tq,Tk)``, queries, and keys and values with a head for each head of queries,
        and the rate of dropout.
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (part.repeat_interleave(groups, dim=-3) for part in (key, value))
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = at_least_single(query) @ at_least_single(key).transpose(-2, -1) * factor
    if is_causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        logits = logits.masked_fill(~seen, -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask
    return logits, query, key, value, dropout_p


def _safe_softmax(logits: Tensor) -> Tensor:
    """Softmax over the last axis, zero for a query that may see nothing."""
    blind = logits.isneginf().all(dim=-1, keepdim=True)
    return logits.masked_fill(blind, 0.0).softmax(dim=-1).masked_fill(blind, 0.0)
