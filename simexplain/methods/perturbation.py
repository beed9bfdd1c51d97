"""Hiding parts of the image and watching its score: for models of which only answers are known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from simexplain.arguments import typed
from simexplain.comparison import Comparison
from simexplain.methods.method import AttentionMaps
from simexplain.methods.scoring import (
    PixelMethod,
    Question,
    check_choice,
    check_range,
    filled,
    scores_of,
)
from simexplain.metrics.fills import FILLS


@dataclass(frozen=True)
class _Windows(PixelMethod):
    """What methods with a sliding window share."""

    window: float = 0.2
    stride: float = 0.1
    fill: str = "blur"

    def __post_init__(self) -> None:
        check_range("window", self.window, 1e-3, 1)
        check_range("stride", self.stride, 1e-3, self.window)
        check_choice("fill", self.fill, FILLS)


@dataclass(frozen=True)
@typed
class Occlusion(_Windows):
    """How far the score falls when a window is hidden (Zeiler and Fergus 2013, arXiv 1311.2901).

    Each pixel gets the mean fall over all windows that cover it. Computed by captum.

    Attributes:
        window: Side of the square window as a share of the shorter side of the image.
        stride: Its step, likewise; at most the window.
        fill: A name in ``FILLS``: ``blur``, ``mean``, ``black`` or ``border``.
        keep_negative: Leave out the final ReLU, so that evidence against the score stays.
    """

    keep_negative: bool = True

    def answer(self, question: Question, max_batch: int | None) -> AttentionMaps:
        """The fall of the score, one image after the other."""
        from captum.attr import Occlusion as Captum

        fills = filled(question.model, question.images, self.fill)
        channels = question.images.shape[1]
        window, stride = _in_pixels(question.comparison, self.window, self.stride)
        # One image after the other: then a batch is full of perturbed copies of one image.
        tool = Captum(lambda copies, d: scores_of(question.model, copies, d, question.size))
        maps = [
            tool.attribute(
                image[None],
                sliding_window_shapes=(channels, window, window),
                strides=(channels, stride, stride),
                baselines=fill[None],
                additional_forward_args=direction[None],
                perturbations_per_eval=question.size,
            )[0, 0]  # the window covers all channels, so they agree
            for image, fill, direction in zip(
                question.images, fills, question.directions, strict=True
            )
        ]
        drops = torch.stack(maps)
        size = drops.abs().amax(dim=(1, 2))
        return question.answer(drops if self.keep_negative else drops.relu(), size=size)

    def passes(self, images: Comparison) -> int:
        """How often each image passes through the network."""
        window, stride = _in_pixels(images, self.window, self.stride)
        # Captum's last window may hang over the edge.
        steps = [math.ceil((side - window) / stride) + 1 for side in images.image_size]
        return math.prod(steps) + 2


@dataclass(frozen=True)
@typed
class SBSM(_Windows):
    """Similarity-based saliency maps by sliding windows.

    Dong et al., Explainability for Content-Based Image Retrieval, CVPR workshops 2019:
    ``sum of max(s - s_i, 0) (1 - m_i) / sum of (1 - m_i)``, where ``s_i`` is the score with window
    ``i`` hidden and ``m_i`` is 0 inside it. The paper's distance to one other image grows as the
    score of a similar pair falls; the score here is that of any comparison. All windows are whole:
    the last one is pushed back to the edge.

    Attributes:
        window: Side of the square window as a share of the shorter side of the image.
        stride: Its step, likewise; at most the window.
        fill: A name in ``FILLS``: ``blur``, ``mean``, ``black`` or ``border``.
        signed: Also count windows whose hiding raises the score, as negative.
    """

    signed: bool = False

    def answer(self, question: Question, max_batch: int | None) -> AttentionMaps:
        """The falls of all windows, shared out over the pixels that each of them hides."""
        fills = filled(question.model, question.images, self.fill)
        window, corners = self._windows(question.comparison)
        total = torch.zeros_like(question.images[:, 0])
        covered = torch.zeros_like(total[0])
        for some in (corners[i : i + question.size] for i in range(0, len(corners), question.size)):
            keep = _windows_hidden(some, window, question.images)
            covered += (1 - keep).sum(dim=0)
            for index in range(len(total)):
                drops = question.scores[index] - _masked_scores(question, index, fills, keep)
                drops = drops if self.signed else drops.relu()
                total[index] += torch.einsum("n,nhw->hw", drops.to(keep), 1 - keep)
        total = total / covered.clamp_min(1)
        return question.answer(total, size=total.abs().amax(dim=(1, 2)))

    def passes(self, images: Comparison) -> int:
        """How often each image passes through the network."""
        return len(self._windows(images)[1]) + 1

    def _windows(self, images: Comparison) -> tuple[int, list[tuple[int, int]]]:
        """The side of the window and the upper left corner of every place it goes to."""
        window, stride = _in_pixels(images, self.window, self.stride)
        tops, lefts = (
            [*range(0, side - window, stride), side - window] for side in images.image_size
        )
        return window, [(top, left) for top in tops for left in lefts]


@dataclass(frozen=True)
@typed
class RandomMasks(PixelMethod):
    """Which random masks keep the score high and which do not, after Distance Explainer.

    Meijer and Bos (2025, arXiv 2505.15516), who rank masks by a distance; the masks are those of
    RISE (Petsiuk et al. 2018, arXiv 1806.07421): random cells, enlarged bilinearly and shifted.
    The map is the mean of the masks with the highest scores minus the mean of those with the
    lowest. All images get the same masks, so a map does not depend on others in its batch.

    Attributes:
        masks: How many masks are drawn.
        grid: Cells along each side of a mask.
        keep: The probability that a cell is kept.
        fill: A name in ``FILLS``: ``blur``, ``mean``, ``black`` or ``border``.
        share: The share of the masks at either end of the ranking that makes the map.
        seed: Of the masks.
        keep_negative: Leave out the final ReLU, so that evidence against the score stays.
    """

    masks: int = 500
    grid: int = 8
    keep: float = 0.5
    fill: str = "blur"
    share: float = 0.1
    seed: int = 0
    keep_negative: bool = True

    def __post_init__(self) -> None:
        check_choice("fill", self.fill, FILLS)
        check_range("masks", self.masks, 2, 1_000_000)
        check_range("grid", self.grid, 1, 1000)
        check_range("keep", self.keep, 0, 1)
        check_range("share", self.share, 0, 0.5)

    def answer(self, question: Question, max_batch: int | None) -> AttentionMaps:
        """The best masks less the worst; they are the same for every image."""
        fills = filled(question.model, question.images, self.fill)
        cells, shifts = self._drawn()
        size = question.size
        parts = [slice(start, start + size) for start in range(0, self.masks, size)]
        scores = question.scores.new_empty(len(question.images), self.masks)
        for part in parts:
            masks = _enlarged(cells[part], shifts[part], question.images)
            for index in range(len(scores)):
                scores[index, part] = _masked_scores(question, index, fills, masks)
        signs = self._ranked(scores).to(question.images)
        # Masks are made again rather than kept: they are as large as the images.
        total = torch.zeros_like(question.images[:, 0])
        for part in parts:
            masks = _enlarged(cells[part], shifts[part], question.images)
            total += torch.stack([torch.einsum("n,nhw->hw", s, masks) for s in signs[:, part]])
        spread = scores.amax(dim=1) - scores.amin(dim=1)
        return question.answer(total if self.keep_negative else total.relu(), size=spread)

    def passes(self, images: Comparison) -> int:
        """How often each image passes through the network."""
        return self.masks + 1

    def _drawn(self) -> tuple[Tensor, Tensor]:
        """Cells ``(N,grid,grid)``, 1 where the image is kept, and shifts ``(N,2)`` in cells."""
        # The same masks whatever the default type and device are.
        how: dict[str, Any] = {
            "generator": torch.Generator().manual_seed(self.seed),
            "dtype": torch.float32,
            "device": "cpu",
        }
        cells = torch.rand(self.masks, self.grid, self.grid, **how) < self.keep
        return cells.float(), torch.rand(self.masks, 2, **how)

    def _ranked(self, scores: Tensor) -> Tensor:
        """The part ``(M,N)`` of each mask in the map: +1/n for the best, -1/n for the worst n."""
        ends = max(1, round(self.share * self.masks))
        # Equal scores in the order of the masks, whatever the device.
        order = scores.argsort(dim=1, stable=True)
        signs = torch.zeros_like(scores)
        signs.scatter_(1, order[:, -ends:], 1 / ends)
        signs.scatter_(1, order[:, :ends], -1 / ends)
        # Where no mask makes a difference, a ranking would be noise.
        return signs * (scores.amax(dim=1) > scores.amin(dim=1)).unsqueeze(1)


def _in_pixels(images: Comparison, window: float, stride: float) -> tuple[int, int]:
    """Window and stride in pixels, from shares of the shorter side."""
    shorter = min(images.image_size)
    side = max(1, round(window * shorter))
    return side, min(side, max(1, round(stride * shorter)))


def _windows_hidden(corners: list[tuple[int, int]], window: int, like: Tensor) -> Tensor:
    """Masks ``(n,H,W)``: 0 inside one window each, 1 elsewhere."""
    masks = like.new_ones(len(corners), *like.shape[-2:])
    for mask, (top, left) in zip(masks, corners, strict=True):
        mask[top : top + window, left : left + window] = 0
    return masks


def _masked_scores(question: Question, index: int, fills: Tensor, keep: Tensor) -> Tensor:
    """The score of one image under each of the masks ``(n,H,W)``, 1 where it is kept."""
    shown = keep.unsqueeze(1)
    copies = question.images[index] * shown + fills[index] * (1 - shown)
    direction = question.directions[index : index + 1]
    return scores_of(question.model, copies, direction, question.size)


def _enlarged(cells: Tensor, shifts: Tensor, like: Tensor) -> Tensor:
    """Smooth masks ``(n,H,W)`` in [0,1] from cells ``(n,g,g)``, stretched over one cell more.

    As in RISE: ``g`` cells cover the pixels of ``g + 1``, of which the image's part is cut out.
    """
    height, width = like.shape[-2:]
    grid = cells.shape[-1]
    tall, wide = math.ceil(height / grid), math.ceil(width / grid)
    size = (tall * (grid + 1), wide * (grid + 1))
    grown = F.interpolate(
        cells.to(like).unsqueeze(1), size=size, mode="bilinear", align_corners=False
    )
    masks = like.new_empty(len(cells), height, width)
    for mask, whole, (down, right) in zip(masks, grown[:, 0], shifts.tolist(), strict=True):
        top, left = int(down * tall), int(right * wide)
        mask.copy_(whole[top : top + height, left : left + width])
    return masks
