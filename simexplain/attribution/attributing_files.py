"""The verb for picture files: read, attribute, and keep the pictures for the figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from simexplain.arguments import typed
from simexplain.attribution.attributing import attribute
from simexplain.attribution.result import Attribution
from simexplain.data.images import PictureSource, read_pictures
from simexplain.data.preprocessing import prepared
from simexplain.errors import ComparisonError
from simexplain.models.avsl_runs import expected_avsl


@typed
def attribute_files(
    model: nn.Module,
    paths: Sequence[PictureSource],
    *,
    roles: Sequence[str] | None = None,
    max_batch: int | None = None,
) -> Attribution:
    """Reads pictures and takes the distance of the first to each of the others apart.

    Args:
        model: An AVSL model.
        paths: Two or more picture files, pictures of PIL or arrays. With three and no roles
            they are a triplet.
        roles: ``positive``, ``negative`` or empty for each picture after the first.
        max_batch: Bounds the images in one forward pass; results do not depend on it.

    Raises:
        ImageError: If a picture cannot be read.
        ComparisonError: If there are too few pictures.
        ModelError: If the model is no AVSL model.
    """
    if len(paths) < 2:
        raise ComparisonError(f"Expected at least two pictures, got {len(paths)}.")
    avsl = expected_avsl(model)
    if roles is None and len(paths) == 3:
        roles = ("positive", "negative")
    pictures = read_pictures(paths)
    views, geometries = prepared(avsl.preprocess, pictures)
    result = attribute(avsl, views[0], views[1:], roles=roles, max_batch=max_batch)
    notes = avsl.preprocess.notes + tuple(n for picture in pictures for n in picture.notes)
    return replace(
        result,
        pictures=tuple((pictures[0], other) for other in pictures[1:]),
        geometries=tuple((geometries[0], other) for other in geometries[1:]),
        warnings=notes + result.warnings,
    )
