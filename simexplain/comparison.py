"""The one container of everything that is compared: an anchor, positives and negatives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simexplain.arguments import check_pixels, typed
from simexplain.errors import ComparisonError, check_choice

ARCHITECTURES: dict[str, tuple[int | None, str]] = {
    "siamese": (2, "an anchor and one other image"),
    "triplet": (3, "an anchor, a positive and a negative"),
    "quadruplet": (4, "an anchor, a positive and two negatives"),
    "set": (None, "an anchor, then positives, then negatives"),
}
"""How many images each arrangement takes (None: two or more) and in which order."""


@dataclass(frozen=True)
@typed
class Comparison:
    """An anchor with a set of positives and a set of negatives, for each of ``B`` comparisons.

    Siamese, triplet and quadruplet models are special cases, as is any larger set. The items are
    images ``(C,H,W)`` or embeddings ``(E,)``: the code does not depend on which.

    Beside images one or two of the three may be given as vectors: a text embedding, the centroid
    of a class, a row of an index. They count as what they are the anchor, positives or negatives
    of, and have no map. :attr:`count`, :attr:`roles`, :meth:`stacked` and all else that goes
    through the items leaves them out.

    Attributes:
        anchor: Shape ``(B,*S)``; ``(B,E)`` where it is a given vector.
        positives: Shape ``(B,P,*S)`` or ``(B,P,E)``; ``P`` may be 0.
        negatives: Shape ``(B,N,*S)`` or ``(B,N,E)``; ``N`` may be 0, but not both.
        given: Which of ``anchor``, ``positives`` and ``negatives`` are given vectors; found from
            the shapes where the others are images.
        unit: Whether given vectors stand for embeddings, which have unit length; False for
            directions, whose length counts.

    Raises:
        ComparisonError: If shapes, types or devices disagree, or there is nothing to compare with.
    """

    anchor: Tensor
    positives: Tensor
    negatives: Tensor
    given: tuple[str, ...] = ()
    unit: bool = True

    def __post_init__(self) -> None:
        axes = {"anchor": 0, "positives": 1, "negatives": 1}
        for role, more in axes.items():
            check_pixels(role, getattr(self, role), 1 + more)
        items = {role: getattr(self, role).dim() - more for role, more in axes.items()}
        vectors = tuple(role for role, number in items.items() if number == 2)
        if vectors and any(number > 3 for number in items.values()):
            object.__setattr__(self, "given", vectors)
        for role in ("positives", "negatives"):
            self._check_stack(role, getattr(self, role))
        shown = [role for role in ("anchor", "positives", "negatives") if role not in self.given]
        if 1 + self.positives.shape[1] + self.negatives.shape[1] < 2 or not self.batch:
            raise ComparisonError(
                f"Expected at least one comparison of two images, got {self.batch} comparisons of "
                f"{self.count}; give a positive or a negative beside the anchor."
            )
        if not shown or not self.count:
            raise ComparisonError(
                "Expected at least one image beside the given vectors, got vectors alone; there is "
                "nothing to draw a map on."
            )

    def _check_stack(self, role: str, stack: Tensor) -> None:
        mixed = (role in self.given) != ("anchor" in self.given)
        if stack.dim() != self.anchor.dim() + 1 and not mixed:
            raise ComparisonError(
                f"Expected {role} with one axis more than the anchor {tuple(self.anchor.shape)}"
                f", got {tuple(stack.shape)}; stack the {role} of each comparison on axis 1."
            )
        item, batch = self.anchor.shape[1:], self.anchor.shape[:1]
        # Two towers may see images of two sizes, so only vectors have to agree with the anchor.
        apart = mixed or len(item) > 2
        if stack.shape[:1] != batch or (not apart and stack.shape[2:] != item):
            raise ComparisonError(
                f"Expected {role} of shape ({batch[0]}, any, {', '.join(map(str, item))}) to "
                f"match the anchor, got {tuple(stack.shape)}; bring all images to one size."
            )
        if mixed and not stack.is_floating_point():
            raise ComparisonError(
                f"Expected {role} of floating-point numbers beside the anchor, got {stack.dtype}."
            )
        if not mixed and (stack.dtype, stack.device) != (self.anchor.dtype, self.anchor.device):
            raise ComparisonError(
                f"Expected {role} as {self.anchor.dtype} on {self.anchor.device} like the "
                f"anchor, got {stack.dtype} on {stack.device}; convert one of them."
            )

    @classmethod
    @typed
    def pair(cls, a: Tensor, b: Tensor, similar: bool = True) -> Comparison:
        """A siamese comparison of two batches ``(B,*S)``; not ``similar`` makes ``b`` negative.

        Either may be given vectors ``(B,E)``, or one for all, ``(1,E)`` or ``(E,)``.
        """
        a, b = _vector_for_all(a, b), _vector_for_all(b, a)
        first, none = _checked(b, "the second image").unsqueeze(1), b[:, None][:, :0]
        return cls(a, first, none) if similar else cls(a, none, first)

    @classmethod
    @typed
    def along(cls, images: Tensor, direction: Tensor) -> Comparison:
        """Images ``(B,*S)`` along a direction in the space of embeddings, ``(E,)`` or ``(B,E)``.

        The score of an image is ``f . d`` with its unit embedding ``f``, whatever the length of
        ``d``: positive where the image lies on the side that ``d`` points to.
        """
        one = Comparison.pair(images, direction)
        return cls(one.anchor, one.positives, one.negatives, unit=False)

    @classmethod
    @typed
    def triplet(cls, anchor: Tensor, positive: Tensor, negative: Tensor) -> Comparison:
        """One positive and one negative for each anchor, each ``(B,*S)``.

        One or two of them may be given vectors ``(B,E)``, or one for all, ``(1,E)`` or ``(E,)``.
        """
        three = (anchor, positive, negative)
        largest = max(three, key=lambda stack: stack.dim())
        anchor, positive, negative = (_vector_for_all(stack, largest) for stack in three)
        return cls(
            anchor,
            _checked(positive, "the positive").unsqueeze(1),
            _checked(negative, "the negative").unsqueeze(1),
        )

    @classmethod
    @typed
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
    def members(self) -> int:
        """How many members each comparison has, ``1 + P + N``: images and given vectors."""
        return 1 + self.positives.shape[1] + self.negatives.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """``(height, width)`` of the images; of the anchor's where two towers see two sizes."""
        role = next(role for role in ("anchor", "positives", "negatives") if role not in self.given)
        height, width = getattr(self, role).shape[-2:]
        return int(height), int(width)

    @property
    def places(self) -> tuple[int, ...]:
        """Which of the members are not given vectors, in order; the anchor is member 0."""
        cut = 1 + self.positives.shape[1]
        spans = {"anchor": (0, 1), "positives": (1, cut), "negatives": (cut, self.members)}
        return tuple(
            position
            for role, span in spans.items()
            if role not in self.given
            for position in range(*span)
        )

    @property
    def count(self) -> int:
        """How many images each comparison has, ``K``: all members but given vectors."""
        return len(self.places)

    @property
    def roles(self) -> tuple[str, ...]:
        """The role of each of the ``K`` images, in the order of :meth:`stacked`."""
        every = roles(self.positives.shape[1], self.negatives.shape[1])
        return tuple(every[position] for position in self.places)

    @property
    def stacks(self) -> dict[str, Tensor]:
        """Anchor, positives and negatives, each ``(B,n,*S)``."""
        anchor = self.anchor.unsqueeze(1)
        return {"anchor": anchor, "positives": self.positives, "negatives": self.negatives}

    def stacked(self) -> Tensor:
        """All images as one tensor ``(B,K,*S)``: anchor, positives, negatives.

        Raises:
            ComparisonError: If they have different sizes.
        """
        stacks = self.stacks.items()
        shown = [stack for role, stack in stacks if role not in self.given and stack.shape[1]]
        if len(sizes := {tuple(stack.shape[2:]) for stack in shown}) > 1:
            raise ComparisonError(
                f"Expected images of one size, got {' and '.join(map(str, sorted(sizes)))}; only "
                "a pair model of two towers (as_pair_model) takes two."
            )
        return torch.cat(shown, dim=1)

    def joined(self, stack: Tensor) -> Tensor:
        """Embeddings ``(B,K,E)`` of the images with the given vectors between: all members."""
        whole = self.like(stack)
        return torch.cat((whole.anchor.unsqueeze(1), whole.positives, whole.negatives), dim=1)

    def restacked(self, flat: Tensor) -> Tensor:
        """A flat batch ``(B*K,*T)``, such as maps of all images, as a stack ``(B,K,*T)``."""
        return flat.reshape(self.batch, self.count, *flat.shape[1:])

    def like(self, stack: Tensor) -> Comparison:
        """A comparison with the same roles from another stack ``(B,K,*T)``, say of embeddings.

        Given vectors stay, in the type and on the device of the stack.

        Raises:
            ComparisonError: If the second axis does not have ``K`` entries, or embeddings are not
                as wide as the given vectors.
        """
        if stack.dim() < 2 or stack.shape[1] != self.count:
            raise ComparisonError(
                f"Expected a stack with {self.count} items on axis 1, got {tuple(stack.shape)}."
            )
        parts, start = {}, 0
        for role, old in self.stacks.items():
            if role in self.given:
                parts[role] = self._kept(old, stack)
            else:
                parts[role] = stack[:, start : start + old.shape[1]]
                start += old.shape[1]
        return Comparison(
            parts["anchor"][:, 0], parts["positives"], parts["negatives"], self.given, self.unit
        )

    def _kept(self, vectors: Tensor, stack: Tensor) -> Tensor:
        """Given vectors ``(B,n,E)`` beside a new stack of embeddings or images."""
        if stack.dim() == 3 and vectors.shape[1] and vectors.shape[2] != stack.shape[2]:
            raise ComparisonError(
                f"Expected given vectors of {stack.shape[2]} numbers like the model's embeddings, "
                f"got {vectors.shape[2]}; take vectors of this very model."
            )
        kept = vectors.to(stack.device, stack.dtype)
        return kept if stack.dim() != 3 or vectors.shape[1] else stack[:, :0]


def roles(positives: int, negatives: int) -> tuple[str, ...]:
    """The roles of ``1 + positives + negatives`` images, in the order that simexplain uses."""
    return ("anchor",) + ("positive",) * positives + ("negative",) * negatives


def architecture(positives: int, negatives: int) -> str:
    """The field's name of an arrangement: siamese, triplet, quadruplet or set."""
    if positives + negatives == 1:
        return "siamese"
    return {(1, 1): "triplet", (1, 2): "quadruplet"}.get((positives, negatives), "set")


def arch_of(count: int) -> str:
    """The arrangement of ``count`` images where their number determines it: a pair or a triplet.

    Raises:
        ComparisonError: If there is one image, or so many that several arrangements fit.
    """
    clear = {2: "siamese", 3: "triplet"}
    if count in clear:
        return clear[count]
    if count < 2:
        raise ComparisonError(f"Expected two or more images to compare, got {count}.")
    fits = {name: order for name, (size, order) in ARCHITECTURES.items() if size in (None, count)}
    named = " or ".join(f"{name} ({order})" for name, order in fits.items())
    raise ComparisonError(
        f"Two images are a siamese pair and three a triplet, but {count} need an arch (--arch): "
        f"{named}."
    )


def positives_of(
    arch: str | None, count: int, *, negative: bool = False, positives: int = 1
) -> int:
    """How many of ``count`` images are positives in an arrangement, None for :func:`arch_of`.

    Raises:
        ComparisonError: If the arrangement is unknown or the number does not fit it.
    """
    arch = arch_of(count) if arch is None else arch
    check_choice("arch", arch, ARCHITECTURES)
    wanted, order = ARCHITECTURES[arch]
    if wanted is not None and count != wanted:
        raise ComparisonError(f"Expected {wanted} images for {arch} ({order}), got {count}.")
    if negative and arch != "siamese":
        raise ComparisonError(f"Expected a siamese pair with negative, got {arch}.")
    if positives != 1 and arch != "set":
        raise ComparisonError(f"Expected a set (arch, --arch) with positives, got {arch}.")
    if arch != "set":
        return 0 if negative else 1
    if count < 2 or not 0 <= positives < count:
        raise ComparisonError(
            f"Expected two or more images for a set ({order}) and at most one positive fewer, got "
            f"{count} images with {positives} positives."
        )
    return positives


def paired(a: Tensor, b: Tensor, *, one_size: bool = False) -> tuple[Tensor, Tensor]:
    """Both sides of ``B`` pairs as batches; one image for all pairs stays a batch of one.

    Args:
        a: ``(B,3,H,W)``, or one image ``(3,H,W)``.
        b: Likewise.
        one_size: Both sides must have images of the same size.

    Raises:
        ComparisonError: If they are not float images, as many on both sides or one on a side.
    """
    for name, side in (("a", a), ("b", b)):
        check_pixels(name, side)
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
            f"{tuple(a.shape)} and {tuple(b.shape)}."
        )
    return first, second


def _checked(stack: Tensor, what: str) -> Tensor:
    check_pixels(what, stack, stack.dim())
    if stack.dim() < 2:
        raise ComparisonError(
            f"Expected {what} as a batch (B, ...), got shape {tuple(stack.shape)}; "
            "add a batch axis with unsqueeze(0)."
        )
    return stack


def _vector_for_all(stack: Tensor, other: Tensor) -> Tensor:
    """One given vector ``(E,)`` or ``(1,E)`` beside images, as one for each comparison."""
    check_pixels("images and vectors", stack, stack.dim())
    if other.dim() < 4 or stack.dim() not in (1, 2):
        return stack
    one = stack.unsqueeze(0) if stack.dim() == 1 else stack
    return one.expand(len(other), -1) if len(one) == 1 else one
