"""Small AVSL models and graphs that several test files use."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from simexplain.graph.inference import Graph, Rows, normalised_edges
from simexplain.models.avsl import AVSL
from simexplain.models.avsl_options import PRESETS, AVSLOptions


class Pyramid(nn.Module):
    """Three stages of 16, 24 and 32 channels at strides 2, 4 and 8, pooled at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(inplace=True))
        self.stage2 = nn.Sequential(nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU(inplace=True))
        self.stage3 = nn.Sequential(
            nn.Conv2d(24, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(inplace=True)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(self.stage3(self.stage2(self.stage1(images)))).flatten(1)


LEVELS = ("stage1", "stage2", "stage3")


def small_avsl(
    preset: str | AVSLOptions = "paper",
    *,
    k: int = 6,
    nodes: int | tuple[int, ...] = 24,
    levels: tuple[str, ...] = LEVELS,
    learned: bool = True,
) -> AVSL:
    """The same model at every call, float64, with edges of two batches and drawn alphas."""
    options = PRESETS[preset] if isinstance(preset, str) else preset
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = AVSL(Pyramid(), levels=levels, nodes=nodes, preset=replace(options, k=k)).double()
    generator = torch.Generator().manual_seed(3)
    if learned:
        for alpha, beta in zip(model.alphas, model.betas, strict=True):
            drawn = torch.randn((2, len(alpha)), generator=generator, dtype=torch.float64)
            alpha.data.copy_(5 * drawn[0])
            beta.data.copy_(drawn[1])
        for _ in range(2):
            images = torch.rand((5, 3, 32, 40), generator=generator, dtype=torch.float64)
            with torch.no_grad():
                model.update_edges(model.feature_maps(images))
    return model.eval()


def random_rows(count: int, widths: tuple[int, ...], seed: int, dtype=torch.float64) -> Rows:
    generator = torch.Generator().manual_seed(seed)

    def drawn(width: int) -> Tensor:
        return torch.randn((count, width), generator=generator, dtype=torch.float64)

    units = tuple(nn.functional.normalize(drawn(width), dim=1).to(dtype) for width in widths)
    sure = tuple((0.01 * drawn(width).exp()).to(dtype) for width in widths)
    return Rows(units, sure)


def random_graph(widths: tuple[int, ...], seed: int, k: int = 5, dtype=torch.float64) -> Graph:
    generator = torch.Generator().manual_seed(seed)
    pairs = list(pairwise(widths))
    edges = [torch.randn(pair, generator=generator, dtype=torch.float64) for pair in pairs]
    normalised = [normalised_edges(part, k, ties="first", epsilon=0.0).to(dtype) for part in edges]
    drawn = [torch.randn((2, high), generator=generator, dtype=torch.float64) for _, high in pairs]
    return Graph(
        tuple(normalised),
        tuple((2000 * part[0]).to(dtype) for part in drawn),
        tuple(part[1].to(dtype) for part in drawn),
        widths[0],
    )
