"""Small smooth networks for training objectives, in float64, and what they are tested on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simexplain import as_similarity_model

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2])


class SmoothNet(nn.Module):
    """Convolutions, pooling and a head: linear (maps in closed form) or curved (autograd)."""

    def __init__(self, *, curved: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.Softplus(), nn.Conv2d(6, 8, 3, 2, 1), nn.Softplus()
        )
        self.head = nn.Linear(8, 5)
        self.end = nn.Tanh() if curved else nn.Identity()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for part in self.parameters():
                part.copy_(torch.randn(part.shape, generator=generator) * 0.4)

    def forward(self, images: Tensor) -> Tensor:
        return self.end(self.head(self.body(images).mean(dim=(2, 3))))


def smooth_model(*, curved: bool = False):
    """The network as a similarity model in float64; its maps are at layer ``body``."""
    return as_similarity_model(SmoothNet(curved=curved).double())


def pictures(count: int, side: int = 12, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, side, side, generator=generator, dtype=torch.float64)


def gradients(loss: Tensor, *modules: nn.Module) -> list[Tensor | None]:
    """Of all parameters; None where there is none. The graph stays."""
    parameters = [part for module in modules for part in module.parameters()]
    return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
