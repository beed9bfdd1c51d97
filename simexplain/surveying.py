"""A dry run that tells every layer of a network: what could be traced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.networks import first_tensor, undisturbed
from simexplain.tracing import Traceable, listening


@dataclass(frozen=True)
class LayerRun:
    """One call of one layer, as :func:`survey` saw it.

    Attributes:
        name: The layer's name, with ``@call`` appended where it runs more than once.
        module: The module itself.
        output: Its output, detached.
        gradient: The gradient of a random projection of the embedding, or None where the
            embedding does not depend on this output.
        follows: The layer whose very output this one was called with, if any.
    """

    name: str
    module: nn.Module
    output: Tensor
    gradient: Tensor | None
    follows: str | None


def survey(model: Traceable, images: Tensor) -> list[LayerRun]:
    """Runs the model once and tells every layer that returned a tensor, in order of execution.

    Args:
        model: The model to look into.
        images: A few images of the size that counts, ``(M,3,H,W)``; one is enough.
    """
    calls: list[tuple[str, nn.Module, Tensor, str | None]] = []
    makers: dict[int, str] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None:
                calls.append((name, module, tensor, makers.get(id(args[0])) if args else None))
                makers[id(tensor)] = name

        return hook

    listeners = {name: keep(name) for name, _ in model.network.named_modules() if name}
    with listening(model.network, listeners), undisturbed(model.network), torch.enable_grad():
        embeddings = model.embed(images.detach().clone().requires_grad_().clone())
        gradients = _probe_gradients(embeddings, [tensor for _, _, tensor, _ in calls])
    times = [name for name, *_ in calls]
    seen: dict[str, int] = {}
    runs = []
    for (name, module, tensor, follows), gradient in zip(calls, gradients, strict=True):
        label = f"{name}@{seen.get(name, 0)}" if times.count(name) > 1 else name
        seen[name] = seen.get(name, 0) + 1
        runs.append(LayerRun(label, module, tensor.detach(), gradient, follows))
    return runs


def _probe_gradients(embeddings: Tensor, outputs: list[Tensor]) -> list[Tensor | None]:
    """Gradients of a fixed random projection; a plain sum could cancel on unit rows."""
    direction = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0))
    tracked = [number for number, output in enumerate(outputs) if output.requires_grad]
    found: list[Tensor | None] = [None] * len(outputs)
    if embeddings.requires_grad and tracked:
        score = (embeddings * direction.to(embeddings)).sum()
        values = torch.autograd.grad(score, [outputs[n] for n in tracked], allow_unused=True)
        for number, value in zip(tracked, values, strict=True):
            found[number] = value
    return found
