"""One heatmap on the test image from all support images: pairs, triplets, or one set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from simexplain.comparison import Comparison
from simexplain.errors import ComparisonError
from simexplain.explaining_tensors import explain_tensors
from simexplain.explanation import Explanation
from simexplain.methods import MethodLike
from simexplain.methods.rows import Layers
from simexplain.metrics.maps import grown
from simexplain.models.base import SimilarityModel
from simexplain.segmentation.cue import SHAPES

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
    _check(test, supports, negatives)
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
    """Raises unless every image is a tensor.

    Raises:
        ComparisonError: If so.
    """
    strange = [type(image).__name__ for image in images if not isinstance(image, Tensor)]
    if strange:
        raise ComparisonError(
            f"Expected images as tensors, got {strange[0]}; give pictures alone or tensors alone."
        )


def _check(test: Tensor, supports: Tensor, negatives: Tensor) -> None:
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
