"""What was cached, turned into the reasons of hits: no network is run here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simexplain.graph.inference import infer
from simexplain.matching.factors import Factors, unexplained_of
from simexplain.models.avsl import AVSL
from simexplain.networks import unit_rows
from simexplain.searching.index_gallery import GalleryIndex
from simexplain.searching.marginals import Marginals, contrasts, gallery_marginal, query_marginal
from simexplain.searching.regions import similarities

_BLOCK = 64


@dataclass(frozen=True)
class HitMaps:
    """Maps of ``K`` hits; those of the query are over its own positions.

    Attributes:
        query: What each position of the query adds to the similarity with a hit ``(K,h,w)``.
        hits: What each position of a hit adds to it ``(K,h,w)``; for a region, the similarity of
            each position with it.
        similarity: The cosine that they add up to ``(K,)``; for a region that of the best position.
        residual: The largest difference of the sum of a map from it ``(K,)``.
        contrast: What each position of the query adds to the distance to the rival less that to
            the hit ``(K,h,w)``; zeros without a rival.
        gap_residual: What is missing of that difference in the sum ``(K,)``.
        unexplained: The share of the similarity that no position accounts for ``(K,)``; zero for a
            region, which is made of positions.
    """

    query: Tensor
    hits: Tensor
    similarity: Tensor
    residual: Tensor
    contrast: Tensor
    gap_residual: Tensor
    unexplained: Tensor


@torch.no_grad()
def hit_maps(
    query: Factors,
    images: Factors,
    rows: Tensor,
    rivals: Sequence[int | None],
    distances: Tensor,
    name: str,
) -> HitMaps:
    """Why the whole query found its hits.

    Args:
        query: Factors of the query.
        images: Of the ``K`` hits.
        rows: Embeddings of the hits, then of the rivals ``(n,E)``; of those nothing else is needed.
        rivals: For each hit the place of its rival in ``rows``, or None.
        distances: Of the query to ``rows`` ``(n,)``.
        name: The distance, in ``DISTANCES``; empty for a model's own, which is not a cosine in
            another guise: contrasts then add up to the difference of the cosines.
    """
    count = len(rivals)
    own = unit_rows(query.vectors.float())[0]
    units = unit_rows(rows.float())
    maps, cosines = query_marginal(query, units), units @ own
    if not name:
        distances, name = 1 - cosines, "cosine"
    sums = Marginals(maps[:count], gallery_marginal(images, own), cosines[:count])
    other = torch.tensor([at if rival is None else rival for at, rival in enumerate(rivals)])
    contrast, missing = contrasts(
        sums.query, maps[other], distances[:count], distances[other], name
    )
    return HitMaps(
        query=sums.query,
        hits=sums.images,
        similarity=sums.cosines,
        residual=sums.residual,
        contrast=contrast,
        gap_residual=missing,
        unexplained=unexplained_of(
            query, images, score="cosine", values=sums.cosines.to(query.vectors)
        ),
    )


@torch.no_grad()
def region_maps(
    query: Factors,
    coverage: Tensor,
    region: Tensor,
    images: Factors,
    rivals: Sequence[int | None],
) -> HitMaps:
    """Why a region of the query found its hits.

    The similarity of the region with an image is the cosine of the sum of the region's parts and
    the part of the image's best position. It is linear in the former, so each position of the
    region adds to it what it covers of its cell times the product of its part with the latter.

    Args:
        query: Factors of the query.
        coverage: ``(h,w)``.
        region: The region's vector at unit length ``(E,)``.
        images: Factors of the hits, then of the rivals.
        rivals: For each hit the place of its rival in ``images``, or None.
    """
    count = len(rivals)
    similar = similarities(images, region)
    best = similar.flatten(1).max(dim=1)
    parts = images.parts.float().flatten(2)
    chosen = parts.gather(2, best.indices[:, None, None].expand(-1, parts.shape[1], 1))[:, :, 0]
    weighted = Factors(
        (query.parts.float() * coverage), torch.zeros_like(query.rest), query.vectors
    )
    # `along` divides by the length of the whole vector; here it is that of the region's.
    summed = weighted.parts.sum(dim=(2, 3))
    maps = query_marginal(Factors(weighted.parts, weighted.rest, summed), unit_rows(chosen))
    other = torch.tensor([at if rival is None else rival for at, rival in enumerate(rivals)])
    contrast = maps[:count] - maps[other]
    gaps = best.values[:count] - best.values[other]
    return HitMaps(
        query=maps[:count],
        hits=similar[:count],
        similarity=best.values[:count],
        residual=(maps.sum(dim=(1, 2)) - best.values).abs()[:count],
        contrast=contrast,
        gap_residual=gaps - contrast.sum(dim=(1, 2)),
        unexplained=torch.zeros(count),
    )


@torch.no_grad()
def region_ranking(index: GalleryIndex, region: Tensor) -> tuple[Tensor, Tensor]:
    """Every picture of a gallery by how like its best position is to a region.

    Args:
        index: With factors.
        region: The region's vector at unit length ``(E,)``.

    Returns:
        Distances ``(G,)``, one minus the largest cosine, ascending, and places ``(G,)``.
    """
    parts = []
    for start in range(0, len(index), _BLOCK):
        block = index.factors(range(start, min(start + _BLOCK, len(index))))
        parts.append(similarities(block, region).flatten(1).amax(dim=1))
    distances = 1 - torch.cat(parts)
    order = distances.argsort(stable=True)
    return distances[order], order


@torch.no_grad()
def level_parts(model: AVSL, query: Tensor, images: Tensor) -> Tensor:
    """What each level of an AVSL model adds to the distance of a query and images ``(K,L)``.

    Args:
        model: The model.
        query: The query's row ``(1,E)``.
        images: Rows ``(K,E)``.
    """
    device = next(model.heads.parameters())
    first = model.unpacked(query.to(device).expand(len(images), -1))
    pairs = infer(model.graph().detached(), first, model.unpacked(images.to(device)))
    return torch.stack([level.sum(dim=1) for level in pairs.contributions], dim=1).cpu()
