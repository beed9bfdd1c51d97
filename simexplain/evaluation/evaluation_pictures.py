"""An evaluation as a figure: a dot with its interval for each method, a panel for each metric."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simexplain.metrics.intervals import FEW
from simexplain.rendering.cards import WARNING
from simexplain.rendering.lettering import write
from simexplain.rendering.panel import ShownFigure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from simexplain.evaluation.results import Evaluation

_INK, _FAINT, _DOT, _CONTROL = "#222222", "#666666", "#1f4e79", "#999999"
_PANEL, _ROW, _HEAD, _FOOT, _EDGE = 2.3, 0.34, 0.95, 0.85, 0.2
_LETTER = 0.085
"""Inches: a panel's width, a method's height, a letter of its name."""
_LOWER = ("deletion",)


def draw_evaluation(result: Evaluation) -> Figure:
    """The figure of an evaluation; see ``Evaluation.figure``."""
    skipped = result.skipped
    names = [name for name in result.methods if name not in skipped]
    metrics = result.metrics
    label = max(1.0, _LETTER * max(map(len, names)) + 0.15)
    width = _EDGE + label + len(metrics) * _PANEL + _EDGE
    body = _ROW * len(names) + 0.1
    height = _HEAD + body + _FOOT
    figure = ShownFigure(figsize=(width, height), dpi=120, facecolor="white")
    count = len(result.items)
    level = f"{100 * result.settings['level']:g} %"
    about = f"mean over {count} comparison{'s' * (count > 1)} with its {level} interval"
    write(figure, _EDGE / width, 1 - 0.3 / height, "Faithfulness of methods", size=13, color=_INK)
    write(figure, _EDGE / width, 1 - 0.52 / height, about, size=9, color=_FAINT)
    if result.few:
        warned = f"dotted: of fewer than {FEW} comparisons, which says next to nothing"
        write(figure, _EDGE / width, 1 - 0.68 / height, warned, size=8, color=WARNING)
    for column, metric in enumerate(metrics):
        left = _EDGE + label + column * _PANEL
        box = (left / width, _FOOT / height, (_PANEL - 0.2) / width, body / height)
        axes = figure.add_axes(box)
        _panel(axes, result, metric, names, first=column == 0)
    chosen = "   ·   ".join(f"{key} {value}" for key, value in result.settings.items())
    write(figure, _EDGE / width, 0.32 / height, chosen, size=7.5, color=_FAINT)
    if skipped:
        said = f"Not applicable: {', '.join(skipped)}."
        write(figure, _EDGE / width, 0.14 / height, said, size=7.5, color=_FAINT)
    return figure


def _panel(
    axes: Axes, result: Evaluation, metric: str, names: list[str], *, first: bool
) -> None:  # fmt: skip
    for row, name in enumerate(names):
        interval = result.methods[name].intervals[metric]
        colour = _CONTROL if name.startswith("(") else _DOT
        if interval.low == interval.low:
            axes.plot([interval.low, interval.high], [row, row], color=colour, linewidth=2.2,
                      linestyle=(0, (0.1, 1.5)) if interval.few else "solid", alpha=0.55,
                      solid_capstyle="round", dash_capstyle="round")  # fmt: skip
        if interval.count:
            axes.plot(interval.mean, row, marker="o", color=colour, markersize=6,
                      markerfacecolor="white" if interval.few else colour)  # fmt: skip
    level = result.chance.get(metric, float("nan"))
    if level == level:
        axes.axvline(level, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate("chance", (level, 0), xycoords=("data", "axes fraction"), xytext=(2, 2),
                      textcoords="offset points", size=6.5, color=_FAINT)  # fmt: skip
    elif metric == "gain":
        axes.axvline(0, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_yticks(range(len(names)))
    labels = axes.set_yticklabels(names if first else [], size=9.5, color=_INK)
    for shown in labels:
        shown.set_parse_math(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7.5, colors=_FAINT, length=3)
    axes.margins(x=0.12)
    axes.grid(axis="y", color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
    better = "lower" if metric in _LOWER else "higher"
    axes.set_title(metric, size=10, color=_INK, weight="bold", loc="left", pad=5)
    axes.set_title(f"{better} is better", size=7, color=_FAINT, loc="right", pad=5)
