"""The verb: find the pictures nearest to one, and explain why each was found."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from simexplain.arguments import typed
from simexplain.data.folders import left_out_of
from simexplain.data.images import Picture, PictureSource, read_picture
from simexplain.data.preprocessing import Geometry, prepared
from simexplain.errors import ComparisonError, ModelError
from simexplain.explanation import versions
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model
from simexplain.networks import full_precision
from simexplain.searching.closeness import close_limit
from simexplain.searching.index import build_index
from simexplain.searching.index_embedding import surveyed_keeping
from simexplain.searching.index_gallery import GalleryIndex, open_index
from simexplain.searching.index_neighbours import distance_name_of
from simexplain.searching.regions import Box, Region
from simexplain.searching.search_hits import HitsFound, hits_of
from simexplain.searching.search_query import SearchQuery, prepare_query, rank_gallery
from simexplain.searching.search_result import SearchResult
from simexplain.searching.search_thumbnails import Album

Progress = Callable[[str, int, int], None]


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
    progress: Progress | None = None,
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
    gallery = _surveyed_by(base, gallery)
    views, (geometry,) = prepared(gallery.preprocess, [picture])
    wanted = _region(picture, region, mask)
    if wanted is not None and not gallery.has_basis:
        raise ModelError(
            f"A region is searched for by what positions add to the embeddings, which this index "
            f"does not keep: {gallery.without_basis}"
        )
    own = gallery.place_of(query) if isinstance(query, (str, Path)) else None
    request = prepare_query(base, gallery, views, geometry, wanted)
    ranking = rank_gallery(base, gallery, request, k, own=own)
    gallery = _measured_by(base, gallery)
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
    progress: Progress | None,
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


def _measured_by(model: SimilarityModel, gallery: GalleryIndex) -> GalleryIndex:
    """With the distance of the model, which need not be the one that it was indexed with."""
    name = distance_name_of(model, gallery.embeddings.shape[1])
    return gallery if name == gallery.distance_name else replace(gallery, distance_name=name)


def _surveyed_by(model: SimilarityModel, gallery: GalleryIndex) -> GalleryIndex:
    """With where the layer looks and what bypasses it, which older indexes do not say."""
    if not gallery.has_basis or gallery.keeping.bypass is not None:
        return gallery
    return replace(gallery, keeping=surveyed_keeping(gallery.keeping, model))


def _region(picture: Picture, box: Box | None, mask: str | Path | None) -> Region | None:
    size = (picture.image.height, picture.image.width)
    if box is not None:
        return Region.of_box(box, size)
    return None if mask is None else Region.of_mask(mask, size)


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
    album = Album(gallery)
    album.add_query(picture, geometry)
    for index in hits.shown:
        album.add(index)
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
        warnings=(*hits.warnings, *album.warnings),
        versions=versions(),
        pictures=album.pictures,
        geometries=album.geometries,
        layer_region=gallery.keeping.region,
        bypass=gallery.bypass,
    )
