"""The items of a data set: pictures to compare, and masks of what their maps should point at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from simexplain.data.images import PictureSource, opened_picture
from simexplain.errors import ComparisonError, ImageError
from simexplain.renaming import takes_old_names

_HALF = 127


@takes_old_names
@dataclass(frozen=True)
class Item:
    """One comparison of a data set.

    Attributes:
        paths: Picture files, pictures of PIL or arrays: anchor, then positives, then negatives.
        arch: ``siamese``, ``triplet``, ``quadruplet`` or ``set``.
        masks: For each picture the mask of what its map should point at, or None: a grey picture of
            the same size, light where it is, or one with an alpha channel, such as the picture
            itself where it is cut out. None for no masks at all.
        negative: As for ``explain``.
        positives: As for ``explain``.

    Raises:
        ComparisonError: If there are not as many masks as pictures.
    """

    paths: tuple[PictureSource, ...]
    arch: str = "triplet"
    masks: tuple[str | Path | None, ...] | None = None
    negative: bool = False
    positives: int = 1

    def __post_init__(self) -> None:
        if self.masks is not None and len(self.masks) != len(self.paths):
            raise ComparisonError(
                f"Expected one mask or None for each of {len(self.paths)} pictures, got "
                f"{len(self.masks)}."
            )


def read_mask(path: str | Path, size: tuple[int, int]) -> Tensor:
    """A mask ``(H,W)``, boolean: opaque, or light (above half) without an alpha channel.

    Args:
        path: The file; turned upright as the picture is.
        size: Height and width of the picture.

    Raises:
        ImageError: If it cannot be read, has another size or marks nothing.
    """
    try:
        with opened_picture(path) as opened:
            image = ImageOps.exif_transpose(opened) or opened
            clear = "A" in image.getbands() or "transparency" in image.info
            grey = image.convert("RGBA").getchannel("A") if clear else image.convert("L")
            values = np.array(grey)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"The mask '{path}' cannot be read ({error}); check the file.") from error
    if values.shape != size:
        raise ImageError(
            f"Expected the mask '{path}' in the size of its picture, {size[1]}x{size[0]}, got "
            f"{values.shape[1]}x{values.shape[0]}."
        )
    mask = values > _HALF
    if not mask.any():
        raise ImageError(
            f"The mask '{path}' marks nothing: expected values above {_HALF} where the object is."
        )
    return torch.from_numpy(mask)
