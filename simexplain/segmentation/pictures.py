"""From a segmentation to its figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from simexplain.data.preprocessing import shrunk
from simexplain.errors import printable
from simexplain.rendering.overlay import MARK_COLOURS, Pixels, marked, overlay
from simexplain.rendering.sheet import FAINT, PALE, Cell, Grid, Row, Words, page
from simexplain.segmentation.result import Segmentation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL, _SMALL, _TALLEST = 2.7, 1.65, 4.4
_TITLES = {"support": "support", "other": "other class"}


def draw_segmentation(result: Segmentation) -> Figure:
    """Test picture, map, marks and result in a row; below it the supports with their maps."""
    picture = shrunk(result.picture)
    size = picture.shape[1], picture.shape[0]
    heat = cv2.resize(result.heat, size, interpolation=cv2.INTER_LINEAR)
    cells = [
        _cell("test image", _name(result.name), picture),
        _cell("attention", _method(result), overlay(picture, heat)),
    ]
    if result.marks is not None:
        marks = cv2.resize(result.marks, size, interpolation=cv2.INTER_NEAREST)
        cells.append(_cell("marks for the cut", _thresholds(result), marked(picture, marks)))
    share = f"{result.share:.1%} of the picture"
    cells.append(_cell("result", share, shrunk(result.overlay())))
    grids = [Grid([Row(cells, tallest=_TALLEST)], [_CELL] * len(cells))]
    across = max(1, int(len(cells) * _CELL / _SMALL))
    supports: list[Cell | None] = [
        _cell(_TITLES[image.role], _name(image.name), overlay(image.picture, image.heat), 8.5)
        for image in result.images
    ]
    supports += [None] * (-len(supports) % across)
    lines = [supports[at : at + across] for at in range(0, len(supports), across)]
    grids.append(Grid([Row(line, tallest=_TALLEST) for line in lines], [_SMALL] * across))
    if result.marks is not None:
        grids.append(_MARKS)
    shown = "supports show" if _shots(result) > 1 else "support shows"
    return page(
        grids, title=f"Where is what the {shown}?", footer=footer(result), notes=result.warnings
    ).figure


def _cell(title: str, caption: str, picture: Pixels, size: float = 11) -> Cell:
    above = (Words(title, size=size), Words(caption, FAINT, size - 2.5))
    return Cell(picture, above, frame=PALE)


def _key(colour: tuple[int, int, int], text: str) -> Cell:
    """A patch of a colour as it looks on grey, and what it stands for."""
    mixed = [round(0.4 * 127 + 0.6 * part) for part in colour]
    patch = np.full((8, 8, 3), mixed, np.uint8)
    return Cell(patch, beside=(Words(text, FAINT, align="left"),))


_ORDER = ("background", "object", "probably background", "probably object")
_KEYS = [_key(colour, text) for colour, text in zip(MARK_COLOURS, _ORDER, strict=True)]
_MARKS = Grid([Row([_KEYS[1], _KEYS[3], _KEYS[2], _KEYS[0]], tallest=0.16)], [1.55] * 4)
"""What the colours of a cut's marks mean."""


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
