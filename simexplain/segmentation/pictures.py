"""From a segmentation to its figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from simexplain.printing import printable
from simexplain.rendering.mask_panel import Cell, mask_panel
from simexplain.rendering.masks import marked
from simexplain.rendering.overlay import overlay
from simexplain.segmentation.result import Segmentation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIDE = 560
_TITLES = {"support": "support", "other": "other class"}


def draw_segmentation(result: Segmentation) -> Figure:
    """Test picture, map, marks and result in a row; below it the supports with their maps."""
    picture = small(result.picture)
    size = picture.shape[1], picture.shape[0]
    heat = cv2.resize(result.heat, size, interpolation=cv2.INTER_LINEAR)
    cells = [
        Cell("test image", _name(result.name), picture),
        Cell("attention", _method(result), overlay(picture, heat)),
    ]
    if result.marks is not None:
        told = cv2.resize(result.marks, size, interpolation=cv2.INTER_NEAREST)
        cells.append(Cell("what the cut is told", _thresholds(result), marked(picture, told)))
    cells.append(Cell("result", f"{result.share:.1%} of the picture", small(result.overlay())))
    supports = [
        Cell(_TITLES[image.role], _name(image.name), overlay(image.picture, image.heat))
        for image in result.images
    ]
    shown = "supports show" if _shots(result) > 1 else "support shows"
    return mask_panel(
        cells,
        supports,
        title=f"Where is what the {shown}?",
        footer=footer(result),
        notes=result.warnings,
        marks=result.marks is not None,
    )


def small(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture no larger than a figure shows it."""
    share = _SIDE / max(picture.shape[:2])
    if share >= 1:
        return picture
    size = max(1, round(picture.shape[1] * share)), max(1, round(picture.shape[0] * share))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def footer(result: Segmentation) -> str:
    """What one must know to cite the figure."""
    count = _shots(result)
    ways = "two-way" if count < len(result.images) else "one-way"
    return "   ·   ".join(
        (result.model, f"layer {' x '.join(result.layers)}", f"{ways}, {count}-shot", result.refine)
    )


def _shots(result: Segmentation) -> int:
    return sum(image.role == "support" for image in result.images)


def _name(path: str) -> str:
    return printable(Path(path).name)


def _method(result: Segmentation) -> str:
    weights = result.options.get("weights")
    return f"{result.method}, weights {weights}" if weights else result.method


def _thresholds(result: Segmentation) -> str:
    cue = result.options["cue"]
    if result.refine == "grabcut":
        return " / ".join(f"{cue[name]:g}" for name in ("sure", "probable", "background"))
    return {"box": "the box of the map", "whole": "nearly the whole picture"}[result.refine]
