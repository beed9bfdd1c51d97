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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
import torchvision
from captum.attr import LayerGradCam
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import scale_cam_image
from store import added_memory, publish
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain import Comparison, as_similarity_model, explain
from simexplain.methods.similarity_attention import similarity_weights
from simexplain.models.accelerating import accelerated


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


PLAIN, OURS, FAST = "plain forward", "simexplain", "simexplain, fast mode"
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Setting:
    """What is explained.

    Attributes:
        network: A name in ``torchvision.models`` of a network with ``fc`` as its last layer.
        size: Height and width of the images.
        triplets: How many triplets one call explains.
        threads: Threads that PyTorch may use.
    """

    network: str
    size: int
    triplets: int
    threads: int

    def module(self) -> nn.Module:
        """The network with a linear head of 512 and random weights, the same in every process."""
        torch.manual_seed(0)
        network = getattr(torchvision.models, self.network)(weights=None)
        network.fc = nn.Linear(network.fc.in_features, 512)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):  # statistics of a fresh one are trivial to fold
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.data.uniform_(0.5, 1.0)
        return network.eval()

    def images(self) -> Comparison:
        """Triplets of noise."""
        generator = torch.Generator().manual_seed(1)
        shape = (3, self.triplets, 3, self.size, self.size)
        return Comparison.triplet(*torch.randn(shape, generator=generator))


def plain_forward(module: nn.Module, images: Comparison, layer: str) -> Run:
    """The network on the same images, as anyone would embed them."""
    flat = images.stacked().flatten(0, 1)

    def run() -> Tensor:
        with torch.inference_mode():
            return module(flat)

    return run


def ours(module: nn.Module, images: Comparison, layer: str) -> Run:
    """Similarity attention with its defaults."""
    model = as_similarity_model(module)
    return lambda: explain(model, images, layer=layer, check=False).maps.flatten(0, 1)


def ours_fast(module: nn.Module, images: Comparison, layer: str) -> Run:
    """The same with batch norm folded and channels-last memory."""
    model = accelerated(as_similarity_model(module))
    return lambda: explain(model, images, layer=layer, check=False).maps.flatten(0, 1)


def captum_layer(module: nn.Module, images: Comparison, layer: str) -> Run:
    """Captum's layer Grad-CAM of ``w . f``, with ``w`` from a first forward."""
    flat = images.stacked().flatten(0, 1)

    def run() -> Tensor:
        weights = _weights(module, images)
        attribution = LayerGradCam(
            lambda batch: (F.normalize(module(batch), dim=1) * weights).sum(dim=1),
            module.get_submodule(layer),
        )
        return attribution.attribute(flat, relu_attributions=True)[:, 0].detach()

    return run


def grad_cam(module: nn.Module, images: Comparison, layer: str) -> Run:
    """The grad-cam package with an embedding target for each image, all in one batch."""
    return _grad_cam(module, images, layer, chunk=len(images.stacked().flatten(0, 1)))


def grad_cam_singly(module: nn.Module, images: Comparison, layer: str) -> Run:
    """The same image by image, as the package's own example of embeddings does it."""
    return _grad_cam(module, images, layer, chunk=1)


def _grad_cam(module: nn.Module, images: Comparison, layer: str, chunk: int) -> Run:
    flat = images.stacked().flatten(0, 1)

    def run() -> Tensor:
        weights = _weights(module, images)
        targets = [lambda out, w=w: F.normalize(out, dim=0) @ w for w in weights]
        # Entered anew each time: its hooks would slow down the other methods.
        with GradCAM(model=module, target_layers=[module.get_submodule(layer)]) as cam:
            parts = [
                torch.from_numpy(cam(flat[i : i + chunk], targets[i : i + chunk]))
                for i in range(0, len(flat), chunk)
            ]
        return torch.cat(parts)

    return run


def _weights(module: nn.Module, images: Comparison) -> Tensor:
    """The published weights, one row per image, from a forward pass of its own."""
    with torch.no_grad():
        rows = F.normalize(module(images.stacked().flatten(0, 1)), dim=1)
    weights = similarity_weights(images.like(images.restacked(rows)))
    return weights.repeat_interleave(images.count, dim=0)


METHODS: dict[str, Callable[[nn.Module, Comparison, str], Run]] = {
    PLAIN: plain_forward,
    "plain forward again": plain_forward,
    OURS: ours,
    FAST: ours_fast,
    "captum LayerGradCam": captum_layer,
    "grad-cam, one batch": grad_cam,
    "grad-cam, image by image": grad_cam_singly,
}
"""What is measured, by the name in the table; the first is what all are divided by."""


def difference(name: str, maps: Tensor, reference: Tensor, size: int) -> float:
    """Largest difference of any map from ours, as a share of that map's maximum."""
    if name.startswith("grad-cam"):  # which returns maps enlarged and scaled to [0, 1]
        enlarged = scale_cam_image(reference.numpy(), (size, size))
        reference = torch.from_numpy(scale_cam_image(enlarged))  # it scales twice
    apart = (maps - reference).abs().amax(dim=(1, 2))
    top = reference.amax(dim=(1, 2))
    return float((apart / top.clamp_min(1e-30)).max())


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
