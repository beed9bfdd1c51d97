"""Drawn persons in the folders of Market-1501, with cameras, distractors and junk.

    python benchmarks/persons.py persons/

A person is a set of colours and things (hair, shirt with its pattern, legs, shoes, a bag); a camera
is a cast of colour, a brightness, a background, a height and a blur. Persons share all colours, so
that no single one tells who it is, and the same person looks unlike before two cameras.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]
Box = Callable[[float, float, float, float], tuple[float, ...]]
HEIGHT, WIDTH, FINER = 128, 64, 3
CAMERAS, DISTRACTORS, JUNK = 4, 100, 24

CLOTH: tuple[Colour, ...] = (
    (34, 36, 42), (225, 222, 214), (170, 38, 44), (38, 72, 138), (58, 110, 62), (196, 150, 46),
    (112, 66, 128), (118, 118, 122), (96, 66, 44), (70, 150, 168),
)  # fmt: skip
HAIR: tuple[Colour, ...] = ((24, 20, 18), (92, 58, 34), (196, 160, 96), (150, 150, 152))
SKIN: tuple[Colour, ...] = ((236, 200, 174), (206, 160, 124), (148, 102, 72), (92, 62, 46))
PATTERNS = ("plain", "plain", "stripes", "bars", "checks", "badge")
BAGS = ("none", "none", "backpack", "shoulder", "hand")


@dataclass(frozen=True)
class Person:
    """What a person wears, wherever they are seen."""

    skin: Colour
    hair: Colour
    long_hair: bool
    shirt: Colour
    second: Colour
    pattern: str
    legs: Colour
    short_legs: bool
    shoes: Colour
    bag: str
    bag_colour: Colour
    build: float


@dataclass(frozen=True)
class Camera:
    """How everything looks before a camera."""

    cast: tuple[float, float, float]
    ground: Colour
    wall: Colour
    horizon: float
    scale: float
    blur: float


def drawn_person(draw: np.random.Generator) -> Person:
    """Anybody."""

    def one(colours: tuple[Colour, ...]) -> Colour:
        return colours[int(draw.integers(len(colours)))]

    return Person(
        one(SKIN), one(HAIR), bool(draw.random() < 0.4), one(CLOTH), one(CLOTH),
        PATTERNS[int(draw.integers(len(PATTERNS)))], one(CLOTH), bool(draw.random() < 0.25),
        one(CLOTH), BAGS[int(draw.integers(len(BAGS)))], one(CLOTH), float(draw.uniform(0.85, 1.2)),
    )  # fmt: skip


def drawn_camera(draw: np.random.Generator) -> Camera:
    """A place and a lens."""
    cast = draw.uniform(0.72, 1.18, 3) * draw.uniform(0.75, 1.15)
    ground, wall = (draw.integers(70, 200, 3) for _ in range(2))
    return Camera(
        (float(cast[0]), float(cast[1]), float(cast[2])),
        (int(ground[0]), int(ground[1]), int(ground[2])),
        (int(wall[0]), int(wall[1]), int(wall[2])),
        float(draw.uniform(0.35, 0.7)), float(draw.uniform(0.86, 1.06)),
        float(draw.uniform(0.3, 1.0)),
    )  # fmt: skip


def picture(person: Person | None, camera: Camera, draw: np.random.Generator) -> Image.Image:
    """A box of a person, or of nobody, before a camera."""
    canvas = Image.new("RGB", (FINER * WIDTH, FINER * HEIGHT), camera.wall)
    pen = ImageDraw.Draw(canvas)
    horizon = round(camera.horizon * canvas.height)
    pen.rectangle((0, horizon, canvas.width, canvas.height), fill=camera.ground)
    for _ in range(int(draw.integers(2, 6))):
        x, y = draw.uniform(0, canvas.width), draw.uniform(0, canvas.height)
        w, h = draw.uniform(5, 60, 2)
        near = camera.wall if y < horizon else camera.ground
        fill = tuple(int(np.clip(c + draw.normal(0, 30), 0, 255)) for c in near)
        pen.rectangle((x, y, x + w, y + h), fill=fill)
    if person is not None:
        _draw(pen, person, camera, draw)
    if draw.random() < 0.15:
        x = draw.choice((0.0, 0.75)) * canvas.width
        pen.rectangle(
            (x, 0.3 * canvas.height, x + 0.25 * canvas.width, canvas.height), (60, 60, 66)
        )
    small = canvas.filter(ImageFilter.GaussianBlur(FINER * camera.blur))
    small = small.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    pixels = (
        np.asarray(small, dtype=np.float64) * np.asarray(camera.cast) * draw.uniform(0.85, 1.15)
    )
    pixels += draw.normal(0, 5, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _draw(pen: ImageDraw.ImageDraw, p: Person, camera: Camera, draw: np.random.Generator) -> None:
    """The person; lengths in units of the box's height times the camera's scale."""
    unit = FINER * HEIGHT * camera.scale * draw.uniform(0.95, 1.05)
    x = FINER * WIDTH / 2 + draw.normal(0, 0.02) * unit
    top = FINER * HEIGHT * (0.5 + draw.normal(0, 0.015)) - 0.47 * unit
    side, stride = draw.choice((-1, 1)), draw.uniform(0.0, 0.05)

    def box(left: float, up: float, right: float, down: float) -> tuple[float, ...]:
        return x + left * unit, top + up * unit, x + right * unit, top + down * unit

    b = 0.1 * p.build
    if p.bag == "backpack":
        pen.rounded_rectangle(box(-b * 1.5, 0.17, b * 1.5, 0.42), 0.03 * unit, p.bag_colour)
    for sign in (-1, 1):
        foot = sign * (0.04 + stride)
        knee = 0.68 if p.short_legs else 0.88
        pen.line(box(sign * 0.04, 0.5, foot, 0.9), p.skin, round(0.05 * unit))
        part = (knee - 0.5) / 0.4
        end = sign * 0.04 + part * (foot - sign * 0.04)
        pen.line(box(sign * 0.04, 0.48, end, knee), p.legs, round(0.08 * p.build * unit))
        pen.ellipse(box(foot - 0.045, 0.885, foot + 0.045, 0.94), p.shoes)
        swing = draw.uniform(-0.03, 0.06)
        pen.line(box(sign * b, 0.2, sign * (b + 0.02 + swing), 0.46), p.shirt, round(0.055 * unit))
        hand = sign * (b + 0.02 + swing)
        pen.ellipse(box(hand - 0.022, 0.45, hand + 0.022, 0.5), p.skin)
    pen.rounded_rectangle(box(-b, 0.16, b, 0.52), 0.03 * unit, p.shirt)
    _pattern(pen, p, box, b)
    if p.bag == "shoulder":
        pen.line(box(-side * b, 0.17, side * b, 0.42), p.bag_colour, round(0.02 * unit))
        left, right = sorted((side * b * 0.7, side * (b + 0.07)))
        pen.rectangle(box(left, 0.4, right, 0.53), p.bag_colour)
    if p.bag == "hand":
        left, right = sorted((side * (b + 0.01), side * (b + 0.09)))
        pen.rectangle(box(left, 0.48, right, 0.6), p.bag_colour)
    if p.long_hair:
        pen.ellipse(box(-0.06, 0.01, 0.06, 0.2), p.hair)
    pen.ellipse(box(-0.05, 0.02, 0.05, 0.15), p.skin)
    # From behind, hair is all there is of a head.
    pen.pieslice(box(-0.054, 0.0, 0.054, 0.15), 170, 370 if draw.random() < 0.5 else 530, p.hair)


def _pattern(pen: ImageDraw.ImageDraw, p: Person, box: Box, b: float) -> None:
    """Both colours of the shirt."""
    if p.pattern in ("stripes", "checks"):
        for up in np.arange(0.2, 0.5, 0.06):
            pen.rectangle(box(-b, up, b, up + 0.025), p.second)
    if p.pattern in ("bars", "checks"):
        for left in np.arange(-b, b - 0.01, 0.06):
            pen.rectangle(box(left, 0.17, left + 0.022, 0.51), p.second)
    if p.pattern == "badge":
        pen.ellipse(box(-0.5 * b, 0.24, 0.5 * b, 0.36), p.second)


def write_persons(
    root: Path, *, train: int = 60, test: int = 100, each: int = 3, seed: int = 0
) -> Path:
    """Writes ``bounding_box_train``, ``query`` and ``bounding_box_test``.

    Args:
        root: Made if missing.
        train: Persons to train on...
        test: ...and others to be found.
        each: Pictures of a person before a camera.
        seed: Of everything that is drawn.
    """
    draw = np.random.default_rng(seed)
    cameras = [drawn_camera(draw) for _ in range(CAMERAS)]
    for part in ("bounding_box_train", "query", "bounding_box_test"):
        (root / part).mkdir(parents=True, exist_ok=True)
    frame = 0

    def write(part: str, name: str, person: Person | None, camera: int) -> None:
        nonlocal frame
        frame += 1
        seen = picture(person, cameras[camera], draw)
        file = root / part / f"{name}_c{camera + 1}s1_{frame:06d}_00.jpg"
        seen.save(file, quality=90)

    for number in range(1, train + test + 1):
        person = drawn_person(draw)
        for camera in draw.permutation(CAMERAS)[: int(draw.integers(2, CAMERAS + 1))].tolist():
            for index in range(each):
                part = "bounding_box_train" if number <= train else "bounding_box_test"
                if number > train and index == 0:
                    part = "query"
                write(part, f"{number:04d}", person, camera)
    for _ in range(DISTRACTORS):
        somebody = drawn_person(draw) if draw.random() < 0.7 else None
        write("bounding_box_test", "0000", somebody, int(draw.integers(CAMERAS)))
    for _ in range(JUNK):
        write("bounding_box_test", "-1", drawn_person(draw), int(draw.integers(CAMERAS)))
    return root


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    for name, usual in (("train", 60), ("test", 100), ("each", 3), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    given = vars(parser.parse_args())
    write_persons(given.pop("out"), **given)
