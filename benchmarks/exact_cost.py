"""What exact methods cost on transformers, counted in plain forward passes of the same images.

Floating-point operations of matrix products, convolutions and attention, forward and backward, as
torch counts them; no load on the machine changes them. Weights are random: costs do not depend on
them.

    python benchmarks/exact_cost.py --side 112
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer

from simexplain import Comparison, as_similarity_model, explain, match

_SIZES = {
    "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 3, "patch_size": 16,
}  # fmt: skip


def torchvision_vit(side: int) -> nn.Module:
    """A ViT of torchvision, as small as timm's ViT-tiny."""
    network = VisionTransformer(side, 16, 12, 3, 192, 768)
    network.heads = nn.Identity()
    return network


def open_clip_tower(side: int) -> nn.Module:
    """The image tower of a CLIP of open_clip."""
    import open_clip

    vision = {"image_size": side, "patch_size": 16, "layers": 12, "width": 192, "head_width": 64}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    tower: nn.Module = open_clip.CLIP(128, vision, text).visual
    return tower


def hugging_face(side: int, kind: str) -> nn.Module:
    """An image tower of transformers."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(image_size=side, **_SIZES)
    tower: nn.Module = getattr(transformers, f"{kind}Model")(config)
    return tower


def clip_resnet(side: int) -> nn.Module:
    """The RN50 of CLIP, whose attention asks with the mean of a map."""
    from open_clip.modified_resnet import ModifiedResNet

    network: nn.Module = ModifiedResNet((3, 4, 6, 3), 1024, 32, image_size=side)
    return network


class Encoder(nn.Module):
    """A class token before ``nn.TransformerEncoder``; under a causal mask it comes last.

    Args:
        side: Of the images.
        mask: ``padding`` for every third token, ``causal`` for all later ones, or none.
    """

    def __init__(self, side: int, mask: str = "") -> None:
        super().__init__()
        self.mask = mask
        self.patches = nn.Conv2d(3, 192, 16, 16)
        self.token = nn.Parameter(torch.randn(1, 1, 192))
        self.places = nn.Parameter(torch.randn(1, 1 + (side // 16) ** 2, 192))
        self.blocks = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(192, 3, 768, batch_first=True), 12
        )

    def forward(self, images: Tensor) -> Tensor:
        """The class token ``(M,192)``."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        both = (self.token.expand(len(tokens), -1, -1), tokens)
        causal = self.mask == "causal"
        tokens = torch.cat(both[::-1] if causal else both, dim=1) + self.places
        options: dict[str, Any] = {}
        if self.mask == "padding":
            options["src_key_padding_mask"] = torch.zeros(tokens.shape[:2], dtype=torch.bool)
            options["src_key_padding_mask"][:, 1::3] = True
        elif causal:
            options["mask"] = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        result: Tensor = self.blocks(tokens, **options)[:, -1 if causal else 0]
        return result


class Grouped(nn.Module):
    """Twelve blocks in which three heads of queries read one of keys and values, causally."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 192, 16, 16)
        self.token = nn.Parameter(torch.randn(1, 1, 192))
        self.places = nn.Parameter(torch.randn(1, (side // 16) ** 2 + 1, 192))
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "norm1": nn.RMSNorm(192), "make": nn.Linear(192, 320), "join": nn.Linear(192, 192),
                "norm2": nn.RMSNorm(192), "up": nn.Linear(192, 768), "down": nn.Linear(768, 192),
            })
            for _ in range(12)
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """The class token, which comes last ``(M,192)``."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat((tokens, self.token.expand(len(tokens), -1, -1)), dim=1) + self.places
        for block in self.blocks:
            heads = block["make"](block["norm1"](tokens)).unflatten(-1, (5, 64)).transpose(1, 2)
            query, key, value = heads.split((3, 1, 1), dim=1)
            mixed = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )
            tokens = tokens + block["join"](mixed.transpose(1, 2).flatten(2))
            tokens = tokens + block["down"](F.silu(block["up"](block["norm2"](tokens))))
        return tokens[:, -1]


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
    "torchvision ViT": torchvision_vit,
    "open_clip CLIP": open_clip_tower,
    "transformers CLIP": lambda side: hugging_face(side, "CLIPVision"),
    "transformers DINOv2": lambda side: hugging_face(side, "Dinov2"),
    "transformers SigLIP": lambda side: hugging_face(side, "SiglipVision"),
    "nn.TransformerEncoder, class token": Encoder,
    "nn.TransformerEncoder, padding mask": lambda side: Encoder(side, "padding"),
    "nn.TransformerEncoder, causal mask": lambda side: Encoder(side, "causal"),
    "grouped queries, causal mask": Grouped,
    "CLIP RN50 of open_clip": clip_resnet,
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
    layer = next(result.name for result in model.layers_for(images) if result.default)
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
    requested = parser.parse_args(arguments)
    print("| network | layer | decomposition | match |\n| --- | --- | --- | --- |")
    for name in requested.network or NETWORKS:
        layer, *result = costs(NETWORKS[name](requested.side), requested.side)
        cells = [f"{cost:.1f}" + ("" if cost <= LIMIT else " (missed)") for cost in result]
        print(f"| {name} | {layer} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
