"""Wide and tall pictures whose right answer is known, for ``fit.py``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scenes import GROUNDS, Stamps
from skimage import data

SHORT = 200
RATIOS = 1.4, 2.4
ALONE, TWO = 0.75, 0.6
"""Longest side of an object, in short sides of its picture: alone, and one of two."""


@dataclass(frozen=True)
class Labelled:
    """A picture to retrieve, and what it shows."""

    picture: Image.Image
    label: str


@dataclass(frozen=True)
class LongScene:
    """A wide or tall picture of two objects, of one of which the query shows another on white.

    Attributes:
        picture: Both objects, in the two halves of the longer side.
        positive: Where the one that is sought is, as a boolean mask.
        distractor: Where the other is.
        query: Another of the positive's category, on white.
    """

    picture: Image.Image
    positive: NDArray[np.bool_]
    distractor: NDArray[np.bool_]
    query: Image.Image


def on_white(stamps: Stamps) -> list[Labelled]:
    """Cut-outs as they are, in their own aspect, on white."""
    result = []
    for label, pictures in stamps.items():
        for stamp in pictures:
            page = Image.new("RGB", stamp.size, "white")
            page.paste(stamp, (0, 0), stamp)
            result.append(Labelled(page, label))
    return result


def placed(stamps: Stamps, seed: int, *, middle: bool) -> list[Labelled]:
    """Every cut-out on a wide or tall ground: anywhere, or in the middle; the same for a seed.

    The same seed gives the same grounds and sizes with ``middle`` and without.
    """
    random = np.random.default_rng(seed)
    grounds = _grounds()
    result = []
    for label, pictures in stamps.items():
        for stamp in pictures:
            picture = _long(grounds, random)
            small = _contained(stamp, ALONE * SHORT)
            room = picture.width - small.width, picture.height - small.height
            spot = tuple(int(random.integers(most + 1)) for most in room)
            spot = tuple(most // 2 for most in room) if middle else spot
            picture.paste(small, spot, small)
            result.append(Labelled(picture, label))
    return result


def long_scenes(stamps: Stamps, count: int, seed: int) -> list[LongScene]:
    """``count`` scenes, the same for the same seed."""
    random, grounds = np.random.default_rng(seed), _grounds()
    return [_scene(stamps, grounds, random) for _ in range(count)]


def _scene(
    stamps: Stamps, grounds: list[NDArray[np.uint8]], random: np.random.Generator
) -> LongScene:
    own, other = random.choice(list(stamps), size=2, replace=False)
    positive, relative = (stamps[own][n] for n in random.choice(len(stamps[own]), 2, replace=False))
    distractor = stamps[other][int(random.integers(len(stamps[other])))]
    picture = _long(grounds, random)
    long = int(picture.width < picture.height)
    masks = []
    for stamp, side in zip(
        (ImageOps.mirror(positive), distractor), random.permutation(2), strict=True
    ):
        small = _contained(stamp, TWO * SHORT)
        room = list(picture.size)
        room[long] //= 2
        spot = [
            int(random.integers(most - least + 1))
            for most, least in zip(room, small.size, strict=True)
        ]
        spot[long] += int(side) * room[long]
        picture.paste(small, tuple(spot), small)
        mask = np.zeros((picture.height, picture.width), dtype=bool)
        alpha = np.asarray(small)[:, :, 3] > 127
        mask[spot[1] : spot[1] + small.height, spot[0] : spot[0] + small.width] = alpha
        masks.append(mask)
    return LongScene(picture, masks[0], masks[1], _alone(relative))


def _grounds() -> list[NDArray[np.uint8]]:
    return [np.asarray(getattr(data, name)()) for name in GROUNDS]


def _long(grounds: list[NDArray[np.uint8]], random: np.random.Generator) -> Image.Image:
    """A wide or tall piece of a grey texture, in a random pale or dark colour."""
    texture = grounds[random.integers(len(grounds))]
    ratio = float(np.exp(random.uniform(*np.log(RATIOS))))
    sides = [SHORT, round(SHORT * ratio)]
    height, width = sides if random.integers(2) else sides[::-1]
    top = int(random.integers(texture.shape[0] - height + 1))
    left = int(random.integers(texture.shape[1] - width + 1))
    grey = texture[top : top + height, left : left + width, None].astype(np.float32)
    return Image.fromarray(
        (grey * random.uniform(0.6, 1.0, size=3).astype(np.float32)).astype(np.uint8)
    )


def _contained(stamp: Image.Image, side: float) -> Image.Image:
    return ImageOps.contain(stamp, (round(side), round(side)), Image.Resampling.LANCZOS)


def _alone(stamp: Image.Image) -> Image.Image:
    page = Image.new("RGB", (SHORT, SHORT), "white")
    large = _contained(stamp, 0.8 * SHORT)
    page.paste(large, ((SHORT - large.width) // 2, (SHORT - large.height) // 2), large)
    return page
