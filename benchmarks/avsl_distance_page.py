"""The page of the AVSL distance benchmark, from what was measured."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

PRODUCTS = 60_502
"""Test images of Stanford Online Products, the largest set of the paper."""


def page(options: argparse.Namespace, busy: str, rows: Sequence[Any], agreed: Sequence[Any]) -> str:
    """The whole Markdown page."""
    sizes = " ".join(map(str, options.sizes))
    arguments = f"--sizes {sizes} --nodes {options.nodes} --edges {options.edges}"
    lines = [
        "# AVSL distances of all pairs",
        "",
        f"Three levels of {options.nodes} nodes, {options.edges} edges a node, random clustered "
        "images. Written by",
        "",
        f"    python benchmarks/avsl_distance.py {arguments} --rounds {options.rounds} --out FILE",
        "",
        f"{machine()} Load of the machine when the run began: {busy}. The methods took turns in "
        f"{options.rounds} rounds, and every ratio is within its round.",
        "",
        *targets(rows, agreed),
        "",
        "## Time and memory",
        "",
        "*published*: equations 1, 5, 6 and 8 on tensors of rows x all columns x nodes, a "
        "hundredth of the rows at a time. It and *exact, tiled* are timed on one such slice a "
        "round and multiplied by their number. *Mirrored* computes each pair of the set with "
        "itself once. *expansion* is the whole matrix with its set-up; *nearest neighbours* are "
        "32 for each image among all others, proven, with set-up; *faiss* includes building its "
        "index. *Limit* is the time of the two matrix products each pair needs, at the rate of "
        "large products in the same round. *Error* is against float64: relative for exact "
        "distances, relative to the mean distance for expansions. *Peak* is what one call adds "
        "to the resident memory of a fresh process, results included; a few MiB that making the "
        "data has freed are used again and not counted.",
        "",
        *times(rows),
        "",
        "## Nearest neighbours against all distances",
        "",
        "Sampled queries against distances to all images in float64. *Sets*: queries whose K "
        "nearest are the same. *Computed*: exact distances a query, mean (most).",
        "",
        *sets(agreed),
        "",
        "## Larger sets",
        "",
        *extrapolated(rows),
        "",
        "## Notes",
        "",
        "Coefficients *initial* are those of a new model, slightly disturbed; *hard* ones are "
        "drawn far larger and of either sign, so that reliabilities range over most of (0, 1) "
        "and vary more between pairs. Their expansion has degree 2 and rank 2, that of initial "
        "ones degree 1 and rank 1. An expansion to first order cannot be made as accurate "
        "for hard ones by raising degree and rank, and `distances` falls back to exact ones where "
        "the accuracy asked for is not met. faiss finds the short list alone; since any index may "
        "be approximate, its result is proven by bounds for every query, which without it most "
        "queries can do without.",
        "",
        "The published slices grow with the set. At 1000 images a tensor has 20 MiB and memory "
        "is used again; from 4000 on it has hundreds, fresh from the system each time, which "
        "costs more than the arithmetic. Against slices of the size of a cache the ratios of "
        "the larger sets would be about half or a third as large.",
        "",
    ]
    return "\n".join(lines)


def machine() -> str:
    """The machine in one sentence."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    software = [f"{name} {_version(name)}" for name in ("torch", "faiss-cpu", "simexplain")]
    return (
        f"CPU ({platform.machine()}), {cores} cores, one thread. "
        f"Python {platform.python_version()}, {', '.join(software)}."
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _spread(values: Sequence[float], digits: str) -> str:
    return f"{median(values):{digits}} [{min(values):{digits}}..{max(values):{digits}}]"


def times(rows: Sequence[Any]) -> list[str]:
    """The table of times."""
    lines = [
        "| images | coefficients | method | seconds | times faster than published: median "
        "[min..max] | time / limit | peak MiB | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        peak = "–" if row.peak is None else f"{row.peak:.0f}"
        error = "–" if row.error is None else f"{row.error:.1e}"
        limit = f"{median(row.limits):.3g}"
        lines.append(
            f"| {row.setting.images} | {row.setting.regime} | {row.name} | {row.seconds:.3g} "
            f"| {_spread(row.ratios, '.1f')} | {limit} | {peak} | {error} |"
        )
    return lines


def sets(agreed: Sequence[Any]) -> list[str]:
    """The table of agreements."""
    lines = [
        "| images | coefficients | K | sets | Recall@K | computed | least margin |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in agreed:
        own, other = result.recalls
        recall = "equal" if own == other else f"{own:.4f}, not {other:.4f}"
        lines.append(
            f"| {result.setting.images} | {result.setting.regime} | {result.k} "
            f"| {100 * result.same_sets:.4g} % | {recall} "
            f"| {result.mean_exact:.0f} ({result.most_exact}) | {result.least_margin:.1e} |"
        )
    return lines


def targets(rows: Sequence[Any], agreed: Sequence[Any]) -> list[str]:
    """What was wanted beside what was measured, on the largest set."""
    largest = max(row.setting.images for row in rows)
    result = {(row.setting.regime, row.name): row for row in rows if row.setting.images == largest}
    exact = [row for (_, name), row in result.items() if name == "exact, tiled"]
    lines = ["| target | measured | |", "| --- | --- | --- |"]

    def printed(text: str, value: float, kept: bool, digits: str = ".3g") -> None:
        lines.append(f"| {text} | {value:{digits}} | {'kept' if kept else 'missed'} |")

    faster = min(median(row.ratios) for row in exact)
    printed("exact distances: at least 2 times faster than published", faster, faster >= 2)
    limit = max(median(row.limits) for row in exact)
    printed("exact distances: at most 1.3 times the time of their products", limit, limit <= 1.3)
    error = max(row.error for row in exact)
    printed("exact distances: relative error below 1e-6", error, error < 1e-6, ".1e")
    row = result["initial", "expansion"]
    ratio = median(row.ratios)
    printed("whole matrix within 1e-5, initial: at least 100 times faster", ratio, ratio >= 100)
    printed(
        "whole matrix, initial: error at most 1e-5 of the mean", row.error, row.error <= 1e-5, ".1e"
    )
    for regime, least in (("initial", 40), ("hard", 20)):
        ratio = median(result[regime, "nearest neighbours"].ratios)
        text = f"nearest neighbours, {regime}: at least {least} times faster"
        printed(text, ratio, ratio >= least)
    same = min(a.same_sets for a in agreed)
    printed("nearest neighbours: share of queries with identical sets", same, same == 1)
    return lines


def extrapolated(rows: Sequence[Any]) -> list[str]:
    """What a set of the size of Stanford Online Products would take."""
    largest = max(row.setting.images for row in rows)
    factor = (PRODUCTS / largest) ** 2
    lines = [
        f"Extrapolated to {PRODUCTS:,} images, not measured: the seconds at {largest} images "
        "times the ratio of the numbers of pairs. For nearest neighbours that is too much, as the "
        "exact distances of a query do not grow with the set.",
        "",
        "| coefficients | method | hours |",
        "| --- | --- | --- |",
    ]
    return lines + [
        f"| {row.setting.regime} | {row.name} | {row.seconds * factor / 3600:.2g} |"
        for row in rows
        if row.setting.images == largest and "mirrored" not in row.name
    ]
