"""The matrix of all pairs of positions of two images, from what each of them adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from simexplain.errors import ComparisonError, check_choice
from simexplain.methods.method import unexplained_share
from simexplain.networks import at_least_single, lengths_of

STYLES = {
    "exact": "biases spread over the positions, signed, adding up to the score",
    "zhu": "as in the code of Zhu et al.: no biases, pairs cut at zero, maps over their maximum",
}
"""How biases and signs are treated."""


@dataclass(frozen=True)
class Factors:
    """What the positions of ``B`` images add to their vectors: ``v = sum of parts + rest``.

    ``PositionParts`` of all dimensions are such factors. Any orthonormal basis will do, as long as
    both images have the same one, in half precision as well.

    Attributes:
        parts: ``(B,E,h,w)``.
        rest: Biases and all else that no position gives ``(B,E)``.
        vectors: The vectors, not normalised ``(B,E)``.
    """

    parts: Tensor
    rest: Tensor
    vectors: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.parts.shape)
        if len(shape) != 4 or any(
            tuple(part.shape) != shape[:2] for part in (self.rest, self.vectors)
        ):
            raise ComparisonError(
                f"Expected parts (B,E,h,w) with a rest and vectors (B,E), got {shape}, "
                f"{tuple(self.rest.shape)} and {tuple(self.vectors.shape)}."
            )

    def __len__(self) -> int:
        return len(self.vectors)

    def repeated(self, count: int) -> Factors:
        """One image's factors for each of ``count`` pairs; as they are where there are as many."""
        if len(self) == count:
            return self
        return Factors(*(t.expand(count, *t.shape[1:]) for t in self._tensors))

    def scaled(self, *, unit: bool, spread: bool) -> tuple[Tensor, Tensor]:
        """Each position's vector ``(B,E,h*w)`` and the whole ``(B,E)``, in float64 where there is.

        Args:
            unit: Divide by the length of the vector.
            spread: Give every position an even share of the rest; else the rest is left out.
        """
        # The squared distance of images that are much alike is a small difference of large sums.
        parts, rest, vectors = (_wide(tensor) for tensor in self._tensors)
        parts = parts.flatten(2)
        if spread:
            parts = parts + rest[:, :, None] / parts.shape[2]
        if not unit:
            return parts, vectors
        lengths = lengths_of(vectors)[:, None]
        return parts / lengths[:, :, None], vectors / lengths

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.parts, self.rest, self.vectors


@dataclass(frozen=True)
class Score:
    """How two vectors are compared, as a number and position by position.

    Attributes:
        noun: What to call it.
        about: What exactly it is.
        unit: Whether the vectors are brought to unit length first.
        sign: 1 where a larger part brings the images closer, -1 where a smaller one does.
        value: The score ``(B,)`` of vectors ``(B,E)`` and ``(B,E)``.
        matrix: Its parts ``(B,n,m)`` from the vectors of positions ``(B,E,n)`` and ``(B,E,m)``.
    """

    noun: str
    about: str
    unit: bool
    sign: int
    value: Callable[[Tensor, Tensor], Tensor]
    matrix: Callable[[Tensor, Tensor], Tensor]


def _products(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ben,bem->bnm", a, b)


def _squares(a: Tensor, b: Tensor) -> Tensor:
    own_a = torch.einsum("ben,be->bn", a, a.sum(dim=2)) / b.shape[2]
    own_b = torch.einsum("ben,be->bn", b, b.sum(dim=2)) / a.shape[2]
    return own_a[:, :, None] + own_b[:, None, :] - 2 * _products(a, b)


SCORES: dict[str, Score] = {
    "cosine": Score("cosine", "cosine of the vectors",
                    True, 1, lambda a, b: (a * b).sum(dim=1), _products),
    "dot": Score("dot product", "dot product of the vectors as the network gives them",
                 False, 1, lambda a, b: (a * b).sum(dim=1), _products),
    "squared": Score("squared distance", "squared Euclidean distance of the unit embeddings",
                     True, -1, lambda a, b: (a - b).square().sum(dim=1), _squares),
}  # fmt: skip
"""Every score by name."""


def check_choices(score: str, style: str) -> None:
    """Refuses unknown scores and styles, and pairs of them that mean nothing.

    Raises:
        ComparisonError: If so.
    """
    check_choice("score", score, SCORES)
    check_choice("formula", style, STYLES)
    if style == "zhu" and SCORES[score].sign < 0:
        raise ComparisonError(
            f"Expected a score of cosine or dot with style 'zhu', which has no distances, got "
            f"'{score}'."
        )


def pair_matrix(
    a: Factors, b: Factors, *, score: str = "cosine", style: str = "exact"
) -> tuple[Tensor, Tensor]:
    """What every pair of positions adds to the score of two images (Zhu et al. 2019).

    With ``t_p`` for a position of the first image and ``t_r`` of the second, over the lengths of
    the vectors for scores of unit vectors:

    * ``cosine`` and ``dot``: ``t_p . t_r``
    * ``squared``: ``t_p . v_a / N_b + t_r . v_b / N_a - 2 t_p . t_r``

    Args:
        a: Factors of the first images.
        b: Of the second ones; the grid may be another one. One image on either side is compared
            with all of the other.
        score: A name in ``SCORES``.
        style: A name in ``STYLES``; ``zhu`` leaves biases out, so that a share is missing.

    Returns:
        The matrix ``(B,h,w,h',w')``, signed, and the score ``(B,)`` from the vectors themselves.

    Raises:
        ComparisonError: If a name is unknown or the factors do not fit together.
    """
    check_choices(score, style)
    count = max(len(a), len(b))
    if {len(a), len(b)} - {1, count} or a.vectors.shape[1] != b.vectors.shape[1]:
        raise ComparisonError(
            f"Expected factors of vectors of one width for as many images on both sides, got "
            f"{tuple(a.parts.shape)} and {tuple(b.parts.shape)}."
        )
    chosen = SCORES[score]
    first, whole_a = a.repeated(count).scaled(unit=chosen.unit, spread=style == "exact")
    second, whole_b = b.repeated(count).scaled(unit=chosen.unit, spread=style == "exact")
    dtype = at_least_single(a.vectors[:0]).dtype
    matrix = chosen.matrix(first, second).reshape(count, *a.parts.shape[2:], *b.parts.shape[2:])
    return matrix.to(dtype), chosen.value(whole_a, whole_b).to(dtype)


def unexplained_of(a: Factors, b: Factors, *, score: str, values: Tensor) -> Tensor:
    """The share ``(B,)``, in [0, 1], of scores that positions do not account for.

    That is :func:`~simexplain.methods.method.unexplained_share` of the scores ``(B,)`` and of
    what they would be of the sums over positions alone, without the rests.

    Args:
        a: Factors of the first images.
        b: Of the second ones.
        score: A name in ``SCORES``.
        values: The scores.
    """
    chosen, count = SCORES[score], max(len(a), len(b))
    sums = [
        side.repeated(count).scaled(unit=chosen.unit, spread=False)[0].sum(dim=2) for side in (a, b)
    ]
    return unexplained_share(values, chosen.value(*sums).to(values))


def _wide(tensor: Tensor) -> Tensor:
    """In float64, which Apple's GPUs lack."""
    return at_least_single(tensor) if tensor.device.type == "mps" else tensor.double()
