"""Which layers of a network can carry a heatmap, and how their outputs become a grid."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from simexplain.errors import ModelError
from simexplain.surveying import LayerRun

_MOST_PREFIX_TOKENS = 16
_STAGES = 4


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
    """

    name: str
    kind: str
    shape: tuple[int, int, int]
    stride: tuple[float, float]
    default: bool = False
    stage: bool = False


@dataclass(frozen=True)
class GridHints:
    """What a network says of its own token grid; timm's transformers say all of it.

    Attributes:
        patch_embed: The module that knows the grid of an image size, or None.
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
        found = _token_grid(output.shape[1], image_size, hints)
        if found is not None:
            prefix, (height, width) = found
            return output[:, prefix:].transpose(1, 2).reshape(len(output), -1, height, width)
    return None


def usable_layers(
    runs: Sequence[LayerRun], image_size: tuple[int, int], batch: int, hints: GridHints
) -> tuple[Layer, ...]:
    """The layers of a survey that feed the embedding from more than one place of the image.

    A layer whose patch tokens the embedding ignores (the last block of a network that reads only
    its class token) would give an empty map and is left out.

    Raises:
        ModelError: If there is none.
    """
    usable = []
    for run in runs:
        grid = to_grid(run.output, image_size, hints)
        if grid is None or len(grid) != batch or grid.shape[2] * grid.shape[3] < 2:
            continue
        if run.gradient is None:
            continue
        gradient = to_grid(run.gradient, image_size, hints)
        if gradient is not None and bool(gradient.ne(0).any()):
            usable.append((run, grid))
    if not usable:
        raise ModelError(
            "The model has no layer with a map over the image that feeds the embedding, so there "
            "is nothing to draw; name one with layer=, or check that its forward is differentiable."
        )
    candidates = _candidates(usable)
    chosen = _named(candidates[-1][0], candidates, runs)
    stages = [_named(run, candidates, runs) for run in _stages(candidates)]
    height, width = image_size
    return tuple(
        Layer(
            run.name,
            type(run.module).__name__,
            (grid.shape[1], grid.shape[2], grid.shape[3]),
            (height / grid.shape[2], width / grid.shape[3]),
            default=run is chosen,
            stage=any(run is stage for stage in stages),
        )
        for run, grid in usable
    )


def _candidates(usable: list[tuple[LayerRun, Tensor]]) -> list[tuple[LayerRun, Tensor]]:
    """What a person would choose from: no pooling, and no insides of attention."""
    candidates = [
        (run, grid) for run, grid in usable if "pool" not in type(run.module).__name__.lower()
    ] or usable
    if candidates[-1][0].output.dim() == 3:
        # Inside attention the last map is qkv; the residual width marks the blocks themselves.
        tokens = Counter(grid.shape[1] for run, grid in candidates if run.output.dim() == 3)
        width = tokens.most_common(1)[0][0]
        candidates = [(run, grid) for run, grid in candidates if grid.shape[1] == width]
    return candidates


def _stages(candidates: list[tuple[LayerRun, Tensor]]) -> list[LayerRun]:
    """The last map of each of the coarsest resolutions, or blocks spread over the depth."""
    cells = {run.name: grid.shape[2:].numel() for run, grid in candidates}
    blocks = {run.name for run, _ in candidates if type(run.module) is not nn.Sequential}
    # What contains everything is the network itself, inside a wrapper.
    first, *others = [{run.name} | _around(run.name) for run, _ in candidates]
    blocks -= first.intersection(*others)
    last = {
        grid.shape[2:]: run
        for run, grid in candidates
        # The inside of a block that ends coarser belongs to the next stage already.
        if all(cells[name] >= cells[run.name] for name in _around(run.name) & blocks)
    }
    if len(last) > 1:
        return list(last.values())[-_STAGES:]
    numbered = [run for run, _ in candidates if run.name.rpartition(".")[2].isdigit()]
    numbered = [run for run in numbered if run is not candidates[-1][0]] + [candidates[-1][0]]
    places = {round((len(numbered) - 1) * (n + 1) / _STAGES) for n in range(_STAGES)}
    return [numbered[place] for place in sorted(places)]


def _around(name: str) -> set[str]:
    """The names of all modules that contain this one."""
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


def _named(
    chosen: LayerRun, candidates: list[tuple[LayerRun, Tensor]], runs: Sequence[LayerRun]
) -> LayerRun:
    """The same map under the name a person would give it: ``layer4``, not ``layer4.1.act2``."""
    same = [run for run, _ in candidates if _is_same(run.output, chosen.output)]
    return min(
        reversed(same),
        key=lambda run: (
            isinstance(run.module, nn.Identity),
            _is_umbrella(run, runs),
            run.name.count("."),
        ),
    )


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.data_ptr() == b.data_ptr()


def _is_umbrella(run: LayerRun, runs: Sequence[LayerRun]) -> bool:
    """True for a container of stages at several resolutions, such as ``features``."""
    sizes = {
        other.output.shape[-2:] if other.output.dim() == 4 else other.output.shape[1:2]
        for other in runs
        if other.name.rpartition(".")[0] == run.name
    }
    return len(sizes) > 1


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
