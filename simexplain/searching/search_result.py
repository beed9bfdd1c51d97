"""The result of a search: the hits, why each was found, and everything needed to show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from simexplain.data.preprocessing import Geometry
from simexplain.matching.result import Point, PositionPair
from simexplain.models.moving import WHOLE, Region
from simexplain.results.result import Result
from simexplain.searching.query import Box

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Rival:
    """The next picture down the ranking that is of another class than a hit.

    Attributes:
        path: Where it is.
        rank: From 1; it may lie below the last hit.
        distance: To the query.
        label: Its class, or None where the gallery has no classes.
    """

    path: str
    rank: int
    distance: float
    label: str | None


@dataclass(frozen=True)
class Hit:
    """One picture that was found. What is not known is None or empty.

    Attributes:
        path: Where it is.
        rank: From 1.
        distance: To the query, as the model measures it; of a region, one minus the cosine with the
            best position.
        label: Its class: the folder that it is in, where the whole gallery is in folders.
        similarity: The cosine of query and hit, which the maps add up to; of a region, that of its
            best position. None for AVSL, whose distance is not a cosine.
        residual: By how much at most the sum of a map misses it.
        unexplained: The share of it, in [0, 1], that no position of the two pictures accounts for.
        peak: Where the hit agrees most with the query, ``(x, y)`` in pixels of its picture.
        query_peak: Where the query agrees most with the hit.
        pairs: Positions of query (``a``) and hit (``b``) that are each other's best, the strongest
            first.
        box: Where the region was found, ``(x, y, width, height)``.
        rival: What it is set apart from.
        gap: The rival's distance less the hit's, which the contrast map adds up to.
        gap_residual: What its sum misses of that.
        levels: For AVSL, each layer with what it adds to the distance.
        level_gaps: For AVSL, each layer with what it adds to the gap.
        close: Whether it is a close match: no further than ``SearchResult.close_limit``. None where
            the gallery is one picture.
    """

    path: str
    rank: int
    distance: float
    label: str | None = None
    similarity: float | None = None
    residual: float | None = None
    peak: Point | None = None
    query_peak: Point | None = None
    pairs: tuple[PositionPair, ...] = ()
    box: Box | None = None
    rival: Rival | None = None
    gap: float | None = None
    gap_residual: float | None = None
    levels: tuple[tuple[str, float], ...] = ()
    level_gaps: tuple[tuple[str, float], ...] = ()
    unexplained: float | None = None
    close: bool | None = None


@dataclass(frozen=True)
class SearchResult(Result):
    """The nearest pictures of a query and why each was found.

    Attributes:
        query: Where the query is.
        hits: The nearest first.
        query_maps: ``(K,h,w)``, signed: what each position of the query adds to the similarity with
            a hit; it sums to ``Hit.similarity``. None where the model has no such maps.
        hit_maps: ``(K,h,w)``: what each position of a hit adds to it; for a region, the cosine of
            each position with it.
        contrast_maps: ``(K,h,w)``, signed: which positions of the query put the hit before its
            rival; it sums to ``Hit.gap``. Zeros without a rival.
        region: The box that was searched for, or that of the mask; None for the whole picture.
        coverage: Which share of each position's cell it covers ``(h,w)``.
        model: Name of the model.
        layer: The layer of the maps.
        distance_name: ``euclidean``, ``squared``, ``cosine`` or the model's own (empty).
        index: The file or folder searched.
        gallery: How many pictures were searched.
        warnings: What to know before trusting it.
        versions: Of the packages that made it.
        pictures: Thumbnails ``(H,W,3)`` of the query, the hits and the rivals by path.
        geometries: Where the network's view lies in the pictures, by path.
        close_limit: The distance up to which a hit is a close match, judged by the distances
            between the gallery's own pictures; None where it is one picture.
        layer_region: Top, left, bottom and right of where the positions of the layer lie in the
            network's view, as shares of it.
        bypass: For the layer the share of the embedding that bypasses it, 0 to 1; empty without a
            layer. Measured on two pictures of noise.
    """

    query: str
    hits: tuple[Hit, ...]
    query_maps: Tensor | None
    hit_maps: Tensor | None
    contrast_maps: Tensor | None
    region: Box | None
    coverage: Tensor | None
    model: str
    layer: str
    distance_name: str
    index: str
    gallery: int
    warnings: tuple[str, ...]
    versions: Mapping[str, str]
    pictures: Annotated[Mapping[str, NDArray[np.uint8]], "picture"] = field(
        default_factory=dict, repr=False
    )
    geometries: Mapping[str, Geometry] = field(default_factory=dict, repr=False)
    close_limit: float | None = None
    layer_region: Region = WHOLE
    bypass: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.hits)

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the hits, the nearest first."""
        return tuple(hit.path for hit in self.hits)

    @property
    def closeness(self) -> str:
        """How many hits are close matches, as a sentence; empty where that cannot be judged."""
        if self.close_limit is None:
            return ""
        count = sum(bool(hit.close) for hit in self.hits)
        limit = f"nearer than {self.close_limit:.3g}"
        if count == 0:
            return (
                f"No close match: none is {limit}, the distance at which unrelated pictures of "
                "this gallery begin."
            )
        if count == len(self.hits):
            return f"All of them are close matches, {limit}."
        return (
            f"{count} of them {'are close matches' if count > 1 else 'is a close match'}, {limit}."
        )

    def figure(self, lines: int = 3) -> Figure:
        """The query on the left, a column for each hit: where they agree, what sets it apart.

        Args:
            lines: How many pairs of positions to number in each hit.
        """
        return self._draw(lines)

    def captions(self) -> list[str]:
        """Of its figure."""
        return [f"What was found for {Path(self.query).name}, and why"]

    def summary(self, **options: Any) -> dict[str, Any]:
        """The hits, and what was searched where."""
        texts = ("query", "model", "layer", "index", "gallery")
        known = self.close_limit is not None
        return {
            **{name: getattr(self, name) for name in texts},
            "distance": self.distance_name,
            "close_limit": self.close_limit,
            "close_match": any(hit.close for hit in self.hits) if known else None,
            "region": self.region,
            "seen": self._seen(self.query),
            "layer_region": self.layer_region,
            "bypass": self.bypass,
            "hits": [{**_hit_json(hit), "seen": self._seen(hit.path)} for hit in self.hits],
            "warnings": self.warnings,
            "versions": self.versions,
            "pictures": [
                {"path": path, "geometry": self.geometries[path].to_json()}
                for path in self.pictures
            ],
        }

    def _seen(self, path: str) -> float | None:
        """The share of a picture that the network saw, in [0, 1]."""
        geometry = self.geometries.get(path)
        return None if geometry is None else round(geometry.seen, 4)


def _hit_json(hit: Hit) -> dict[str, Any]:
    record = dict(vars(hit))
    for name in ("peak", "query_peak", "box"):
        record[name] = record[name] and [round(value, 1) for value in record[name]]
    for name in ("levels", "level_gaps"):
        record[name] = [{"layer": layer, "adds": value} for layer, value in record[name]]
    return record
