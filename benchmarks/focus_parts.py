"""What each part of ``focus`` is good for: the whole method, and the method without one part.

On the scenes of ``pointing.py``, with the query alone (pair) and with a negative (triplet).

    python benchmarks/focus_parts.py --stamps tuned=FOLDER --mobilenet FILE --out FILE
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faithfulness_networks import Network, networks
from pointing import judged
from reporting import publish
from scenes import Scene, compose_scenes, read_stamps
from torch import Tensor

from simexplain import Comparison, explain
from simexplain.methods.focus import Focus
from simexplain.methods.similarity_cam import SimilarityCAM

CHUNK = 10
WHOLE = Focus()
SETTINGS = ("same", "category")
ARRANGEMENTS = ("triplet", "pair")

VARIANTS: dict[str, tuple[Any, int]] = {
    "focus": (WHOLE, 0),
    "without matching": (replace(WHOLE, matching=0), 0),
    "without the Gaussian": (replace(WHOLE, smoothing=0), 0),
    "without the power": (replace(WHOLE, sharpness=1), 0),
    "evidence flat (contrast 1)": (replace(WHOLE, contrast=1), 0),
    "two layers": (WHOLE, 2),
    "last layer": (WHOLE, 1),
    "similarity_cam cosine, last x mid": (SimilarityCAM(), 2),
}
"""Each: a method, and how many layers it is given, from the last on; 0 for its own choice."""

Scores = Mapping[tuple[str, str, str], np.ndarray]


def measure(network: Network, scenes: Sequence[Scene]) -> Scores:
    """Hit, distractor hit and energy of every scene ``(scenes,3)`` by variant and question."""
    found: dict[tuple[str, str, str], list[np.ndarray]] = {}
    for start in range(0, len(scenes), CHUNK):
        chunk = scenes[start : start + CHUNK]
        network.forget()
        pictures = network.tensors([scene.picture for scene in chunk])
        negatives = network.tensors([scene.negative for scene in chunk])
        for setting in SETTINGS:
            queries = network.tensors([scene.queries[setting] for scene in chunk])
            asked = {
                "triplet": Comparison.triplet(queries, pictures, negatives),
                "pair": Comparison.pair(queries, pictures),
            }
            for arrangement, comparison in asked.items():
                for name in VARIANTS:
                    maps = _maps(network, comparison, name)
                    key = (name, arrangement, setting)
                    found.setdefault(key, []).append(judged(maps, chunk, 1))
    return {key: np.concatenate(parts) for key, parts in found.items()}


def _maps(network: Network, comparison: Comparison, name: str) -> Tensor:
    method, count = VARIANTS[name]
    layers = network.layers[:count] or None
    return explain(network.shared, comparison, method, layers).maps[:, 1]


def table(scores: Scores) -> list[str]:
    """Markdown rows: hit / distractor hit / energy for every question."""
    questions = [(a, s) for a in ARRANGEMENTS for s in SETTINGS]
    lines = [
        "| | " + " | ".join(f"{a}, {s}" for a, s in questions) + " |",
        "| --- |" + " --- |" * len(questions),
    ]
    for name in VARIANTS:
        cells = [scores[(name, *question)].mean(axis=0) for question in questions]
        told = " | ".join(" / ".join(f"{value:.2f}" for value in cell) for cell in cells)
        lines.append(f"| {name} | {told} |")
    return lines


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--stamps", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--mobilenet", type=Path, metavar="FILE", help="see faithfulness.py")
    parser.add_argument("--scenes", type=int, default=100, help="for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, metavar="FILE", help="Markdown file to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes the page; prints it where no file is named."""
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    found: dict[str, list[Scores]] = {}
    for network in networks(options.mobilenet):
        for given in options.stamps:
            name, _, folder = given.partition("=")
            stamps = read_stamps(Path(folder))
            for seed in options.seeds:
                scenes = compose_scenes(stamps, options.scenes, seed)
                found.setdefault(name, []).append(measure(network, scenes))
                print(f"{network.name}, {name}, seed {seed}: measured", flush=True)
    seeds = " ".join(map(str, options.seeds))
    folders = " ".join(f"--stamps {given.partition('=')[0]}=FOLDER" for given in options.stamps)
    mobilenet = " --mobilenet FILE" if options.mobilenet else ""
    lines = [
        "Hit / distractor hit / energy inside, as on [Which map is right?](faithfulness.md): means "
        f"over {'both networks' if options.mobilenet else 'Lite0'} and "
        f"{options.scenes * len(options.seeds)} scenes each. Written by",
        "",
        f"    python benchmarks/focus_parts.py {folders}{mobilenet} --scenes {options.scenes} "
        f"--seeds {seeds} --out docs/benchmarks/focus_parts.md",
    ]
    for name, parts in found.items():
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        lines += ["", f"**{name}**", "", *table(joined)]
    publish("\n".join(["# The parts of focus", "", *lines, ""]), options.out)


if __name__ == "__main__":
    main()
