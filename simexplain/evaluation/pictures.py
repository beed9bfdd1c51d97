"""Figures of evaluations: methods side by side, scores with their intervals, failures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from simexplain.data.images import read_picture
from simexplain.data.preprocessing import Thumbnail, shrunk
from simexplain.errors import ComparisonError, printable
from simexplain.evaluation.results import cost, number
from simexplain.explanation import heat_of
from simexplain.metrics.intervals import FEW
from simexplain.picturing import full_heat, verdict
from simexplain.rendering.lettering import DOTS, FONT, breadth
from simexplain.rendering.overlay import RENDERERS
from simexplain.rendering.sheet import (
    COLOURS,
    FAINT,
    INK,
    PALE,
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

    from simexplain.evaluation.results import ComparedMethod, Evaluation, MethodComparison
    from simexplain.evaluation.retrieval_result import Failure, Reidentification
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
    """The figure of a comparison; see ``MethodComparison.figure``."""
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
    sizes: list[Sequence[int]] = [place.original for place in first.geometries if first.pictures]
    sizes = sizes or [first.images.shape[-2:]] * len(first.roles)
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


_PANEL, _ROW, _TITLE, _TICKS, _NAME = 2.1, 0.34, 0.25, 0.3, 9.5
"""Inches: a panel's width, a method's height, above and below all; points of a method's name."""
_LOWER = ("deletion",)


def draw_evaluation(result: Evaluation) -> Figure:
    """The figure of an evaluation; see ``Evaluation.figure``."""
    skipped = result.skipped
    names = [name for name in result.methods if name not in skipped]
    metrics = result.metrics
    label = max(breadth(printable(name), _NAME) for name in names) + 0.15
    height = _TITLE + _ROW * len(names) + _TICKS
    count = len(result.items)
    about = f"mean over {count} comparison{'s' * (count > 1)} with its "
    about += f"{100 * result.settings['level']:g} % interval"
    charts = [
        Cell(draw=partial(_panel, result=result, metric=metric, names=names), height=height)
        for metric in metrics
    ]
    chosen = "   ·   ".join(f"{key} {value}" for key, value in result.settings.items())
    notes = [f"Dotted: of fewer than {FEW} comparisons, too few to mean much."]
    return page(
        [Grid([Row([None, *charts])], [label, *[_PANEL] * len(metrics)], gap=0.2)],
        title="Faithfulness of methods",
        verdict=about,
        legend=f"Not applicable: {', '.join(skipped)}." if skipped else "",
        footer=chosen,
        notes=notes if result.few else [],
    ).figure


def _panel(
    sheet: Sheet, x: float, y: float, width: float, height: float, *,
    result: Evaluation, metric: str, names: list[str],
) -> None:  # fmt: skip
    axes = sheet.axes(x, y + _TITLE, width, height - _TITLE - _TICKS)
    first = metric == result.metrics[0]
    for row, name in enumerate(names):
        interval = result.methods[name].intervals[metric]
        colour = COLOURS[-1] if name.startswith("(") else ROLE_COLOURS["anchor"]
        if interval.low == interval.low:
            axes.plot([interval.low, interval.high], [row, row], color=colour, linewidth=2.2,
                      linestyle=(0, (0.1, 1.5)) if interval.few else "solid", alpha=0.55,
                      solid_capstyle="round", dash_capstyle="round")  # fmt: skip
        if interval.count:
            axes.plot(interval.mean, row, marker="o", color=colour, markersize=6,
                      markerfacecolor="white" if interval.few else colour)  # fmt: skip
    level = result.chance.get(metric, float("nan"))
    if level == level:
        axes.axvline(level, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate("chance", (level, 0), xycoords=("data", "axes fraction"), xytext=(2, 2),
                      textcoords="offset points", size=6.5, color=FAINT)  # fmt: skip
    elif metric == "gain":
        axes.axvline(0, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_yticks(range(len(names)))
    for label in axes.set_yticklabels(names if first else [], size=_NAME, color=INK):
        label.set(parse_math=False, family=FONT, usetex=False)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7.5, colors=FAINT, length=3)
    axes.margins(x=0.12)
    axes.grid(axis="y", color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(PALE)
    better = "lower" if metric in _LOWER else "higher"
    axes.set_title(metric, size=10, color=INK, weight="bold", loc="left", pad=5)
    axes.set_title(f"{better} is better", size=7, color=FAINT, loc="right", pad=5)


_ACROSS, _SIDE, _TALL, _BETWEEN, _LONGEST = 4, 0.72, 1.44, 0.3, 360
_PARTS = (("query", "anchor"), ("came first", "negative"), ("was meant", "positive"))


def draw_failures(result: Reidentification, most: int) -> Figure:
    """A block of three pictures for each failure, the worst first."""
    failures, count = result.failures[:most], len(result.failures)
    model = str(result.settings["model"])
    across = min(_ACROSS, max(1, len(failures)))
    blocks = [_block(failure) for failure in failures]
    blocks += [[None] * 4] * (-len(blocks) % across)
    rows = [
        Row([cell for block in blocks[at : at + across] for cell in block][:-1], tallest=_TALL)
        for at in range(0, len(blocks), across)
    ]
    shown = f"{len(failures)} of {count} queries" if count > len(failures) else f"{count} queries"
    title = f"Another person ranked first: {shown}, worst first"
    if not failures:
        title = "Every query found its person first"
    widths = ([_SIDE] * 3 + [_BETWEEN]) * across
    return page([Grid(rows, widths[:-1], gap=0.06)], title=title, footer=model).figure


def _block(failure: Failure) -> list[Cell | None]:
    """The three pictures of a failure and a gap."""
    shown = (
        (failure.query, ""),
        (failure.wrong, f"{failure.distances[0]:.3f}"),
        (failure.right, f"{failure.distances[1]:.3f}, place {failure.first}"),
    )
    return [
        *(
            Cell(
                shrunk(read_picture(record.path).image, _LONGEST),
                above=(Words(title, ROLE_COLOURS[role], 7),),
                below=(
                    Words(printable(f"{record.label} c{record.camera}"), size=6.5),
                    Words(below, FAINT, 6.5, lines=2),
                ),
                frame=ROLE_COLOURS[role],
            )
            for (record, below), (title, role) in zip(shown, _PARTS, strict=True)
        ),
        None,
    ]
