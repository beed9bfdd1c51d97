"""From a ranking to hits with the reasons why they were found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simexplain.data.preprocessing import Geometry
from simexplain.matching.factors import Factors, pair_matrix
from simexplain.matching.points import Frame, PositionPair
from simexplain.matching.ranking import centred, strongest
from simexplain.methods.unexplained import bypass_warning, unexplained_share_warning
from simexplain.models.avsl import AVSL
from simexplain.models.base import SimilarityModel
from simexplain.models.moving import Region as Span
from simexplain.networks import unit_rows
from simexplain.searching.closeness import ROUNDING
from simexplain.searching.explaining_hits import HitMaps, hit_maps, level_parts, region_maps
from simexplain.searching.index_gallery import GalleryIndex
from simexplain.searching.regions import best_box
from simexplain.searching.search_query import Ranked, SearchQuery
from simexplain.searching.search_result import Hit, Rival

_PAIRS = 5
_FAR_OFF, _LEAST = 0.05, 0.1
_BY_LEVEL = (
    "An AVSL distance is not a cosine, so hits are explained by what each level adds to it; "
    "simexplain attribute shows the nodes and where they look."
)
_OWN_DISTANCE = (
    "The model has a distance of its own, so contrast maps add up to the difference of the cosines."
)


@dataclass(frozen=True)
class HitsFound:
    """Hits with their reasons.

    Attributes:
        hits: The nearest first.
        maps: Their maps, or None.
        shown: Places in the index of all pictures that they are about.
        searched: How many pictures were searched.
        warnings: What to know before trusting it.
    """

    hits: tuple[Hit, ...]
    maps: HitMaps | None
    shown: tuple[int, ...]
    searched: int
    warnings: tuple[str, ...]


def hits_of(
    model: SimilarityModel,
    gallery: GalleryIndex,
    query: SearchQuery,
    ranking: Ranked,
    limit: float | None,
) -> HitsFound:
    """Explains why the first pictures of a ranking were found, from the index alone.

    Args:
        model: Whose distance counts.
        gallery: The index.
        query: The query.
        ranking: The gallery, ranked by it.
        limit: The distance up to which a hit is a close match, or None; see ``close_limit``.
    """
    count = len(ranking.rivals)
    order = list(dict.fromkeys([*range(count), *(r for r in ranking.rivals if r is not None)]))
    indices = [int(index) for index in ranking.places[order]]
    at = {position: number for number, position in enumerate(order)}
    rivals = [None if rival is None else at[rival] for rival in ranking.rivals]
    hits = [_plain(gallery, ranking, position, limit) for position in range(count)]
    distances = ranking.distances[order]
    maps: HitMaps | None = None
    warnings: tuple[str, ...] = ()
    if query.factors is not None:
        # All of a rival is needed where its best position counts, else its embedding alone.
        needed = indices if query.region is not None else indices[:count]
        images = gallery.factors(needed)
        maps = _maps(gallery, query, images, indices, rivals, distances)
        hits = _explained(gallery, query, hits, maps, images, indices)
        if query.region is None and not gallery.distance_name:
            warnings = (_OWN_DISTANCE,)
        warnings += unexplained_share_warning(float(maps.unexplained.max()), gallery.layer)
        warnings += _missing(maps) + bypass_warning(gallery.bypass)
    elif isinstance(model, AVSL):
        hits = _by_level(model, gallery, query.row, hits, indices, rivals)
        warnings = (_BY_LEVEL,)
    else:
        hits = _with_cosines(gallery, query, hits, indices)
        warnings = (f"Hits are listed without reasons: {gallery.without_basis}",)
    return HitsFound(tuple(hits), maps, tuple(indices), ranking.searched, warnings)


def _missing(maps: HitMaps) -> tuple[str, ...]:
    """What to say where maps do not add up, as of a tail that is not linear."""
    worst = float((maps.residual / maps.similarity.abs().clamp_min(_LEAST)).max())
    if worst <= _FAR_OFF:
        return ()
    return (
        f"The maps of a hit miss {float(maps.residual.max()):.2g} of its similarity, as the "
        "network above the layer is not linear; an index of a later layer, or made with more "
        "--jacobians, is closer.",
    )


def _with_cosines(
    gallery: GalleryIndex, query: SearchQuery, hits: Sequence[Hit], indices: Sequence[int]
) -> list[Hit]:
    rows = gallery.embeddings[torch.tensor(indices[: len(hits)])].float()
    cosines = unit_rows(rows) @ unit_rows(query.row.float())[0]
    return [replace(hit, similarity=float(one)) for hit, one in zip(hits, cosines, strict=True)]


def _plain(gallery: GalleryIndex, ranking: Ranked, position: int, limit: float | None) -> Hit:
    """A hit and its rival, as the ranking has them."""

    def known(where: int) -> tuple[str, int, float, str | None]:
        index = int(ranking.places[where])
        distance = float(ranking.distances[where])
        return str(gallery.file(index)), where + 1, distance, ranking.labels[where]

    hit, rival = Hit(*known(position)), ranking.rivals[position]
    if limit is not None:
        hit = replace(hit, close=hit.distance <= limit + ROUNDING)
    if rival is None:
        return hit
    runner_up = Rival(*known(rival))
    return replace(hit, rival=runner_up, gap=runner_up.distance - hit.distance)


def _maps(
    gallery: GalleryIndex,
    query: SearchQuery,
    images: Factors,
    indices: Sequence[int],
    rivals: Sequence[int | None],
    distances: Tensor,
) -> HitMaps:
    assert query.factors is not None
    if query.region is not None:
        assert query.coverage is not None
        return region_maps(query.factors, query.coverage, query.region, images, rivals)
    rows = gallery.embeddings[torch.tensor(indices)]
    return hit_maps(query.factors, images, rows, rivals, distances, gallery.distance_name)


def _explained(
    gallery: GalleryIndex,
    query: SearchQuery,
    hits: Sequence[Hit],
    maps: HitMaps,
    images: Factors,
    indices: Sequence[int],
) -> list[Hit]:
    assert query.factors is not None
    region = gallery.keeping.region
    own = _frame(query.geometry, query.factors, region)
    explained = []
    for number, hit in enumerate(hits):
        geometry = gallery.geometry(indices[number])
        there = _frame(geometry, images, region)
        hit = replace(
            hit,
            similarity=float(maps.similarity[number]),
            residual=float(maps.residual[number]),
            unexplained=float(maps.unexplained[number]),
            peak=there.centre(int(maps.hits[number].argmax())),
            query_peak=own.centre(int(maps.query[number].argmax())),
            gap_residual=None if hit.rival is None else float(maps.gap_residual[number]),
        )
        if query.region is not None:
            explained.append(replace(hit, box=best_box(maps.hits[number], geometry, region)))
            continue
        one = Factors(
            *(t[number : number + 1] for t in (images.parts, images.rest, images.vectors))
        )
        explained.append(replace(hit, pairs=_pairs(query.factors, one, own, there)))
    return explained


def _frame(geometry: Geometry, factors: Factors, region: Span) -> Frame:
    height, width = factors.parts.shape[2:]
    return Frame("", geometry.size, (int(height), int(width)), geometry, region)


def _pairs(query: Factors, hit: Factors, own: Frame, there: Frame) -> tuple[PositionPair, ...]:
    """Positions that are each other's best by what is particular to them."""
    matrix, score = pair_matrix(query, hit)
    values = matrix[0].flatten(2).flatten(0, 1)
    special, total = centred(values), float(score[0])
    return tuple(
        PositionPair(
            own.centre(entry.row),
            there.centre(entry.column),
            float(values[entry.row, entry.column]),
            float(values[entry.row, entry.column]) / total if total else 0.0,
            float(special[entry.row, entry.column]),
            entry.mutual,
        )
        for entry in strongest(values, _PAIRS, sign=1, mutual=True, by="specific")
    )


def _by_level(
    model: AVSL,
    gallery: GalleryIndex,
    row: Tensor,
    hits: Sequence[Hit],
    indices: Sequence[int],
    rivals: Sequence[int | None],
) -> list[Hit]:
    """What each level of an AVSL model adds to the distances, and to those of the rivals."""
    parts = level_parts(model, row, gallery.embeddings[torch.tensor(indices)])
    by_level = []
    for number, (hit, rival) in enumerate(zip(hits, rivals, strict=True)):
        own = parts[number]
        levels = tuple(zip(model.levels, own.tolist(), strict=True))
        if rival is None:
            by_level.append(replace(hit, levels=levels))
            continue
        gaps = parts[rival] - own
        missing = (hit.gap or 0.0) - float(gaps.sum())
        by_level.append(
            replace(
                hit,
                levels=levels,
                level_gaps=tuple(zip(model.levels, gaps.tolist(), strict=True)),
                gap_residual=missing,
            )
        )
    return by_level
