"""Image processors of model hubs as a ``Preprocess``, checked against what they really do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from simexplain.data.preprocessing import Preprocess

_GREY_LEVELS = 2.0
"""How far a processor's pixels may lie from ours without a note, of 255 levels."""

_RESAMPLE = {0: "nearest-exact", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Pillow's numbers of filters."""

_PROBES = ((61, 97), (97, 61))


def preprocess_of_processor(processor: Any, native: tuple[int, int] | None) -> Preprocess:
    """What an image processor of transformers does with a picture.

    Args:
        processor: An image processor, or a processor that holds one (``CLIPProcessor``).
        native: ``(height, width)`` that the network was built for, where the processor gives none.

    Returns:
        Values from the processor's attributes. A note is added where its ``pixel_values`` differ
        from ours on two small pictures, one wide and one tall, by more than two grey levels.
    """
    processor = getattr(processor, "image_processor", processor)
    if hasattr(processor, "val_transforms"):  # a network of timm in transformers' clothes
        return preprocess_of_timm_config(processor.data_config)
    if _number(processor, "max_num_patches"):
        return _of_patches(processor)
    fit, size, fraction = _geometry(processor, native)
    mean, std = _normalisation(processor)
    made = Preprocess(
        size=size,
        fit=fit,
        crop_fraction=fraction,
        interpolation=_filter(processor),
        mean=mean,
        std=std,
        source=f"transformers' {type(processor).__name__}",
        resizing=_resizing(processor),
    )
    apart = _difference(processor, made)
    if apart <= _GREY_LEVELS:
        return made
    far = f"by up to {apart:.0f} of 255 grey levels" if math.isfinite(apart) else "in size"
    note = (
        f"{type(processor).__name__} prepares pictures in a way that can only be approximated; "
        f"test pictures differ {far}."
    )
    return replace(made, notes=(note,))


def preprocess_of_timm_config(config: Mapping[str, Any]) -> Preprocess:
    """What timm's own evaluation does with a picture, from its resolved data config."""
    return Preprocess(
        size=tuple(config["input_size"][1:]),
        fit={"squash": "squash", "border": "pad"}.get(config["crop_mode"], "crop"),
        crop_fraction=config["crop_pct"],
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        source="timm's data config",
    )


def preprocess_of_open_clip(config: Mapping[str, Any]) -> Preprocess:
    """What open_clip's evaluation transform does, from a network's ``preprocess_cfg``."""
    size, mode = config.get("size", 224), config.get("resize_mode") or "shortest"
    sides = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    made = Preprocess(
        size=sides,
        fit={"squash": "squash", "longest": "pad"}.get(mode, "crop"),
        interpolation="bilinear" if config.get("interpolation") == "bilinear" else "bicubic",
        mean=_three(config.get("mean")),
        std=_three(config.get("std")),
        source="open_clip's preprocessing",
    )
    if mode != "longest":
        return made
    note = "open_clip pads this network's pictures with black; the mean colour is used instead."
    return replace(made, notes=(note,))


def _geometry(processor: Any, native: tuple[int, int] | None) -> tuple[str, tuple[int, int], float]:
    """How a picture is fitted, the input's ``(height, width)`` and the share that is kept."""
    resizes = getattr(processor, "do_resize", True)
    size = getattr(processor, "size", None) if resizes else None
    short, height, width = (_side(size, key) for key in ("shortest_edge", "height", "width"))
    crop = getattr(processor, "crop_size", None)
    cuts = getattr(processor, "do_center_crop", False) and crop is not None
    view = (_side(crop, "height"), _side(crop, "width")) if cuts else (0, 0)
    kind = type(processor).__name__
    share: Any = getattr(processor, "crop_pct", None)
    if kind.startswith("ConvNext") and short:
        # Below 384 the authors cut the middle out; from there on they squash.
        return _cut(short, int(short / share)) if short < 384 else ("squash", (short, short), 1.0)
    if kind.startswith("PoolFormer") and share:
        short, height, width = int((short or height) / share), 0, 0
    elif kind.startswith("Levit") and short:
        short = int((256 / 224) * short)
    if short:
        inner = view if all(view) else native or (short, short)
        return ("crop", inner, _fraction(min(inner), short))
    if height and width:
        inner = view if all(view) else (height, width)
        return "squash", inner, _fraction(inner[0], height)
    return "crop", view if all(view) else native or (224, 224), 1.0


def _cut(side: int, resized: int) -> tuple[str, tuple[int, int], float]:
    return "crop", (side, side), _fraction(side, resized)


def _fraction(side: int, resized: int) -> float:
    """The share from which ``floor(side / share)`` gives exactly ``resized``, without rounding."""
    share = side / resized
    while math.floor(side / share) < resized:
        share = math.nextafter(share, 0.0)
    return min(share, 2.0)


def _normalisation(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation for channels in [0, 1], with the rescaling folded in."""
    factor = getattr(processor, "rescale_factor", None) or 1 / 255
    scale = 255 * factor if getattr(processor, "do_rescale", True) else 255.0
    offset = 1.0 if getattr(processor, "rescale_offset", None) else 0.0
    normalises = getattr(processor, "do_normalize", True)
    mean = _three(getattr(processor, "image_mean", None) if normalises else 0.0)
    std = _three(getattr(processor, "image_std", None) if normalises else 1.0)
    if abs(scale - 1) < 1e-9 and not offset:
        means, deviations = mean, std
    else:
        means = tuple((value + offset) / scale for value in mean)
        deviations = tuple(value / scale for value in std)
    if type(processor).__name__.startswith("EfficientNet") and processor.include_top:
        # It divides by the deviation once more, for networks that are classifiers.
        return tuple(m for m in means), tuple(d * s for d, s in zip(deviations, std, strict=True))
    return means, deviations


def _filter(processor: Any) -> str:
    """Pillow's filter by its name; Pillow itself calls ``nearest-exact`` ``nearest``."""
    resample = getattr(processor, "resample", None)
    name = _RESAMPLE.get(int(resample), "bilinear") if resample is not None else "bilinear"
    return "nearest" if _resizing(processor) == "pillow" and name == "nearest-exact" else name


def _resizing(processor: Any) -> str:
    if type(processor).__name__.startswith("DINOv3"):
        return "float"
    return "pillow" if getattr(processor, "backend", "pil") == "pil" else "tensor"


def _of_patches(processor: Any) -> Preprocess:
    """SigLIP 2 with any aspect ratio: every picture gets the square that has as many patches."""
    side = math.isqrt(int(processor.max_num_patches)) * int(processor.patch_size)
    mean, std = _normalisation(processor)
    note = (
        f"{type(processor).__name__} keeps each picture's aspect ratio; here all pictures of a "
        f"comparison share one size, {side}x{side}, which differs from it unless they are square."
    )
    return Preprocess(
        size=(side, side),
        fit="squash",
        interpolation=_filter(processor),
        mean=mean,
        std=std,
        source=f"transformers' {type(processor).__name__}",
        notes=(note,),
        resizing=_resizing(processor),
    )


def _difference(processor: Any, made: Preprocess) -> float:
    """The largest difference of two small pictures from the processor's own, in grey levels."""
    worst = 0.0
    deviation = torch.tensor(made.std).view(-1, 1, 1)
    for height, width in _PROBES:
        rows, columns = np.mgrid[0:height, 0:width]
        waves = [np.sin(rows / 5 + n) * np.cos(columns / (7 + n)) for n in range(3)]
        pixels = np.stack(waves, axis=-1) * 100 + 128
        image = Image.fromarray(pixels.astype(np.uint8))
        try:
            theirs = processor(images=image, return_tensors="pt")["pixel_values"][0]
        except (ValueError, TypeError, KeyError, RuntimeError, AttributeError):
            return math.inf
        ours, _ = made(image)
        if not isinstance(theirs, torch.Tensor) or theirs.shape != ours.shape:
            return math.inf
        worst = max(worst, float(((theirs - ours) * deviation).abs().max()) * 255)
    return worst


def _number(processor: Any, name: str) -> int:
    value = getattr(processor, name, None)
    return value if isinstance(value, int) else 0


def _side(size: Any, key: str) -> int:
    """A side of a size that may be a number, a mapping or transformers' own class; 0 if absent."""
    if isinstance(size, int):
        return size if key != "shortest_edge" else 0
    value = size.get(key) if isinstance(size, Mapping) else getattr(size, key, None)
    return int(value or 0)


def _three(value: float | Sequence[float] | None) -> tuple[float, ...]:
    if value is None:
        value = 0.5
    return (float(value),) * 3 if isinstance(value, (int, float)) else tuple(map(float, value))
