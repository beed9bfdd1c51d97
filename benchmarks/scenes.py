"""Scenes whose right answer is known: cut-out photographs of two kinds on a photographic ground."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from skimage import data

SIDE = 224
STAMP = 106
ALONE = 180
GROUNDS = ("grass", "gravel", "brick")

Stamps = dict[str, list[Image.Image]]


@dataclass(frozen=True)
class Scene:
    """One scene and the pictures that it is compared with, all of ``SIDE`` x ``SIDE`` pixels.

    Attributes:
        picture: The positive and a distractor of another category, side by side on a ground.
        positive: Where the positive is, as a boolean mask.
        distractor: Where the distractor is.
        queries: By setting: ``same`` is the positive itself, mirrored, on white; ``category`` is
            another stamp of its category on white.
        negative: Another stamp of the distractor's category, on white.
    """

    picture: Image.Image
    positive: NDArray[np.bool_]
    distractor: NDArray[np.bool_]
    queries: dict[str, Image.Image]
    negative: Image.Image


def read_stamps(folder: Path) -> Stamps:
    """Cut-outs by category: the folder holds one folder for each, with RGBA pictures in it.

    Raises:
        SystemExit: If there are fewer than two categories of two pictures with an alpha channel.
    """
    stamps = {}
    for category in sorted(path for path in folder.iterdir() if path.is_dir()):
        pictures = [Image.open(path).convert("RGBA") for path in sorted(category.glob("*.png"))]
        cut = [picture for picture in pictures if picture.getextrema()[3][0] == 0]
        if len(cut) >= 2:
            stamps[category.name] = cut
    if len(stamps) < 2:
        raise SystemExit(f"{folder} needs two categories with two transparent PNG files each.")
    return stamps


def divided(stamps: Stamps, share: float) -> tuple[Stamps, Stamps]:
    """The first share of the categories in order of their names, and the others."""
    names = sorted(stamps)
    cut = round(share * len(names))
    first = {name: stamps[name] for name in names[:cut]}
    return first, {name: stamps[name] for name in names[cut:]}


def compose_scenes(stamps: Stamps, count: int, seed: int) -> list[Scene]:
    """``count`` scenes, the same for the same seed; categories are drawn evenly."""
    random = np.random.default_rng(seed)
    grounds = textures()
    return [_scene(stamps, grounds, random) for _ in range(count)]


def textures() -> list[NDArray[np.uint8]]:
    """The grey photographs that grounds are cut from."""
    return [np.asarray(getattr(data, name)()) for name in GROUNDS]


def _scene(stamps: Stamps, grounds: list[NDArray[np.uint8]], random: np.random.Generator) -> Scene:
    own, other = random.choice(list(stamps), size=2, replace=False)
    positive, relative = _two(stamps[own], random)
    distractor, negative = _two(stamps[other], random)
    picture = textured(grounds[random.integers(len(grounds))], random)
    sides = random.permutation(2)
    masks = []
    for stamp, side in ((ImageOps.mirror(positive), sides[0]), (distractor, sides[1])):
        small = ImageOps.contain(stamp, (STAMP, STAMP), Image.Resampling.LANCZOS)
        half = SIDE // 2
        left = int(side) * half + int(random.integers(half - small.width + 1))
        top = int(random.integers(SIDE - small.height + 1))
        picture.paste(small, (left, top), small)
        mask = np.zeros((SIDE, SIDE), dtype=bool)
        alpha = np.asarray(small)[:, :, 3] > 127
        mask[top : top + small.height, left : left + small.width] = alpha
        masks.append(mask)
    queries = {"same": _on_white(positive), "category": _on_white(relative)}
    return Scene(picture, masks[0], masks[1], queries, _on_white(negative))


def _two(stamps: list[Image.Image], random: np.random.Generator) -> list[Image.Image]:
    return [stamps[i] for i in random.choice(len(stamps), size=2, replace=False)]


def textured(
    texture: NDArray[np.uint8], random: np.random.Generator, side: int = SIDE
) -> Image.Image:
    """A square cut from a grey texture, in a random pale or dark colour."""
    top, left = (int(random.integers(length - side + 1)) for length in texture.shape)
    grey = texture[top : top + side, left : left + side, None].astype(np.float32)
    colour = random.uniform(0.6, 1.0, size=3).astype(np.float32)
    return Image.fromarray((grey * colour).astype(np.uint8))


def _on_white(stamp: Image.Image) -> Image.Image:
    page = Image.new("RGB", (SIDE, SIDE), "white")
    large = ImageOps.contain(stamp, (ALONE, ALONE), Image.Resampling.LANCZOS)
    page.paste(large, ((SIDE - large.width) // 2, (SIDE - large.height) // 2), large)
    return page
