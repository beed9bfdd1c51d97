"""A model with a cache: it answers for pictures it has seen without running its network again."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from simexplain.errors import ModelError
from simexplain.models.avsl import AVSL
from simexplain.models.base import SimilarityModel
from simexplain.models.layers import GridHints, Layer
from simexplain.models.surveyed import Surveyed
from simexplain.networks import first_tensor, preserve_state, split_call, with_first
from simexplain.tracing import Traceable, listening

Value = TypeVar("Value")
NEVER = float("inf")


class LookaheadCache(Generic[Value]):
    """Keeps values until their last use; where memory is short, those that are needed soonest.

    All uses are known beforehand, so the value needed last is evicted, which is optimal (Belady
    1966). What the current row needs is never evicted.

    Attributes:
        limit: Bytes to keep at most, beside those of the current row.
        bytes: Bytes kept now.
        now: The position of the current row in the schedule.
    """

    def __init__(self, limit: int, uses: Callable[[Hashable], Sequence[int]]) -> None:
        """Keeps at most ``limit`` bytes; ``uses`` gives the positions in the schedule of a key."""
        self.limit = limit
        self.bytes = 0
        self.now = 0
        self._uses = uses
        self._kept: dict[Hashable, tuple[Value, int]] = {}
        self._held: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, key: Hashable, make: Callable[[], tuple[Value, int]]) -> Value:
        """The value of a key, made with its size in bytes where it is not there."""
        if key not in self._kept:
            self._kept[key] = made = make()
            self.bytes += made[1]
            self._held.add(key)
            self._shrink()
        self._held.add(key)
        return self._kept[key][0]

    def release(self) -> None:
        """Ends the current row."""
        for key in self._held:
            if self._next(key) == NEVER:
                self._drop(key)
        self._held.clear()
        self._shrink()

    def _shrink(self) -> None:
        if self.bytes <= self.limit:
            return
        for key in sorted(self._kept.keys() - self._held, key=self._next, reverse=True):
            self._drop(key)
            if self.bytes <= self.limit:
                return

    def _drop(self, key: Hashable) -> None:
        self.bytes -= self._kept.pop(key)[1]

    def _next(self, key: Hashable) -> float:
        uses = self._uses(key)
        index = bisect_right(uses, self.now)
        return uses[index] if index < len(uses) else NEVER


def use_schedule(rows: Sequence[Sequence[int]], batch_size: int) -> Mapping[int, list[int]]:
    """For each group of ``batch_size`` pictures the positions of the rows that need one of it."""
    schedule: dict[int, list[int]] = {}
    for index, images in enumerate(rows):
        for group in {image // batch_size for image in images}:
            schedule.setdefault(group, []).append(index)
    return schedule


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
    """Runs a model once on ``(n,3,H,W)``, evaluating; nothing below the lowest layer is tracked."""
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
        number: Of the layer that the slopes ``(M,...)`` belong to; None for the embedding.
        slopes: At that layer.

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


Recall = Callable[[tuple[int, int], bool], Sequence[Use]]
"""From the size of images and whether vectors are wanted before normalisation to kept passes."""


class CacheMissError(ModelError):
    """A method needs an answer that is not in the cache and that only the network can give."""


def blank(size: tuple[int, int], count: int) -> Tensor:
    """Images ``(1,count,3,H,W)`` that stand for the pictures shown: not a number, so no picture."""
    return torch.full((1, 1, 1, 1, 1), torch.nan).expand(1, count, 3, *size)


def _is_blank(images: Tensor) -> bool:
    return bool(images[:, 0, 0, 0].isnan().all())


class CachedModel(SimilarityModel):
    """Answers for :func:`blank` images what the base model gave for the pictures they stand for.

    Attributes:
        base: The model itself, which answers for all other images.
    """

    def __init__(self, base: SimilarityModel, layers: Sequence[str], recall: Recall) -> None:
        """Remembers these layers; ``recall`` gives the passes that blank images stand for."""
        super().__init__()
        # Not as a sub-module: it is not this one's to move or to switch.
        object.__setattr__(self, "base", base)
        self.name, self.preprocess, self.backbone = base.name, base.preprocess, base.backbone
        self._recall = recall
        self._slots = _slots(layers)
        self._answered: tuple[Tensor, Tensor] | None = None

    base: SimilarityModel

    @property
    def network(self) -> nn.Module:
        """Modules with the names of the layers that are remembered."""
        return self._slots

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of the base model."""
        return self.base.parameters(recurse)

    def pass_size(self, count: int, limit: int | None = None, *, together: bool = False) -> int:
        """All at once: nothing runs, and what is kept was made image by image."""
        return count

    def embed(self, images: Tensor) -> Tensor:
        """Unit rows ``(M,E)``."""
        return self._answer(images, raw=False)

    def vectors(self, images: Tensor) -> Tensor:
        """Vectors ``(M,E)`` before normalisation."""
        return self._answer(images, raw=True)

    def distance(self, q: Tensor, g: Tensor) -> Tensor:
        """Of the base model."""
        return self.base.distance(q, g)

    def layers_for(self, images: Tensor) -> tuple[Layer, ...]:
        """Of the base model."""
        return self.base.layers_for(images)

    def is_surveyed(self, images: Tensor) -> bool:
        """Of the base model."""
        return self.base.is_surveyed(images)

    def _survey_of(self, shape: tuple[int, int, int]) -> Surveyed:
        """Of the base model."""
        return self.base._survey_of(shape)

    @property
    def hints(self) -> GridHints:
        """Of the base model."""
        return self.base.hints

    def to_grid(self, layer: str, output: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Of the base model."""
        return self.base.to_grid(layer, output, image_size)

    def _answer(self, images: Tensor, *, raw: bool) -> Tensor:
        if not _is_blank(images):
            return self._of_base(images, raw=raw)
        uses = self._recall((int(images.shape[-2]), int(images.shape[-1])), raw)
        if len(uses) != len(images):
            raise CacheMissError(f"Expected {len(uses)} images, got {len(images)}.")
        order = uses[0][0].layers
        calls: dict[str, int] = {}
        given: list[Tensor] = []
        for number, layer in enumerate(order):
            value = gathered(uses, number)
            if number:
                value = _linked(partial(pulled, uses, number), value, given)
            given.append(self._through(layer, value, calls))
        return _linked(partial(pulled, uses, None), gathered(uses, None), given)

    def _of_base(self, images: Tensor, *, raw: bool) -> Tensor:
        """The base model's answer, which is the same for the noise that models are known by."""
        if raw or torch.is_grad_enabled():
            raise CacheMissError("These images have not been seen.")
        if self._answered is None or not torch.equal(self._answered[0], images):
            self._answered = (images.clone(), self.base.embed(images).detach())
        return self._answered[1].clone()

    def _through(self, layer: str, value: Tensor, calls: dict[str, int]) -> Tensor:
        """A value through the module of a layer, on which a method may listen."""
        name, call = split_call(layer)
        module = self._slots.get_submodule(name)
        for _ in range(calls.get(name, 0), call or 0):
            module(torch.zeros(1))  # calls before the requested one
        calls[name] = (call or 0) + 1
        given: Tensor = module(value)
        if given.shape != value.shape or not torch.equal(given, value):
            raise CacheMissError(f"The output of layer '{layer}' was replaced.")
        return given


class _Slot(nn.Module):
    """Stands where a layer of the network stands."""

    def forward(self, value: Tensor) -> Tensor:
        return value


def _slots(layers: Sequence[str]) -> nn.Module:
    """A module with one for each layer inside, under the same names."""
    root: nn.Module = _Slot()
    for layer in layers:
        module = root
        for part in split_call(layer)[0].split("."):
            if part not in module._modules:
                module.add_module(part, _Slot())
            module = module.get_submodule(part)
    return root


def _linked(pull: Callable[[Tensor], list[Tensor]], value: Tensor, given: list[Tensor]) -> Tensor:
    """A value that hangs on the given ones as it did in the network."""
    linked: Tensor = _Linked.apply(pull, value, *given)
    return linked


class _Linked(torch.autograd.Function):
    """A value made before, whose gradient is pulled back through the graph that made it."""

    @staticmethod
    def forward(ctx: Any, pull: Callable[[Tensor], list[Tensor]], value: Tensor, *_: Tensor) -> Any:
        ctx.pull = pull
        return value.clone()

    @staticmethod
    @once_differentiable  # type: ignore[misc,unused-ignore]
    def backward(ctx: Any, slopes: Tensor) -> Any:
        return (None, None, *ctx.pull(slopes))


def cached_avsl(base: AVSL, levels: Callable[[tuple[int, int]], list[Tensor]]) -> AVSL:
    """An AVSL model that shares everything with ``base`` but remembers the maps of its levels.

    ``levels`` gives, by the size of :func:`blank` images, the maps ``(M,C,h,w)`` of theirs.
    """
    model = copy.copy(base)

    def feature_maps(images: Tensor) -> list[Tensor]:
        if _is_blank(images):
            return levels((int(images.shape[-2]), int(images.shape[-1])))
        return base.feature_maps(images)

    def pass_size(count: int, limit: int | None = None, *, together: bool = False) -> int:
        return count  # nothing runs: all that is kept comes at once

    vars(model).update(feature_maps=feature_maps, batch_size=None, pass_size=pass_size)
    return model
