"""Deletion and insertion: does a score follow the pixels that a heatmap calls important?

Petsiuk, Das and Saenko 2018 (RISE), here on any score: of one image while the others are held, or
of several images that are masked at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from simexplain.errors import ComparisonError
from simexplain.metrics.fills import FILLS
from simexplain.metrics.maps import grown

Score = Callable[[Tensor], Tensor]
"""From ``M`` images ``(M,3,H,W)``, or ``M`` groups of them ``(M,K,3,H,W)``, to scores ``(M,)``."""

_FLAT = 1e-5


_MOST_STEPS = 100_000


@dataclass(frozen=True)
class Curve:
    """A score while more and more pixels are deleted, or revealed.

    Attributes:
        fractions: ``(T,)`` float64 from 0 to 1, the share of pixels changed, as whole pixels allow.
        raw: The scores ``(T,)``, float64.
        normalised: ``(raw - empty) / (whole - empty)``, ``(T,)``: 1 is the score of the whole image
            and 0 that of the fully deleted one; values beyond both can occur. NaN where the whole
            image does not score higher than the deleted one by ``least``, since then there is
            nothing to lose, and the quotient would only reflect what happens between the two.
        area: Under ``normalised`` by the trapezoid rule, which equals
            ``(raw_area - empty) / (whole - empty)``; low is good for deletion, high for insertion.
        raw_area: Under ``raw``, always defined.
        whole: Score of the whole image.
        empty: Score of the fully deleted image.
    """

    fractions: Tensor
    raw: Tensor
    normalised: Tensor
    area: float
    raw_area: float
    whole: float
    empty: float


def deletion(
    score: Score,
    images: Tensor,
    heatmaps: Tensor,
    *,
    steps: int = 20,
    baseline: str | Tensor = "blur",
    max_batch: int | None = None,
    least: float = 0,
) -> Curve:
    """The score while pixels are replaced by a baseline, the hottest first.

    Args:
        score: Called without gradients on variants of ``images``, one more axis in front.
        images: One image ``(3,H,W)``, or several ``(K,3,H,W)`` that lose the same share of their
            pixels at the same time, each by its own heatmap; any units.
        heatmaps: ``(h,w)`` or ``(K,h,w)``, any range and sign, upsampled bilinearly. Of equally hot
            pixels the one that comes first row by row goes first.
        steps: How many equal fractions the pixels are cut into; ``T`` is one more.
        baseline: A name in :data:`BASELINES`, or a tensor that broadcasts to ``images``. ``black``
            is zero; of normalised images give the colour as a tensor ``(3,1,1)``.
        max_batch: Bounds the images in one call of ``score``; at least one variant is passed.
        least: By how much the whole image has to score higher than the deleted one for areas to be
            normalised, in units of the score; never less than what rounding alone makes.

    Raises:
        ComparisonError: If shapes or options do not fit.
    """
    ground = baseline_of(images, baseline)
    return _curve(score, ground, images, heatmaps, steps, max_batch, least, falling=True)


def insertion(
    score: Score,
    images: Tensor,
    heatmaps: Tensor,
    *,
    steps: int = 20,
    baseline: str | Tensor = "blur",
    max_batch: int | None = None,
    least: float = 0,
) -> Curve:
    """The score while pixels are revealed from a baseline, the hottest first.

    Takes and gives what :func:`deletion` does.

    Raises:
        ComparisonError: If shapes or options do not fit.
    """
    ground = baseline_of(images, baseline)
    return _curve(score, images, ground, heatmaps, steps, max_batch, least, falling=False)


def ranks(heatmaps: Tensor, size: tuple[int, int]) -> Tensor:
    """The place of every pixel in order of heat, 0 the hottest: ``(...,h,w) -> (...,H,W)``.

    Ties are broken by the index of the pixel, row by row.
    """
    flat = grown(heatmaps, size).flatten(-2)
    order = flat.argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1).view(*flat.shape[:-1], *size)


def baseline_of(images: Tensor, baseline: str | Tensor) -> Tensor:
    """What takes the place of deleted pixels: a tensor of the shape of ``images`` ``(...,3,H,W)``.

    Raises:
        ComparisonError: If the baseline does not exist or the tensor does not fit the images.
    """
    if isinstance(baseline, Tensor):
        try:
            return baseline.to(images).expand_as(images)
        except RuntimeError as error:
            raise ComparisonError(
                f"Expected a baseline that broadcasts to images {tuple(images.shape)}, got "
                f"{tuple(baseline.shape)}; a colour has the shape (3,1,1)."
            ) from error
    if baseline not in BASELINES:
        raise ComparisonError(
            f"Expected baseline to be one of {', '.join(BASELINES)}, got '{baseline}'."
        )
    ground: Tensor = BASELINES[baseline](images.detach(), torch.zeros(images.shape[-3], 1, 1))
    return ground


BASELINES = FILLS
"""What may take the place of deleted pixels: the same as in methods that hide parts."""


def _curve(
    score: Score,
    first: Tensor,
    then: Tensor,
    heatmaps: Tensor,
    steps: int,
    max_batch: int | None,
    least: float,
    *,
    falling: bool,
) -> Curve:
    """The score while ``then`` turns into ``first`` from the hottest pixel on."""
    _check(first, heatmaps, steps, least)
    first, then = first.detach(), then.detach()
    size = (int(first.shape[-2]), int(first.shape[-1]))
    rank = ranks(heatmaps.to(first.device), size)
    pixels = size[0] * size[1]
    counts = [(step * pixels + steps // 2) // steps for step in range(steps + 1)]
    group = first.shape[:-3].numel()
    at_once = len(counts) if max_batch is None else max(1, max_batch // group)
    parts = []
    for start in range(0, len(counts), at_once):
        limits = torch.tensor(counts[start : start + at_once], device=first.device)
        chosen = rank < limits.view(-1, *[1] * rank.dim())
        with torch.no_grad():
            values = score(torch.where(chosen.unsqueeze(-3), first, then))
        if values.shape != limits.shape:
            raise ComparisonError(
                f"Expected one score for each of {len(limits)} variants, got shape "
                f"{tuple(values.shape)}."
            )
        parts.append(values.detach().to("cpu", torch.float64))
    fractions = torch.tensor(counts, dtype=torch.float64) / pixels
    return _summed(fractions, torch.cat(parts), least, falling=falling)


def _summed(fractions: Tensor, raw: Tensor, least: float, *, falling: bool) -> Curve:
    whole, empty = (float(raw[0 if falling else -1]), float(raw[-1 if falling else 0]))
    gap = whole - empty
    rounding = _FLAT * max(abs(whole), abs(empty))
    scale = gap if gap > max(least, rounding) else float("nan")
    area = float(torch.trapezoid(raw, fractions))
    return Curve(
        fractions=fractions,
        raw=raw,
        normalised=(raw - empty) / scale,
        area=(area - empty) / scale,
        raw_area=area,
        whole=whole,
        empty=empty,
    )


def _check(images: Tensor, heatmaps: Tensor, steps: int, least: float) -> None:
    if images.dim() not in (3, 4) or not images.is_floating_point():
        raise ComparisonError(
            f"Expected one float image (3,H,W) or several (K,3,H,W), got {tuple(images.shape)} of "
            f"{images.dtype}."
        )
    if heatmaps.dim() != images.dim() - 1 or heatmaps.shape[:-2] != images.shape[:-3]:
        raise ComparisonError(
            f"Expected one heatmap (h,w) for each image of {tuple(images.shape)}, got "
            f"{tuple(heatmaps.shape)}."
        )
    if not least >= 0:
        raise ComparisonError(f"Expected least to be at least 0, got {least}.")
    if not 1 <= steps <= _MOST_STEPS:
        raise ComparisonError(f"Expected at least one step and at most {_MOST_STEPS}, got {steps}.")
