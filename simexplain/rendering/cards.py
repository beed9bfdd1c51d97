"""Similarity nodes on paper: what the figures of an attribution share.

A similarity node is one place of the embedding of one level of a network; AVSL writes the distance
of two images as the sum over all of them of sensitivity times dissimilarity, ``sum lambda delta``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simexplain.rendering.lettering import breadth, number, shortened
from simexplain.rendering.overlay import Pixels
from simexplain.rendering.sheet import FAINT, LINE, Sheet


@dataclass(frozen=True)
class NodeCard:
    """One similarity node of a pair, shown on both images.

    Attributes:
        level: 0 is the lowest level.
        node: Which of the level's nodes.
        overlays: RGB ``(h,w,3)`` of both images with the node's CAM on them; any aspect ratios.
        value: ``delta >= 0``, the node's dissimilarity.
        reliability: ``p`` in (0, 1]; 1 at the lowest level.
        sensitivity: ``lambda >= 0``, of the distance to the node.
        contribution: ``lambda delta``, in units of the distance.
    """

    level: int
    node: int
    overlays: tuple[Pixels, Pixels]
    value: float
    reliability: float
    sensitivity: float
    contribution: float


@dataclass(frozen=True)
class LevelShare:
    """What all nodes of a level contribute to the distance.

    Attributes:
        layer: Such as ``blocks.4``.
        contribution: In units of the distance.
        share: Of the distance, in [0, 1].
        nodes: How many the level has.
    """

    layer: str
    contribution: float
    share: float
    nodes: int


@dataclass(frozen=True)
class StandIn:
    """A lower node that stands in for an unreliable one.

    Attributes:
        card: The lower node.
        edge: The edge's normalised weight, in [0, 1].
        part: What passes through the edge, in units of the overall distance.
    """

    card: NodeCard
    edge: float
    part: float


@dataclass(frozen=True)
class Branch:
    """An unreliable node taken apart into lower nodes.

    Attributes:
        card: The unreliable node.
        own: What it contributes itself, in units of the distance.
        stand_ins: The lower nodes with the largest parts.
        rest: What passes through all other lower nodes together.
        others: How many those are.
        below: One of ``stand_ins``, known by its level and number, taken apart in turn.
    """

    card: NodeCard
    own: float
    stand_ins: tuple[StandIn, ...]
    rest: float
    others: int
    below: Branch | None = None

    @property
    def passed(self) -> float:
        """What comes from lower nodes, in units of the distance."""
        return sum(stand_in.part for stand_in in self.stand_ins) + self.rest


def draw_card(
    sheet: Sheet, card: NodeCard, x: float, y: float, width: float, height: float
) -> float:
    """Draws a node on both images, side by side, with its numbers below.

    Args:
        sheet: The page.
        card: The node.
        x: Left end, in inches.
        y: Upper end, in inches.
        width: Of the card, in inches.
        height: Of the pictures, in inches.

    Returns:
        Where the card ends below, in inches from the top.
    """
    gap = 0.05
    halves = widths_of([card], width - gap)
    sheet.picture(card.overlays[0], x, y, halves[0], height)
    sheet.picture(card.overlays[1], x + halves[0] + gap, y, halves[1], height)
    first = y + height + 0.13
    sheet.say(x, first, f"node {card.node}", weight="bold")
    sheet.say(x + width, first, f"adds {number(card.contribution)}", weight="bold", ha="right")
    second = first + LINE
    sheet.say(x, second, f"δ {number(card.value)}", color=FAINT)
    sheet.say(x + width / 2, second, f"p {number(card.reliability)}", color=FAINT, ha="center")
    sheet.say(x + width, second, f"λ {number(card.sensitivity)}", color=FAINT, ha="right")
    return second + 0.09


def widths_of(cards: Sequence[NodeCard], width: float) -> tuple[float, float]:
    """Shares a card's width out among its two pictures so that they are about equally high."""
    shapes = [mean_ratio([card.overlays[side] for card in cards]) for side in (0, 1)]
    first = width * shapes[0] / sum(shapes)
    return first, width - first


def mean_ratio(pictures: Sequence[Pixels]) -> float:
    """Width over height, kept to [0.5, 2]: beyond, a picture is shown smaller in its place."""
    ratios = [picture.shape[1] / picture.shape[0] for picture in pictures]
    return float(np.clip(ratios, 0.5, 2).mean())


def in_two(name: str, most: float, size: float, weight: str) -> list[str]:
    """A layer's name in one line or two, parted at a dot, each shortened to ``most`` inches."""
    parts = name.split(".")
    lines = [name]
    for count in range(1, len(parts)):
        first = ".".join(parts[:count]) + "."
        if breadth(name, size, weight) > most and (
            count == 1 or breadth(first, size, weight) <= most
        ):
            lines = [first, ".".join(parts[count:])]
    return [shortened(line, most, size, weight) for line in lines]
