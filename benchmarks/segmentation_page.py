"""The page of segmentation results: tables of what was measured and what follows from them."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from simexplain.segmentation.cue import CUES, Cue
from simexplain.segmentation.evaluating import FoldScore

Key = tuple[str, str, str]
SETTINGS = ("siamese", "two-way", "five-shot")
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
