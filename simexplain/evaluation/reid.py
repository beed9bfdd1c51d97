"""Person re-identification: the same person before another camera, by Market-1501's protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.arguments import typed
from simexplain.data.dataset_split import DataSplit
from simexplain.data.datasets import JUNK, is_distractor
from simexplain.data.folders import Record
from simexplain.errors import ComparisonError, ImageError
from simexplain.evaluation.reid_result import Failure, Reidentification
from simexplain.evaluation.retrieval import Embedded, Progress, embedded
from simexplain.metrics.ranking import PAIRS, Mask, Ranking, rank, same
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model
from simexplain.networks import preserve_state

RANKS = (1, 5, 10)
"""The ranks of the CMC that papers report."""


@typed
def evaluate_reid(
    model: nn.Module,
    data: DataSplit,
    *,
    ranks: Sequence[int] = RANKS,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Reidentification:
    """CMC and mAP of a model on persons, by its own distance.

    The protocol of Market-1501 (Zheng et al. 2015, section 5) with single queries, which CUHK03-NP
    shares: relevant are pictures of the query's person before other cameras; those of the same
    person before the same camera are ignored, as is junk (``-1``); distractors (``0000``) are never
    relevant. Of equal distances the relevant picture comes last. Junk cannot change a number and
    is not even embedded. Pictures that cannot be read are listed and left out.

    Args:
        model: A similarity model, or any ``nn.Module`` that returns an embedding.
        data: Queries and gallery with persons as labels and cameras, as ``read_dataset`` reads
            ``market1501`` and ``cuhk03``.
        ranks: Ranks of the CMC.
        batch_size: Pictures in one forward pass.
        progress: Called with what is done, how far it is, and how far it goes.

    Raises:
        ImageError: If queries or gallery are empty, or none of them can be read.
        ModelError: If an embedding is not finite.
        ComparisonError: If a person or a camera is missing, a rank is below 1, or no query has a
            relevant picture.
    """
    gallery = tuple(record for record in data.gallery or () if record.label != JUNK)
    _check(data.queries, gallery, ranks, data.problems)
    base = as_similarity_model(model)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    queries = embedded(base, data.queries, what="Embedding queries", **options)
    embedded_gallery = embedded(base, gallery, what="Embedding gallery", **options)
    junk = len(data.junk) + len(data.gallery or ()) - len(gallery)
    return ranked_reid(
        base, queries, embedded_gallery, ranks=ranks, junk=junk, name=data.name, progress=progress
    )


@torch.no_grad()
def ranked_reid(
    model: nn.Module,
    queries: Embedded,
    gallery: Embedded,
    *,
    ranks: Sequence[int] = RANKS,
    junk: int = 0,
    name: str = "",
    block: int | None = None,
    progress: Progress | None = None,
) -> Reidentification:
    """As :func:`evaluate_reid`, of pictures that are embedded already.

    Args:
        model: The model that embedded them; its ``distance`` is used.
        queries: From ``embedded``.
        gallery: From ``embedded``; junk in it is ignored.
        ranks: Ranks of the CMC.
        junk: Pictures of junk that were left out before.
        name: Of the data set.
        block: Queries ranked at a time; None for as many as make some two million pairs.
        progress: Called with what is done, how far it is, and how far it goes.

    Raises:
        ComparisonError: As for :func:`evaluate_reid`.
    """
    base = as_similarity_model(model)
    _check(queries.records, gallery.records, ranks)
    relevant, ignored = masks_of(queries.records, gallery.records)
    with preserve_state(base):
        ranking = rank(
            base.distance, queries.rows, gallery.rows, relevant, ignored, block=block,
            progress=None if progress is None else lambda *now: progress("Ranking", *now),
        )  # fmt: skip
        if not ranking.answerable.any():
            raise ComparisonError(
                "Expected a picture of some query's person before another camera in the gallery, "
                "but there is none; check the folders."
            )
        size = block or max(1, PAIRS // len(gallery.rows))
        failures = _failures(base, queries, gallery, ranking, (relevant, ignored), size)
    broken = {str(path): why for path, why in {**queries.broken, **gallery.broken}.items()}
    settings = {
        "model": base.name, "data": name, "query": "single",
        "same person, same camera": "ignored", "junk": "ignored",
        "distractors": "never relevant", "ties": "relevant last",
    }  # fmt: skip
    among = sum(record.label == JUNK for record in gallery.records)
    return Reidentification(
        ranking, queries.records, gallery.records, tuple(sorted(set(ranks))), junk + among,
        failures, broken, settings,
    )  # fmt: skip


def masks_of(queries: Sequence[Record], gallery: Sequence[Record]) -> tuple[Mask, Mask]:
    """What is relevant to a query, whatever the camera, and what is ignored for it."""
    numbers: dict[object, int] = {}

    def numbered(records: Sequence[Record], *, camera: bool) -> Tensor:
        keys = [(r.label, r.camera if camera else None) for r in records]
        # A negative number is the same as nothing.
        excluded = [r.label == JUNK or is_distractor(r.label) for r in records]
        places = [numbers.setdefault(key, len(numbers)) for key in keys]
        return torch.tensor([-1 if no else n for n, no in zip(places, excluded, strict=True)])

    persons = same(numbered(queries, camera=False), numbered(gallery, camera=False))
    seen = same(numbered(queries, camera=True), numbered(gallery, camera=True))
    junk = torch.tensor([record.label == JUNK for record in gallery])
    return persons, lambda part: seen(part) | junk


def _failures(
    model: SimilarityModel,
    queries: Embedded,
    gallery: Embedded,
    ranking: Ranking,
    masks: tuple[Mask, Mask],
    size: int,
) -> tuple[Failure, ...]:
    """Every query whose first candidate is a wrong one, the worst first."""
    failed = (ranking.first > 1).nonzero().flatten().tolist()
    failures = []
    for start in range(0, len(failed), size):
        places = failed[start : start + size]
        distances = model.distance(queries.rows[places], gallery.rows).cpu()
        for index, row in zip(places, distances, strict=True):
            own = slice(index, index + 1)
            relevant, ignored = (mask(own)[0] for mask in masks)
            right = int(row.masked_fill(~relevant | ignored, torch.inf).argmin())
            wrong = int(ranking.nearest[index])
            failures.append(
                Failure(
                    query=queries.records[index],
                    wrong=gallery.records[wrong],
                    right=gallery.records[right],
                    first=int(ranking.first[index]),
                    average_precision=float(ranking.average_precision[index]),
                    distances=(float(row[wrong]), float(row[right])),
                )
            )
    return tuple(
        sorted(failures, key=lambda one: (one.average_precision, -one.first, str(one.query.path)))
    )


def _check(
    queries: Sequence[Record],
    gallery: Sequence[Record],
    ranks: Sequence[int],
    problems: Sequence[str] = (),
) -> None:
    """Says what is missing before the long work, not after it."""
    if not queries or not gallery:
        what = "query" if not queries else "gallery picture"
        why = f" ({'; '.join(problems)})" if problems else ""
        raise ImageError(
            f"Expected at least one {what}, a picture named by person and camera such as "
            f"0002_c1s1_000451_03.jpg, got none{why}; check the folder."
        )
    if not ranks or min(ranks) < 1:
        raise ComparisonError(f"Expected ranks of at least 1, got {list(ranks)}.")
    for record in (*queries, *gallery):
        if record.label is None or record.camera is None:
            what = "person" if record.label is None else "camera"
            raise ComparisonError(
                f"Expected a {what} for every picture, but '{record.path}' has none; read the data "
                "as market1501 or cuhk03, or give its Record a label and a camera."
            )
