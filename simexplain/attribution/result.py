"""The result of attributing: the account of a distance with everything needed to show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simexplain.attribution.account import Account, over
from simexplain.data.images import Picture
from simexplain.data.preprocessing import Geometry, Preprocess
from simexplain.graph.cams import directed_cams, node_cams
from simexplain.metrics.maps import placed
from simexplain.models.avsl_options import ORIGINS
from simexplain.models.moving import WHOLE, Region
from simexplain.results.codec import Views
from simexplain.results.result import Attachments, Result, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        pairs = [self._told(index, top, node) for index in range(len(self))]
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

    def _told(self, index: int, top: int, node: tuple[int, int] | None) -> dict[str, Any]:
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
