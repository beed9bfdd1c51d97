"""What similarity mining costs: one training step with it against the same step without.

    python benchmarks/training.py --out docs/benchmarks/training.md

Every step is forward, backward and SGD on the same batch of triplets. Steps take turns, so that
whatever else the machine does hits all of them; a figure is the median over rounds of the ratio to
the triplet step of the same round, with the smallest and largest.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from store import publish
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain import SimilarityModel, as_similarity_model
from simexplain.comparison import Comparison
from simexplain.losses.mining import SimilarityMiningLoss, disjoint_tuples, mining_loss
from simexplain.losses.objective import Batch, Objective, Term
from simexplain.methods.similarity_attention import similarity_weights
from simexplain.models.backbones import build_backbone

GAMMA = 0.05
Step = Callable[[], object]


class Triplets(Term):
    """The triplet margin loss of the comparisons that mining uses as well."""

    def forward(self, batch: Batch) -> Tensor:
        """Eq. 1 with margin 0.2."""
        tuples = disjoint_tuples(batch.embeddings, batch.labels, generator=batch.generator)
        rows = tuples.of(batch.embeddings)
        near = (rows.anchor - rows.positives[:, 0]).norm(dim=1)
        far = (rows.anchor - rows.negatives[:, 0]).norm(dim=1)
        return (near - far + 0.2).relu().mean()


def naive(model: SimilarityModel, images: Tensor, labels: Tensor, layer: nn.Module) -> Tensor:
    """The mining step as one would first write it: a pass for the loss, one for w, one for maps."""
    tuples = disjoint_tuples(model.embed(images).detach(), labels)
    rows = tuples.of(model.embed(images))
    triplet = (
        (rows.anchor - rows.positives[:, 0]).norm(dim=1)
        - (rows.anchor - rows.negatives[:, 0]).norm(dim=1)
        + 0.2
    ).relu()
    weights = similarity_weights(tuples.of(model.embed(images).detach()))
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _m, _a, output: outputs.append(output))
    result = tuples.of(model.embed(images))
    handle.remove()
    score = torch.einsum("be,bke->", weights, result.stacked())
    (slopes,) = torch.autograd.grad(score, outputs[0], create_graph=True)
    maps = (slopes.mean(dim=(2, 3), keepdim=True) * outputs[0]).sum(dim=1, keepdim=True).relu()
    grown = F.interpolate(maps, images.shape[2:], mode="bilinear")
    scaled = grown / grown.amax(dim=(2, 3), keepdim=True).clamp_min(1e-12)
    masked = tuples.of(images * (1 - torch.sigmoid(10 * (scaled - 0.5)))).stacked()
    hidden = model.embed(masked.flatten(0, 1)).view(*masked.shape[:2], -1)
    whole: Comparison = tuples.arranged(hidden)
    return triplet.mean() + GAMMA * mining_loss(whole)


def steps(model: SimilarityModel, images: Tensor, labels: Tensor) -> Mapping[str, Step]:
    """Every kind of step by name."""
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4)
    layer = model.network.get_submodule(model.default_layer)

    def whole(**options: object) -> Objective:
        terms: dict[str, tuple[float, Term]] = {"triplet": (1.0, Triplets())}
        if options:
            terms["mining"] = (GAMMA, SimilarityMiningLoss(**options))
        return Objective(terms)

    def stepping(loss: Callable[[], Tensor]) -> Step:
        def run() -> None:
            optimiser.zero_grad()
            torch.autograd.backward(loss())
            optimiser.step()

        return run

    def of(**options: object) -> Step:
        objective = whole(**options)
        return stepping(lambda: objective(model, images, labels).total)

    return {
        "triplet": of(),
        "mining": of(alpha=10.0),
        "mining, gradient stopped at the mask": of(through_mask=False),
        "mining, hardest half": of(share=0.5),
        "mining, masked at half resolution": of(masked_scale=0.5),
        "mining, both": of(share=0.5, masked_scale=0.5),
        "mining, naive": stepping(lambda: naive(model, images, labels, layer)),
    }


def measured(name: str, size: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """The ratio of each step to the triplet step, round by round."""
    built = build_backbone(name, pretrained=False, outputs=128, size=(size, size))
    model = as_similarity_model(built.network, preprocess=built.preprocess).train()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3 * args.triplets, 3, size, size, generator=generator)
    labels = torch.arange(args.triplets).repeat_interleave(3)
    # Two of a class and one of another make a triplet, so that each image is in one.
    labels[2::3] += args.triplets
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    ways = steps(model, images, labels)
    for run in ways.values():
        run()
    result: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.rounds):
        times = {}
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            times[way] = time.perf_counter() - start
        for way, seconds in times.items():
            result[way].append(seconds / times["triplet"])
    return result


def page(args: argparse.Namespace, results: Mapping[str, dict[str, list[float]]]) -> str:
    """The page of the documentation."""
    head = list(results)
    lines = [
        "# What similarity mining costs",
        "",
        "One training step (forward, backward, SGD, train mode) with similarity mining, relative",
        f"to the same step with the triplet loss alone; batches of {args.triplets} triplets, each",
        f"image in one of them, random weights, median of {args.rounds} rounds with the smallest",
        "and largest. A second forward and backward pass of the same images makes 2.0 the least",
        "that the full method can cost. The naive step runs the network once for each of loss,",
        "weights and maps.",
        "",
        f"`python benchmarks/training.py --triplets {args.triplets} --rounds {args.rounds}"
        f"{' --channels-last' if args.channels_last else ''}`, "
        f"{args.threads} threads, torch {torch.__version__.split('+')[0]}, "
        f"Python {platform.python_version()}.",
        "",
        f"| step | {' | '.join(head)} |",
        "| --- |" + " --- |" * len(head),
    ]
    for way in next(iter(results.values())):
        cells = [
            f"{statistics.median(result[way]):.2f} [{min(result[way]):.2f}..{max(result[way]):.2f}]"
            for result in results.values()
        ]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--networks",
        nargs="+",
        default=["timm:resnet18@112", "timm:resnet50@112", "timm:tf_efficientnet_lite0@96"],
        help="NETWORK@SIZE",
    )
    parser.add_argument("--triplets", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--out", type=Path, help="write the page here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for named in args.networks:
        name, _, size = named.rpartition("@")
        results[f"{name.partition(':')[2]}, {size} px"] = measured(name, int(size), args)
    publish(page(args, results), args.out)


if __name__ == "__main__":
    main()
