"""A model with a cache: it answers for pictures it has seen without running its network again.

Methods see an ordinary model. Its layers give what the network gave for the pictures, and gradients
go back through the graphs of the passes that were kept, so that maps are those of the network
itself. What a method does beyond that (perturb pixels, replace a layer's output) cannot be answered
from memory and raises :class:`CacheMissError`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from simexplain.batching.passes import Use, gathered, pulled
from simexplain.errors import ModelError
from simexplain.models.avsl import AVSL
from simexplain.models.base import SimilarityModel
from simexplain.models.layers import GridHints, Layer
from simexplain.models.surveyed import Surveyed
from simexplain.networks import split_call

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
        """Remembers these layers.

        Args:
            base: The model itself.
            layers: Those that will be looked into, as :func:`~simexplain.tracing.trace` names them.
            recall: Gives the passes over the pictures that blank images stand for.
        """
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
            return self._asked(images, raw=raw)
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

    def _asked(self, images: Tensor, *, raw: bool) -> Tensor:
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

    Args:
        base: The model itself, which answers for images that are not :func:`blank`.
        levels: From the size of images to the feature maps ``(M,C,h,w)`` of what they stand for.
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
