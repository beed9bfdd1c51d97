"""Scenes whose right answer is known: cut-out photographs of several kinds on a ground."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy.ndimage import binary_dilation
from scipy.signal import fftconvolve
from skimage import data

SIDE = 224
STAMP = 106
ALONE = 180
CELL = SIDE // 3
SMALL, LARGE, BESIDE_LARGE = (round(share * SIDE) for share in (0.1, 0.7, 0.3))
HIDDEN, NEAR = 1 / 3, 0.02
GROUNDS = ("grass", "gravel", "brick")
PHOTOGRAPHS = ("astronaut", "coffee", "rocket", "hubble_deep_field")
_TRIES = 100

Stamps = dict[str, list[Image.Image]]
Pixels = NDArray[np.uint8]
Placed = tuple[Image.Image, int, int]
"""A cut-out as large as it is shown, and where its left and upper edges are."""
Arrangement = Callable[[Sequence[Image.Image], np.random.Generator], "list[Placed] | None"]
"""Where cut-outs go, those behind first; None if these ones cannot be arranged so."""


@dataclass(frozen=True)
class Scene:
    """One scene and the pictures that it is compared with, all of ``SIDE`` x ``SIDE`` pixels.

    Attributes:
        picture: The positive and distractors of other categories on a ground.
        positive: Where the positive is to be seen, as a boolean mask.
        distractor: Where any of the distractors is.
        queries: By setting: ``same`` is the positive itself, mirrored, on white; ``category`` is
            another stamp of its category on white.
        negative: Another stamp of the (first) distractor's category, on white.
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


def compose_scenes(stamps: Stamps, count: int, seed: int, kind: Kind | None = None) -> list[Scene]:
    """``count`` scenes, the same for the same seed; categories are drawn evenly.

    Raises:
        SystemExit: If there are fewer categories than objects in a scene, or cut-outs of such
            shapes that no scene of the kind can be made of them.
    """
    kind = kind or PLAIN
    if len(stamps) < kind.most:
        raise SystemExit(f"Scenes of {kind.most} objects need as many categories of cut-outs.")
    random = np.random.default_rng(seed)
    grounds = kind.grounds()
    result: list[Scene] = []
    for _ in range(_TRIES * count):
        scene = _scene(stamps, kind, grounds, random) if len(result) < count else None
        result += [scene] if scene is not None else []
    if len(result) < count:
        raise SystemExit(f"No {count} scenes ({kind.about}) can be made of these cut-outs.")
    return result


def textures() -> list[Pixels]:
    """The grey photographs that grounds are cut from."""
    return [np.asarray(getattr(data, name)()) for name in GROUNDS]


def photographs() -> list[Pixels]:
    """Colour photographs ``(h,w,3)`` of scikit-image, without those that show an animal."""
    return [getattr(data, name)() for name in PHOTOGRAPHS] + [data.stereo_motorcycle()[0]]


def _scene(
    stamps: Stamps, kind: Kind, grounds: list[Pixels], random: np.random.Generator
) -> Scene | None:
    number = kind.fewest
    if kind.most > kind.fewest:  # kinds of one number draw none: their scenes are as ever
        number = int(random.integers(kind.fewest, kind.most + 1))
    names = random.choice(list(stamps), size=number, replace=False)
    (positive, relative), *others = (_two(stamps[name], random) for name in names)
    picture = textured(grounds[random.integers(len(grounds))], random)
    shown = [ImageOps.mirror(positive), *(distractor for distractor, _ in others)]
    placed = kind.arranged(shown, random)
    if placed is None:
        return None
    masks = np.zeros((len(placed), SIDE, SIDE), dtype=bool)
    for mask, (cut, left, top) in zip(masks, placed, strict=True):
        picture.paste(cut, (left, top), cut)
        mask[top : top + cut.height, left : left + cut.width] = inside(cut)
    for index, mask in enumerate(masks):
        mask &= ~masks[index + 1 :].any(axis=0)
    queries = {"same": _on_white(positive), "category": _on_white(relative)}
    return Scene(picture, masks[0], masks[1:].any(axis=0), queries, _on_white(others[0][1]))


def inside(cut: Image.Image) -> NDArray[np.bool_]:
    """The mask of a cut-out ``(h,w)``."""
    return np.asarray(cut)[:, :, 3] > 127


def in_halves(shown: Sequence[Image.Image], random: np.random.Generator) -> list[Placed]:
    """Two, each anywhere in its own half."""
    placed = []
    for stamp, half in zip(shown, random.permutation(2), strict=True):
        small = ImageOps.contain(stamp, (STAMP, STAMP), Image.Resampling.LANCZOS)
        left = int(half) * SIDE // 2 + int(random.integers(SIDE // 2 - small.width + 1))
        placed.append((small, left, int(random.integers(SIDE - small.height + 1))))
    return placed


def in_cells(shown: Sequence[Image.Image], random: np.random.Generator) -> list[Placed]:
    """Up to nine, each in a cell of its own, of different sizes."""
    placed = []
    for stamp, cell in zip(shown, random.choice(9, len(shown), replace=False), strict=True):
        cut = _sized(stamp, int(random.integers(round(0.75 * CELL), CELL + 1)))
        top, left = (int(edge) * CELL for edge in divmod(cell, 3))
        left += int(random.integers(CELL - cut.width + 1))
        placed.append((cut, left, top + int(random.integers(CELL - cut.height + 1))))
    return placed


def in_row(
    shown: Sequence[Image.Image], random: np.random.Generator, sides: Sequence[int]
) -> list[Placed]:
    """Side by side at any distance, in any order; ``sides`` are their longest ones."""
    cuts = [_sized(stamp, side) for stamp, side in zip(shown, sides, strict=True)]
    free = SIDE - sum(cut.width for cut in cuts)
    before = np.sort(random.integers(free + 1, size=len(cuts)))
    order = random.permutation(len(cuts))
    widths = np.cumsum([0, *(cuts[index].width for index in order)])
    lefts = {index: int(before[n] + widths[n]) for n, index in enumerate(order)}
    return [
        (cut, lefts[index], int(random.integers(SIDE - cut.height + 1)))
        for index, cut in enumerate(cuts)
    ]


def in_contact(
    shown: Sequence[Image.Image], random: np.random.Generator, hidden: float
) -> list[Placed] | None:
    """The second in front of the first, of which it hides a share, or which it just touches."""
    cuts = [_sized(stamp, STAMP) for stamp in shown]
    behind, front = (inside(cut) for cut in cuts)
    # How many pixels are hidden where the front one's upper left corner is at each place.
    covered = fftconvolve(behind.astype(float), front[::-1, ::-1].astype(float)).round()
    if hidden:
        fits = abs(covered / behind.sum() - hidden) < NEAR
    else:
        fits = (covered == 0) & binary_dilation(covered > 0)
    places = np.argwhere(fits)
    if not len(places):
        return None
    shift = places[random.integers(len(places))] - np.array(front.shape) + 1
    start = np.minimum(shift, 0)
    size = np.maximum(behind.shape, shift + front.shape) - start
    corner = random.integers(SIDE - size + 1) - start
    return [
        (cut, int(left), int(top))
        for cut, (top, left) in zip(cuts, (corner, corner + shift), strict=True)
    ]


def _sized(stamp: Image.Image, side: int) -> Image.Image:
    """What is to be seen of a cut-out, its longest side as given."""
    box = stamp.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox()
    return ImageOps.contain(stamp.crop(box), (side, side), Image.Resampling.LANCZOS)


def _two(stamps: list[Image.Image], random: np.random.Generator) -> list[Image.Image]:
    return [stamps[i] for i in random.choice(len(stamps), size=2, replace=False)]


def textured(ground: Pixels, random: np.random.Generator, side: int = SIDE) -> Image.Image:
    """A square cut from a grey texture, in a random pale or dark colour, or from a photograph."""
    if ground.ndim == 3:
        cut = int(random.integers(side, min(ground.shape[:2]) + 1))
        top, left = (int(random.integers(length - cut + 1)) for length in ground.shape[:2])
        part = Image.fromarray(ground[top : top + cut, left : left + cut])
        return part.resize((side, side), Image.Resampling.LANCZOS)
    top, left = (int(random.integers(length - side + 1)) for length in ground.shape)
    grey = ground[top : top + side, left : left + side, None].astype(np.float32)
    colour = random.uniform(0.6, 1.0, size=3).astype(np.float32)
    return Image.fromarray((grey * colour).astype(np.uint8))


def _on_white(stamp: Image.Image) -> Image.Image:
    page = Image.new("RGB", (SIDE, SIDE), "white")
    large = ImageOps.contain(stamp, (ALONE, ALONE), Image.Resampling.LANCZOS)
    page.paste(large, ((SIDE - large.width) // 2, (SIDE - large.height) // 2), large)
    return page


@dataclass(frozen=True)
class Kind:
    """What scenes look like.

    Attributes:
        about: In words.
        arranged: Where the cut-outs go.
        fewest: Objects in a scene, the positive among them.
        most: The same.
        grounds: What they stand on.
    """

    about: str
    arranged: Arrangement
    fewest: int = 2
    most: int = 2
    grounds: Callable[[], list[Pixels]] = textures


PLAIN = Kind("two objects, each in its own half", in_halves)
KINDS: dict[str, Kind] = {
    "plain": PLAIN,
    "several": Kind("three to five objects, a quarter to a third of the width", in_cells, 3, 5),
    "touching": Kind("two objects that touch", partial(in_contact, hidden=0)),
    "occluded": Kind(
        "a third of the positive behind the other", partial(in_contact, hidden=HIDDEN)
    ),
    "small": Kind("both a tenth of the width", partial(in_row, sides=(SMALL, SMALL))),
    "large": Kind(
        "the positive 0.7 of the width, the other 0.3", partial(in_row, sides=(LARGE, BESIDE_LARGE))
    ),
    "photographs": Kind("two objects on a photograph", in_halves, grounds=photographs),
}
"""Kinds of scenes by name."""
