"""Masks of pictures: files of their own, or a picture's alpha channel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from simexplain.data.folders import Record
from simexplain.data.images import opened_picture, read_picture
from simexplain.errors import ImageError

_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def mask_of(record: Record, size: tuple[int, int]) -> NDArray[np.uint8] | None:
    """The mask of a picture ``(H,W)``, 255 where the object is; None where it has none.

    A file with an alpha channel is its alpha channel, another its brightness; both are turned
    upright as pictures are. A picture that is to be its own mask but has no alpha channel has none.

    Args:
        record: The picture.
        size: Its height and width.

    Raises:
        ImageError: If the file cannot be read or has another size than the picture.
    """
    if record.mask is None:
        return None
    values = _alpha(record.mask)
    if values is None:
        if record.mask == record.path:
            return None
        values = np.array(read_picture(record.mask).image.convert("L"))
    if values.shape != size:
        raise ImageError(
            f"Expected the mask '{record.mask}' in the size of its picture, {size[1]}x{size[0]}, "
            f"got {values.shape[1]}x{values.shape[0]}."
        )
    return values


def _alpha(path: Path) -> NDArray[np.uint8] | None:
    try:
        with opened_picture(path) as opened:
            if "A" not in opened.getbands() and "transparency" not in opened.info:
                return None
            upright = ImageOps.exif_transpose(opened) or opened
            return np.array(upright.convert("RGBA").getchannel("A"))
    except _DAMAGE as error:
        raise ImageError(f"The mask '{path}' cannot be read ({error}); check the file.") from error
