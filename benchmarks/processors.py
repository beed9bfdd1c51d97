"""How far numbers differ between processors and numbers of threads, method by method.

Each setting of ``tests/portable.py`` computes the same explanations in a process of its own; the
table has the largest difference from this processor's own kernels, as a share of a map's maximum.

    python benchmarks/processors.py --out docs/benchmarks/processors.md
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from portable import SETTINGS

NETWORKS = ("resnet18", "mobilenetv3_small_100", "tf_efficientnet_lite0", "vit_tiny_patch16_224")
SIDE = {"vit_tiny_patch16_224": 224}
PACKAGED = "tf_efficientnet_lite0"
"""The network whose pretrained weights come in a package; the others are random."""
METHODS = ("sam", "focus", "similarity_cam", "decomposition", "saliency", "occlusion")
OPTIONS = {"occlusion": {"window": 0.5, "stride": 0.5}}
HEAD = """# Numbers on other processors

How far results differ when the same pictures (six triplets of smooth noise) are explained with the
kernels of other processors or with another number of threads: the largest difference from this
processor's own kernels with two threads. Embeddings: of unit rows. Maps: as a share of the largest
value of all maps. Written by `python benchmarks/processors.py`, on a processor whose own kernels
are {own}. {weights}

"""


def compute(path: Path, names: Sequence[str]) -> None:
    """Writes embeddings and maps of every network and method to a file."""
    from simexplain import Comparison, as_similarity_model, explain, load_model

    actual = {}
    for name in names:
        torch.manual_seed(0)
        side = SIDE.get(name, 128)
        model = load_model(f"timm:{name}", weights=None if name == PACKAGED else "random")
        model = as_similarity_model(model)
        coarse = torch.rand(18, 3, 6, 6, generator=torch.Generator().manual_seed(1))
        images = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
        triplets = Comparison.triplet(*images.view(3, 6, 3, side, side))
        for method in METHODS:
            result = explain(model, triplets, method, **OPTIONS.get(method, {}), check=False)
            actual[f"{name}/{method}"] = result.maps
        actual[f"{name}/embeddings"] = result.embeddings
    torch.save(actual, path)


def measure(names: Sequence[str], settings: Sequence[str]) -> list[tuple[str, str, list[float]]]:
    """For each network and quantity the largest difference in every setting but the first."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for setting in settings:
            path = Path(folder) / f"{setting}.pt"
            command = [sys.executable, __file__, "--compute", str(path), "--networks", *names]
            subprocess.run(command, check=True, env=os.environ | SETTINGS[setting])
            results.append(torch.load(path, weights_only=True))
    own, *others = results
    return [(*key.split("/"), [apart(value, o[key]) for o in others]) for key, value in own.items()]


def apart(own: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    return float((own - other).abs().max() / own.abs().max())


def page(rows: Sequence[tuple[str, str, list[float]]], settings: Sequence[str]) -> str:
    """The rows as a table in Markdown."""
    weights = f"`{PACKAGED}` has its ImageNet weights, the other networks random ones."
    own = torch.backends.cpu.get_cpu_capability()
    lines = [
        f"| network | what | {' | '.join(settings[1:])} |",
        "| --- " * (1 + len(settings)) + "|",
    ]
    lines += [
        f"| {name} | {what} | {' | '.join(f'{value:.0e}' for value in values)} |"
        for name, what, values in rows
    ]
    return HEAD.format(own=own, weights=weights) + "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the page and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--compute", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(arguments)
    if chosen.compute:
        compute(chosen.compute, chosen.networks)
        return
    text = page(measure(chosen.networks, chosen.settings), chosen.settings)
    print(text)
    if chosen.out:
        chosen.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
