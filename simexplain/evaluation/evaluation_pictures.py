"""An evaluation as a figure: a dot with its interval for each method, a panel for each metric."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from matplotlib.ticker import MaxNLocator

from simexplain.metrics.intervals import FEW
from simexplain.printing import printable
from simexplain.rendering.lettering import FONT, breadth
from simexplain.rendering.sheet import (
    COLOURS,
    FAINT,
    INK,
    PALE,
    ROLE_COLOURS,
    Cell,
    Grid,
    Row,
    Sheet,
    page,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from simexplain.evaluation.results import Evaluation

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
