"""A batch against a loop of ``explain``: time for each comparison, forward passes, maps.

python benchmarks/batch.py --rows 120 --rounds 3 --out docs/benchmarks/batch.md
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from store import publish

from simexplain import explain, explain_batch, load_model
from simexplain.batching.planning import BatchOptions, BatchRow
from simexplain.explanation import versions
from simexplain.models.base import SimilarityModel

DEMO = Path(__file__).parents[1] / "simexplain" / "data" / "demo"
NETWORK = "timm:tf_efficientnet_lite0"
SHARING = (1, 3, 12)
"""In how many rows a picture is on average."""
METHODS = ("sam", "focus", "decomposition")
TARGET = 4.0


@dataclass(frozen=True)
class Outcome:
    """One method on rows whose pictures are shared so much.

    Attributes:
        method: Its name.
        sharing: Rows that a picture is in, on average.
        rows: How many rows.
        pictures: How many distinct pictures.
        loop: Seconds for a comparison in the loop, one value a round.
        batch: Seconds for a comparison in the batch, everything included, one value a round.
        forwards: Pictures through the network in the batch; None if the method decides.
        separate: As many in the loop.
        error: Largest difference of a map, relative to the map's maximum.
    """

    method: str
    sharing: int
    rows: int
    pictures: int
    loop: tuple[float, ...]
    batch: tuple[float, ...]
    forwards: int | None
    separate: int
    error: float


def crops(folder: Path, count: int) -> list[Path]:
    """Photographs of 480x360 pixels: parts of the demo's pictures, each another."""
    draws = random.Random(0)
    sources = [Image.open(path).convert("RGB") for path in sorted(DEMO.glob("*.jpg"))]
    paths = []
    for number in range(count):
        source = sources[number % len(sources)]
        width = draws.randrange(source.width // 2, source.width)
        height = width * source.height // source.width
        left = draws.randrange(source.width - width + 1)
        top = draws.randrange(source.height - height + 1)
        part = source.crop((left, top, left + width, top + height)).resize((480, 360))
        paths.append(folder / f"{number:04d}.jpg")
        part.save(paths[-1], quality=90)
    return paths


def triplets(pictures: Sequence[Path], count: int) -> list[BatchRow]:
    """Random triplets in random order; every picture is used about as often."""
    draws = random.Random(1)
    deck: list[str] = []
    rows = []
    for _ in range(count):
        while len(set(deck[:3])) < 3:
            more = [str(path) for path in pictures]
            draws.shuffle(more)
            deck = [*deck, *more] if len(set(deck[:3])) == len(deck[:3]) else more
        anchor, positive, negative, *deck = deck
        rows.append(BatchRow(anchor, (positive,), (negative,)))
    return rows


def measure(
    model: SimilarityModel, method: str, sharing: int, count: int, rounds: int, sampled: int
) -> Outcome:
    """Loop and batch take turns; the loop runs a sample of the rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = triplets(crops(folder, max(3, 3 * count // sharing)), count)
        some = random.Random(2).sample(range(count), sampled)
        explain(model, rows[0].paths, method=method, check=False)
        loop, batch, error = [], [], 0.0
        for number in range(rounds):
            begun = time.perf_counter()
            alone = {
                row: explain(model, rows[row].paths, method=method, check=False) for row in some
            }
            loop.append((time.perf_counter() - begun) / sampled)
            begun = time.perf_counter()
            result = explain_batch(
                model, rows, folder / f"out{number}", method=method, how=BatchOptions()
            )
            batch.append((time.perf_counter() - begun) / count)
        for row, wanted in alone.items():
            top = float(wanted.maps.abs().max()) or 1.0
            error = max(error, float((result.maps(row) - wanted.maps[0]).abs().max()) / top)
        work: Any = result.work
        return Outcome(
            method, sharing, count, len(result.manifest["pictures"]), tuple(loop), tuple(batch),
            work.forwards, work.separate, error,
        )  # fmt: skip


def remembered(model: SimilarityModel, count: int) -> list[tuple[float, int, int]]:
    """Forward passes by the memory given, in MB: what ordering and forgetting are good for."""
    actual = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = triplets(crops(folder, 3 * count // SHARING[-1]), count)
        for megabytes in (1000, 5, 4, 3, 2, 1, 0):
            how = BatchOptions(memory=megabytes / 1000)
            result = explain_batch(model, rows, folder / f"out{megabytes}", how=how)
            work: Any = result.work
            actual.append((megabytes, work.forwards, work.separate))
    return actual


def page(
    outcomes: Sequence[Outcome], memory: Sequence[tuple[float, int, int]], arguments: str
) -> str:
    """The page, in Markdown."""
    record = versions()
    lines = [
        "# A batch against a loop",
        "",
        (
            f"Random triplets of photographs of 480x360 pixels, {NETWORK} with its trained weights,"
            " 224x224. Written by"
        ),
        "",
        f"    python benchmarks/batch.py {arguments}--out FILE",
        "",
        (
            f"CPU ({platform.machine()}), {os.cpu_count()} cores, {torch.get_num_threads()}"
            f" thread(s). Python {record['python']}, torch {record['torch']}, simexplain"
            f" {record['simexplain']}. Load of the machine when the page was written:"
            f" {os.getloadavg()[0]:.1f}. Loop and batch took turns in {len(outcomes[0].loop)}"
            " rounds, and every ratio is within its round."
        ),
        "",
        (
            "*Loop* is `explain` with a loaded model, row after row, nothing written. *Batch* is"
            " `explain_batch` with all it does: checking pictures, proving on the first row that"
            " memory and network agree, writing table and maps. *Error* is the largest difference"
            " of a map between the two, relative to its maximum."
        ),
        "",
        (
            "| method | rows a picture is in | rows | pictures | forward passes: loop | batch | "
            "ms a row: loop | batch | times faster: median [min..max] | error |"
        ),
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in outcomes:
        ratios = [a / b for a, b in zip(result.loop, result.batch, strict=True)]
        lines.append(
            f"| {result.method} | {result.sharing} | {result.rows} | {result.pictures} |"
            f" {result.separate} | {'as the loop' if result.forwards is None else result.forwards}"
            f" | {1000 * median(result.loop):.0f} | {1000 * median(result.batch):.0f} |"
            f" {median(ratios):.1f} [{min(ratios):.1f}..{max(ratios):.1f}] | {result.error:.1e} |"
        )
    best = next(o for o in outcomes if (o.method, o.sharing) == (METHODS[0], SHARING[-1]))
    reached = median([a / b for a, b in zip(best.loop, best.batch, strict=True)])
    kept = "kept" if reached >= TARGET else "missed"
    lines += [
        "",
        f"Target: {METHODS[0]}, pictures in {SHARING[-1]} rows each, at least {TARGET:g} times "
        f"faster: {reached:.1f}, {kept}.",
        "",
        "## Memory",
        "",
        f"The same rows of {METHODS[0]} with pictures in {SHARING[-1]} rows each, by what may be "
        "kept of pictures between rows (`--memory`). Random rows share pictures at random, which "
        "no order of rows makes local; those of real tables are usually nearer.",
        "",
        "| MB kept | forward passes | loop |",
        "| --- | --- | --- |",
        *(f"| {kept_mb:g} | {forwards} | {separate} |" for kept_mb, forwards, separate in memory),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sampled", type=int, default=6)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--untrained", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(NETWORK, weights="random" if given.untrained else None)
    outcomes = [
        measure(model, method, sharing, given.rows, given.rounds, given.sampled)
        for method in given.methods
        for sharing in (SHARING if method == METHODS[0] else SHARING[-1:])
    ]
    memory = remembered(model, given.rows)
    lines = f"--rows {given.rows} --rounds {given.rounds} --sampled {given.sampled} "
    publish(page(outcomes, memory, lines), given.out)


if __name__ == "__main__":
    main()
