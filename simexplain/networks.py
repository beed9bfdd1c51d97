"""Looking into a network and leaving it as it was: layers by name, modes, outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.errors import ModelError


@contextmanager
def undisturbed(network: nn.Module) -> Iterator[None]:
    """Evaluates inside and restores every submodule's mode and the random state after it."""
    modes = [(module, module.training) for module in network.modules()]
    devices = {p.device.index for p in network.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[index for index in devices if index is not None]):
        try:
            # Not eval(): some networks override train() to reorganise themselves.
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training


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
    """The submodule of this name.

    Raises:
        ModelError: If there is none; suggests the closest names.
    """
    if reason := getattr(network, "sealed", ""):  # a black box
        raise ModelError(reason)
    modules: dict[str, nn.Module] = dict(network.named_modules())
    if name and name in modules:
        return modules[name]
    close = get_close_matches(name, [known for known in modules if known], n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "`simexplain layers` lists them."
    raise ModelError(f"The model has no layer '{name}'; {hint}")


def at_least_single(tensor: Tensor) -> Tensor:
    """The tensor itself in float32 or float64, any other type as float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def first_tensor(output: Any) -> Tensor | None:
    """The tensor that a layer returned, or the first of a tuple or list, else None."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) and output.is_floating_point() else None


def with_first(output: Any, tensor: Tensor) -> Any:
    """The same output with its first tensor exchanged; the counterpart of first_tensor."""
    if isinstance(output, Tensor):
        return tensor
    rest = [tensor, *output[1:]]
    if isinstance(output, list):
        return rest
    return type(output)(*rest) if hasattr(output, "_fields") else tuple(rest)
