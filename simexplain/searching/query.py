"""The query of a search or a region of it, the gallery ranked by it, and which hits are close."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from simexplain.data.folders import mask_values
from simexplain.data.preprocessing import Geometry
from simexplain.errors import ComparisonError, ModelError
from simexplain.matching.factors import Factors
from simexplain.matching.matching import factors_of
from simexplain.methods.decomposition import position_parts
from simexplain.models.avsl import AVSL
from simexplain.models.base import DISTANCES, SimilarityModel
from simexplain.models.moving import WHOLE, overlaps
from simexplain.models.moving import Region as Span
from simexplain.networks import preserve_state, unit_rows
from simexplain.searching.index_gallery import GalleryIndex
from simexplain.tracing import trace

Box = tuple[float, float, float, float]
"""``(x, y, width, height)`` in pixels of a picture."""

ABOVE_MEAN = 0.4
"""How far between a map's mean and its maximum the border of a box lies; tuned on the scenes of
``benchmarks/search.py`` with other cut-outs than those of the published table."""

_FINE = 28
_BLOCK = 64
_OPAQUE = 127


@dataclass(frozen=True)
class Region:
    """A part of a picture.

    Attributes:
        mask: ``(H,W)`` over the picture.
        box: What the user gave, or the bounds of the mask.
        source: The file of the mask; empty for a box.
    """

    mask: NDArray[np.bool_]
    box: Box
    source: str = ""

    @classmethod
    def of_box(cls, box: Box, size: tuple[int, int]) -> Region:
        """A rectangle ``(x, y, width, height)`` of a picture of ``(height, width)`` pixels.

        Raises:
            ComparisonError: If it is empty or not wholly inside the picture.
        """
        x, y, wide, high = box
        height, width = size
        finite = all(np.isfinite(value) for value in box)
        if not finite:
            raise ComparisonError(f"Expected a region of four finite numbers, got {box}.")
        if wide < 1 or high < 1:
            raise ComparisonError(
                f"Expected a region of at least one pixel, got {wide:g} x {high:g}."
            )
        if x < 0 or y < 0 or x + wide > width or y + high > height:
            raise ComparisonError(
                f"Expected a region inside the picture of {width} x {height} pixels, got x from "
                f"{x:g} to {x + wide:g} and y from {y:g} to {y + high:g}."
            )
        mask = np.zeros(size, dtype=bool)
        mask[
            round(y) : max(round(y) + 1, round(y + high)),
            round(x) : max(round(x) + 1, round(x + wide)),
        ] = True
        return cls(mask, (float(x), float(y), float(wide), float(high)))

    @classmethod
    def of_mask(cls, path: str | Path, size: tuple[int, int]) -> Region:
        """A mask file of the picture's size: its alpha channel, else where it is bright.

        Raises:
            ImageError: If it cannot be read or has another size.
            ComparisonError: If it marks nothing.
        """
        mask = mask_values(Path(path), size) > _OPAQUE
        if not mask.any():
            raise ComparisonError(
                f"Expected a mask that is white where the region is, but '{path}' marks nothing."
            )
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        left, top = float(columns[0]), float(rows[0])
        bounds = (left, top, float(columns[-1]) + 1 - left, float(rows[-1]) + 1 - top)
        return cls(mask, bounds, str(path))

    def coverage(self, geometry: Geometry, grid: tuple[int, int], layer: Span = WHOLE) -> Tensor:
        """Which share of each position's cell it covers ``(h,w)``, in [0, 1].

        Args:
            geometry: Where the network's view lies in the picture.
            grid: ``(h, w)``.
            layer: Where in the view the positions lie: top, left, bottom and right as shares.

        Raises:
            ComparisonError: If the network or the layer saw nothing of it.
        """
        seen = torch.from_numpy(geometry.from_original(self.mask)).float()
        if not bool(seen.any()):
            _mark(seen, self.mask, geometry)
        if not bool(seen.any()):
            left, top, right, bottom = geometry.box
            raise ComparisonError(
                f"Expected a region that the network saw, x from {left:.0f} to {right:.0f} and y "
                f"from {top:.0f} to {bottom:.0f}, but none of it lies there; --fit pad or squash "
                "shows the network the whole picture."
            )
        rows, columns = (
            torch.from_numpy(overlaps(cells, start, end, pixels)).float()
            for cells, start, end, pixels in zip(
                grid, layer[:2], layer[2:], seen.shape, strict=True
            )
        )
        covered = rows @ seen @ columns.T
        if not bool(covered.any()):
            raise ComparisonError(
                "Expected a region within what the layer sees, which is a part of the picture "
                "alone, but none of it lies there; make the index of an earlier layer with --layer."
            )
        return covered


def _mark(seen: Tensor, mask: NDArray[np.bool_], geometry: Geometry) -> None:
    """Marks where a part lies that is too small to hold the centre of a pixel of the view."""
    rows, columns = np.nonzero(mask)
    indices = np.stack((rows, columns), axis=1) + 0.5
    at = np.floor(indices * geometry.scale - np.asarray(geometry.offset)).astype(int)
    rows, columns = at[((at >= 0) & (at < geometry.size)).all(axis=1)].T
    seen[rows, columns] = 1.0


def region_vector(query: Factors, coverage: Tensor) -> Tensor:
    """What a region of coverage ``(h,w)`` adds to the vector of an image, at unit length ``(E,)``.

    The sum of the positions' parts, each as much as the region covers of its cell; biases, which
    belong to no position, are left out.
    """
    summed = torch.einsum("hw,ehw->e", coverage.to(query.parts.device), query.parts[0].float())
    if not bool(summed.norm() > 0):
        raise ComparisonError(
            "Expected a region that adds something to the picture's vector, but its positions are "
            "all zero; choose another or a larger one."
        )
    return unit_rows(summed, dim=0)


def similarities(images: Factors, unit: Tensor) -> Tensor:
    """The cosine of a unit vector ``(E,)`` with what each position adds ``(K,h,w)``."""
    parts = images.parts.float().flatten(2)
    along = torch.matmul(unit, parts)
    lengths = parts.square().sum(dim=1).sqrt()
    # A position that adds nothing is like nothing.
    cosines = torch.where(lengths > 0, along / lengths.clamp_min(1e-30), torch.zeros_like(along))
    return cosines.reshape(len(images), *images.parts.shape[2:])


def best_box(similarity: Tensor, geometry: Geometry, layer: Span = WHOLE) -> Box:
    """The box of the place that a map points at, in pixels of the picture.

    The map is interpolated to at least 28 cells a side. A threshold is laid between its mean and
    its maximum (``ABOVE_MEAN``), and of all rectangles the one with the largest sum of what is
    above it, less what is below, is taken.

    Args:
        similarity: ``(h,w)``.
        geometry: Where the network's view lies in the picture.
        layer: As for :meth:`Region.coverage`.
    """
    times = max(1, -(-_FINE // min(similarity.shape)))
    fine = F.interpolate(
        similarity[None, None].float(), scale_factor=times, mode="bilinear", align_corners=False
    )[0, 0]
    values = fine.double().cpu().numpy()
    mean = float(similarity.double().mean())
    border = mean + ABOVE_MEAN * (float(similarity.double().max()) - mean)
    top, left, bottom, right = _best_rectangle(values - border)
    down, along = (
        np.linspace(start * side, end * side, cells + 1).clip(0, side)
        for start, end, side, cells in zip(
            layer[:2], layer[2:], geometry.size, values.shape, strict=True
        )
    )
    first = geometry.point_to_original(float(along[left]), float(down[top]))
    last = geometry.point_to_original(float(along[right]), float(down[bottom]))
    return first[0], first[1], last[0] - first[0], last[1] - first[1]


def _best_rectangle(values: NDArray[np.float64]) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of the rectangle with the largest sum."""
    sums = np.concatenate((np.zeros((1, values.shape[1])), values.cumsum(axis=0)))
    tops, bottoms = np.triu_indices(len(sums), 1)
    bands = sums[bottoms] - sums[tops]
    ends = np.concatenate((np.zeros((len(bands), 1)), bands.cumsum(axis=1)), axis=1)
    lowest = np.minimum.accumulate(ends[:, :-1], axis=1)
    gains = ends[:, 1:] - lowest
    band, right = np.unravel_index(int(gains.argmax()), gains.shape)
    left = int(ends[band, : right + 1].argmin())
    return int(tops[band]), left, int(bottoms[band]), int(right) + 1


USUAL = 5
"""Hits, unless a number is given."""

_DEEPER = 4
"""How many times further down a ranking is looked for a rival, until there is one."""


@dataclass(frozen=True)
class SearchQuery:
    """What the network made of a query: its embedding ``(1,E)`` and what its positions add.

    ``factors`` are None where the index has none; ``coverage`` ``(h,w)`` and the vector ``region``
    ``(E,)`` are None where the whole query is searched for.
    """

    row: Tensor
    factors: Factors | None
    geometry: Geometry
    coverage: Tensor | None = None
    region: Tensor | None = None


@dataclass(frozen=True)
class Ranked:
    """A gallery ranked by a query, at least down to the rivals of all hits.

    Attributes:
        places: ``(n,)`` rows of the index, the nearest first, without the query's own.
        distances: ``(n,)``.
        labels: Their classes; all None where the gallery has none.
        rivals: For each of the ``k`` hits its rival's position in the ranking, or None.
        searched: How many pictures were searched.
    """

    places: Tensor
    distances: Tensor
    labels: tuple[str | None, ...]
    rivals: tuple[int | None, ...]
    searched: int


def prepare_query(
    model: SimilarityModel,
    gallery: GalleryIndex,
    views: Tensor,
    geometry: Geometry,
    wanted: Region | None,
) -> SearchQuery:
    """Runs the network on one preprocessed query ``(1,3,H,W)``; the model is left as it was."""
    if not gallery.has_basis:
        with preserve_state(model):
            row = trace(model, views, ()).embeddings.detach().float().cpu()
        return SearchQuery(_checked(row), None, geometry)
    keeping = gallery.keeping
    with torch.enable_grad():
        own_factors = factors_of(position_parts(model, views, keeping.layer, steps=keeping.steps))
    factors = Factors(own_factors.parts.cpu(), own_factors.rest.cpu(), own_factors.vectors.cpu())
    vectors = _checked(factors.vectors.float())
    row = unit_rows(vectors) if keeping.normalised else vectors
    if wanted is None:
        return SearchQuery(row, factors, geometry)
    height, width = factors.parts.shape[2:]
    coverage = wanted.coverage(geometry, (height, width), keeping.region)
    return SearchQuery(row, factors, geometry, coverage, region_vector(factors, coverage))


def _checked(rows: Tensor) -> Tensor:
    if not bool(rows.isfinite().all()) or not bool(rows.any()):
        raise ModelError(
            "The query's embedding is zero or not finite, so nothing is nearest to it; look for "
            "NaN in the weights or dead weights."
        )
    return rows


def rank_gallery(
    model: SimilarityModel,
    gallery: GalleryIndex,
    query: SearchQuery,
    k: int | None,
    *,
    own: int | None,
) -> Ranked:
    """The ``k`` nearest pictures but ``own``, and as many after them as have all their rivals."""
    most = len(gallery) - (own is not None)
    if most == 0:
        raise ComparisonError(
            f"Expected a gallery with pictures beside the query, but '{gallery.path}' has that "
            "alone; add others."
        )
    k = min(USUAL, most) if k is None else k
    if not 1 <= k <= most:
        beside = " beside the query itself" if own is not None else ""
        raise ComparisonError(
            f"Expected k between 1 and the {most} pictures of the gallery{beside}, got {k}."
        )
    classes = labels_of(gallery)
    if query.region is not None:
        ranking = region_ranking(gallery, query.region)
        return _without(own, *ranking, classes, k, most)
    depth = min(most, _DEEPER * k + 1)
    while True:
        deep = min(len(gallery), depth + 1)
        distances, indices = gallery.neighbours(query.row, deep, model=model)
        ranked = _without(own, distances[0], indices[0], classes, k, most)
        if depth == most or None not in ranked.rivals:
            return ranked
        depth = min(most, _DEEPER * depth)


def _without(
    own: int | None,
    distances: Tensor,
    indices: Tensor,
    classes: tuple[str | None, ...],
    k: int,
    searched: int,
) -> Ranked:
    kept = indices != (-1 if own is None else own)
    indices, distances = indices[kept], distances[kept]
    labels = tuple(classes[index] for index in indices.tolist())
    return Ranked(indices, distances, labels, tuple(rival_places(labels, k)), searched)


def labels_of(gallery: GalleryIndex) -> tuple[str | None, ...]:
    """The folder directly below the root that each picture is in; None unless all are in one."""
    parts = [path.split("/") for path in gallery.paths]
    inside = all(len(names) > 1 and names[0] not in ("", "..") for names in parts)
    classes = {names[0] for names in parts}
    if not inside or len(classes) < 2:
        return (None,) * len(parts)
    return tuple(names[0] for names in parts)


FALSE_ALARMS = 0.05
"""How often the nearest of a gallery that holds nothing like the query may be called close."""

COPY, FEW_COPY = 0.25, 0.5
"""Of the median distance: what is always close, and what is where pictures are few."""

LEAST = 10
"""Pictures of a gallery from which on their distances say how far distances scatter."""

ROUNDING = 1e-5
"""By how much a distance may miss the limit: copies differ by as much."""

_SAMPLE, _DEAR = 1000, 200


@torch.no_grad()
def close_limit(
    model: SimilarityModel, gallery: GalleryIndex, query: SearchQuery, ranking: Ranked
) -> float | None:
    """The distance up to which a hit is a close match; None in a gallery of one picture.

    Unrelated pictures have distances, too, and the nearest of many is nearer than most. In a
    gallery in folders the limit is what the nearest picture of another folder keeps away from 95 of
    100 pictures. Without folders it lies so far below the mean distance of two pictures that, if
    distances were normal, one in twenty galleries of this size would have a picture as near by
    chance. A quarter of the median distance is always close, so that copies are; among fewer than
    ``LEAST`` pictures half of it is the limit. For a region, the distances to all pictures take the
    place of those between pictures, of which at most 1,000, spread evenly, are compared.
    """
    if ranking.searched < 2 or len(gallery) < 2:
        return None
    if query.region is not None:
        return _limit(ranking.distances.double(), None, ranking.searched)
    name = gallery.distance_name
    count = min(len(gallery), _SAMPLE if name else _DEAR)
    indices = torch.linspace(0, len(gallery) - 1, count, dtype=torch.float64).round().long()
    distances = _between(model, gallery.embeddings[indices], name)
    above = torch.triu_indices(count, count, 1)
    limit = _limit(
        distances[above[0], above[1]], _to_others(distances, gallery, indices), ranking.searched
    )
    # Cosine distances, whichever function of them the model takes.
    return float({"euclidean": (2 * limit) ** 0.5, "squared": 2 * limit}.get(name, limit))


def _between(model: SimilarityModel, rows: Tensor, name: str) -> Tensor:
    """Distances of some pictures ``(n,n)``: cosine ones, unless the model has its own."""
    if name:
        units = unit_rows(rows.float())
        # Of copies, rounding may make it less than zero, which has no root.
        return DISTANCES["cosine"](units, units).double().clamp_min(0)
    if isinstance(model, AVSL):
        rows = rows.to(next(model.heads.parameters()))
    return model.distance(rows, rows).double().cpu()


def _to_others(distances: Tensor, gallery: GalleryIndex, indices: Tensor) -> Tensor | None:
    """Of each picture, the distance to the nearest of another class; None without classes."""
    labels = labels_of(gallery)
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    classes = torch.tensor([numbers[labels[index]] for index in indices.tolist()])
    if labels[0] is None or bool((classes == classes[0]).all()):
        return None
    same = classes.unsqueeze(0) == classes.unsqueeze(1)
    return distances.masked_fill(same, float("inf")).amin(dim=1)


def _limit(distances: Tensor, to_others: Tensor | None, searched: int) -> float:
    """The limit in the units of the distances, each of a pair of pictures."""
    median = float(distances.median())
    if searched < LEAST:
        return FEW_COPY * median
    if to_others is not None:
        limit = float(to_others.quantile(FALSE_ALARMS))
    else:
        steps = NormalDist().inv_cdf(1 - FALSE_ALARMS / searched)
        limit = float(distances.mean() - steps * distances.std())
    return max(limit, COPY * median)


def rival_places(labels: Sequence[str | None], hits: int) -> list[int | None]:
    """For each of the first ``hits`` of a ranking, where the best after it of another class is.

    An image without a class differs from every other. None where no other class follows.
    """
    values: list[int | None] = []
    for index, own in enumerate(labels[:hits]):
        later = range(index + 1, len(labels))
        values.append(next((n for n in later if own is None or labels[n] != own), None))
    return values


@torch.no_grad()
def region_ranking(index: GalleryIndex, region: Tensor) -> tuple[Tensor, Tensor]:
    """All distances ``(G,)``, one minus the best position's cosine, ascending, and the places."""
    parts = []
    for start in range(0, len(index), _BLOCK):
        block = index.factors(range(start, min(start + _BLOCK, len(index))))
        parts.append(similarities(block, region).flatten(1).amax(dim=1))
    distances = 1 - torch.cat(parts)
    order = distances.argsort(stable=True)
    return distances[order], order
