"""What every model in simexplain can do, whatever its architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ModelError, first_line
from simexplain.models.layers import GridHints, Layer, Layout, grid_hints, to_grid
from simexplain.models.moving import WHOLE, Region
from simexplain.models.surveyed import Surveyed, is_convolutional
from simexplain.networks import channels_of
from simexplain.tracing import Trace


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
        frames: How many frames below each other an image is made of; see ``FrameSets``.
    """

    name: str
    preprocess: Preprocess
    batch_size: int | None = None
    largest_batch: int | None = None
    backbone: str | None = None
    frames: int = 1

    def __init__(self) -> None:
        super().__init__()
        self._surveyed: dict[tuple[int, int, int], Surveyed] = {}
        self._unsurveyed: dict[tuple[int, int, int], str] = {}
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

        A model whose rows are not unit vectors gives its rows.
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

    def rows_of(self, units: Tensor) -> Tensor:
        """Rows as :meth:`embed` gives them, from those brought to unit length ``(...,E)``."""
        return units

    def forward(self, images: Tensor) -> Tensor:
        """The same as :meth:`embed`."""
        return self.embed(images)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every usable layer in order of execution, found by a dry run on images of noise."""
        return self.layers_for(self.example())

    @property
    def default_layer(self) -> str:
        """The layer used when none is named: the last map that the whole embedding comes from."""
        return self.default_for(self.example())

    @property
    def stages(self) -> tuple[str, ...]:
        """The last layer of each of the coarsest resolutions, for a sweep over depth."""
        return self.stages_for(self.example())

    def default_for(self, images: Tensor) -> str:
        """Like :attr:`default_layer`, for the size of these images ``(M,C,H,W)``."""
        return next(layer.name for layer in self.layers_for(images) if layer.default)

    def stages_for(self, images: Tensor) -> tuple[str, ...]:
        """Like :attr:`stages`, for the size of these images ``(M,C,H,W)``."""
        return tuple(layer.name for layer in self.layers_for(images) if layer.stage)

    def layers_for(self, images: Tensor) -> tuple[Layer, ...]:
        """Like :attr:`layers`, for the size of these images ``(M,C,H,W)``; remembered per size.

        Raises:
            ModelError: If the network does not run on such images or has no such layer.
        """
        return self._survey_of(_shape(images)).usable()

    def cautions(
        self, layers: Sequence[str], images: Tensor, rows: Tensor | None = None
    ) -> tuple[str, ...]:
        """What to know before trusting maps at these layers.

        A layer that part of the embedding bypasses cannot show that part.

        Args:
            layers: Names.
            images: ``(M,C,H,W)``.
            rows: Their embeddings ``(M,E)`` by :meth:`embed`; shares are then measured on them.
        """
        surveyed = self._surveyed_for(images)
        if surveyed is None:
            return (
                "Where the maps lie and what bypasses their layers is unknown, since the network "
                f"could not be run on test pictures: {self._unsurveyed[_shape(images)]}.",
            )
        if rows is not None and surveyed.model is self:
            surveyed.meet(images, rows)
        return surveyed.cautions(layers)

    def unmeasured(self, layers: Sequence[str], images: Tensor) -> bool:
        """Whether a pass of these images should be recorded for :meth:`measure`.

        Args:
            layers: Names.
            images: ``(M,C,H,W)``.
        """
        surveyed = self._surveyed.get(_shape(images))
        return len(images) > 1 and surveyed is not None and surveyed.unmeasured(layers)

    def measure(
        self, images: Tensor, traced: Trace, finish: Callable[[Tensor], Tensor] = lambda rows: rows
    ) -> None:
        """Measures which share of the embedding bypasses layers, from the first images' own pass.

        Without a recorded pass it is measured in one of its own (:meth:`cautions`).

        Args:
            images: ``(M,C,H,W)``.
            traced: Their pass, recorded (``trace(..., taped=True)``).
            finish: Makes embeddings of what the pass gives.
        """
        if traced.tapes and self.unmeasured(traced.layers, images):
            self._surveyed[_shape(images)].measure(images, traced, finish)

    def usual_bypass(self, layer: str) -> float | None:
        """As :meth:`bypass`, at the model's own size and on noise, whatever was explained."""
        surveyed = self._surveyed_for(self.example())
        return None if surveyed is None else round(surveyed.usual_bypass(layer), 4)

    def bypass(self, layers: Sequence[str], images: Tensor) -> dict[str, float]:
        """The share of the embedding that bypasses each of these layers; see :class:`Layer`."""
        surveyed = self._surveyed_for(images)
        used = [] if surveyed is None else surveyed.known(layers)
        return {layer.name: round(layer.bypass, 4) for layer in used}

    def is_surveyed(self, images: Tensor) -> bool:
        """Whether the layers for images of this shape are known already."""
        return _shape(images) in self._surveyed

    def of_tokens(self, layers: Sequence[str], images: Tensor) -> bool:
        """Whether any of these layers gives tokens, of which few may be read; also if not known."""
        surveyed = self._surveyed.get(_shape(images))
        return surveyed is None or surveyed.of_tokens(layers)

    def region(self, layers: Sequence[str], images: Tensor) -> Region:
        """Where in images ``(M,C,H,W)`` the joined map of these layers lies; see :class:`Layer`.

        Layers that look at different parts are joined on the whole image.
        """
        regions = set(self.regions(layers, images))
        return regions.pop() if len(regions) == 1 else WHOLE

    def regions(self, layers: Sequence[str], images: Tensor) -> tuple[Region, ...]:
        """Where in images ``(M,C,H,W)`` the own map of each of these layers lies."""
        surveyed = self._surveyed_for(images)
        return tuple(WHOLE if surveyed is None else surveyed.region(layer) for layer in layers)

    def apart(self, layers: Sequence[str], images: Tensor) -> tuple[Region, ...]:
        """Where in the joined map of these layers each one's own lies.

        All over it, unless they are known to look at different parts of images ``(M,C,H,W)``; no
        survey is made for it.
        """
        known = len(layers) > 1 and self.is_surveyed(images)
        regions = self.regions(layers, images) if known else ()
        return regions if len(set(regions)) > 1 else (WHOLE,) * len(layers)

    def token_layouts(self, count: int, images: Tensor) -> tuple[Layout, ...]:
        """How so many tokens of images ``(M,C,H,W)`` lie over them, according to the survey."""
        surveyed = self._surveyed_for(images)
        return () if surveyed is None else surveyed.token_layouts(count)

    def _surveyed_for(self, images: Tensor) -> Surveyed | None:
        """The survey, or None for a network that none can look into, say for what it overwrites."""
        shape = _shape(images)
        if shape in self._unsurveyed:
            return None
        try:
            return self._survey_of(shape)
        except (ModelError, RuntimeError) as error:
            # Not tried again with every explanation.
            self._unsurveyed[shape] = first_line(error).rstrip(".")
            return None

    def _survey_of(self, shape: tuple[int, int, int]) -> Surveyed:
        if shape not in self._surveyed:
            self._surveyed[shape] = Surveyed(self, shape)
        return self._surveyed[shape]

    def example(self, size: tuple[int, int] | None = None) -> Tensor:
        """One image of fixed noise ``(1,C,H,W)`` in the model's own channels, type and device.

        Args:
            size: ``(height, width)``, or None for the model's own.
        """
        generator = torch.Generator().manual_seed(0)
        shape = (1, self.preprocess.channels, *(size or self.preprocess.size))
        noise = torch.rand(shape, generator=generator)
        reference = next(self.parameters(), noise)
        return noise.to(reference.device, reference.dtype)

    @property
    def hints(self) -> GridHints:
        """Hints of the network about its token grid."""
        if self._hints is None:
            self._hints = grid_hints(self.network)
        return self._hints

    def to_grid(self, layer: str, output: Tensor, image_size: tuple[int, int]) -> Tensor:
        """The output of a layer as a feature map ``(M,C,h,w)``.

        Raises:
            ModelError: If it is not a map over the image.
        """
        known = (shape for shape in self._surveyed if shape[1:] == tuple(image_size))
        shape = next(known, (channels_of(self.network), *image_size))
        if shape not in self._surveyed and output.dim() == 4 and is_convolutional(self.network):
            grid = to_grid(output, image_size, self.hints)  # whose shape is enough
        else:
            grid = self._survey_of(shape).grid(layer, output)
        if grid is None or grid.shape[2] * grid.shape[3] < 2:
            raise ModelError(
                f"Layer '{layer}' gives {tuple(output.shape)}, which is not a map over an image of "
                f"{image_size[0]}x{image_size[1]}; `simexplain layers` lists the layers that are."
            )
        return grid


def _shape(images: Tensor) -> tuple[int, int, int]:
    channels, height, width = images.shape[-3:]
    return int(channels), int(height), int(width)
