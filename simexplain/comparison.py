"""The one container of everything that is compared: an anchor, positives and negatives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simexplain.errors import ComparisonError

ARCHITECTURES: dict[str, tuple[int | None, str]] = {
    "siamese": (2, "an anchor and one other image"),
    "triplet": (3, "an anchor, a positive and a negative"),
    "quadruplet": (4, "an anchor, a positive and two negatives"),
    "set": (None, "an anchor, then positives, then negatives"),
}
"""How many images each arrangement takes (None: two or more) and in which order."""


@dataclass(frozen=True)
class Comparison:
    """An anchor with a set of positives and a set of negatives, for each of ``B`` comparisons.

    Siamese, triplet and quadruplet models are special cases, as is any larger set. The items are
    images ``(3,H,W)`` or embeddings ``(E,)``: the code never asks which.

    Attributes:
        anchor: Shape ``(B,*S)``.
        positives: Shape ``(B,P,*S)``; ``P`` may be 0.
        negatives: Shape ``(B,N,*S)``; ``N`` may be 0, but not both.

    Raises:
        ComparisonError: If shapes, types or devices disagree, or there is nothing to compare with.
    """

    anchor: Tensor
    positives: Tensor
    negatives: Tensor

    def __post_init__(self) -> None:
        item, batch = self.anchor.shape[1:], self.anchor.shape[:1]
        for role, stack in (("positives", self.positives), ("negatives", self.negatives)):
            if stack.dim() != self.anchor.dim() + 1:
                raise ComparisonError(
                    f"Expected {role} with one axis more than the anchor {tuple(self.anchor.shape)}"
                    f", got {tuple(stack.shape)}; stack the {role} of each comparison on axis 1."
                )
            if stack.shape[:1] != batch or stack.shape[2:] != item:
                raise ComparisonError(
                    f"Expected {role} of shape ({batch[0]}, any, {', '.join(map(str, item))}) to "
                    f"match the anchor, got {tuple(stack.shape)}; bring all images to one size."
                )
            if (stack.dtype, stack.device) != (self.anchor.dtype, self.anchor.device):
                raise ComparisonError(
                    f"Expected {role} as {self.anchor.dtype} on {self.anchor.device} like the "
                    f"anchor, got {stack.dtype} on {stack.device}; convert one of them."
                )
        if self.count < 2 or not batch[0]:
            raise ComparisonError(
                f"Expected at least one comparison of two images, got {batch[0]} comparisons of "
                f"{self.count}; give a positive or a negative beside the anchor."
            )

    @classmethod
    def pair(cls, a: Tensor, b: Tensor, similar: bool = True) -> Comparison:
        """A siamese comparison of two batches ``(B,*S)``; not ``similar`` makes ``b`` negative."""
        first, none = _checked(b, "the second image").unsqueeze(1), b[:, None][:, :0]
        return cls(a, first, none) if similar else cls(a, none, first)

    @classmethod
    def triplet(cls, anchor: Tensor, positive: Tensor, negative: Tensor) -> Comparison:
        """One positive and one negative for each anchor, each ``(B,*S)``."""
        return cls(
            anchor,
            _checked(positive, "the positive").unsqueeze(1),
            _checked(negative, "the negative").unsqueeze(1),
        )

    @classmethod
    def quadruplet(
        cls, anchor: Tensor, positive: Tensor, negative1: Tensor, negative2: Tensor
    ) -> Comparison:
        """One positive and two negatives for each anchor, each ``(B,*S)``."""
        if negative1.shape != negative2.shape:
            raise ComparisonError(
                f"Expected two negatives of one shape, got {tuple(negative1.shape)} and "
                f"{tuple(negative2.shape)}; bring all images to one size."
            )
        negatives = torch.stack((negative1, negative2), dim=1)
        return cls(anchor, _checked(positive, "the positive").unsqueeze(1), negatives)

    @property
    def batch(self) -> int:
        """How many comparisons there are, ``B``."""
        return self.anchor.shape[0]

    @property
    def count(self) -> int:
        """How many images each comparison has, ``K = 1 + P + N``."""
        return 1 + self.positives.shape[1] + self.negatives.shape[1]

    @property
    def roles(self) -> tuple[str, ...]:
        """The role of each of the ``K`` images, in the order of :meth:`stacked`."""
        return roles(self.positives.shape[1], self.negatives.shape[1])

    def stacked(self) -> Tensor:
        """All images as one tensor ``(B,K,*S)``: anchor, positives, negatives."""
        return torch.cat((self.anchor.unsqueeze(1), self.positives, self.negatives), dim=1)

    def restacked(self, flat: Tensor) -> Tensor:
        """A flat batch ``(B*K,*T)``, such as maps of all images, as a stack ``(B,K,*T)``."""
        return flat.reshape(self.batch, self.count, *flat.shape[1:])

    def like(self, stack: Tensor) -> Comparison:
        """A comparison with the same roles from another stack ``(B,K,*T)``, say of embeddings.

        Raises:
            ComparisonError: If the second axis does not have ``K`` entries.
        """
        if stack.dim() < 2 or stack.shape[1] != self.count:
            raise ComparisonError(
                f"Expected a stack with {self.count} items on axis 1, got {tuple(stack.shape)}."
            )
        cut = 1 + self.positives.shape[1]
        return Comparison(stack[:, 0], stack[:, 1:cut], stack[:, cut:])


def roles(positives: int, negatives: int) -> tuple[str, ...]:
    """The roles of ``1 + positives + negatives`` images, in the order that simexplain uses."""
    return ("anchor",) + ("positive",) * positives + ("negative",) * negatives


def architecture(positives: int, negatives: int) -> str:
    """The field's name of an arrangement: siamese, triplet, quadruplet or set."""
    if positives + negatives == 1:
        return "siamese"
    return {(1, 1): "triplet", (1, 2): "quadruplet"}.get((positives, negatives), "set")


def positives_of(arch: str, count: int, *, different: bool = False, positives: int = 1) -> int:
    """How many of ``count`` images are positives in an arrangement.

    Raises:
        ComparisonError: If the arrangement is unknown or the number does not fit it.
    """
    if arch not in ARCHITECTURES:
        raise ComparisonError(
            f"Expected arch to be one of {', '.join(ARCHITECTURES)}, got '{arch}'."
        )
    wanted, order = ARCHITECTURES[arch]
    if wanted is not None and count != wanted:
        raise ComparisonError(f"Expected {wanted} images for {arch} ({order}), got {count}.")
    if different and arch != "siamese":
        raise ComparisonError(f"Expected a siamese pair with different, got {arch}.")
    if arch != "set":
        return 0 if different else 1
    if count < 2 or not 0 <= positives < count:
        raise ComparisonError(
            f"Expected two or more images for a set ({order}) and at most one positive fewer, got "
            f"{count} images with {positives} positives."
        )
    return positives


def paired(a: Tensor, b: Tensor, files: str, *, one_size: bool = False) -> tuple[Tensor, Tensor]:
    """Both sides of ``B`` pairs as batches; one image for all pairs stays a batch of one.

    Args:
        a: ``(B,3,H,W)``, or one image ``(3,H,W)``.
        b: Likewise.
        files: What takes picture files in place of tensors, for the error.
        one_size: Both sides must have images of the same size.

    Raises:
        ComparisonError: If they are not float images, as many on both sides or one on a side.
    """
    for side in (a, b):
        if not isinstance(side, Tensor):
            raise ComparisonError(
                f"Expected image tensors, got {type(side).__name__}; use {files} for picture files."
            )
    first, second = (side.unsqueeze(0) if side.dim() == 3 else side for side in (a, b))
    if (
        any(side.dim() != 4 or not side.is_floating_point() for side in (first, second))
        or not len(first) * len(second)
        or (len(first) != len(second) and 1 not in (len(first), len(second)))
        or (one_size and first.shape[1:] != second.shape[1:])
    ):
        size = " of one size" if one_size else ""
        raise ComparisonError(
            f"Expected two batches of float images (B,3,H,W){size}, as many or one on a side, got "
            f"{tuple(a.shape)} and {tuple(b.shape)}; use {files} for picture files."
        )
    return first, second


def _checked(stack: Tensor, what: str) -> Tensor:
    if stack.dim() < 2:
        raise ComparisonError(
            f"Expected {what} as a batch (B, ...), got shape {tuple(stack.shape)}; "
            "add a batch axis with unsqueeze(0)."
        )
    return stack
