"""Drawn persons in the official folders of re-identification, small enough for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE = (64, 128)
"""Width and height of Market-1501's pictures."""


def person(number: int, camera: int, seed: int = 0) -> Image.Image:
    """Three bands of colours by which persons differ; a camera has a background and a cast."""
    draw = np.random.default_rng((number + 2, camera, seed))
    own = np.random.default_rng(number + 2).integers(30, 225, (3, 3))
    back = np.random.default_rng(1000 + camera).integers(60, 200, 3)
    picture = Image.new("RGB", SIZE, tuple(int(c) for c in back))
    pen = ImageDraw.Draw(picture)
    for band, (top, bottom) in enumerate(((12, 35), (36, 75), (76, 120))):
        pen.rectangle((16, top, 47, bottom), fill=tuple(int(c) for c in own[band]))
    pixels = np.asarray(picture) + draw.normal(0, 6, (SIZE[1], SIZE[0], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def put_person(folder: Path, name: str) -> Path:
    """A picture under an official name, such as ``0002_c1s1_000451_03.jpg``, showing who it says.

    What comes after person and camera makes the noise.
    """
    number, rest = name.split("_c", 1)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    person(int(number), int(rest[0]), seed=sum(map(ord, rest))).save(path)
    return path


def market(root: Path, *, train: int = 6, test: int = 4, suffix: str = "jpg") -> Path:
    """A tree as Market-1501's: two cameras, two pictures each, distractors, junk, ``Thumbs.db``."""
    for number in range(1, train + test + 1):
        for camera in (1, 2):
            for index in range(2):
                part = "bounding_box_train" if number <= train else "bounding_box_test"
                if number > train and index == 0:
                    part = "query"
                name = f"{number:04d}_c{camera}s1_{100 * number + 10 * camera + index:06d}_00"
                put_person(root / part, f"{name}.{suffix}")
    for index in range(3):
        put_person(root / "bounding_box_test", f"0000_c{1 + index % 2}s1_9000{index}0_01.{suffix}")
        put_person(root / "bounding_box_test", f"-1_c{1 + index % 2}s1_8000{index}0_01.{suffix}")
    for part in ("bounding_box_train", "query", "bounding_box_test"):
        (root / part / "Thumbs.db").write_bytes(b"\x00")
    return root
