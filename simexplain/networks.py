"""Looking into a network and leaving it as it was: layers by name, modes, outputs."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from difflib import get_close_matches
from threading import Lock, RLock
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.errors import ModelError, NetworkError, SimexplainError, first_line

_DEFAULT_DEVICE: ContextVar[torch.device | None] = ContextVar("default device", default=None)
"""The caller's, where it is not the CPU and we are inside a pass of ours."""


@contextmanager
def full_precision() -> Iterator[None]:
    """Computes as tensors say, whatever ``autocast`` or ``inference_mode`` the caller has entered.

    Half precision would round the small differences that maps are made of, and tensors of inference
    mode have no gradient. A network that enters either by itself is left to it. Nor does the
    caller's default device move tensors of ours; the network sees it while it runs.
    """
    with ExitStack() as stack:
        default = torch.get_default_device()
        if default.type != "cpu":
            stack.callback(_DEFAULT_DEVICE.reset, _DEFAULT_DEVICE.set(default))
            stack.enter_context(torch.device("cpu"))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(mode=False))
            stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


INPUT = ":input"
"""The end of a name that means what a layer is called with, not what it returns."""

_LOCKS: dict[int, RLock] = {}
_NEW_LOCK = Lock()


@contextmanager
def exclusively(network: nn.Module) -> Iterator[None]:
    """One thread at a time: modes and hooks of a network are the same for all of them.

    Networks with the same first parameter, such as one and another around it, count as one.
    """
    own = next(network.parameters(), network)
    with _NEW_LOCK:
        if id(own) not in _LOCKS:
            weakref.finalize(own, _LOCKS.pop, id(own), None).atexit = False
        lock = _LOCKS.setdefault(id(own), RLock())
    with lock:
        yield


@contextmanager
def preserve_state(network: nn.Module) -> Iterator[None]:
    """Evaluates inside, without the caller's autocast, and restores modes and random state.

    Other threads that want the same network wait.
    """
    with exclusively(network), _evaluating(network):
        yield


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in network.modules()]
    devices = {p.device.index for p in network.parameters() if p.device.type == "cuda"}
    indices = [index for index in devices if index is not None]
    with full_precision(), torch.random.fork_rng(devices=indices):
        try:
            # Not eval(): some networks override train() to reorganise themselves.
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def running(network: nn.Module, images: Tensor) -> Iterator[None]:
    """Turns what a network raises of images ``(M,C,H,W)`` into a sentence.

    Raises:
        NetworkError: Whose cause is what the network raised. Lack of memory stays what it is.
    """
    try:
        with _DEFAULT_DEVICE.get() or nullcontext():
            yield
    except (SimexplainError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever another package's forward raises
        if "memory" in str(error):
            raise
        # contextlib takes an error that comes from StopIteration for the end of this generator.
        cause = None if isinstance(error, StopIteration) else error
        raise NetworkError(_failure(network, images, error)) from cause


def _failure(network: nn.Module, images: Tensor, error: Exception) -> str:
    """Why a network does not run on some images, and what to do."""
    channels, height, width = images.shape[1:]
    weights = [*network.parameters(), *network.buffers()]
    if any(weight.is_meta for weight in weights):
        return (
            f"The weights of {type(network).__name__} have no values (device 'meta'); load them "
            "before explaining it."
        )
    if any(weight.is_inference() for weight in weights):
        return (
            f"The weights of {type(network).__name__} were made inside torch.inference_mode(), so "
            "no gradient passes them; build or load the model outside of it."
        )
    reason = f"{type(error).__name__}: {first_line(error).rstrip('.')}"
    first = next((one for one in network.modules() if isinstance(one, nn.Conv2d)), None)
    if first is not None and isinstance(error, RuntimeError) and first.in_channels != channels:
        plural = "s" * (first.in_channels != 1)
        return (
            f"Expected images of {first.in_channels} channel{plural}, as the first convolution of "
            f"{type(network).__name__} takes, got {channels}x{height}x{width} ({reason}); give "
            "images (B,C,H,W) with that many channels."
        )
    return (
        f"The model does not run on images of {channels}x{height}x{width} ({reason}); give it the "
        "size and the inputs that its forward expects."
    )


def split_call(layer: str) -> tuple[str, int | None]:
    """``'block@2'`` is the third call of ``'block'``; without ``@`` there should be only one."""
    name, _, call = layer.rpartition("@")
    return (name, int(call)) if name and call.isdigit() else (layer, None)


def channels_of(network: nn.Module) -> int:
    """How many channels a network's images have: as many as its first convolution takes."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            return int(module.in_channels)
    return 3


def find_layer(network: nn.Module, name: str) -> nn.Module:
    """The submodule of this name, which may end in ``:input``.

    Raises:
        ModelError: If there is none; suggests the closest names.
    """
    if reason := getattr(network, "sealed", ""):  # a black box
        raise ModelError(reason)
    modules: dict[str, nn.Module] = dict(network.named_modules())
    name = name.removesuffix(INPUT)
    if name and name in modules:
        return modules[name]
    close = get_close_matches(name, [known for known in modules if known], n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "`simexplain layers` lists them."
    raise ModelError(f"The model has no layer '{name}'; {hint}")


def layer_name(network: nn.Module, layer: str | nn.Module) -> str:
    """The name of a layer that is given by name or as the module itself.

    Raises:
        ModelError: If the module is not part of the network.
    """
    if isinstance(layer, str):
        return layer
    for name, module in network.named_modules():
        if module is layer and name:
            return str(name)
    raise ModelError(
        f"Expected a layer of {type(network).__name__}, got a {type(layer).__name__} that is not "
        "part of it; `simexplain layers` lists the names."
    )


def at_least_single(tensor: Tensor) -> Tensor:
    """The tensor itself in float32 or float64, any other type as float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def unit_rows(rows: Tensor, dim: int = 1) -> Tensor:
    """Vectors at unit length along an axis, however long or short they are; zero stays zero.

    Each is first divided by a power of two that brings its largest number near one, so that no
    square over- or underflows; that is exact, so vectors of usual length come out bit by bit as
    ``torch.nn.functional.normalize`` gives them, and one of length 1e-30 points where it pointed.

    Args:
        rows: Floating-point vectors of any shape.
        dim: The axis along which they lie.
    """
    scaled = rows * _scales(rows, dim)
    lengths = scaled.norm(dim=dim, keepdim=True)
    return scaled / torch.where(lengths > 0, lengths, torch.ones_like(lengths))


def lengths_of(rows: Tensor, dim: int = 1) -> Tensor:
    """Lengths of vectors along an axis, with which squares over- or underflow no sooner than they.

    Args:
        rows: Floating-point vectors of any shape.
        dim: The axis along which they lie, which the result is without.
    """
    scales = _scales(rows, dim)
    lengths: Tensor = (rows * scales).norm(dim=dim) / scales.squeeze(dim)
    return lengths


def _scales(rows: Tensor, dim: int) -> Tensor:
    """Powers of two that bring the largest number of each vector near one, without a graph."""
    largest = at_least_single(rows.detach().abs().amax(dim=dim, keepdim=True))
    limit = math.frexp(torch.finfo(rows.dtype).max)[1] - 2
    exponents = torch.frexp(largest)[1].clamp(-limit, limit)
    return torch.exp2(-exponents.to(rows.dtype))


def first_tensor(output: Any) -> Tensor | None:
    """The tensor that a layer returned, or the first of a tuple or list, else None.

    Numbers and None before it are passed over: layers of exported programs return sizes as well.
    """
    if isinstance(output, (tuple, list)) and output:
        output = output[_first_place(output)]
    return output if isinstance(output, Tensor) and output.is_floating_point() else None


def _first_place(output: Sequence[Any]) -> int:
    plain = (int, float, type(None))
    return next((n for n, part in enumerate(output) if not isinstance(part, plain)), 0)


def with_first(output: Any, tensor: Tensor) -> Any:
    """The same output with its first tensor exchanged; the counterpart of first_tensor."""
    if isinstance(output, Tensor):
        return tensor
    rest = [*output]
    rest[_first_place(output)] = tensor
    if isinstance(output, list):
        return rest
    return type(output)(*rest) if hasattr(output, "_fields") else tuple(rest)
