"""Where everything goes in the figure of several methods: inches from the left and from the top."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.patches import Rectangle

from simexplain.rendering.lettering import write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GOOD, NOTE = "#222222", "#666666", "#1b7837", "#8a5a00"
NAMES, SCORE, GAP, EDGE = 2.0, 0.82, 0.06, 0.18
"""Inches: the column of names, one of scores, between images, around everything."""
_TALLEST, _WIDEST = 12.5, 9.0


@dataclass(frozen=True)
class Plan:
    """Where everything goes, in inches.

    Attributes:
        row: The height of a row of images.
        widths: Of the columns of images; fewer than there are images where the page is full.
        head: Above the pictures.
        foot: Below the row of the random map.
        methods: How many rows there are below the pictures.
        scores: How many columns of numbers.
    """

    row: float
    widths: tuple[float, ...]
    head: float
    foot: float
    methods: int
    scores: int

    @property
    def images(self) -> float:
        """All columns of images with the gaps between them."""
        return sum(self.widths) + GAP * (len(self.widths) - 1)

    @property
    def width(self) -> float:
        """Of the figure."""
        return EDGE + NAMES + self.images + 0.1 + self.scores * SCORE + EDGE

    @property
    def height(self) -> float:
        """Of the figure."""
        return self.head + (self.methods + 1) * (self.row + GAP) + 0.34 + self.foot

    def left(self, place: int) -> float:
        """Of an image."""
        return EDGE + NAMES + sum(self.widths[:place]) + GAP * place

    def top(self, row: int) -> float:
        """Of a row; the pictures are row 0, the random map the last one."""
        return self.head + row * (self.row + GAP)

    def score(self, column: int) -> float:
        """The middle of a column of scores."""
        return EDGE + NAMES + self.images + 0.1 + (column + 0.5) * SCORE


def planned(aspects: Sequence[float], methods: int, metrics: int) -> Plan:
    """Rows as high as the page allows, columns as wide as each picture is in such a row."""
    rows = methods + 1
    height = min(1.9, max(0.95, (_TALLEST - 2) / rows - GAP))
    height = max(0.95, min(height, _WIDEST / sum(aspects)))
    widths: list[float] = []
    for aspect in aspects:
        if widths and sum(widths) + aspect * height > 1.2 * _WIDEST:
            break
        widths.append(aspect * height)
    return Plan(height, tuple(widths), 1.28, 0.0, methods, metrics + 2)


def axes_at(figure: Figure, plan: Plan, row: int, place: int) -> Axes:
    """Axes of one image, without ticks, framed lightly."""
    left, top = plan.left(place), plan.top(row)
    axes: Axes = figure.add_axes(
        (
            left / plan.width,
            1 - (top + plan.row) / plan.height,
            plan.widths[place] / plan.width,
            plan.row / plan.height,
        )
    )
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color="#dddddd", linewidth=0.6)
    return axes


def rule(figure: Figure, plan: Plan, start: float, end: float, y: float) -> None:
    """A thin line across at ``y`` inches from the top."""
    figure.add_artist(
        Rectangle(
            (start / plan.width, 1 - y / plan.height), (end - start) / plan.width, 0,
            edgecolor="#dddddd", linewidth=0.7, transform=figure.transFigure,
        )
    )  # fmt: skip


def say(figure: Figure, plan: Plan, x: float, y: float, text: str, **style: Any) -> None:
    """Text as it is, at inches from the left and from the top; dollar signs are no formulas."""
    write(figure, x / plan.width, 1 - y / plan.height, text, **style)


def shortened(text: str, limit: int) -> str:
    """A long text with its middle left out."""
    limit = max(limit, 4)
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}…{text[-(limit // 2) :]}"
