"""The most reliable similarity nodes of pairs, from similar to dissimilar (AVSL, figure 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from simexplain.rendering.graph import NodeCard, mean_ratio
from simexplain.rendering.lettering import breadth, number, shortened
from simexplain.rendering.sheet import (
    FAINT,
    LINE,
    PALE,
    ROLE_COLOURS,
    SMALL,
    Sheet,
    foot_lines,
)

_WIDTH, _EDGE, _PAD = 13.0, 0.2, 0.15
_HEAD, _TITLE, _CAPTIONS, _APART = 0.6, 0.42, 0.86, 0.25
_CURVE, _CARDS = (0.78, 2.45), 3.75
"""Left end and width of the curves, and where the cards begin, in inches."""

_BROADEST, _TALLEST, _BETWEEN, _SKIP = 1.2, 1.35, 0.06, 0.34
_NEUTRAL = "#4d4d4d"
_LEGEND = (
    "δ: how dissimilar the two images are in a node.  Dots on the curve: the nodes shown.  "
    "···: ranks left out."
)
_OTHERS = "  Thin curves: the other pairs, on the same scale."


@dataclass(frozen=True)
class PairRanking:
    """The most reliable nodes of one pair, ranked by dissimilarity.

    Attributes:
        label: Such as "anchor and positive", or file names.
        role: ``positive``, ``negative`` or nothing; gives the colour.
        distance: Of the two images.
        values: ``(n,)`` dissimilarities of the most reliable nodes, ascending.
        shown: Positions in ``values`` of the cards, ascending.
        cards: One for each of ``shown``.
        images: A word for each image, to stand beside its row of cards.
    """

    label: str
    role: str
    distance: float
    values: NDArray[np.float64]
    shown: tuple[int, ...]
    cards: tuple[NodeCard, ...]
    images: tuple[str, str] = ("", "")

    @property
    def colour(self) -> str:
        """Of the frame and of the curve."""
        return ROLE_COLOURS.get(self.role, _NEUTRAL)


@dataclass(frozen=True)
class _Sizes:
    """Of the cards of a pair, in inches: one's width, and the heights of both rows."""

    width: float
    heights: tuple[float, float]

    @property
    def block(self) -> float:
        return _TITLE + sum(self.heights) + _BETWEEN + _CAPTIONS


def node_ranking(
    pairs: Sequence[PairRanking], *, title: str, footer: str, notes: Sequence[str] = ()
) -> Figure:
    """Draws how dissimilar the nodes of pairs are, and what the nodes at both ends look at.

    Args:
        pairs: One to three, such as those of a triplet.
        title: What is shown, in a line.
        footer: Model, level and method, so that the figure can be cited.
        notes: Warnings, printed below.

    Returns:
        A figure that belongs to no window and no global state.
    """
    lines = foot_lines(_LEGEND + _OTHERS * (len(pairs) > 1), footer, notes, _WIDTH)
    sizes = [_sizes(pair) for pair in pairs]
    body = sum(size.block + _APART for size in sizes)
    sheet = Sheet(_WIDTH, _HEAD + body + LINE * len(lines) + 0.15)
    sheet.say(_WIDTH / 2, 0.32, title, most=_WIDTH - 0.4, size=13, ha="center")
    top = _HEAD
    for pair, size in zip(pairs, sizes, strict=True):
        _frame(sheet, pair, top, size.block)
        height = sum(size.heights) + _BETWEEN
        axes = sheet.axes(_EDGE + _CURVE[0], top + _TITLE + 0.05, _CURVE[1], height - 0.05)
        _curves(axes, pair, pairs)
        _cards(sheet, pair, top + _TITLE, size)
        top += size.block + _APART
    return sheet.foot(lines)


def _sizes(pair: PairRanking) -> _Sizes:
    """The broadest cards with which all fit beside each other."""
    skips = sum(_skips(pair.shown))
    count = max(1, len(pair.cards))
    room = _WIDTH - _EDGE - _PAD - _CARDS - skips * (_SKIP - _BETWEEN) - (count - 1) * _BETWEEN
    width = min(_BROADEST, room / count)
    first, second = (
        min(_TALLEST, width / mean_ratio([card.overlays[side] for card in pair.cards]))
        if pair.cards
        else 0.5
        for side in (0, 1)
    )
    return _Sizes(width, (first, second))


def _skips(shown: Sequence[int]) -> list[bool]:
    """For each card but the first, whether ranks were left out before it."""
    return [after - before > 1 for before, after in pairwise(shown)]


def _frame(sheet: Sheet, pair: PairRanking, top: float, height: float) -> None:
    """The frame in the colour of the role, with the label, the distance and the spread."""
    x, width = _EDGE, _WIDTH - 2 * _EDGE
    frame = sheet.frame(x, top, width, height, edgecolor=pair.colour, linewidth=2, zorder=0)
    frame.set_gid("pair")
    y = top + 0.22
    spread = ""
    if len(pair.values):
        mean, deviation = number(float(pair.values.mean())), number(float(pair.values.std()))
        spread = f"δ of {len(pair.values)} nodes: mean {mean}, standard deviation {deviation}"
    sheet.say(x + width - _PAD, y, spread, color=FAINT, ha="right")
    distance = f"distance {number(pair.distance)}"
    taken = breadth(distance, 12, "bold") + breadth(spread, SMALL) + 2 * _PAD + 0.4
    label = shortened(pair.label, width - taken, 12)
    sheet.say(x + _PAD, y, label, size=12, color=pair.colour)
    start = x + _PAD + breadth(label, 12) + 0.2
    sheet.say(start, y, distance, size=12, weight="bold", color=pair.colour)


def _curves(axes: Axes, pair: PairRanking, pairs: Sequence[PairRanking]) -> None:
    """The sorted dissimilarities, with those of the other pairs on the same scale."""
    ranks = np.arange(1, len(pair.values) + 1)
    for other in pairs:
        if other is not pair:
            places = np.arange(1, len(other.values) + 1)
            axes.plot(places, other.values, color=other.colour, linewidth=1, alpha=0.45)
    axes.fill_between(ranks, pair.values, color=pair.colour, alpha=0.18, linewidth=0)
    axes.plot(ranks, pair.values, color=pair.colour, linewidth=2)
    shown = list(pair.shown)
    dots: dict[str, Any] = {
        "marker": "o",
        "markersize": 5,
        "markeredgecolor": "white",
        "markeredgewidth": 0.8,
    }
    axes.plot(
        ranks[shown], pair.values[shown], linestyle="", color=pair.colour, clip_on=False, **dots
    )
    longest = max(len(other.values) for other in pairs)
    highest = max((float(other.values.max()) for other in pairs if len(other.values)), default=0)
    axes.set_xlim(1 - 0.02 * longest, longest * 1.02)
    axes.set_ylim(0, 1.06 * highest if highest > 0 else 1)
    axes.set_xticks(sorted({1, longest // 2, longest} - {0}))
    ticks = [tick for tick in MaxNLocator(4).tick_values(0, highest or 1) if tick <= highest]
    axes.set_yticks(ticks, [number(float(tick)) for tick in ticks])
    axes.tick_params(labelsize=SMALL, colors=FAINT, length=3)
    axes.set_xlabel("rank of the node, most similar first", size=SMALL, color=FAINT)
    axes.set_ylabel("dissimilarity δ", size=SMALL, color=FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.patch.set_visible(False)


def _cards(sheet: Sheet, pair: PairRanking, top: float, size: _Sizes) -> None:
    """The nodes in columns by rank: the first image above the second."""
    x, second = _CARDS, top + size.heights[0] + _BETWEEN
    under = second + size.heights[1]
    starts = zip((top, second), size.heights, pair.images, strict=True)
    for y, height, image in starts:
        sheet.say(
            x - 0.1, y + height / 2, image, most=height, rotation=90, ha="center", color=FAINT
        )
    for card, rank, skip in zip(pair.cards, pair.shown, [False, *_skips(pair.shown)], strict=True):
        if skip:
            x += _SKIP - _BETWEEN
            sheet.say(
                x - _SKIP / 2, second - _BETWEEN / 2, "···", size=14, color=FAINT, ha="center"
            )
        for y, height, overlay in zip((top, second), size.heights, card.overlays, strict=True):
            sheet.picture(overlay, x, y, size.width, height)
        middle = x + size.width / 2
        sheet.say(middle, under + 0.14, f"rank {rank + 1}", ha="center", color=FAINT)
        sheet.say(
            middle, under + 0.14 + LINE, f"δ {number(card.value)}", ha="center", weight="bold"
        )
        sheet.say(middle, under + 0.14 + 2 * LINE, f"node {card.node}", ha="center", color=FAINT)
        x += size.width + _BETWEEN
    _direction(sheet, _CARDS, x - _BETWEEN, under + 0.18 + 3 * LINE)


def _direction(sheet: Sheet, left: float, right: float, y: float) -> None:
    """An arrow below the cards from the most similar to the most dissimilar node."""
    words = "most similar", "most dissimilar"
    start, end = left + breadth(words[0], SMALL) + 0.1, right - breadth(words[1], SMALL) - 0.1
    if end - start > 0.3:
        sheet.say(left, y, words[0], color=FAINT)
        sheet.say(right, y, words[1], color=FAINT, ha="right")
        sheet.line(((start, y), (end, y)))
        for side in (-0.04, 0.04):
            sheet.line(((end - 0.07, y + side), (end, y)))
