"""Which layers of a network can carry a heatmap, and how their outputs become a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.models.moving import WHOLE, Region

_MOST_PREFIX_TOKENS = 16


@dataclass(frozen=True)
class Layout:
    """How the output of a layer becomes a map ``(M,C,h,w)``.

    Attributes:
        kind: A letter for each axis: ``N`` images, ``C`` channels, others positions. Tokens
            ``(M,L,C)`` are ``NLC``.
        grid: Rows and columns ``(h,w)``.
        tokens: Positions in all; more than cells where there are class tokens or the like.
        cells: The number of each cell's position, row by row; empty where they are all in order.
        region: Where in the image the cells lie.
    """

    kind: str
    grid: tuple[int, int]
    tokens: int
    cells: tuple[int, ...] = ()
    region: Region = WHOLE

    @cached_property
    def places(self) -> Tensor:
        """The number of each cell's position, row by row ``(h*w)``."""
        return torch.tensor(self.cells) if self.cells else torch.arange(self.tokens)

    @property
    def beside(self) -> bool:
        """Whether the output holds more than cells, such as a class token."""
        return self.tokens > self.grid[0] * self.grid[1]

    @property
    def images(self) -> int:
        """The axis of images."""
        return self.kind.index("N")

    @property
    def channels(self) -> int:
        """The axis of channels."""
        return self.kind.index("C")

    def __call__(self, output: Tensor) -> Tensor | None:
        """The map ``(M,C,h,w)`` of an output; None where it does not fit."""
        if output.dim() != len(self.kind):
            return None
        listed = output.movedim((self.images, self.channels), (0, 1))
        if listed.shape[2:].numel() != self.tokens:
            return None
        if not self.cells and listed.shape[2:] == self.grid:
            return listed
        listed = listed.flatten(2)
        first = self.cells[0] if self.cells else 0
        if self.cells and self.cells != tuple(range(first, first + len(self.cells))):
            listed = listed[:, :, self.places.to(output.device)]
        else:
            listed = listed[:, :, first : first + self.grid[0] * self.grid[1]]
        return listed.reshape(*listed.shape[:2], *self.grid)

    def cells_of(self, output: Tensor, other: Tensor) -> Tensor:
        """An output whose cells are those of another one, all else as it was."""
        if not self.beside:
            return other
        away, home = (self.images, self.channels), (0, 1)
        mine, its = (each.movedim(away, home) for each in (output, other))
        places = self.places.to(output.device)
        mixed = mine.flatten(2).index_copy(2, places, its.flatten(2).index_select(2, places))
        return mixed.view(mine.shape).movedim(home, away)


@dataclass(frozen=True)
class Layer:
    """A layer whose output is a map over the image.

    Attributes:
        name: What to pass as ``layer=``.
        kind: The class of the module.
        shape: ``(C,h,w)`` for the image size that was tried.
        stride: Image pixels per cell, vertically and horizontally.
        default: True for the layer that is used when none is named.
        stage: True for the last layer of each resolution, which a sweep shows.
        region: Top, left, bottom and right of what the cells look at, as shares of the image.
    """

    name: str
    kind: str
    shape: tuple[int, int, int]
    stride: tuple[float, float]
    default: bool = False
    stage: bool = False
    region: Region = WHOLE
    measure: Callable[[str], float] | None = field(default=None, repr=False, compare=False)

    @property
    def bypass(self) -> float:
        """The share of the embedding that reaches it past this layer's cells, 0 to 1.

        0 where the graph of the network shows that everything passes the layer. Else the cells are
        replaced by those of another picture, and the share is how far the embedding stays behind;
        measured when it is first read, with one forward pass of two images, or in the pass of an
        explanation: the first two different ones of this shape that were explained, or pictures of
        noise where none were. It varies with the images.
        """
        return 0.0 if self.measure is None else self.measure(self.name)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        return {
            "name": self.name,
            "kind": self.kind,
            "shape": list(self.shape),
            "stride": list(self.stride),
            "default": self.default,
            "stage": self.stage,
            "region": list(self.region),
            "bypass": self.bypass,
        }


@dataclass(frozen=True)
class GridHints:
    """What a network declares about its token grid; timm's transformers declare all of it.

    Attributes:
        patch_embed: The module that computes the grid of an image size, or None.
        prefix_tokens: Class, distillation and register tokens before the patches, or None.
        channels_last: True where four-dimensional outputs are ``(M,h,w,C)``.
    """

    patch_embed: Any = None
    prefix_tokens: int | None = None
    channels_last: bool = False

    def base_grid(self, image_size: tuple[int, int]) -> tuple[int, int] | None:
        """The patch grid ``(h,w)`` of an image, or None where the network does not tell."""
        if self.patch_embed is None:
            return None
        height, width = self.patch_embed.dynamic_feat_size(image_size)
        return int(height), int(width)


def grid_hints(network: nn.Module) -> GridHints:
    """Reads the hints from the first module that has timm's attributes."""
    for module in network.modules():
        patch_embed = getattr(module, "patch_embed", None)
        if hasattr(patch_embed, "dynamic_feat_size"):
            return GridHints(
                patch_embed,
                int(getattr(module, "num_prefix_tokens", 0)),
                str(getattr(module, "output_fmt", "NCHW")).upper().endswith("NHWC"),
            )
    return GridHints()


def to_grid(output: Tensor, image_size: tuple[int, int], hints: GridHints) -> Tensor | None:
    """An output as ``(M,C,h,w)``, or None where it is not a map over the image.

    Understands ``(M,C,h,w)``, ``(M,h,w,C)`` and tokens ``(M,T,C)`` with any prefix tokens.
    """
    if output.dim() == 4:
        first_is_map = _fits((output.shape[1], output.shape[2]), image_size, hints)
        last_is_map = _fits((output.shape[2], output.shape[3]), image_size, hints)
        if first_is_map and (hints.channels_last or not last_is_map):
            return output.permute(0, 3, 1, 2)
        return output if last_is_map or _is_odd_map(output, hints) else None
    if output.dim() == 3:
        layout = _token_grid(output.shape[1], image_size, hints)
        if layout is not None:
            prefix, (height, width) = layout
            return output[:, prefix:].transpose(1, 2).reshape(len(output), -1, height, width)
    return None


def _fits(shape: Sequence[int], image_size: tuple[int, int], hints: GridHints) -> bool:
    """Whether ``(h,w)`` can be a grid over the image: same aspect, not finer than the pixels."""
    (h, w), (height, width) = shape, image_size
    base = hints.base_grid(image_size)
    if base is not None:
        return _is_multiple((h, w), base) or _is_multiple(base, (h, w))
    return h <= height and w <= width and abs(h * width - w * height) <= max(height, width)


def _is_odd_map(output: Tensor, hints: GridHints) -> bool:
    """Maps of fully convolutional networks with unequal strides; never those of transformers."""
    return hints.patch_embed is None and output.shape[2] * output.shape[3] > 1


def _is_multiple(large: Sequence[int], small: Sequence[int]) -> bool:
    return (
        large[0] % small[0] == 0
        and large[1] % small[1] == 0
        and large[0] // small[0] == large[1] // small[1]
    )


def _token_grid(
    count: int, image_size: tuple[int, int], hints: GridHints
) -> tuple[int, tuple[int, int]] | None:
    base = hints.base_grid(image_size) or image_size
    known = hints.prefix_tokens
    prefixes = range(_MOST_PREFIX_TOKENS) if known is None else sorted({known, 0}, reverse=True)
    for prefix in prefixes:
        patches = count - prefix
        if patches < 2:
            continue
        height = round(math.sqrt(patches * base[0] / base[1]))
        if height and patches % height == 0 and _is_multiple(base, (height, patches // height)):
            return prefix, (height, patches // height)
    return None
