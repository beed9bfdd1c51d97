"""``simexplain evaluate``: models and methods measured on data sets."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from simexplain.evaluation.evaluating import evaluate_faithfulness
from simexplain.evaluation.faithfulness import CONTROLS
from simexplain.evaluation.items import SAMPLED, read_comparisons, sample_comparisons

from .console import echo, echo_lines
from .evaluate_reid import reid
from .evaluate_retrieval import retrieval
from .evaluate_segmentation import segmentation
from .options import (
    Command,
    FilePath,
    OneOf,
    busy,
    model_from,
    model_options,
    progress_bar,
)
from .recipes import asked_recipes, measuring_options, tell_long_work
from .result_commands import Made, makes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simexplain.evaluation.items import Item
    from simexplain.evaluation.results import Evaluation

_SAMPLED, _LISTED = 50, 3


@click.group("evaluate")
def command() -> None:
    """Measure a model or explanations on a data set."""


command.add_command(retrieval)
command.add_command(reid)
command.add_command(segmentation)


@command.command("faithfulness", cls=Command)
@click.argument("model")
@click.argument("data", type=FilePath(path_type=Path))
@measuring_options
@click.option("--comparisons", type=click.IntRange(1), metavar="N",
              help=f"How many to draw from a folder [{_SAMPLED}], or the first N lines of a file "
              "[all].")  # fmt: skip
@click.option("--arch", type=OneOf(list(SAMPLED)), default="triplet", show_default=True,
              help="What is compared: drawn so from a folder.")  # fmt: skip
@click.option("--control", "controls", type=OneOf(list(CONTROLS)), multiple=True,
              default=list(CONTROLS), show_default=True,
              help="Maps that know nothing of the network, measured as well; repeat.")  # fmt: skip
@click.option(
    "--confidence",
    "level",
    default=0.95,
    show_default=True,
    type=click.FloatRange(0.5, 0.999),
    help="Confidence of the intervals.",
)
@makes(
    "Evaluation",
    "Folder to write: results.json, values.csv and results.png. [none]",
)
@model_options
def faithfulness(
    model: str,
    data: Path,
    comparisons: int | None,
    arch: str,
    **given: Any,
) -> Made:
    """Measure how faithful methods are to MODEL over the comparisons of DATA.

    DATA is a CSV file with the columns anchor, positives, negatives, or a folder with a sub-folder
    of pictures for each class, from which comparisons are drawn. Examples:

    \b
      simexplain evaluate faithfulness timm:tf_efficientnet_lite0 comparisons.csv --out scores
      simexplain evaluate faithfulness timm:tf_efficientnet_lite0 pictures/ --comparisons 20 \\
        --method sam:weights=signed --method decomposition
    """  # noqa: D301 - click wants the backspace character
    recipes = asked_recipes(given)
    items = _items(data, comparisons, arch, given["seed"])
    with busy(f"Loading {model}"):
        network = model_from(model, given)
    with progress_bar(f"Measuring {len(recipes)} methods on {len(items)} comparisons") as progress:
        result = evaluate_faithfulness(
            network, items, recipes, progress=progress, estimate=tell_long_work, **given
        )
    return Made(result, partial(report, result))


def _items(data: Path, count: int | None, arch: str, seed: int) -> list[Item]:
    if data.is_dir():
        return sample_comparisons(data, count or _SAMPLED, arch=arch, seed=seed)
    return read_comparisons(data)[:count]


def report(result: Evaluation) -> Sequence[str]:
    """Prints the table, for a person; returns what to warn of."""
    done = len(result.items) - sum(", " not in where for where in result.errors)
    level = f"{100 * result.settings['level']:g} %"
    echo(
        f"{result.settings['model']}, {done} of {len(result.items)} comparisons measured, means "
        f"with {level} intervals"
    )
    echo_lines(str(result))
    for name, reason in result.skipped.items():
        echo(f"Skipped {name}: {reason}")
    broken = {
        where: reason
        for where, reason in result.errors.items()
        if where.partition(", ")[2] not in result.skipped
    }
    lines = [f"{where}: {reason}" for where, reason in list(broken.items())[:_LISTED]]
    if len(broken) > _LISTED:
        lines.append(f"{len(broken) - _LISTED} more, listed by --json.")
    return lines
