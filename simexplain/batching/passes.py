"""One forward pass, kept: what its layers gave, and how to pull gradients back through it again.

The graph is cut at every requested layer, so that each part of it depends on the layers right below
and gradients along different ways are never counted twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from simexplain.errors import ModelError
from simexplain.networks import first_tensor, preserve_state, split_call, with_first
from simexplain.tracing import Traceable, listening


@dataclass(frozen=True)
class Pass:
    """A forward pass over ``n`` pictures.

    Attributes:
        layers: In the order in which they ran.
        made: What each layer gave ``(n,...)``; hangs on the leaves of the layers before.
        leaves: The same values, on which all that comes later hangs.
        rows: Embeddings ``(n,E)``; hang on the leaves.
        bytes: What is kept alive by all this, parameters not counted.
    """

    layers: tuple[str, ...]
    made: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    rows: Tensor
    bytes: int


Use = tuple[Pass, int]
"""A pass and the place of a picture in it."""


def cut_pass(model: Traceable, images: Tensor, layers: Sequence[str]) -> Pass:
    """Runs a model once; nothing below the lowest layer is tracked.

    Args:
        model: The model; it is evaluated with every submodule in eval mode.
        images: Preprocessed images ``(n,3,H,W)``.
        layers: Layers that :func:`~simexplain.tracing.trace` has accepted.

    Raises:
        ModelError: If a layer did not run.
    """
    count, size = len(images), model.batch_size or len(images)
    if count < size:
        images = torch.cat((images, images[-1:].expand(size - count, *images.shape[1:])))
    order: list[_Cut] = []
    kept = _Kept(model.network)
    with ExitStack() as stack:
        stack.enter_context(preserve_state(model.network))
        stack.enter_context(torch.no_grad())
        stack.enter_context(saved_tensors_hooks(kept, lambda tensor: tensor))
        for layer in layers:
            cut = _Cut(layer, order)
            stack.enter_context(listening(model.network, {cut.module_name: cut}))
        rows = model.embed(images.detach().clone())
    if len(order) != len(set(layers)):
        raise ModelError(f"Of the layers {', '.join(layers)} not all ran in a forward pass.")
    for cut in order:
        kept(cut.made), kept(cut.leaf)
    kept(rows)
    return Pass(
        tuple(cut.layer for cut in order),
        tuple(cut.made for cut in order),
        tuple(cut.leaf for cut in order),
        rows,
        kept.total,
    )


def gathered(uses: Sequence[Use], number: int | None) -> Tensor:
    """What layer ``number`` (None: the embedding) gave for some pictures ``(M,...)``, no graph."""
    with torch.no_grad():
        values = [(run.rows if number is None else run.made[number]) for run, _ in uses]
        parts = [value[index : index + 1] for value, (_, index) in zip(values, uses, strict=True)]
        return torch.cat(parts)


def pulled(uses: Sequence[Use], number: int | None, slopes: Tensor) -> list[Tensor]:
    """Gradients at all layers below one, directly and not by way of layers in between.

    Args:
        uses: ``M`` pictures; one may be there several times.
        number: Of the layer that the slopes belong to; None for the embedding.
        slopes: ``(M,...)``.

    Returns:
        For each layer before it ``(M,...)``, zero where it has no part.
    """
    first = uses[0][0]
    count = len(first.leaves) if number is None else number
    gradients = [
        torch.zeros((len(uses), *leaf.shape[1:]), dtype=leaf.dtype, device=leaf.device)
        for leaf in first.leaves[:count]
    ]
    for run, members in _rounds(uses):
        value = run.rows if number is None else run.made[number]
        if not value.requires_grad:
            continue
        seed = torch.zeros_like(value)
        for index, member in members.items():
            seed[index] = slopes[member]
        grads = torch.autograd.grad(
            value, run.leaves[:count], seed, retain_graph=True, allow_unused=True
        )
        for target, grad in zip(gradients, grads, strict=True):
            for index, member in members.items():
                if grad is not None:
                    target[member] = grad[index]
    return gradients


def _rounds(uses: Sequence[Use]) -> list[tuple[Pass, dict[int, int]]]:
    """Backward passes in each of which a picture of a pass has one use: place to member."""
    rounds: list[tuple[Pass, dict[int, int]]] = []
    for member, (run, index) in enumerate(uses):
        for other, members in rounds:
            if other is run and index not in members:
                members[index] = member
                break
        else:
            rounds.append((run, {index: member}))
    return rounds


class _Cut:
    """Ends the graph at one call of one layer and starts it anew."""

    made: Tensor
    leaf: Tensor

    def __init__(self, layer: str, order: list[_Cut]) -> None:
        self.layer, self.order = layer, order
        self.module_name, self.call = split_call(layer)
        self.calls = 0

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        self.calls += 1
        tensor = first_tensor(output)
        if tensor is None or (self.call is not None and self.calls != self.call + 1):
            return None
        torch.set_grad_enabled(True)  # from here to the end of this forward pass
        self.made = tensor
        self.leaf = tensor.detach().requires_grad_()
        self.order.append(self)
        # A later in-place operation works on the copy.
        return with_first(output, self.leaf.clone())


class _Kept:
    """Counts the bytes of tensors that a graph keeps, each once and no parameters."""

    def __init__(self, network: nn.Module) -> None:
        tensors = (*network.parameters(), *network.buffers())
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.total = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor
