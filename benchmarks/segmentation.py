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
import platform
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scenes import Stamps, read_stamps
from segmentation_scenes import SegmentationScene, segmentation_scenes
from store import publish

from simexplain import SimilarityModel, load_model
from simexplain.metrics.maps import grown
from simexplain.models.accelerating import accelerated
from simexplain.segmentation.cue import CUES, Cue, GrabCut, default_cue, refine
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


_TOLD = {
    "grabcut": "GrabCut from the map",
    "box": "GrabCut from the map's box",
    "otsu": "Otsu's threshold",
    "whole": "GrabCut, no map",
}
_BEST = 5


def page(
    results: Sequence[Mapping[Key, FoldScore]], maps: Sequence[str], options: argparse.Namespace
) -> str:
    """The whole Markdown page.

    Args:
        results: For every seed the scores by map, refinement and setting.
        maps: The maps in their order.
        options: The command line.
    """
    seeds = " ".join(map(str, options.seeds))
    packages = ("torch", "timm", "opencv-python", "scikit-image", "simexplain")
    software = ", ".join(f"{name} {_version(name)}" for name in packages)
    cues = ", ".join(f"`{n}` {c.sure:g} / {c.probable:g} / {c.background:g}"
                     for n, c in CUES.items())  # fmt: skip
    lines = [
        "# Segmentation, measured",
        "",
        "PASCAL VOC was not at hand, so this is the protocol of section 4.3 of the paper on scenes "
        "with exact masks. Each scene of 224 x 224 pixels shows two cut-out photographs of 106 "
        "pixels, of different categories, on grass, gravel or brick. The supports are other "
        "pictures of the same categories, alone on white. *siamese* asks for each object by one "
        "support (1-way 1-shot); *two-way* asks for both, each with the other's support as its "
        "negative (2-way 1-shot); *five-shot* has five supports for each, and the mean of five "
        "maps. No mask of a support is used.",
        "",
        "*mean* is the mean over categories of the intersection over union of all their pixels, "
        "*binary* the mean of foreground and background, as in "
        "[the protocols](segmentation.md#the-numbers). In the last two settings both objects are "
        "foreground, and a pixel that both claim goes to the hotter map. Each cell is mean ± "
        f"standard deviation over {len(options.seeds)} seeds of {options.scenes} scenes.",
        "",
        f"Network: `{options.model}` as it comes from ImageNet, never trained on these pictures. "
        f"The thresholds (sure / probable / background) are the defaults: {cues}. They were "
        "settled by hand after trials with several small grids on other categories of pictures, "
        "which are not in this table; these trials were not kept. `--tune` ranks a grid that holds "
        "them by mean IoU over the three settings, with a quick cut; on other pictures it may put "
        "other thresholds first. *sam, relative / signed* has relative weights for pairs, and "
        "signed weights with the support as anchor for triplets. Written by",
        "",
        f"    python benchmarks/segmentation.py --stamps FOLDER --scenes {options.scenes} "
        f"--seeds {seeds} --model {options.model} --out docs/segmentation-results.md",
        "",
        f"Python {platform.python_version()}, {software}. FOLDER comes from "
        "`benchmarks/stamps.py`; of its categories those with six or more pictures take part. The "
        "pictures are not part of the project. The scenes are easier than photographs in some ways "
        "(sharp borders, no other objects) and harder in others (a ground of strong texture, small "
        "objects). The numbers say nothing about the published ones on PASCAL-5i. "
        "*GrabCut, no map* finds both objects at once: that is why its binary score is high where "
        "both are foreground, and its mean is not.",
        "",
        *_conclusion(results, maps),
        "",
        *_table(results, maps),
        "",
    ]
    return "\n".join(lines)


def _table(results: Sequence[Mapping[Key, FoldScore]], maps: Sequence[str]) -> list[str]:
    head = ["map", "mask"]
    for setting in SETTINGS:
        head += [f"{setting}: mean", "binary"]
    lines = [f"| {' | '.join(head)} |", "| " + " | ".join("---" for _ in head) + " |"]
    for name in maps:
        lines += [_row(results, name, by, [name, _TOLD[by]]) for by in ("grabcut", "box", "otsu")]
    lines.append(_row(results, maps[0], "whole", ["none", _TOLD["whole"]]))
    return lines


def _row(results: Sequence[Mapping[Key, FoldScore]], name: str, by: str, cells: list[str]) -> str:
    for setting in SETTINGS:
        for measure in ("mean_iou", "binary_iou"):
            values = [getattr(seed[name, by, setting], measure) for seed in results]
            cells.append(_spread(values))
    return f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float]) -> str:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return f"{np.mean(values):.3f} ± {spread:.3f}"


def _conclusion(results: Sequence[Mapping[Key, FoldScore]], maps: Sequence[str]) -> list[str]:
    """Sentences that change with the measurement."""

    def mean(name: str, by: str, setting: str) -> float:
        return float(np.mean([seed[name, by, setting].mean_iou for seed in results]))

    record = []
    for setting in SETTINGS:
        ranked = sorted(
            ((mean(name, by, setting), name, by) for name in maps for by in _TOLD if by != "whole"),
            reverse=True,
        )
        value, name, by = ranked[0]
        record.append(
            f"- **{setting}**: best is {_TOLD[by]} with {name}, mean IoU {value:.3f}. "
            + "; ".join(f"{other} with GrabCut {mean(other, 'grabcut', setting):.3f}"
                        for other in maps)
            + f". GrabCut without a map: {mean(maps[0], 'whole', setting):.3f}."
        )  # fmt: skip
    return record


def tuned(ranked: Mapping[str, Sequence[tuple[Cue, Mapping[str, float]]]]) -> str:
    """The best thresholds of every map as a table, with mean IoU by setting."""
    lines = [
        f"| map | sure | probable | background | {' | '.join(SETTINGS)} |",
        "| " + " | ".join("---" for _ in range(4 + len(SETTINGS))) + " |",
    ]
    for name, values in ranked.items():
        for cue, by in values[:_BEST]:
            cells: list[Any] = [name, f"{cue.sure:g}", f"{cue.probable:g}", f"{cue.background:g}"]
            cells += [f"{by[setting]:.3f}" for setting in SETTINGS]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _version(name: str) -> str:
    try:
        return version(name)
    except Exception:  # another build of OpenCV
        return version("opencv-python-headless")


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
