"""Scenes of several cut-outs, and queries that show one of them again among others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scenes import GROUNDS, Stamps
from skimage import data

SIDE = 448
PLACES = 4
LEAST, MOST = 110, 200
"""Pixels of a scene's side and of a cut-out's longer side."""

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Piece:
    """A cut-out in a scene.

    Attributes:
        category: Of what kind it is.
        number: Which picture of its category.
        box: ``(x, y, width, height)`` of its visible pixels.
    """

    category: str
    number: int
    box: Box


@dataclass(frozen=True)
class CrowdedScene:
    """``PLACES`` cut-outs on a photographic ground.

    Attributes:
        picture: RGB, ``SIDE`` x ``SIDE``.
        pieces: What is in it; boxes do not overlap.
    """

    picture: Image.Image
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Query:
    """A scene of which one piece is looked for.

    Attributes:
        scene: Its first piece is the marked one.
        answers: For every scene of the gallery that shows what is looked for, the boxes of it.
    """

    scene: CrowdedScene
    answers: dict[int, tuple[Box, ...]]


def compose_same(
    stamps: Stamps, scenes: int, queries: int, seed: int
) -> tuple[list[CrowdedScene], list[Query]]:
    """A gallery and queries for one and the same thing, the same for the same seed.

    ``queries`` scenes of the gallery hold one piece each that occurs nowhere else; all other places
    of all scenes are filled from the other cut-outs. A query shows its piece again, mirrored, in
    another size and place, among others that occur all over the gallery.

    Args:
        stamps: Cut-outs by category.
        scenes: In the gallery.
        queries: Fewer than there are cut-outs, by at least four, and no more than scenes.
        seed: Of all choices.
    """
    random = np.random.default_rng(seed)
    every = [(name, n) for name in sorted(stamps) for n in range(len(stamps[name]))]
    random.shuffle(every)
    wanted, filling = every[:queries], every[queries:]
    gallery = [
        _scene(stamps, [*wanted[n : n + 1], *_drawn(filling, random)][:PLACES], random)
        for n in range(scenes)
    ]
    requested = [
        Query(
            _scene(stamps, [one, *_drawn(filling, random)][:PLACES], random, mirrored=True),
            {index: (gallery[index].pieces[0].box,)},
        )
        for index, one in enumerate(wanted)
    ]
    return gallery, requested


def compose_category(
    stamps: Stamps, scenes: int, queries: int, seed: int
) -> tuple[list[CrowdedScene], list[Query]]:
    """A gallery and queries for a kind of thing: right is every scene with one of that kind.

    From each category up to a third of the cut-outs, at least one, are only in queries, so none of
    them is in the gallery. A query has three neighbours of other categories from the gallery; a
    scene of the gallery has four categories.

    Args:
        stamps: Cut-outs by category.
        scenes: In the gallery.
        queries: At most; the categories take turns.
        seed: Of all choices.
    """
    random = np.random.default_rng(seed)
    held: list[tuple[str, int]] = []
    filling: dict[str, list[tuple[str, int]]] = {}
    for name in sorted(stamps):
        order = [(name, int(n)) for n in random.permutation(len(stamps[name]))]
        cut = max(1, len(order) // 3)
        held += order[:cut]
        filling[name] = order[cut:]
    gallery = [_scene(stamps, _of_each(filling, "", random), random) for _ in range(scenes)]
    turns = sorted(held, key=lambda one: ([x for x in held if x[0] == one[0]].index(one), one[0]))
    requested = []
    for one in turns[:queries]:
        others = _of_each(filling, one[0], random)[: PLACES - 1]
        answers = {
            index: tuple(piece.box for piece in scene.pieces if piece.category == one[0])
            for index, scene in enumerate(gallery)
        }
        right = {index: boxes for index, boxes in answers.items() if boxes}
        if right:
            requested.append(Query(_scene(stamps, [one, *others], random), right))
    return gallery, requested


def _of_each(
    filling: dict[str, list[tuple[str, int]]], without: str, random: np.random.Generator
) -> list[tuple[str, int]]:
    """One cut-out of each of four categories."""
    names = [name for name in sorted(filling) if name != without]
    chosen = random.choice(len(names), size=PLACES, replace=False)
    return [filling[names[n]][random.integers(len(filling[names[n]]))] for n in chosen]


def _drawn(filling: list[tuple[str, int]], random: np.random.Generator) -> list[tuple[str, int]]:
    return [filling[n] for n in random.choice(len(filling), size=PLACES, replace=False)]


def _scene(
    stamps: Stamps,
    chosen: list[tuple[str, int]],
    random: np.random.Generator,
    *,
    mirrored: bool = False,
) -> CrowdedScene:
    """One cut-out in each quarter, in any order; the first may be mirrored."""
    textures = [np.asarray(getattr(data, name)()) for name in GROUNDS]
    picture = _ground(textures[random.integers(len(textures))], random)
    quarters, half = random.permutation(PLACES), SIDE // 2
    pieces = []
    for position, ((category, number), quarter) in enumerate(zip(chosen, quarters, strict=True)):
        stamp = stamps[category][number]
        stamp = stamp.crop(stamp.getchannel("A").point(lambda a: 255 * (a > 127)).getbbox())
        stamp = ImageOps.mirror(stamp) if mirrored and position == 0 else stamp
        side = int(random.integers(LEAST, MOST + 1))
        small = ImageOps.contain(stamp, (side, side), Image.Resampling.LANCZOS)
        left = (quarter % 2) * half + int(random.integers(half - small.width + 1))
        top = (quarter // 2) * half + int(random.integers(half - small.height + 1))
        picture.paste(small, (left, top), small)
        box = (int(left), int(top), small.width, small.height)
        pieces.append(Piece(category, number, box))
    return CrowdedScene(picture, tuple(pieces))


def _ground(texture: NDArray[np.uint8], random: np.random.Generator) -> Image.Image:
    """A square cut from a grey texture, in a random pale or dark colour."""
    side = SIDE // 2
    top, left = (int(random.integers(length - side + 1)) for length in texture.shape)
    grey = Image.fromarray(texture[top : top + side, left : left + side]).resize((SIDE, SIDE))
    colour = random.uniform(0.6, 1.0, size=3).astype(np.float32)
    return Image.fromarray((np.asarray(grey)[:, :, None] * colour).astype(np.uint8))
