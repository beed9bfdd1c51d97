"""Networks of timm, with what is right for them by their source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from compat_net import DEPTH, Grid, Net, halving
from torch import Tensor, nn

BLOCKS = {"depth": 3, "embed_dim": 48, "num_heads": 3}
POOLED = "blocks are followed by pooling of all patch tokens; the final norm is position-wise"
CLASS = "only the class token is read, so the last map is what the last block's attention reads"
NORM = "the norm after the last stage is position-wise"
LAST = "global pooling follows"


def timm_net(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A network of timm without its classifier."""

    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=0, **options)

    return build


def timm_class(module: str, kind: str, **options: Any) -> Callable[[], nn.Module]:
    """A class of timm with sizes that its registered variants do not let one choose."""

    def build() -> nn.Module:
        from importlib import import_module

        result = import_module(f"timm.models.{module}")
        named = {
            key: getattr(result, value.removeprefix("@"))
            if isinstance(value, str) and value.startswith("@")
            else value
            for key, value in options.items()
        }
        return getattr(result, kind)(num_classes=0, **named)

    return build


def local_levit() -> nn.Module:
    """LeViT with position biases: what it starts with, zero, makes every query see all alike.

    It gets coarser by attention without a path beside it, so nothing else keeps places apart.
    """
    network = timm_net("levit_128s")()
    for part in network.modules():
        if hasattr(part, "attention_biases"):
            index = part.attention_bias_idxs
            queries, keys = (int(sides**0.5) for sides in index.shape)
            ends = [torch.linspace(0, keys - 1, sides) for sides in (queries, keys)]
            cells = [torch.cartesian_prod(end, end) for end in ends]
            with torch.no_grad():
                part.attention_biases[:, index] = -3 * torch.cdist(cells[0], cells[1])
    return network


def hiera_order(grid: Grid) -> Tensor:
    """Raster positions of Hiera's tokens at the end: its three poolings use up every unrolling."""
    return torch.arange(grid[0] * grid[1])


CNNS = [
    Net("timm resnet18", "timm", timm_net("resnet18"), (64, 96), ("layer4",), (2, 3),
        halving((2, 3)), why=LAST, route="save", quick=True),
    Net("timm resnet18 at 32 px", "timm", timm_net("resnet18"), (32, 32), ("layer3",), (2, 2),
        ((8, 8), (4, 4), (2, 2)), why="layer4 is one cell at this size", quick=True),
    Net("timm seresnext26d", "timm", timm_net("seresnext26d_32x4d"), (64, 96), ("layer4",), (2, 3),
        halving((2, 3)), why=LAST),
    Net("timm res2net50", "timm", timm_net("res2net50_26w_4s", layers=(1, 1, 1, 1)), (64, 96),
        ("layer4",), (2, 3), halving((2, 3)), why=LAST),
    Net("timm resnetv2_18", "timm", timm_net("resnetv2_18"), (64, 96), ("norm", "stages.3"), (2, 3),
        halving((2, 3)),
        route="state", backbone="timm:resnetv2_18",
        why=NORM),
    Net("timm regnety_002", "timm", timm_net("regnety_002"), (64, 96), ("s4",), (2, 3),
        halving((2, 3)), why=LAST, route="state", backbone="timm:regnety_002"),
    Net("timm tf_efficientnet_b0", "timm", timm_net("tf_efficientnet_b0"), (64, 96), ("bn2",),
        (2, 3), halving((2, 3)), route="save",
        why="a convolution, norm and activation (conv_head, bn2) follow the blocks"),
    Net("timm mixnet_s", "timm", timm_net("mixnet_s"), (64, 96), ("bn2",), (2, 3), halving((2, 3)),
        route="save",
        why="conv_head and bn2 follow the blocks"),
    Net("timm mobilenetv3_small_050", "timm", timm_net("mobilenetv3_small_050"), (64, 96),
        ("blocks.5", "blocks"), (2, 3), halving((2, 3)), route="export", quick=True,
        why="conv_head comes after the pooling and sees one cell"),
    Net("timm ghostnet_050", "timm", timm_net("ghostnet_050"), (64, 96), ("blocks.9", "blocks"),
        (2, 3), halving((2, 3)),
        route="save",
        why="conv_head comes after the pooling"),
    Net("timm rexnet_100", "timm", timm_net("rexnet_100"), (64, 96), ("features.16", "features"),
        (2, 3), halving((2, 3)),
        route="save",
        why=LAST),
    Net("timm densenet121", "timm", timm_net("densenet121"), (64, 96), ("features.norm5",), (2, 3),
        halving((2, 3)), why="norm5 has the activation of the last dense block"),
    Net("timm dla34", "timm", timm_net("dla34"), (64, 96), ("level5",), (2, 3), halving((2, 3)),
        why="a level joins its two trees in its root, which ends it"),
    Net("timm hrnet_w18_small", "timm", timm_net("hrnet_w18_small"), (64, 96), ("final_layer",),
        (2, 3), None, why="four resolutions run side by side until final_layer joins them"),
    Net("timm inception_v3", "timm", timm_net("inception_v3"), (139, 171), ("Mixed_7c",), (3, 4),
        ((15, 19), (7, 9), (3, 4)), why="convolutions without padding: sides do not halve"),
    Net("timm nfnet_l0", "timm", timm_net("nfnet_l0"), (64, 96), ("final_act",), (2, 3),
        halving((2, 3)), why="final_conv and its activation follow the stages"),
    Net("timm vgg11", "timm", timm_net("vgg11", mlp_ratio=0.02), (64, 96), ("features",), (2, 3),
        halving((2, 3)), why="pooling is the end of each of its stages"),
    Net("timm repvgg_a0", "timm", timm_net("repvgg_a0"), (64, 96), ("stages.3",), (2, 3),
        halving((2, 3)), why=LAST),
    Net("timm cspresnet50", "timm", timm_net("cspresnet50"), (64, 96), ("stages.3",), (2, 3),
        halving((2, 3)), why=LAST),
    Net("timm xception41", "timm", timm_net("xception41"), (64, 96), ("blocks.12",), (2, 3),
        halving((2, 3)), why=LAST),
    Net("timm convnextv2_atto", "timm", timm_net("convnextv2_atto"), (64, 96), ("stages.3",),
        (2, 3), halving((2, 3)), why="head.norm comes after the pooling", route="export"),
    Net("timm convnext_atto", "timm", timm_net("convnext_atto"), (70, 101), ("stages.3",), (2, 3),
        ((17, 25), (8, 12), (4, 6), (2, 3)),
        route="state", backbone="timm:convnext_atto",
        why="sides are no multiple of the stride 4"),
    Net("timm inception_next_atto", "timm", timm_net("inception_next_atto"), (64, 96),
        ("stages.3",), (2, 3), halving((2, 3)),
        route="state", backbone="timm:inception_next_atto",
        why=LAST),
    Net("timm convmixer", "timm",
        timm_class("convmixer", "ConvMixer", dim=48, depth=3, patch_size=7), (64, 96),
        ("blocks.2", "blocks"), (9, 13), DEPTH, why="patches of 7 do not divide the picture"),
    Net("timm mambaout_femto", "timm", timm_net("mambaout_femto"), (64, 96), ("stages.3",), (2, 3),
        halving((2, 3)), why="channels last; the head's norm comes after the pooling"),
]  # fmt: skip

PYRAMIDS = [
    Net("timm swin_tiny", "timm",
        timm_net("swin_tiny_patch4_window7_224", img_size=128, embed_dim=24, window_size=4,
                 num_heads=(1, 2, 4, 8)),
        (128, 128), ("norm", "layers.3"), (4, 4), halving((4, 4)), tokens=True, why=NORM,
        quick=True, route="export"),
    Net("timm swinv2_tiny", "timm",
        timm_net("swinv2_tiny_window8_256", img_size=128, embed_dim=24, window_size=4,
                 num_heads=(1, 2, 4, 8)),
        (128, 128), ("norm", "layers.3"), (4, 4), halving((4, 4)), tokens=True, why=NORM),
    Net("timm maxvit_pico_rw", "timm", timm_net("maxvit_pico_rw_256", img_size=128), (128, 128),
        ("norm", "stages.3"), (4, 4), halving((4, 4)), tokens=True, why=NORM),
    Net("timm coatnet_nano_rw", "timm", timm_net("coatnet_nano_rw_224", img_size=128), (128, 128),
        ("norm", "stages.3"), (4, 4), halving((4, 4)), tokens=True, why=NORM),
    Net("timm pvt_v2_b0", "timm", timm_net("pvt_v2_b0"), (128, 192),
        ("stages.3", "stages.3.norm"), (4, 6), halving((4, 6)), tokens=True,
        route="state", backbone="timm:pvt_v2_b0",
        why="a stage ends in a position-wise norm and puts its tokens back into a map"),
    Net("timm twins_pcpvt_small", "timm", timm_net("twins_pcpvt_small", img_size=128), (128, 128),
        ("norm", "blocks.3.2"), (4, 4), halving((4, 4)), tokens=True, why=NORM),
    Net("timm twins_svt_small", "timm", timm_net("twins_svt_small", img_size=128), (128, 128),
        ("norm", "blocks.3.3"), (4, 4), halving((4, 4)), tokens=True, why=NORM),
    Net("timm poolformer_s12", "timm", timm_net("poolformer_s12"), (128, 192), ("stages.3",),
        (4, 6), halving((4, 6)), tokens=True, why="head.norm comes after the pooling"),
    Net("timm caformer_s18", "timm", timm_net("caformer_s18"), (128, 192), ("stages.3",), (4, 6),
        halving((4, 6)), tokens=True, why="head.norm comes after the pooling"),
    Net("timm hiera_tiny", "timm",
        timm_net("hiera_tiny_224", img_size=(128, 128), embed_dim=24), (128, 128), ("blocks.11",),
        (4, 4), halving((4, 4)), tokens=True, order=hiera_order,
        why="tokens are unrolled for three poolings, which have used this up at the last block"),
    Net("timm davit_tiny", "timm",
        timm_net("davit_tiny", embed_dims=(16, 32, 64, 96), num_heads=(1, 2, 4, 6)), (128, 192),
        ("stages.3",), (4, 6), halving((4, 6)), tokens=True,
        why="head.norm comes after the pooling"),
    Net("timm focalnet", "timm",
        timm_class("focalnet", "FocalNet", depths=(2, 2, 6, 2), embed_dim=24), (128, 192),
        ("norm", "layers.3"), (4, 6), halving((4, 6)), tokens=True, why=NORM),
    Net("timm fastvit_t8", "timm", timm_net("fastvit_t8"), (128, 192), ("final_conv",), (4, 6),
        halving((4, 6)), tokens=True, spread=True,
        why="final_conv is the last block, and pooling follows"),
    Net("timm edgenext_xx_small", "timm", timm_net("edgenext_xx_small"), (128, 192), ("stages.3",),
        (4, 6), halving((4, 6)), tokens=True,
        route="state", backbone="timm:edgenext_xx_small",
        why="head.norm comes after the pooling"),
    Net("timm mobilevit_xxs", "timm", timm_net("mobilevit_xxs"), (128, 192), ("final_conv",),
        (4, 6), halving((4, 6)), tokens=True, spread=True,
        route="save",
        why="a convolution follows the stages"),
    Net("timm mobilevitv2_050", "timm", timm_net("mobilevitv2_050"), (128, 192), ("stages.4",),
        (4, 6), halving((4, 6)), tokens=True, spread=True,
        route="state", backbone="timm:mobilevitv2_050",
        why=LAST),
    Net("timm efficientformer_l1", "timm", timm_net("efficientformer_l1"), (224, 224),
        ("norm", "stages.3"), (7, 7), halving((7, 7)), tokens=True,
        why="the last stage has maps first and tokens from one block on; norm is position-wise"),
    Net("timm efficientformerv2", "timm",
        timm_class("efficientformer_v2", "EfficientFormerV2", img_size=128, depths=(2, 2, 6, 4),
                   embed_dims=(16, 24, 48, 64), num_vit=2),
        (128, 128), ("norm", "stages.3"), (4, 4), halving((4, 4)), tokens=True, spread=True,
        why=NORM),
    Net("timm levit_128s", "timm", local_levit, (224, 224), ("stages.2",), (4, 4),
        ((14, 14), (7, 7), (4, 4)), tokens=True, spread=True,
        why="the mean of all tokens follows; its position biases prefer what is near, as trained"),
    Net("timm nest", "timm",
        timm_class("nest", "Nest", img_size=128, embed_dims=(24, 48, 96), num_heads=(1, 2, 4),
                   depths=(2, 2, 4)),
        (128, 128), ("norm", "levels.2"), (8, 8), halving((8, 8), 3), tokens=True, why=NORM),
    Net("timm mvitv2_tiny", "timm", timm_net("mvitv2_tiny", img_size=(128, 128)), (128, 128),
        ("norm", "stages.3"), (4, 4), halving((4, 4)), tokens=True, why=NORM),
    Net("timm gcvit_xxtiny", "timm", timm_net("gcvit_xxtiny"), (224, 224), ("stages.3",), (7, 7),
        halving((7, 7)), tokens=True, why=LAST),
    Net("timm tiny_vit_5m", "timm", timm_net("tiny_vit_5m_224"), (224, 224), ("stages.3",), (7, 7),
        halving((7, 7)), tokens=True, spread=True, why="head.norm comes after the pooling"),
    Net("timm visformer_tiny", "timm", timm_net("visformer_tiny", img_size=128), (128, 128),
        ("norm", "stage3"), (4, 4), halving((4, 4), 3), tokens=True, why=NORM),
    Net("timm sequencer2d_s", "timm", timm_net("sequencer2d_s", img_size=64), (64, 64),
        ("norm", "stages.3"), (4, 4), ((9, 9), (4, 4)), tokens=True,
        why="patches of 7 do not divide 64; the norm is position-wise"),
    Net("timm pit_ti", "timm", timm_net("pit_ti_224", img_size=(96, 96)), (96, 96),
        ("transformers.2.blocks.3.norm1", "transformers.2.blocks.2"), (3, 3),
        ((11, 11), (6, 6), (3, 3)), tokens=True, prefix=1, why=CLASS),
    Net("timm volo", "timm",
        timm_class("volo", "VOLO", img_size=64, layers=(2, 1, 2, 1), embed_dims=(48, 96, 96, 96),
                   num_heads=(2, 4, 4, 4), mlp_ratio=2, downsamples=(True, False, False, False),
                   outlook_attention=(True, False, False, False)),
        (64, 64), ("network.4", "post_network.0.norm1", "post_network.0", "post_network.1.norm1"),
        (4, 4), ((8, 8), (4, 4)), tokens=True, prefix=1,
        why="class attention reads the map of the last stage, which it leaves as it is"),
]  # fmt: skip

PLAIN = [
    Net("timm vit class token", "timm",
        timm_net("vit_tiny_patch16_224", img_size=(64, 96), **BLOCKS), (64, 96),
        ("blocks.2.norm1", "blocks.1"), (4, 6), DEPTH, tokens=True, prefix=1, why=CLASS,
        quick=True, route="export"),
    Net("timm vit mean", "timm",
        timm_net("vit_tiny_patch16_224", img_size=(64, 96), global_pool="avg", **BLOCKS), (64, 96),
        ("blocks.2", "norm"), (4, 6), DEPTH, tokens=True, prefix=1,
        route="export",
        why=POOLED),
    Net("timm vit registers", "timm",
        timm_net("vit_medium_patch16_reg4_gap_256", img_size=(64, 96), **BLOCKS), (64, 96),
        ("blocks.2", "norm"), (4, 6), DEPTH, tokens=True, prefix=4,
        route="export",
        why=POOLED, quick=True),
    Net("timm vit patch 14 of 64", "timm",
        timm_net("vit_small_patch14_dinov2", img_size=(64, 96), init_values=0.1, **BLOCKS),
        (64, 96),
        ("blocks.2.norm1", "blocks.1"), (4, 6), DEPTH, tokens=True, prefix=1,
        route="export",
        why=f"patches of 14 do not divide the picture; {CLASS}", quick=True),
    Net("timm vit dynamic size", "timm",
        timm_net("vit_tiny_patch16_224", dynamic_img_size=True, dynamic_img_pad=True, **BLOCKS),
        (60, 90), ("blocks.2.norm1", "blocks.1"), (4, 6), DEPTH, tokens=True, prefix=1,
        why=f"the picture is padded to whole patches; {CLASS}"),
    Net("timm vit clip", "timm",
        timm_net("vit_base_patch16_clip_224", img_size=(64, 96), **BLOCKS), (64, 96),
        ("blocks.2.norm1", "blocks.1"), (4, 6), DEPTH, tokens=True, prefix=1, why=CLASS),
    Net("timm vit_tiny_patch16 in full", "timm", timm_net("vit_tiny_patch16_224", img_size=64),
        (64, 64), ("blocks.11.norm1", "blocks.10"), (4, 4), DEPTH, tokens=True, prefix=1,
        why=CLASS),
    Net("timm vit hybrid", "timm", timm_net("vit_tiny_r_s16_p8_224", img_size=(128, 128), depth=3),
        (128, 128), ("blocks.2.norm1", "blocks.1"), (4, 4), DEPTH, tokens=True, prefix=1,
        why=f"the convolutions with finer maps are inside the patch embedding; {CLASS}"),
    Net("timm deit distilled", "timm",
        timm_net("deit_tiny_distilled_patch16_224", img_size=(64, 96), **BLOCKS), (64, 96),
        ("blocks.2.norm1", "blocks.1"), (4, 6), DEPTH, tokens=True, prefix=2,
        route="export",
        why=f"class and distillation token; {CLASS}"),
    Net("timm beit", "timm", timm_net("beit_base_patch16_224", img_size=(64, 96), **BLOCKS),
        (64, 96), ("blocks.2",), (4, 6), DEPTH, tokens=True, prefix=1,
        route="export",
        why="the mean of the patch tokens follows, the class token is left out"),
    Net("timm eva02", "timm", timm_net("eva02_tiny_patch14_224", img_size=(70, 98), **BLOCKS),
        (70, 98), ("blocks.2",), (5, 7), DEPTH, tokens=True, prefix=1,
        route="export",
        why="the mean of the patch tokens follows"),
    Net("timm dinov3", "timm", timm_net("vit_small_patch16_dinov3", img_size=(64, 96), **BLOCKS),
        (64, 96), ("blocks.2", "norm"), (4, 6), DEPTH, tokens=True, prefix=5, why=POOLED),
    Net("timm siglip", "timm",
        timm_net("vit_base_patch16_siglip_224", img_size=(64, 96), **BLOCKS), (64, 96),
        ("norm", "blocks.2"), (4, 6), DEPTH, tokens=True,
        route="export",
        why="one learned query reads all tokens of the final norm, which is position-wise"),
    Net("timm sam vit", "timm",
        timm_net("samvit_base_patch16", img_size=128, depth=3, embed_dim=48, num_heads=3,
                 window_size=4, global_attn_indexes=(2,)),
        (128, 128), ("neck",), (8, 8), DEPTH, tokens=True,
        why="two convolutions and norms (neck) follow the blocks"),
    Net("timm cait", "timm",
        timm_net("cait_xxs24_224", img_size=(64, 64), depth=3, embed_dim=48, num_heads=4),
        (64, 64), ("blocks.2", "blocks_token_only.0.norm1", "blocks_token_only.1.norm1"), (4, 4),
        DEPTH, tokens=True, prefix=1,
        route="export",
        why="two class attentions read the tokens of the last block"),
    Net("timm xcit", "timm",
        timm_net("xcit_nano_12_p16_224", img_size=(64, 64), depth=3, embed_dim=48, num_heads=4),
        (64, 96),
        ("blocks.2", "cls_attn_blocks.0.norm1", "cls_attn_blocks.0", "cls_attn_blocks.1.norm1"),
        (4, 6), DEPTH, tokens=True, spread=True, prefix=1,
        why="two class attentions read the tokens of the last block"),
    Net("timm convit", "timm",
        timm_net("convit_tiny", img_size=(64, 64), depth=4, local_up_to_layer=2), (64, 64),
        ("blocks.3.norm1", "blocks.2"), (4, 4), DEPTH, tokens=True, prefix=1,
        why=f"the class token joins at block 2; {CLASS}"),
    Net("timm tnt", "timm", timm_net("tnt_s_legacy_patch16_224", img_size=64, depth=2), (64, 64),
        ("blocks.1.norm_out",), (4, 4), None, tokens=True, prefix=1,
        why=f"a block gives the tokens of pixels first, which are no map of the picture; {CLASS}"),
    Net("timm mixer", "timm",
        timm_class("mlp_mixer", "MlpMixer", img_size=64, patch_size=16, num_blocks=3,
                   embed_dim=48),
        (64, 64), ("norm", "blocks.2"), (4, 4), DEPTH, tokens=True,
        route="export",
        why=POOLED),
    Net("timm resmlp", "timm",
        timm_class("mlp_mixer", "MlpMixer", img_size=64, patch_size=16, num_blocks=3, embed_dim=48,
                   mlp_ratio=4, block_layer="@ResBlock", norm_layer="@Affine"),
        (64, 64), ("norm", "blocks.2"), (4, 4), DEPTH, tokens=True, why=POOLED),
    Net("timm gmlp", "timm",
        timm_class("mlp_mixer", "MlpMixer", img_size=64, patch_size=16, num_blocks=3, embed_dim=48,
                   mlp_ratio=4, block_layer="@SpatialGatingBlock", mlp_layer="@GatedMlp"),
        (64, 64), ("norm", "blocks.2"), (4, 4), DEPTH, tokens=True, why=POOLED),
    Net("timm crossvit_tiny", "timm", timm_net("crossvit_tiny_240"), (240, 240), (), (20, 20),
        None, tokens=True, prefix=1, refused=r"branch|parallel|bypass|every|layer=",
        or_warned={"pos_drop@1": (14, 14), "blocks.1": (20, 20), "blocks.1.blocks.0": (20, 20),
                   "blocks.1.blocks.1": (14, 14), "blocks.2.blocks.0": (20, 20),
                   "blocks.2.blocks.1": (14, 14)},
        why="two token grids run side by side to the end: no map is passed by everything, and that "
            "is right which the least bypasses, with the share in a warning"),
]  # fmt: skip

NETS = CNNS + PYRAMIDS + PLAIN
