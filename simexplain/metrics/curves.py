"""Deletion and insertion: does a score follow the pixels that a heatmap calls important?

Petsiuk, Das and Saenko 2018 (RISE), here on any score: of one image while the others are held, or
of several images that are masked at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from simexplain.errors import ComparisonError, check_choice
from simexplain.metrics.maps import grown

Fill = Callable[[Tensor, Tensor], Tensor]
"""From images ``(...,3,H,W)`` and black ``(3,1,1)`` in their units to images of that shape."""

BLUR = 1 / 8
"""The standard deviation of the blur as a share of the shorter side: shapes go, the tone stays."""


def blurred(images: Tensor, black: Tensor | None = None) -> Tensor:
    """Images ``(...,3,H,W)`` under a Gaussian of :data:`BLUR` times their shorter side.

    At the borders the weights inside the image are scaled to one, so a flat image stays as it is.
    ``black`` is not used.
    """
    exact = images.to(torch.promote_types(images.dtype, torch.float32))
    return _smoothed(exact, BLUR).to(images.dtype)


def mean_colour(images: Tensor, black: Tensor | None = None) -> Tensor:
    """Each image ``(...,3,H,W)`` in its own mean colour; ``black`` is not used."""
    return images.mean(dim=(-2, -1), keepdim=True).expand_as(images)


def blackened(images: Tensor, black: Tensor) -> Tensor:
    """Black ``(3,1,1)`` all over: zeros for images in [0, 1], else black after normalisation."""
    return black.to(images).expand_as(images)


def border_colour(images: Tensor, black: Tensor | None = None) -> Tensor:
    """Each image ``(...,3,H,W)`` in the mean colour of its outermost pixels; ``black`` is not used.

    Of objects that are cut out or photographed on plain ground it is that of the ground.
    """
    exact = images.to(torch.promote_types(images.dtype, torch.float32))
    whole, inner = exact.sum(dim=(-2, -1)), exact[..., 1:-1, 1:-1].sum(dim=(-2, -1))
    height, width = images.shape[-2:]
    count = height * width - max(height - 2, 0) * max(width - 2, 0)
    return ((whole - inner) / count)[..., None, None].to(images.dtype).expand_as(images)


FILLS: dict[str, Fill] = {
    "blur": blurred,
    "mean": mean_colour,
    "black": blackened,
    "border": border_colour,
}
"""The image heavily blurred, its own mean colour, black, or the colour of its border; one function
and one line each."""


def gaussian(side: int, sigma: float) -> Tensor:
    """Weights ``(side,side)`` of every place in the blur of every other, 1 for itself; float64."""
    places = torch.arange(side, dtype=torch.float64)
    return (-0.5 * ((places[:, None] - places[None]) / max(sigma, 1e-3)).square()).exp()


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
    ends = (baseline_of(images, baseline), images)
    return _curve(score, ends, heatmaps, steps, max_batch, least, falling=True)


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
    ends = (images, baseline_of(images, baseline))
    return _curve(score, ends, heatmaps, steps, max_batch, least, falling=False)


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
    check_choice("baseline", baseline, BASELINES)
    ground: Tensor = BASELINES[baseline](images.detach(), torch.zeros(images.shape[-3], 1, 1))
    return ground


BASELINES = FILLS
"""What may take the place of deleted pixels: the same as in methods that hide parts."""


def _curve(
    score: Score,
    ends: tuple[Tensor, Tensor],
    heatmaps: Tensor,
    steps: int,
    max_batch: int | None,
    least: float,
    *,
    falling: bool,
) -> Curve:
    """The score while the second of the ends turns into the first from the hottest pixel on."""
    first, then = (images.detach() for images in ends)
    _check(first, heatmaps, steps, least)
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


SHARE = 10
"""One part in this many is hidden."""
_BORDER = 0.03
"""Standard deviation of the border between hidden and shown, as a share of the shorter side."""
_PLACES = (
    (2, 2), (0, 2), (2, 0), (1, 3), (3, 1), (1, 1), (3, 3), (1, 2), (2, 1), (3, 2), (2, 3), (0, 1),
    (1, 0), (0, 3), (3, 0),
)  # fmt: skip
"""Where the control may lie: quarters of height and width by which the hot part is moved."""


def hottest(heatmaps: Tensor) -> Tensor:
    """The hottest tenth of each map ``(...,H,W)``, boolean; less where there is less heat at all.

    Maps are smoothed before, so that of single hot pixels the place counts where most of them are.
    """
    size = (int(heatmaps.shape[-2]), int(heatmaps.shape[-1]))
    soft = _smoothed(heatmaps.relu())
    count = max(1, size[0] * size[1] // SHARE)
    return (ranks(soft, size) < count) & (soft > 0)


def elsewhere(masks: Tensor) -> Tensor:
    """As many pixels of each mask ``(...,H,W)`` in another place, the same for the same mask.

    The mask is moved by quarters of the picture, round its borders, to the place where it overlaps
    least with itself; of equal ones the one that is farthest away.
    """
    height, width = masks.shape[-2:]
    flat = masks.flatten(0, -3) if masks.dim() > 2 else masks[None]
    moved = [(down * height // 4, right * width // 4) for down, right in _PLACES]
    chosen = []
    for mask in flat:
        others = [torch.roll(mask, step, (0, 1)) for step in moved]
        overlaps = [int((mask & other).sum()) for other in others]
        chosen.append(others[overlaps.index(min(overlaps))])
    return torch.stack(chosen).view(masks.shape)


def hidden(images: Tensor, masks: Tensor, veil: Tensor | None = None) -> Tensor:
    """Images ``(...,C,H,W)`` blurred beyond recognition where masks ``(...,H,W)`` are true.

    The border between what is hidden and what is not is soft, so that it does not add a visible
    edge.

    Args:
        images: The images.
        masks: Where to hide.
        veil: The images, :func:`~simexplain.metrics.curves.blurred`, where they are at hand.
    """
    share = _smoothed(masks.to(torch.float32)).unsqueeze(-3).to(images.dtype)
    return torch.lerp(images, blurred(images) if veil is None else veil, share)


def _smoothed(maps: Tensor, share: float = _BORDER) -> Tensor:
    """Maps ``(...,H,W)`` under a Gaussian of a share of the shorter side, scaled at borders."""
    height, width = maps.shape[-2:]
    rows, columns = (gaussian(side, share * min(height, width)) for side in (height, width))
    down, along = (weights / weights.sum(dim=1, keepdim=True) for weights in (rows, columns))
    return down.to(maps) @ maps @ along.to(maps).T
