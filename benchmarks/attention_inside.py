"""How much of attention lies on the drawn object, for a trained network and several layers.

    python benchmarks/attention_inside.py MODEL FOLDER --layers bn2 bn2,blocks.4

FOLDER has a class in each sub-folder of pictures whose transparency is the mask of the object, as
the emoji of ``training_results.py``; triplets are drawn from its held-out classes. Attention that
knows nothing of the object has a share of energy inside that equals the share of pixels.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from held_out import held_out
from PIL import Image

from simexplain import Comparison, explain, load_model
from simexplain.data.folders import Record
from simexplain.data.images import read_picture
from simexplain.data.preprocessing import prepared
from simexplain.models.base import SimilarityModel


def triplets(records: tuple[Record, ...], count: int, seed: int) -> list[list[Record]]:
    """Two pictures of a class and one of another, ``count`` times."""
    classes: dict[str, list[Record]] = {}
    for record in records:
        classes.setdefault(record.label, []).append(record)
    drawn, result = random.Random(seed), []
    several = [label for label in classes if len(classes[label]) > 1]
    for _ in range(count):
        same, other = drawn.sample(several, 2)
        result.append([*drawn.sample(classes[same], 2), drawn.choice(classes[other])])
    return result


def with_mask(model: SimilarityModel, record: Record) -> tuple[torch.Tensor, np.ndarray]:
    """A preprocessed picture ``(3,H,W)`` and where its object is ``(H,W)``."""
    images, geometries = prepared(model.preprocess, [read_picture(record.path)])
    alpha = np.asarray(Image.open(record.path).convert("RGBA"))[..., 3] > 127
    return images[0], geometries[0].from_original(alpha)


def main() -> None:
    """Prints a line for each rule of weights and each choice of layers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", nargs="+", default=["bn2", "bn2,blocks.4"])
    parser.add_argument("--weights", nargs="+", default=["paper", "signed"])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = load_model(args.model)
    parts = [
        [with_mask(model, record) for record in triplet]
        for triplet in triplets(held_out(args.folder), args.count, args.seed)
    ]
    stacks = [torch.stack([triplet[index][0] for triplet in parts]) for index in range(3)]
    masks = np.stack([[mask for _, mask in triplet] for triplet in parts])
    for weights in args.weights:
        for layer in args.layers:
            result = explain(
                model, Comparison.triplet(*stacks), layer=layer.split(","), weights=weights,
                check=False,
            )  # fmt: skip
            maps = result.heatmaps.numpy()
            inside = (maps * masks).sum((2, 3)) / np.maximum(maps.sum((2, 3)), 1e-9)
            peaks = np.take_along_axis(
                masks.reshape(*masks.shape[:2], -1),
                maps.reshape(*maps.shape[:2], -1).argmax(-1)[..., None],
                -1,
            )
            print(
                f"{weights}, {layer}: energy inside {inside.mean():.3f}, peak inside "
                f"{peaks.mean():.3f}, object's share of pixels {masks.mean():.3f}"
            )


if __name__ == "__main__":
    main()
