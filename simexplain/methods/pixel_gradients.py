"""Gradients with respect to the pixels, computed by captum on the score of each image.

Captum explains a function that gives one number per input. Here that is ``s = d . f(x)`` with the
direction ``d`` that raises the margin of the comparison, held constant; captum never sees that
several images belong together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from simexplain.arguments import typed
from simexplain.comparison import Comparison
from simexplain.errors import check_choice
from simexplain.methods.method import AttentionMaps
from simexplain.methods.pixel_methods import (
    PixelMethod,
    Question,
    check_range,
    differentiable_scores,
    filled,
    scores_of,
    unscaled,
)
from simexplain.metrics.curves import FILLS

_INCOMPLETE = 0.05
_ROUNDING = 1e-5

Scores = Callable[[Tensor, Tensor], Tensor]


CHANNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda slope: slope.gather(1, slope.abs().argmax(dim=1, keepdim=True)).squeeze(1),
    "sum": lambda slope: slope.sum(dim=1),
}
"""How three colours become one map, ``(M,3,H,W) -> (M,H,W)``: the strongest, or their sum."""


@dataclass(frozen=True)
@typed
class Saliency(PixelMethod):
    """The gradient of the score, as Simonyan et al. (2013, arXiv 1312.6034), section 3.

    ``max over channels of |ds/dx|``: where the smallest change moves the score most, whichever way.

    Attributes:
        channels: ``max`` (published) or ``sum`` over the colours.
        signed: Keep the sign: where a brighter pixel raises the score.
    """

    needs_gradient: ClassVar[bool] = True

    channels: str = "max"
    signed: bool = False

    def __post_init__(self) -> None:
        check_choice("channels", self.channels, CHANNELS)

    def answer(self, question: Question, max_batch: int | None) -> AttentionMaps:
        """The strongest gradient of the colours, or their sum."""
        gradient = _in_parts(question, max_batch, _gradient)
        maps = CHANNELS[self.channels](gradient if self.signed else gradient.abs())
        return question.answer(maps, size=question.slack)

    def passes(self, images: Comparison) -> int:
        """How often each image passes through the network."""
        return 2


@dataclass(frozen=True)
@typed
class InputXGradient(PixelMethod):
    """The gradient times the pixel, as Shrikumar et al. (2016, arXiv 1605.01713).

    The pixel is counted from the mean colour that preprocessing subtracts.

    Attributes:
        keep_negative: Leave out the final ReLU, so that evidence against the score stays.
    """

    needs_gradient: ClassVar[bool] = True

    keep_negative: bool = True

    def answer(self, question: Question, max_batch: int | None) -> AttentionMaps:
        """Gradient times pixel, summed over the colours."""

        def attribute(scores: Scores, part: Tensor, directions: Tensor, _: slice) -> Tensor:
            from captum.attr import InputXGradient as Captum

            attributions = Captum(scores).attribute(
                part.requires_grad_(), additional_forward_args=directions
            )
            return unscaled(attributions)

        maps = _map(_in_parts(question, max_batch, attribute), self.keep_negative)
        return question.answer(maps, size=question.slack)

    def passes(self, images: Comparison) -> int:
        """How often each image passes through the network."""
        return 2


@dataclass(frozen=True)
@typed
class SmoothGrad(PixelMethod):
    """The mean gradient over noisy copies of an image (Smilkov et al. 2017, arXiv 1706.03825).

    Every image gets the same draws, so that its map does not depend on its neighbours in a batch.
    They come from a generator of their own: captum's noise tunnel would draw from torch's.

    Attributes:
        noise: Standard deviation as a share of the range of each image's values.
        samples: Noisy copies of each image.
        seed: Of the noise.
        keep_negative: Leave out the final ReLU, so that evidence against the score stays.
    """

    needs_gradient: ClassVar[bool] = True

    noise: float = 0.15
    samples: int = 16
    seed: int = 0
    keep_negative: bool = True

    def __post_init__(self) -> None:
        check_range("noise", self.noise, 0, 10)
        check_range("samples", self.samples, 1, 100_000)

    def answer(self, question: Question, max_batch: int | None) -> AttentionMaps:
        """The mean gradient over the noisy copies."""
        generator = torch.Generator().manual_seed(self.seed)
        spread = question.images.flatten(1)
        spread = (spread.amax(dim=1) - spread.amin(dim=1)).view(-1, 1, 1, 1) * self.noise
        total = torch.zeros_like(question.images)
        for _ in range(self.samples):
            # Drawn on the CPU: the same noise whatever the device.
            draw = torch.randn(question.images.shape[1:], generator=generator, dtype=torch.float32)
            noisy = question.images + spread * draw.to(question.images)
            total += _in_parts(question, max_batch, _gradient, noisy)
        # Without noise, as of a picture of one colour, it is the gradient itself.
        size = torch.where(spread.flatten() > 0, torch.inf, question.slack)
        return question.answer(_map(total / self.samples, self.keep_negative), size=size)

    def passes(self, images: Comparison) -> int:
        """How often each image passes through the network."""
        return self.samples + 1


@dataclass(frozen=True)
@typed
class IntegratedGradients(PixelMethod):
    """Gradients along the line from a baseline (Sundararajan et al. 2017, arXiv 1703.01365).

    ``(x - b) * integral of ds/dx at b + t (x - b)`` over ``t`` from 0 to 1, by Gauss-Legendre. Its
    sum is the score of the image minus that of the baseline; a warning reports where it is not.

    Attributes:
        steps: Points of the integral.
        baseline: A name in ``FILLS``: ``blur``, ``mean``, ``black`` or ``border``.
        keep_negative: Leave out the final ReLU, so that evidence against the score stays.
    """

    needs_gradient: ClassVar[bool] = True

    steps: int = 32
    baseline: str = "blur"
    keep_negative: bool = True

    def __post_init__(self) -> None:
        check_choice("baseline", self.baseline, FILLS)
        check_range("steps", self.steps, 1, 100_000)

    def answer(self, question: Question, max_batch: int | None) -> AttentionMaps:
        """The integral for every image, with a warning where it does not add up."""
        baselines = filled(question.model, question.images, self.baseline)

        def attribute(scores: Scores, part: Tensor, directions: Tensor, position: slice) -> Tensor:
            from captum.attr import IntegratedGradients as Captum

            attributions = Captum(scores).attribute(
                part,
                baselines=baselines[position],
                additional_forward_args=directions,
                n_steps=self.steps,
                internal_batch_size=max(question.size, len(part)),
            )
            return unscaled(attributions)

        attributions = _in_parts(question, max_batch, attribute)
        below = scores_of(question.model, baselines, question.directions, max_batch)
        sums = attributions.sum(dim=(1, 2, 3)).to(question.scores)
        warnings = self._warnings(question.comparison, sums, question.scores - below)
        size = attributions.abs().sum(dim=(1, 2, 3))
        return question.answer(_map(attributions, self.keep_negative), warnings, size=size)

    def passes(self, images: Comparison) -> int:
        """How often each image passes through the network."""
        return self.steps + 2

    def _warnings(self, images: Comparison, sums: Tensor, differences: Tensor) -> tuple[str, ...]:
        """Where the sum of a map is not the difference that it should account for."""
        delta = (sums - differences).abs()
        bad = (delta > _INCOMPLETE * differences.abs() + _ROUNDING).nonzero().flatten().tolist()
        if not bad:
            return ()
        worst = max(bad, key=lambda index: float(delta[index]))
        comparison, position = divmod(worst, images.count)
        return (
            f"The maps of {len(bad)} of {len(sums)} images do not add up to their scores; the "
            f"furthest off is the {images.roles[position]} (image {position + 1} of comparison "
            f"{comparison + 1}), whose map adds up to {float(sums[worst]):.3g} where the score "
            f"differs from that of the baseline by {float(differences[worst]):.3g}; use more "
            f"steps than {self.steps}, or occlusion where that changes nothing, since a part of "
            "the model (in AVSL the certainties) then passes no gradient on.",
        )


def _gradient(scores: Scores, part: Tensor, directions: Tensor, _: slice) -> Tensor:
    """The gradient of each image's own score ``(m,3,H,W)``."""
    from captum.attr import Saliency as Captum

    attributions = Captum(scores).attribute(
        part.requires_grad_(), abs=False, additional_forward_args=directions
    )
    return unscaled(attributions)


def _in_parts(
    question: Question,
    max_batch: int | None,
    attribute: Callable[[Scores, Tensor, Tensor, slice], Tensor],
    images: Tensor | None = None,
) -> Tensor:
    """What ``attribute`` finds for every image ``(M,3,H,W)``, as many at once as may be."""
    images = question.images if images is None else images
    size = question.model.pass_size(len(images), max_batch)
    attributions = []
    with differentiable_scores(question.model) as scores:
        for start in range(0, len(images), size):
            position = slice(start, start + size)
            # A copy: captum takes gradients of the very tensor it is given.
            part = images[position].detach().clone()
            attributions.append(attribute(scores, part, question.directions[position], position))
    return torch.cat(attributions)


def _map(attributions: Tensor, keep_negative: bool) -> Tensor:
    """Attributions ``(M,3,H,W)`` as maps ``(M,H,W)``: colours are summed with their sign."""
    maps = attributions.sum(dim=1)
    return maps if keep_negative else maps.relu()
