"""The Grad-CAM family: formulas, maps of several layers, and CAMs of a similarity.

A formula takes ``activations`` and ``gradients`` of shape ``(M,C,h,w)`` and returns ``(M,h,w)``
before the final ReLU, which the caller applies unless it wants the sign. All are differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simexplain.arguments import typed
from simexplain.errors import ModelError, check_choice
from simexplain.methods.method import (
    AttentionMaps,
    Method,
    Task,
    check_embeddings,
    margin_directions,
    unexplained_share,
    unexplained_share_warning,
)
from simexplain.methods.pixel_methods import floor_of, slack_of
from simexplain.methods.raw_vectors import trace_vectors
from simexplain.metrics.maps import placed
from simexplain.models.frames import split_frames
from simexplain.models.moving import WHOLE, Region
from simexplain.networks import lengths_of, unit_rows
from simexplain.tracing import Trace, trace

Cam = Callable[[Tensor, Tensor], Tensor]

_CANCELLED = 8 * torch.finfo(torch.float32).eps
"""The share of the mean size of gradients up to which their mean is rounding."""


def channel_weights(gradients: Tensor) -> Tensor:
    """The alpha of Eq. 2: gradients averaged over all positions, ``(M,C)``.

    Zero where they cancel out but for rounding, as under a head that takes the mean away.
    """
    means = gradients.mean(dim=(2, 3))
    with torch.no_grad():
        floor = _CANCELLED * gradients.abs().mean(dim=(2, 3))
    return torch.where(means.abs() > floor, means, 0.0)


def weighted(weights: Tensor, activations: Tensor) -> Tensor:
    """Channels ``(M,C,h,w)`` times weights ``(M,C)``, summed to ``(M,h,w)``.

    Not a matrix product, whose rounding depends on how many images it is taken over.
    """
    return (weights[:, :, None, None] * activations).sum(dim=1)


def grad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017; Eq. 2 of similarity attention): sum_k alpha_k A_k."""
    return weighted(channel_weights(gradients), activations)


def hires_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """The variant without global average pooling (HiResCAM, Draelos and Carin 2020).

    Gradient times activation at every position, summed over channels; exact for a linear tail.
    """
    return (gradients * activations).sum(dim=1)


def layer_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """LayerCAM (Jiang et al. 2021): only positive gradients count, position by position."""
    return (gradients.relu() * activations).sum(dim=1)


def grad_cam_plus_plus(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM++ (Chattopadhay et al. 2018), with the published closed form for its alphas.

    ``alpha = g^2 / (2 g^2 + sum(A) g^3)`` and weights ``sum alpha relu(g)``; where ``g`` or the
    denominator vanishes the alpha is zero. Unlike the others it changes shape with the scale of
    the score.
    """
    total = activations.sum(dim=(2, 3), keepdim=True)
    # g^2 cancelled in numerator and denominator, since the squares of small gradients underflow.
    denominator = 2 + total * gradients
    usable = (gradients != 0) & (denominator.abs() > 1e-12)
    alpha = torch.where(usable, 1 / torch.where(usable, denominator, 1.0), 0.0)
    weights = (alpha * gradients.relu()).sum(dim=(2, 3))
    return weighted(weights, activations)


CAMS: dict[str, Cam] = {
    "grad_cam": grad_cam,
    "hires_cam": hires_cam,
    "layer_cam": layer_cam,
    "grad_cam_plus_plus": grad_cam_plus_plus,
}
"""Every formula by name; a new one is one function and one line here."""


Cams = str | tuple[str, ...] | None
"""A formula for all layers, one for each, or None: Grad-CAM at the coarsest, LayerCAM elsewhere."""


def check_cams(cam: Cams) -> None:
    """Refuses unknown formulas.

    Raises:
        ComparisonError: If a name is not in ``CAMS``.
    """
    for name in (cam,) if isinstance(cam, str) else cam or ():
        check_choice("cam", name, CAMS)


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


def fuse(
    maps: Sequence[Tensor],
    regions: Sequence[Region] = (),
    scaled: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Several maps ``(B,K,h,w)`` as one: the product of their positive parts, each scaled to one.

    All are brought to the finest grid bilinearly. A single map is returned as it is, with its sign.

    Args:
        maps: The maps.
        regions: Where in the joined map each lies (``SimilarityModel.apart``); all over it unless
            given.
        scaled: Scales maps to one; each by itself unless given.
    """
    if len(maps) == 1:
        return maps[0]
    regions = regions or (WHOLE,) * len(maps)
    grid = finest_grid(maps, regions)
    product = torch.ones(())
    for single, region in zip(maps, regions, strict=True):
        grown = at_grid(single, grid, region)
        product = product.to(grown) * (scaled or unit_scaled)(grown.relu())
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


SCORES = {
    "cosine": "of the unit embeddings",
    "dot": "of the vectors before normalisation",
    "held": "cosine with the lengths of the vectors held constant",
}
"""The available similarities."""

_CANCELS_BELOW = 1e-3


@dataclass(frozen=True)
@typed
class SimilarityCAM(Method):
    """Grad-CAM, HiResCAM, LayerCAM or Grad-CAM++ (``CAMS``) of a similarity, for every image.

    Each image's score is its similarity to the positives minus that to the negatives, all other
    images held (``margin_directions``). One forward and one backward pass serve the whole batch.

    The cosine does not change when all features grow alike, so its gradient is orthogonal to the
    vector. With average pooling, a linear tail without bias and no final ReLU its map sums to zero
    however similar the images are, and a map scaled to its own maximum does not show how much.
    ``held`` is free of that: its map then sums to the cosine.

    Attributes:
        score: ``cosine``, ``dot`` or ``held``, see ``SCORES``.
        cam: A formula in ``CAMS`` for all layers, or one per layer.
        keep_negative: Leave out the final ReLU.
    """

    score: str = "cosine"
    cam: Cams = None
    keep_negative: bool = False

    def __post_init__(self) -> None:
        check_choice("score", self.score, SCORES)
        check_cams(self.cam)

    def attribute(self, task: Task) -> AttentionMaps:
        """One forward and one backward pass serve the whole batch."""
        model, images, layers, max_batch = task
        flat_images = images.stacked().flatten(0, 1)
        if self.score == "cosine":
            rows = model.of_tokens(layers, flat_images)
            traced = trace(model, flat_images, layers, max_batch=max_batch, by_rows=rows)
        else:
            traced = trace_vectors(model, flat_images, layers, max_batch=max_batch).trace
        vectors = traced.embeddings.detach()
        units = images.restacked(unit_rows(vectors))
        check_embeddings(units, images.roles)
        others = images.like(images.restacked(vectors) if self.score == "dot" else units)
        directions = margin_directions(others)
        flat = directions.flatten(0, 1)
        with torch.enable_grad():
            scores = (traced.embeddings * flat).sum(dim=1)
            if self.score == "held":
                scores = scores / lengths_of(vectors)
            gradients = traced.gradients(scores.sum())
        with torch.no_grad():
            share = self._unexplained(traced, gradients, scores.detach())
            signed = layer_cams(
                traced.maps, gradients, self.cam, scale=torch.ones_like(scores),
                keep_negative=True, frames=model.frames,
            )  # fmt: skip
            layer_maps = {
                layer: images.restacked(maps if self.keep_negative else maps.relu())
                for layer, maps in self._above_rounding(signed, flat, units.flatten(0, 1)).items()
            }
        return AttentionMaps(
            maps=fuse(list(layer_maps.values()), model.apart(list(layer_maps), flat_images)),
            layer_maps=layer_maps,
            weights=directions,
            scores=images.restacked(scores.detach()),
            embeddings=units,
            warnings=self._warnings(signed, share),
            unexplained=None if share is None else images.restacked(share),
        ).detached()

    def _above_rounding(
        self, signed: dict[str, Tensor], directions: Tensor, units: Tensor
    ) -> dict[str, Tensor]:
        """Maps with those set to zero that are rounding: of cosines as large as they can be."""
        if self.score != "cosine":
            return signed
        seen = (slack_of(directions, units) > floor_of(directions)).view(-1, 1, 1)
        return {layer: maps * seen for layer, maps in signed.items()}

    def _unexplained(
        self, traced: Trace, gradients: dict[str, Tensor], scores: Tensor
    ) -> Tensor | None:
        """The largest share of any layer ``(M,)``; gradients times maps are what positions add."""
        if self.score == "cosine":
            return None
        maps = traced.maps
        sums = [(gradients[layer] * maps[layer]).sum(dim=(1, 2, 3)) for layer in maps]
        return torch.stack([unexplained_share(scores, one.to(scores)) for one in sums]).amax(dim=0)

    def _warnings(self, signed: dict[str, Tensor], share: Tensor | None) -> tuple[str, ...]:
        if share is not None:
            return unexplained_share_warning(float(share.max()), " x ".join(signed))
        cancelled = [
            layer
            for layer, maps in signed.items()
            if bool(
                (maps.sum(dim=(1, 2)).abs() < _CANCELS_BELOW * maps.abs().sum(dim=(1, 2))).any()
            )
        ]
        if not cancelled:
            return ()
        return (
            f"At layer {cancelled[0]} the evidence for and against cancels exactly, as the cosine "
            "does not change with the length of the vector; the map shows where, not how much, and "
            "score='held' does both.",
        )
