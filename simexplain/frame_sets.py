"""Comparisons whose members are sets of frames: into what methods take, and back out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.comparison import Comparison
from simexplain.errors import ComparisonError, ModelError
from simexplain.explanation import Explanation
from simexplain.methods.cams import SimilarityCAM
from simexplain.methods.focus import Focus
from simexplain.methods.rows import Layers, Methods
from simexplain.methods.similarity_attention import SimilarityAttention
from simexplain.models.base import SimilarityModel
from simexplain.models.frames import FrameSets, present_frames, split_frames, tall, with_missing

FRAMED = ("sam", "focus", "similarity_cam", "saliency")
"""Methods for sets of frames: ``focus`` looks at every frame by itself, of the others maps are the
gradient through the pooling."""
_FRAME = 4
"""Axes of one set of frames ``(T,C,H,W)``."""


def is_framed(comparison: Comparison) -> bool:
    """Whether the items of a comparison are sets of frames ``(T,C,H,W)``, not images."""
    if not isinstance(comparison, Comparison):
        return False
    shown = (stack for role, stack in comparison.stacks.items() if role not in comparison.given)
    return all(stack.dim() - 2 == _FRAME for stack in shown)


def framed(
    model: SimilarityModel, comparison: Comparison, pooling: str, method: Methods, layer: Layers
) -> tuple[FrameSets, Comparison]:
    """A model of sets of frames, and the comparison with every set as one tall image.

    Args:
        model: The model of single images.
        comparison: Of sets; roles may have different numbers of frames.
        pooling: A name in ``POOLINGS``.
        method: As for ``explain``.
        layer: The layer, or None.

    Raises:
        ComparisonError: If a set is not made of float images, or not the same for all comparisons.
        ModelError: If the method or the model cannot take sets.
    """
    several = isinstance(method, Sequence) and not isinstance(method, str)
    methods: Sequence[object] = list(method) if several else [method]  # type: ignore[arg-type]
    for one in methods:
        known = one is None or one in FRAMED
        if not known and not isinstance(one, SimilarityAttention | SimilarityCAM | Focus):
            raise ModelError(
                f"Sets of frames are explained by the methods {', '.join(FRAMED)}, got '{one}'; "
                "take one of them, or explain single frames."
            )
    layers = [layer] if layer is None or isinstance(layer, (str, nn.Module)) else list(layer)
    if len(layers) > 1 and not all(one == "focus" or isinstance(one, Focus) for one in methods):
        raise ModelError(
            "Sets of frames are explained at one layer, got several; name one of them."
        )
    stacks = comparison.stacks.items()
    shown = {role: stack for role, stack in stacks if role not in comparison.given}
    frames = max(stack.shape[2] for stack in shown.values() if stack.shape[1])
    changed: dict[str, Any] = {}
    for role, stack in shown.items():
        if not stack.is_floating_point():
            raise ComparisonError(f"Expected float images in every set, got {stack.dtype}.")
        whole = with_missing(stack, frames if stack.shape[1] else 0)
        _check_present(present_frames(whole), role)
        laid = tall(whole)
        changed[role] = laid[:, 0] if role == "anchor" else laid
    return FrameSets(model, frames, pooling), replace(comparison, **changed)


def _check_present(present: Tensor, role: str) -> None:
    """Frames that are there come first, as many in every comparison of a batch."""
    counts = present.sum(dim=-1)
    first = torch.arange(present.shape[-1], device=present.device) < counts[..., None]
    if not bool((present == first).all()) or not bool((counts > 0).all()):
        raise ComparisonError(
            f"Expected sets of at least one frame as {role}, missing ones (NaN) at their end, got "
            "NaN among the others; look for it in the images."
        )
    if not bool((counts == counts[:1]).all()):
        raise ComparisonError(
            f"Expected sets of as many frames in every comparison of a batch as {role}, got "
            f"{sorted(set(counts.flatten().tolist()))}; explain them one by one."
        )


def by_frame(explanation: Explanation, frames: int) -> Explanation:
    """An explanation of tall images with a map for each frame, in order.

    Args:
        explanation: Of ``framed`` sets.
        frames: The most frames of a set.
    """
    others = tuple(by_frame(row, frames) for row in explanation.others)
    images = split_frames(explanation.images, frames)
    present = present_frames(images)[0]
    items, places = present.nonzero(as_tuple=True)

    def cut(maps: Tensor) -> Tensor:
        return split_frames(maps[:, :, None], frames)[:, items, places, 0]

    each: dict[str, Any] = {
        name: value[:, items]
        for name in ("scores", "moved", "unexplained")
        if (value := getattr(explanation, name)) is not None
    }
    layer_maps: Mapping[str, Tensor] = {
        name: cut(maps) for name, maps in explanation.layer_maps.items()
    }
    weights = (
        explanation.weights if explanation.weights.dim() == 2 else explanation.weights[:, items]
    )
    return replace(
        explanation,
        maps=cut(explanation.maps),
        layer_maps=layer_maps,
        weights=weights,
        images=images[:, items, places],
        frames=tuple(present.sum(dim=1).tolist()),
        others=others,
        **each,
    )
