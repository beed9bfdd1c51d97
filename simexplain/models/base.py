"""What every model in simexplain can do, whatever its architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ModelError
from simexplain.models.layers import GridHints, Layer, grid_hints, to_grid, usable_layers
from simexplain.surveying import survey


def euclidean(q: Tensor, g: Tensor) -> Tensor:
    """Euclidean distances ``(Q,E), (G,E) -> (Q,G)``; equal rows have equal distances, bit for bit.

    Each pair is summed on its own: a matrix product rounds a row differently depending on where in
    the matrix it stands, which would put copies of one image in an order of their own.
    """
    return torch.cdist(q, g, compute_mode="donot_use_mm_for_euclid_dist")


def _cosine(q: Tensor, g: Tensor) -> Tensor:
    """``1 - q . g`` from squared lengths, for the reason that :func:`euclidean` gives."""
    short = 2 - q.square().sum(dim=1)[:, None] - g.square().sum(dim=1)  # 0 for unit rows
    return (euclidean(q, g).square() + short) / 2


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "euclidean": euclidean,
    "squared": lambda q, g: euclidean(q, g).square(),
    "cosine": _cosine,
}
"""Distances ``(Q,E), (G,E) -> (Q,G)`` on unit rows; smaller is closer."""


class SimilarityModel(nn.Module, ABC):
    """A network that turns images into embeddings whose distance means dissimilarity.

    Attributes:
        name: What to call it in figures and manifests.
        preprocess: How a picture becomes an input tensor.
        batch_size: The only batch one forward pass takes (exported programs), or None.
        largest_batch: The most images one forward pass takes (exported programs), or None.
        backbone: ``timm:NAME`` or ``torchvision:NAME`` that rebuilds the network, where known.
    """

    name: str
    preprocess: Preprocess
    batch_size: int | None = None
    largest_batch: int | None = None
    backbone: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self._surveyed: dict[tuple[int, int], tuple[Layer, ...]] = {}
        self._hints: GridHints | None = None

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The module in which layer names are looked up."""

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Embeddings of preprocessed images ``(M,3,H,W)``: unit rows ``(M,E)``, float32 or 64."""

    def vectors(self, images: Tensor) -> Tensor:
        """Embeddings ``(M,E)`` before they are brought to unit length, where the model does that.

        A model whose rows are no unit vectors gives its rows.
        """
        return self.embed(images)

    def pass_size(self, count: int, limit: int | None = None, *, together: bool = False) -> int:
        """Images in one forward pass over ``count`` of them.

        On a CPU an image goes alone: kernels for several images at once round differently from
        those for one, so that an image's numbers would depend on how many others share its pass,
        and a pass of several is hardly faster there.

        Args:
            count: Images to run.
            limit: The most that memory allows, or None; heeded where images go together.
            together: As many at once as may be, on a CPU too: for training.
        """
        if self.batch_size is not None:
            return self.batch_size
        reference = next(self.parameters(), None)
        if not together and (reference is None or reference.device.type == "cpu"):
            return 1
        bounds = (count, limit, self.largest_batch)
        return max(1, min(bound for bound in bounds if bound is not None))

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Unit rows ``(T,E)`` of texts, in the space of the image embeddings.

        Raises:
            ModelError: If the model has no text tower, or a text is blank or too long for it.
        """
        raise ModelError(
            f"{self.name} has no text tower, so a text cannot be compared with an image; take a "
            "CLIP-like model."
        )

    @abstractmethod
    def distance(self, q: Tensor, g: Tensor) -> Tensor:
        """Distances ``(Q,G)`` of embeddings ``(Q,E)`` and ``(G,E)``; smaller is closer."""

    def forward(self, images: Tensor) -> Tensor:
        """The same as :meth:`embed`."""
        return self.embed(images)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every usable layer in order of execution, found by a dry run on one noise image."""
        return self.layers_for(self.example())

    @property
    def default_layer(self) -> str:
        """The layer used when none is named: the last map over the image before the embedding."""
        return next(layer.name for layer in self.layers if layer.default)

    @property
    def stages(self) -> tuple[str, ...]:
        """The last layer of each of the coarsest resolutions, for a sweep over depth."""
        return tuple(layer.name for layer in self.layers if layer.stage)

    def layers_for(self, images: Tensor) -> tuple[Layer, ...]:
        """Like :attr:`layers`, for the size of these images ``(M,3,H,W)``; remembered per size."""
        size = (int(images.shape[-2]), int(images.shape[-1]))
        if size not in self._surveyed:
            count = self.batch_size or 1
            sample = images[:1].expand(count, *images.shape[1:])
            runs = survey(self, sample)
            self._surveyed[size] = usable_layers(runs, size, count, self.hints)
        return self._surveyed[size]

    def example(self) -> Tensor:
        """One image of fixed noise in the model's own input size, type and device."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(
            (1, self.preprocess.channels, *self.preprocess.size), generator=generator
        )
        reference = next(self.parameters(), noise)
        return noise.to(reference.device, reference.dtype)

    @property
    def hints(self) -> GridHints:
        """What the network says about its token grid."""
        if self._hints is None:
            self._hints = grid_hints(self.network)
        return self._hints

    def to_grid(self, layer: str, output: Tensor, image_size: tuple[int, int]) -> Tensor:
        """The output of a layer as a feature map ``(M,C,h,w)``.

        Raises:
            ModelError: If it is not a map over the image.
        """
        grid = to_grid(output, image_size, self.hints)
        if grid is None or grid.shape[2] * grid.shape[3] < 2:
            raise ModelError(
                f"Layer '{layer}' gives {tuple(output.shape)}, which is no map over an image of "
                f"{image_size[0]}x{image_size[1]}; `simexplain layers` lists the layers that are."
            )
        return grid
