"""The verb for picture files: read, segment at the test picture's own resolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from simexplain.arguments import typed
from simexplain.data.images import Picture, PictureSource, read_pictures
from simexplain.data.preprocessing import Geometry, Preprocess, prepared
from simexplain.errors import ComparisonError
from simexplain.evaluation.items import read_mask
from simexplain.methods import MethodLike
from simexplain.methods.rows import Layers
from simexplain.models.embedder import as_similarity_model
from simexplain.segmentation.attending import attend
from simexplain.segmentation.cue import Cue, default_cue
from simexplain.segmentation.grabcut import GrabCut, Mask
from simexplain.segmentation.result import Segmentation
from simexplain.segmentation.segmenting import METHOD, beside, finished, hidden

VIEWS: dict[str, str] = {
    "whole": "squeeze the whole picture into the network's input",
    "model": "as the model's own preprocessing has it, which may cut off the edges",
}
"""What of a picture the network sees."""


@typed
def segment_files(
    model: nn.Module,
    test: PictureSource,
    supports: Sequence[PictureSource],
    others: Sequence[PictureSource] = (),
    *,
    method: str | MethodLike = METHOD,
    layer: Layers = None,
    refine: str = "grabcut",
    cue: Cue | None = None,
    cut: GrabCut | None = None,
    aggregate: str = "averaged",
    anchor: str = "test",
    view: str = "whole",
    support_masks: Sequence[str | Path] | None = None,
    upscale: float = 1,
    max_batch: int | None = None,
    **options: Any,
) -> Segmentation:
    """Segments in a test picture what the supports show; mask and heat have the picture's size.

    Args:
        model: A similarity model, whose ``preprocess`` is used, or any ``nn.Module`` that returns
            an embedding.
        test: A picture file, a picture of PIL or an array; so may all others be.
        supports: Pictures of the class sought.
        others: Pictures of the other class, for the two-way setting.
        method: As for :func:`~simexplain.segmentation.segmenting.segment`, like all without a
            word here.
        layer: As there.
        refine: As there.
        cue: As there.
        cut: As there.
        aggregate: As there.
        anchor: As there.
        view: ``whole`` or ``model``. What the network does not see is probably background to the
            cut, and is never sure.
        support_masks: One for each support, light or opaque where the object is.
        upscale: As for ``explain``; here without finer detail of the pictures.
        max_batch: Bounds the images in one forward pass.
        **options: Of a method given by name.

    Raises:
        ImageError: If a picture or a mask cannot be read.
        ComparisonError: If there is no support, or masks or options do not fit.
        ModelError: If the model or a layer cannot be used.
    """
    wrapped = as_similarity_model(model)
    _check(supports, support_masks, view)
    chosen = cue or default_cue(method)
    prepare = whole_view(wrapped.preprocess) if view == "whole" else wrapped.preprocess
    pictures = read_pictures((test, *supports, *others))
    views, geometries = prepared(prepare, pictures)
    cut_at = 1 + len(supports)
    near = views[1:cut_at]
    if support_masks is not None:
        near = hidden(near, _masks(support_masks, pictures[1:cut_at], geometries[1:cut_at]))
    found = attend(
        wrapped, views[0], near, views[cut_at:], method=method, layer=layer, aggregate=aggregate,
        anchor=anchor, upscale=upscale, max_batch=max_batch, **options,
    )  # fmt: skip
    notes = wrapped.preprocess.notes + tuple(n for picture in pictures for n in picture.notes)
    result = finished(
        found,
        np.asarray(pictures[0].image),
        geometries[0].to_original(found.heat.numpy().astype(np.float32)),
        seen_by(geometries[0]),
        images=beside(
            found,
            prepare.undo(near),
            prepare.undo(views[cut_at:]) if others else None,
            [picture.path for picture in pictures[1:]],
        ),
        refine=refine,
        cue=chosen,
        cut=cut or GrabCut(),
        told={
            "aggregate": aggregate,
            "anchor": anchor,
            "view": view,
            "support_masks": support_masks is not None,
        },
        name=pictures[0].path,
        notes=notes,
    )
    return replace(result, geometries=tuple(geometries))


def whole_view(prepare: Preprocess) -> Preprocess:
    """Preprocessing that shows the network all of a picture, in another aspect if need be."""
    return replace(prepare, fit="squash", crop_fraction=1.0)


def seen_by(geometry: Geometry) -> Mask:
    """The pixels of a picture that the network saw ``(H0,W0)``."""
    height, width = geometry.original
    left, top, right, bottom = geometry.box
    seen = np.zeros((height, width), dtype=bool)
    seen[int(np.floor(top)) : int(np.ceil(bottom)), int(np.floor(left)) : int(np.ceil(right))] = 1
    return seen


def _masks(
    paths: Sequence[str | Path], pictures: Sequence[Picture], geometries: Sequence[Geometry]
) -> torch.Tensor:
    found = []
    for path, picture, geometry in zip(paths, pictures, geometries, strict=True):
        mask = read_mask(path, (picture.image.height, picture.image.width)).numpy()
        seen = geometry.from_original(mask)
        if not seen.any():
            raise ComparisonError(
                f"The network sees nothing of what the mask '{path}' marks; choose view='whole'."
            )
        found.append(torch.from_numpy(seen))
    return torch.stack(found)


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
