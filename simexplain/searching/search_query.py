"""The query of a search: what the network makes of it, and the gallery ranked by it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simexplain.data.preprocessing import Geometry
from simexplain.errors import ComparisonError, ModelError
from simexplain.matching.factors import Factors
from simexplain.matching.matching import factors_of
from simexplain.methods.position_parts import position_parts
from simexplain.models.base import SimilarityModel
from simexplain.networks import preserve_state, unit_rows
from simexplain.searching.explaining_hits import region_ranking
from simexplain.searching.index_gallery import GalleryIndex
from simexplain.searching.marginals import rival_places
from simexplain.searching.regions import Region, region_vector
from simexplain.tracing import trace

USUAL = 5
"""Hits, unless a number is given."""

_DEEPER = 4
"""How many times further down a ranking is looked for a rival, until there is one."""


@dataclass(frozen=True)
class SearchQuery:
    """What the network made of a query.

    Attributes:
        row: Its embedding ``(1,E)``.
        factors: What its positions add, on the CPU; None where the index has none either.
        geometry: Where the network's view lies in the picture.
        coverage: Of the region ``(h,w)``; None where the whole query is searched for.
        region: The region's vector ``(E,)``.
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
    """Runs the network on one preprocessed query ``(1,3,H,W)``; the model is left as it was.

    Raises:
        ModelError: If its embedding is not finite, or zero.
        ComparisonError: If the network saw nothing of the region.
    """
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
    """The ``k`` nearest pictures, and as many after them as it takes to find their rivals.

    Args:
        model: Whose distance counts.
        gallery: The index.
        query: The query.
        k: How many hits.
        k: How many hits; ``USUAL`` or all there are unless given.
        own: The query's own place in the index, which is left out.

    Raises:
        ComparisonError: If ``k`` is below 1 or more than there is, or there is nothing to find.
    """
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
