"""What is shown of each kind of network where no method is named: the one place that decides.

The reasons are measurements; ``benchmarks/kinds_page.py`` writes them beside the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from simexplain.models.avsl import AVSL
from simexplain.models.base import SimilarityModel

DEFAULT = ("sam", "focus")
"""Made where no method is named: similarity attention as published, and where the match is."""

LEAST_SIDE = 4
"""Positions along the shorter side of the coarsest map from which on each is compared by itself."""

_LAYERS = 3


@dataclass(frozen=True)
class Kind:
    """Networks that are explained in one way.

    Attributes:
        name: What they have in common.
        rows: The methods, where none is named.
        layers: Where ``focus`` looks, in words.
        why: What was measured.
    """

    name: str
    rows: tuple[str, ...]
    layers: str
    why: str


STAGES = Kind(
    "several resolutions",
    DEFAULT,
    "the last layer of each of the three coarsest resolutions",
    "focus hits most, and the distractor least of the methods that hit as often; two layers are "
    "not enough, one is far behind",
)
SMALL = Kind(
    "a last map of fewer than 4 positions a side",
    DEFAULT,
    "the same, of images enlarged until the last map has 4 positions along its shorter side",
    "positions as large as half of the picture cannot be compared by themselves; with 4 a side and "
    "more, enlarging no longer pays everywhere",
)
GRID = Kind(
    "one resolution",
    DEFAULT,
    "its last three stages of depth, all on one grid",
    "focus hits the distractor least where a class token is read; where patches are averaged, "
    "similarity_cam with score=held does, but takes a second pass",
)
NODES = Kind(
    "AVSL",
    DEFAULT[:1],
    "none",
    "an AVSL model has nodes of its own, which focus does not know",
)
KINDS = (STAGES, SMALL, GRID, NODES)


def kind_of(grids: Sequence[tuple[int, int]], least: int = LEAST_SIDE) -> Kind:
    """The kind of a network by the grids of the maps that are looked at.

    Args:
        grids: Rows and columns of each.
        least: See :data:`LEAST_SIDE`.
    """
    if min(map(min, grids)) < least:
        return SMALL
    return GRID if len(set(grids)) == 1 and len(grids) > 1 else STAGES


def rows_for(model: SimilarityModel, *, direction: bool, chosen: bool) -> tuple[str, ...]:
    """The methods where none is named.

    Args:
        model: The model.
        direction: Images are scored along a direction, which has no dimensions that two embeddings
            could share, so that similarity attention is undefined.
        chosen: A layer or an option was named, of similarity attention unless another method is
            named.
    """
    if isinstance(model, AVSL):
        return NODES.rows
    if chosen:
        return DEFAULT[:1]
    return DEFAULT[1:] if direction else DEFAULT


def layers_for(model: SimilarityModel, images: Tensor) -> tuple[str, ...]:
    """Where ``focus`` looks: the last stages, one of each resolution where there are several."""
    return tuple(model.stages_for(images)[-_LAYERS:])
