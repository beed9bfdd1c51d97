"""One- and few-shot segmentation over a data set, scored by the two protocols of the field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from operator import add
from typing import Any

import numpy as np
from torch import nn

from simexplain.arguments import typed
from simexplain.data.folders import StageProgress
from simexplain.errors import ComparisonError, ImageError
from simexplain.evaluation.results import ScoreResult, aligned, number
from simexplain.models.embedder import as_similarity_model
from simexplain.renaming import takes_old_names, with_old_names
from simexplain.results.result import Attachments, Row, Table
from simexplain.segmentation.cue import Heat, Mask
from simexplain.segmentation.dataset import Episode, SegmentationData, draw_episodes
from simexplain.segmentation.result import Segmentation
from simexplain.segmentation.segmenting import segment


@dataclass(frozen=True)
class Overlap:
    """Pixels counted over any number of pictures.

    Attributes:
        hits: In the mask and in the truth.
        extra: In the mask alone.
        missed: In the truth alone.
        outside: In neither.
    """

    hits: int = 0
    extra: int = 0
    missed: int = 0
    outside: int = 0

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(*map(add, astuple(self), astuple(other)))

    @property
    def iou(self) -> float:
        """Intersection over union; NaN where both are empty."""
        return _ratio(self.hits, self.hits + self.extra + self.missed)

    @property
    def binary_iou(self) -> float:
        """The mean of the IoU of the foreground and that of the background (FG-BG IoU)."""
        ground = _ratio(self.outside, self.outside + self.extra + self.missed)
        return (self.iou + ground) / 2


def overlap(mask: Mask, truth: Mask, valid: Mask | None = None) -> Overlap:
    """Counts the pixels of a picture, all arrays ``(H,W)``; only those that are ``valid``."""
    counted = np.ones_like(mask) if valid is None else valid
    pairs = ((mask & truth), (mask & ~truth), (~mask & truth), (~mask & ~truth))
    return Overlap(*(int((pair & counted).sum()) for pair in pairs))


@dataclass(frozen=True)
class EpisodeScore:
    """One test picture.

    Attributes:
        test: Its path.
        labels: The class of each way.
        supports: The paths of the supports of each way.
        classes: The counts of each way.
        foreground: The counts of all ways together against the rest.
    """

    test: str
    labels: tuple[str, ...]
    supports: tuple[tuple[str, ...], ...]
    classes: tuple[Overlap, ...]
    foreground: Overlap


@dataclass(frozen=True)
class FoldScore:
    """One fold, or a whole data set that has none.

    Attributes:
        name: What it is called.
        episodes: In the order in which they were measured.
    """

    name: str
    episodes: tuple[EpisodeScore, ...]

    @property
    def per_class(self) -> dict[str, float]:
        """IoU in [0, 1] of each class, from the pixels of all its episodes together."""
        overlaps: dict[str, Overlap] = {}
        for episode in self.episodes:
            for label, counts in zip(episode.labels, episode.classes, strict=True):
                overlaps[label] = overlaps.get(label, Overlap()) + counts
        return {label: overlaps[label].iou for label in sorted(overlaps)}

    @property
    def mean_iou(self) -> float:
        """The mean over the fold's classes (Shaban et al. 2017)."""
        return _mean(list(self.per_class.values()))

    @property
    def binary_iou(self) -> float:
        """Mean of foreground and background, whatever the class (Rakelly et al. 2018)."""
        return sum((one.foreground for one in self.episodes), Overlap()).binary_iou


@takes_old_names
@dataclass(frozen=True)
class SegmentationScores(ScoreResult):
    """How well one- or few-shot segmentation finds the classes of a data set.

    Attributes:
        folds: A data set has one, PASCAL-5i up to four.
        settings: How it was measured.
        errors: Episodes that could not be measured, with the reason.
    """

    folds: tuple[FoldScore, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)

    @property
    def binary_iou(self) -> float:
        """Mean over folds of FG-BG IoU, in [0, 1]."""
        return _mean([fold.binary_iou for fold in self.folds])

    @property
    def mean_iou(self) -> float:
        """Mean over folds of the mean over their classes, in [0, 1]."""
        return _mean([fold.mean_iou for fold in self.folds])

    @property
    def per_class(self) -> dict[str, float]:
        """IoU of every class; one that several folds have counts their episodes together."""
        episodes = tuple(episode for fold in self.folds for episode in fold.episodes)
        return FoldScore("", episodes).per_class

    def table(self) -> list[Row]:
        """One row for each way of each episode."""
        return [
            {
                "fold": fold.name,
                "test": episode.test,
                "class": label,
                "supports": ";".join(supports),
                "iou": counts.iou,
                "hits": counts.hits,
                "extra": counts.extra,
                "missed": counts.missed,
            }
            for fold in self.folds
            for episode in fold.episodes
            for label, supports, counts in zip(
                episode.labels, episode.supports, episode.classes, strict=True
            )
        ]

    def __str__(self) -> str:
        """The folds, then the classes, as plain text."""
        rows = [("", "episodes", "mean IoU", "binary IoU")]
        rows += [
            (one.name, str(len(one.episodes)), number(one.mean_iou), number(one.binary_iou))
            for one in self.folds
        ]
        if len(self.folds) > 1:
            rows.append(("mean over folds", "", number(self.mean_iou), number(self.binary_iou)))
        classes = [("class", "IoU"), *((k, number(v)) for k, v in self.per_class.items())]
        return f"{aligned(rows)}\n\n{aligned(classes)}"

    def attachments(self, **options: Any) -> Attachments:
        """A line for each way of each episode."""
        return {"episodes": ("episodes.csv", lambda: Table(self.table()))}

    def summary(self, **options: Any) -> dict[str, Any]:
        """The means, of each fold and class as well."""
        record = {
            "binary_iou": self.binary_iou,
            "mean_iou": self.mean_iou,
            "per_class": self.per_class,
            "folds": [
                {
                    "name": fold.name,
                    "episodes": len(fold.episodes),
                    "binary_iou": fold.binary_iou,
                    "mean_iou": fold.mean_iou,
                    "per_class": fold.per_class,
                }
                for fold in self.folds
            ],
            "errors": self.errors,
            "settings": self.settings,
        }
        return {"kind": "segmentation", **with_old_names(record, "broken")}


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _mean(values: Sequence[float]) -> float:
    """Over what is defined; NaN where nothing is."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


OVERLAPS: dict[str, str] = {
    "hotter": "a pixel that both classes claim goes to the one whose map is hotter there",
    "keep": "each class keeps its own mask",
}
"""What becomes of pixels that two ways claim."""


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
    progress: StageProgress | None = None,
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
        for index, episode in enumerate(own, start=1):
            try:
                score, last = _measured(base, episode, overlaps, given)
                scored.append(score)
            except ImageError as error:
                broken[f"{fold.name}, {episode.test}"] = str(error)
            if progress is not None:
                progress(fold.name, index, len(own))
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
    score = EpisodeScore(
        test=str(episode.test),
        labels=episode.labels,
        supports=tuple(tuple(str(path) for path in own) for own in episode.supports),
        classes=counts,
        foreground=together,
    )
    return score, results[-1]


def divided(masks: Sequence[Mask], heats: Sequence[Heat]) -> list[Mask]:
    """Masks ``(H,W)`` that share no pixel: what several claim goes to the hottest, the first."""
    claims = np.where(np.stack(masks), np.stack(heats).astype(np.float64), -1.0)
    winner = claims.argmax(axis=0)
    return [mask & (winner == index) for index, mask in enumerate(masks)]
