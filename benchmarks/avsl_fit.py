"""How well distances of fitted heads retrieve: classes that were never seen, three seeds.

    python benchmarks/avsl_fit.py FOLDER --out docs/benchmarks/avsl_fit.md

FOLDER has one sub-folder per class. Of the classes in order of their names the first 60 % are
fitted on, the others are searched: every image is a query once, the gallery is all others without
those of the query's own file name (for emoji, its own vendor: drawings of one hand look alike).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from held_out import TRAINED
from torch import Tensor

from simexplain import SimilarityModel, load_model
from simexplain.data.folders import Batches, Record, pictures_in
from simexplain.fitting.posthoc import FeaturePasses, PostHoc
from simexplain.models.avsl import AVSL
from simexplain.models.backbones import DEFAULT_MODEL

CUTS = (1, 2, 4, 8)
BUDGET = 4 << 30


@dataclass(frozen=True)
class Split:
    """Images to search.

    Attributes:
        labels: Class numbers ``(M,)``.
        groups: Numbers of the file names ``(M,)``.
        passes: Their feature maps.
    """

    labels: Tensor
    groups: Tensor
    passes: FeaturePasses

    def recall(self, distance: Tensor) -> list[float]:
        """Recall@K for every K in :data:`CUTS`, from distances ``(M,M)``."""
        kept = distance.masked_fill(self.groups[:, None] == self.groups[None], torch.inf)
        nearest = kept.topk(min(max(CUTS), len(kept)), dim=1, largest=False).indices
        right = self.labels[nearest] == self.labels[:, None]
        return [float(right[:, :cut].any(dim=1).float().mean()) for cut in CUTS]


def numbered(names: list[str]) -> Tensor:
    """Equal names as equal numbers."""
    known = {name: number for number, name in enumerate(sorted(set(names)))}
    return torch.tensor([known[name] for name in names])


def passes_over(model: SimilarityModel, records: list[Record], size: int) -> FeaturePasses:
    """Feature maps of the last three stages, kept in memory up to 4 GiB."""
    prepare = replace(model.preprocess, size=(size, size))
    levels = model.stages[-3:]
    batches = Batches(records, prepare, 32)
    return FeaturePasses(model, batches, levels, budget=BUDGET, progress=lambda *_: None)


def plain_distance(model: SimilarityModel, split: Split) -> Tensor:
    """The network's own distance: its pooled last map, which is its embedding."""
    rows = torch.cat([maps[-1].mean(dim=(2, 3)) for _, maps in split.passes("embedding")])
    return model.distance(*[torch.nn.functional.normalize(rows, dim=1)] * 2)


@torch.no_grad()
def fitted_distances(avsl: AVSL, split: Split) -> dict[str, Tensor]:
    """Distances of every level alone, of all together without a graph, and of the graph."""
    rows = torch.cat([avsl.rows(maps) for _, maps in split.passes("rows")])
    levels = avsl.level_distances(rows, rows)
    named = {f"level {n} ({name})": levels[n] for n, name in enumerate(avsl.levels)}
    named["all levels added"] = levels.sum(dim=0)
    named["AVSL"] = avsl.distance(rows, rows)
    return named


def settings(args: argparse.Namespace) -> list[tuple[str, PostHoc, bool]]:
    """Every way of fitting with its name, and whether it uses labels."""
    result = [
        (f"labelled, {preset}", PostHoc(nodes=args.nodes, preset=preset, seed=seed), True)
        for preset in ("paper", "official")
        for seed in range(args.seeds)
    ]
    return [*result, ("unlabelled, paper", PostHoc(nodes=args.nodes), False)]


def measured(args: argparse.Namespace) -> dict[tuple[str, str], list[list[float]]]:
    """For each way of fitting and each distance its recalls, seed by seed."""
    model = load_model(DEFAULT_MODEL)
    records = pictures_in(args.folder, labelled=True)
    names = sorted({record.label or "" for record in records})[: args.classes]
    seen = set(names[: round(TRAINED * len(names))])
    train = [record for record in records if record.label in seen]
    test = [record for record in records if record.label in set(names) - seen]
    split = Split(
        numbered([record.label or "" for record in test]),
        numbered([record.path.stem for record in test]),
        passes_over(model, test, args.size),
    )
    result = {("the network itself", "its own"): [split.recall(plain_distance(model, split))]}
    reading = passes_over(model, train, args.size)
    for name, way, labelled in settings(args):
        start = time.perf_counter()
        avsl = way.over(reading, labelled=labelled)
        for which, distance in fitted_distances(avsl, split).items():
            result.setdefault((name, which), []).append(split.recall(distance))
        print(f"{name}, seed {way.seed}: {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{len(train)} images of {len(seen)} classes, {len(test)} queries")
    return result


def page(args: argparse.Namespace, result: dict[tuple[str, str], list[list[float]]]) -> str:
    """The page of the documentation."""
    lines = [
        "# Retrieval with fitted heads",
        "",
        "Does the distance that `attribute` takes apart also find the right images? Heads were",
        "fitted to the frozen EfficientNet-Lite0 on some classes and searched on others; see the",
        f"script for the protocol. {args.note} {args.size} pixels, {args.nodes} nodes a level.",
        "Mean over seeds, with the standard deviation where there are several.",
        "",
        f"`python benchmarks/avsl_fit.py FOLDER --size {args.size} --nodes {args.nodes}`, "
        f"torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}.",
        "",
        "| fitted | distance | " + " | ".join(f"Recall@{cut}" for cut in CUTS) + " |",
        "| --- | --- |" + " --- |" * len(CUTS),
    ]
    for (name, which), seeds in result.items():
        cells = []
        for values in zip(*seeds, strict=True):
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {name} | {which} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="one sub-folder of pictures per class")
    parser.add_argument("--size", type=int, default=224, help="side of the network's input")
    parser.add_argument("--nodes", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--classes", type=int, default=None, help="use only the first ones")
    parser.add_argument("--note", default="", help="a sentence about the data, for the page")
    parser.add_argument("--out", type=Path, help="write the page here")
    args = parser.parse_args()
    text = page(args, measured(args))
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
