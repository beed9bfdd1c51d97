"""From activations and gradients at several layers to one map per image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from simexplain.errors import ComparisonError, ModelError
from simexplain.methods.cams import CAMS
from simexplain.metrics.maps import placed
from simexplain.models.frames import split_frames
from simexplain.models.moving import WHOLE, Region

Cams = str | tuple[str, ...] | None
"""A formula for all layers, one for each, or None: Grad-CAM at the coarsest, LayerCAM elsewhere."""


def check_cams(cam: Cams) -> None:
    """Refuses unknown formulas.

    Raises:
        ComparisonError: If a name is not in ``CAMS``.
    """
    for name in (cam,) if isinstance(cam, str) else cam or ():
        if name not in CAMS:
            raise ComparisonError(f"Expected cam to be one of {', '.join(CAMS)}, got '{name}'.")


def layer_cams(
    activations: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    cam: Cams,
    *,
    scale: Tensor,
    keep_negative: bool,
    frames: int = 1,
) -> dict[str, Tensor]:
    """The map ``(M,h,w)`` of every layer.

    Args:
        activations: Per layer ``(M,C,h,w)``.
        gradients: Likewise.
        cam: See :data:`Cams`.
        scale: What each image's gradient is multiplied by first, ``(M,)``.
        keep_negative: Leave out the final ReLU.
        frames: Of how many frames below each other the images are made; each has a map of its own.

    Raises:
        ModelError: If there is not one formula for each layer.
    """
    cams = {}
    scale = scale.repeat_interleave(frames) if frames > 1 else scale
    for layer, name in _formulas(activations, cam).items():
        kind = torch.promote_types(gradients[layer].dtype, scale.dtype)
        own, gradient = (
            split_frames(part[layer].to(kind), frames).flatten(0, 1) if frames > 1
            else part[layer].to(kind)
            for part in (activations, gradients)
        )  # fmt: skip
        raw = CAMS[name](own, gradient * scale.view(-1, 1, 1, 1).to(gradient))
        if frames > 1:
            raw = raw.reshape(-1, frames * raw.shape[1], raw.shape[2])
        cams[layer] = raw if keep_negative else raw.relu()
    return cams


def _formulas(maps: Mapping[str, Tensor], cam: Cams) -> dict[str, str]:
    if isinstance(cam, str):
        return dict.fromkeys(maps, cam)
    if cam is not None:
        if len(cam) != len(maps):
            raise ModelError(f"Expected one cam for each of {len(maps)} layers, got {len(cam)}.")
        return dict(zip(maps, cam, strict=True))
    coarsest = min(grid.shape[2:].numel() for grid in maps.values())
    return {
        layer: "grad_cam" if grid.shape[2:].numel() == coarsest else "layer_cam"
        for layer, grid in maps.items()
    }


def fuse(maps: Sequence[Tensor], regions: Sequence[Region] = ()) -> Tensor:
    """Several maps ``(B,K,h,w)`` as one: the product of their positive parts, each scaled to one.

    All are brought to the finest grid bilinearly. A single map is returned as it is, with its sign.

    Args:
        maps: The maps.
        regions: Where in the joined map each lies (``SimilarityModel.apart``); all over it unless
            given.
    """
    if len(maps) == 1:
        return maps[0]
    regions = regions or (WHOLE,) * len(maps)
    grid = finest_grid(maps, regions)
    product = torch.ones(())
    for single, region in zip(maps, regions, strict=True):
        grown = at_grid(single, grid, region)
        product = product.to(grown) * unit_scaled(grown.relu())
    return product


def finest_grid(maps: Sequence[Tensor], regions: Sequence[Region] = ()) -> tuple[int, int]:
    """Rows and columns of the map ``(...,h,w)`` with the most positions, as if all were as large.

    Args:
        maps: The maps.
        regions: As for :func:`fuse`.
    """
    sizes = [
        (round(h / (bottom - top)), round(w / (right - left)))
        for (h, w), (top, left, bottom, right) in zip(
            (single.shape[-2:] for single in maps), regions or (WHOLE,) * len(maps), strict=True
        )
    ]
    return max(sizes, key=math.prod)


def at_grid(maps: Tensor, grid: tuple[int, int], region: Region = WHOLE) -> Tensor:
    """Maps ``(M,h,w)`` or ``(B,K,h,w)`` on a finer grid, bilinearly; in the graph they came in.

    Args:
        maps: The maps.
        grid: ``(H,W)``.
        region: The part of the grid that they are laid on; zero beyond it.
    """
    flat = maps if maps.dim() == 4 else maps.unsqueeze(1)
    grown = placed(flat, grid, region)
    return grown if maps.dim() == 4 else grown.squeeze(1)


def unit_scaled(maps: Tensor) -> Tensor:
    """Maps ``(...,h,w)`` divided by their largest absolute value; a zero map stays zero."""
    top = maps.abs().amax(dim=(-2, -1), keepdim=True)
    return maps / torch.where(top > 0, top, torch.ones_like(top))
