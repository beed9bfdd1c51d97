"""A network that forgets layer by layer, and remembers everything afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.errors import ModelError


def randomisable(network: nn.Module) -> tuple[str, ...]:
    """The names of all modules with float values of their own, from the last to the first.

    The order is that of registration, which is the order of execution in networks written down
    from input to output.
    """
    named = [name for name, module in network.named_modules() if _own(module)]
    return tuple(reversed(named))


@contextmanager
def randomised(
    network: nn.Module, how_far: int, seed: int = 0, layers: Sequence[str] | None = None
) -> Iterator[tuple[str, ...]]:
    """Forgets the last ``how_far`` layers while the block runs (Adebayo et al. 2018).

    The cascading parameter randomisation: a map that explains the network must change with it.
    Parameters and buffers are initialised anew by ``reset_parameters`` where a layer without parts
    has it; what that leaves alone is permuted. A constant cannot be permuted away, and integers,
    which are counters and index tables, stay unless ``reset_parameters`` sets them. Every layer
    draws from a seed of its own, so a block that goes further has the same values in the layers of
    one that goes less far.

    Afterwards, also after an exception, every value is what it was, bit for bit, and the random
    state, gradients and hooks are untouched.

    Args:
        network: Changed in place inside.
        how_far: How many layers, from the last on.
        seed: Of the new values.
        layers: Names from the last to the first; :func:`randomisable` by default.

    Yields:
        The names of the forgotten layers.

    Raises:
        ModelError: If the layer does not exist, or the network has fewer layers.
    """
    names = tuple(layers) if layers is not None else randomisable(network)
    modules: dict[str, nn.Module] = dict(network.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown or not 0 <= how_far <= len(names):
        what = f"has no layer '{unknown[0]}'" if unknown else f"has {len(names)} layers to forget"
        raise ModelError(f"The network {what}; randomisable lists them (got {how_far}).")
    chosen = [modules[name] for name in names[:how_far]]
    kept = [
        (holder, dict(holder), _copies(holder))
        for module in chosen
        for holder in (module._parameters, module._buffers)
    ]
    try:
        _forget(chosen, seed)
        yield names[:how_far]
    finally:
        _restore(kept)


def _forget(modules: Sequence[nn.Module], seed: int) -> None:
    devices = {t.device.index for module in modules for t in _own(module) if t.is_cuda}
    on = [index for index in devices if index is not None]
    with torch.random.fork_rng(devices=on), torch.no_grad():
        for number, module in enumerate(modules):
            torch.default_generator.manual_seed(seed * 1_000_003 + number)
            for index in on:
                torch.cuda.default_generators[index].manual_seed(seed * 1_000_003 + number)
            before = [tensor.clone() for tensor in _own(module)]
            reset = getattr(module, "reset_parameters", None)
            # A module with parts may reset those too, which then were never kept.
            if callable(reset) and next(module.children(), None) is None:
                reset()
            for old, tensor in zip(before, _own(module), strict=True):
                if torch.equal(old, tensor):
                    order = torch.randperm(tensor.numel()).to(tensor.device)
                    tensor.copy_(old.flatten()[order].view_as(old))


def _copies(holder: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().clone()
        for name, tensor in holder.items()
        if tensor is not None and _writable(tensor)
    }


def _restore(kept: Sequence[tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]]) -> None:
    with torch.no_grad():
        for holder, objects, values in kept:
            holder.clear()
            holder.update(objects)
            for name, value in values.items():
                holder[name].copy_(value)


def _writable(tensor: Any) -> bool:
    """Whether it can be written to: neither still without a shape nor one value seen many times."""
    if not isinstance(tensor, Tensor) or nn.parameter.is_lazy(tensor):
        return False
    return all(step or side < 2 for side, step in zip(tensor.shape, tensor.stride(), strict=True))


def _own(module: nn.Module) -> list[Tensor]:
    """Float parameters and buffers of a module itself, without those of its parts."""
    held = (*module._parameters.values(), *module._buffers.values())
    usable = [tensor for tensor in held if tensor is not None and _writable(tensor)]
    return [tensor.detach() for tensor in usable if tensor.is_floating_point()]
