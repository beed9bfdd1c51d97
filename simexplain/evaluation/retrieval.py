"""Retrieval over a data set, and re-identification, which is retrieval before other cameras."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.arguments import typed
from simexplain.data.dataset_split import DataSplit
from simexplain.data.datasets import JUNK, is_distractor
from simexplain.data.folders import Batches, Record, StageProgress
from simexplain.errors import ComparisonError, ImageError, ModelError
from simexplain.evaluation.retrieval_result import Failure, Reidentification, Retrieval
from simexplain.metrics.ranking import PAIRS, Mask, Ranking, rank, same
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model
from simexplain.networks import preserve_state
from simexplain.tracing import embed_alike

RECALLS = (1, 2, 4, 8)
"""The K of Recall@K on CUB-200-2011 and Cars196 in the papers."""


@dataclass(frozen=True)
class Embedded:
    """Pictures of a data set and their embeddings.

    Attributes:
        rows: ``(M,E)``, as the model gives them.
        records: The ``M`` pictures.
        broken: Pictures that could not be read, each with the reason.
    """

    rows: Tensor
    records: tuple[Record, ...]
    broken: Mapping[Path, str]


@torch.no_grad()
def embedded(
    model: nn.Module,
    records: Sequence[Record],
    *,
    batch_size: int = 32,
    progress: StageProgress | None = None,
    what: str = "Embedding pictures",
) -> Embedded:
    """Embeds pictures in batches; the model is left as it was.

    Args:
        model: A similarity model, or any ``nn.Module`` that returns an embedding.
        records: The pictures.
        batch_size: Pictures in one forward pass, unless the model takes one number only.
        progress: Called with ``what``, the pictures done and all of them after each batch.
        what: What the progress is called.

    Raises:
        ImageError: If no picture is given or none can be read.
        ModelError: If an embedding is not finite; names the picture.
    """
    base = as_similarity_model(model)
    if not records:
        raise ImageError("Expected at least one picture to embed, got none.")
    batches = Batches(records, base.preprocess, base.batch_size or batch_size)
    rows, places = [], []
    with preserve_state(base):
        for part, images in batches:
            embeddings = embed_alike(base, images, batch_size)
            bad = (~embeddings.isfinite().all(dim=1)).nonzero().flatten().tolist()
            if bad:
                raise ModelError(
                    f"Expected finite embeddings, but the one of '{records[part[bad[0]]].path}' "
                    "is not; check the model."
                )
            rows.append(embeddings)
            places += part
            if progress is not None:
                progress(what, len(places) + len(batches.broken), len(records))
    if not rows:
        first = next(iter(batches.broken.values()))
        raise ImageError(f"None of {len(records)} pictures can be read, the first because: {first}")
    return Embedded(torch.cat(rows), tuple(records[n] for n in places), dict(batches.broken))


@typed
def evaluate_retrieval(
    model: nn.Module,
    queries: Sequence[Record],
    gallery: Sequence[Record] | None = None,
    *,
    ranks: Sequence[int] = RECALLS,
    grouped: bool = False,
    batch_size: int = 32,
    progress: StageProgress | None = None,
) -> Retrieval:
    """Recall@K and MAP@R of a model on labelled pictures, by its own distance.

    Relevant are the gallery's pictures of the query's class. The query's own file is never counted,
    under whatever path it is in the gallery; a copy of it under another name is. Of equal distances
    the relevant picture comes last. Queries for which nothing relevant is left are counted and take
    no part in any mean. Pictures that cannot be read are listed and left out on both sides.

    Args:
        model: A similarity model, or any ``nn.Module`` that returns an embedding.
        queries: Pictures with labels.
        gallery: What to search; None for the queries themselves.
        ranks: The K of Recall@K.
        grouped: Leave a query's own group out of its gallery, relevant or not. Every picture then
            needs a group.
        batch_size: Pictures in one forward pass.
        progress: Called with what is done, how far it is, and how far it goes.

    Raises:
        ImageError: If queries or gallery are empty, or none of them can be read.
        ModelError: If an embedding is not finite.
        ComparisonError: If a label or a group is missing, a K is below 1, or no query has a
            relevant picture in the gallery.
    """
    _check(queries, gallery, ranks, grouped)
    base = as_similarity_model(model)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    embedded_queries = embedded(base, queries, what="Embedding queries", **options)
    searched = None
    if gallery is not None:
        searched = embedded(base, gallery, what="Embedding gallery", **options)
    return ranked_retrieval(
        base, embedded_queries, searched, ranks=ranks, grouped=grouped, progress=progress
    )


@torch.no_grad()
def ranked_retrieval(
    model: nn.Module,
    queries: Embedded,
    gallery: Embedded | None = None,
    *,
    ranks: Sequence[int] = RECALLS,
    grouped: bool = False,
    block: int | None = None,
    progress: StageProgress | None = None,
) -> Retrieval:
    """As :func:`evaluate_retrieval`, of pictures that are embedded already.

    Args:
        model: The model that embedded them; its ``distance`` is used.
        queries: From :func:`embedded`.
        gallery: From :func:`embedded`; None for the queries themselves.
        ranks: The K of Recall@K.
        grouped: Leave a query's own group out of its gallery.
        block: Queries ranked at a time; None for as many as make some two million pairs.
        progress: Called with what is done, how far it is, and how far it goes.

    Raises:
        ComparisonError: As for :func:`evaluate_retrieval`.
    """
    base = as_similarity_model(model)
    searched = queries if gallery is None else gallery
    _check(queries.records, None if gallery is None else gallery.records, ranks, grouped)
    # Links and different spellings of a path lead to one file.
    files = same(*_numbered(lambda r: r.path.resolve(), queries.records, searched.records))
    groups = same(*_numbered(lambda record: record.group, queries.records, searched.records))
    with preserve_state(base):
        ranking = rank(
            base.distance, queries.rows, searched.rows,
            same(*_numbered(lambda record: record.label, queries.records, searched.records)),
            (lambda part: files(part) | groups(part)) if grouped else files,
            block=block, progress=None if progress is None else partial(progress, "Ranking"),
        )  # fmt: skip
    if not ranking.answerable.any():
        raise ComparisonError(_unanswerable(queries, gallery, grouped))
    broken = _broken(queries, searched)
    settings = {
        "model": base.name, "gallery": "queries" if gallery is None else "separate",
        "own file": "ignored", "own group": "ignored" if grouped else "counted",
        "ties": "relevant last",
    }  # fmt: skip
    ordered = tuple(sorted(set(ranks)))
    return Retrieval(ranking, queries.records, searched.records, ordered, broken, settings)


def _check(
    queries: Sequence[Record], gallery: Sequence[Record] | None, ranks: Sequence[int], grouped: bool
) -> None:
    """Says what is missing before the long work, not after it."""
    if not queries or (gallery is not None and not gallery):
        what = "query" if not queries else "gallery picture"
        raise ImageError(f"Expected at least one {what}, got none; check the folder or the split.")
    if not ranks or min(ranks) < 1:
        raise ComparisonError(f"Expected K of at least 1 for Recall@K, got {list(ranks)}.")
    for record in (*queries, *(gallery or ())):
        if record.label is None or (grouped and record.group is None):
            what = "class" if record.label is None else "group"
            raise ComparisonError(
                f"Expected a {what} for every picture, but '{record.path}' has none; give its "
                f"Record {'a label' if what == 'class' else 'one, or say --group name'}."
            )


def _broken(queries: Embedded, gallery: Embedded) -> dict[str, str]:
    return {str(path): why for path, why in {**queries.broken, **gallery.broken}.items()}


def _numbered(
    key: Callable[[Record], Hashable], queries: Sequence[Record], gallery: Sequence[Record]
) -> tuple[Tensor, Tensor]:
    """Equal numbers for equal keys, -1 for None: ``(Q,)`` and ``(G,)``."""
    numbers: dict[Hashable, int] = {None: -1}
    numbered = [
        [numbers.setdefault(key(record), len(numbers)) for record in records]
        for records in ((queries,) if queries is gallery else (queries, gallery))
    ]
    return torch.tensor(numbered[0]), torch.tensor(numbered[-1])


def _unanswerable(queries: Embedded, gallery: Embedded | None, grouped: bool) -> str:
    """Why no query has anything to find."""
    labels = {record.label for record in (gallery or queries).records}
    example = queries.records[0].label
    outside = " of another group" if grouped else ""
    if gallery is None:
        why = f"two pictures{outside} in some class, but no class of {len(labels)} has them"
    elif not labels & {record.label for record in queries.records}:
        why = (
            f"classes of the queries in the gallery, but it has none of them (such as '{example}')"
        )
    else:
        why = f"another picture{outside} of some query's class in the gallery, but there is none"
    return f"Expected {why}; check the folders{' and the groups' if grouped else ''}."


RANKS = (1, 5, 10)
"""The ranks of the CMC that papers report."""


@typed
def evaluate_reid(
    model: nn.Module,
    data: DataSplit,
    *,
    ranks: Sequence[int] = RANKS,
    batch_size: int = 32,
    progress: StageProgress | None = None,
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
    _check_people(data.queries, gallery, ranks, data.problems)
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
    progress: StageProgress | None = None,
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
    _check_people(queries.records, gallery.records, ranks)
    relevant, ignored = masks_of(queries.records, gallery.records)
    with preserve_state(base):
        ranking = rank(
            base.distance, queries.rows, gallery.rows, relevant, ignored, block=block,
            progress=None if progress is None else partial(progress, "Ranking"),
        )  # fmt: skip
        if not ranking.answerable.any():
            raise ComparisonError(
                "Expected a picture of some query's person before another camera in the gallery, "
                "but there is none; check the folders."
            )
        size = block or max(1, PAIRS // len(gallery.rows))
        failures = _failures(base, queries, gallery, ranking, (relevant, ignored), size)
    broken = _broken(queries, gallery)
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
            failure = Failure(
                queries.records[index], gallery.records[wrong], gallery.records[right],
                first=int(ranking.first[index]),
                average_precision=float(ranking.average_precision[index]),
                distances=(float(row[wrong]), float(row[right])),
            )  # fmt: skip
            failures.append(failure)
    return tuple(
        sorted(failures, key=lambda one: (one.average_precision, -one.first, str(one.query.path)))
    )


def _check_people(
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
