"""The page of ``training_results.py``: tables with means, spreads and paired gains."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from training_results import Row

TITLES = {
    "table1": (
        "Similarity attention, Table 1: siamese, with Grad-CAM's classifier, with SAM",
        "On CUB the paper has 65.9, 64.2, 63.4 and 68.3.",
    ),
    "architectures": (
        "Similarity attention, Table 2 (left): three arrangements with and without mining",
        "On CUB the paper gains 1.8, 1.9 and 1.7 points.",
    ),
    "fill": (
        "Similarity attention: what hidden pixels show",
        "The mask multiplies normalised pixels, so that what is hidden turns grey, also on these "
        "pictures' white ground; with `fill=border` it takes the colour of the picture's border.",
    ),
    "trials": (
        "Similarity attention: what else was tried",
        "Triplets, the first seed alone, whose standard error is 1.6 points of Recall@1. The gain "
        "is over the row without mining before it.",
    ),
    "avsl": (
        "AVSL, Table 1: margin loss and proxy anchor with and without AVSL",
        "On CUB the paper gains 3.2 points with margin and 2.2 with proxy anchor.",
    ),
    "ablation proxy_anchor": (
        "AVSL, Table 2: what each part does",
        "On Cars196 the paper has 87.7 for the baseline, then 89.7 (+ M), 89.9 (+ M & R), 90.6 "
        "(concat) and 91.5 (AVSL). All rows but the first are one training run measured in "
        "different ways: the parts differ in how a distance is inferred.",
    ),
    "ablation margin": ("The same with the margin loss", "Not in the paper."),
    "k proxy_anchor": (
        "AVSL, figure 5a: how many lower nodes stand in for a higher one",
        "One run a seed, trained with k = 32, measured with other k. The gain is over the first.",
    ),
    "k margin": ("The same with the margin loss", "Not in the paper."),
    "width": ("AVSL, figure 5b: the size of the embedding", "Nodes of each level for AVSL."),
    "warmup": (
        "Proxies need a warm-up",
        "Head and proxies alone train in the first epoch, as in all rows above with "
        "ProxyAnchor. Without that, proxies that are still random spoil the network. The gain is "
        "over the row before.",
    ),
}
Found = Mapping[str, Sequence[Mapping[str, Any]]]


def page(
    args: argparse.Namespace, rows: Sequence[Row], results: Found, common: Mapping[str, Any]
) -> str:
    """The page of the documentation."""
    lines = [
        "# Training, measured",
        "",
        "What similarity mining and AVSL do for retrieval at a scale that a processor can train:",
        "EfficientNet-Lite0 with its ImageNet weights at 96 pixels, emoji as pictures (a class is",
        "a code point, drawn by up to five vendors). The first 60 % of the classes are trained on,",
        "the others searched; the query's own vendor is left out of the gallery. Recall@K in %",
        f"after {args.epochs} epochs, mean and standard deviation over the seeds",
        f"{', '.join(map(str, args.seeds))}. *Gain* is the mean difference in Recall@1 to the row",
        "that it is compared with, seed by seed, with its standard error: seeds differ in head,",
        "order and views, but a seed's runs share them.",
        "",
        f"`python benchmarks/training_results.py FOLDER --runs FOLDER --epochs {args.epochs} "
        f"--gamma {args.gamma:g}{told(args.avsl)}`, with `--records` for runs that are known "
        f"already; torch {torch.__version__.split('+')[0]}, "
        f"Python {platform.python_version()}, processor only. Every run is a run of",
        "`simexplain train` with these settings and those of its row: "
        + ", ".join(f"`{name}={value}`" for name, value in common.items())
        + ".",
        "",
    ]
    for table in TITLES:
        chosen = [row for row in rows if table in row.tables and results[row.name]]
        if chosen:
            lines += [*section(table, chosen, results), ""]
    return "\n".join(lines)


def told(avsl: Mapping[str, Any]) -> str:
    """The option that settings of AVSL were given by."""
    return f" --avsl '{json.dumps(dict(avsl))}'" if avsl else ""


def section(table: str, rows: Sequence[Row], results: Found) -> list[str]:
    """A table; the gain is over the plain row before it, or over the first."""
    title, record = TITLES[table]
    cuts = [name for name in results[rows[0].name][0]["last"] if name.startswith("recall@")]
    if table == "trials":
        cuts.append("map_at_r")
    head = [name.replace("recall", "Recall").replace("map_at_r", "MAP@R") for name in cuts]
    lines = [
        f"## {title}",
        "",
        record,
        "",
        f"| row | seeds | {' | '.join(head)} | gain | settings |",
        "| --- |" + " --- |" * (len(cuts) + 3),
    ]
    reference = rows[0]
    for row in rows:
        if starts_anew(table, row.name):
            reference = row
        cells = [spread([100 * seed["last"][cut] for seed in results[row.name]]) for cut in cuts]
        gained = "" if row is reference else gain(results[row.name], results[reference.name])
        shown = {**row.settings, **row.measured}
        options = ", ".join(f"`{name}={value}`" for name, value in shown.items())
        count = len(results[row.name])
        lines.append(f"| {row.name} | {count} | {' | '.join(cells)} | {gained} | {options} |")
    return lines


def starts_anew(table: str, name: str) -> bool:
    """Whether a row is what those after it are compared with."""
    if table == "warmup":
        return "no warm-up" not in name
    return table in ("architectures", "trials", "avsl", "width") and "+" not in name


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def gain(own: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> str:
    """The paired difference in Recall@1 with its standard error, over the seeds of both."""
    known = {one["seed"]: one["last"]["recall@1"] for one in other}
    result = [
        100 * (one["last"]["recall@1"] - known[one["seed"]]) for one in own if one["seed"] in known
    ]
    if not result:
        return ""
    if len(result) == 1:
        return f"{result[0]:+.1f}"
    error = statistics.stdev(result) / len(result) ** 0.5
    return f"{statistics.mean(result):+.1f} ± {error:.1f}"
