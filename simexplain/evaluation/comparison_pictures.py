"""Methods side by side as one figure: a row each, its overlays below the pictures, its scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from simexplain.data.preprocessing import Thumbnail, shrunk
from simexplain.errors import ComparisonError
from simexplain.evaluation.tables import cost, number
from simexplain.explanation import heat_of
from simexplain.picturing import full_heat, verdict
from simexplain.printing import printable
from simexplain.rendering.lettering import DOTS
from simexplain.rendering.overlay import RENDERERS
from simexplain.rendering.sheet import (
    FAINT,
    INK,
    ROLE_COLOURS,
    VERDICTS,
    Bar,
    Cell,
    Grid,
    Row,
    Sheet,
    Words,
    page,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from simexplain.evaluation.comparison_result import ComparedMethod, MethodComparison
    from simexplain.explanation import Explanation

_NAMES, _SCORE, _GAP = 1.9, 0.88, 0.06
_TALLEST, _WIDEST, _MOST_NOTES = 10.5, 9.0, 12
_HEADINGS = {
    "deletion": "lower is better",
    "insertion": "higher is better",
    "gain": "higher is better",
    "pointing": "higher is better",
    "energy": "higher is better",
}


def draw_methods(result: MethodComparison, style: str) -> Figure:
    """The figure of a comparison; see ``MethodComparison.figure``.

    Raises:
        ComparisonError: If the style does not exist.
    """
    if style not in RENDERERS:
        raise ComparisonError(f"Expected style to be one of {', '.join(RENDERERS)}, got '{style}'.")
    first = result.first
    height, widths = _sizes(first, len(result.methods))
    pictures = [_picture(first, index, height) for index in range(len(widths))]
    tops = [_top(result, index, picture) for index, picture in enumerate(pictures)]
    columns = [_NAMES, *widths, *[_SCORE] * (len(result.metrics) + 2)]
    empty: list[Cell | None] = [None] * (len(columns) - len(tops) - 1)
    rows = [Row([_scale(result), *tops, *empty], tallest=height)]
    for method in result.methods:
        drawn = [
            _overlay(method.explanation, index, picture, style)
            for index, picture in enumerate(pictures)
        ]
        cells = [_label(method), *drawn, *_scores(method, result)]
        rows.append(Row(cells, tallest=height, rule=True))
    rows.append(Row(_random(result, len(widths)), rule=True))
    return page(
        [Grid(rows, columns, gap=_GAP, between=_GAP)],
        title="Why these images are alike or different, by method",
        verdict=verdict(first),
        ink=VERDICTS[first.condition().holds],
        legend="\n".join(_plain(result, len(widths))),
        footer=first.model,
        notes=_notes(result),
    ).figure


def _sizes(first: Explanation, methods: int) -> tuple[float, list[float]]:
    """Rows as high as the page allows, columns as wide as each picture is in such a row."""
    sizes = [first.on_picture(index)[0].shape[:2] for index in range(len(first.roles))]
    aspects = [min(max(width / height, 0.4), 2.5) for height, width in sizes]
    height = min(1.9, max(0.95, _TALLEST / (methods + 1) - _GAP))
    height = max(0.95, min(height, _WIDEST / sum(aspects)))
    widths: list[float] = []
    for aspect in aspects:
        if widths and sum(widths) + aspect * height > 1.2 * _WIDEST:
            break
        widths.append(aspect * height)
    return height, widths


def _picture(explanation: Explanation, index: int, height: float) -> Thumbnail:
    """A picture at twice the size on the page."""
    if not explanation.pictures:
        return Thumbnail(explanation.preprocess.undo(explanation.images[0, index]))
    image = explanation.pictures[index].image
    longest = max(1, round(2 * DOTS * height * max(image.size) / image.height))
    return Thumbnail(shrunk(image, longest), explanation.geometries[index])


def _top(result: MethodComparison, index: int, picture: Thumbnail) -> Cell:
    """An image as it is, framed in the colour of its role, its mask outlined."""
    first, mask = result.first, None
    ink = ROLE_COLOURS[first.roles[index]]
    above = [Words(first.roles[index], ink, 9, "bold")]
    if index:
        above.append(Words(f"d = {float(first.distances[0, index - 1]):.3f}", ink))
    if first.pictures:
        name = printable(Path(first.pictures[index].path).name)
        above.append(Words(name, FAINT, 7.5))
    if index in result.masks:
        size = picture.pixels.shape[1::-1]
        whole = result.masks[index].numpy().astype(np.float32)
        mask = cv2.resize(whole, size, interpolation=cv2.INTER_AREA)
    return Cell(picture.pixels, tuple(above), frame=ink, seen=picture.seen, mask=mask)


def _overlay(explanation: Explanation, index: int, picture: Thumbnail, style: str) -> Cell:
    """A method's heat on a picture, with a cross at its maximum; views may differ in size."""
    if explanation.pictures:
        picture = Thumbnail(picture.pixels, explanation.geometries[index])
    else:
        picture = Thumbnail(explanation.preprocess.undo(explanation.images[0, index]))
    heat: NDArray[np.float32] = picture.heat(heat_of(explanation, 0)[index])
    peak = explanation.view_peaks()[index]
    return Cell(
        RENDERERS[style](picture.pixels, heat), peak=peak and picture.view_spot(*peak),
        seen=picture.seen,
    )  # fmt: skip


def _scale(result: MethodComparison) -> Cell:
    """What the colours mean, in the corner beside the pictures."""
    bar = Bar(f"evidence, share of {full_heat([m.explanation for m in result.methods])}")

    def draw(sheet: Sheet, x: float, y: float, width: float, height: float) -> None:
        sheet.bar(bar, x + 0.05, y + 0.1, width - 0.35, 0.1)

    return Cell(draw=draw, height=0.9)


def _label(method: ComparedMethod) -> Cell:
    """The method's name, its given options, and its layers."""
    explanation = method.explanation
    name, _, _ = method.name.partition(":")
    name = name.partition("@")[0] if explanation.method in method.name else method.name
    lines = [f"{option}={value}" for option, value in method.asked.items()]
    if explanation.method not in method.name:
        lines.insert(0, explanation.method)
    words = [Words(printable(name), size=10, weight="bold", align="left")]
    about = ", ".join(lines), explanation.layer
    words += [Words(text, FAINT, 7.5, align="left", lines=2) for text in about]
    return Cell(inside=tuple(words))


def _scores(method: ComparedMethod, result: MethodComparison) -> list[Cell]:
    """The numbers of a method; above those of the first, what they are."""
    cells: list[tuple[str, str, tuple[Words, ...]]] = []
    for metric in result.metrics:
        best = result.best(metric) == method.name and len(result.methods) > 1
        style = (ROLE_COLOURS["positive"], 10.0, "bold") if best else (INK, 10.0, "normal")
        text = number(method.means[metric], metric)
        cells.append((metric, _HEADINGS[metric], (Words(text, *style),)))
    reference = method is result.methods[0]
    agreement = Words(number(method.agreement["spearman"], "agreement"), size=10)
    agreement = Words("reference", FAINT) if reference else agreement
    cells.append(("agreement", f"with {result.methods[0].name}", (agreement,)))
    spent = Words(str(method.forwards), size=10), Words(f"{cost(method.seconds)} s", size=8.5)
    cells.append(("cost", "images, seconds", spent))
    return [
        Cell(
            inside=words,
            above=(Words(heading, size=9, weight="bold"), Words(about, FAINT, 6.5))
            if reference
            else (),
        )
        for heading, about, words in cells
    ]


def _random(result: MethodComparison, images: int) -> list[Cell | None]:
    """The row of the random map."""
    chance = f"by chance pointing {result.chance['pointing']:.3f}" if result.chance else ""
    words = (
        Words("a random map reaches", FAINT, 8.5, align="left"),
        Words(chance, FAINT, align="left"),
    )
    scores = [
        Cell(inside=(Words(number(result.random[metric], metric), FAINT, 9),))
        for metric in result.metrics
    ]
    return [Cell(inside=words), *[None] * images, *scores, None, None]


def _plain(result: MethodComparison, shown: int) -> list[str]:
    """What was left out."""
    lines = [result.left_out()] if result.undefined() else []
    if len(result.first.roles) > shown:
        lines.append(f"The first {shown} of {len(result.first.roles)} images are shown.")
    if result.skipped:
        lines.append(f"Not applicable here: {', '.join(result.skipped)}.")
    return lines


def _notes(result: MethodComparison) -> Sequence[str]:
    """What rows to distrust."""
    notes = list(result.notes)
    notes += [f"{m.name}: {note}" for m in result.methods for note in m.explanation.warnings]
    if len(notes) > _MOST_NOTES:
        notes[_MOST_NOTES - 1 :] = ["... all of them are in the manifest and on the terminal"]
    return notes
