"""A distance taken apart into similarity nodes, level by level (AVSL, figure 7).

A similarity node is one place of the embedding of one level of a network; AVSL writes the distance
of two images as the sum over all of them of sensitivity times dissimilarity, ``sum lambda delta``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from simexplain.rendering.lettering import breadth, number, shortened
from simexplain.rendering.overlay import Pixels
from simexplain.rendering.sheet import (
    FAINT,
    INK,
    LINE,
    ROLE_COLOURS,
    SMALL,
    Sheet,
    fitted,
    foot_lines,
)


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


_WIDTH, _GUTTER, _EDGE = 13.0, 1.95, 0.2
_HEAD, _PICTURE, _GAP = 0.9, 1.75, 0.55
_MIDDLE = (_GUTTER + _WIDTH) / 2
_PAD, _BETWEEN, _HEADER, _CAPTION = 0.1, 0.2, 0.24, 0.4
_BROADEST, _LOWEST_BAND = 1.95, 1.1
_MOST_POINTS, _LEAST_POINTS, _BEND = 11.0, 0.8, 0.85
_BAND, _TRACK, _SHARE = "#f4f3f0", "#dedcd6", ROLE_COLOURS["anchor"]
_COLOURS = {
    "similar": (ROLE_COLOURS["positive"], "#8fc19c"),
    "dissimilar": (ROLE_COLOURS["negative"], "#dda08f"),
    "unreliable": ("#555555", "#b5b5b5"),
    "stand-in": ("#b0b0b0", "#b5b5b5"),
    "others": ("#b0b0b0", "#d6d6d6"),
}
_LEGEND = (
    "δ: how dissimilar the images are in a node.  λ: how sensitive the distance is to it.  "
    "adds: λδ, its part of the distance.  p: its reliability; lower nodes stand in for the share "
    "1 − p of it.  ω: weight of an edge.  passes: what comes through an edge, its width, to scale "
    "among the edges from one place."
)


@dataclass(frozen=True)
class _Frame:
    """Cards in one frame, none in that of all others, and what comes through the edge to it."""

    kind: str
    level: int
    cards: tuple[NodeCard, ...]
    header: tuple[str, str]  # at the left and at the right, above the cards
    part: float  # what comes through the edge
    source: Branch | None = None  # where the edge comes from; None for the distance itself
    parted: Branch | None = None  # whose edges start here


_Row = list[_Frame]
_Placed = tuple[_Frame, float, float, float, float]  # left and upper end, width, height


@dataclass(frozen=True)
class _Sizes:
    """Of the cards, in inches; alike in the whole figure so that cards can be compared."""

    card: float
    picture: float

    def width(self, frame: _Frame) -> float:
        if not frame.cards:
            return max(1.2, *(breadth(text, SMALL) + 0.25 for text in frame.header))
        count = len(frame.cards)
        return count * self.card + (count - 1) * _BETWEEN + 2 * _PAD

    def height(self, frame: _Frame) -> float:
        if not frame.cards:
            return 2 * LINE + 0.14
        return _HEADER + self.picture + _CAPTION + 0.07 + (LINE if frame.parted else 0)

    def row(self, row: _Row) -> float:
        return max(self.height(frame) for frame in row)

    def band(self, rows: Sequence[_Row]) -> float:
        return max(_LOWEST_BAND, sum(self.row(row) for row in rows) + 0.3 * len(rows))


def attribution_graph(
    *,
    pictures: tuple[Pixels, Pixels],
    captions: tuple[str, str],
    distance: float,
    levels: Sequence[LevelShare],
    similar: Sequence[NodeCard],
    dissimilar: Sequence[NodeCard],
    branch: Branch | None,
    title: str,
    footer: str,
    notes: Sequence[str] = (),
) -> Figure:
    """Draws where a distance comes from: levels, single nodes, and one node taken apart.

    Args:
        pictures: Both images, RGB ``(H,W,3)``.
        captions: A short line over each.
        distance: Of the two images, the sum of all levels' contributions.
        levels: From the lowest to the highest.
        similar: The nodes of the smallest dissimilarity, each drawn in the band of its level.
        dissimilar: The nodes of the largest.
        branch: An unreliable node with the lower ones that stand in for it; None for none.
        title: The question, in a line.
        footer: Model, layers and method, so that the figure can be cited.
        notes: Warnings, printed below.

    Returns:
        A figure that belongs to no window and no global state.
    """
    bands = _bands(len(levels), similar, dissimilar, branch)
    sizes = _sizes([row for band in bands for row in band])
    heights = [sizes.band(band) for band in bands]
    lines = foot_lines(_LEGEND, footer, notes, _WIDTH)
    top = _HEAD + _PICTURE + _GAP
    sheet = Sheet(_WIDTH, top + sum(heights) + _GAP * (len(levels) - 1) + LINE * len(lines) + 0.35)
    sheet.say(_MIDDLE, 0.32, title, most=2 * (_WIDTH - _MIDDLE) - 0.4, size=13, ha="center")
    start = _pair(sheet, pictures, captions, distance)
    sheet.say(_EDGE + 0.12, top - 0.13, "share of the distance", color=FAINT)
    places: list[_Placed] = []
    for index in reversed(range(len(levels))):
        rank = f"level {index}"
        _level(sheet, levels[index], rank if len(levels) > 1 else "one level", top, heights[index])
        places += _placed(bands[index], sizes, top)
        top += heights[index] + _GAP
    for position in places:
        _draw(sheet, position, sizes)
    _edges(sheet, start, places)
    return sheet.foot(lines)


def _bands(
    levels: int, similar: Sequence[NodeCard], dissimilar: Sequence[NodeCard], branch: Branch | None
) -> list[list[_Row]]:
    """For each level the rows of its band; the chain of unreliable nodes comes first."""
    chains: list[_Row] = [[] for _ in range(levels)]
    if branch:
        level, part = branch.card.level, branch.own + branch.passed
        header = ("unreliable node", f"in all {number(part)}")
        chains[level] = [_Frame("unreliable", level, (branch.card,), header, part, None, branch)]
    while branch and branch.stand_ins:
        chains[branch.stand_ins[0].card.level] += _chain(branch)
        branch = branch.below
    return [_with_ends(chain, level, similar, dissimilar) for level, chain in enumerate(chains)]


def _chain(branch: Branch) -> _Row:
    """The frames of what stands in for a node."""
    frames, below = [], branch.below
    for stand_in in branch.stand_ins:
        card = stand_in.card
        # Cards hold arrays, which have no truth value when compared.
        same = below and (below.card.level, below.card.node) == (card.level, card.node)
        header = (f"ω {number(stand_in.edge)}", f"passes {number(stand_in.part)}")
        kind, parted = ("unreliable", below) if same else ("stand-in", None)
        frames.append(_Frame(kind, card.level, (card,), header, stand_in.part, branch, parted))
    if branch.others:
        header = (f"+ {branch.others} more", f"pass {number(branch.rest)}")
        frames.append(_Frame("others", card.level, (), header, branch.rest, branch))
    return frames


def _with_ends(
    chain: _Row, level: int, similar: Sequence[NodeCard], dissimilar: Sequence[NodeCard]
) -> list[_Row]:
    """Puts the most similar nodes at the left and the most dissimilar at the right of a chain."""
    ends: list[_Row] = []
    for kind, cards in (("similar", similar), ("dissimilar", dissimilar)):
        own = tuple(card for card in cards if card.level == level)
        part = sum(card.contribution for card in own)
        header = (f"{len(own)} most {kind} nodes", f"together {number(part)}")
        frame = _Frame(kind, level, own, header if len(own) > 1 else (f"most {kind}", ""), part)
        ends.append([frame] if own else [])
    rows = [ends[0] + chain + ends[1]] if len(chain) <= 1 else [chain, ends[0] + ends[1]]
    return [row for row in rows if row]


def _sizes(rows: Sequence[_Row]) -> _Sizes:
    """The largest cards with which the fullest row still fits."""
    card, available = _BROADEST, _WIDTH - _GUTTER - 2 * _EDGE - 0.3
    bare = _Sizes(0, 0)
    for row in rows:
        room = available - sum(bare.width(frame) for frame in row) - 0.22 * (len(row) - 1)
        card = min(card, room / max(1, sum(len(frame.cards) for frame in row)))
    cards = [held for row in rows for frame in row for held in frame.cards]
    ratio = sum(mean_ratio([held.overlays[side] for held in cards]) for side in (0, 1) if cards)
    return _Sizes(card, min(1.3, (card - 0.05) / max(ratio, 1)))


def _pair(
    sheet: Sheet, pictures: Sequence[Pixels], captions: Sequence[str], distance: float
) -> tuple[float, float]:
    """Both pictures with the distance between them; gives where its edges start."""
    middle, height = _MIDDLE, _HEAD + 0.45 * _PICTURE
    half = breadth(number(distance), 24, "bold") / 2 + 0.15
    for side, picture, caption in zip((-1, 1), pictures, captions, strict=True):
        wide, high = fitted(picture, 2.6, _PICTURE)
        centre = middle + side * (1.3 + wide / 2)
        top = _HEAD + (_PICTURE - high) / 2
        sheet.picture(picture, centre - wide / 2, top, wide, high)
        sheet.say(centre, top - 0.13, caption, most=2.4, size=9, ha="center")
        ends = ((middle + side * half, height), (middle + side * 1.2, height))
        sheet.line(ends, edgecolor=INK, linewidth=1.2)
    sheet.say(middle, height - 0.34, "distance", size=9, color=FAINT, ha="center")
    sheet.say(middle, height, number(distance), size=24, weight="bold", ha="center")
    return middle, height + 0.26


def _level(sheet: Sheet, level: LevelShare, rank: str, top: float, height: float) -> None:
    """The band of a level with the level's share of the distance at the left."""
    sheet.frame(_EDGE, top, _WIDTH - 2 * _EDGE, height, corner=0.12, facecolor=_BAND, zorder=0)
    x, width = _EDGE + 0.12, _GUTTER - 0.3
    names = in_two(level.layer, width, 9, "bold")
    y = top + height / 2 - (LINE * len(names) + 0.72) / 2 + 0.1
    for line in names:
        sheet.say(x, y, line, size=9, weight="bold")
        y += LINE
    sheet.say(x, y, f"{rank}, {level.nodes} nodes", most=width, color=FAINT)
    y += 0.16
    # A thin share stays visible, and none is longer than the whole.
    long = width * min(max(level.share, 0.01), 1) if level.share > 0 else 0
    for gid, length, colour in (("track", width, _TRACK), ("share", long, _SHARE)):
        sheet.frame(x, y, length, 0.13, corner=0.03, facecolor=colour, zorder=1).set_gid(gid)
    y += 0.29
    sheet.say(x, y, f"{100 * level.share:.1f} %", size=11, weight="bold")
    sheet.say(x + width, y, number(level.contribution), color=FAINT, ha="right")


def _placed(rows: Sequence[_Row], sizes: _Sizes, top: float) -> list[_Placed]:
    """The frames of a band, each row spread about its middle."""
    places = []
    y = top + 0.15
    for row in rows:
        widths = [sizes.width(frame) for frame in row]
        free = _WIDTH - _GUTTER - 2 * _EDGE - sum(widths)
        gap = min(0.6, free / (len(row) + 1))
        x = _MIDDLE - (sum(widths) + gap * (len(row) - 1)) / 2
        for frame, width in zip(row, widths, strict=True):
            places.append((frame, x, y, width, sizes.height(frame)))
            x += width + gap
        y += sizes.row(row) + 0.3
    return places


def _draw(sheet: Sheet, position: _Placed, sizes: _Sizes) -> None:
    frame, start, top, width, height = position
    x, right = start + _PAD, start + width - _PAD
    colour, _ = _COLOURS[frame.kind]
    dotted = frame.kind in ("similar", "dissimilar")
    dashes = (0, (1, 1.7)) if dotted else "solid"
    thick = 1.0 if frame.kind in ("stand-in", "others") else 2.0
    box = sheet.frame(
        start, top, width, height, edgecolor=colour, linewidth=thick, linestyle=dashes
    )
    box.set_gid(frame.kind)
    if not frame.cards:
        for y, text in zip((top + 0.16, top + 0.16 + LINE), frame.header, strict=True):
            sheet.say(start + width / 2, y, text, color=FAINT, ha="center")
        return
    words: dict[str, Any] = {"color": INK if frame.kind == "stand-in" else colour}
    sheet.say(x, top + 0.135, frame.header[0], weight="bold" if dotted else "normal", **words)
    sheet.say(right, top + 0.135, frame.header[1], ha="right", **words)
    for card in frame.cards:
        end = draw_card(sheet, card, x, top + _HEADER, sizes.card, sizes.picture)
        x += sizes.card + _BETWEEN
    if frame.parted:
        own, passed = frame.parted.own, frame.parted.passed
        whole = (own + passed) / 100 or 1
        sheet.say(start + _PAD, end + 0.07, f"itself {own / whole:.0f} %", **words)
        sheet.say(right, end + 0.07, f"lower nodes {passed / whole:.0f} %", ha="right", **words)


def _edges(sheet: Sheet, start: tuple[float, float], places: Sequence[_Placed]) -> None:
    """From the distance to the highest frames, and from each parted node to its stand-ins."""
    highest = max((frame.level for frame, *_ in places), default=0)
    fans = [(start, [p for p in places if not p[0].source and p[0].level == highest])]
    for origin, x, y, width, height in places:
        ends = [p for p in places if p[0].source and p[0].source is origin.parted]
        fans.append(((x + width / 2, y + height), ends))
    for spot, ends in fans:
        # The frames are drawn over the last bit of the edges, which leaves no gap.
        targets = [(x + width / 2, y + 0.03) for _, x, y, width, _ in ends]
        colours = [_COLOURS[frame.kind][1] for frame, *_ in ends]
        _fan(sheet, spot, targets, [frame.part for frame, *_ in ends], colours)


def _fan(
    sheet: Sheet,
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
        edge = sheet.line(points, edgecolor=colour, linewidth=width, zorder=order)
        edge.set_gid("edge")
