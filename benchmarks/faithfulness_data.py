"""What ``faithfulness.py`` measures on: scenes of cut-outs, and pairs of pictures of one thing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from held_out import TRAINED
from PIL import Image, ImageOps
from scenes import ALONE, KINDS, SIDE, Scene, Stamps, compose_scenes, divided, read_stamps
from torch import Tensor

SETTINGS = ("same", "category")
FREE_VENDORS = ("fluent", "google", "noto-v1")
"""Emoji under Apache-2.0 or MIT: pictures of them may lie in the repository."""


@dataclass(frozen=True)
class Data:
    """One collection of comparisons.

    Attributes:
        name: As the page calls it.
        settings: Those that its scenes have.
        make: ``(count, seed) -> scenes``.
        points: Whether there is something to point at beside the object.
        curves: Whether deletion and insertion are measured.
        dear: Whether the expensive methods run on it.
        share: Its number of scenes as a share of what was asked for.
        note: What is special about it.
    """

    name: str
    make: Callable[[int, int], list[Scene]]
    settings: tuple[str, ...] = SETTINGS
    points: bool = True
    curves: bool = True
    dear: bool = True
    share: float = 1
    note: str = ""


def stamp_scenes(name: str, folder: Path) -> Data:
    """Scenes of the cut-outs in a folder of categories."""
    stamps = read_stamps(folder)
    return Data(name, partial(compose_scenes, stamps))


def kind_scenes(name: str, stamps: Stamps, kinds: Sequence[str]) -> dict[str, Data]:
    """Scenes of several kinds of the same cut-outs, by kind."""
    return {
        kind: Data(
            f"{name} {kind}",
            partial(compose_scenes, stamps, kind=KINDS[kind]),
            curves=False,
            note=f"Here: {KINDS[kind].about}.",
        )
        for kind in kinds
    }


def emoji_data(folder: Path) -> tuple[Data, Data, tuple[list[Image.Image], list[str]]]:
    """Scenes and pairs of the last 40 % of the emoji, and the pictures of the others for a bank.

    Returns:
        Scenes, pairs, and two pictures on white of each of the first 60 % of the classes with
        their labels.
    """
    stamps = read_stamps(folder / "images" if (folder / "images").is_dir() else folder)
    known, held = divided(stamps, TRAINED)
    bank = [(alone(picture)[0], name) for name in known for picture in known[name][:2]]
    return (
        Data("emoji scenes", partial(compose_scenes, held), curves=False, dear=False, share=0.3),
        Data("emoji pairs", partial(compose_pairs, held), SETTINGS[1:], points=False, dear=False),
        ([picture for picture, _ in bank], [name for _, name in bank]),
    )


def free_emoji(folder: Path) -> Stamps:
    """The emoji whose licences allow pictures of them in the repository."""
    root = folder / "images" if (folder / "images").is_dir() else folder
    result = {}
    for path in sorted(root.iterdir()):
        files = [path / f"{vendor}.png" for vendor in FREE_VENDORS]
        pictures = [Image.open(file).convert("RGBA") for file in files if file.is_file()]
        if len(pictures) >= 2:
            result[path.name] = pictures
    return divided(result, TRAINED)[1]


def compose_pairs(stamps: Stamps, count: int, seed: int) -> list[Scene]:
    """Two pictures of one thing and one of another, each alone on white."""
    random = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        own, other = random.choice(sorted(stamps), size=2, replace=False)
        first, second = random.choice(len(stamps[own]), size=2, replace=False)
        picture, mask = alone(stamps[own][second])
        query = alone(stamps[own][first])[0]
        negative = alone(stamps[other][random.integers(len(stamps[other]))])[0]
        result.append(Scene(picture, mask, np.zeros_like(mask), {"category": query}, negative))
    return result


def alone(stamp: Image.Image) -> tuple[Image.Image, np.ndarray]:
    """A cut-out on white, as the queries of scenes, with its mask ``(SIDE,SIDE)``."""
    large = ImageOps.contain(stamp, (ALONE, ALONE), Image.Resampling.LANCZOS)
    left, top = (SIDE - large.width) // 2, (SIDE - large.height) // 2
    page = Image.new("RGB", (SIDE, SIDE), "white")
    page.paste(large, (left, top), large)
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    inside = np.asarray(large)[:, :, 3] > 127
    mask[top : top + large.height, left : left + large.width] = inside
    return page, mask


def masks_of(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Masks of the positives and of the distractors ``(M,SIDE,SIDE)``."""
    positive = torch.from_numpy(np.stack([scene.positive for scene in scenes]))
    return positive, torch.from_numpy(np.stack([scene.distractor for scene in scenes]))
