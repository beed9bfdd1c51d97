"""What each part of ``focus`` is good for: the whole method, and the method without one part.

On the scenes of ``pointing.py``, with the query alone (pair) and with a negative (triplet).

    python benchmarks/focus_parts.py --stamps tuned=FOLDER --mobilenet FILE --out FILE

With ``--model`` other networks are measured, each in a table of its own, such as one that was
trained for retrieval on the first classes of a folder, on scenes of its other classes:

    python benchmarks/focus_parts.py --stamps emoji=FOLDER --after 0.6 --model trained=model.pt \
        --model 'as it comes=timm:tf_efficientnet_lite0' --out FILE
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faithfulness_networks import Network, networks
from pointing import judged
from scenes import SIDE, Scene, compose_scenes, divided, read_stamps
from store import publish
from torch import Tensor

from simexplain import Comparison, explain, load_model
from simexplain.methods.cams import SimilarityCAM
from simexplain.methods.focus import Focus

CHUNK = 10
WHOLE = Focus()
SETTINGS = ("same", "category")
ARRANGEMENTS = ("triplet", "pair")

VARIANTS: dict[str, tuple[Any, int]] = {
    "focus": (WHOLE, 0),
    "without matching": (replace(WHOLE, matching=0), 0),
    "without the Gaussian": (replace(WHOLE, smoothing=0), 0),
    "smooth alone (detail 0, peak 3)": (replace(WHOLE, detail=0, peak=3), 0),
    "without powers (peak 1, sharpness 1)": (replace(WHOLE, peak=1, sharpness=1), 0),
    "evidence flat (contrast 1)": (replace(WHOLE, contrast=1), 0),
    "two layers": (WHOLE, 2),
    "last layer": (WHOLE, 1),
    "similarity_cam cosine, last x mid": (SimilarityCAM(), 2),
}
"""Each: a method, and how many layers it is given, from the last on; 0 for its own choice."""

Scores = Mapping[tuple[str, str, str], np.ndarray]


def measure(network: Network, scenes: Sequence[Scene]) -> Scores:
    """Hit, distractor hit and energy of every scene ``(scenes,3)`` by variant and question."""
    result: dict[tuple[str, str, str], list[np.ndarray]] = {}
    for start in range(0, len(scenes), CHUNK):
        chunk = scenes[start : start + CHUNK]
        network.forget()
        pictures = network.tensors([scene.picture for scene in chunk])
        negatives = network.tensors([scene.negative for scene in chunk])
        for setting in SETTINGS:
            queries = network.tensors([scene.queries[setting] for scene in chunk])
            requested = {
                "triplet": Comparison.triplet(queries, pictures, negatives),
                "pair": Comparison.pair(queries, pictures),
            }
            for arrangement, comparison in requested.items():
                for name in VARIANTS:
                    maps = _maps(network, comparison, name)
                    key = (name, arrangement, setting)
                    result.setdefault(key, []).append(judged(maps, chunk, 1))
    return {key: np.concatenate(parts) for key, parts in result.items()}


def _maps(network: Network, comparison: Comparison, name: str) -> Tensor:
    method, count = VARIANTS[name]
    layers = network.layers[:count] or None
    return explain(network.shared, comparison, method, layers, check=False).maps[:, 1]


def table(scores: Scores) -> list[str]:
    """Markdown rows: hit / distractor hit / energy for every question."""
    questions = [(a, s) for a in ARRANGEMENTS for s in SETTINGS]
    lines = [
        "| | " + " | ".join(f"{a}, {s}" for a, s in questions) + " |",
        "| --- |" + " --- |" * len(questions),
    ]
    for name in VARIANTS:
        cells = [scores[(name, *question)].mean(axis=0) for question in questions]
        printed = " | ".join(" / ".join(f"{value:.2f}" for value in cell) for cell in cells)
        lines.append(f"| {name} | {printed} |")
    return lines


def chosen_networks(options: argparse.Namespace) -> Iterator[Network]:
    """Those that are named, at the size of the scenes, or the two of ``faithfulness.py``."""
    if not options.model:
        yield from networks(options.mobilenet)
    for given in options.model:
        name, _, source = given.partition("=")
        yield Network.of(name, load_model(source, size=(SIDE, SIDE)))


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--stamps", action="append", required=True, metavar="NAME=FOLDER")
    add("--after", type=float, default=0.0, help="leave out this share of the categories")
    add("--mobilenet", type=Path, metavar="FILE", help="see faithfulness.py")
    add("--model", action="append", default=[], metavar="NAME=SOURCE", help="as load_model has it")
    add("--scenes", type=int, default=100, help="for each seed")
    add("--seeds", type=int, nargs="+", default=[3])
    add("--threads", type=int, default=torch.get_num_threads())
    add("--out", type=Path, metavar="FILE", help="Markdown file to write")
    return parser.parse_args(arguments)


def told(options: argparse.Namespace) -> list[str]:
    """What the page measures, and the command that writes it."""
    folders = [f"--stamps {given.partition('=')[0]}=FOLDER" for given in options.stamps]
    folders += [f"--after {options.after:g}"] if options.after else []
    folders += ["--mobilenet FILE"] if options.mobilenet and not options.model else []
    folders += [f"--model '{given.partition('=')[0]}=SOURCE'" for given in options.model]
    nets = "both networks" if options.mobilenet else "Lite0"
    over = "each network" if options.model else f"means over {nets}"
    return [
        "Hit / distractor hit / energy inside, as on [Which map is right?](faithfulness.md): "
        f"{over}, {options.scenes * len(options.seeds)} scenes each. Written by",
        "",
        f"    python benchmarks/focus_parts.py {' '.join(folders)} --scenes {options.scenes} "
        f"--seeds {' '.join(map(str, options.seeds))} --out FILE",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes the page; prints it where no file is named."""
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    result: dict[str, list[Scores]] = {}
    for network in chosen_networks(options):
        for given in options.stamps:
            name, _, folder = given.partition("=")
            stamps = divided(read_stamps(Path(folder)), options.after)[1]
            title = f"{name}, {network.name}" if options.model else name
            for seed in options.seeds:
                scenes = compose_scenes(stamps, options.scenes, seed)
                result.setdefault(title, []).append(measure(network, scenes))
                print(f"{network.name}, {name}, seed {seed}: measured", flush=True)
    lines = told(options)
    for name, parts in result.items():
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        lines += ["", f"**{name}**", "", *table(joined)]
    publish("\n".join(["# The parts of focus", "", *lines, ""]), options.out)


if __name__ == "__main__":
    main()
