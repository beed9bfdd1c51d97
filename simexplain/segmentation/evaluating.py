"""One- and few-shot segmentation over a data set, scored by the two protocols of the field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from simexplain.arguments import typed
from simexplain.errors import ComparisonError, ImageError
from simexplain.models.embedder import as_similarity_model
from simexplain.segmentation.cue import Heat
from simexplain.segmentation.dataset import Episode, SegmentationData, draw_episodes
from simexplain.segmentation.grabcut import Mask
from simexplain.segmentation.result import Segmentation
from simexplain.segmentation.scores import (
    EpisodeScore,
    FoldScore,
    Overlap,
    SegmentationScores,
    overlap,
)
from simexplain.segmentation.segmenting import segment

OVERLAPS: dict[str, str] = {
    "hotter": "a pixel that both classes claim goes to the one whose map is hotter there",
    "keep": "each class keeps its own mask",
}
"""What becomes of pixels that two ways claim."""

Progress = Callable[[str, int, int], None]


@typed
def evaluate_segmentation(
    model: nn.Module,
    data: SegmentationData | Sequence[SegmentationData],
    *,
    ways: int = 1,
    shots: int = 1,
    episodes: int = 1000,
    seed: int = 0,
    overlaps: str = "hotter",
    progress: Progress | None = None,
    **given: Any,
) -> SegmentationScores:
    """Draws episodes from each fold, segments their test pictures and counts pixels.

    One way: a test picture and supports of one class; a pair for each shot. Two ways: the test
    picture has two classes, each with its supports, and the other's are its negatives; a triplet
    for each shot. ``mean_iou`` and ``binary_iou`` are defined in :class:`SegmentationScores`.
    Pixels that the data set leaves out (VOC's 255) are not counted. Episodes whose files cannot be
    read are listed and left out.

    Args:
        model: A similarity model, or any ``nn.Module`` that returns an embedding.
        data: A data set, or the folds of one.
        ways: 1 or 2.
        shots: Supports for each way.
        episodes: How many to draw from each fold.
        seed: Of the drawing.
        overlaps: A name in :data:`OVERLAPS`, for two ways.
        progress: Called with the fold, the episodes done and all of them.
        **given: For ``segment``: method, layer, refine, cue, cut, aggregate, view, options.

    Raises:
        ComparisonError: If options do not fit, or no episodes can be drawn.
        ImageError: If no episode can be read.
        ModelError: If the model or a layer cannot be used.
    """
    if overlaps not in OVERLAPS:
        raise ComparisonError(
            f"Expected overlaps to be one of {', '.join(OVERLAPS)}, got '{overlaps}'."
        )
    base = as_similarity_model(model)
    folds = (data,) if isinstance(data, SegmentationData) else tuple(data)
    drawn = [draw_episodes(fold, episodes, ways=ways, shots=shots, seed=seed) for fold in folds]
    broken: dict[str, str] = {}
    scores, last = [], None
    for fold, own in zip(folds, drawn, strict=True):
        scored = []
        for number, episode in enumerate(own, start=1):
            try:
                score, last = _measured(base, episode, overlaps, given)
                scored.append(score)
            except ImageError as error:
                broken[f"{fold.name}, {episode.test}"] = str(error)
            if progress is not None:
                progress(fold.name, number, len(own))
        scores.append(FoldScore(fold.name, tuple(scored)))
    if last is None:
        raise ImageError(
            f"None of {sum(map(len, drawn))} episodes can be read, the first because: "
            f"{next(iter(broken.values()), 'there is none')}"
        )
    settings = {
        "model": base.name, "ways": ways, "shots": shots, "episodes": episodes, "seed": seed,
        "overlaps": overlaps, "refine": last.refine, "method": last.method,
        "layers": list(last.layers), "options": dict(last.options), "versions": dict(last.versions),
    }  # fmt: skip
    return SegmentationScores(tuple(scores), settings, broken)


def _measured(
    model: nn.Module, episode: Episode, overlaps: str, given: dict[str, Any]
) -> tuple[EpisodeScore, Segmentation]:
    results = []
    for way, supports in enumerate(episode.supports):
        others = [path for n, own in enumerate(episode.supports) if n != way for path in own]
        results.append(segment(model, episode.test, supports, others, **given))
    masks = [one.mask for one in results]
    if overlaps == "hotter":
        masks = divided(masks, [one.heat for one in results])
    size = masks[0].shape[0], masks[0].shape[1]
    truths = [truth.truth(size) for truth in episode.truths]
    counts = tuple(
        overlap(mask, truth, valid) for mask, (truth, valid) in zip(masks, truths, strict=True)
    )
    valid = np.logical_and.reduce([valid for _, valid in truths])
    wanted = np.logical_or.reduce([truth for truth, _ in truths])
    together = overlap(np.logical_or.reduce(masks), wanted, valid)
    return _score(episode, counts, together), results[-1]


def _score(episode: Episode, counts: tuple[Overlap, ...], together: Overlap) -> EpisodeScore:
    return EpisodeScore(
        test=str(episode.test),
        labels=episode.labels,
        supports=tuple(tuple(str(path) for path in own) for own in episode.supports),
        classes=counts,
        foreground=together,
    )


def divided(masks: Sequence[Mask], heats: Sequence[Heat]) -> list[Mask]:
    """Masks ``(H,W)`` that share no pixel: what several claim goes to the hottest, first of equals.

    Args:
        masks: One for each way.
        heats: Their maps ``(H,W)``.
    """
    claims = np.where(np.stack(masks), np.stack(heats).astype(np.float64), -1.0)
    winner = claims.argmax(axis=0)
    return [mask & (winner == index) for index, mask in enumerate(masks)]
