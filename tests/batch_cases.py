"""Batches for tests: small pictures, and rows of every shape that share them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from conftest import TinyNet
from pictures import noise

from simexplain import Preprocess, as_similarity_model
from simexplain.models.base import SimilarityModel

SIZE = (24, 32)
NAMES = tuple(f"p{number}.png" for number in range(8))
ROWS: tuple[tuple[str, str, str], ...] = (
    ("p0.png", "p1.png", "p2.png"),
    ("p5.png", "p6.png", ""),
    ("p0.png", "p1.png;p3.png", "p2.png;p4.png"),
    ("p7.png", "", "p5.png"),
    ("p1.png", "p0.png", "p4.png"),
    ("p6.png", "p5.png", "p7.png;p0.png"),
    ("p2.png", "p2.png", "p3.png"),
    ("p4.png", "", "p1.png"),
    ("p3.png", "p0.png;p1.png;p2.png", ""),
)
"""Pairs, triplets, quadruplets and sets; one compares a picture with itself."""


def tiny_model(seed: int = 0) -> SimilarityModel:
    """The same small network for the same seed, in every process."""
    torch.manual_seed(seed)
    return as_similarity_model(TinyNet().eval(), preprocess=Preprocess(SIZE), name="tiny")


def drawn(folder: Path) -> Path:
    """Pictures of several sizes in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(NAMES):
        noise(30 + 7 * number, 40 + 5 * (number % 3), seed=number).save(folder / name)
    return folder


def written(
    path: Path,
    rows: Sequence[Sequence[str]] = ROWS,
    header: Sequence[str] = ("anchor", "positives", "negatives"),
) -> Path:
    """A CSV file."""
    with path.open("w", encoding="utf-8", newline="") as opened:
        csv.writer(opened).writerows([header, *rows])
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a batch but its manifest, which tells where the pictures are."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "batch.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
