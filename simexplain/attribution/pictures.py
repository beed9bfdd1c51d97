"""From an attribution to its two figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from simexplain.attribution.result import Attribution, Node
from simexplain.data.preprocessing import shrunk
from simexplain.errors import ComparisonError, check_index, printable
from simexplain.models.avsl_options import ORIGINS
from simexplain.rendering.graph import Branch, LevelShare, NodeCard, attribution_graph
from simexplain.rendering.graph import StandIn as Stand
from simexplain.rendering.overlay import Pixels, overlay
from simexplain.rendering.ranking import PairRanking, node_ranking

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RELIABLE = 128
"""Among how many of the most reliable nodes the figures choose, as in the paper."""

_CARD, _PICTURE = 224, 420
_ENDS, _STAND_INS, _FRAMED = 4, 3, 2


def draw_graph(attribution: Attribution, index: int, level: int | str, node: int | None) -> Figure:
    """The figure-7 view; see ``Attribution.figure``.

    Raises:
        ComparisonError: If the pair, the level or the node does not exist.
    """
    number = attribution.level(level)
    check_index("pair", index, len(attribution))
    if node is not None:
        attribution.node(number, node, index)
    reliable = reliable_nodes(attribution, number, index)
    ends = reliable[:_FRAMED], reliable[-_FRAMED:] if len(reliable) > 2 * _FRAMED else ()
    cards = _Cards(attribution, index)
    taken = {end.node for end in (*ends[0], *ends[1])}
    branch = None
    if number > 0:
        chosen = _unreliable(attribution, number, index, taken) if node is None else node
        branch = _branch(attribution, cards, number, chosen, index)
    if node is not None and branch is None:
        branch = _alone(cards, attribution.node(number, node, index))
    return attribution_graph(
        pictures=_thumbnails(attribution, index),
        captions=_captions(attribution, index),
        distance=float(attribution.distances[index]),
        levels=[
            LevelShare(layer, float(part), float(share), nodes.shape[1])
            for layer, part, share, nodes in zip(
                attribution.levels,
                attribution.level_contributions[index],
                attribution.shares[index],
                attribution.nodes,
                strict=True,
            )
        ],
        similar=[cards(end) for end in ends[0]],
        dissimilar=[cards(end) for end in ends[1]],
        branch=branch,
        title="Which nodes of which level make up the distance?",
        footer=_footer(attribution),
        notes=attribution.warnings,
    )


def draw_ranking(
    attribution: Attribution, indices: Sequence[int] | None, level: int | str
) -> Figure:
    """The figure-6 view; see ``Attribution.ranking``.

    Raises:
        ComparisonError: If the pair or the level does not exist.
    """
    number = attribution.level(level)
    chosen = list(range(min(len(attribution), 3))) if indices is None else list(indices)
    if not chosen:
        raise ComparisonError("Expected at least one pair to rank the nodes of, got none.")
    pairs = []
    for index in chosen:
        check_index("pair", index, len(attribution))
        reliable = reliable_nodes(attribution, number, index)
        shown = _ends(len(reliable))
        cards = _Cards(attribution, index)
        pairs.append(
            PairRanking(
                label=" and ".join(_captions(attribution, index)),
                role=attribution.roles[index],
                distance=float(attribution.distances[index]),
                values=np.array([node.value for node in reliable], dtype=np.float64),
                shown=shown,
                cards=tuple(cards(reliable[rank]) for rank in shown),
                images=_captions(attribution, index),
            )
        )
    most = min(RELIABLE, attribution.nodes[number].shape[1])
    return node_ranking(
        pairs,
        title=f"The {most} most reliable nodes of {attribution.levels[number]}, "
        "from alike to different",
        footer=_footer(attribution),
        notes=attribution.warnings,
    )


def reliable_nodes(attribution: Attribution, level: int, index: int) -> tuple[Node, ...]:
    """The most reliable nodes of a level, the most similar first."""
    nodes = attribution.top(RELIABLE, index, by="reliability", level=level)
    return tuple(sorted(nodes, key=lambda node: (node.value, node.node)))


class _Cards:
    """Nodes of one pair as cards."""

    def __init__(self, attribution: Attribution, index: int) -> None:
        self.attribution, self.index = attribution, index
        views = attribution.preprocess.undo(attribution.images[index])
        self.views = tuple(shrunk(view, _CARD) for view in views)

    def __call__(self, node: Node) -> NodeCard:
        heat = self.attribution.heatmaps(node.level, [node.node], self.index)[:, 0].cpu().numpy()
        first, second = (
            overlay(view, cv2.resize(part, view.shape[1::-1], interpolation=cv2.INTER_AREA))
            for view, part in zip(self.views, heat, strict=True)
        )
        return NodeCard(
            level=node.level,
            node=node.node,
            overlays=(first, second),
            value=node.value,
            reliability=node.reliability,
            sensitivity=node.sensitivity,
            contribution=node.contribution,
        )


def _branch(
    attribution: Attribution, cards: _Cards, level: int, node: int, index: int
) -> Branch | None:
    """A node with its largest stand-ins; the most unreliable of those is taken apart in turn."""
    parts = attribution.decompose(level, node, index)
    if not parts.stand_ins:
        return None
    shown, others = parts.stand_ins[:_STAND_INS], parts.stand_ins[_STAND_INS:]
    below = None
    if level > 1:
        doubtful = min(shown, key=lambda part: part.node.reliability)
        below = _branch(attribution, cards, level - 1, doubtful.node.node, index)
    return Branch(
        card=cards(parts.node),
        own=parts.own,
        stand_ins=tuple(Stand(cards(part.node), part.edge, part.part) for part in shown),
        rest=sum(part.part for part in others),
        others=len(others),
        below=below,
    )


def _alone(cards: _Cards, node: Node) -> Branch:
    """A requested node that has no stand-ins."""
    return Branch(cards(node), own=node.contribution, stand_ins=(), rest=0.0, others=0)


def _unreliable(attribution: Attribution, level: int, index: int, taken: set[int]) -> int:
    """The node for which others stand in most: the doubt times what comes in its place."""
    flow = attribution.pairs.inflows[level] * attribution.pairs.rectified[level]
    put = (flow - attribution.contributions[level])[index].clone()
    put[list(taken)] = -1
    return int(put.argmax())


def _ends(count: int) -> tuple[int, ...]:
    """The first and the last few ranks."""
    if count <= 2 * _ENDS:
        return tuple(range(count))
    return (*range(_ENDS), *range(count - _ENDS, count))


def _thumbnails(attribution: Attribution, index: int) -> tuple[Pixels, Pixels]:
    if attribution.pictures:
        own, other = attribution.pictures[index]
        return shrunk(own.image, _PICTURE), shrunk(other.image, _PICTURE)
    first, second = attribution.preprocess.undo(attribution.images[index])
    return shrunk(first, _PICTURE), shrunk(second, _PICTURE)


def _captions(attribution: Attribution, index: int) -> tuple[str, str]:
    if attribution.pictures:
        first, second = attribution.pictures[index]
        return printable(Path(first.path).name), printable(Path(second.path).name)
    role = attribution.roles[index]
    return ("anchor", role) if role else ("first image", "second image")


def _footer(attribution: Attribution) -> str:
    """What one must know to cite the figure."""
    return "   ·   ".join((attribution.model, ORIGINS[attribution.origin]))
