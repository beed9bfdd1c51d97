"""Tiny networks of transformers, open_clip and sentence-transformers, with random weights."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

SIDE = 32
_VIT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": SIDE, "patch_size": 8,
}  # fmt: skip
_TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def _square(side: int = SIDE) -> dict[str, int]:
    return {"height": side, "width": side}


def _clip(t: Any) -> Any:
    config = t.CLIPConfig(text_config=_TEXT, vision_config=_VIT, projection_dim=24)
    return t.CLIPModel(config)


def _siglip(t: Any) -> Any:
    text = {**_TEXT, "projection_size": 32, "hidden_size": 32}
    return t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=_VIT))


def _siglip2(t: Any) -> Any:
    vision = {key: value for key, value in _VIT.items() if key != "image_size"}
    vision["num_patches"] = 16
    text = {**_TEXT, "projection_size": 32, "hidden_size": 32}
    return t.Siglip2Model(t.Siglip2Config(text_config=text, vision_config=vision))


def _convolutions(t: Any, kind: str) -> Any:
    config = getattr(t, f"{kind}Config")
    if kind == "ResNet":
        return t.ResNetModel(
            config(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        )
    return t.ConvNextModel(config(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2))


def _swin(t: Any) -> Any:
    return t.SwinModel(
        t.SwinConfig(
            image_size=SIDE, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2],
            window_size=4,
        )
    )  # fmt: skip


def _shortest(t: Any, kind: str, side: int = 36) -> Any:
    return getattr(t, kind)(size={"shortest_edge": side}, crop_size=_square())


MODELS: dict[str, Callable[[Any], Any]] = {
    "CLIP": _clip,
    "CLIP vision": lambda t: t.CLIPVisionModel(t.CLIPVisionConfig(**_VIT)),
    "CLIP projecting": lambda t: t.CLIPVisionModelWithProjection(
        t.CLIPVisionConfig(**_VIT, projection_dim=24)
    ),
    "SigLIP": _siglip,
    "SigLIP vision": lambda t: t.SiglipVisionModel(t.SiglipVisionConfig(**_VIT)),
    "SigLIP 2": _siglip2,
    "DINOv2": lambda t: t.Dinov2Model(t.Dinov2Config(**_VIT)),
    "DINOv2 with registers": lambda t: t.Dinov2WithRegistersModel(
        t.Dinov2WithRegistersConfig(**_VIT)
    ),
    "DINOv3": lambda t: t.DINOv3ViTModel(t.DINOv3ViTConfig(**_VIT, num_register_tokens=4)),
    "ViT": lambda t: t.ViTModel(t.ViTConfig(**_VIT)),
    "DeiT": lambda t: t.DeiTModel(t.DeiTConfig(**_VIT)),
    "BEiT": lambda t: t.BeitModel(t.BeitConfig(**_VIT)),
    "ViTMSN": lambda t: t.ViTMSNModel(t.ViTMSNConfig(**_VIT)),
    "Swin": _swin,
    "ConvNeXt": lambda t: _convolutions(t, "ConvNext"),
    "ResNet": lambda t: _convolutions(t, "ResNet"),
}

PROCESSORS: dict[str, Callable[[Any], Any]] = {
    "CLIP": lambda t: _shortest(t, "CLIPImageProcessor"),
    "CLIP vision": lambda t: _shortest(t, "CLIPImageProcessor", SIDE),
    "CLIP projecting": lambda t: _shortest(t, "CLIPImageProcessor", 37),
    "SigLIP": lambda t: t.SiglipImageProcessor(size=_square()),
    "SigLIP vision": lambda t: t.SiglipImageProcessor(size=_square(), resample=2),
    "SigLIP 2": lambda t: t.Siglip2ImageProcessor(patch_size=8, max_num_patches=16),
    "DINOv2": lambda t: _shortest(t, "BitImageProcessor"),
    "DINOv2 with registers": lambda t: _shortest(t, "BitImageProcessor", 41),
    "DINOv3": lambda t: t.DINOv3ViTImageProcessor(size=_square()),
    "ViT": lambda t: t.ViTImageProcessor(size=_square()),
    "DeiT": lambda t: t.DeiTImageProcessor(size=_square(37), crop_size=_square()),
    "BEiT": lambda t: t.BeitImageProcessor(size=_square(), image_mean=[0.3, 0.4, 0.5]),
    "ViTMSN": lambda t: t.ViTImageProcessor(size=_square(), rescale_factor=1 / 127.5),
    "Swin": lambda t: t.ViTImageProcessor(size=_square(), do_normalize=False),
    "ConvNeXt": lambda t: t.ConvNextImageProcessor(size={"shortest_edge": SIDE}),
    "ResNet": lambda t: t.ConvNextImageProcessor(size={"shortest_edge": SIDE}, crop_pct=0.95),
}


def built(name: str) -> Any:
    """A tiny network of this family, in eval mode, whose vectors depend on the image."""
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        network = MODELS[name](transformers).eval()
        for parameter in network.parameters():  # zero biases and tiny weights hide mistakes
            torch.nn.init.normal_(parameter, std=0.15)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 1.5)
    return network


def written(name: str, folder: Path, *, processor: bool = True) -> Any:
    """Writes the family's network, and its processor, as transformers does; gives the network."""
    transformers = pytest.importorskip("transformers")
    network = built(name)
    network.save_pretrained(folder)
    if processor:
        PROCESSORS[name](transformers).save_pretrained(folder)
    return network


def photographs() -> list[Image.Image]:
    """Real pictures: two wide ones, one tall, one smaller than the input on one side."""
    data = pytest.importorskip("skimage.data")
    cat, coffee = data.chelsea(), data.coffee()
    pictures = [cat, coffee, cat[:, 100:190], coffee[100:129, 200:301]]
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in pictures]


class NetworkUsedError(AssertionError):
    """Somebody opened a socket."""


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection, and any look-up of a name, fails the test; nothing says to be offline."""

    def refuse(*_: object, **__: object) -> None:
        raise NetworkUsedError("the network was used")

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
