"""Where a query and its hits agree, from what the index keeps: no network is run here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simexplain.errors import ComparisonError
from simexplain.graph.inference import infer
from simexplain.matching.factors import Factors, unexplained_of
from simexplain.models.avsl import AVSL
from simexplain.networks import lengths_of, unit_rows
from simexplain.searching.query import similarities


@dataclass(frozen=True)
class Marginals:
    """What each position adds to the cosine of a query with each of ``K`` images.

    Attributes:
        query: ``(K,h,w)``, signed; the map of an image sums to its cosine.
        images: ``(K,h',w')``, likewise, over the positions of the images.
        cosines: ``(K,)``, of the vectors themselves.
    """

    query: Tensor
    images: Tensor
    cosines: Tensor

    @property
    def residual(self) -> Tensor:
        """The largest difference of a map's sum from its cosine, for each image ``(K,)``."""
        sums = torch.stack((self.query.sum(dim=(1, 2)), self.images.sum(dim=(1, 2))))
        return (sums - self.cosines).abs().amax(dim=0)


def marginals(query: Factors, images: Factors) -> Marginals:
    """The marginals of the exact decomposition of the cosine, without its matrix.

    With ``t_p`` for what position ``p`` of the query adds to its vector ``v`` and an even share of
    the rest added to it, the map over the query is ``t_p . v' / (|v| |v'|)``, and the one over the
    image ``t'_r . v / (|v| |v'|)``: the marginals of ``Matching`` with score ``cosine``. They cost
    one product of a matrix with a vector each.

    Args:
        query: Factors of one image.
        images: Factors of ``K`` images in the same basis, float16 or wider.

    Raises:
        ComparisonError: If there are several queries or the widths differ.
    """
    if len(query) != 1 or query.vectors.shape[1] != images.vectors.shape[1]:
        raise ComparisonError(
            f"Expected factors of one query and of images of one width, got "
            f"{tuple(query.vectors.shape)} and {tuple(images.vectors.shape)}."
        )
    own = unit_rows(query.vectors.float())
    units = unit_rows(images.vectors.float())
    return Marginals(
        query=query_marginal(query, units),
        images=gallery_marginal(images, own[0]),
        cosines=units @ own[0],
    )


def query_marginal(query: Factors, units: Tensor) -> Tensor:
    """What each position of one image adds to its unit vector along ``(K,E)``: ``(K,h,w)``."""
    height, width = query.parts.shape[2:]
    length = lengths_of(query.vectors.float())[0]
    length = torch.where(length > 0, length, torch.inf)
    maps: Tensor = (units / length) @ query.parts[0].float().flatten(1)
    shared = (units / length) @ query.rest[0].float() / (height * width)
    values: Tensor = (maps + shared[:, None]).reshape(-1, height, width)
    return values


def gallery_marginal(images: Factors, unit: Tensor) -> Tensor:
    """What each position of ``K`` images adds to their unit vectors along ``(E,)``: ``(K,h,w)``."""
    count, _, height, width = images.parts.shape
    lengths = lengths_of(images.vectors.float())
    lengths = torch.where(lengths > 0, lengths, torch.inf)
    parts = images.parts.float().flatten(2)
    maps: Tensor = torch.matmul(unit, parts)
    shared = images.rest.float() @ unit / (height * width)
    values: Tensor = ((maps + shared[:, None]) / lengths[:, None]).reshape(count, height, width)
    return values


def contrasts(
    query_maps: Tensor, rivals: Tensor, distances: Tensor, further: Tensor, distance: str
) -> tuple[Tensor, Tensor]:
    """Which positions of the query put one image before another, in units of the distance.

    A map of a cosine is linear in the other image, so the difference of two of them sums to the
    difference of the cosines. Each of the distances has a factor that turns this difference into
    its own: 1 for ``cosine``; 2 for ``squared``, which is ``2 - 2 cos``; and ``2 / (d + d')`` for
    ``euclidean``, since ``d'^2 - d^2 = (d' - d)(d' + d)``. So the maps add up for all of them.

    Args:
        query_maps: Of the nearer images ``(K,h,w)``, from :func:`marginals`.
        rivals: Of the images further down ``(K,h,w)``.
        distances: Of the query to the nearer images ``(K,)``.
        further: Of the query to the others ``(K,)``.
        distance: A name in ``DISTANCES``.

    Returns:
        Signed maps ``(K,h,w)``, positive where the query speaks for the nearer image, and what is
        missing of ``further - distances`` in their sums ``(K,)``: rounding.

    Raises:
        ComparisonError: If the distance is none of those.
    """
    scale = _per_cosine(distance, distances, further).to(query_maps)
    maps = (query_maps - rivals) * scale[:, None, None]
    missing = (further - distances).to(maps) - maps.sum(dim=(1, 2))
    return maps, missing


def _per_cosine(distance: str, near: Tensor, far: Tensor) -> Tensor:
    """What a difference of cosines of one is worth in a distance ``(K,)``."""
    if distance == "euclidean":
        both = near + far
        return torch.where(both > 0, 2 / both.clamp_min(1e-30), torch.zeros_like(both))
    if distance in ("cosine", "squared"):
        return torch.full_like(near, 1.0 if distance == "cosine" else 2.0)
    raise ComparisonError(
        f"Expected a distance of euclidean, squared or cosine to be taken apart, got '{distance}'."
    )


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
    """Why the whole query found its ``K`` hits.

    Args:
        query: Factors of the query.
        images: Of the hits.
        rows: Embeddings of the hits, then of the rivals ``(n,E)``; of those nothing else is needed.
        rivals: For each hit the place of its rival in ``rows``, or None.
        distances: Of the query to ``rows`` ``(n,)``.
        name: The distance, in ``DISTANCES``; with a model's own (empty) contrasts are of cosines.
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
    """Why a region of the query, of unit vector ``(E,)`` and coverage ``(h,w)``, found its hits.

    The similarity of the region with an image is the cosine of the sum of the region's parts and
    the part of the image's best position. It is linear in the former, so each position of the
    region adds to it what it covers of its cell times the product of its part with the latter.
    ``images`` are those of the hits, then of the rivals, whose places there ``rivals`` has.
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
def level_parts(model: AVSL, query: Tensor, images: Tensor) -> Tensor:
    """What AVSL's levels add to the distances of a row ``(1,E)`` to ``(K,E)``: ``(K,L)``."""
    device = next(model.heads.parameters())
    first = model.unpacked(query.to(device).expand(len(images), -1))
    pairs = infer(model.graph().detached(), first, model.unpacked(images.to(device)))
    return torch.stack([level.sum(dim=1) for level in pairs.contributions], dim=1).cpu()
