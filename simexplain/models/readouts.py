"""Which vector of a network is its embedding: one plain word for every package's networks.

A network of transformers, open_clip, sentence-transformers or timm, and the original CLIP, gives
several vectors that could be compared. :data:`OUTPUTS` names them, the default is the one that the
network's authors compare with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.errors import ModelError, first_line

OUTPUTS = ("projected", "class_token", "patch_mean", "pooled")
"""``projected``: in the space shared with text. ``class_token``: of the last layer. ``patch_mean``:
the mean of the last layer's patches, or of its map. ``pooled``: what the network pools itself."""

_CLASS_TOKENS = ("cls_token", "class_embedding", "class_token")
_TOWERS = ("vision_model", "image_model", "vision_tower", "visual")
_WITHOUT_RANDOM_MASK = "vit_mae"


@dataclass(frozen=True)
class Readout:
    """Calls a network with images and takes one vector for each.

    Attributes:
        package: Whose network it is, a key of ``READERS``.
        output: A word of :data:`OUTPUTS`, or None to return whatever the network returns.
    """

    package: str
    output: str | None

    def __call__(self, network: nn.Module, images: Tensor) -> Any:
        """Vectors ``(M,E)`` of images ``(M,3,H,W)``; whatever there is where no word is given.

        Raises:
            ModelError: If the network has no such vector, or does not take images of this size.
        """
        try:
            return READERS[self.package](network, images, self.output)
        except (ValueError, AssertionError) as error:
            if isinstance(error, ModelError):
                raise
            height, width = images.shape[-2:]
            raise ModelError(
                f"{type(network).__name__} does not take images of {height}x{width} "
                f"({first_line(error)}); give its own size with --size (size=)."
            ) from error


def readout_of(network: nn.Module, output: Any = None) -> Readout | None:
    """How to read a network of a known package, or None where calling it is all there is to do.

    Args:
        network: Any module.
        output: A word of :data:`OUTPUTS`; None is the default; anything else (a key, an index, a
            function) is left to the caller, which gets what the network returns.
    """
    package = package_of(network)
    if package is None or (package == "timm" and output not in OUTPUTS):
        return None
    if output is None:
        return Readout(package, default_output(network))
    return Readout(package, output if output in OUTPUTS else None)


def package_of(network: nn.Module) -> str | None:
    """Whose network it is: a key of ``READERS``, or None for any other module."""
    homes = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(network).__mro__}
    if ("transformers", "PreTrainedModel") in homes:
        return "transformers"
    if ("sentence_transformers", "SentenceTransformer") in homes:
        return "sentence_transformers"
    if callable(getattr(network, "encode_image", None)) and _takes_text(network):
        return "clip"
    if hasattr(network, "forward_features") and hasattr(network, "pretrained_cfg"):
        return "timm"
    return None


def default_output(network: nn.Module) -> str:
    """The word for the vector that the authors of a network compare with.

    The space shared with text where there is one; else what is pooled, unless only a head for
    pretraining reads that (the dense layer over the class token in ViT and DeiT).
    """
    if package_of(network) in ("sentence_transformers", "clip"):
        return "projected"
    if package_of(network) == "timm":
        return "pooled"
    if hasattr(network, "get_image_features") or hasattr(network, "visual_projection"):
        return "projected"
    tower = tower_of(network)
    pooler: Any = getattr(tower, "pooler", None)
    marked = has_class_token(tower)
    if hasattr(pooler, "dense"):
        return "class_token" if marked else "patch_mean"
    if hasattr(pooler, "layernorm"):  # BEiT: the mean of patches, or the class token as it is
        return "pooled" if pooler.layernorm is not None else "class_token"
    plain = marked and not hasattr(tower, "post_layernorm") and not _wraps_timm(tower)
    return "class_token" if plain else "pooled"


def tower_of(network: nn.Module) -> nn.Module:
    """The part of a network of transformers that sees the image, without heads."""
    for name in _TOWERS:
        if isinstance(tower := getattr(network, name, None), nn.Module):
            return tower
    base = getattr(network, "base_model", None)
    return base if "For" in type(network).__name__ and isinstance(base, nn.Module) else network


def has_class_token(tower: nn.Module) -> bool:
    """Whether the network prepends a class token to its patches."""
    return any(name.rpartition(".")[2] in _CLASS_TOKENS for name, _ in tower.named_parameters())


def native_size(network: nn.Module) -> tuple[int, int] | None:
    """``(height, width)`` that a network of transformers was built for, or None."""
    config = getattr(network, "config", None)
    config = getattr(config, "vision_config", None) or config
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


def _takes_text(network: nn.Module) -> bool:
    """Whether calling the network needs text as well, so that its image tower must be named."""
    try:
        parameters = list(inspect.signature(network.forward).parameters.values())
    except (TypeError, ValueError):
        return False
    named = any(p.name in ("text", "texts", "input_ids") for p in parameters)
    return named or _needs_text(network)


def _needs_text(network: nn.Module) -> bool:
    """Whether the network cannot be called with images alone."""
    parameters = inspect.signature(network.forward).parameters.values()
    return len([p for p in parameters if p.default is p.empty and p.kind in (0, 1)]) > 1


def _wraps_timm(tower: nn.Module) -> bool:
    return hasattr(tower, "timm_model")


# ------------------------------------------------------------------------------ transformers


def _read_transformers(network: nn.Module, images: Tensor, word: str | None) -> Any:
    """One vector of a network of transformers; the whole output for None."""
    whole: Any = getattr(network, "get_image_features", None)
    if whole is not None and word in (None, "projected"):
        result = _call(whole, network, images)
        return result if word is None else _pooler_output(result, network)
    if word is None:
        return _call(network, network, images)
    if word == "projected":
        return _projected(network, images)
    tower = tower_of(network)
    result = _call(tower, network, images)
    if word == "pooled":
        if getattr(result, "pooler_output", None) is not None:
            return _flat(result.pooler_output)
        if has_class_token(tower):
            raise _without(network, "pooled", "class_token or patch_mean")
        word = "patch_mean"  # networks without a pooler are compared by the mean of their map
    tokens = result.last_hidden_state
    if word == "class_token":
        return _class_token(network, tower, result, tokens)
    if tokens.dim() == 4:
        return tokens.mean(dim=(2, 3))
    after = int(getattr(getattr(tower, "config", None), "num_detection_tokens", 0) or 0)
    return tokens[:, _prefix(tower) : tokens.shape[1] - after].mean(dim=1)


def _projected(network: nn.Module, images: Tensor) -> Tensor:
    if hasattr(network, "visual_projection"):
        embeds: Tensor = _call(network, network, images).image_embeds
        return embeds
    if _kind(network).startswith("siglip"):  # its pooling head leads into the shared space
        return _pooler_output(_call(network, network, images), network)
    raise _without(network, "projected", "class_token, patch_mean or pooled")


def _pooler_output(result: Any, network: nn.Module) -> Tensor:
    pooled = result if isinstance(result, Tensor) else getattr(result, "pooler_output", None)
    if not isinstance(pooled, Tensor):
        raise _without(network, "projected", "class_token or patch_mean")
    if pooled.dim() == 3 and has_class_token(tower_of(network)):
        return pooled[:, 0]  # FLAVA projects all tokens, and compares the first
    return _flat(pooled)


def _class_token(network: nn.Module, tower: nn.Module, result: Any, tokens: Tensor) -> Tensor:
    apart = getattr(result, "cls_token_value", None)  # CvT keeps it beside its map
    if isinstance(apart, Tensor):
        return apart[:, 0]
    if not has_class_token(tower) or tokens.dim() != 3:
        raise _without(network, "class_token", "patch_mean or pooled")
    return tokens[:, 0]


def _prefix(tower: nn.Module) -> int:
    """How many tokens of the last layer are not patches."""
    if _kind(tower) == "dinov3_convnext":
        return 1  # it puts the pooled vector before its cells
    names = {name.rpartition(".")[2] for name, _ in tower.named_parameters()}
    config = getattr(tower, "config", None)
    registers = int(getattr(config, "num_register_tokens", 0) or 0)
    return has_class_token(tower) + ("distillation_token" in names) + registers


def _call(function: Any, network: nn.Module, images: Tensor) -> Any:
    """Calls a network or a method of it with images, at whatever size they are."""
    called = function.forward if isinstance(function, nn.Module) else function
    names = inspect.signature(called).parameters
    inputs: dict[str, Any] = {"pixel_values": images}
    kind = _kind(network)
    if kind.startswith("siglip2"):
        inputs = _patches(network, images)
    elif kind == _WITHOUT_RANDOM_MASK:
        inputs |= _unmasked(network, images)
    native = native_size(network)
    if "interpolate_pos_encoding" in names and native not in (None, tuple(images.shape[-2:])):
        inputs["interpolate_pos_encoding"] = True
    if isinstance(function, nn.Module):
        inputs["return_dict"] = True
    return function(**inputs)


def _kind(network: nn.Module) -> str:
    """The ``model_type`` of the network, or of its image tower."""
    config = getattr(network, "config", None)
    config = getattr(config, "vision_config", None) or config
    return str(getattr(config, "model_type", ""))


def _patches(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """SigLIP 2 with any aspect ratio takes rows of patches ``(M,T,3*p*p)``, channels last."""
    config: Any = network.config
    side = int((getattr(config, "vision_config", None) or config).patch_size)
    count, channels, height, width = images.shape
    rows, columns = height // side, width // side
    if rows * side != height or columns * side != width:
        raise ModelError(
            f"Expected images whose sides are multiples of {side} pixels, got {height}x{width}."
        )
    cut = images.reshape(count, channels, rows, side, columns, side)
    shapes = torch.tensor([[rows, columns]] * count, device=images.device)
    mask = torch.ones((count, rows * columns), dtype=torch.int32, device=images.device)
    return {
        "pixel_values": cut.permute(0, 2, 4, 3, 5, 1).reshape(count, rows * columns, -1),
        "pixel_attention_mask": mask,
        "spatial_shapes": shapes,
    }


def _unmasked(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """A masked autoencoder must see every patch, in order, to give the same vector twice."""
    config: Any = network.config
    if config.mask_ratio:
        raise ModelError(
            f"Expected a masked autoencoder that hides nothing, got mask_ratio="
            f"{config.mask_ratio}; set model.config.mask_ratio = 0 first."
        )
    side = int(config.patch_size)
    count = (images.shape[-2] // side) * (images.shape[-1] // side)
    order = torch.arange(count, device=images.device, dtype=torch.float32)
    return {"noise": order.expand(len(images), count)}


# ------------------------------------------------------------------------------ other packages


def _read_sentence_transformers(network: nn.Module, images: Tensor, word: str | None) -> Any:
    """The embedding of a SentenceTransformer, or a vector of the network inside it."""
    inner = next((m for m in network.modules() if package_of(m) == "transformers"), None)
    if word in (None, "projected"):
        result = network({"pixel_values": images, "modality": "image"})
        if word is None:
            return result
        short = getattr(network, "truncate_dim", None)
        return result["sentence_embedding"][:, :short]
    if inner is None:
        raise _without(network, word, "projected")
    return _read_transformers(inner, images, word)


def _read_clip(network: nn.Module, images: Tensor, word: str | None) -> Any:
    """open_clip's networks and the original CLIP: the image tower."""
    encode: Any = network.encode_image
    if word is None and not _needs_text(network):
        return network(images)
    if word in (None, "projected"):
        return encode(images)
    visual: Any = getattr(network, "visual", None)
    if not hasattr(visual, "forward_intermediates") or not has_class_token(visual):
        raise _without(network, word, "projected")
    result = visual.forward_intermediates(
        images,
        indices=1,
        normalize_intermediates=True,
        output_fmt="NLC",
        output_extra_tokens=True,
    )
    if word == "patch_mean":
        patches: Tensor = result["image_intermediates"][-1]
        return patches.mean(dim=1)
    if word == "class_token":
        prefix: Tensor = result["image_intermediates_prefix"][-1]
        return prefix[:, 0]
    raise _without(network, word, "projected, class_token or patch_mean")


def _read_timm(network: Any, images: Tensor, word: str | None) -> Any:
    """Timm's networks, with or without a classifier."""
    features = network.forward_features(images)
    if word == "pooled":
        return network.forward_head(features, pre_logits=True)
    prefix = int(getattr(network, "num_prefix_tokens", 0))
    if word == "class_token":
        if not prefix or getattr(network, "cls_token", None) is None:
            raise _without(network, word, "pooled or patch_mean")
        return features[:, 0]
    if word == "patch_mean" and features.dim() == 3:
        return features[:, prefix:].mean(dim=1)
    if word == "patch_mean":
        last = str(getattr(network, "output_fmt", "NCHW")).upper().endswith("NHWC")
        return features.mean(dim=(1, 2) if last else (2, 3))
    raise _without(network, str(word), "pooled, class_token or patch_mean")


READERS: dict[str, Callable[[Any, Tensor, str | None], Any]] = {
    "transformers": _read_transformers,
    "sentence_transformers": _read_sentence_transformers,
    "clip": _read_clip,
    "timm": _read_timm,
}
"""By package, how its networks are called and read; a new one is one function and one line."""


def weights_for_images(network: nn.Module) -> Iterator[Tensor]:
    """Floating weights, those first that images meet first: their type is the images' type."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.is_floating_point():
            yield module.weight
    yield from (p for p in network.parameters() if p.is_floating_point())


def _flat(vectors: Tensor) -> Tensor:
    return vectors.flatten(1) if vectors.dim() == 4 else vectors


def _without(network: nn.Module, word: str, others: str) -> ModelError:
    return ModelError(
        f"{type(network).__name__} has no vector '{word}'; choose {others} (--output, output=)."
    )
