"""The verb: segment what the supports show in a test image, given as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import Tensor, nn

from simexplain.arguments import typed
from simexplain.errors import ComparisonError
from simexplain.explanation import versions
from simexplain.methods import MethodLike
from simexplain.methods.kinds import DEFAULT
from simexplain.methods.rows import Layers
from simexplain.models.embedder import as_similarity_model
from simexplain.networks import full_precision
from simexplain.segmentation.attending import Attention, attend, check_tensors
from simexplain.segmentation.cue import Cue, Heat, default_cue
from simexplain.segmentation.cue import refine as mask_of
from simexplain.segmentation.grabcut import GrabCut, Mask, Pixels
from simexplain.segmentation.result import ROLES, Segmentation, SupportImage

METHOD = DEFAULT[-1]
"""The row of ``explain`` that says where the match is.

It segmented best where it was measured (``docs/segmentation-results.md``).
"""


@typed
@full_precision()
def segment(
    model: nn.Module,
    test: Tensor,
    supports: Tensor,
    others: Tensor | None = None,
    *,
    method: str | MethodLike = METHOD,
    layer: Layers = None,
    refine: str = "grabcut",
    cue: Cue | None = None,
    cut: GrabCut | None = None,
    aggregate: str = "averaged",
    anchor: str = "test",
    support_masks: Tensor | None = None,
    upscale: float = 1,
    max_batch: int | None = None,
    **options: Any,
) -> Segmentation:
    """Segments a test image, as in section 4.3 of the similarity-attention paper.

    The attention map of the test image, compared with images that show the class sought
    (``supports``) and with images of another class (``others``), is the cue for GrabCut. No mask
    of a support is needed. The model is left as it was, and so are random generators.

    Args:
        model: A similarity model, or any ``nn.Module`` that returns an embedding.
        test: A preprocessed image ``(3,H,W)``.
        supports: ``(S,3,H,W)``, one for one-shot, five for five-shot.
        others: ``(N,3,H,W)``, the supports of the other class in the two-way setting; None for the
            one-way setting, which has none.
        method: A name in ``METHODS`` or an object; ``sam`` is the paper's.
        layer: As for ``explain``.
        refine: A name in ``REFINEMENTS``; ``grabcut`` is the paper's.
        cue: Thresholds; None for the method's own in ``CUES``.
        cut: How GrabCut runs; None for five iterations.
        aggregate: ``averaged``, as in the paper, or ``together``.
        anchor: ``test``, as in the paper, or ``support``.
        support_masks: ``(S,H,W)`` boolean, where the object is in each support: what lies outside
            is hidden from the network. None for the paper's setting, without them.
        upscale: As for ``explain``.
        max_batch: Bounds the images in one forward pass.
        **options: Of a method given by name, such as ``weights="relative"``.

    Raises:
        ComparisonError: If images, masks or options do not fit.
        ModelError: If the model or a layer cannot be used.
    """
    wrapped = as_similarity_model(model)
    chosen = cue or default_cue(method)
    shown = supports
    if support_masks is not None:
        check_tensors(supports, support_masks)
        shown = hidden(supports, support_masks)
    found = attend(
        wrapped, test, shown, others, method=method, layer=layer, aggregate=aggregate,
        anchor=anchor, upscale=upscale, max_batch=max_batch, **options,
    )  # fmt: skip
    heat: Heat = found.heat.numpy().astype(np.float32)
    return finished(
        found,
        wrapped.preprocess.undo(test),
        heat,
        np.ones(heat.shape, dtype=bool),
        images=beside(found, wrapped.preprocess.undo(shown), others_of(wrapped, others)),
        refine=refine,
        cue=chosen,
        cut=cut or GrabCut(),
        told={"aggregate": aggregate, "anchor": anchor, "support_masks": support_masks is not None},
    )


def finished(
    found: Attention,
    picture: Pixels,
    heat: Heat,
    seen: Mask,
    *,
    images: tuple[SupportImage, ...],
    refine: str,
    cue: Cue,
    cut: GrabCut,
    told: Mapping[str, Any],
    name: str = "",
    notes: Sequence[str] = (),
) -> Segmentation:
    """A segmentation from the attention map ``(H,W)`` on the picture ``(H,W,3)``."""
    refined = mask_of(picture, heat, cue, by=refine, seen=seen, cut=cut)
    explained = found.explanation
    said = (*notes, *_once(explained.warnings), *((refined.note,) if refined.note else ()))
    return Segmentation(
        mask=refined.mask,
        heat=heat,
        marks=refined.marks,
        picture=picture,
        name=name,
        images=images,
        refine=refine,
        method=explained.method,
        model=explained.model,
        layers=explained.layers,
        options={**explained.options, **told, "cue": asdict(cue), "cut": asdict(cut)},
        warnings=said,
        versions=versions(),
        bypass=explained.bypass,
    )


def hidden(supports: Tensor, masks: Tensor) -> Tensor:
    """Supports ``(S,3,H,W)`` with the mean colour outside their masks ``(S,H,W)``.

    Raises:
        ComparisonError: If shapes or types do not fit, or a mask is empty.
    """
    if masks.shape != (len(supports), *supports.shape[-2:]) or masks.dtype.is_floating_point:
        raise ComparisonError(
            f"Expected boolean support masks (S,H,W) for {len(supports)} supports of "
            f"{tuple(supports.shape[-2:])}, got {tuple(masks.shape)} of {masks.dtype}."
        )
    if not bool(masks.flatten(1).any(dim=1).all()):
        raise ComparisonError("Expected every support mask to mark something, got an empty one.")
    # A mask of 0 and 255 must not make the picture 255 times as bright.
    return supports * masks.bool().unsqueeze(1).to(supports)


def beside(
    found: Attention,
    supports: Pixels,
    others: Pixels | None,
    names: Sequence[str] = (),
) -> tuple[SupportImage, ...]:
    """Supports ``(S,h,w,3)`` and others ``(N,h,w,3)`` with their own attention maps."""
    images: list[SupportImage] = []
    for role, pictures, heats in zip(
        ROLES, (supports, others), (found.supports, found.others), strict=True
    ):
        for picture, heat in zip(() if pictures is None else pictures, heats, strict=True):
            name = names[len(images)] if names else ""
            images.append(SupportImage(name, role, picture, heat.numpy().astype(np.float32)))
    return tuple(images)


def others_of(model: Any, others: Tensor | None) -> Pixels | None:
    """Others as pictures."""
    pictures: Pixels | None = None
    if others is not None and len(others):
        pictures = model.preprocess.undo(others)
    return pictures


def _once(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))
