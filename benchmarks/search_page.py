"""The page of ``search.py``."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from search import Answer, Cost

Found = Mapping[tuple[str, str, int], Sequence[Mapping[str, Sequence["Answer"]]]]
OURS = "the region against positions"
TITLES = {
    "same": (
        "Finding the same thing again",
        "The marked cut-out is in one scene of the gallery, mirrored, in another size and place; "
        "its neighbours in the query are in many.",
    ),
    "category": (
        "Finding a thing of the same kind",
        "Another cut-out of the category is marked, which is nowhere in the gallery. Right is "
        "every scene with one of that category: detection from one example.",
    ),
}


def page(
    options: argparse.Namespace, costs: Mapping[str, Cost], result: Found, pictures: int, kinds: int
) -> str:
    """The page of the documentation."""
    seeds = ", ".join(map(str, options.seeds))
    lines = [
        "# Search, measured",
        "",
        "What explaining a hit costs once the gallery is indexed, and how well a part of a picture",
        "is found by itself ([Search](../search.md)).",
        "",
        f"`python benchmarks/search.py STAMPS --scenes {options.scenes} --queries "
        f"{options.queries} --seeds {' '.join(map(str, options.seeds))} --sizes "
        f"{' '.join(map(str, options.sizes))} --rounds {options.rounds} "
        "--out docs/benchmarks/search.md` makes this page; torch "
        f"{torch.__version__.split('+')[0]}, Python "
        f"{platform.python_version()}, one thread of a processor.",
        f"STAMPS: {pictures} cut-out photographs of {kinds} categories that no choice in this",
        "project was tuned on (`benchmarks/stamps.py` makes the folder; the rule for boxes was",
        "chosen on other ones).",
        "",
        "## What a reason costs",
        "",
        "One comparison by the network is one forward pass of query and hit. From the index come",
        "the maps over both pictures and the contrast with the next class down, of five hits at",
        "once, reading the index included. Rounds take turns; the ratio is the median of theirs.",
        "",
        "| network | one comparison | one hit explained | ratio | difference from `match` |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, one in costs.items():
        lines.append(
            f"| {name}, 224 | {1000 * one.forward:.1f} ms | {1e6 * one.explained:.0f} µs | "
            f"1/{1 / one.ratio:.0f} ({one.rounds} rounds) | {one.worst:.0e} of the map's largest "
            "value |"
        )
    lines += [
        "",
        "Float16 resolves 5e-04 of a number.",
        "",
        "## Part of a picture",
        "",
        f"Galleries of {options.scenes} scenes of 448 x 448 pixels, each with four cut-outs of 110",
        "to 200 pixels on a photographic ground, one in each quarter. The query is another such",
        "scene in which one cut-out is marked by its box. Recall@K: how often a right scene is",
        "among the first K. IoU: of the box made in each right scene with the cut-out there,",
        "wherever the scene was ranked; in brackets the share of boxes with at least 0.5. Mean and",
        f"standard deviation over the seeds {seeds}. *Size* is the network's input (`--size`).",
    ]
    for setting, (title, about) in TITLES.items():
        lines += ["", f"### {title}", "", about, "", *_table(setting, result, options)]
    return "\n".join([*lines, "", *_said(), ""])


def _table(setting: str, result: Found, options: argparse.Namespace) -> list[str]:
    from search import KS, chance

    rows = [
        "| network, size | what is compared | "
        + " | ".join(f"Recall@{k}" for k in KS)
        + " | IoU (at least 0.5) |",
        "| --- | --- |" + " --- |" * (len(KS) + 1),
    ]
    for (name, kind, size), seeds in result.items():
        if kind != setting:
            continue
        for way in seeds[0]:
            answers = [seed[way] for seed in seeds]
            label = f"**{way}**" if way == OURS else way
            cells = [_recall(answers, k) for k in KS]
            rows.append(f"| {name}, {size} | {label} | {' | '.join(cells)} | {_boxes(answers)} |")
    some = [
        seed[OURS] for (_, kind, _), seeds in result.items() if kind == setting for seed in seeds
    ]
    by_chance = [mean(chance(answers, options.scenes, k) for answers in some) for k in KS]
    counts = sorted({len(answers) for answers in some})
    lines = " and ".join(f"{100 * value:.0f}" for value in by_chance)
    return [
        *rows,
        "",
        f"{'-'.join(map(str, counts))} queries a seed; by chance Recall@1 and @5 are {lines}.",
    ]


def _recall(seeds: Sequence[Sequence[Answer]], k: int) -> str:
    if not seeds[0][0].ranks:
        return "-"
    return _spread([100 * mean(min(a.ranks) <= k for a in answers) for answers in seeds], 0)


def _boxes(seeds: Sequence[Sequence[Answer]]) -> str:
    if not seeds[0][0].overlaps:
        return "-"
    every = [[value for answer in answers for value in answer.overlaps] for answers in seeds]
    good = [100 * mean(value >= 0.5 for value in values) for values in every]
    return f"{_spread([mean(values) for values in every], 2)} ({mean(good):.0f} %)"


def _spread(values: Sequence[float], digits: int) -> str:
    spread = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.{digits}f} ± {spread:.{digits}f}"


def _said() -> list[str]:
    return [
        "- **the whole picture**: what a search without `--region` does; the box is made by the",
        "  same rule from the map of where the hit agrees with the query.",
        "- **the region cut out, embedded anew**: the box is cropped, resized to the network's",
        "  input and compared with whole pictures; costs a second forward pass.",
        "- **the region against whole pictures**: the cosine of what the region's positions add to",
        "  the query's vector, summed, with the vectors of the gallery.",
        "- **the region against positions**: what `--region` does. The cosine of that sum with",
        "  what each position of a gallery picture adds; the best position ranks the picture, and",
        "  the box is the rectangle that gathers most above a threshold 0.4 of the way from the",
        "  map's mean to its maximum.",
        "",
        "Larger inputs have finer grids, 14 x 14 positions at 448 pixels against 7 x 7 at 224, and",
        "show the network the things larger. That is what finds small things; it costs as much",
        "more to index as there are more pixels, and as much more space.",
    ]
