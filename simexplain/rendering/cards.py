"""Similarity nodes on paper: what the figures of an attribution share.

A similarity node is one place of the embedding of one level of a network; AVSL writes the distance
of two images as the sum over all of them of sensitivity times dissimilarity, ``sum lambda delta``.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path
from matplotlib.textpath import TextToPath
from matplotlib.transforms import Affine2D

from simexplain.printing import printable
from simexplain.rendering.lettering import write
from simexplain.rendering.overlay import Pixels
from simexplain.rendering.panel import ShownFigure

INK, FAINT, PALE, WARNING = "#222222", "#666666", "#c9c9c9", "#8a5a00"
SMALL = 8.0
"""Points; what is smaller cannot be read once the figure is 1200 pixels wide."""

_MOST_POINTS, _LEAST_POINTS, _BEND = 11.0, 0.8, 0.85

LINE = 0.175
"""From one line of small text to the next, in inches."""


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


class Sheet:
    """A figure laid out like a page: every place is in inches from the top left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = ShownFigure(figsize=(width, height), dpi=120, facecolor="white")
        # By way of fractions of the figure, since a tight crop moves only those.
        inches = Affine2D().scale(1 / width, -1 / height).translate(0, 1)
        self._place = inches + self.figure.transFigure

    def say(self, x: float, y: float, text: str, *, most: float | None = None, **style: Any) -> Any:
        """Writes text as it is, dollars and all, shortened to ``most`` inches where given."""
        style = {"size": SMALL, "color": INK, "va": "center", "zorder": 6, **style}
        text = printable(text)
        if most is not None:
            text = shortened(text, most, style["size"], style.get("weight", "normal"))
        return write(self.figure, x, y, text, transform=self._place, **style)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes whose top left corner is at ``(x, y)``."""
        low = self.height - y - height
        place = (x / self.width, low / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(place, zorder=4)

    def picture(self, pixels: Pixels, x: float, y: float, width: float, height: float) -> Axes:
        """A picture as large as fits into a place, in its middle."""
        wide, high = fitted(pixels, width, height)
        axes = self.axes(x + (width - wide) / 2, y + (height - high) / 2, wide, high)
        few = min(pixels.shape[:2]) < 64
        axes.imshow(pixels, aspect="auto", interpolation="nearest" if few else "antialiased")
        axes.set_axis_off()
        return axes

    def frame(
        self, x: float, y: float, width: float, height: float, *, corner: float = 0.08, **style: Any
    ) -> Any:
        """A rectangle with round corners."""
        style = {"facecolor": "white", "edgecolor": "none", "linewidth": 0, "zorder": 2, **style}
        box = f"round,pad=0,rounding_size={min(corner, width / 2, height / 2)}"
        patch = FancyBboxPatch((x, y), width, height, box, transform=self._place, **style)
        return self.figure.add_artist(patch)

    def line(self, points: Sequence[tuple[float, float]], **style: Any) -> Any:
        """A straight line; from five points on, its last four are those of a curve."""
        curve = [Path.CURVE4] * (3 if len(points) > 4 else 0)
        straight = [Path.LINETO] * (len(points) - 1 - len(curve))
        path = Path(points, [Path.MOVETO, *straight, *curve])
        style = {"edgecolor": PALE, "linewidth": 1, "zorder": 1, "capstyle": "butt", **style}
        patch = PathPatch(path, facecolor="none", transform=self._place, **style)
        return self.figure.add_artist(patch)

    def fan(
        self,
        start: tuple[float, float],
        ends: Sequence[tuple[float, float]],
        parts: Sequence[float],
        colours: Sequence[str],
    ) -> None:
        """Edges from one place to several from left to right, as wide as their parts."""
        most = max(parts, default=0) or 1
        widths = [max(_LEAST_POINTS, _MOST_POINTS * part / most) for part in parts]
        bend = max(start[1], min((y for _, y in ends), default=0) - _BEND)
        x = start[0] - sum(widths) / 72 / 2
        for (right, end), width, colour in zip(ends, widths, colours, strict=True):
            own, x = x + width / 72 / 2, x + width / 72
            deep, low = 0.3 * bend + 0.7 * end, 0.7 * bend + 0.3 * end
            points = [(own, start[1]), (own, bend), (own, deep), (right, low), (right, end)]
            # Thin edges lie over thick ones, which would hide them.
            order = 1 + 1 / (2 + width)
            edge = self.line(points, edgecolor=colour, linewidth=width, zorder=order)
            edge.set_gid("edge")

    def foot(self, lines: Sequence[tuple[str, str]]) -> Figure:
        """Lines of (text, colour) at the lower end, which finish the figure."""
        start = self.height - LINE * len(lines)
        for position, (text, colour) in enumerate(lines):
            self.say(0.2, start + LINE * (position - 0.2), text, color=colour)
        return self.figure


def foot_lines(
    legend: str, footer: str, notes: Sequence[str], width: float
) -> list[tuple[str, str]]:
    """What stands below a figure, each line with its colour: legend, source, warnings."""
    texts = [(legend, INK), (footer, FAINT), *((f"! {note}", WARNING) for note in notes)]
    lines = []
    for text, colour in texts:
        if text.strip():
            # Letters differ in breadth, and so do lines of equally many of them.
            most = int(0.96 * (width - 0.4) * len(text) / breadth(text, SMALL))
            lines += [(line, colour) for line in textwrap.wrap(text, max(most, 20))]
    return lines


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


def fitted(picture: Pixels, width: float, height: float) -> tuple[float, float]:
    """The largest size in inches, ``(width, height)``, that a picture has within a place."""
    high, wide = picture.shape[:2]
    scale = min(width / wide, height / high)
    # A picture one pixel high would vanish.
    return max(wide * scale, 0.03), max(high * scale, 0.03)


def number(value: float) -> str:
    """Three digits that count: ``0.0123``, ``12.3``, ``1.2e-6``."""
    digits, exponential, power = f"{value:.3g}".partition("e")
    return f"{digits}e{int(power)}" if exponential else digits


def breadth(text: str, size: float, weight: str = "normal") -> float:
    """How broad a text is, in inches."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        font = FontProperties(size=size, weight=weight)
        points, _, _ = TextToPath().get_text_width_height_descent(text, font, ismath=False)
    # On a screen, letters are fitted to its pixels, which makes them a little broader.
    return 1.03 * float(points) / 72


def shortened(text: str, most: float, size: float, weight: str = "normal") -> str:
    """Leaves out the middle of a text broader than ``most`` inches: both ends tell names apart."""
    # No letter of a name is narrower than a fifth of its height on average.
    kept, best = min(len(text), int(5 * 72 * most / size) + 2), text
    while kept > 1 and breadth(best, size, weight) > most:
        kept -= 1
        best = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
    return best


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
