"""What distances of all pairs by the AVSL graph cost, beside the published formulation.

The images are random: clustered unit rows on three levels. All methods take turns in one run with
one thread, and each is divided by the published formulation of its own round, so that other work
on the machine slows both sides of a ratio. Peak memory is measured in a process of its own.

    python benchmarks/avsl_distance.py --rounds 3 --out docs/benchmarks/avsl_distance.md
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from store import added_memory, publish
from torch import Tensor
from torch.nn import functional as F

from simexplain.graph.distances import Expansion
from simexplain.graph.inference import Graph, Rows, normalised_edges
from simexplain.graph.neighbours import Neighbours, Surrogate, neighbours
from simexplain.graph.tiled import exact

LEVELS = 3
NEAREST = (1, 8, 32)
EXPANDED = {"initial": (1, 1), "hard": (2, 2)}  # degrees and ranks of the expansions
REGIMES = tuple(EXPANDED)
PUBLISHED, EXACT, MIRRORED = "published", "exact, tiled", "exact, tiled, mirrored"
MATRIX, NEIGHBOURS, WITH_FAISS = "expansion", "nearest neighbours", "nearest neighbours, faiss"
CHECKED = 48


@dataclass(frozen=True)
class Setting:
    """What is measured: images, nodes a level, edges a node, coefficients."""

    images: int
    nodes: int
    edges: int
    regime: str


def data(setting: Setting, seed: int = 0) -> tuple[Graph, Rows, Tensor]:
    """A graph, images of five a category, and their labels ``(M,)``.

    Lower levels say less about the category and have more in common. Certainties lie in [0.005,
    0.05] and vary by node, by image and at random. Coefficients: ``initial``, those of a new model
    slightly disturbed; ``hard``, of either sign and up to some forty times as large.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    labels = torch.arange(setting.images) // 5
    embeddings, certainties = [], []
    for spread, common in ((1.6, 2.5), (1.3, 1.2), (1.0, 0.3)):
        centres = normal(int(labels.max()) + 1, setting.nodes)[labels]
        noise = spread * normal(setting.images, setting.nodes)
        embeddings.append(F.normalize(common * normal(1, setting.nodes) + centres + noise))
        by_node, by_image = 0.35 * normal(1, setting.nodes), 0.25 * normal(setting.images, 1)
        level = by_node + by_image + 0.25 * normal(setting.images, setting.nodes)
        certainties.append((0.017 * level.exp()).clamp(0.005, 0.05))
    edges, slopes, offsets = [], [], []
    for _ in range(LEVELS - 1):
        strength = 0.5 * torch.rand(setting.nodes, 1, generator=generator)
        raw = strength + torch.rand(setting.nodes, setting.nodes, generator=generator)
        edges.append(normalised_edges(raw, setting.edges, ties="first", epsilon=1e-8))
        if setting.regime == "initial":
            alpha, beta = 1 + 0.1 * normal(setting.nodes), 0.01 * normal(setting.nodes)
        else:
            alpha, beta = 20 * normal(setting.nodes), 0.1 * normal(setting.nodes)
        slopes.append(10 * alpha)  # the published code multiplies both by 10 in the sigmoid
        offsets.append(10 * beta)
    graph = Graph(tuple(edges), tuple(slopes), tuple(offsets), setting.nodes)
    return graph, Rows(tuple(embeddings), tuple(certainties)), labels


def published(graph: Graph, q: Rows, g: Rows) -> Tensor:
    """Equations 1, 5, 6 and 8 of the paper on tensors ``(Q,G,r)``, as they stand."""
    hat = None
    for level in range(LEVELS):
        own, other = q.embeddings[level].unsqueeze(1), g.embeddings[level].unsqueeze(0)
        delta = (own - other).abs().pow(2)
        if hat is None:
            hat = delta
            continue
        eta = q.certainties[level].unsqueeze(1) * g.certainties[level].unsqueeze(0)
        p = torch.sigmoid(graph.slopes[level - 1] * eta + graph.offsets[level - 1])
        hat = p * delta + (1 - p) * torch.matmul(hat, graph.edges[level - 1])
    return hat.sum(dim=-1)


def expanded(graph: Graph, rows: Rows, regime: str) -> Expansion:
    """The expansion that is measured."""
    degree, rank = EXPANDED[regime]
    return Expansion.build(graph, rows, None, degree, rank)


def faiss_index(graph: Graph, rows: Rows) -> object | None:
    """A flat index of one thread over the surrogate vectors; None without faiss."""
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(1)
    vectors = Surrogate.build(graph, rows).vectors(rows).numpy()
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(vectors)
    return index


def methods(graph: Graph, rows: Rows, regime: str) -> dict[str, tuple[Callable[[], object], float]]:
    """Each method with what its time has to be multiplied by for all ordered pairs."""
    images = len(rows)
    height = max(1, images // 100)
    some, scale = rows[:height], images / height
    most = min(NEAREST[-1], images - 1)
    result: dict[str, tuple[Callable[[], object], float]] = {
        PUBLISHED: (lambda: published(graph, some, rows), scale),
        EXACT: (lambda: exact(graph, some, rows), scale),
    }
    if images <= 1000:
        result[MIRRORED] = (lambda: exact(graph, rows), 1.0)
    result[MATRIX] = (lambda: expanded(graph, rows, regime).matrix(), 1.0)
    result[NEIGHBOURS] = (lambda: neighbours(graph, rows, None, most, exclude_self=True), 1.0)
    if faiss_index(graph, rows[:2]) is not None:
        result[WITH_FAISS] = (
            lambda: neighbours(
                graph, rows, None, most, exclude_self=True, index=faiss_index(graph, rows)
            ),
            1.0,
        )
    return result


def product_seconds(nodes: int) -> float:
    """Seconds of the matrix products that one pair needs, at the rate of large ones."""
    left, right = torch.rand(1024, nodes), torch.rand(nodes, nodes)
    out = torch.empty(1024, nodes)
    start = time.perf_counter()
    for _ in range(40):
        torch.mm(left, right, out=out)
    return (time.perf_counter() - start) / 40 / 1024 * (LEVELS - 1)


@dataclass(frozen=True)
class Row:
    """One line of the table of times."""

    setting: Setting
    name: str
    seconds: float
    ratios: list[float]
    limits: list[float]
    peak: float | None
    error: float | None


def timed(setting: Setting, rounds: int) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds for all ordered pairs in each round, and of the products alone; all take turns."""
    graph, rows, _ = data(setting)
    runs = methods(graph, rows, setting.regime)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    least: list[float] = []
    runs[PUBLISHED][0]()
    product_seconds(setting.nodes)
    for _ in range(rounds):
        least.append(product_seconds(setting.nodes) * setting.images**2)
        for name, (run, scale) in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - start) * scale)
    return seconds, least


def errors(setting: Setting) -> dict[str, float]:
    """Largest differences to float64: of single distances relatively, else of the mean."""
    graph, rows, _ = data(setting)
    some = rows[torch.linspace(0, setting.images - 1, CHECKED).long()]
    double = torch.zeros(0, dtype=torch.float64)
    true = exact(graph.to(double), some.to(double), rows.to(double))
    far = true > 0
    result = {EXACT: (exact(graph, some, rows) - true).abs()[far].div(true[far]).max().item()}
    slices = [published(graph, some[n : n + 1], rows) for n in range(len(some))]
    result[PUBLISHED] = (torch.cat(slices) - true).abs()[far].div(true[far]).max().item()
    expansion = expanded(graph, rows, setting.regime)
    where = torch.linspace(0, setting.images - 1, CHECKED).long().tolist()
    parts = torch.cat([expansion.rows(slice(n, n + 1)) for n in where])
    parts[torch.arange(CHECKED), where] = 0  # as in the whole matrix
    result[MATRIX] = float((parts - true).abs().max() / true.mean())
    return result


@dataclass(frozen=True)
class Agreement:
    """How nearest neighbours compare with all distances in float64, for one K."""

    setting: Setting
    k: int
    same_sets: float
    recalls: tuple[float, float]
    mean_exact: float
    most_exact: int
    least_margin: float


def agreements(setting: Setting) -> list[Agreement]:
    """For each K, over sampled queries."""
    graph, rows, labels = data(setting)
    where = torch.linspace(0, setting.images - 1, CHECKED).long()
    double = torch.zeros(0, dtype=torch.float64)
    true = exact(graph.to(double), rows[where].to(double), rows.to(double))
    true[torch.arange(len(where)), where] = torch.inf
    actual = []
    for k in NEAREST:
        expected = true.topk(k, dim=1, largest=False).indices
        # The image itself is the nearest of all; one more is asked for, and it left out.
        result: Neighbours = neighbours(graph, rows[where], rows, k + 1)
        others = result.indices[result.indices != where.unsqueeze(1)].view(len(where), k)
        same = (others.sort(dim=1).values == expected.sort(dim=1).values).all(dim=1)
        recalls = [
            (labels[chosen] == labels[where].unsqueeze(1)).any(dim=1).float().mean().item()
            for chosen in (others, expected)
        ]
        actual.append(
            Agreement(
                setting, k, same.float().mean().item(), (recalls[0], recalls[1]),
                result.reranked.float().mean().item(), int(result.reranked.max()),
                result.margins.min().item(),
            )
        )  # fmt: skip
    return actual


def peak_memory(setting: Setting, name: str) -> float | None:
    """MiB that one call adds to the resident set, in a fresh process; None if not told."""
    torch.set_num_threads(1)
    graph, rows, _ = data(setting)
    small, few, _ = data(Setting(64, setting.nodes, setting.edges, setting.regime))
    published(small, few, few)  # libraries and their threads are no cost of a call,
    faiss_index(small, few)  # but the buffers of a method are
    run = methods(graph, rows, setting.regime)[name][0]
    return added_memory(run)


def measure(setting: Setting, rounds: int, *, memory: bool) -> list[Row]:
    """All methods on one set of images."""
    seconds, least = timed(setting, rounds)
    apart = errors(setting)
    peaks: dict[str, float | None] = {}
    if memory:
        context = multiprocessing.get_context("spawn")  # a fork would share what is loaded here
        for name in seconds:
            with context.Pool(1) as pool:
                peaks[name] = pool.apply(peak_memory, (setting, name))
    return [
        Row(
            setting,
            name,
            median(took),
            [base / own for own, base in zip(took, seconds[PUBLISHED], strict=True)],
            [own / limit for own, limit in zip(took, least, strict=True)],
            peaks.get(name),
            apart.get(name),
        )
        for name, took in seconds.items()
    ]


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


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 4000, 5924], metavar="N")
    parser.add_argument("--rounds", type=int, default=3, help="how often each method is timed")
    parser.add_argument("--nodes", type=int, default=512, help="nodes of each of three levels")
    parser.add_argument("--edges", type=int, default=128, help="edges kept of each node")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--out", type=Path, metavar="FILE", help="Markdown file to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes the page; prints it where no file is named."""
    options = parsed(arguments)
    torch.set_num_threads(1)
    busy = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    rows: list[Row] = []
    agreed: list[Agreement] = []
    for images in options.sizes:
        for regime in REGIMES:
            setting = Setting(images, options.nodes, options.edges, regime)
            largest = images == max(options.sizes)
            rows += measure(setting, options.rounds, memory=largest and not options.no_memory)
            agreed += agreements(setting)
            print(f"{images} images, {regime}: done", flush=True)
    text = page(options, busy, rows, agreed)
    publish(text, options.out)


if __name__ == "__main__":
    main()
