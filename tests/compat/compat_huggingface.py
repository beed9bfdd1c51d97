"""Networks of transformers, built from small configurations with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from compat_net import DEPTH, Grid, Net, halving
from torch import Tensor, nn

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 96,
}
WIDE = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "mlp_ratio": 2}
SWIN = {
    "image_size": 128,
    "patch_size": 4,
    "embed_dim": 24,
    "depths": [2, 2, 6, 2],
    "num_heads": [1, 2, 4, 8],
    "window_size": 4,
}
STAGES = {"hidden_sizes": [16, 24, 32, 48], "depths": [2, 2, 6, 2]}
PVT = {
    "hidden_sizes": [16, 24, 32, 48],
    "depths": [2, 2, 2, 2],
    "num_attention_heads": [1, 2, 2, 3],
    "mlp_ratios": [2, 2, 2, 2],
}
CLASS = "only the class token is read, so the last map is what the last block's attention reads"
MEAN = "the mean of all tokens follows; a final norm is position-wise"


def hf(name: str, *, model: dict[str, Any] | None = None, **config: Any) -> Callable[[], nn.Module]:
    """``NAMEModel(NAMEConfig(...))``, or ``NAME`` where that is a class of its own."""

    def build() -> nn.Module:
        import transformers

        kind = getattr(transformers, name)
        network: nn.Module = kind(kind.config_class(**config), **(model or {}))
        return network

    return build


def class_token(answer: Any) -> Tensor:
    result: Tensor = answer.last_hidden_state[:, 0]
    return result


def patch_mean(answer: Any) -> Tensor:
    result: Tensor = answer.last_hidden_state.mean(1)
    return result


def map_mean(answer: Any) -> Tensor:
    result: Tensor = answer.last_hidden_state.mean((2, 3))
    return result


class PatchesIn(nn.Module):
    """SigLIP 2 takes patches that its processor has cut; this cuts them from an image."""

    def __init__(self, network: nn.Module, patch: int = 16) -> None:
        super().__init__()
        self.network, self.patch = network, patch

    def forward(self, images: Tensor) -> Tensor:
        m, c, height, width = images.shape
        h, w, p = height // self.patch, width // self.patch, self.patch
        cut = images.view(m, c, h, p, w, p).permute(0, 2, 4, 3, 5, 1).reshape(m, h * w, p * p * c)
        shapes = torch.tensor([[h, w]] * m)
        mask = torch.ones(m, h * w, dtype=torch.long)
        result: Tensor = self.network(
            cut, pixel_attention_mask=mask, spatial_shapes=shapes
        ).pooler_output
        return result


def siglip2() -> nn.Module:
    return PatchesIn(hf("Siglip2VisionModel", patch_size=16, num_patches=16, **SMALL)())


def clip() -> nn.Module:
    import transformers

    text = {"vocab_size": 64, "max_position_embeddings": 16, **SMALL}
    config = transformers.CLIPConfig(
        text_config=text,
        vision_config={"image_size": 64, "patch_size": 16, **SMALL},
        projection_dim=32,
    )
    return transformers.CLIPModel(config)


def unrolled(grid: Grid) -> Tensor:
    """Hiera's last tokens are in raster order: its poolings have used up every unrolling."""
    return torch.arange(grid[0] * grid[1])


def before(prefix: str, norm: str = "layernorm_before") -> tuple[str, str]:
    """The input of the last block's attention, and the output of the block before: 3 blocks."""
    return (f"{prefix}.2.{norm}", f"{prefix}.1")


POOLER = {"model": {"add_pooling_layer": False}}

NETS = [
    Net("hf ViT", "transformers", hf("ViTModel", image_size=(64, 96), **POOLER, **SMALL), (64, 96),
        before("layers"), (4, 6), DEPTH, tokens=True, prefix=1, output=class_token,
        route="export",
        why=CLASS),
    Net("hf DeiT", "transformers", hf("DeiTModel", image_size=(64, 96), **POOLER, **SMALL),
        (64, 96), before("layers"), (4, 6), DEPTH, tokens=True, prefix=2, output=class_token,
        why=f"class and distillation token; {CLASS}"),
    Net("hf BEiT", "transformers", hf("BeitModel", image_size=64, use_mean_pooling=True, **SMALL),
        (64, 64), ("layers.2",), (4, 4), DEPTH, tokens=True, prefix=1, output="pooler_output",
        route="export",
        why="the mean of the patch tokens follows"),
    Net("hf Data2Vec", "transformers",
        hf("Data2VecVisionModel", image_size=64, use_mean_pooling=True,
           model={"add_pooling_layer": True}, **SMALL),
        (64, 64),
        ("encoder.layer.2",), (4, 4), DEPTH, tokens=True, prefix=1, output="pooler_output",
        why="the mean of the patch tokens follows"),
    Net("hf ViTMSN", "transformers", hf("ViTMSNModel", image_size=64, **SMALL), (64, 64),
        before("layers"), (4, 4), DEPTH, tokens=True, prefix=1, output=class_token, why=CLASS),
    Net("hf I-JEPA", "transformers", hf("IJepaModel", image_size=64, **POOLER, **SMALL), (64, 64),
        ("layernorm", "layers.2"), (4, 4), DEPTH, tokens=True, output=patch_mean, why=MEAN),
    Net("hf DINOv2", "transformers", hf("Dinov2Model", image_size=70, patch_size=14, **WIDE),
        (70, 98), before("encoder.layer", "norm1"), (5, 7), DEPTH, tokens=True, prefix=1,
        output="pooler_output",
        route="export",
        why=CLASS),
    Net("hf DINOv2 of 256 px", "transformers",
        hf("Dinov2Model", image_size=70, patch_size=14, **WIDE), (256, 256),
        before("encoder.layer", "norm1"), (18, 18), DEPTH, tokens=True, prefix=1,
        output="pooler_output", why=f"patches of 14 do not divide 256; {CLASS}"),
    Net("hf DINOv2 registers", "transformers",
        hf("Dinov2WithRegistersModel", image_size=70, patch_size=14, **WIDE), (64, 90),
        before("encoder.layer", "norm1"), (4, 6), DEPTH, tokens=True, prefix=5,
        output="pooler_output", why=f"patches of 14 do not divide the picture; {CLASS}"),
    Net("hf DINOv3", "transformers",
        hf("DINOv3ViTModel", image_size=64, num_register_tokens=4, **SMALL), (64, 96),
        before("model.layer", "norm1"), (4, 6), DEPTH, tokens=True, prefix=5,
        output="pooler_output", why=CLASS),
    Net("hf DINOv3 ConvNeXt", "transformers", hf("DINOv3ConvNextModel", **STAGES), (128, 192),
        ("model.stages.3", "model"), (4, 6), halving((4, 6)), output="pooler_output",
        why="the norm after it also gives tokens, of which the mean alone is read"),
    Net("hf CLIP vision", "transformers",
        hf("CLIPVisionModelWithProjection", image_size=64, patch_size=16, projection_dim=32,
           **SMALL),
        (64, 64), before("vision_model.encoder.layers", "layer_norm1"), (4, 4), DEPTH, tokens=True,
        prefix=1, output="image_embeds",
        route="export",
        why=CLASS),
    Net("hf CLIP patch 14 of 64", "transformers",
        hf("CLIPVisionModelWithProjection", image_size=64, patch_size=14, projection_dim=32,
           **SMALL),
        (64, 64), before("vision_model.encoder.layers", "layer_norm1"), (4, 4), DEPTH, tokens=True,
        prefix=1, output="image_embeds", why=f"patches do not divide the picture; {CLASS}"),
    Net("hf CLIP, whole", "transformers", clip, (64, 64),
        before("vision_model.encoder.layers", "layer_norm1"), (4, 4), DEPTH, tokens=True, prefix=1,
        forward=lambda network, images: network.get_image_features(images), output="pooler_output",
        why=f"its first argument is text, and images go to get_image_features; {CLASS}"),
    Net("hf BLIP vision", "transformers",
        hf("BlipVisionModel", image_size=64, initializer_range=0.02, **SMALL), (64, 64),
        before("encoder.layers", "layer_norm1"), (4, 4), DEPTH, tokens=True, prefix=1,
        output="pooler_output", why=CLASS),
    Net("hf SigLIP", "transformers", hf("SiglipVisionModel", image_size=64, **SMALL), (64, 64),
        ("post_layernorm", "encoder.layers.2"), (4, 4), DEPTH, tokens=True,
        output="pooler_output",
        route="export",
        why="a learned query reads all tokens of the final norm"),
    Net("hf SigLIP 2", "transformers", siglip2, (64, 96),
        ("network.post_layernorm", "network.encoder.layers.2"), (4, 6), DEPTH, tokens=True,
        why="takes cut patches; a learned query reads all tokens of the final norm"),
    Net("hf Swin", "transformers", hf("SwinModel", **SWIN), (128, 192),
        ("layernorm", "encoder.layers.3"), (4, 6), halving((4, 6)), tokens=True,
        output="pooler_output",
        route="export",
        why=MEAN),
    Net("hf SwinV2", "transformers", hf("Swinv2Model", **SWIN), (128, 128),
        ("layernorm", "encoder.layers.3"), (4, 4), halving((4, 4)), tokens=True,
        output="pooler_output", why=MEAN),
    Net("hf ConvNeXt", "transformers", hf("ConvNextModel", **STAGES), (128, 192),
        ("encoder.stages.3",), (4, 6), halving((4, 6)), output="pooler_output",
        route="export",
        why="the norm comes after the pooling"),
    Net("hf ConvNeXtV2", "transformers", hf("ConvNextV2Model", **STAGES), (128, 192),
        ("encoder.stages.3",), (4, 6), halving((4, 6)), output="pooler_output",
        why="the norm comes after the pooling"),
    Net("hf ResNet", "transformers",
        hf("ResNetModel", embedding_size=16, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1],
           layer_type="basic"),
        (64, 96), ("encoder.stages.3",), (2, 3), halving((2, 3)), output="pooler_output",
        route="export",
        why="pooling follows"),
    Net("hf PVT", "transformers", hf("PvtModel", image_size=128, **PVT), (128, 128),
        ("encoder.block.3.1.layer_norm_1", "encoder.block.3.0"), (4, 4), halving((4, 4)),
        tokens=True, prefix=1, output=class_token,
        why=f"a class token in the last stage alone; {CLASS}"),
    Net("hf PVTv2", "transformers", hf("PvtV2Model", **PVT), (128, 192),
        ("encoder.layers.3.layer_norm", "encoder.layers.3"), (4, 6), halving((4, 6)),
        tokens=True, output=map_mean,
        why="a stage ends in a position-wise norm"),
    Net("hf FocalNet", "transformers",
        hf("FocalNetModel", image_size=128, embed_dim=16, depths=[2, 2, 6, 2],
           focal_levels=[1, 1, 1, 1], focal_windows=[3, 3, 3, 3]),
        (128, 192), ("layernorm", "encoder.stages.3"), (4, 6), halving((4, 6)), tokens=True,
        output="pooler_output", why=MEAN),
    Net("hf PoolFormer", "transformers", hf("PoolFormerModel", **STAGES), (128, 192),
        ("encoder.block.3.1", "encoder"), (4, 6), halving((4, 6)), tokens=True, output=map_mean,
        route="export",
        why="its blocks are named for pooling and pool nothing away"),
    Net("hf Hiera", "transformers",
        hf("HieraModel", image_size=[128, 128], embed_dim=24, depths=[1, 2, 3, 1],
           num_heads=[1, 2, 4, 8]),
        (128, 128), ("encoder.stages.3", "encoder"), (4, 4), halving((4, 4)), tokens=True,
        order=unrolled, output="pooler_output",
        why="tokens are unrolled for three poolings, which have used this up at the last stage"),
    Net("hf MobileViT", "transformers",
        hf("MobileViTModel", image_size=128, hidden_sizes=[24, 32, 40],
           neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 96], num_attention_heads=2),
        (128, 192), ("conv_1x1_exp",), (4, 6), halving((4, 6)), tokens=True, spread=True,
        output="pooler_output", why="a convolution follows the stages"),
]  # fmt: skip
