"""Every family of torchvision, with what is right for it by its source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compat_net import DEPTH, Net, halving
from torch import nn

LAST = "global pooling follows"
CLASS = "only the class token is read, so the last map is what the last block's attention reads"
EMBEDDING = 16


def zoo(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A network by name, with a small linear embedding in place of its classes."""

    def build() -> nn.Module:
        from torchvision.models import get_model

        return get_model(name, weights=None, num_classes=EMBEDDING, **options)

    return build


def alexnet() -> nn.Module:
    network = zoo("alexnet")()
    network.classifier = nn.Linear(256 * 36, EMBEDDING)
    return network


def vgg11_bn() -> nn.Module:
    network = zoo("vgg11_bn")()
    network.classifier = nn.Linear(512 * 49, EMBEDDING)
    return network


def bottleneck(**options: Any) -> Callable[[], nn.Module]:
    """ResNeXt and wide ResNets are one class; one block a stage is enough."""

    def build() -> nn.Module:
        from torchvision.models.resnet import Bottleneck, ResNet

        return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=EMBEDDING, **options)

    return build


def convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    widths = (16, 32, 48, 64, None)
    settings = [CNBlockConfig(widths[n], widths[n + 1], d) for n, d in enumerate((2, 2, 4, 2))]
    return ConvNeXt(settings, num_classes=EMBEDDING)


def swin(version: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import SwinTransformer
        from torchvision.models import swin_transformer as parts

        newer = {
            "block": parts.SwinTransformerBlockV2,
            "downsample_layer": parts.PatchMergingV2,
        }
        return SwinTransformer(
            patch_size=[4, 4], embed_dim=24, depths=[2, 2, 6, 2], num_heads=[1, 2, 4, 8],
            window_size=[4, 4], num_classes=EMBEDDING, **(newer if version == 2 else {}),
        )  # fmt: skip

    return build


def vit(size: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import VisionTransformer

        return VisionTransformer(
            image_size=size, patch_size=16, num_layers=3, num_heads=3, hidden_dim=48, mlp_dim=96,
            num_classes=EMBEDDING,
        )  # fmt: skip

    return build


def varied_vit(size: int) -> Callable[[], nn.Module]:
    """torchvision's head begins as zeros, which would make every embedding zero."""

    def build() -> nn.Module:
        network = vit(size)()
        nn.init.normal_(network.heads.head.weight, std=0.1)
        return network

    return build


def maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    return MaxVit(
        input_size=(128, 128), stem_channels=16, partition_size=4, block_channels=[16, 32, 48, 64],
        block_layers=[1, 1, 2, 1], head_dim=8, stochastic_depth_prob=0.0, num_classes=EMBEDDING,
    )  # fmt: skip


NETS = [
    Net("torchvision alexnet", "torchvision", alexnet, (96, 128), ("features",), (2, 3),
        ((11, 15), (5, 7), (2, 3)), why="pooling ends each of its stages; 6x6 is only pooled to"),
    Net("torchvision convnext", "torchvision", convnext, (64, 96), ("features.7",), (2, 3),
        halving((2, 3)), why="the norm comes after the pooling"),
    Net("torchvision densenet121", "torchvision", zoo("densenet121"), (64, 96),
        ("features.norm5",), (2, 3), halving((2, 3)), why="a functional ReLU follows norm5"),
    Net("torchvision efficientnet_b0", "torchvision", zoo("efficientnet_b0"), (64, 96),
        ("features.8",), (2, 3), halving((2, 3)), why=LAST),
    Net("torchvision efficientnet_v2_s", "torchvision", zoo("efficientnet_v2_s"), (64, 96),
        ("features.7",), (2, 3), halving((2, 3)), why=LAST),
    Net("torchvision googlenet", "torchvision",
        zoo("googlenet", init_weights=False, aux_logits=False), (64, 96), ("inception5b",), (2, 3),
        halving((2, 3), 3), why=LAST),
    Net("torchvision inception_v3", "torchvision",
        zoo("inception_v3", init_weights=False, aux_logits=False), (139, 171), ("Mixed_7c",),
        (3, 4), ((15, 19), (7, 9), (3, 4)), why="convolutions without padding"),
    Net("torchvision mnasnet0_5", "torchvision", zoo("mnasnet0_5"), (64, 96), ("layers.16",),
        (2, 3), halving((2, 3)),
        route="export",
        why="a convolution, norm and activation end the layers"),
    Net("torchvision mobilenet_v2", "torchvision", zoo("mobilenet_v2"), (64, 96),
        ("features.18",), (2, 3), halving((2, 3)), why=LAST, quick=True, route="export"),
    Net("torchvision mobilenet_v3_small", "torchvision", zoo("mobilenet_v3_small"), (64, 96),
        ("features.12",), (2, 3), halving((2, 3)), why=LAST),
    Net("torchvision regnet_y_400mf", "torchvision", zoo("regnet_y_400mf"), (64, 96),
        ("trunk_output.block4", "trunk_output"), (2, 3), halving((2, 3)), why=LAST),
    Net("torchvision resnet18", "torchvision", zoo("resnet18"), (64, 96), ("layer4",), (2, 3),
        halving((2, 3)), why=LAST, route="export"),
    Net("torchvision resnext", "torchvision", bottleneck(groups=32, width_per_group=4), (64, 96),
        ("layer4",), (2, 3), halving((2, 3)), why=LAST),
    Net("torchvision wide resnet", "torchvision", bottleneck(width_per_group=128), (65, 97),
        ("layer4",), (3, 4), ((17, 25), (9, 13), (5, 7), (3, 4)), why="odd sides are rounded up"),
    Net("torchvision shufflenet_v2_x0_5", "torchvision", zoo("shufflenet_v2_x0_5"), (64, 96),
        ("conv5",), (2, 3), halving((2, 3), 3),
        route="export",
        why="a plain mean over both sides follows"),
    Net("torchvision squeezenet1_1", "torchvision", zoo("squeezenet1_1"), (64, 96),
        ("classifier.2",), (3, 5), ((15, 23), (7, 11), (3, 5)),
        route="export",
        why="its head is a convolution and an activation before the pooling"),
    Net("torchvision vgg11_bn", "torchvision", vgg11_bn, (64, 96), ("features",), (2, 3),
        halving((2, 3)), why="pooling ends each stage; 7x7 is only pooled to"),
    Net("torchvision swin", "torchvision", swin(1), (128, 192), ("norm", "permute", "features.7"),
        (4, 6), halving((4, 6)), tokens=True,
        route="export",
        why="channels last until permute"),
    Net("torchvision swin v2", "torchvision", swin(2), (128, 192),
        ("norm", "permute", "features.7"), (4, 6), halving((4, 6)), tokens=True,
        why="tables of positions run as modules and are no maps"),
    Net("torchvision vit", "torchvision", varied_vit(64), (64, 64),
        ("encoder.layers.encoder_layer_2.ln_1", "encoder.layers.encoder_layer_1"), (4, 4), DEPTH,
        tokens=True, prefix=1,
        route="export",
        why=CLASS, quick=True),
    Net("torchvision vit at 32 px", "torchvision", varied_vit(32), (32, 32),
        ("encoder.layers.encoder_layer_2.ln_1", "encoder.layers.encoder_layer_1"), (2, 2), DEPTH,
        prefix=1, why=CLASS),
    Net("torchvision maxvit", "torchvision", maxvit, (128, 128), ("blocks.3",), (4, 4),
        halving((4, 4)), tokens=True, why="the norm comes after the pooling"),
]  # fmt: skip
