"""The same model before its embeddings are brought to unit length."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from simexplain.models.base import SimilarityModel


@dataclass(frozen=True)
class RawVectors:
    """What ``trace`` needs of a model, with ``model.vectors`` in the place of its unit rows."""

    model: SimilarityModel

    @property
    def network(self) -> nn.Module:
        """The user's own module."""
        return self.model.network

    @property
    def batch_size(self) -> int | None:
        """The only batch of one forward pass, or None."""
        return self.model.batch_size

    def pass_size(self, count: int, limit: int | None = None, *, together: bool = False) -> int:
        """Images in one forward pass over ``count`` of them."""
        return self.model.pass_size(count, limit, together=together)

    def embed(self, images: Tensor) -> Tensor:
        """Vectors ``(M,E)`` that are not normalised."""
        return self.model.vectors(images)

    def to_grid(self, layer: str, output: Tensor, image_size: tuple[int, int]) -> Tensor:
        """The output of a layer as a feature map ``(M,C,h,w)``."""
        return self.model.to_grid(layer, output, image_size)
