"""The result of attributing: the exact account of a distance with everything needed to show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simexplain.data.images import Picture
from simexplain.data.preprocessing import Geometry, Preprocess
from simexplain.errors import ComparisonError, check_choice
from simexplain.graph.inference import PairGraph, directed_cams, node_cams
from simexplain.metrics.maps import placed
from simexplain.models.avsl_options import ORIGINS
from simexplain.models.moving import WHOLE, Region
from simexplain.results.codec import Views
from simexplain.results.result import Attachments, Result, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
        check_choice("by", by, RANKED_BY)
        part = self._columns()[by]
        levels = range(len(self.levels)) if level is None else (self.level(level),)
        places = [(number, node) for number in levels for node in range(part[number].shape[1])]
        values = torch.cat([part[number][index] for number in levels])
        order = values.argsort(descending=largest, stable=True)[: max(0, n)].tolist()
        return tuple(
            self.node(number, node, index) for number, node in map(places.__getitem__, order)
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
        for name, part in self._columns().items():
            columns[name] = torch.cat([level[index] for level in part]).tolist()
        return columns

    def _columns(self) -> dict[str, tuple[Tensor, ...]]:
        return {
            "value": self.nodes,
            "reliability": self.reliabilities,
            "sensitivity": self.sensitivities,
            "contribution": self.contributions,
        }


def over(part: Tensor, whole: Tensor) -> Tensor:
    """A quotient that is zero where there is nothing to divide."""
    return part / torch.where(whole > 0, whole, torch.ones_like(whole)) * (whole > 0)


@dataclass(frozen=True)
class Attribution(Account, Result):
    """An account of ``B`` pairs of images that can be looked at, saved and cited.

    ``distances``, ``pairs``, ``edges`` and ``levels`` are those of :class:`Account`.

    Attributes:
        embeddings: Per level ``(B,2,r)``, unit rows of both images.
        features: Per level ``(B,2,C,h,w)``, the feature maps that CAMs are made of.
        heads: Per level the weight ``(r,C)`` and the bias ``(r,)`` or None.
        images: ``(B,2,3,H,W)``, the preprocessed images.
        preprocess: How to make ``images`` visible again.
        roles: What the second image of each pair is: ``positive``, ``negative`` or empty.
        model: Name of the model.
        origin: How its heads and edges came to be, a key of ``ORIGINS``.
        options: How the graph is computed, as plain JSON values.
        warnings: What to know before trusting it.
        versions: Of the packages that made it.
        pictures: The original pictures of each pair where files were attributed, else empty.
        geometries: Where the images lie in the pictures.
        regions: For each level top, left, bottom and right of what its cells look at, as shares of
            the image; all of it by default.
    """

    embeddings: tuple[Tensor, ...]
    features: tuple[Tensor, ...]
    heads: tuple[tuple[Tensor, Tensor | None], ...]
    images: Views
    preprocess: Preprocess
    roles: tuple[str, ...]
    model: str
    origin: str
    options: Mapping[str, Any]
    warnings: tuple[str, ...]
    versions: Mapping[str, str]
    pictures: tuple[tuple[Picture, Picture], ...] = field(default=(), repr=False)
    geometries: tuple[tuple[Geometry, Geometry], ...] = field(default=(), repr=False)
    regions: Mapping[str, Region] = field(default_factory=dict)

    def maps(self, level: int | str, nodes: int | Sequence[int], index: int = 0) -> Tensor:
        """CAMs of nodes on both images of pair ``index``, signed (Eq. 2).

        The mean of a CAM over all positions is the node's embedding before normalisation.

        Returns:
            ``(2,h,w)`` for one node, ``(2,n,h,w)`` for several.
        """
        number = self.level(level)
        wanted = [nodes] if isinstance(nodes, int) else list(nodes)
        for node in wanted:
            self.node(number, node, index)
        weight, bias = self.heads[number]
        offset = None if bias is None else bias[wanted]
        pooling = str(self.options["pooling"])
        cams = node_cams(self.features[number][index], weight[wanted], offset, pooling)
        return cams[:, 0] if isinstance(nodes, int) else cams

    def heatmaps(self, level: int | str, nodes: Sequence[int], index: int = 0) -> Tensor:
        """CAMs for drawing, ``(2,n,H,W)`` in [0, 1]: what gives each image its value of the node.

        A node may be positive in one image and negative in the other. So each CAM is turned by the
        sign of its own mean, cut off at zero and divided by its maximum.
        """
        number = self.level(level)
        cams = self.maps(number, list(nodes), index).float()
        turned = cams * torch.where(cams.mean(dim=(2, 3), keepdim=True) < 0, -1.0, 1.0)
        size = (int(self.images.shape[-2]), int(self.images.shape[-1]))
        grown = placed(turned.relu(), size, self.regions.get(self.levels[number], WHOLE))
        return over(grown, grown.amax(dim=(2, 3), keepdim=True)).clamp(0, 1)

    def level_maps(self, level: int | str, index: int = 0) -> Tensor:
        """Where the level's part of the distance comes from, on both images ``(2,h,w)``, signed.

        Each node is ``(a - b) ** 2`` of two means over CAM positions, so its contribution is a sum
        over the positions of both images. All values together are the level's contribution.
        """
        number = self.level(level)
        weight, bias = self.heads[number]
        a, b = self.embeddings[number][index]
        pull = self.sensitivities[number][index] * (a - b)
        pulls, pooling = torch.stack((pull, -pull)), str(self.options["pooling"])
        return directed_cams(self.features[number][index], weight, bias, pulls, pooling)

    @property
    def views(self) -> NDArray[np.uint8]:
        """``(B,2,H,W,3)``: the images as the network saw them, as pixels."""
        return self.preprocess.undo(self.images)

    def figure(self, index: int = 0, *, level: int | str = -1, node: int | None = None) -> Figure:
        """The graph of pair ``index``, from the distance down the levels (figure 7 of the paper).

        Args:
            index: Which pair.
            level: The level whose nodes are shown at the top.
            node: The node of that level to take apart; the one whose stand-ins matter most unless
                given.
        """
        return self._draw(index, level, node)

    def ranking(self, indices: Sequence[int] | None = None, *, level: int | str = -1) -> Figure:
        """The most reliable nodes of each pair by dissimilarity (figure 6 of the paper).

        Args:
            indices: Which pairs, the first three unless given.
            level: Whose nodes.
        """
        return self._draw(indices, level, by="draw_ranking")

    def save(
        self,
        folder: str | Path,
        *,
        force: bool = False,
        top: int = 8,
        node: tuple[int, int] | None = None,
    ) -> dict[str, str]:
        """As :meth:`Result.save`.

        Args:
            folder: Made if missing.
            force: Replace the files of an attribution that is there already.
            top: How many nodes the JSON lists.
            node: ``(level, node)`` that the graphs and the JSON take apart, if any in particular.
        """
        return self.write(folder, force=force, top=top, node=node)

    def captions(self) -> list[str]:
        """One for each pair."""
        return [
            f"Graph of pair {index + 1}, distance {distance:.4f}"
            for index, distance in enumerate(self.distances.tolist())
        ]

    def attachments(self, node: tuple[int, int] | None = None, **options: Any) -> Attachments:
        """The nodes of all pairs as a table, their ranking, and a graph of each pair."""
        level, taken = node or (-1, None)
        return {
            "table": ("nodes.csv", lambda: Table(self._rows())),
            "ranking": ("ranking.png", self.ranking),
            **self._figures("graph", level=level, node=taken),
        }

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for index in range(len(self)):
            table = self.table(index)
            cells = zip(*table.values(), strict=True)
            rows += [dict(zip(("pair", *table), (index, *row), strict=True)) for row in cells]
        return rows

    def summary(
        self, top: int = 8, node: tuple[int, int] | None = None, **options: Any
    ) -> dict[str, Any]:
        """What stands at the top is that of the first pair, ``pairs`` has all of them."""
        pairs = [self._record(index, top, node) for index in range(len(self))]
        return {
            "model": self.model,
            "origin": self.origin,
            "origin_text": ORIGINS[self.origin],
            **pairs[0],
            "options": self.options,
            "warnings": self.warnings,
            "versions": self.versions,
            "preprocess": self.preprocess,
            "pairs": pairs,
        }

    def _record(self, index: int, top: int, node: tuple[int, int] | None) -> dict[str, Any]:
        paths = [picture.path for picture in self.pictures[index]] if self.pictures else [None] * 2
        seen: list[float | None] = [None, None]
        if self.geometries:
            seen = [round(geometry.seen, 4) for geometry in self.geometries[index]]
        levels = zip(
            self.levels, self.level_contributions[index], self.shares[index], self.nodes,
            strict=True,
        )  # fmt: skip
        return {
            "images": [
                {"path": path, "role": role, "seen": share}
                for path, role, share in zip(
                    paths, ("anchor", self.roles[index]), seen, strict=True
                )
            ],
            "distance": self.distances[index],
            "residual": self.residual[index],
            "levels": [
                {
                    "level": number,
                    "layer": layer,
                    "contribution": part,
                    "share": share,
                    "nodes": int(nodes.shape[1]),
                    "region": self.regions.get(layer, WHOLE),
                }
                for number, (layer, part, share, nodes) in enumerate(levels)
            ],
            "nodes": self.top(top, index),
            "decomposition": None if node is None else self.decompose(*node, index),
        }
