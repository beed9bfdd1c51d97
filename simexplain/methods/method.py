"""What every method has in common, and what it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from simexplain.comparison import Comparison
from simexplain.errors import ModelError
from simexplain.models.base import SimilarityModel
from simexplain.models.choosing import SINGLE_NUMBER
from simexplain.models.moving import WHOLE, Region


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
        return replace(
            self,
            maps=self.maps.detach(),
            layer_maps={layer: maps.detach() for layer, maps in self.layer_maps.items()},
            weights=self.weights.detach(),
            scores=self.scores.detach(),
            embeddings=self.embeddings.detach(),
            unexplained=None if self.unexplained is None else self.unexplained.detach(),
        )


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
        return self.attribute(model, images, layers, max_batch)

    @abstractmethod
    def attribute(
        self,
        model: SimilarityModel,
        images: Comparison,
        layers: Sequence[str],
        max_batch: int | None,
    ) -> AttentionMaps:
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
