"""The exact account of AVSL distances: nodes, their weights, and what stands in for what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from simexplain.errors import ComparisonError
from simexplain.graph.inference import PairGraph

RANKED_BY = ("contribution", "value", "reliability", "sensitivity")


@dataclass(frozen=True)
class Node:
    """One similarity node of one pair.

    Attributes:
        level: 0 is the lowest.
        layer: The layer of that level.
        node: Its place among the nodes of the level.
        value: ``delta`` (Eq. 1), how much the two images differ there.
        reliability: ``p`` in (0, 1] (Eq. 6); 1 at the lowest level.
        sensitivity: ``lambda`` (Eq. 11), the derivative of the distance by the value.
        contribution: Sensitivity times value; over all nodes these add up to the distance.
        share: The contribution over the distance; 0 where the distance is 0.
    """

    level: int
    layer: str
    node: int
    value: float
    reliability: float
    sensitivity: float
    contribution: float
    share: float


@dataclass(frozen=True)
class StandIn:
    """A lower node that stands in for the unreliable share of a higher one.

    Attributes:
        node: The lower node.
        edge: The normalised edge in [0, 1] (Eq. 8).
        part: What comes through this edge, in units of the overall distance.
    """

    node: Node
    edge: float
    part: float


@dataclass(frozen=True)
class NodeDecomposition:
    """A node with what was put in the place of its unreliable share.

    Attributes:
        node: The node.
        flow: What the rectified node brings to the distance: ``own`` and all parts together.
        own: The node's own contribution.
        stand_ins: Every lower node with an edge to it, the largest part first.
    """

    node: Node
    flow: float
    own: float
    stand_ins: tuple[StandIn, ...]


@dataclass(frozen=True)
class Account:
    """The AVSL graph of ``B`` pairs in numbers; per-level tuples run from the lowest level.

    Attributes:
        distances: ``(B,)``, the overall distance as ``model.distance`` gives it.
        pairs: Nodes, reliabilities and sensitivities, per level ``(B,r)``.
        edges: Normalised edges ``(r_low,r_high)`` between adjacent levels.
        levels: The layers.
    """

    distances: Tensor
    pairs: Annotated[PairGraph, ""]
    edges: tuple[Tensor, ...]
    levels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.distances)

    @property
    def nodes(self) -> tuple[Tensor, ...]:
        """``delta`` per level ``(B,r)``."""
        return self.pairs.nodes

    @property
    def reliabilities(self) -> tuple[Tensor, ...]:
        """``p`` per level ``(B,r)``."""
        return self.pairs.reliabilities

    @property
    def sensitivities(self) -> tuple[Tensor, ...]:
        """``lambda`` per level ``(B,r)``."""
        return self.pairs.sensitivities

    @property
    def contributions(self) -> tuple[Tensor, ...]:
        """``lambda * delta`` per level ``(B,r)``."""
        return self.pairs.contributions

    @property
    def level_contributions(self) -> Tensor:
        """What each level brings to the distance ``(B,L)``."""
        return torch.stack([level.sum(dim=1) for level in self.contributions], dim=1)

    @property
    def shares(self) -> Tensor:
        """The share of each level in the distance ``(B,L)``; zeros for identical images."""
        return over(self.level_contributions, self.distances[:, None])

    @property
    def residual(self) -> Tensor:
        """The sum of all contributions minus the distance ``(B,)``: rounding alone."""
        return self.level_contributions.sum(dim=1) - self.distances

    def level(self, level: int | str) -> int:
        """The number of a level given by number (also from the end) or by layer.

        Raises:
            ComparisonError: If the level does not exist.
        """
        if isinstance(level, str) and level in self.levels:
            return self.levels.index(level)
        if isinstance(level, int) and -len(self.levels) <= level < len(self.levels):
            return level % len(self.levels)
        named = ", ".join(f"{number} ({layer})" for number, layer in enumerate(self.levels))
        raise ComparisonError(f"Expected a level of {named}, got {level!r}.")

    def node(self, level: int | str, node: int, index: int = 0) -> Node:
        """One node of pair ``index``.

        Raises:
            ComparisonError: If the level or the node does not exist.
        """
        number = self.level(level)
        count = self.nodes[number].shape[1]
        if not 0 <= node < count:
            raise ComparisonError(
                f"Expected a node of 0 to {count - 1} at level {number} ({self.levels[number]}), "
                f"got {node}."
            )
        value, sure, sensitivity = (
            float(part[number][index, node])
            for part in (self.nodes, self.reliabilities, self.sensitivities)
        )
        contribution = float(
            self.sensitivities[number][index, node] * self.nodes[number][index, node]
        )
        distance = float(self.distances[index])
        share = contribution / distance if distance else 0.0
        return Node(
            number, self.levels[number], node, value, sure, sensitivity, contribution, share
        )

    def top(
        self,
        n: int = 8,
        index: int = 0,
        *,
        by: str = "contribution",
        largest: bool = True,
        level: int | str | None = None,
    ) -> tuple[Node, ...]:
        """The first ``n`` nodes of pair ``index`` in a ranking, over all levels or in one.

        Raises:
            ComparisonError: If the ranking or level is unknown.
        """
        if by not in RANKED_BY:
            raise ComparisonError(f"Expected by to be one of {', '.join(RANKED_BY)}, got '{by}'.")
        part = {
            "contribution": self.contributions,
            "value": self.nodes,
            "reliability": self.reliabilities,
            "sensitivity": self.sensitivities,
        }[by]
        levels = range(len(self.levels)) if level is None else (self.level(level),)
        places = [(number, node) for number in levels for node in range(part[number].shape[1])]
        values = torch.cat([part[number][index] for number in levels])
        order = values.argsort(descending=largest, stable=True)[: max(0, n)].tolist()
        return tuple(
            self.node(places[position][0], places[position][1], index) for position in order
        )

    def decompose(self, level: int | str, node: int, index: int = 0) -> NodeDecomposition:
        """A node taken apart into itself and the lower nodes that stand in for it (Eq. 8).

        At the lowest level, and where a node has no edge, it has no stand-ins.

        Raises:
            ComparisonError: If the level or the node does not exist.
        """
        whole = self.node(level, node, index)
        inflow = self.pairs.inflows[whole.level][index, node]
        flow = float(inflow * self.pairs.rectified[whole.level][index, node])
        if whole.level == 0:
            return NodeDecomposition(whole, flow, whole.contribution, ())
        edges = self.edges[whole.level - 1][:, node]
        doubt = 1 - self.reliabilities[whole.level][index, node]
        parts = inflow * doubt * edges * self.pairs.rectified[whole.level - 1][index]
        order = parts.argsort(descending=True, stable=True).tolist()
        stand_ins = tuple(
            StandIn(self.node(whole.level - 1, low, index), float(edges[low]), float(parts[low]))
            for low in order
            if edges[low] > 0
        )
        return NodeDecomposition(whole, flow, whole.contribution, stand_ins)

    def table(self, index: int = 0) -> dict[str, list[Any]]:
        """All nodes of pair ``index`` as columns: ``pandas.DataFrame(attribution.table())``."""
        columns: dict[str, list[Any]] = {"level": [], "layer": [], "node": []}
        for number, values in enumerate(self.nodes):
            count = values.shape[1]
            columns["level"] += [number] * count
            columns["layer"] += [self.levels[number]] * count
            columns["node"] += list(range(count))
        shown = {
            "value": self.nodes,
            "reliability": self.reliabilities,
            "sensitivity": self.sensitivities,
            "contribution": self.contributions,
        }
        for name, part in shown.items():
            columns[name] = torch.cat([level[index] for level in part]).tolist()
        return columns


def over(part: Tensor, whole: Tensor) -> Tensor:
    """A quotient that is zero where there is nothing to divide."""
    return part / torch.where(whole > 0, whole, torch.ones_like(whole)) * (whole > 0)
