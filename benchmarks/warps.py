"""Two pictures of one thing with a known map between them, for ``correspondence.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scenes import SIDE, Pixels, Stamps, compose_scenes, photographs
from scipy.interpolate import RBFInterpolator
from skimage import data
from skimage.transform import ProjectiveTransform, warp

Along = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Where points ``(P,2)`` of the first picture lie in the second: ``(x, y)``, shares of the side."""

LEVELS: dict[str, tuple[float, float]] = {
    "mild": (0.04, 5),
    "medium": (0.08, 20),
    "strong": (0.12, 45),
}
"""How far control points move at most, as a share of the side, after a turn of so many degrees."""

CONTROLS = {"homography": 2, "thin plate": 4}
"""Control points a side of each kind of map."""

GRID = 8
"""Points a side whose partners are looked for."""

SHARE = 3
"""A seed takes every third photograph, so that three seeds show each of them once."""

_MORE = ("chelsea", "retina", "immunohistochemistry")


@dataclass(frozen=True)
class Pair:
    """Two pictures of ``SIDE`` x ``SIDE`` pixels.

    Attributes:
        kind: ``homography`` or ``thin plate``.
        level: A name in :data:`LEVELS`.
        first: The second one, warped.
        along: The map from the first to the second.
    """

    kind: str
    level: str
    first: Image.Image
    along: Along


@dataclass(frozen=True)
class Subject:
    """A picture and what of it is of interest.

    Attributes:
        picture: The second picture of its pairs.
        inside: Where partners have to lie, as a boolean mask.
    """

    picture: Image.Image
    inside: NDArray[np.bool_]


def subjects(
    folder: Path | None, stamps: Stamps | None, scenes: int, seed: int
) -> dict[str, list[Subject]]:
    """Squares cut from photographs, and cut-outs on a ground of whom the objects count alone."""
    random = np.random.default_rng(seed)
    whole = np.ones((SIDE, SIDE), dtype=bool)
    shown = every_photograph(folder)[seed % SHARE :: SHARE]
    result = {"photographs": [Subject(_cut(one, random), whole) for one in shown]}
    if stamps is not None:
        made = compose_scenes(stamps, scenes, seed)
        result["cut-outs"] = [Subject(s.picture, s.positive | s.distractor) for s in made]
    return result


def every_photograph(folder: Path | None) -> list[Pixels]:
    """Those of scikit-image and scikit-learn, and those in a folder in order of their names."""
    from sklearn.datasets import load_sample_images

    result = [*photographs(), *(getattr(data, name)() for name in _MORE)]
    result += load_sample_images().images
    files = sorted(folder.iterdir()) if folder else []
    return result + [np.asarray(Image.open(file).convert("RGB")) for file in files]


def _cut(photograph: Pixels, random: np.random.Generator) -> Image.Image:
    """A square of 0.7 to 1 of the shorter side."""
    side = round(random.uniform(0.7, 1) * min(photograph.shape[:2]))
    top, left = (int(random.integers(length - side + 1)) for length in photograph.shape[:2])
    part = Image.fromarray(photograph[top : top + side, left : left + side])
    return part.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def pairs(subject: Subject, random: np.random.Generator) -> list[Pair]:
    """One of each kind and level."""
    pixels = np.asarray(subject.picture).astype(np.float64)
    result = []
    for kind, controls in CONTROLS.items():
        for level, (share, degrees) in LEVELS.items():
            along = random_map(controls, share, degrees, random)
            result.append(Pair(kind, level, _warped(pixels, along), along))
    return result


def random_map(controls: int, share: float, degrees: float, random: np.random.Generator) -> Along:
    """Control points on a grid are turned about the middle, either way, and moved at random.

    The four corners give a homography, more points a thin-plate spline through them.
    """
    places = np.linspace(0, 1, controls)
    start = np.stack(np.meshgrid(places, places), axis=-1).reshape(-1, 2)
    angle = np.deg2rad(random.uniform(0.5, 1) * degrees * random.choice((-1, 1)))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = (start - 0.5) @ turn.T + 0.5 + random.uniform(-share, share, start.shape)
    if controls == 2:
        return ProjectiveTransform.from_estimate(start, moved)
    return RBFInterpolator(start, moved, kernel="thin_plate_spline")


def _warped(pixels: NDArray[np.float64], along: Along) -> Image.Image:
    """What lies outside the picture is mirrored; no partner there is counted."""
    there = warp(pixels, lambda xy: along((xy + 0.5) / SIDE) * SIDE - 0.5, mode="reflect", order=1)
    return Image.fromarray(there.round().clip(0, 255).astype(np.uint8))


def grid_points() -> NDArray[np.float64]:
    """Points of the first picture ``(P,2)``, as shares of its side."""
    places = (np.arange(GRID) + 0.5) / GRID
    return np.stack(np.meshgrid(places, places), axis=-1).reshape(-1, 2)


def counted(pair: Pair, inside: NDArray[np.bool_]) -> tuple[NDArray[np.float64], ...]:
    """Points whose partners lie in the second picture, where it is of interest, and those."""
    points = grid_points()
    partners = pair.along(points)
    kept = ((partners >= 0) & (partners < 1)).all(axis=1)
    points, partners = points[kept], partners[kept]
    columns, rows = (partners * SIDE).astype(int).T
    kept = inside[rows, columns]
    return points[kept], partners[kept]
