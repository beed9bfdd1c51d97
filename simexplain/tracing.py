"""The only hooks in simexplain: each lives for one forward pass and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from simexplain.arguments import described, typed
from simexplain.errors import ModelError
from simexplain.networks import (
    INPUT,
    exclusively,
    find_layer,
    first_tensor,
    preserve_state,
    split_call,
    with_first,
)
from simexplain.row_gradients import RowGradients
from simexplain.tapes import Tape

Listener = Callable[[nn.Module, Any, Any], Any]


class Traceable(Protocol):
    """What :func:`trace` needs of a model; every ``SimilarityModel`` has it."""

    @property
    def network(self) -> nn.Module:
        """The module in which layer names are looked up."""

    @property
    def batch_size(self) -> int | None:
        """The only number of images one forward pass takes, or None where any will do."""

    def pass_size(self, count: int, limit: int | None = None, *, together: bool = False) -> int:
        """Images in one forward pass over ``count`` of them, at most ``limit``."""

    def embed(self, images: Tensor) -> Tensor:
        """Unit rows ``(M,E)`` for images ``(M,3,H,W)``."""

    def to_grid(self, layer: str, output: Tensor, image_size: tuple[int, int]) -> Tensor:
        """The output of a layer as a feature map ``(M,C,h,w)``."""


@dataclass(frozen=True)
class Trace:
    """One forward pass, opened at some layers; embeddings and maps hang in one autograd graph.

    Attributes:
        embeddings: Unit rows ``(M,E)``, differentiable with respect to the traced layers.
        outputs: For each layer its raw outputs, one tensor a chunk of images.
        to_grid: Turns ``(layer, output)`` into a map ``(M,C,h,w)``.
        diagnose: Finds out, at the price of one more pass, why a layer has no gradient.
        tapes: What the network did above the layers, for each chunk, where that was recorded.
        counts: The images in each chunk, with what filled it up.
    """

    embeddings: Tensor
    outputs: Mapping[str, tuple[Tensor, ...]]
    to_grid: Callable[[str, Tensor], Tensor]
    diagnose: Callable[[str], str]
    tapes: tuple[Tape, ...] = ()
    counts: tuple[int, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """The traced layers, in the given order."""
        return tuple(self.outputs)

    @property
    def maps(self) -> dict[str, Tensor]:
        """The feature maps ``(M,C,h,w)`` of each layer, in the graph."""
        return {layer: self._grid(layer, chunks) for layer, chunks in self.outputs.items()}

    def at(self, layers: Sequence[str]) -> Trace:
        """The same pass, opened at some of its layers only: gradients need go no further down."""
        return replace(self, outputs={layer: self.outputs[layer] for layer in layers})

    def gradients(self, score: Tensor, *, create_graph: bool = False) -> dict[str, Tensor]:
        """The gradient of a scalar with respect to the map of every traced layer.

        One backward pass down to the lowest traced layer, as often as wanted on one trace; it
        never touches ``.grad`` of a parameter.

        Args:
            score: A scalar computed from :attr:`embeddings`.
            create_graph: Make the result differentiable, for training with attention maps.

        Returns:
            For each layer a tensor ``(M,C,h,w)``.

        Raises:
            ModelError: If the embedding does not depend on a layer; the error has the reason where
                it is known.
        """
        inputs = [chunk for chunks in self.outputs.values() for chunk in chunks]
        if not score.requires_grad:
            raise ModelError(self.diagnose(self.layers[0]))
        slopes = iter(
            torch.autograd.grad(
                score, inputs, retain_graph=True, create_graph=create_graph, allow_unused=True
            )
        )
        return {
            layer: self._grid(layer, [next(slopes) for _ in self.outputs[layer]])
            for layer in self.layers
        }

    def _grid(self, layer: str, chunks: Sequence[Tensor | None]) -> Tensor:
        present = [chunk for chunk in chunks if chunk is not None]
        if len(present) < len(chunks):
            raise ModelError(self.diagnose(layer))
        # Not joined before: some layers have their images along another axis.
        grids = [self.to_grid(layer, chunk) for chunk in present]
        for grid, count in zip(grids, self.counts, strict=False):
            if len(grid) != count:
                raise ModelError(
                    f"Expected one map for each image at layer '{layer}', got {len(grid)} for "
                    f"{count} (the network cuts or joins images); take a layer before or after."
                )
        return _joined(grids, len(self.embeddings))


@contextmanager
def listening(network: nn.Module, listeners: Mapping[str, Listener]) -> Iterator[None]:
    """Calls each listener after every call of its layer, while the block runs.

    Where a name ends in ``:input``, it is called before, with the first tensor that the layer is
    given as the output: a sum, say, that no layer returns.

    Args:
        network: The module in which the layers are looked up.
        listeners: For each layer what to call with ``(module, args, output)``; what it returns,
            if not None, takes the place of the output, here and for all that use it afterwards.

    Raises:
        ModelError: If the layer does not exist.
    """
    own, modules = get_ident(), dict(network.named_modules())

    def heard(listener: Listener) -> Listener:
        # The network may run in another thread, for a caller of its own.
        return lambda *call: listener(*call) if get_ident() == own else None

    with exclusively(network), ExitStack() as stack:
        exchanged = _Exchanged()
        for name, listener in listeners.items():
            module = modules.get(name) or find_layer(network, name)  # which reports what is wrong
            if name.endswith(INPUT):
                before = exchanged.before(heard(listener))
                stack.callback(module.register_forward_pre_hook(before).remove)
            else:
                stack.callback(module.register_forward_hook(heard(listener)).remove)
        if any(name.endswith(INPUT) for name in listeners):
            stack.enter_context(exchanged)
        yield


class _Exchanged(TorchFunctionMode):
    """Gives functions other tensors in the place of some, while it is entered.

    What a layer is called with is often used again beside it, as in ``x = x + block(x)``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._new: dict[int, Tensor] = {}
        self._old: list[Tensor] = []  # no other tensor may get the id of one of these

    def before(self, listener: Listener) -> Callable[[nn.Module, Any], None]:
        """A hook that exchanges the first tensor of a call for what the listener returns."""

        def hook(module: nn.Module, args: Any) -> Any:
            tensor = first_tensor(args)
            new = None if tensor is None else listener(module, args, tensor)
            if tensor is None or new is None:
                return None
            self._old.append(tensor)
            self._new[id(tensor)] = new
            return with_first(args, new)

        return hook

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Calls a function, perhaps with other tensors."""
        given = (args, kwargs or {})
        if self._new:
            given = pytree.tree_map(lambda value: self._new.get(id(value), value), given)
        return func(*given[0], **given[1])


@typed
def trace(
    model: Traceable,
    images: Tensor,
    layers: Sequence[str],
    *,
    differentiable: bool = False,
    max_batch: int | None = None,
    taped: bool = False,
    by_rows: bool = False,
) -> Trace:
    """Runs the model once and keeps the outputs of some layers in the autograd graph.

    Nothing below the lowest traced layer is tracked, so the pass costs what a plain one does.
    Modes, gradients, hooks, images and random state are as before afterwards. How many images go
    through the network together is the model's choice (``pass_size``): on a CPU each goes alone,
    so that what it gives depends on no other image.

    Args:
        model: The model; it is evaluated with every submodule in eval mode.
        images: Preprocessed images ``(M,3,H,W)``.
        layers: Names from ``model.layers``; ``name@2`` is the third call of a shared layer.
        differentiable: Leave modes alone and keep the whole graph, for training; all images
            then go through the network together.
        max_batch: Bounds the images in one forward pass; results do not depend on it.
        taped: Record what the network does above the layers, so that it can be run again from
            there; not for training.
        by_rows: Take gradients for those rows alone that have any (:class:`RowGradients`), one
            after the other; not for training.

    Raises:
        ModelError: If a layer is unknown, does not run or has no tensor as its output.
    """
    if not hasattr(model, "pass_size"):
        raise ModelError(
            f"Expected a similarity model, got {described(model)}; wrap it with "
            "as_similarity_model."
        )
    size = model.pass_size(len(images), max_batch, together=differentiable)
    pixels = (int(images.shape[-2]), int(images.shape[-1]))
    rows, outputs, tapes = _forward(model, images, size, layers, differentiable, taped, by_rows)
    with torch.enable_grad():  # a caller's no_grad must not cut what was just recorded
        embeddings = _joined(rows, len(images))
    return Trace(
        embeddings=embeddings,
        outputs={layer: tuple(chunks) for layer, chunks in outputs.items()},
        to_grid=lambda layer, output: model.to_grid(layer, output, pixels),
        diagnose=lambda layer: _diagnosis(model, images[:size], layer),
        tapes=tuple(tapes),
        counts=tuple(len(row) for row in rows),
    )


def embed_alike(model: Traceable, images: Tensor, batch_size: int) -> Tensor:
    """Embeddings ``(M,E)`` without a graph, each the same whatever images share its pass.

    All passes have one size: a single image on a CPU, ``batch_size`` elsewhere, for which the last
    one is filled up.

    Args:
        model: The model; it is evaluated with every submodule in eval mode.
        images: Preprocessed images ``(M,3,H,W)``, at least one.
        batch_size: Images in one forward pass where the model takes any number.
    """
    size = model.pass_size(batch_size, batch_size)
    with preserve_state(model.network), torch.no_grad():
        rows = [model.embed(chunk.clone()) for chunk in chunks_of(images, size, fixed=True)]
    return _joined(rows, len(images))


def rerun(model: Traceable, images: Tensor, layer: str, output: Tensor) -> Tensor:
    """Embeddings ``(M,E)`` when one layer gives another output, differentiable in that output.

    Args:
        model: The model; it is evaluated with every submodule in eval mode.
        images: Preprocessed images ``(M,3,H,W)``.
        layer: Its name, with ``@call`` where it runs more than once.
        output: What the layer shall give, shaped as what it gave.

    Raises:
        ModelError: If the layer does not exist.
    """
    name, call = split_call(layer)
    seen: list[int] = []
    given = output

    def replaced(module: nn.Module, args: Any, old: Any) -> Any:
        seen.append(1)
        if call is not None and len(seen) != call + 1:
            return None
        torch.set_grad_enabled(True)  # from here to the end of this forward pass
        return with_first(old, given.clone())

    size = model.pass_size(len(images), len(images))
    rows = []
    with listening(model.network, {name: replaced}), preserve_state(model.network):
        for chunk, part in zip(torch.split(images, size), torch.split(output, size), strict=True):
            given = part
            seen.clear()
            with torch.no_grad():
                rows.append(model.embed(chunk.detach().clone()))
    with torch.enable_grad():
        return _joined(rows, len(images))


def _joined(chunks: Sequence[Tensor], count: int) -> Tensor:
    """Chunks as one tensor, without what filled up the last one."""
    whole = chunks[0] if len(chunks) == 1 else torch.cat(list(chunks))
    return whole if len(whole) == count else whole[:count]


def chunks_of(images: Tensor, size: int, *, fixed: bool = False) -> Iterator[Tensor]:
    """Images in the groups in which they go through a network.

    Args:
        images: ``(M,3,H,W)``.
        size: Images in a group.
        fixed: Fill up the last group with copies of its last image.
    """
    for start in range(0, len(images), size):
        chunk = images[start : start + size]
        missing = size - len(chunk) if fixed else 0
        if missing:
            chunk = torch.cat((chunk, chunk[-1:].expand(missing, *chunk.shape[1:])))
        yield chunk


def _forward(
    model: Traceable,
    images: Tensor,
    size: int,
    layers: Sequence[str],
    differentiable: bool,
    taped: bool,
    by_rows: bool,
) -> tuple[list[Tensor], dict[str, list[Tensor]], list[Tape]]:
    taps = [_Tap(layer, cut=not differentiable) for layer in layers]
    rows: list[Tensor] = []
    tapes: list[Tape] = []
    kept: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    with ExitStack() as stack:
        if not differentiable:
            stack.enter_context(preserve_state(model.network))
        elif taps:
            # Training with maps takes gradients of gradients, which fused attention has not.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if by_rows:
            stack.enter_context(RowGradients())  # below the tape, which must see what is called
        for chunk in chunks_of(images, size, fixed=model.batch_size is not None):
            tape = Tape() if taped else None
            for tap in taps:
                tap.begin(tape)
            grads = nullcontext() if differentiable else torch.no_grad()
            with grads, tape or nullcontext(), ExitStack() as inside:
                for tap in taps:  # above the tape, which must see what takes another's place
                    inside.enter_context(listening(model.network, {tap.module_name: tap}))
                # A copy, since a network may normalise its input in place.
                rows.append(model.embed(chunk if differentiable else chunk.detach().clone()))
            if tape is not None:
                tape.result = rows[-1]
                tapes.append(tape)
            for tap in taps:
                kept[tap.layer].append(tap.kept())
    return rows, kept, tapes


class _Tap:
    """Keeps the output of one call of one layer and starts the autograd graph there."""

    def __init__(self, layer: str, *, cut: bool) -> None:
        self.layer = layer
        self.module_name, self.call = split_call(layer)
        self.cut = cut
        self.begin(None)

    def begin(self, tape: Tape | None) -> None:
        """Gets ready for a forward pass, which this tape records."""
        self.tape = tape
        self.calls = 0
        self.output: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        self.calls += 1
        if self.call is not None and self.calls != self.call + 1:
            return None
        tensor = first_tensor(output)
        if tensor is None:
            raise ModelError(
                f"Expected a tensor from layer '{self.layer}', got {type(output).__name__}; "
                "choose another layer, `simexplain layers` lists the usable ones."
            )
        if self.cut:
            if tensor.is_inference():
                raise ModelError(
                    f"Layer '{self.layer}' runs under torch.inference_mode() inside the model, "
                    "where no gradient exists; remove it from the model's forward."
                )
            torch.set_grad_enabled(True)  # from here to the end of this forward pass
            if not tensor.requires_grad:
                tensor = tensor.detach().requires_grad_()
        self.output = tensor
        if self.tape is not None:
            self.tape.start(tensor)
        # A later in-place operation works on the copy.
        return with_first(output, tensor.clone())

    def kept(self) -> Tensor:
        """The output, after checking that the layer ran exactly as in the name."""
        if self.call is None and self.calls > 1:
            names = ", ".join(f"{self.layer}@{call}" for call in range(self.calls))
            raise ModelError(
                f"Layer '{self.layer}' runs {self.calls} times in one forward pass; "
                f"say which call is meant: {names}."
            )
        if self.output is None:
            raise ModelError(
                f"Layer '{self.layer}' did not run in the forward pass ({self.calls} calls of "
                f"'{self.module_name}'); `simexplain layers` lists the layers that do."
            )
        return self.output


def _diagnosis(model: Traceable, images: Tensor, layer: str) -> str:
    """Why the embedding has no gradient at a layer: one more pass, with grad mode on outside."""
    modes: list[bool] = []
    note = {split_call(layer)[0]: lambda *_: modes.append(torch.is_grad_enabled())}
    with listening(model.network, note), preserve_state(model.network), torch.enable_grad():
        embeddings = model.embed(images.detach().clone().requires_grad_().clone())
    if not all(modes) or not embeddings.requires_grad:
        return (
            f"The model runs layer '{layer}' or a part above it under torch.no_grad(), or detaches "
            "it, so no gradient reaches it; change that or choose a layer above it."
        )
    return (
        f"The embedding does not depend on layer '{layer}'; choose a layer that feeds it, "
        "`simexplain layers` lists them."
    )
