"""Attention maps of the same validation triplets after every epoch, so that one sees them grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from simexplain.data.folders import Record
from simexplain.errors import ImageError
from simexplain.explaining_files import explain
from simexplain.models.avsl import AVSL
from simexplain.models.base import SimilarityModel
from simexplain.picturing import footer, verdict
from simexplain.rendering.lettering import write
from simexplain.rendering.overlay import RENDERERS
from simexplain.rendering.panel import ROLE_COLOURS, png_of

_INK, _FAINT = "#222222", "#666666"
_CELL, _GAP, _EDGE = 1.7, 0.05, 0.15
_ROLES = ("anchor", "positive", "negative")


def watched_triplets(
    queries: Sequence[Record], count: int, seed: int
) -> tuple[tuple[Record, Record, Record], ...]:
    """Triplets of pictures drawn once for a run: anchors of different classes where there are.

    Args:
        queries: Labelled pictures that are not trained on.
        count: How many triplets at most.
        seed: Of the draw, which depends on nothing else.

    Returns:
        Anchor, another picture of its class (of another group, where there is one) and one of
        another class; none where the pictures do not allow it.
    """
    classes: dict[str, list[Record]] = {}
    for record in queries:
        classes.setdefault(str(record.label), []).append(record)
    able = [label for label in sorted(classes) if len(classes[label]) > 1]
    if len(classes) < 2 or not able:
        return ()
    draw = np.random.default_rng(seed)
    found = []
    order = [able[place] for place in draw.permutation(len(able))]
    for label in order[:count]:
        own = classes[label]
        anchor = own[int(draw.integers(len(own)))]
        others = [record for record in own if record is not anchor]
        apart = [r for r in others if r.group is None or r.group != anchor.group] or others
        far = [name for name in sorted(classes) if name != label]
        negatives = classes[far[int(draw.integers(len(far)))]]
        found.append(
            (
                anchor,
                apart[int(draw.integers(len(apart)))],
                negatives[int(draw.integers(len(negatives)))],
            )
        )
    return tuple(found)


def attention_picture(
    model: SimilarityModel,
    triplets: Sequence[tuple[Record, Record, Record]],
    *,
    title: str,
    method: dict[str, Any] | None = None,
) -> bytes:
    """A PNG with a row for each triplet: three pictures, and what the model looks at in them.

    The model is left as it was. Triplets whose pictures cannot be read are left out.

    Args:
        model: In any mode.
        triplets: Anchor, positive, negative.
        title: Over the figure.
        method: Options of ``explain``; unless given, ``avsl`` for AVSL models and else
            similarity attention with signed weights.
    """
    chosen = method or _method(model)
    rows, foot = [], ""
    for triplet in triplets:
        try:
            paths = [record.path for record in triplet]
            explained = explain(model, paths, arch="triplet", check=False, **chosen)
        except ImageError:
            continue
        views = [explained.preprocess.undo(image) for image in explained.images[0]]
        heat = explained.heatmaps_at(0).cpu().numpy()
        rows.append((views, heat, verdict(explained), explained.condition(0).holds))
        foot = footer(explained)
    return png_of(_drawn(rows, title, foot))


def _method(model: SimilarityModel) -> dict[str, Any]:
    if isinstance(model, AVSL):
        return {"method": "avsl"}
    return {"method": "sam", "weights": "signed"}


_Row = tuple[list[NDArray[np.uint8]], NDArray[np.float32], str, bool | None]


def _drawn(rows: Sequence[_Row], title: str, foot: str) -> Figure:
    """Every picture beside itself with its heat; the roles above, the verdict below each row."""
    tall = max((max(v.shape[0] / v.shape[1] for v in views) for views, *_ in rows), default=1.0)
    cell, height, line, head = _CELL, _CELL * min(tall, 2.2), 0.3, 0.72
    width = 2 * _EDGE + 6 * cell + 3 * _GAP + 2 * 0.2
    total = head + max(1, len(rows)) * (height + line) + 0.3
    figure = Figure(figsize=(width, total), dpi=110, facecolor="white")
    write(figure, _EDGE / width, 1 - 0.2 / total, title, size=11, color=_INK, va="center")
    write(figure, _EDGE / width, 0.15 / total, foot, size=7, color=_FAINT, va="center")
    for number, (views, heat, said, holds) in enumerate(rows):
        top = head + number * (height + line)
        for place, view in enumerate(views):
            left = _EDGE + place * (2 * cell + _GAP + 0.2)
            shown = (view, RENDERERS["overlay"](view, heat[place]))
            for side, picture in enumerate(shown):
                x = left + side * (cell + _GAP)
                box = (x / width, 1 - (top + height) / total, cell / width, height / total)
                axes = figure.add_axes(box)
                axes.imshow(picture)
                axes.set_axis_off()
            if number == 0:
                write(figure,
                    left / width, 1 - (head - 0.14) / total, _ROLES[place], size=9,
                    color=ROLE_COLOURS[_ROLES[place]], va="center", weight="bold",
                )  # fmt: skip
        colour = _FAINT if holds is None else ROLE_COLOURS["positive" if holds else "negative"]
        y = 1 - (top + height + 0.12) / total
        write(figure, _EDGE / width, y, said, size=8, color=colour, va="center")
    return figure
