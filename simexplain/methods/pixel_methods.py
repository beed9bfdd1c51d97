"""Methods on pixels: the score of each image, what hides pixels, and maps from hiding parts."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from simexplain.arguments import typed
from simexplain.comparison import Comparison
from simexplain.errors import ComparisonError, ModelError, check_choice
from simexplain.methods.method import (
    AttentionMaps,
    Method,
    Task,
    check_embeddings,
    margin_directions,
)
from simexplain.metrics.curves import FILLS
from simexplain.models.base import SimilarityModel
from simexplain.models.blackbox import pixel_methods
from simexplain.networks import at_least_single, preserve_state
from simexplain.tracing import trace

PIXELS = "pixels"
"""The one "layer" of methods that work on pixels."""

PERTURBED_AT_ONCE = 32
"""Perturbed copies in one forward pass where the caller sets no bound."""

ROUNDING = 16
"""How many units in the last place of one a score of unit embeddings is known to."""

# Gradients of a pixel are small numbers, which half precision would round to zero.
_HALF_SCALE = 1024.0


def black_of(model: SimilarityModel) -> Tensor:
    """Black as the network sees it, after the model's normalisation, ``(C,1,1)``."""
    prepare = model.preprocess
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)
        for values in (prepare.mean, prepare.std)
    )
    return -mean / std


def filled(model: SimilarityModel, images: Tensor, fill: str) -> Tensor:
    """What takes the place of hidden pixels, by a name in ``FILLS``: ``(M,3,H,W)`` like images."""
    return FILLS[fill](images, black_of(model))


def check_range(what: str, value: float, low: float, high: float) -> None:
    """Refuses a number outside ``[low, high]``.

    Raises:
        ComparisonError: If it is outside.
    """
    if not low <= value <= high:
        raise ComparisonError(f"Expected {what} between {low:g} and {high:g}, got {value:g}.")


@dataclass(frozen=True)
class Question:
    """The score of every image, ``s = d . f(x)``, as a function of its pixels.

    The direction ``d`` is that of the margin (similarity to the positives minus similarity to the
    negatives) and held constant, so a higher score of any image raises the margin.

    Attributes:
        model: The model to explain.
        comparison: The images with their roles.
        images: The images, flat ``(M,3,H,W)`` with ``M = B * K``, detached; at least float32.
        directions: A direction for each image ``(M,E)``.
        scores: The score of each image ``(M,)``.
        embeddings: Rows ``(M,E)``.
        size: Images in one forward pass.
    """

    model: SimilarityModel
    comparison: Comparison
    images: Tensor
    directions: Tensor
    scores: Tensor
    embeddings: Tensor
    size: int

    @property
    def slack(self) -> Tensor:
        """How far the score can rise or fall with a small turn of the embedding ``(M,)``."""
        return slack_of(self.directions, self.embeddings)

    def answer(
        self, maps: Tensor, warnings: tuple[str, ...] = (), *, size: Tensor | None = None
    ) -> AttentionMaps:
        """The result of a method from its maps ``(M,h,w)``.

        Args:
            maps: One for each image.
            warnings: What to know of them.
            size: How large the changes of the score are that each map is made of ``(M,)``. Where
                they are within rounding (:func:`floor_of`), the map is noise and becomes zero, so
                that it has no peak.
        """
        if size is not None:
            seen = size.to(maps) > floor_of(self.directions).to(maps)
            maps = maps * seen.view(-1, 1, 1)
        maps = self.comparison.restacked(maps.detach().to(self.scores.device, self.scores.dtype))
        return AttentionMaps(
            maps=maps,
            layer_maps={PIXELS: maps},
            weights=self.comparison.restacked(self.directions),
            scores=self.comparison.restacked(self.scores),
            embeddings=self.comparison.restacked(self.embeddings),
            warnings=warnings,
        )


@dataclass(frozen=True)
class PixelMethod(Method):
    """A method that measures how a score changes with the pixels.

    Attributes:
        needs_gradient: Whether it needs the gradient of the pixels, or embeddings alone.
    """

    uses_layers: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = False

    def attribute(self, task: Task) -> AttentionMaps:
        """Asks every image alone; methods on pixels have no layers."""
        model, images, _, max_batch = task
        return self.answer(ask(model, images, max_batch), max_batch)

    @abstractmethod
    def answer(self, question: Question, max_batch: int | None) -> AttentionMaps:
        """Maps ``(B,K,H,W)``, by :meth:`Question.answer`; ``max_batch`` bounds a pass."""

    @abstractmethod
    def passes(self, images: Comparison) -> int:
        """How often each image passes through the network."""

    def forwards(self, images: Comparison) -> int:
        """Images that pass through the network for these comparisons."""
        return self.passes(images) * images.batch * images.count


def floor_of(directions: Tensor) -> Tensor:
    """Changes of a score ``d . f`` that rounding explains ``(M,)``.

    ``16 eps max(|d|, 1)`` of the type that embeddings are computed in, 1.9e-6 for float32: an
    embedding has length one and is rounded relative to that, whatever is subtracted from it.

    Args:
        directions: ``(M,E)``.
    """
    sizes: Tensor = directions.norm(dim=1).clamp_min(1)
    return ROUNDING * torch.finfo(directions.dtype).eps * sizes


def slack_of(directions: Tensor, units: Tensor) -> Tensor:
    """The length of what of directions ``(M,E)`` is orthogonal to unit embeddings ``(M,E)``.

    The gradient of ``d . f`` with respect to anything below the normalisation is proportional to
    it. It is zero where an embedding is as near to what it is compared with as can be, say of two
    identical pictures: what a network then gives as a gradient is rounding.
    """
    along = (directions * units).sum(dim=1, keepdim=True)
    across: Tensor = (directions - along * units).norm(dim=1)
    return across


def ask(model: SimilarityModel, images: Comparison, max_batch: int | None) -> Question:
    """Embeds all images once and returns the direction in which each should move.

    Args:
        model: The model; nothing of it is changed.
        images: Images ``(3,H,W)`` in a comparison.
        max_batch: Bounds the images of one forward pass.

    Raises:
        ModelError: If an embedding is zero or not finite.
    """
    # For sums over masks and steps; the model gets its own type from embed.
    flat = at_least_single(images.stacked().flatten(0, 1).detach())
    rows = trace(model, flat, (), max_batch=max_batch).embeddings
    check_embeddings(images.restacked(rows), images.roles)
    directions = margin_directions(images.like(images.restacked(rows))).flatten(0, 1)
    scores = (directions * rows).sum(dim=1)
    size = model.batch_size or max_batch or PERTURBED_AT_ONCE
    return Question(model, images, flat, directions, scores, rows, size)


def scores_of(
    model: SimilarityModel, images: Tensor, directions: Tensor, max_batch: int | None
) -> Tensor:
    """The score ``d . f(x)`` of each image ``(M,)``, without a graph.

    Args:
        model: The model; nothing of it is changed.
        images: Preprocessed images ``(M,3,H,W)``.
        directions: A direction for each ``(M,E)``, or one for all ``(1,E)``.
        max_batch: Bounds the images of one forward pass.
    """
    rows = trace(model, images, (), max_batch=max_batch).embeddings
    return (rows * directions).sum(dim=1)


@contextmanager
def differentiable_scores(model: SimilarityModel) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """Inside: a function ``(images, directions) -> scaled scores`` to differentiate by pixels.

    Scores are scaled by a power of two, so that gradients survive half precision; give what comes
    of them to :func:`unscaled`. Modes and the random state are as before afterwards.

    Raises:
        ModelError: If the model gives no gradient with respect to its input.
    """

    def scores(images: Tensor, directions: Tensor) -> Tensor:
        count, size = len(images), model.pass_size(len(images))
        filled = images
        if model.batch_size is not None and (missing := -count % size):
            filled = torch.cat((images, images[-1:].detach().expand(missing, *images.shape[1:])))
        # Copies, since a network may normalise its input in place.
        rows = torch.cat([model.embed(part.clone()) for part in torch.split(filled, size)])[:count]
        if not rows.requires_grad:
            raise _without_gradient(model)
        return (rows * directions).sum(dim=1) * _HALF_SCALE

    try:
        with preserve_state(model.network), torch.enable_grad():
            yield scores
    except RuntimeError as error:
        # Parameters may have a gradient where the images, detached somewhere inside, have none.
        if "not have been used in the graph" in str(error):
            raise _without_gradient(model) from error
        raise


def unscaled(gradients: Tensor) -> Tensor:
    """Gradients of scores from gradients of scaled scores."""
    return gradients.detach() / _HALF_SCALE


def _without_gradient(model: SimilarityModel) -> ModelError:
    return ModelError(
        f"{model.name} gives no gradient with respect to its input pixels; use a method that needs "
        f"none: {', '.join(pixel_methods(False))}."
    )


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
