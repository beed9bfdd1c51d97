r"""One- and few-shot segmentation of composed scenes: the paper's protocol, with exact masks.

A scene has two cut-outs of different categories on a photographic ground; other pictures of these
categories, alone on white, are the supports.

    python benchmarks/segmentation.py --stamps FOLDER --scenes 16 --seeds 0 1 2 \
      --out docs/segmentation-results.md

Thresholds are ranked, best on other categories than those of the table:

    python benchmarks/segmentation.py --stamps OTHER_FOLDER --scenes 14 --seeds 100 --tune
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scenes import Stamps, read_stamps
from segmentation_page import page, tuned
from segmentation_scenes import SegmentationScene, segmentation_scenes
from store import publish

from simexplain import SimilarityModel, load_model
from simexplain.metrics.maps import grown
from simexplain.models.accelerating import accelerated
from simexplain.segmentation.cue import Cue, GrabCut, default_cue, refine
from simexplain.segmentation.evaluating import EpisodeScore, FoldScore, Overlap, divided, overlap
from simexplain.segmentation.segmenting import attend, whole_view

SETTINGS = ("siamese", "two-way", "five-shot")
"""1-way 1-shot by pairs; 2-way 1-shot by triplets; 2-way 5-shot by five triplets averaged."""

REFINEMENTS = ("grabcut", "box", "otsu", "whole")
SURE = (0.45, 0.6, 0.95)
PROBABLE = (0.05, 0.1, 0.2, 0.3)
BACKGROUND = (0.003, 0.01, 0.05, 0.1)
COARSE = GrabCut(iterations=3, longest=112)
"""The cut while thresholds are chosen: many are tried."""

Heat = np.ndarray
Key = tuple[str, str, str]
"""Map, refinement (or thresholds), setting."""


@dataclass(frozen=True)
class Map:
    """One way to make the map.

    Attributes:
        method: A name in ``METHODS``.
        pair: Options without a negative.
        triplet: Options with one.
        anchor: Which image of a triplet is the anchor.
    """

    method: str
    pair: dict[str, Any] = field(default_factory=dict)
    triplet: dict[str, Any] = field(default_factory=dict)
    anchor: str = "test"


MAPS = {
    "sam as published": Map("sam"),
    "sam, relative / signed": Map(
        "sam", {"weights": "relative"}, {"weights": "signed"}, anchor="support"
    ),
    "focus": Map("focus"),
}
"""Signed weights need negatives; pairs have relative ones."""


def heats(
    model: SimilarityModel, scene: SegmentationScene, maps: dict[str, Map]
) -> Iterator[tuple[str, str, list[Heat]]]:
    """For every map and setting the heat ``(SIDE,SIDE)`` of both objects."""
    prepare = whole_view(model.preprocess)
    test = prepare(scene.picture)[0]
    supports = [torch.stack([prepare(one)[0] for one in own]) for own in scene.supports]
    size = scene.picture.height, scene.picture.width
    for name, made in maps.items():
        for setting in SETTINGS:
            shots = 5 if setting == "five-shot" else 1
            result = []
            for own, other in ((0, 1), (1, 0)):
                far = None if setting == "siamese" else supports[other][:shots]
                attention = attend(
                    model, test, supports[own][:shots], far, method=made.method,
                    anchor=made.anchor,
                    **(made.pair if far is None else made.triplet),
                )  # fmt: skip
                result.append(grown(attention.heat, size).numpy().astype(np.float32))
            yield name, setting, result


def scored(
    scene: SegmentationScene,
    result: Sequence[Heat],
    by: str,
    cue: Cue,
    *,
    ways: int,
    cut: GrabCut | None = None,
) -> list[EpisodeScore]:
    """One episode for each object, or with two ways one for both."""
    picture = np.asarray(scene.picture)
    masks = [refine(picture, heat, cue, by=by, cut=cut).mask for heat in result]
    if ways == 1:
        pairs = list(zip(scene.labels, masks, scene.masks, strict=True))
        counts = [(label, overlap(mask, truth)) for label, mask, truth in pairs]
        return [EpisodeScore("", (label,), ((),), (own,), own) for label, own in counts]
    if by != "whole":  # the map plays no part there
        masks = divided(masks, result)
    own = tuple(overlap(mask, truth) for mask, truth in zip(masks, scene.masks, strict=True))
    union = overlap(np.logical_or(*masks), np.logical_or(*scene.masks))
    return [EpisodeScore("", scene.labels, ((), ()), own, union)]


def measure(model: SimilarityModel, scenes: Sequence[SegmentationScene]) -> dict[Key, FoldScore]:
    """What every map and refinement reaches in every setting."""
    result: dict[Key, list[EpisodeScore]] = defaultdict(list)
    for scene in scenes:
        for name, setting, own in heats(model, scene, MAPS):
            cue = default_cue(MAPS[name].method)
            for by in REFINEMENTS:
                if by != "whole" or name == next(iter(MAPS)):
                    result[name, by, setting] += scored(
                        scene, own, by, cue, ways=1 if setting == "siamese" else 2
                    )
    return {key: FoldScore("", tuple(own)) for key, own in result.items()}


def remembered(
    model: SimilarityModel, stamps: Stamps, seed: int, options: argparse.Namespace
) -> dict[Key, FoldScore]:
    """What was measured for a seed, from the cache where it is there."""
    kept = options.cache and options.cache / f"{seed}-{options.scenes}.json"
    if not kept:
        return measure(model, segmentation_scenes(stamps, options.scenes, seed))
    if not kept.is_file():
        result = measure(model, segmentation_scenes(stamps, options.scenes, seed))
        rows = [
            [*key, [[one.labels, [*map(astuple, one.classes)], astuple(one.foreground)]
                    for one in fold.episodes]]
            for key, fold in result.items()
        ]  # fmt: skip
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(rows), encoding="utf-8")
    return {
        (name, by, setting): FoldScore("", tuple(
            EpisodeScore("", tuple(labels), (), tuple(Overlap(*o) for o in own), Overlap(*union))
            for labels, own, union in episodes
        ))
        for name, by, setting, episodes in json.loads(kept.read_text(encoding="utf-8"))
    }  # fmt: skip


def tune(
    model: SimilarityModel, scenes: Sequence[SegmentationScene]
) -> dict[str, list[tuple[Cue, dict[str, float]]]]:
    """For every map all thresholds with their mean IoU by setting, the best on average first."""
    cues = [Cue(s, p, b) for s in SURE for p in PROBABLE for b in BACKGROUND if b <= p <= s]
    result: dict[tuple[str, int, str], list[EpisodeScore]] = defaultdict(list)
    for scene in scenes:
        for name, setting, own in heats(model, scene, MAPS):
            for number, cue in enumerate(cues):
                result[name, number, setting] += scored(
                    scene, own, "grabcut", cue, ways=1, cut=COARSE
                )
    ranked = {}
    for name in MAPS:
        values = []
        for number, cue in enumerate(cues):
            by = {s: FoldScore("", tuple(result[name, number, s])).mean_iou for s in SETTINGS}
            values.append((cue, by))
        ranked[name] = sorted(values, key=lambda one: -sum(one[1].values()))
    return ranked


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--stamps", type=Path, required=True, metavar="FOLDER",
                        help="category folders with RGBA pictures")  # fmt: skip
    parser.add_argument("--scenes", type=int, default=16, help="for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="timm:tf_efficientnet_lite0")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cache", type=Path, metavar="FOLDER",
                        help="keep what is measured for each seed, and take it from there",
    )  # fmt: skip
    parser.add_argument("--tune", action="store_true", help="rank thresholds instead")
    parser.add_argument("--out", type=Path, metavar="FILE", help="Markdown file to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes the page; prints it where no file is named."""
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    model = accelerated(load_model(options.model))
    stamps: Stamps = read_stamps(options.stamps)
    if options.tune:
        scenes = [s for n in options.seeds for s in segmentation_scenes(stamps, options.scenes, n)]
        publish(tuned(tune(model, scenes)), options.out)
        return
    results = []
    for seed in options.seeds:
        results.append(remembered(model, stamps, seed, options))
        print(f"seed {seed}: {options.scenes} scenes measured", flush=True)
    publish(page(results, tuple(MAPS), options), options.out)


if __name__ == "__main__":
    main()
