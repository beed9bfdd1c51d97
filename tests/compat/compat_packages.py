"""open_clip, sentence-transformers, facenet-pytorch and torchreid, from their own classes."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from compat_huggingface import clip
from compat_net import DEPTH, Net, halving
from torch import Tensor, nn

CLASS = "only the class token is read, so the last map is what the last block's attention reads"
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}


def open_clip_net(*, visual: bool = True, **vision: Any) -> Callable[[], nn.Module]:
    """The image tower of a CLIP built from a model configuration, or the whole of it."""

    def build() -> nn.Module:
        from open_clip.model import CLIP

        whole = CLIP(embed_dim=32, vision_cfg=vision, text_cfg=TEXT)
        return whole.visual if visual else whole

    return build


VIT = {"layers": 3, "width": 48, "head_width": 16, "patch_size": 16}


def timm_siglip() -> nn.Module:
    """open_clip's wrapper around timm's SigLIP, with the trunk exchanged for a small one."""
    import timm
    from open_clip.timm_model import TimmModel

    small = timm.create_model(
        "vit_base_patch16_siglip_224", pretrained=False, num_classes=0, img_size=64, depth=3,
        embed_dim=48, num_heads=3,
    )  # fmt: skip
    result = TimmModel(
        "vit_tiny_patch16_224", 48, image_size=64, pool="", proj="", pretrained=False
    )
    result.trunk = small
    return result


class Features(nn.Module):
    """sentence-transformers takes a dictionary of features; this makes it from images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.network({"pixel_values": images, "modality": "image"})[
            "sentence_embedding"
        ]
        return result


def sentence_clip() -> nn.Module:
    """A tiny CLIP folder, as sentence-transformers reads it."""
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import CLIPModel

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        clip().save_pretrained(folder)
        words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "a": 3}
        (folder / "vocab.json").write_text(json.dumps(words))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        tokenizer = transformers.CLIPTokenizer(
            str(folder / "vocab.json"), str(folder / "merges.txt")
        )
        images = transformers.CLIPImageProcessor(
            size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}
        )
        transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
        return SentenceTransformer(modules=[CLIPModel(str(folder))], device="cpu")


def sentence_images() -> nn.Module:
    return Features(sentence_clip())


def facenet() -> nn.Module:
    from facenet_pytorch import InceptionResnetV1

    return InceptionResnetV1(pretrained=None)


def plain_facenet() -> nn.Module:
    """The same layers without the normalisation at the end."""
    network = facenet()
    network.classify = True  # it then returns the logits, here those of an identity
    network.logits = nn.Identity()
    return network


def reid(file: str, kind: str, **options: Any) -> Callable[[], nn.Module]:
    """A network of torchreid from its own file: the package imports downloaders at the top."""

    def build() -> nn.Module:
        path = distribution("torchreid").locate_file(f"torchreid/reid/models/{file}.py")
        spec = importlib.util.spec_from_file_location(f"compat_reid_{file}", str(path))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if "block" in options:
            options["block"] = module.Bottleneck
        network: nn.Module = getattr(module, kind)(num_classes=4, **options)
        return network

    return build


def varied_hacnn() -> nn.Module:
    """Its regions begin at fixed places; weights that move them a little show the grid sampling."""
    network = reid("hacnn", "HACNN", feat_dim=32, use_gpu=False)()
    for name, parameter in network.named_parameters():
        if "fc2.weight" in name:
            nn.init.normal_(parameter, std=0.01)
    return network


NETS = [
    Net("open_clip ViT", "open_clip_torch", open_clip_net(image_size=(64, 96), **VIT), (64, 96),
        ("transformer.resblocks.2.ln_1", "transformer.resblocks.1"), (4, 6), DEPTH, tokens=True,
        prefix=1,
        route="export",
        why=CLASS),
    Net("open_clip ViT patch 14 of 64", "open_clip_torch",
        open_clip_net(image_size=64, layers=3, width=48, head_width=16, patch_size=14), (64, 64),
        ("transformer.resblocks.2.ln_1", "transformer.resblocks.1"), (4, 4), DEPTH, tokens=True,
        prefix=1, why=f"patches do not divide the picture; {CLASS}"),
    Net("open_clip ModifiedResNet", "open_clip_torch",
        open_clip_net(image_size=64, layers=(1, 1, 1, 1), width=16, head_width=16,
                      patch_size=None),
        (64, 64), ("layer4",), (2, 2), halving((2, 2)),
        route="export",
        why="attention pooling reads the map, its mean as the query"),
    Net("open_clip ConvNeXt", "open_clip_torch",
        open_clip_net(image_size=64, timm_model_name="convnext_atto",
                      timm_model_pretrained=False, timm_pool="", timm_proj="linear"),
        (64, 96), ("trunk.stages.3",), (2, 3), halving((2, 3)), why="pooling follows"),
    Net("open_clip SigLIP", "open_clip_torch", timm_siglip, (64, 64),
        ("trunk.norm", "trunk.blocks.2"), (4, 4), DEPTH, tokens=True,
        why="a learned query reads all tokens of the final norm"),
    Net("open_clip CoCa", "open_clip_torch",
        open_clip_net(image_size=64, attentional_pool=True, attn_pooler_heads=4, **VIT), (64, 64),
        ("attn_pool.ln_k", "transformer.resblocks.2"), (4, 4), DEPTH, tokens=True, prefix=1,
        why="256 learned queries read all tokens and are no 16 x 16 places"),
    Net("open_clip CLIP, whole", "open_clip_torch",
        open_clip_net(visual=False, image_size=64, **VIT), (64, 64),
        ("visual.transformer.resblocks.2.ln_1", "visual.transformer.resblocks.1"), (4, 4), DEPTH,
        tokens=True, prefix=1, output=0, why=f"its first output is the image's vector; {CLASS}"),
    Net("sentence-transformers CLIP", "sentence-transformers", sentence_images, (64, 64),
        ("network.0.model.vision_model.encoder.layers.2.layer_norm1",
         "network.0.model.vision_model.encoder.layers.1"),
        (4, 4), DEPTH, tokens=True, prefix=1, why=CLASS),
    Net("sentence-transformers CLIP, whole", "sentence-transformers", sentence_clip, (64, 64),
        ("0.model.vision_model.encoder.layers.2.layer_norm1",
         "0.model.vision_model.encoder.layers.1"),
        (4, 4), DEPTH, tokens=True, prefix=1,
        forward=lambda network, images: network({"pixel_values": images, "modality": "image"}),
        output="sentence_embedding", why=f"takes a dictionary of features; {CLASS}"),
    Net("facenet InceptionResnetV1", "facenet-pytorch", facenet, (160, 160), ("block8",), (3, 3),
        ((17, 17), (8, 8), (3, 3)), plain=plain_facenet, quick=False,
        route="export",
        why="convolutions without padding; it normalises its own output"),
    Net("torchreid OSNet", "torchreid", reid("osnet", "osnet_x0_25", pretrained=False), (128, 64),
        ("conv5",), (8, 4), halving((8, 4)),
        route="export",
        why="pooling follows"),
    Net("torchreid PCB", "torchreid",
        reid("pcb", "PCB", loss="softmax", block=None, layers=[1, 1, 1, 1]), (192, 64),
        ("layer4",), (12, 4), ((48, 16), (24, 8), (12, 4)),
        why="six stripes, each normalised; the last stage does not stride"),
    Net("torchreid MLFN", "torchreid",
        reid("mlfn", "MLFN", groups=4, channels=[16, 32, 48, 64, 96], embed_dim=32), (128, 64),
        ("maxpool",), (32, 16), None, or_warned={"feature.15": (4, 2)},
        why="factors of every block go to the embedding beside the last map"),
    Net("torchreid HACNN", "torchreid", varied_hacnn, (160, 64), ("conv",), (80, 32), None,
        or_warned={"inception1": (40, 16), "inception2": (20, 8), "inception3": (10, 4)},
        why="local regions of early maps go to the embedding beside the global branch"),
]  # fmt: skip
