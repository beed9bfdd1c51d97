"""Small networks that end in every kind of tail of which an exact decomposition is promised."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GeM(nn.Module):
    def forward(self, grid: Tensor) -> Tensor:
        return grid.clamp_min(1e-6).pow(3).mean(dim=(2, 3)).pow(1 / 3)


POOLS = {
    "average": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "max": lambda: nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten()),
    "gem": GeM,
    "flatten": nn.Flatten,
}


class Tailed(nn.Module):
    """A convolution, then a pooling, then perhaps batch norm and a linear layer."""

    def __init__(self, pool: str, *, norm: bool, linear: bool, bias: bool) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3, stride=4, padding=1)
        self.body.weight.data.mul_(5)  # GeM's floor of 1e-6 shall be small beside the activations
        self.act = nn.ReLU()
        self.pool = POOLS[pool]()
        width = 6 * 6 * 8 if pool == "flatten" else 6
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.head = nn.Linear(width, 9, bias=bias) if linear else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.pool(self.act(self.body(images)))))


def randomised(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.normal_()
    return network.eval()


class Curved(Tailed):
    """A tail that is not linear."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(super().forward(images) * 4)
