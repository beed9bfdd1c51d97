"""What methods on pixels share: the score of each image, perturbed images and what to fill with."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from simexplain.comparison import Comparison
from simexplain.errors import ComparisonError, ModelError
from simexplain.methods.directions import margin_directions
from simexplain.methods.method import AttentionMaps, Method, check_embeddings
from simexplain.metrics.fills import FILLS
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


def check_choice(what: str, chosen: str, table: Mapping[str, object]) -> None:
    """Refuses a name that is not in a table.

    Raises:
        ComparisonError: If it is not.
    """
    if chosen not in table:
        raise ComparisonError(f"Expected {what} to be one of {', '.join(table)}, got '{chosen}'.")


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

    def attribute(
        self,
        model: SimilarityModel,
        images: Comparison,
        layers: Sequence[str],
        max_batch: int | None,
    ) -> AttentionMaps:
        """Asks every image alone; methods on pixels have no layers."""
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
