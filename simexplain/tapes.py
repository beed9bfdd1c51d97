"""What a network does after a layer, written down once, so that it can be run again from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from simexplain.errors import ModelError, first_line

Held = Callable[["Call", Sequence[Any]], Any]
"""Runs a call in another way, given its arguments, flattened; see :meth:`Tape.replay`."""

_SAME = {
    "truediv": "div", "itruediv": "div", "idiv": "div", "divide": "div", "true_divide": "div",
    "rtruediv": "rdiv", "imul": "mul", "rmul": "mul", "multiply": "mul", "iadd": "add",
    "radd": "add", "isub": "sub", "subtract": "sub", "ipow": "pow", "vector_norm": "norm",
    "linalg_vector_norm": "norm", "linalg_norm": "norm", "clip": "clamp", "clamp_max": "clamp",
    "clamp_min": "clamp", "transpose": "view", "permute": "view", "reshape": "view",
    "flatten": "view", "unsqueeze": "view", "squeeze": "view", "expand": "view",
    "expand_as": "view", "contiguous": "view", "clone": "view", "alias": "view", "t": "view",
    "movedim": "view", "swapaxes": "view", "unflatten": "view", "view_as": "view", "T": "view",
    "to": "view", "float": "view", "double": "view", "half": "view", "type_as": "view",
    "bfloat16": "view", "_to_copy": "view", "chunk": "getitem", "split": "getitem",
    "unbind": "getitem", "select": "getitem", "slice": "getitem", "narrow": "getitem",
    "index_select": "getitem", "split_with_sizes": "getitem", "concat": "cat",
    "concatenate": "cat", "stack": "cat", "rsqrt": "rsqrt", "adaptive_avg_pool2d": "mean",
    "adaptive_avg_pool1d": "mean", "avg_pool2d": "mean", "avg_pool1d": "mean", "bmm": "matmul",
    "mm": "matmul", "rmatmul": "matmul", "einsum": "matmul", "absolute": "abs",
}  # fmt: skip
"""Functions that do the same to the scale of a tensor as another, by their plain names."""
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")
OPENED = {"multi_head_attention_forward"}
"""Functions in which a network does most of its work; what they call is recorded instead."""


@dataclass(frozen=True, eq=False)
class Call:
    """One function that a network called.

    Attributes:
        func: What was called.
        name: Its plain name: ``div`` for ``torch.div``, ``/``, ``/=`` and ``aten.div.Tensor``.
        flat: Its arguments, flattened.
        spec: How they were arranged.
        inputs: Numbers of the values among them, by their position; only what depends on a source.
        versions: How often each tensor among the arguments had been written to, by its position.
        outputs: The tensors that it gave or wrote into.
        values: The numbers of their values, one for each.
        given: How many of them it gave.
        graded: Whether gradients were recorded.
        autocast: The kind of device and the type of number of an ``autocast`` that the network had
            entered.
    """

    func: Any
    name: str
    flat: tuple[Any, ...]
    spec: Any
    inputs: Mapping[int, int]
    versions: Mapping[int, int]
    outputs: tuple[Tensor, ...]
    values: tuple[int, ...]
    given: int
    graded: bool
    autocast: tuple[str, torch.dtype] | None = None

    def arguments(
        self, flat: Sequence[Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named arguments, perhaps with others in their places."""
        args, kwargs = pytree.tree_unflatten(list(self.flat if flat is None else flat), self.spec)
        return tuple(args), dict(kwargs)

    def run(self, flat: Sequence[Any]) -> Any:
        """Calls the function with other arguments."""
        args, kwargs = self.arguments(flat)
        if self.autocast is None:
            return self.func(*args, **kwargs)
        with torch.autocast(*self.autocast):
            return self.func(*args, **kwargs)

    def unchanged(self, position: int) -> bool:
        """Whether nothing has been written into an argument since."""
        return version_of(self.flat[position]) == self.versions[position]


class Tape(TorchFunctionMode):
    """Records every function whose result depends on one of the sources, while it is entered.

    It sits above autograd, so that what it records is what the network's author wrote, or the
    operators of an exported program. Nothing is recorded before the first source is named.

    Attributes:
        calls: What was recorded, in order.
        broken: Why it cannot be run again; empty where it can.
        result: What the network gave in the end, once that is known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.broken = ""
        self.result: Tensor | None = None
        self._sources: set[int] = set()
        self._numbers: dict[int, int] = {}
        self._graded: dict[int, bool] = {}
        self._kept: dict[int, Tensor] = {}  # no other tensor may get the id of a known one
        self._count = 0

    def start(self, tensor: Tensor) -> None:
        """Names a source: the output of a layer."""
        if id(tensor) not in self._numbers:
            self._learn(tensor)
            self._sources.add(id(tensor))

    def is_source(self, tensor: Tensor) -> bool:
        """Whether a tensor is one that was started with, and not made of such."""
        return id(tensor) in self._sources

    def number_of(self, tensor: Tensor) -> int | None:
        """The number of the last value of a tensor, or None where it depends on no source."""
        return self._numbers.get(id(tensor))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs a function and writes it down."""
        kwargs = kwargs or {}
        if not self._numbers or self.broken:
            return func(*args, **kwargs)
        if plain_name(func) in OPENED:
            with self:
                return unwatched(func)(*args, **kwargs)
        flat, spec = pytree.tree_flatten((args, kwargs))
        tensors = {n: value for n, value in enumerate(flat) if isinstance(value, Tensor)}
        inputs = {n: self._numbers[id(t)] for n, t in tensors.items() if id(t) in self._numbers}
        self._check(tensors, inputs)
        versions = {n: version_of(tensor) for n, tensor in tensors.items()}
        graded = torch.is_grad_enabled()
        result = func(*args, **kwargs)
        given = [value for value in pytree.tree_leaves(result) if isinstance(value, Tensor)]
        if not inputs:
            self._kept.update((id(tensor), tensor) for tensor in given)
            return result
        written = [n for n, tensor in tensors.items() if version_of(tensor) != versions[n]]
        if any(n not in inputs for n in written):
            self.broken = "something was written into a tensor that does not depend on the layer"
        known = {id(tensor) for tensor in given}
        others = [tensors[n] for n in written if id(tensors[n]) not in known]
        if given or others:
            outputs = (*given, *others)
            values = tuple(self._learn(output) for output in outputs)
            self.calls.append(
                Call(func, plain_name(func), tuple(flat), spec, inputs, versions, outputs, values,
                     len(given), graded, entered_autocast())
            )  # fmt: skip
        return result

    def _learn(self, tensor: Tensor) -> int:
        graded = tensor.requires_grad  # looked up before it is known: the look-up is a function too
        self._count += 1
        self._numbers[id(tensor)] = self._count
        self._graded[id(tensor)] = graded
        self._kept[id(tensor)] = tensor
        return self._count

    def _check(self, tensors: Mapping[int, Tensor], inputs: Mapping[int, int]) -> None:
        """Notes where something happened that no function showed."""
        for n, tensor in tensors.items() if inputs else ():
            if n in inputs and self._graded[id(tensor)] != tensor.requires_grad:
                self.broken = "a gradient appeared between two functions"
            elif n not in inputs and tensor.grad_fn is not None and id(tensor) not in self._kept:
                self.broken = "a function of its own kind was called"

    def replay(
        self,
        sources: Mapping[int, Tensor],
        held: Mapping[int, Held] | None = None,
        first: int = 0,
    ) -> dict[int, Tensor]:
        """Runs everything again that depends on some tensors.

        Args:
            sources: New tensors by the ``id`` of those that were recorded.
            held: Calls to be run in another way, by their number.
            first: The number of the call to begin with.

        Returns:
            The new tensors by the ``id`` of those that were recorded, gradients included. What
            does not depend on the sources is as it was.

        Raises:
            ModelError: If a function does not take the new tensors.
        """
        values = dict(sources)
        for number, call in enumerate(self.calls[first:], start=first):
            flat = [values.get(id(value), value) for value in call.flat]
            if all(new is old for new, old in zip(flat, call.flat, strict=True)):
                continue
            run = held.get(number, Call.run) if held else Call.run
            with torch.set_grad_enabled(call.graded), _replaying(call):
                result = run(call, flat)
            new = [value for value in pytree.tree_leaves(result) if isinstance(value, Tensor)]
            old = call.outputs[: call.given]
            values.update((id(o), n) for o, n in zip(old, new, strict=True))
        return values

    def replays(self, source: Tensor) -> bool:
        """Whether what depends on a tensor can be run again: all it needs is as it was."""
        if self.broken or self.result is None or id(source) not in self._numbers:
            return False
        new = {id(source)}
        for call in self.calls:
            tensors = [n for n, value in enumerate(call.flat) if isinstance(value, Tensor)]
            if not any(id(call.flat[n]) in new for n in tensors):
                continue
            if not all(id(call.flat[n]) in new or call.unchanged(n) for n in tensors):
                return False
            new.update(id(output) for output in call.outputs)
        return id(self.result) in new


@contextmanager
def _replaying(call: Call) -> Iterator[None]:
    """Turns what a function raises of other tensors than it was recorded with into a sentence."""
    try:
        yield
    except (RuntimeError, IndexError) as error:
        if "memory" in str(error):
            raise
        raise ModelError(
            "The network chooses from what is in an image how many of its numbers it goes on with, "
            f"so what follows the layer cannot be run again on others ({call.name}: "
            f"{first_line(error).rstrip('.')}); use sam or a method on pixels such as occlusion, "
            "or name an earlier or later layer with layer=."
        ) from error


def entered_autocast() -> tuple[str, torch.dtype] | None:
    """The ``autocast`` that is active: the kind of device and the type that it computes in."""
    for kind in _AUTOCAST:
        if torch.is_autocast_enabled(kind):
            return kind, torch.get_autocast_dtype(kind)
    return None


def unwatched(func: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of torch's, which takes it that no mode is active; what it calls sees one.

    Torch's functions in Python ask first whether a mode is active, and hand themselves over whole.
    """
    if not isinstance(func, FunctionType):
        return func
    names = {**func.__globals__, "has_torch_function": lambda _: False}
    copy = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def plain_name(func: Any) -> str:
    """The name of a function, in whichever way it was called."""
    name = str(getattr(func, "__name__", "")).partition(".")[0]
    if name == "__get__":  # an attribute, such as x.T
        name = str(getattr(getattr(func, "__self__", None), "__name__", ""))
    name = name.strip("_")
    return _SAME.get(name, name)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; -1 where that is not counted."""
    return -1 if tensor.is_inference() else tensor._version
