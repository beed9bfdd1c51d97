"""The verb: find the pictures nearest to one, and explain why each was found."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from simexplain.arguments import typed
from simexplain.data.folders import StageProgress, left_out_of
from simexplain.data.images import Picture, PictureSource, read_picture
from simexplain.data.preprocessing import Geometry, prepared, shrunk
from simexplain.errors import ComparisonError, ImageError, ModelError
from simexplain.explanation import versions
from simexplain.matching.factors import Factors, pair_matrix
from simexplain.matching.result import Frame, PositionPair, centred, strongest
from simexplain.methods.method import bypass_warning, unexplained_share_warning
from simexplain.models.avsl import AVSL
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model
from simexplain.models.moving import Region as Span
from simexplain.networks import full_precision, unit_rows
from simexplain.searching.hit_maps import HitMaps, hit_maps, level_parts, region_maps
from simexplain.searching.index import build_index
from simexplain.searching.index_embedding import surveyed_keeping
from simexplain.searching.index_gallery import GalleryIndex, open_index
from simexplain.searching.index_models import distance_name_of
from simexplain.searching.query import (
    ROUNDING,
    Box,
    Ranked,
    Region,
    SearchQuery,
    best_box,
    close_limit,
    prepare_query,
    rank_gallery,
)
from simexplain.searching.search_result import Hit, Rival, SearchResult

SIDE = 360
"""Pixels of the longer side of a thumbnail."""

_MISSING = 225


def _thumbnails(
    gallery: GalleryIndex, query: Picture, geometry: Geometry, shown: Sequence[int]
) -> tuple[dict[str, NDArray[np.uint8]], dict[str, Geometry], list[str]]:
    """Thumbnails of the query and of pictures of a gallery, and their geometries, by path.

    Pictures that are gone or have changed are grey, with a warning.
    """
    pictures = {query.path: shrunk(query.image, SIDE)}
    geometries, warnings = {query.path: geometry}, []
    for index in shown:
        path, geometry = str(gallery.file(index)), gallery.geometry(index)
        if path in pictures:
            continue
        geometries[path] = geometry
        height, width = geometry.original
        try:
            image = read_picture(path).image
            if (image.height, image.width) == (height, width):
                pictures[path] = shrunk(image, SIDE)
                continue
            why = "has another size than when it was indexed; bring the index up to date"
        except ImageError:
            why = "cannot be read where it was indexed; give their folder with --root"
        warnings.append(f"'{path}' {why}. The figure leaves it grey.")
        pictures[path] = shrunk(Image.new("RGB", (width, height), (_MISSING,) * 3), SIDE)
    return pictures, geometries, warnings


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
    """Hits, nearest first, with their maps; ``shown`` are the places of all pictures in them."""

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
    """Explains why the first pictures of a ranking were found, from the index alone."""
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
        hit = replace(hit, levels=tuple(zip(model.levels, parts[number].tolist(), strict=True)))
        if rival is not None:
            gaps = parts[rival] - parts[number]
            hit = replace(
                hit,
                level_gaps=tuple(zip(model.levels, gaps.tolist(), strict=True)),
                gap_residual=(hit.gap or 0.0) - float(gaps.sum()),
            )
        by_level.append(hit)
    return by_level


@typed
@full_precision()
@torch.no_grad()
def search(
    model: nn.Module,
    query: PictureSource,
    index: str | Path | GalleryIndex,
    k: int | None = None,
    *,
    region: Box | None = None,
    mask: str | Path | None = None,
    root: str | Path | None = None,
    max_batch: int | None = None,
    progress: StageProgress | None = None,
) -> SearchResult:
    """Finds the nearest pictures of a gallery and explains why each was found.

    The network runs on the query alone; what explains the hits comes from the index. For each hit
    there is a map over both pictures of where they agree, which sums to their cosine, and one over
    the query of what sets the hit apart from the next picture down of another class, which sums to
    the difference of their distances. Classes are folders, where the whole gallery is in folders;
    else that picture is simply the next one. The query's own file is never a hit. Each hit has a
    flag for a close match, which the nearest picture need not be; see :func:`close_limit`.

    With a region, pictures are ranked by that part of the query alone: by the largest cosine
    between the sum of what the region's positions add and what one position of the picture adds.
    Where that was found is boxed in every hit.

    Args:
        model: The model that the index was made with; another one is refused.
        query: A picture file, a picture of PIL or an array.
        index: An index, its file, or a folder of pictures, which is then indexed for this search
            alone.
        k: How many hits; five unless given, or all where there are fewer.
        region: ``(x, y, width, height)`` in pixels of the query's picture.
        mask: Instead of a box, a picture of the query's size that is white where the region is.
        root: Where the gallery's pictures are now, if they were moved.
        max_batch: Pictures of a folder in one forward pass.
        progress: Called with what is done, how far it is, and how far it goes.

    Raises:
        ImageError: If the query, the mask or the folder cannot be read.
        OutputError: If the index is missing or damaged.
        ModelError: If it is of another model, or a region is given for one without a basis.
        ComparisonError: If ``k`` or the region does not fit.
    """
    if region is not None and mask is not None:
        raise ComparisonError("Expected a region or a mask, got both; leave one of them away.")
    base = as_similarity_model(model)
    picture = read_picture(query, "query")
    gallery, notes = _gallery(base, index, root, max_batch, progress)
    if gallery.has_basis and gallery.keeping.bypass is None:  # as of an older index
        gallery = replace(gallery, keeping=surveyed_keeping(gallery.keeping, base))
    views, (geometry,) = prepared(gallery.preprocess, [picture])
    wanted = None if region is None else Region.of_box(region, geometry.original)
    wanted = wanted if mask is None else Region.of_mask(mask, geometry.original)
    if wanted is not None and not gallery.has_basis:
        raise ModelError(
            f"A region is searched for by what positions add to the embeddings, which this index "
            f"does not keep: {gallery.without_basis}"
        )
    own = gallery.place_of(query) if isinstance(query, (str, Path)) else None
    request = prepare_query(base, gallery, views, geometry, wanted)
    ranking = rank_gallery(base, gallery, request, k, own=own)
    # The distance of the model need not be the one that it was indexed with.
    gallery = replace(gallery, distance_name=distance_name_of(base, gallery.embeddings.shape[1]))
    limit = close_limit(base, gallery, request, ranking)
    hits = hits_of(base, gallery, request, ranking, limit)
    result = _result(base, gallery, picture, wanted, request, hits, geometry)
    all_notes = base.preprocess.notes + picture.notes + notes
    searched = str(index) if isinstance(index, (str, Path)) else str(gallery.path)
    return replace(
        result, index=searched, close_limit=limit, warnings=(*all_notes, *result.warnings)
    )


def _gallery(
    model: SimilarityModel,
    index: str | Path | GalleryIndex,
    root: str | Path | None,
    max_batch: int | None,
    progress: StageProgress | None,
) -> tuple[GalleryIndex, tuple[str, ...]]:
    """The index of a gallery, made for this search where there is none, and what to say of it."""
    if isinstance(index, GalleryIndex):
        index.check_model(model)
        return index, ()
    if not Path(index).is_dir():
        opened = open_index(index, root=root)
        opened.check_model(model)
        return opened, ()
    with tempfile.TemporaryDirectory(prefix="simexplain-") as folder:
        made = build_index(
            model, index, Path(folder) / "gallery.index", batch_size=max_batch or 32,
            progress=progress,
        )  # fmt: skip
        # The file goes with its folder; what is mapped from it must not.
        kept = {name: tensor.clone() for name, tensor in made.tensors.items()}
    made = replace(made, tensors=kept, embeddings=kept["embeddings"], sizes=kept["sizes"])
    warnings: tuple[str, ...] = (
        f"'{index}' was indexed for this search alone; simexplain index keeps an index, and "
        "searching that does not run the network on the gallery.",
    )
    if left_out := left_out_of(index):
        warnings += (left_out,)
    if made.errors:
        warnings += (f"{len(made.errors)} pictures of '{index}' cannot be read and were left out.",)
    return made, warnings


def _result(
    model: SimilarityModel,
    gallery: GalleryIndex,
    picture: Picture,
    wanted: Region | None,
    query: SearchQuery,
    hits: HitsFound,
    geometry: Geometry,
) -> SearchResult:
    """Everything together, with thumbnails of all pictures that a figure shows."""
    pictures, geometries, warnings = _thumbnails(gallery, picture, geometry, hits.shown)
    maps = hits.maps
    return SearchResult(
        query=picture.path,
        hits=hits.hits,
        query_maps=None if maps is None else maps.query,
        hit_maps=None if maps is None else maps.hits,
        contrast_maps=None if maps is None else maps.contrast,
        region=None if wanted is None else wanted.box,
        coverage=query.coverage,
        model=model.name,
        layer=gallery.layer,
        distance_name=gallery.distance_name if wanted is None else "cosine of a region",
        index="",
        gallery=hits.searched,
        warnings=(*hits.warnings, *warnings),
        versions=versions(),
        pictures=pictures,
        geometries=geometries,
        layer_region=gallery.keeping.region,
        bypass=gallery.bypass,
    )
