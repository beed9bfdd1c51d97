"""How pictures are prepared for a module by default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from simexplain.data.preprocessing import IMAGENET, Preprocess
from simexplain.models.backbones import preprocess_of_timm
from simexplain.models.processors import preprocess_of_open_clip, preprocess_of_processor
from simexplain.models.readouts import native_size, package_of
from simexplain.networks import channels_of

UNSTATED = "does not say how pictures are prepared"
"""What every note has in it that warns of assumed values."""

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def assumed_preprocess(module: nn.Module) -> Preprocess:
    """The preprocessing of the network's package, else ImageNet's values with a note.

    A network of one or of many channels gets them by ``Preprocess.for_channels``.
    """
    channels = channels_of(module)
    if channels == 3:
        return _of_colours(module)
    note = f"The model {UNSTATED}; ImageNet's usual values, averaged over colours, are used."
    if channels != 1:
        note = (
            f"The model does not say how its {channels} channels are prepared; they are used as "
            "they are read, with mean 0 and std 1."
        )
    known = bool(getattr(module, "pretrained_cfg", None))
    base = preprocess_of_timm(module) if known else IMAGENET
    notes = base.notes if known and channels == 1 else (*base.notes, note)
    return replace(base.for_channels(channels), notes=notes)


def _of_colours(module: nn.Module) -> Preprocess:
    if getattr(module, "pretrained_cfg", None):
        return preprocess_of_timm(module)
    own = _KNOWN.get(package_of(module) or "", _of_tower)(module)
    if own is not None:
        return own
    note = f"The model {UNSTATED}; ImageNet's usual values are used."
    return replace(IMAGENET, size=declared_size(module) or IMAGENET.size, notes=(note,))


def declared_size(network: nn.Module) -> tuple[int, int] | None:
    """``(height, width)`` of the images that a network declares it was built for, or None.

    Read from ``image_size``, ``config.image_size`` (Hugging Face) or ``patch_embed.img_size``
    (timm), of the network itself or of the first part that has one.
    """
    for module in network.modules():
        config = getattr(module, "config", None)
        vision = getattr(config, "vision_config", None)
        patches = getattr(module, "patch_embed", None)
        for holder, name in (
            (module, "image_size"),
            (vision, "image_size"),
            (config, "image_size"),
            (patches, "img_size"),
            (module, "img_size"),
        ):
            size = getattr(holder, name, None)
            if isinstance(size, int) and size > 0:
                return size, size
            if isinstance(size, (tuple, list)) and len(size) == 2:
                return int(size[0]), int(size[1])
    return None


def usual_processor(config: Any) -> Any:
    """The image processor that transformers uses for this kind of network, or None.

    Args:
        config: A configuration of transformers. Kinds without a processor of their own take that of
            the kind they derive from (``clip_vision_model`` of ``clip``).
    """
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    kinds = dict(IMAGE_PROCESSOR_MAPPING_NAMES)
    words = str(getattr(config, "model_type", "")).split("_")
    for count in range(len(words), 0, -1):
        known = kinds.get("_".join(words[:count]))
        names = known if isinstance(known, dict) else {"torchvision": known}
        for name in (names.get("torchvision"), names.get("pil")):
            if isinstance(name, str) and name != "TimmWrapperImageProcessor":
                return getattr(transformers, name)()
    return None


def _of_transformers(module: Any) -> Preprocess | None:
    """The class defaults of the kind's processor, at the network's own size."""
    processor = usual_processor(module.config)
    if processor is None:
        return None
    own = native_size(module)
    short = getattr(getattr(processor, "size", None), "shortest_edge", None)
    if own is not None and short and not getattr(processor, "crop_size", None):
        # ConvNeXt's decides by its size whether it crops or squashes.
        processor = type(processor)(size={"shortest_edge": own[0]})
    made = preprocess_of_processor(processor, own)
    note = (
        f"The model comes without an image processor; the defaults of {type(processor).__name__} "
        "are used."
    )
    return replace(made, size=own or made.size, notes=(*made.notes, note))


def _of_sentence_transformers(module: Any) -> Preprocess | None:
    processor = getattr(module, "processor", None) or getattr(module[0], "processor", None)
    if processor is None or not hasattr(processor, "image_processor"):
        return None
    return preprocess_of_processor(processor, None)


def _of_clip(module: Any) -> Preprocess | None:
    visual = getattr(module, "visual", None)
    config = getattr(visual, "preprocess_cfg", None)
    return preprocess_of_open_clip(config) if config else _of_tower(visual)


def _of_tower(module: Any) -> Preprocess | None:
    """The original CLIP's towers, which store the side of their input and nothing else."""
    if config := getattr(module, "preprocess_cfg", None):
        return preprocess_of_open_clip(config)
    side = getattr(module, "input_resolution", None)
    if not isinstance(side, int):
        return None
    return Preprocess(
        size=(side, side),
        interpolation="bicubic",
        mean=_CLIP_MEAN,
        std=_CLIP_STD,
        source="CLIP's preprocessing",
    )


_KNOWN: dict[str, Callable[[Any], Preprocess | None]] = {
    "transformers": _of_transformers,
    "sentence_transformers": _of_sentence_transformers,
    "clip": _of_clip,
}
