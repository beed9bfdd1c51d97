"""Random views of a picture for training; its mask moves along."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import functional as F

from simexplain.data.preprocessing import Preprocess


@dataclass(frozen=True)
class Augmentation:
    """How training views are drawn. Lengths are shares of the input's, so that they fit any size.

    In this order: resize, crop, rotate with scale and shift, flip, pad and crop, erase.

    Attributes:
        about: What it does, in a line.
        source: Where that comes from.
        resize: Sides after the first resize, over the input's; None for the network's own
            preprocessing, with nothing drawn before a flip.
        keep_aspect: That resize is of the shorter side alone.
        crop_scale: Share of the area that a crop keeps, drawn from this range, after which it is
            resized to the input; None for no such crop.
        crop_ratio: Range of its width over its height.
        rotate: Largest angle in degrees, either way.
        zoom: Range of the scale.
        shift: Largest shift over the side, either way.
        flip: How often left and right are swapped.
        pad: Border on all sides, over the input's height, from which the input is cropped again.
        erase: How often a rectangle is set to the mean colour. The mask stays as it is there.
        erase_scale: Range of its area over the input's.
        erase_ratio: Range of its width over its height.
    """

    about: str
    source: str
    resize: float | None = 1.0
    keep_aspect: bool = False
    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    rotate: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    shift: float = 0.0
    flip: float = 0.0
    pad: float = 0.0
    erase: float = 0.0
    erase_scale: tuple[float, float] = (0.02, 0.4)
    erase_ratio: tuple[float, float] = (0.3, 1 / 0.3)

    def fixed(
        self, picture: Image.Image, mask: NDArray[np.uint8] | None, prepare: Preprocess
    ) -> tuple[Tensor, Tensor | None]:
        """What does not depend on chance, to be kept: image ``(3,h,w)``, mask ``(h,w)``, uint8.

        Args:
            picture: Upright RGB.
            mask: ``(H,W)`` of the picture, 255 where the object is, or None.
            prepare: The network's preprocessing.

        Raises:
            ImageError: If the picture is too elongated for the network's own preprocessing.
        """
        if self.resize is None:
            tensor, geometry = prepare(picture)
            image = torch.from_numpy(prepare.undo(tensor)).movedim(-1, -3)
            if mask is None:
                return image, None
            # Level by level of the mask, which is hard nearly everywhere, as the view sees it.
            seen = np.zeros(geometry.size, np.uint8)
            for level in np.unique(mask):
                seen[geometry.from_original(mask == level)] = level
            return image, torch.from_numpy(seen)
        height, width = (round(self.resize * side) for side in prepare.size)
        wanted = [min(height, width)] if self.keep_aspect else [height, width]
        how = InterpolationMode(prepare.interpolation)
        resized = torch.from_numpy(np.array(F.resize(picture, wanted, how))).movedim(-1, -3)
        if mask is None:
            return resized, None
        plane = F.resize(Image.fromarray(mask), wanted, InterpolationMode.BILINEAR)
        return resized, torch.from_numpy(np.array(plane))

    def drawn(
        self, image: Tensor, mask: Tensor | None, prepare: Preprocess, seeds: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """One random view.

        Args:
            image: Of :meth:`fixed`.
            mask: Of :meth:`fixed`.
            prepare: The network's preprocessing.
            seeds: Non-negative numbers that determine the view; the random state of torch is left
                as it was.

        Returns:
            The network's input ``(3,H,W)``, normalised, and the mask ``(H,W)`` in [0, 1], NaN
            where there is none.
        """
        index, late = _steps(self, prepare.size)
        with _seeded(seeds):
            if mask is None:
                view = index(tv_tensors.Image(image))
                plane = torch.full(prepare.size, torch.nan)
            else:
                view, moved = index(tv_tensors.Image(image), tv_tensors.Mask(mask))
                plane = moved.as_subclass(Tensor).float() / 255
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (prepare.mean, prepare.std))
            tensor = (view.as_subclass(Tensor).float() / 255 - mean) / std
            return late(tensor), plane


@lru_cache(maxsize=64)
def _steps(options: Augmentation, size: tuple[int, int]) -> tuple[v2.Transform, v2.Transform]:
    """What is drawn: on picture and mask, and on the normalised picture alone."""
    steps: list[v2.Transform] = []
    if options.crop_scale is not None:
        steps.append(v2.RandomResizedCrop(size, options.crop_scale, options.crop_ratio))
    if options.rotate or options.shift or options.zoom != (1.0, 1.0):
        turn = v2.RandomAffine(
            degrees=options.rotate,
            translate=(options.shift, options.shift),
            scale=options.zoom,
            interpolation=InterpolationMode.BILINEAR,
        )
        # On white: torchvision mixes black into the edge of what it fills, which shows on white,
        # and is right on a negative. Masks have no negative and are left alone.
        negative = v2.RandomInvert(1.0)
        steps += [negative, turn, negative]
    if options.flip:
        steps.append(v2.RandomHorizontalFlip(options.flip))
    if options.pad:
        steps.append(v2.RandomCrop(size, padding=round(options.pad * size[0])))
    late: v2.Transform = v2.Identity()
    if options.erase:
        late = v2.RandomErasing(options.erase, options.erase_scale, options.erase_ratio)
    return v2.Compose(steps) if steps else v2.Identity(), late


@contextmanager
def _seeded(seeds: tuple[int, ...]) -> Iterator[None]:
    """Random draws of torch that depend on these numbers alone.

    The CPU's generator only: seeding torch as a whole would also seed the devices.
    """
    before = torch.get_rng_state()
    state = np.random.SeedSequence(seeds).generate_state(1, np.uint64)
    torch.default_generator.manual_seed(int(state[0]) >> 1)
    try:
        yield
    finally:
        torch.set_rng_state(before)


_LIGHT = Augmentation(
    "rotation, scale, shift and flip on white, no change of colour",
    "simexplain, for drawings and objects that are cut out: nearly all of them stays in view",
    rotate=15.0,
    zoom=(0.8, 1.2),
    shift=0.1,
    flip=0.5,
)

AUGMENTATIONS: dict[str, Augmentation] = {
    "avsl": Augmentation(
        "squashed to a square, random part of any shape, flip",
        "AVSL, section 4.2: resized to 256x256, random reshaping, flip, crop to 224x224; ranges of "
        "the part from the transforms of GeDML, which its official code runs with",
        resize=256 / 224,
        crop_scale=(0.16, 1.0),
        crop_ratio=(0.75, 1.33),
        flip=0.5,
    ),
    "sam": Augmentation(
        "random part of any shape, flip",
        "similarity attention (SAM) gives none; its section 4.1 follows Wang et al. (2019), whose "
        "official code resizes the shorter side to 256 and crops 16 to 100 % of the area to 227",
        resize=256 / 224,
        keep_aspect=True,
        crop_scale=(0.16, 1.0),
        flip=0.5,
    ),
    "light": _LIGHT,
    "erased": replace(
        _LIGHT,
        about="as light, and a rectangle erased",
        source="simexplain, for pictures of which a part may be hidden; the rectangle is that of "
        "reid",
        erase=0.5,
    ),
    "reid": Augmentation(
        "squashed to the input, flip, shift by padding, a rectangle erased",
        "Luo et al. (2019), Bag of tricks, section 3, at 256x128 with a border of 10; PCB (Sun et "
        "al., 2018), which SAM trains for persons, takes 384x128 and the flip alone",
        flip=0.5,
        pad=10 / 256,
        erase=0.5,
    ),
    "pcb": Augmentation(
        "squashed to the input, flip",
        "PCB (Sun et al., 2018), section 4.2: 384x128 and the flip alone",
        flip=0.5,
    ),
    "none": Augmentation(
        "the network's own preprocessing, as in evaluation",
        "what the model was evaluated with",
        resize=None,
    ),
}
"""Random views for training, by name. At an input of 224 their sizes are those of their sources."""
