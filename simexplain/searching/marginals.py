"""Where two images agree and what separates one hit from another, from their factors alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simexplain.errors import ComparisonError
from simexplain.matching.factors import Factors
from simexplain.networks import lengths_of, unit_rows


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
    """What each position of one image adds to its unit vector along directions.

    Args:
        query: Factors of one image.
        units: ``(K,E)``.

    Returns:
        ``(K,h,w)``; each sums to the product of the unit vector with a direction.
    """
    height, width = query.parts.shape[2:]
    length = lengths_of(query.vectors.float())[0]
    length = torch.where(length > 0, length, torch.inf)
    maps: Tensor = (units / length) @ query.parts[0].float().flatten(1)
    shared = (units / length) @ query.rest[0].float() / (height * width)
    values: Tensor = (maps + shared[:, None]).reshape(-1, height, width)
    return values


def gallery_marginal(images: Factors, unit: Tensor) -> Tensor:
    """What each position of ``K`` images adds to their unit vectors along one.

    Args:
        images: Factors of the images.
        unit: ``(E,)``.

    Returns:
        ``(K,h,w)``; each sums to the product of an image's unit vector with the direction.
    """
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


def rival_places(labels: Sequence[str | None], hits: int) -> list[int | None]:
    """For each of the first images of a ranking, the best one after it of another class.

    Args:
        labels: Of a ranking, the best first; None for an image without a class, which differs from
            every other.
        hits: How many of the first to consider.

    Returns:
        Positions in the ranking, None where no image of another class follows.
    """
    values: list[int | None] = []
    for index, own in enumerate(labels[:hits]):
        later = range(index + 1, len(labels))
        values.append(next((n for n in later if own is None or labels[n] != own), None))
    return values
