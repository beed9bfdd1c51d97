"""Scenes of two cut-outs with exact masks, and five support pictures of each of their kinds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from faithfulness_data import alone
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scenes import SIDE, STAMP, Stamps, textured, textures

SHOTS = 5


@dataclass(frozen=True)
class SegmentationScene:
    """A test picture of ``SIDE`` x ``SIDE`` pixels with two objects of different kinds.

    Attributes:
        picture: Both, side by side on a photographic ground.
        labels: Their kinds.
        masks: Where each is, ``(SIDE,SIDE)``, boolean.
        supports: For each kind five other pictures of it, alone on white.
    """

    picture: Image.Image
    labels: tuple[str, str]
    masks: tuple[NDArray[np.bool_], NDArray[np.bool_]]
    supports: tuple[tuple[Image.Image, ...], tuple[Image.Image, ...]]


def enough(stamps: Stamps) -> Stamps:
    """The kinds with a picture to find and five others to find it by."""
    kept = {name: pictures for name, pictures in stamps.items() if len(pictures) > SHOTS}
    if len(kept) < 2:
        raise SystemExit(f"Two categories need {SHOTS + 1} pictures each, {len(kept)} have them.")
    return kept


def segmentation_scenes(stamps: Stamps, count: int, seed: int) -> list[SegmentationScene]:
    """``count`` scenes, the same for the same seed, composed as in ``scenes.py``."""
    random = np.random.default_rng(seed)
    grounds = textures()
    kinds = enough(stamps)
    return [_scene(kinds, grounds, random) for _ in range(count)]


def _scene(
    stamps: Stamps, grounds: list[NDArray[np.uint8]], random: np.random.Generator
) -> SegmentationScene:
    labels = random.choice(sorted(stamps), size=2, replace=False).tolist()
    picture = textured(grounds[random.integers(len(grounds))], random)
    masks, supports = [], []
    for label, side in zip(labels, random.permutation(2), strict=True):
        drawn = random.choice(len(stamps[label]), size=1 + SHOTS, replace=False)
        stamp, *others = (stamps[label][number] for number in drawn)
        small = ImageOps.contain(stamp, (STAMP, STAMP), Image.Resampling.LANCZOS)
        left = int(side) * SIDE // 2 + int(random.integers(SIDE // 2 - small.width + 1))
        top = int(random.integers(SIDE - small.height + 1))
        picture.paste(small, (left, top), small)
        mask = np.zeros((SIDE, SIDE), dtype=bool)
        inside = np.asarray(small)[:, :, 3] > 127
        mask[top : top + small.height, left : left + small.width] = inside
        masks.append(mask)
        supports.append(tuple(alone(other)[0] for other in others))
    return SegmentationScene(
        picture, (labels[0], labels[1]), (masks[0], masks[1]), (supports[0], supports[1])
    )
