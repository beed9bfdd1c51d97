"""The same few networks wrapped, converted and run in the ways that people do it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from compat_heads import EIGHTH, Pooled
from compat_huggingface import CLASS, SMALL, class_token, hf
from compat_net import DEPTH, Grid, Net, halving
from compat_timm import BLOCKS, timm_net
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

VIT = timm_net("vit_tiny_patch16_224", img_size=(64, 96), **BLOCKS)
READ = ("blocks.2.norm1", "blocks.1")


def converted(
    build: Callable[[], nn.Module], change: Callable[[nn.Module], nn.Module]
) -> Callable[[], nn.Module]:
    """A network after a conversion."""
    return lambda: change(build().eval())


def compiled(network: nn.Module) -> nn.Module:
    result: nn.Module = torch.compile(network, backend="eager")
    return result


def quantised(network: nn.Module) -> nn.Module:
    from torch.ao.quantization import quantize_dynamic

    result: nn.Module = quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8)
    return result


def traced(network: nn.Module) -> nn.Module:
    result: nn.Module = torch.jit.trace(network, torch.rand(2, 3, 64, 96))
    return result


def checkpointed(network: nn.Module) -> nn.Module:
    network.set_grad_checkpointing(True)
    return network


def hf_checkpointed(network: nn.Module) -> nn.Module:
    network.gradient_checkpointing_enable()
    return network.train()


def frozen(network: nn.Module) -> nn.Module:
    return network.requires_grad_(False)


def spectral(network: nn.Module) -> nn.Module:
    parametrizations.spectral_norm(network.trunk[4][0])
    parametrizations.weight_norm(network.head)
    return network


class Checkpointed(Pooled):
    """Recomputes its trunk in the backward pass, block by block."""

    def forward(self, images: Tensor) -> Tensor:
        features = images
        for block in self.trunk:
            features = checkpoint(block, features, use_reentrant=False)
        return self.head(features.mean((2, 3)))


class Learner(nn.Module):
    """A training module around a network, as lightning's and metric-learning's users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Pooled()
        self.proxies = nn.Parameter(torch.randn(5, 16))

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.model(images), dim=1)


class TwoCrops(nn.Module):
    """Test-time flipping: the mean of the vectors of an image and its mirror image."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Pooled()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) + self.model(images.flip(3))


def mirrored(grid: Grid) -> Tensor:
    """Where the cells of a mirror image lie in the image."""
    return torch.arange(grid[0] * grid[1]).view(grid).flip(1).flatten()


class Inside(nn.Module):
    """Normalises and resizes pictures itself, so its maps are of another size than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Pooled()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(F.interpolate(images, size=(64, 64), mode="bilinear") / 2)


class Flattening(nn.Module):
    """A ResNet cut up into a Sequential, as many published repositories have it."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import resnet18

        parts = list(resnet18(weights=None).children())[:-1]
        self.features = nn.Sequential(*parts)
        self.neck = nn.BatchNorm1d(512)

    def forward(self, images: Tensor) -> Tensor:
        return self.neck(self.features(images).flatten(1))


NETS = [
    Net("compiled", "own", converted(Pooled, compiled), (64, 96), ("trunk",), (8, 12), EIGHTH,
        why="torch.compile, unwrapped", quick=True),
    Net("compiled vit", "own", converted(VIT, compiled), (64, 96), READ, (4, 6), DEPTH,
        tokens=True, prefix=1, why=CLASS),
    Net("half precision", "own", converted(Pooled, nn.Module.half), (64, 96), ("trunk",), (8, 12),
        EIGHTH, tolerance=0.05, exact=2e-3, why="float16 on the CPU"),
    Net("bfloat16 vit", "own", converted(VIT, nn.Module.bfloat16), (64, 96), READ, (4, 6), DEPTH,
        tokens=True, prefix=1, tolerance=0.3, exact=2e-2, why=CLASS),
    Net("double precision", "own", converted(Pooled, nn.Module.double), (64, 96), ("trunk",),
        (8, 12), EIGHTH, tolerance=1e-6, why="float64"),
    Net("channels last", "own",
        converted(Pooled, lambda n: n.to(memory_format=torch.channels_last)), (64, 96),
        ("trunk",), (8, 12), EIGHTH, why="another order in memory, the same shapes"),
    Net("quantised", "own", converted(Pooled, quantised), (64, 96), ("trunk",), (8, 12), EIGHTH,
        refused=r"quanti[sz]|gradient|differentiable",
        why="dynamic int8 linear layers have no gradient"),
    Net("quantised vit", "own", converted(VIT, quantised), (64, 96), READ, (4, 6), DEPTH,
        refused=r"quanti[sz]|gradient|differentiable",
        why="dynamic int8 linear layers have no gradient"),
    Net("data-parallel", "own", converted(Pooled, nn.DataParallel), (64, 96), ("trunk",), (8, 12),
        EIGHTH, why="unwrapped"),
    Net("data-parallel, compiled", "own",
        converted(Pooled, lambda n: compiled(nn.DataParallel(n))), (64, 96), ("trunk",), (8, 12),
        EIGHTH, why="unwrapped, in either order"),
    Net("checkpointed", "own", Checkpointed, (64, 96), ("trunk.4",), (8, 12), EIGHTH,
        why="activations are computed again in the backward pass"),
    Net("checkpointed timm vit", "own", converted(VIT, checkpointed), (64, 96), READ, (4, 6),
        DEPTH, tokens=True, prefix=1, quick=True,
        why=f"blocks run again in the backward pass; {CLASS}"),
    Net("checkpointed hf vit", "transformers",
        converted(hf("ViTModel", image_size=(64, 96), model={"add_pooling_layer": False},
                     hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SMALL),
                  hf_checkpointed),
        (64, 96), ("layers.2.layernorm_before", "layers.1"), (4, 6), DEPTH, tokens=True, prefix=1,
        output=class_token, trains=True, why=f"left in training mode; {CLASS}"),
    Net("traced", "own", converted(Pooled, traced), (64, 96), (), (8, 12),
        refused=r"TorchScript|layer", why="a traced module has no layers to look into"),
    Net("in training mode", "own", lambda: Pooled().train(), (64, 96), ("trunk",), (8, 12),
        EIGHTH, trains=True, why="explained in eval mode and left as it was"),
    Net("frozen", "own", converted(Pooled, frozen), (64, 96), ("trunk",), (8, 12), EIGHTH,
        why="no parameter wants a gradient"),
    Net("parametrised weights", "own", converted(Pooled, spectral), (64, 96), ("trunk",), (8, 12),
        EIGHTH, why="spectral and weight norm are modules, but no maps"),
    Net("inside a learner", "own", Learner, (64, 96), ("model.trunk",), (8, 12), EIGHTH,
        plain=lambda: plain_learner(), why="a training module around the network"),
    Net("two views averaged", "own", TwoCrops, (64, 96), (), (8, 12), None,
        or_warned={"model.trunk@0": (8, 12), "model.trunk@1": (8, 12)},
        refused=r"runs 2 times|twice|bypass|layer=", order=mirrored,
        why="the network runs twice, and neither of its maps is passed by everything"),
    Net("resizing inside", "own", Inside, (96, 96), ("model.trunk",), (8, 8), halving((8, 8), 3),
        why="grids are those of the size that it resizes to"),
    Net("resnet cut into a Sequential", "torchvision", Flattening, (64, 96), ("features.7",),
        (2, 3), halving((2, 3)), why="layers have numbers for names; a norm after the pooling"),
]  # fmt: skip


def plain_learner() -> nn.Module:
    """The learner without its normalisation, under the same names."""
    network = Learner()
    network.forward = lambda images: network.model(images)  # type: ignore[method-assign]
    return network
