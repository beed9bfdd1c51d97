"""Whether a hit is a close match, judged by how far apart a gallery's own pictures are."""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from simexplain.models.avsl import AVSL
from simexplain.models.base import DISTANCES, SimilarityModel
from simexplain.networks import unit_rows
from simexplain.searching.index_gallery import GalleryIndex
from simexplain.searching.search_query import Ranked, SearchQuery, labels_of

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
    place of those between pictures.

    Args:
        model: Whose distance counts.
        gallery: Of which at most 1,000 pictures are compared, spread evenly.
        query: The query.
        ranking: The gallery, ranked by it.
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
