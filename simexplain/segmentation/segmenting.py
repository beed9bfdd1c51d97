"""The verb: segment what the supports show in a test picture, or an image tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simexplain.arguments import typed
from simexplain.comparison import Comparison
from simexplain.data.images import LARGE, PictureSource, pixels_of, read_pictures
from simexplain.data.preprocessing import Geometry, Preprocess, notes_of, prepared
from simexplain.errors import ComparisonError
from simexplain.evaluation.items import read_mask
from simexplain.explaining_tensors import explain_tensors
from simexplain.explanation import Explanation, versions
from simexplain.methods import MethodLike
from simexplain.methods.kinds import DEFAULT
from simexplain.methods.rows import Layers
from simexplain.metrics.maps import grown
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model
from simexplain.networks import full_precision
from simexplain.segmentation.cue import SHAPES, Cue, GrabCut, Heat, Mask, Pixels, default_cue
from simexplain.segmentation.cue import refine as mask_of
from simexplain.segmentation.result import ROLES, Segmentation, SupportImage

AGGREGATES: dict[str, str] = {
    "averaged": "a pair or triplet for each support image, the test image's maps averaged",
    "together": "one comparison with all support images in it",
}
"""How several support images become one map; the paper averages."""

ANCHORS: dict[str, str] = {
    "test": "the test image is the anchor, its supports the positives",
    "support": "each support is an anchor, the test image its positive",
}
"""Which image takes the anchor's part; the paper names the test image first."""


@dataclass(frozen=True)
class Attention:
    """Where the test image shows what the supports show.

    Attributes:
        heat: ``(H,W)`` float32 in [0, 1] over the test image, its maximum 1; zero if empty.
        supports: ``(S,H,W)`` heatmaps of the support images.
        others: ``(N,H,W)`` heatmaps of the other class's support images.
        explanation: The comparisons that it is made of, the test image their anchor.
    """

    heat: Tensor
    supports: Tensor
    others: Tensor
    explanation: Explanation


def attend(
    model: SimilarityModel,
    test: Tensor,
    supports: Tensor,
    others: Tensor | None = None,
    *,
    method: str | MethodLike = "focus",
    layer: Layers = None,
    aggregate: str = "averaged",
    anchor: str = "test",
    upscale: float = 1,
    max_batch: int | None = None,
    **options: Any,
) -> Attention:
    """Explains the test image by its supports.

    With ``averaged`` there are as many comparisons as the larger of the two sets has images, and
    the smaller one is gone through again: five supports and five others make five triplets
    (section 4.3). Each map is divided by its maximum before the mean, so that every shot counts
    the same; the published weights differ in scale between comparisons.

    Args:
        model: The model.
        test: A preprocessed image ``(3,H,W)``.
        supports: ``(S,3,H,W)``, images of the class to find: positives.
        others: ``(N,3,H,W)``, images of other classes: negatives; None or empty for none.
        method: A name in ``METHODS`` or an object.
        layer: As for ``explain``.
        aggregate: A name in :data:`AGGREGATES`.
        anchor: A name in :data:`ANCHORS`; ``support`` needs ``averaged``.
        upscale: As for ``explain``.
        max_batch: Bounds the images in one forward pass.
        **options: Of a method given by name, in place of those in ``SHAPES``.

    Raises:
        ComparisonError: If images or options do not fit.
        ModelError: If the model or a layer cannot be used.
    """
    _check_choices(aggregate, anchor)
    check_tensors(test, supports, *(() if others is None else (others,)))
    negatives = supports[:0] if others is None else others
    _check_supports(test, supports, negatives)
    comparison = _comparison(test, supports, negatives, together=aggregate == "together")
    index = 0 if anchor == "test" else 1
    if index:
        # The first positive and the anchor change places.
        comparison = replace(
            comparison, anchor=comparison.positives[:, 0], positives=comparison.anchor.unsqueeze(1)
        )
    shape = SHAPES.get(method, {}) if isinstance(method, str) else {}
    options = {**shape, **options}
    explanation = explain_tensors(
        model, comparison, method, layer, upscale=upscale, max_batch=max_batch, check=False,
        **options,
    )  # fmt: skip
    size = int(test.shape[-2]), int(test.shape[-1])
    heatmaps = grown(explanation.heatmaps.cpu(), size)  # upscaled maps are larger
    heat = heatmaps[:, index].mean(dim=0)
    top = heat.max()
    count = len(supports)
    if aggregate == "together":
        own, far = heatmaps[0, 1 : 1 + count], heatmaps[0, 1 + count :]
    else:
        own, far = heatmaps[:count, 1 - index], heatmaps[: len(negatives), -1]
    return Attention(
        heat=heat / top if float(top) > 0 else heat,
        supports=own,
        others=far if len(negatives) else heatmaps[:0, 0],
        explanation=explanation,
    )


def _comparison(test: Tensor, supports: Tensor, negatives: Tensor, *, together: bool) -> Comparison:
    if together:
        return Comparison(test[None], supports[None], negatives[None])
    count = max(len(supports), len(negatives))
    turn = torch.arange(count)
    near = supports[turn % len(supports)].unsqueeze(1)
    far = near[:, :0]
    if len(negatives):
        far = negatives[turn % len(negatives)].unsqueeze(1)
    return Comparison(test.expand(count, *test.shape), near, far)


def _check_choices(aggregate: str, anchor: str) -> None:
    for name, value, known in (("aggregate", aggregate, AGGREGATES), ("anchor", anchor, ANCHORS)):
        if value not in known:
            raise ComparisonError(
                f"Expected {name} to be one of {', '.join(known)}, got '{value}'."
            )
    if (aggregate, anchor) == ("together", "support"):
        raise ComparisonError(
            "Expected the test image as the anchor of all supports together, since a comparison "
            "has one anchor; choose anchor='test' or aggregate='averaged'."
        )


def check_tensors(*images: object) -> None:
    """Raises unless every image is a tensor."""
    strange = [type(image).__name__ for image in images if not isinstance(image, Tensor)]
    if strange:
        raise ComparisonError(
            f"Expected images as tensors, got {strange[0]}; give pictures alone or tensors alone."
        )


def _check_supports(test: Tensor, supports: Tensor, negatives: Tensor) -> None:
    fits = test.dim() == 3 and test.is_floating_point()
    fits = fits and all(
        side.dim() == 4 and side.shape[1:] == test.shape and side.dtype == test.dtype
        for side in (supports, negatives)
    )
    if not fits or not len(supports):
        raise ComparisonError(
            "Expected a float test image (3,H,W), at least one support (S,3,H,W) and others "
            f"(N,3,H,W) of its size and type, got {tuple(test.shape)}, {tuple(supports.shape)} and "
            f"{tuple(negatives.shape)}."
        )


METHOD = DEFAULT[-1]
"""The row of ``explain`` that shows where the match is.

It segmented best where it was measured (``docs/segmentation-results.md``).
"""


VIEWS: dict[str, str] = {
    "whole": "squeeze the whole picture into the network's input",
    "model": "as the model's own preprocessing has it, which may cut off the edges",
}
"""What of a picture the network sees."""


@typed
def segment(
    model: nn.Module,
    test: Tensor | PictureSource,
    supports: Tensor | Sequence[PictureSource],
    others: Tensor | Sequence[PictureSource] | None = None,
    *,
    method: str | MethodLike = METHOD,
    layer: Layers = None,
    refine: str = "grabcut",
    cue: Cue | None = None,
    cut: GrabCut | None = None,
    aggregate: str = "averaged",
    anchor: str = "test",
    view: str = "whole",
    support_masks: Tensor | Sequence[str | Path] | None = None,
    upscale: float = 1,
    max_batch: int | None = None,
    **options: Any,
) -> Segmentation:
    """Segments a test image, as in section 4.3 of the similarity-attention paper.

    The attention map of the test image, compared with images that show the class to find
    (``supports``) and with images of another class (``others``), is the cue for GrabCut. No mask of
    a support is needed. The model is left as it was, and so are random generators.

    Args:
        model: A similarity model, whose ``preprocess`` is used, or any ``nn.Module`` that returns
            an embedding.
        test: A picture: a file, a picture of PIL or an array; mask and heat then have its size. Or
            a preprocessed image ``(3,H,W)``.
        supports: Pictures, one for one-shot, five for five-shot; of a preprocessed image
            ``(S,3,H,W)``.
        others: Likewise, the supports of the other class in the two-way setting; None for the
            one-way setting, which has none.
        method: A name in ``METHODS`` or an object; ``sam`` is the paper's.
        layer: As for ``explain``.
        refine: A name in ``REFINEMENTS``; ``grabcut`` is the paper's.
        cue: Thresholds; None for the method's own in ``CUES``.
        cut: How GrabCut runs; None for five iterations.
        aggregate: ``averaged``, as in the paper, or ``together``.
        anchor: ``test``, as in the paper, or ``support``.
        view: Of pictures ``whole`` or ``model``. What the network does not see is probably
            background to the cut, and is never sure.
        support_masks: Where the object is in each support: what lies outside is hidden from the
            network. For pictures files, light or opaque there; for tensors ``(S,H,W)`` boolean.
            None for the paper's setting, without them.
        upscale: As for ``explain``; here without finer detail of the pictures.
        max_batch: Bounds the images in one forward pass.
        **options: Of a method given by name, such as ``weights="relative"``.

    Raises:
        ImageError: If a picture or a mask cannot be read.
        ComparisonError: If images, masks or options do not fit.
        ModelError: If the model or a layer cannot be used.
    """
    made = Making(
        as_similarity_model(model), method, refine, cue or default_cue(method), cut or GrabCut(),
        {"aggregate": aggregate, "anchor": anchor},
        {"layer": layer, "upscale": upscale, "max_batch": max_batch, **options},
    )  # fmt: skip
    if isinstance(test, Tensor):
        return _segment_tensors(made, test, supports, others, support_masks)
    return _segment_pictures(
        made, test, supports, () if others is None else others, view, support_masks
    )


@dataclass(frozen=True)
class Making:
    """How a test image is segmented; ``setting`` has ``aggregate`` and ``anchor``."""

    model: SimilarityModel
    method: str | MethodLike
    refine: str
    cue: Cue
    cut: GrabCut
    setting: Mapping[str, Any]
    options: Mapping[str, Any]

    def attend(self, test: Tensor, supports: Tensor, others: Tensor | None) -> Attention:
        """The attention map of the test image and those of the others."""
        return attend(
            self.model, test, supports, others, method=self.method, **self.setting, **self.options
        )

    def finished(
        self,
        attention: Attention,
        picture: Pixels,
        grow: Callable[[], Heat],
        seen: Mask,
        images: tuple[SupportImage, ...],
        settings: Mapping[str, Any],
        name: str = "",
        notes: Sequence[str] = (),
        geometries: tuple[Geometry, ...] = (),
    ) -> Segmentation:
        """A segmentation from the attention map ``(H,W)`` on the picture ``(H,W,3)``."""
        heat = grow()
        refined = mask_of(picture, heat, self.cue, by=self.refine, seen=seen, cut=self.cut)
        explained = attention.explanation
        own = dict.fromkeys(explained.warnings)
        warnings = (*notes, *own, *((refined.note,) if refined.note else ()))
        return Segmentation(
            mask=refined.mask,
            heat=grow if heat.size >= LARGE else heat,  # type: ignore[arg-type]
            marks=refined.marks,
            picture=picture,
            name=name,
            images=images,
            refine=self.refine,
            method=explained.method,
            model=explained.model,
            layers=explained.layers,
            options={
                **explained.options, **self.setting, **settings,
                "cue": asdict(self.cue), "cut": asdict(self.cut),
            },
            warnings=warnings,
            versions=versions(),
            bypass=explained.bypass,
            geometries=geometries,
        )  # fmt: skip


@full_precision()
def _segment_tensors(
    made: Making, test: Tensor, supports: Any, others: Any, masks: Any
) -> Segmentation:
    """Of preprocessed images; see :func:`segment`."""
    shown = supports
    if masks is not None:
        check_tensors(supports, masks)
        shown = hidden(supports, masks)
    attention = made.attend(test, shown, others)
    heat: Heat = attention.heat.numpy().astype(np.float32)
    undo = made.model.preprocess.undo
    far = undo(others) if others is not None and len(others) else None
    images = beside(attention, undo(shown), far)
    seen = np.ones(heat.shape, dtype=bool)
    return made.finished(
        attention, undo(test), lambda: heat, seen, images, {"support_masks": masks is not None}
    )


@full_precision()
def _segment_pictures(
    made: Making,
    test: PictureSource,
    supports: Any,
    others: Any,
    view: str,
    masks: Any,
) -> Segmentation:
    """Of pictures, at the test picture's own resolution; see :func:`segment`."""
    _check(supports, masks, view)
    own = made.model.preprocess
    prepare = whole_view(own) if view == "whole" else own
    pictures = read_pictures((test, *supports, *others))
    views, geometries = prepared(prepare, pictures)
    cut_at = 1 + len(supports)
    near, far = views[1:cut_at], views[cut_at:]
    if masks is not None:
        near = hidden(near, _masks(masks, geometries[1:cut_at]))
    attention = made.attend(views[0], near, far)
    images = beside(
        attention,
        prepare.undo(near),
        prepare.undo(far) if len(far) else None,
        [picture.path for picture in pictures[1:]],
    )
    return made.finished(
        attention,
        pixels_of(pictures[0].image),
        partial(geometries[0].to_original, attention.heat.numpy().astype(np.float32)),
        seen_by(geometries[0]),
        images,
        {"view": view, "support_masks": masks is not None},
        name=pictures[0].path,
        notes=notes_of(own, pictures),
        geometries=tuple(geometries),
    )


def hidden(supports: Tensor, masks: Tensor) -> Tensor:
    """Supports ``(S,3,H,W)`` with the mean colour outside their masks ``(S,H,W)``."""
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
    attention: Attention,
    supports: Pixels,
    others: Pixels | None,
    names: Sequence[str] = (),
) -> tuple[SupportImage, ...]:
    """Supports ``(S,h,w,3)`` and others ``(N,h,w,3)`` with their own attention maps."""
    images: list[SupportImage] = []
    for role, pictures, heats in zip(
        ROLES, (supports, others), (attention.supports, attention.others), strict=True
    ):
        for picture, heat in zip(() if pictures is None else pictures, heats, strict=True):
            name = names[len(images)] if names else ""
            images.append(SupportImage(name, role, picture, heat.numpy().astype(np.float32)))
    return tuple(images)


def whole_view(prepare: Preprocess) -> Preprocess:
    """Preprocessing that shows the network all of a picture, in another aspect if need be."""
    return replace(prepare, fit="squash", crop_fraction=1.0)


def seen_by(geometry: Geometry) -> Mask:
    """The pixels of a picture that the network saw ``(H0,W0)``."""
    height, width = geometry.original
    left, top, right, bottom = geometry.box
    if (left, top, right, bottom) == (0, 0, width, height):
        return np.broadcast_to(np.True_, (height, width))
    seen = np.zeros((height, width), dtype=bool)
    seen[int(np.floor(top)) : int(np.ceil(bottom)), int(np.floor(left)) : int(np.ceil(right))] = 1
    return seen


def _masks(paths: Sequence[str | Path], geometries: Sequence[Geometry]) -> torch.Tensor:
    attention = []
    for path, geometry in zip(paths, geometries, strict=True):
        mask = read_mask(path, geometry.original).numpy()
        seen = geometry.from_original(mask)
        if not seen.any():
            raise ComparisonError(
                f"The network sees nothing of what the mask '{path}' marks; choose view='whole'."
            )
        attention.append(torch.from_numpy(seen))
    return torch.stack(attention)


def _check(
    supports: Sequence[PictureSource],
    masks: Sequence[str | Path] | None,
    view: str,
) -> None:
    if not supports:
        raise ComparisonError("Expected a list of at least one support picture, got none.")
    if masks is not None and len(masks) != len(supports):
        raise ComparisonError(
            f"Expected a mask for each of {len(supports)} supports, got {len(masks)}."
        )
    if view not in VIEWS:
        raise ComparisonError(f"Expected view to be one of {', '.join(VIEWS)}, got '{view}'.")
