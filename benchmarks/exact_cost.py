"""What exact methods cost on transformers, counted in plain forward passes of the same images.

Floating-point operations of matrix products, convolutions and attention, forward and backward, as
torch counts them; no load on the machine changes them. Weights are random: costs do not depend on
them.

    python benchmarks/exact_cost.py --side 112
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from simexplain import Comparison, as_similarity_model, explain, match

NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "ViT-tiny, class token": lambda side: timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=side
    ),
    "ViT-tiny, mean of patches": lambda side: timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=side, global_pool="avg"
    ),
    "DeiT-tiny, class and distillation token": lambda side: timm.create_model(
        "deit_tiny_distilled_patch16_224", num_classes=0, img_size=side
    ),
    "Swin-tiny": lambda side: timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=0, img_size=side, strict_img_size=False
    ),
}
LIMIT = 8


def operations(run: Callable[[], object]) -> int:
    """Floating-point operations of one call."""
    with FlopCounterMode(display=False) as counted:
        run()
    return int(counted.get_total_flops())


def costs(network: nn.Module, side: int) -> tuple[str, float, float]:
    """The layer, and the costs of ``decomposition`` and ``match`` in plain forward passes."""
    model = as_similarity_model(network.eval())
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    layer = next(found.name for found in model.layers_for(images) if found.default)
    with torch.no_grad():
        plain = operations(lambda: network(images))
    pair = Comparison.pair(images[:1], images[1:])
    explain(
        model, pair, "decomposition", layer, check=False
    )  # what the survey costs is paid once for a model
    whole = operations(lambda: explain(model, pair, "decomposition", layer, check=False))
    pairs = operations(lambda: match(model, images[:1], images[1:], layer))
    return layer, whole / plain, pairs / plain


def main(arguments: Sequence[str] | None = None) -> None:
    """Counts and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--side", type=int, default=112, help="of the images, in pixels")
    parser.add_argument("--network", choices=NETWORKS, action="append")
    asked = parser.parse_args(arguments)
    print("| network | layer | decomposition | match |\n| --- | --- | --- | --- |")
    for name in asked.network or NETWORKS:
        layer, *found = costs(NETWORKS[name](asked.side), asked.side)
        cells = [f"{cost:.1f}" + ("" if cost <= LIMIT else " (missed)") for cost in found]
        print(f"| {name} | {layer} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
