"""Several frames as one item: a video clip, photographs of one thing; their embeddings pooled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from simexplain.errors import ModelError
from simexplain.models.avsl import AVSL
from simexplain.models.base import SimilarityModel
from simexplain.models.layers import Layer
from simexplain.models.surveyed import Surveyed
from simexplain.networks import unit_rows

POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda rows: rows.mean(dim=0),
    "max": lambda rows: rows.amax(dim=0),
}
"""How the unit embeddings ``(T,E)`` of the frames of an item become one vector ``(E,)``."""


class FrameSets(SimilarityModel):
    """A model of items that are several frames, on top of one of single images.

    An item goes in as one tall image ``(C,T*H,W)``, its frames below each other, so that every
    method that takes gradients finds the map of each frame in the part where the frame is. An item
    of fewer frames ends with frames that are not a number, which the network never sees.

    Attributes:
        base: The model of single images.
        frames: The most frames of an item, ``T``.
        pooling: A name in :data:`POOLINGS`.
    """

    def __init__(self, base: SimilarityModel, frames: int, pooling: str = "mean") -> None:
        """Over a model, which is not changed.

        Raises:
            ModelError: If the pooling is unknown, or the model cannot take so many frames at once.
        """
        super().__init__()
        if pooling not in POOLINGS:
            raise ModelError(f"Expected pooling of {', '.join(POOLINGS)}, got '{pooling}'.")
        if isinstance(base, AVSL):
            raise ModelError(
                "An AVSL model compares nodes of several levels, whose rows cannot be pooled over "
                "frames; explain the network it was made from, or one frame."
            )
        most = base.batch_size or base.largest_batch or frames
        if base.batch_size is not None or most < frames:
            raise ModelError(
                f"Expected a model that takes {frames} frames in one pass, but {base.name} takes "
                f"{most} images; export it with a batch size that may vary, or give fewer frames."
            )
        self.base, self.frames, self.pooling = base, frames, pooling
        self.name, self.preprocess, self.backbone = base.name, base.preprocess, base.backbone

    @property
    def network(self) -> nn.Module:
        """That of the base model."""
        return self.base.network

    def pass_size(self, count: int, limit: int | None = None, *, together: bool = False) -> int:
        """One item, whose frames go together."""
        return 1

    def embed(self, images: Tensor) -> Tensor:
        """Unit rows ``(M,E)`` of items ``(M,C,T*H,W)``."""
        return unit_rows(self.vectors(images))

    def vectors(self, images: Tensor) -> Tensor:
        """The unit embeddings of the frames of each item, pooled ``(M,E)``."""
        frames = split_frames(images, self.frames)
        rows = [self.base.embed(item[present_frames(item)]) for item in frames]
        return torch.stack([self.pooled(own) for own in rows])

    def pooled(self, rows: Tensor) -> Tensor:
        """The vector ``(E,)`` of an item from the unit embeddings ``(T,E)`` of its frames."""
        return POOLINGS[self.pooling](rows)

    def distance(self, q: Tensor, g: Tensor) -> Tensor:
        """Of the base model."""
        return self.base.distance(q, g)

    def layers_for(self, images: Tensor) -> tuple[Layer, ...]:
        """Of the base model, for the size of a frame."""
        return self.base.layers_for(split_frames(images, self.frames)[:, 0])

    def is_surveyed(self, images: Tensor) -> bool:
        """Of the base model, for the size of a frame."""
        return self.base.is_surveyed(split_frames(images, self.frames)[:, 0])

    def _survey_of(self, shape: tuple[int, int, int]) -> Surveyed:
        """Of the base model, for the size of a frame."""
        channels, height, width = shape
        return self.base._survey_of((channels, height // self.frames, width))

    def to_grid(self, layer: str, output: Tensor, image_size: tuple[int, int]) -> Tensor:
        """The maps of the frames of one item below each other ``(1,C,T*h,w)``; 0 where none is."""
        height, width = image_size
        grids = self.base.to_grid(layer, output, (height // self.frames, width))
        missing = grids.new_zeros((self.frames - len(grids), *grids.shape[1:]))
        return tall(torch.cat((grids, missing))[None])


def split_frames(images: Tensor, frames: int) -> Tensor:
    """Tall images ``(...,C,T*H,W)`` as their frames ``(...,T,C,H,W)``."""
    height, width = images.shape[-2:]
    parts = images.reshape(*images.shape[:-2], frames, height // frames, width)
    return parts.movedim(-3, -4)


def tall(stack: Tensor) -> Tensor:
    """Frames ``(...,T,C,H,W)`` below each other ``(...,C,T*H,W)``."""
    return stack.movedim(-4, -3).flatten(-3, -2)


def present_frames(frames: Tensor) -> Tensor:
    """Which frames ``(...,T,C,H,W)`` are there ``(...,T)``: those that are numbers."""
    return ~frames.detach().isnan().flatten(-3).any(dim=-1)


def padded_sets(items: Sequence[Tensor]) -> Tensor:
    """Items of several frames each ``(T_i,C,H,W)`` as one tensor ``(n,T,C,H,W)``.

    Items of fewer frames than the longest end with frames of NaN.
    """
    most = max(len(item) for item in items)
    return torch.stack([with_missing(item, most) for item in items])


def with_missing(frames: Tensor, most: int) -> Tensor:
    """Frames ``(...,T,C,H,W)`` with as many of NaN after them as are missing to ``most``."""
    missing = max(0, most - frames.shape[-4])
    filler = frames.new_full((*frames.shape[:-4], missing, *frames.shape[-3:]), torch.nan)
    return torch.cat((frames, filler), dim=-4)
