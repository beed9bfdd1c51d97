"""Attention maps of the same validation triplets after every epoch, so that one sees them grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from simexplain.data.folders import Record
from simexplain.errors import ImageError
from simexplain.explaining import explain
from simexplain.explanation import Explanation
from simexplain.models.avsl import AVSL
from simexplain.models.base import SimilarityModel
from simexplain.picturing import footer, verdict
from simexplain.rendering.overlay import overlay
from simexplain.rendering.sheet import ROLE_COLOURS, VERDICTS, Cell, Grid, Row, Words, page, png_of

_CELL = 1.7
_ROLES = ("anchor", "positive", "negative")


def attention_triplets_of(
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
    triplets = []
    order = [able[index] for index in draw.permutation(len(able))]
    for label in order[:count]:
        own = classes[label]
        anchor = own[int(draw.integers(len(own)))]
        others = [record for record in own if record is not anchor]
        apart = [r for r in others if r.group is None or r.group != anchor.group] or others
        far = [name for name in sorted(classes) if name != label]
        negatives = classes[far[int(draw.integers(len(far)))]]
        triplets.append(
            (
                anchor,
                apart[int(draw.integers(len(apart)))],
                negatives[int(draw.integers(len(negatives)))],
            )
        )
    return tuple(triplets)


def attention_picture(
    model: SimilarityModel,
    triplets: Sequence[tuple[Record, Record, Record]],
    *,
    title: str,
    method: dict[str, Any] | None = None,
) -> bytes:
    """A PNG with a row for each triplet: three pictures, and the model's attention in them.

    The model is left as it was. Triplets whose pictures cannot be read are left out.

    Args:
        model: In any mode.
        triplets: Anchor, positive, negative.
        title: Over the figure.
        method: Options of ``explain``; unless given, ``avsl`` for AVSL models and else
            similarity attention with signed weights.
    """
    chosen = method or _method(model)
    rows: list[Row] = []
    foot = ""
    for triplet in triplets:
        try:
            paths = [record.path for record in triplet]
            explained = explain(model, paths, arch="triplet", check=False, **chosen)
        except ImageError:
            continue
        rows.append(_row(explained, roles=not rows))
        foot = footer(explained)
    grid = Grid(rows, [_CELL, _CELL, 0.1] * 3, gap=0.05)
    return png_of(page([grid], title=title, footer=foot).figure)


def _method(model: SimilarityModel) -> dict[str, Any]:
    if isinstance(model, AVSL):
        return {"method": "avsl"}
    return {"method": "sam", "weights": "signed"}


def _row(explained: Explanation, *, roles: bool) -> Row:
    """Every picture beside itself with its heat; the verdict over them."""
    cells: list[Cell | None] = []
    for index, role in enumerate(_ROLES):
        view = explained.preprocess.undo(explained.images[0, index])
        heat = explained.heatmaps_at(0)[index].cpu().numpy()
        title = (Words(role, ROLE_COLOURS[role], 9, "bold", "left"),) if roles else ()
        cells += [Cell(view, title), Cell(overlay(view, heat)), None]
    ink = VERDICTS[explained.condition(0).holds]
    return Row(cells, Words(verdict(explained), ink, 9, align="left"), tallest=2.2 * _CELL)
