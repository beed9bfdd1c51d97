"""The part-based convolutional baseline of person re-identification: six stripes, one vector each.

Sun et al. 2018, "Beyond part models: person retrieval with refined part pooling", section 3.1.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ModelError
from simexplain.networks import preserve_state
from simexplain.tracing import listening

PARTS = 6
"""Stripes of the picture, from top to bottom (section 3.1)."""

SIZE = (384, 128)
"""``(height, width)`` of the input in pixels (section 4.2)."""

_TRIED = (128, 128)


class Reduction(nn.Linear):
    """From the vector ``g`` of a stripe to its short one ``h``: one linear layer for all stripes.

    A 1x1 convolution of the pooled map is the same. The authors' code puts a batch norm behind it,
    which is kept, and a ReLU, which is not: without it the embedding is an affine function of the
    last map, so that what each position adds to it is exact.
    """

    def __init__(self, channels: int, width: int) -> None:
        """Takes the numbers of both vectors; weights are drawn as in the authors' code."""
        super().__init__(channels, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        nn.init.kaiming_normal_(self.weight, mode="fan_out")

    def forward(self, rows: Tensor) -> Tensor:
        """Vectors ``(n,width)`` of stripes ``(n,channels)``."""
        reduced: Tensor = self.norm(super().forward(rows))
        return reduced


class PCB(nn.Module):
    """A convolutional network whose last map is pooled stripe by stripe.

    The embedding is that of all stripes side by side, the uppermost first: ``h`` of section 3.1
    where there is a reduction, else ``g``, the pooled channels themselves.

    Attributes:
        base: The network up to its last map ``(M,C,h,w)``, its last stage with stride 1.
        reduction: A :class:`Reduction`, or nothing.
        parts: How many stripes there are.
    """

    def __init__(self, base: nn.Module, channels: int, width: int, parts: int = PARTS) -> None:
        """Takes the parts.

        Args:
            base: Gives maps.
            channels: Of its maps.
            width: Of a stripe's vector ``h``; 0 for ``g`` as it is.
            parts: Stripes.
        """
        super().__init__()
        self.base, self.parts = base, parts
        self.reduction = Reduction(channels, width) if width else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings ``(M, parts * width)`` of images ``(M,3,H,W)``, not normalised.

        Raises:
            ModelError: If a map has fewer rows than there are stripes.
        """
        maps = self.base(images)
        if maps.shape[2] < self.parts:
            raise ModelError(
                f"Expected an image whose last map has at least {self.parts} rows, one for each "
                f"stripe, got {maps.shape[2]} of {images.shape[2]}x{images.shape[3]} pixels; "
                "choose a taller input (--size)."
            )
        # In a function and as plain rows: a map of stripes would be taken for one of the image.
        pooled = F.adaptive_avg_pool2d(maps, (self.parts, 1)).flatten(2)
        rows: Tensor = self.reduction(pooled.transpose(1, 2).flatten(0, 1))
        return rows.reshape(len(images), -1)


def part_based(network: nn.Module, name: str, outputs: int) -> PCB:
    """The part-based baseline over a network of convolutions, which is changed.

    Args:
        network: Of timm or torchvision, without its classifier.
        name: What to call it in errors.
        outputs: Width of the whole embedding, 0 for the pooled channels of every stripe.

    Raises:
        ModelError: If it has no last map, no stride in its last stage that could be taken away,
            or the stripes cannot share the width.
    """
    if outputs % PARTS:
        raise ModelError(
            f"Expected an embedding that {PARTS} stripes share evenly, got {outputs}; choose a "
            f"multiple of {PARTS} (--embedding), such as {PARTS * 256} with 256 for each."
        )
    base = _without_pooling(network, name)
    maps = _unstrided(base, name)
    return PCB(base, maps.shape[1], outputs // PARTS)


def whole_persons(preprocess: Preprocess, size: tuple[int, int] | None) -> Preprocess:
    """Pictures of persons are squashed to the input, none of them is cut off (section 4.2)."""
    return replace(preprocess, size=size or SIZE, fit="squash", crop_fraction=1.0)


def _without_pooling(network: nn.Module, name: str) -> nn.Module:
    """The network up to its last map."""
    from torchvision.models import ResNet

    if isinstance(network, ResNet):
        kept = [(n, m) for n, m in network.named_children() if n not in ("avgpool", "fc")]
        return nn.Sequential(OrderedDict(kept))
    reset: Callable[..., None] | None = getattr(network, "reset_classifier", None)
    if reset is not None:
        try:
            reset(0, "")
        except (TypeError, ValueError, AssertionError, NotImplementedError):
            reset = None
    if reset is None:
        raise _unfit(name, "its pooling cannot be taken off")
    return network


def _unstrided(base: nn.Module, name: str) -> Tensor:
    """Takes the stride of the last stage away; gives the maps of one blank image."""
    maps, layers = _strided(base, name)
    if not layers:
        raise _unfit(name, "its last stage has no stride")
    for layer in layers:
        module: Any = base.get_submodule(layer)
        if "pool" in type(module).__name__.lower():
            base.set_submodule(layer, nn.Identity())
        else:
            module.stride = 1 if isinstance(module.stride, int) else (1, 1)
    finer = _maps(base, name)
    wanted = layers[next(iter(layers))]
    if tuple(finer.shape[2:]) != wanted or finer.shape[1] != maps.shape[1]:
        raise _unfit(name, "its last stage does not work with stride 1")
    return finer


def _strided(base: nn.Module, name: str) -> tuple[Tensor, dict[str, tuple[int, ...]]]:
    """The maps, and the layers that make images as coarse as these, with what they get."""
    sizes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def keep(layer: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4:
                sizes[layer] = tuple(args[0].shape[2:]), tuple(output.shape[2:])

        return note

    steps = [n for n, m in base.named_modules() if n and not _inside(m) and hasattr(m, "stride")]
    with listening(base, {layer: keep(layer) for layer in steps}):
        maps = _maps(base, name)
    last = tuple(maps.shape[2:])
    return maps, {
        layer: before
        for layer, (before, after) in sizes.items()
        if after == last and before[0] > after[0] and before[1] > after[1]
    }


def _inside(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


@torch.no_grad()
def _maps(base: nn.Module, name: str) -> Tensor:
    """The last map of one blank image."""
    try:
        with preserve_state(base):
            maps = base(next(base.parameters()).new_zeros(1, 3, *_TRIED))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise _unfit(name, "it does not take other sizes or strides") from error
    if not isinstance(maps, Tensor) or maps.dim() != 4 or maps.shape[2] != maps.shape[3]:
        raise _unfit(name, "it ends in no map of channels")
    return maps


def _unfit(name: str, why: str) -> ModelError:
    return ModelError(
        f"Expected a network of convolutions for the part-based baseline, but {name} is not fit "
        f"for it: {why}; choose another, such as pcb:timm:resnet50."
    )
