"""What an explanation costs: simexplain beside a plain forward pass and two other packages.

Triplets go through a network with random weights at each target layer. All methods take turns in
one run (A B C A B C ...), and each is divided by the plain forward of its own round, so that other
work on the machine slows both sides of a ratio. Peak memory is measured in a process of its own.

    python benchmarks/explain.py --triplets 4 --rounds 11 --out docs/benchmarks/explain.md
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from explain_methods import FAST, METHODS, OURS, PLAIN, Run, Setting, difference
from store import added_memory, publish

from simexplain import as_similarity_model


def timed(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each method in each round; the methods take turns."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory(setting: Setting, name: str, layer: str) -> float | None:
    """MiB that the first call adds to the resident set; None where the system does not tell.

    To be called in a fresh process.
    """
    torch.set_num_threads(setting.threads)
    module = setting.module()
    small = replace(setting, size=64, triplets=1)
    METHODS[name](module, small.images(), layer)()  # imports and thread pools are no cost of a call
    run = METHODS[name](module, setting.images(), layer)
    return added_memory(run)


def measured_memory(setting: Setting, layer: str) -> dict[str, float | None]:
    """Peak memory of each method, each in a process that ends afterwards."""
    result = {}
    context = multiprocessing.get_context("spawn")  # a fork would share what is loaded here
    for name in METHODS:
        with context.Pool(1) as pool:
            result[name] = pool.apply(peak_memory, (setting, name, layer))
    return result


def alone(setting: Setting, layer: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of the plain forward and our own methods. To be called in a fresh process."""
    torch.set_num_threads(setting.threads)
    module, images = setting.module(), setting.images()
    names = [name for name in METHODS if name.startswith(PLAIN) or name in (OURS, FAST)]
    return timed({name: METHODS[name](module, images, layer) for name in names}, rounds)


def measured_alone(setting: Setting, layer: str, rounds: int) -> list[Row]:
    """The same methods where no other package has worked in the process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds = pool.apply(alone, (setting, layer, rounds))
    return rows_of(layer, seconds, {}, {})


@dataclass(frozen=True)
class Row:
    """One line of the table: a method at a layer."""

    layer: str
    name: str
    seconds: float
    ratios: list[float]
    memory: float | None
    apart: float | None


def measure(setting: Setting, layer: str, rounds: int, *, memory: bool) -> list[Row]:
    """All methods at one layer."""
    module, images = setting.module(), setting.images()
    runs = {name: build(module, images, layer) for name, build in METHODS.items()}
    reference = runs[OURS]()
    apart = {
        name: difference(name, run(), reference, setting.size)
        for name, run in runs.items()
        if not name.startswith(PLAIN) and name != OURS
    }
    seconds = timed(runs, rounds)
    peaks = measured_memory(setting, layer) if memory else {}
    return rows_of(layer, seconds, peaks, apart)


def rows_of(
    layer: str,
    seconds: dict[str, list[float]],
    peaks: dict[str, float | None],
    apart: dict[str, float],
) -> list[Row]:
    """Lines of the table; every ratio is within its round."""
    return [
        Row(
            layer,
            name,
            median(took),
            [own / base for own, base in zip(took, seconds[PLAIN], strict=True)],
            peaks.get(name),
            apart.get(name),
        )
        for name, took in seconds.items()
    ]


def table(rows: Sequence[Row], default: str) -> list[str]:
    """The measurements in Markdown."""
    lines = [
        "| layer | method | time / plain forward: median [min..max] | seconds | peak MiB "
        "| largest difference from ours |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        layer = f"{row.layer} (default)" if row.layer == default else row.layer
        memory = "–" if row.memory is None else f"{row.memory:.0f}"
        apart = "–" if row.apart is None else f"{row.apart:.1e}"
        spread = f"{median(row.ratios):.2f} [{min(row.ratios):.2f}..{max(row.ratios):.2f}]"
        lines.append(
            f"| {layer} | {row.name} | {spread} | {row.seconds:.2f} | {memory} | {apart} |"
        )
    return lines


def verdicts(rows: Sequence[Row], own: Sequence[Row], default: str) -> list[str]:
    """What was promised beside what was measured, among all methods and by ourselves."""
    result = {(row.layer, row.name): row for row in rows}
    single = {(row.layer, row.name): row for row in own}
    promises: list[tuple[str, str, str, float]] = [
        (f"default layer ({default})", default, OURS, 1.05),
        ("layer3", "layer3", OURS, 1.25),
        (f"fast mode, default layer ({default})", default, FAST, 0.75),
    ]
    lines = [
        "| promise | in turn with all methods | in a process of its own |",
        "| --- | --- | --- |",
    ]
    for text, layer, name, limit in promises:
        row = result.get((layer, name))
        if row:
            printed = [_kept(median(r.ratios), limit, ".2f") for r in (row, single[layer, name])]
            lines.append(
                f"| {text}: at most {limit} plain forwards | {printed[0]} | {printed[1]} |"
            )
    for row in rows:
        if row.name == FAST and row.apart is not None:
            printed = [_kept(row.apart, 1e-3, ".1e")]
            text = f"fast mode, {row.layer}: maps within 1e-3 of their maximum"
            lines.append(f"| {text} | {printed[0]} | |")
    return lines


def _kept(value: float, limit: float, digits: str) -> str:
    return f"{value:{digits}} ({'kept' if value <= limit else 'missed'})"


def machine(setting: Setting) -> str:
    """The machine in one sentence."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = ("torch", "torchvision", "captum", "grad-cam", "simexplain")
    software = ", ".join(f"{name} {version(name)}" for name in packages)
    busy = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return (
        f"CPU ({platform.machine()}), {cores} cores, {setting.threads} threads; load of the "
        f"machine when the run began: {busy}. Python {platform.python_version()}, {software}."
    )


def page(
    setting: Setting,
    rounds: int,
    rows: Sequence[Row],
    own: Sequence[Row],
    where: str,
    default: str,
) -> str:
    """The whole Markdown page."""
    options = f"--triplets {setting.triplets} --rounds {rounds}"
    layers = " ".join(dict.fromkeys(row.layer for row in rows))
    if (setting.network, setting.size) != ("resnet50", 224):
        options += f" --network {setting.network} --size {setting.size}"
    lines = [
        "# Speed and memory",
        "",
        f"{setting.triplets} triplets of {setting.size} x {setting.size} images through "
        f"{setting.network} with a linear head of 512 and random weights. Written by",
        "",
        f"    python benchmarks/explain.py {options} --layers {layers} --out FILE",
        "",
        f"{where} The methods took turns in {rounds} rounds, and every ratio is to the plain "
        "forward (`torch.inference_mode`) of the same images in the same round; *plain forward "
        "again* is identical work and shows the noise. *Peak* is what one call adds to the "
        "resident memory of a fresh process with the model loaded.",
        "",
        *verdicts(rows, own, default),
        "",
        "## In turn with all methods",
        "",
        *table(rows, default),
        "",
        "## In a process of its own",
        "",
        "The same, where only the plain forward and simexplain take turns. Each large tensor is "
        "then fresh memory from the system, as in most programs, and the plain forward pays; in "
        "the table above, what other packages freed is used again and it does not. The fast mode "
        "needs less memory and so gains from it where memory is dear.",
        "",
        *table(own, default),
        "",
        "## Notes",
        "",
        "All methods here compute the same quantity, Grad-CAM of the score $w^{\\top} f$ with the "
        "published weights held constant. captum and grad-cam are given $w$ by a first forward "
        "pass, which counts. grad-cam returns maps enlarged to the image and stretched to [0, 1]; "
        "ours are treated likewise before the two are compared. The fast mode rounds differently; "
        "where a ReLU of this random network lies within rounding of zero, its gradient at a finer "
        "layer may switch, which shows in the largest difference of layer3.",
        "",
    ]
    return "\n".join(lines)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--triplets", type=int, default=4, help="explained by one call")
    parser.add_argument("--rounds", type=int, default=11, help="how often each method is timed")
    parser.add_argument("--layers", nargs="+", default=["layer4", "layer3"], metavar="LAYER")
    parser.add_argument("--network", default="resnet50", help="a ResNet of torchvision")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--out", type=Path, metavar="FILE", help="Markdown file to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes the page; prints it where no file is named."""
    options = parsed(arguments)
    setting = Setting(options.network, options.size, options.triplets, options.threads)
    torch.set_num_threads(setting.threads)
    where = machine(setting)  # before the run itself loads the machine
    rows: list[Row] = []
    own: list[Row] = []
    for layer in options.layers:
        rows += measure(setting, layer, options.rounds, memory=not options.no_memory)
        own += measured_alone(setting, layer, options.rounds)
        print("\n".join(table(rows[-len(METHODS) :], "")), flush=True)
    model = as_similarity_model(setting.module())
    text = page(setting, options.rounds, rows, own, where, model.default_layer)
    publish(text, options.out)


if __name__ == "__main__":
    main()
