"""Retrieval and re-identification as one ranking with two masks: what is relevant, what ignored.

Nothing is sorted: where the relevant images stand follows from counting, for each of them, what is
at most as far. Of equal distances the relevant image comes last, so that an embedding that maps
everything to one point finds nothing, and the order of the gallery plays no part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from simexplain.errors import ComparisonError

PAIRS = 2**21
"""Pairs of queries and gallery at a time, by default; some 50 bytes each."""

Mask = Callable[[slice], Tensor]
"""For some of the queries, both ends given, which of the gallery: ``(B,G)`` bool."""


@dataclass(frozen=True)
class Ranking:
    """Where the relevant images of a gallery stand for each of ``Q`` queries; all on the CPU.

    A query without a relevant image has no score: NaN, which means over queries leave out.

    Attributes:
        candidates: ``(Q,)`` int64, images of the gallery that are not ignored.
        relevant: ``(Q,)`` int64, those of them that are relevant (``R``).
        first: ``(Q,)`` int64, the place of the first relevant one from 1 on; 0 where there is none.
        nearest: ``(Q,)`` int64, the gallery row of the first candidate; -1 where there is none.
        map_at_r: ``(Q,)`` float64 in [0, 1], average precision over the first ``R`` places
            (Musgrave et al. 2020, "A metric learning reality check", section 3.2).
        r_precision: ``(Q,)`` float64 in [0, 1], the share of relevant ones in the first ``R``.
        average_precision: ``(Q,)`` float64 in (0, 1], the mean precision at the places of all
            relevant ones; its mean is the mAP of re-identification.
    """

    candidates: Tensor
    relevant: Tensor
    first: Tensor
    nearest: Tensor
    map_at_r: Tensor
    r_precision: Tensor
    average_precision: Tensor
    trapezoid_precision: Tensor

    def __len__(self) -> int:
        return len(self.first)

    @property
    def answerable(self) -> Tensor:
        """``(Q,)`` bool: queries with a relevant image in the gallery."""
        return self.relevant > 0

    def recall(self, k: int) -> Tensor:
        """``(Q,)`` float64: 1 where a relevant image is among the first ``k``, else 0 or NaN.

        Its mean is Recall@K of metric learning and, with cameras ignored, the CMC at rank ``k``.

        Raises:
            ComparisonError: If ``k`` is below 1.
        """
        if k < 1:
            raise ComparisonError(f"Expected a K of at least 1, got {k}; ask for Recall@1 or more.")
        hits = ((self.first > 0) & (self.first <= k)).double()
        return hits.masked_fill(~self.answerable, torch.nan)

    @classmethod
    def empty(cls, queries: int) -> Ranking:
        """Of so many queries, to be filled in."""
        counts = ("candidates", "relevant", "first", "nearest")
        types = {f.name: torch.long if f.name in counts else torch.double for f in fields(cls)}
        return cls(**{name: torch.empty(queries, dtype=kind) for name, kind in types.items()})

    def fill(self, part: slice, ranking: Ranking) -> None:
        """Writes the ranking of some of the queries, in place."""
        for field in fields(self):
            getattr(self, field.name)[part] = getattr(ranking, field.name)


@torch.no_grad()
def mean_defined(values: Tensor) -> float:
    """The mean over the queries ``(Q,)`` that have a score; NaN where none has."""
    return float(values.nanmean()) if len(values) else torch.nan


def ranked(distances: Tensor, relevant: Tensor, ignored: Tensor | None = None) -> Ranking:
    """The ranking that distances make.

    Args:
        distances: ``(Q,G)``, smaller is closer.
        relevant: ``(Q,G)`` bool, which images of the gallery a query should find.
        ignored: ``(Q,G)`` bool, which do not count at all, relevant or not; None for none.

    Raises:
        ComparisonError: If the shapes differ, the gallery is empty or a distance is not finite.
    """
    masks = [relevant] if ignored is None else [relevant, ignored]
    shapes = [tuple(distances.shape), *(tuple(mask.shape) for mask in masks)]
    if distances.dim() != 2 or not distances.shape[1] or len(set(shapes)) > 1:
        raise ComparisonError(
            f"Expected distances and masks of one shape (Q,G) with a gallery, got {shapes}."
        )
    if not distances.isfinite().all():
        raise ComparisonError(
            "Expected finite distances, got NaN or infinity; check the embeddings for them."
        )
    seen = torch.ones_like(relevant) if ignored is None else ~ignored
    hits, misses = relevant & seen, seen & ~relevant
    counts = hits.sum(dim=1)
    positions = _positions(distances, hits, misses, int(counts.max()) if len(counts) else 0)
    order = torch.arange(1, positions.shape[1] + 1, device=positions.device)
    valid = order <= counts[:, None]
    within = valid & (positions <= counts[:, None])
    precisions = order / positions.double()
    before = torch.where(positions > 1, (order - 1) / (positions - 1).clamp_min(1).double(), 1.0)
    share = counts.double()
    share = share.masked_fill(counts == 0, torch.nan)
    parts = {
        "candidates": seen.sum(dim=1),
        "relevant": counts,
        "first": torch.where(counts > 0, positions[:, 0], 0),
        "nearest": _nearest(distances, hits, misses),
        "map_at_r": (precisions * within).sum(dim=1) / share,
        "r_precision": within.sum(dim=1) / share,
        "average_precision": (precisions * valid).sum(dim=1) / share,
        "trapezoid_precision": ((precisions + before) / 2 * valid).sum(dim=1) / share,
    }
    return Ranking(**{name: part.cpu() for name, part in parts.items()})


def _positions(distances: Tensor, hits: Tensor, misses: Tensor, most: int) -> Tensor:
    """Places from 1 on of the relevant images ``(Q,max(1,most))``, ascending; the rest is filling.

    The place of the j-th nearest relevant image is j and the number of misses that are at most as
    far. Each miss is counted at the first relevant image that does not lie before it.
    """
    wanted = distances.masked_fill(~hits, torch.inf)
    near = wanted.topk(max(1, most), dim=1, largest=False).values.contiguous()
    places = torch.searchsorted(near, distances.contiguous())  # relevant ones strictly nearer
    counted = torch.zeros(len(near), near.shape[1] + 1, dtype=torch.int32, device=near.device)
    counted.scatter_add_(1, places, misses.int())
    ahead = counted.cumsum(dim=1)[:, :-1]
    return ahead + torch.arange(1, near.shape[1] + 1, device=near.device)


def _nearest(distances: Tensor, hits: Tensor, misses: Tensor) -> Tensor:
    """The first candidate ``(Q,)``: of equals a miss, then the smaller row; -1 without any."""
    seen = hits | misses
    least = distances.masked_fill(~seen, torch.inf).amin(dim=1, keepdim=True)
    at = seen & (distances == least)
    # argmax gives the first of equals.
    best = (at.to(torch.int8) + (at & misses).to(torch.int8)).argmax(dim=1)
    return torch.where(seen.any(dim=1), best, -1)


def same(queries: Tensor, gallery: Tensor) -> Mask:
    """The mask of pairs with the same number; a negative number is the same as nothing.

    Args:
        queries: ``(Q,)`` integers, such as the number of each image's class.
        gallery: ``(G,)`` integers.
    """

    def mask(part: slice) -> Tensor:
        own = queries[part, None]
        return (own == gallery) & (own >= 0)

    return mask


@torch.no_grad()
def rank(
    distance: Callable[[Tensor, Tensor], Tensor],
    queries: Tensor,
    gallery: Tensor,
    relevant: Mask,
    ignored: Mask | None = None,
    *,
    block: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Ranking:
    """The ranking of embedded queries and gallery, never more than ``block * G`` pairs at a time.

    Identical rows of the gallery get identical distances, whatever rounding does, since the
    distance to each is computed once. The size of the blocks changes nothing else either, up to the
    rounding of ``distance`` (none for ``euclidean`` and ``squared``).

    Args:
        distance: ``(B,E), (G,E) -> (B,G)``, smaller is closer.
        queries: ``(Q,E)``.
        gallery: ``(G,E)``.
        relevant: Which images of the gallery each query should find, such as ``same(a, b)``.
        ignored: Which do not count for it; None for none.
        block: Queries at a time; None for as many as make some two million pairs.
        progress: Called with the queries done and all of them after each block.

    Raises:
        ComparisonError: If queries or gallery are empty, the block is below 1, or rows or distances
            are not finite.
    """
    if not len(queries) or not len(gallery):
        raise ComparisonError(
            f"Expected at least one query and one gallery image, got {len(queries)} and "
            f"{len(gallery)}."
        )
    if block is not None and block < 1:
        raise ComparisonError(f"Expected a block of at least 1 query, got {block}.")
    if not (queries.isfinite().all() and gallery.isfinite().all()):
        raise ComparisonError("Expected finite embeddings, got NaN or infinity; check the model.")
    size = block or max(1, PAIRS // len(gallery))
    kinds, places = torch.unique(gallery, dim=0, return_inverse=True)
    several = len(kinds) < len(gallery)
    # Filled in: small results kept one by one between the blocks would pin the memory of all.
    result = Ranking.empty(len(queries))
    for start in range(0, len(queries), size):
        part = slice(start, min(start + size, len(queries)))
        distances = distance(queries[part], kinds if several else gallery)
        masks = [
            mask(part).to(distances.device) for mask in (relevant, ignored) if mask is not None
        ]
        result.fill(part, ranked(distances[:, places] if several else distances, *masks))
        if progress is not None:
            progress(part.stop, len(queries))
    return result
