"""Methods side by side as one figure: a row each, its overlays below the pictures, its scores."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from simexplain.errors import ComparisonError
from simexplain.evaluation.comparison_layout import (
    EDGE,
    FAINT,
    GAP,
    GOOD,
    INK,
    NAMES,
    NOTE,
    SCORE,
    Plan,
    axes_at,
    planned,
    rule,
    say,
    shortened,
)
from simexplain.evaluation.tables import cost, number
from simexplain.explanation import heat_of
from simexplain.picturing import full_heat, verdict
from simexplain.printing import printable
from simexplain.rendering.overlay import COLOURMAP, RENDERERS
from simexplain.rendering.panel import ROLE_COLOURS, ShownFigure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from simexplain.evaluation.comparison_result import ComparedMethod, MethodComparison
    from simexplain.explanation import Explanation

_LINE, _MOST_NOTES = 0.155, 12
_DOTS = 120
_HEADINGS = {
    "deletion": ("deletion", "lower is better"),
    "insertion": ("insertion", "higher is better"),
    "gain": ("gain", "higher is better"),
    "pointing": ("pointing", "higher is better"),
    "energy": ("energy", "higher is better"),
}


def draw_methods(result: MethodComparison, style: str) -> Figure:
    """The figure of a comparison; see ``MethodComparison.figure``.

    Raises:
        ComparisonError: If there is no such style.
    """
    if style not in RENDERERS:
        raise ComparisonError(f"Expected style to be one of {', '.join(RENDERERS)}, got '{style}'.")
    first = result.first
    sizes = [first.on_picture(place)[0].shape[:2] for place in range(len(first.roles))]
    aspects = [min(max(width / height, 0.4), 2.5) for height, width in sizes]
    plan = planned(aspects, len(result.methods), len(result.metrics))
    notes = _notes(result, plan)
    plan = replace(plan, foot=0.42 + _LINE * len(notes))
    figure = ShownFigure(figsize=(plan.width, plan.height), dpi=_DOTS, facecolor="white")
    _head(figure, plan, first)
    shown = len(plan.widths)
    small = [_small(first, place, plan) for place in range(shown)]
    for place in range(shown):
        axes = axes_at(figure, plan, 0, place)
        _picture(figure, axes, plan, result, place, small[place])
    _headings(figure, plan, result)
    for row, method in enumerate(result.methods, start=1):
        _label(figure, plan, row, method)
        for place in range(shown):
            picture, heat = _small(method.explanation, place, plan, small[place])
            axes = axes_at(figure, plan, row, place)
            axes.imshow(RENDERERS[style](picture, heat), aspect="auto")
            _peak(axes, method.explanation, place, picture.shape[1])
        _scores(figure, plan, row, method, result)
    _random(figure, plan, result)
    _footer(figure, plan, first, notes)
    return figure


def _small(
    explanation: Explanation, place: int, plan: Plan, known: tuple[Any, Any] | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """A picture and its heat at twice the size on the page; ``known`` has the picture already."""
    heat = heat_of(explanation, 0)[place]
    if not explanation.pictures:
        return explanation.preprocess.undo(explanation.images[0, place]), heat
    picture, geometry = explanation.pictures[place].image, explanation.geometries[place]
    shrink = min(1.0, 2 * _DOTS * plan.row / picture.height)
    size = (max(1, round(picture.height * shrink)), max(1, round(picture.width * shrink)))
    drawn = replace(geometry, original=size).to_original(heat)
    if known is not None:
        return known[0], drawn
    thumbnail = picture.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.asarray(thumbnail), drawn


def _picture(
    figure: Figure,
    axes: Axes,
    plan: Plan,
    result: MethodComparison,
    place: int,
    small: tuple[Any, Any],
) -> None:
    """An image as it is, framed in the colour of its role, its mask outlined."""
    first, picture = result.first, small[0]
    role = first.roles[place]
    axes.imshow(picture, aspect="auto")
    for spine in axes.spines.values():
        spine.set(visible=True, color=ROLE_COLOURS[role], linewidth=2.2)
    if place in result.masks:
        height, width = picture.shape[:2]
        mask = result.masks[place].numpy().astype(np.uint8) * 255
        lines = np.asarray(Image.fromarray(mask).resize((width, height))) / 255
        axes.contour(lines, [0.5], colors="black", linewidths=2.0)
        axes.contour(lines, [0.5], colors="white", linewidths=0.9)
    if first.pictures:
        geometry = first.geometries[place]
        left, top, right, bottom = replace(geometry, original=picture.shape[:2]).box
        if (left, top) != (0, 0) or (bottom, right) != picture.shape[:2]:
            corner = (left - 0.5, top - 0.5)
            axes.add_patch(
                Rectangle(
                    corner, right - left, bottom - top, fill=False, edgecolor=FAINT,
                    linestyle=(0, (4, 3)), linewidth=1.0,
                )
            )  # fmt: skip
    distance = "" if not place else f"  d = {float(first.distances[0, place - 1]):.3f}"
    wide = min(plan.widths[1:], default=0.0) >= 1.3
    middle = plan.left(place) + plan.widths[place] / 2
    style = {"color": ROLE_COLOURS[role], "weight": "bold", "size": 9.5 if wide else 8}
    above = plan.head - (0.24 if first.pictures else 0.1)
    if wide or not distance:
        say(figure, plan, middle, above, f"{role}{distance}", ha="center", **style)
    else:
        say(figure, plan, middle, above - 0.16, role, ha="center", **style)
        style = {**style, "weight": "normal"}
        say(figure, plan, middle, above, distance.strip(), ha="center", **style)
    if first.pictures:
        name = shortened(
            printable(Path(first.pictures[place].path).name), round(plan.widths[place] * 15)
        )
        say(figure, plan, middle, plan.head - 0.08, name, ha="center", size=7.5, color=FAINT)


def _peak(axes: Axes, explanation: Explanation, place: int, width: int) -> None:
    """A cross at the map's true maximum on a picture drawn ``width`` pixels wide."""
    whole, peaks = explanation.images.shape[-1], explanation.view_peaks
    if explanation.pictures:
        whole, peaks = explanation.pictures[place].image.width, explanation.peaks
    peak = peaks()[place]
    if peak is None:
        return
    x, y = (value * width / whole - 0.5 for value in peak)
    axes.plot(x, y, marker="+", color="white", markersize=8, markeredgewidth=2.2)
    axes.plot(x, y, marker="+", color="black", markersize=7, markeredgewidth=0.9)


def _head(figure: Figure, plan: Plan, first: Explanation) -> None:
    holds = first.condition().holds
    colour = {True: GOOD, False: ROLE_COLOURS["negative"], None: FAINT}[holds]
    middle = plan.width / 2
    title = "Why these images are alike or different, by method"
    say(figure, plan, middle, 0.3, title, ha="center", size=13, color=INK)
    style = {"ha": "center", "size": 10.5, "color": colour, "weight": "bold"}
    say(figure, plan, middle, 0.56, verdict(first), **style)


def _headings(figure: Figure, plan: Plan, result: MethodComparison) -> None:
    """Above the columns of scores, in the row of the pictures, with the colours explained."""
    bottom = plan.top(1) - GAP - 0.1
    said = [_HEADINGS[name] for name in result.metrics]
    said += [("agreement", f"with {shortened(result.methods[0].name, 9)}"), ("cost", "")]
    for column, (heading, about) in enumerate(said):
        x = plan.score(column)
        say(figure, plan, x, bottom - 0.15, heading, ha="center", size=9, color=INK,
             weight="bold")  # fmt: skip
        say(figure, plan, x, bottom, about, ha="center", size=6.5, color=FAINT)
    say(figure, plan, plan.score(len(said) - 1), bottom, "images, seconds", ha="center",
         size=6.5, color=FAINT)  # fmt: skip
    scale = full_heat([method.explanation for method in result.methods])
    wide = min(2.6, (plan.scores - 1) * SCORE)
    left = plan.score(0) - 0.3
    box = (left / plan.width, 1 - (plan.head + 0.18) / plan.height, wide / plan.width,
           0.1 / plan.height)  # fmt: skip
    axes = figure.add_axes(box)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), COLOURMAP), cax=axes,
                          orientation="horizontal")  # fmt: skip
    bar.set_ticks([0, 0.5, 1])
    bar.ax.tick_params(labelsize=6.5, colors=FAINT, length=2, pad=1)
    bar.outline.set_visible(False)
    say(figure, plan, left, plan.head, f"evidence, share of {scale}", size=7, color=FAINT)


def _label(figure: Figure, plan: Plan, row: int, method: ComparedMethod) -> None:
    """The method's name, what was asked of it, and its layers."""
    explanation, top = method.explanation, plan.top(row)
    name, _, _ = method.name.partition(":")
    name = name.partition("@")[0] if explanation.method in method.name else method.name
    lines = [f"{option}={value}" for option, value in method.asked.items()]
    if explanation.method not in method.name:
        lines.insert(0, explanation.method)
    wrapped = textwrap.wrap(", ".join(lines), 34)[:2]
    wrapped += textwrap.wrap(explanation.layer, 34)[: 3 - len(wrapped)]
    middle = top + plan.row / 2
    first = middle - 0.145 * len(wrapped) / 2
    say(figure, plan, EDGE, first, shortened(name, 24), size=10, color=INK, weight="bold",
         va="center")  # fmt: skip
    for number_of, line in enumerate(wrapped):
        y = first + 0.175 + 0.145 * number_of
        say(figure, plan, EDGE, y, line, size=7.5, color=FAINT, va="center")
    rule(figure, plan, EDGE, EDGE + NAMES - 0.1, top - GAP / 2)
    rule(figure, plan, plan.score(0) - SCORE / 2 + 0.02, plan.width - EDGE, top - GAP / 2)


def _scores(
    figure: Figure, plan: Plan, row: int, method: ComparedMethod, result: MethodComparison
) -> None:
    middle = plan.top(row) + plan.row / 2
    reached = method.means
    for column, metric in enumerate(result.metrics):
        best = result.best(metric) == method.name and len(result.methods) > 1
        style = {"color": GOOD, "weight": "bold"} if best else {"color": INK}
        text = number(reached[metric], metric)
        say(figure, plan, plan.score(column), middle, text, ha="center", va="center", size=10,
             **style)  # fmt: skip
    column = len(result.metrics)
    text = number(method.agreement["spearman"], "agreement")
    if method is result.methods[0]:
        text = "reference"
    size = 8 if text == "reference" else 10
    colour = FAINT if text == "reference" else INK
    say(figure, plan, plan.score(column), middle, text, ha="center", va="center", size=size,
         color=colour)  # fmt: skip
    style = {"ha": "center", "va": "center", "color": INK}
    x = plan.score(column + 1)
    say(figure, plan, x, middle - 0.09, str(method.forwards), size=10, **style)
    say(figure, plan, x, middle + 0.1, f"{cost(method.seconds)} s", size=8.5, **style)


def _random(figure: Figure, plan: Plan, result: MethodComparison) -> None:
    """The row of the map that knows nothing."""
    top = plan.top(len(result.methods) + 1)
    middle = top + 0.14
    rule(figure, plan, EDGE, plan.width - EDGE, top - GAP / 2)
    style = {"va": "center", "color": FAINT}
    text = "a random map reaches"
    if result.chance:
        text += f";  by chance pointing {result.chance['pointing']:.3f}"
    say(figure, plan, EDGE, middle, text, size=8.5, **style)
    for column, metric in enumerate(result.metrics):
        say(figure, plan, plan.score(column), middle, number(result.random[metric], metric),
             ha="center", size=9, **style)  # fmt: skip


def _notes(result: MethodComparison, plan: Plan) -> list[tuple[str, str]]:
    """Lines below the figure, each with its colour: what was left out, what rows to distrust."""
    plain = []
    if result.undefined():
        plain.append(result.left_out())
    if len(result.first.roles) > len(plan.widths):
        count = len(result.first.roles)
        plain.append(f"The first {len(plan.widths)} of {count} images are shown.")
    if result.skipped:
        plain.append(f"Not applicable here: {', '.join(result.skipped)}.")
    warned = [f"! {note}" for note in result.notes]
    warned += [f"! {m.name}: {note}" for m in result.methods for note in m.explanation.warnings]
    wide = int(plan.width * 16.5)
    said = [(note, FAINT) for note in plain] + [(note, NOTE) for note in warned]
    lines = [(line, colour) for note, colour in said for line in textwrap.wrap(note, wide)]
    if len(lines) > _MOST_NOTES:
        more = ("... all of them are in the manifest and on the terminal", NOTE)
        lines = [*lines[: _MOST_NOTES - 1], more]
    return lines


def _footer(
    figure: Figure, plan: Plan, first: Explanation, notes: Sequence[tuple[str, str]]
) -> None:
    y = plan.height - plan.foot + 0.2
    say(figure, plan, EDGE, y, first.model, size=8, color=FAINT)
    for place, (note, colour) in enumerate(notes, start=1):
        say(figure, plan, EDGE, y + 0.06 + _LINE * place, note, size=7.5, color=colour)
