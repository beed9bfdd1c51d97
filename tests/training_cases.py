"""Generated data sets and the smallest network that trains in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

TINY: dict[str, Any] = {
    "backbone": "timm:test_efficientnet", "pretrained": False, "size": (32, 32), "embedding": 12,
    "classes_per_batch": 4, "images_per_class": 2, "epochs": 2, "ranks": (1, 2),
    "attention_triplets": 0, "accelerator": "cpu", "workers": 0,
}  # fmt: skip
"""Settings of a run that takes a second or two."""


def striped(root: Path, *, classes: int = 8, each: int = 4, size: int = 40, seed: int = 0) -> Path:
    """Class folders of striped pictures: a class has a direction, all else is random."""
    places = np.arange(size) / size
    for number in range(classes):
        # Directions are dealt so that those of the second half of the classes lie in between.
        angle = np.pi * ((number * 2) % classes + (number * 2 >= classes)) / classes
        folder = root / f"class{number:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(each):
            draw = np.random.default_rng((seed, number, index))
            turned = np.cos(angle) * places[None] + np.sin(angle) * places[:, None]
            often = draw.uniform(4, 6)
            wave = np.sin(2 * np.pi * (often * turned + draw.random())) > 0
            dark, light = draw.integers(0, 130, 3), draw.integers(126, 256, 3)
            picture = np.where(wave[..., None], light, dark) + draw.normal(0, 20, (size, size, 3))
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    return root


def state_of(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a model file."""
    return torch.load(path, weights_only=True)["state_dict"]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether both have the same tensors bit for bit."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )
