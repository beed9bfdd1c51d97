"""What every method has in common, and what it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from simexplain.comparison import Comparison
from simexplain.errors import ModelError
from simexplain.models.base import SimilarityModel
from simexplain.models.choosing import SINGLE_NUMBER
from simexplain.models.moving import WHOLE, Region
from simexplain.models.surveyed import RELEVANT


def margin_directions(embeddings: Comparison) -> Tensor:
    """The direction ``(B,K,E)`` in which each embedding raises the margin, all others held.

    Given vectors are held always and have no direction of their own.

    The margin of similarities is ``mean over positives of a . p - mean over negatives of a . n``.
    For a similar pair it is the similarity itself, and each image's direction is the other image;
    for a dissimilar pair its negative. The anchor of a triplet has the direction ``p - n``, the
    positive ``a``, the negative ``-a``: what sets the negative apart counts as evidence there.

    Args:
        embeddings: Rows ``(E,)`` in a comparison, unit or raw.
    """
    anchor = embeddings.anchor
    near, far = embeddings.positives, embeddings.negatives
    pull = near.sum(dim=1) / max(1, near.shape[1]) - far.sum(dim=1) / max(1, far.shape[1])
    own = anchor.unsqueeze(1)
    directions = torch.cat(
        (
            pull.unsqueeze(1),
            own.expand_as(near) / max(1, near.shape[1]),
            -own.expand_as(far) / max(1, far.shape[1]),
        ),
        dim=1,
    )
    return directions[:, list(embeddings.places)] if embeddings.given else directions


LARGE = 0.5
"""Above this share less than half of a score comes from positions, so that a map of it is mostly an
even spread of what is not in the image; a warning reports it."""


def unexplained_share(scores: Tensor, explained: Tensor) -> Tensor:
    """The share of scores that is not explained, in [0, 1], whatever its sign.

    A score is what positions add to it, plus biases, plus what passes by the layer, plus what an
    integration misses. The share is ``|s - p| / (|p| + |s - p|)`` with ``p`` the sum over
    positions: the usual share where both have one sign, and still one of a whole where they cancel
    and the score is near zero.

    Args:
        scores: Of any shape.
        explained: What the positions alone add up to, no bias spread over them; likewise.
    """
    rest = (scores - explained).abs().double()
    whole = explained.abs().double() + rest
    share: Tensor = (rest / whole.clamp_min(1e-300)).to(scores.dtype)
    return share


def bypass_warning(bypass: Mapping[str, float]) -> tuple[str, ...]:
    """What to say of a layer that a large share of the embedding bypasses."""
    return tuple(
        f"{share:.0%} of the embedding bypasses layer '{layer}' (measured on two pictures; it "
        "varies with them), which maps of it cannot show."
        for layer, share in bypass.items()
        if share > RELEVANT
    )


def unexplained_share_warning(share: float, layer: str) -> tuple[str, ...]:
    """What to say of the largest share, if it is large."""
    if not share > LARGE:
        return ()
    return (
        f"The positions of layer {layer} account for only {1 - share:.0%} of a score; the rest "
        "(biases, what passes by the layer, functions that are not linear) belongs to no place in "
        "the image.",
    )


@dataclass(frozen=True)
class AttentionMaps:
    """The maps of a method for ``B`` comparisons of ``K`` images.

    Attributes:
        maps: The map of each image ``(B,K,h,w)``; the product over layers where there are several.
        layer_maps: For each layer its own maps ``(B,K,h,w)``.
        weights: The weight vector of each comparison ``(B,E)``, as published; the direction of
            each image ``(B,K,E)`` in methods that have one; or the channel weights of each image
            ``(B,K,C)`` where they come from a bank.
        scores: ``w . f`` for each image ``(B,K)``; with channel weights the sum of its map before
            anything is cut off.
        embeddings: Unit rows ``(B,K,E)``.
        warnings: What a user must know before trusting the maps.
        unexplained: The share ``(B,K)``, in [0, 1], of each image's score that its positions do not
            account for; None where a method does not take the score apart.
        region: Where in the images the maps lie, where only the method can tell.
    """

    maps: Tensor
    layer_maps: dict[str, Tensor]
    weights: Tensor
    scores: Tensor
    embeddings: Tensor
    warnings: tuple[str, ...] = ()
    unexplained: Tensor | None = None
    region: Region = WHOLE

    def detached(self) -> AttentionMaps:
        """The same without an autograd graph."""
        return replace(self, **pytree.tree_map_only(Tensor, Tensor.detach, vars(self)))


class Task(NamedTuple):
    """What a method is called with; see :meth:`Method.__call__`."""

    model: SimilarityModel
    images: Comparison
    layers: Sequence[str]
    max_batch: int | None


@dataclass(frozen=True)
class Method(ABC):
    """A way to explain: a frozen dataclass of options with one body, :meth:`attribute`.

    A line in ``METHODS`` gives it a name. Where the user names no layer, a method may choose:
    ``layers_for(model, images)`` (:class:`~simexplain.methods.ChoosesLayers`).

    Attributes:
        uses_layers: Whether a user may name its layers.
        joined: How the maps of several layers become one: ``product``, ``sum`` or the method's own.
    """

    uses_layers: ClassVar[bool] = True
    joined: ClassVar[str] = "product"

    def __call__(
        self,
        model: SimilarityModel,
        images: Comparison,
        layers: Sequence[str] = (),
        *,
        max_batch: int | None = None,
    ) -> AttentionMaps:
        """Maps for preprocessed images.

        Args:
            model: The model to explain; nothing of it is changed.
            images: Images ``(C,H,W)`` in a comparison.
            layers: One or several layer names; ignored by a method on pixels or attention.
            max_batch: Bounds the images of one forward pass.

        Raises:
            ModelError: If a layer cannot be used or the embeddings are zero or not finite.
            ComparisonError: If an option does not fit the model or the images.
        """
        return self.attribute(Task(model, images, layers, max_batch))

    @abstractmethod
    def attribute(self, task: Task) -> AttentionMaps:
        """The body of the method; arguments and errors as for :meth:`__call__`."""


def check_embeddings(rows: Tensor, roles: Sequence[str]) -> None:
    """Refuses embeddings ``(B,K,E)`` that no distance is defined for.

    Raises:
        ModelError: If one is not finite or the zero vector, with the image; or if all are a single
            number, which at unit length is the same for every image.
    """
    if rows.shape[2] == 1 and bool(((rows.abs() - 1).abs() < 1e-6).all()):
        raise ModelError(SINGLE_NUMBER)
    finite = rows.isfinite().all(dim=2)
    zero = (rows == 0).all(dim=2)
    for bad, what, advice in (
        (~finite, "is not finite", "look for NaN in the weights or the input"),
        (zero, "is the zero vector", "a blank picture or dead weights give that"),
    ):
        if bool(bad.any()):
            comparison, position = (int(i) for i in bad.nonzero()[0])
            raise ModelError(
                f"The embedding of the {roles[position]} (image {position + 1} of comparison "
                f"{comparison + 1}) {what}, so its similarity is undefined; {advice}."
            )
