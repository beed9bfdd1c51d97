"""``simexplain evaluate reid``: persons found again before other cameras."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from simexplain.data.datasets import read_dataset
from simexplain.evaluation.retrieval import RANKS, evaluate_reid
from simexplain.evaluation.retrieval_result import Reidentification
from simexplain.models.pcb import PCB

from .console import echo, echo_lines
from .options import (
    RANKS_TYPE,
    Command,
    FilePath,
    OneOf,
    busy,
    joined,
    model_from,
    model_options,
    progress_bars,
)
from .result_commands import Made, makes

_LISTED = 3
_DATASETS = ("market1501", "cuhk03")
_MODEL = ("backbone", "keep_head", "untrained", "trust_pickle", "size", "fit", "distance", "fast")


@click.command("reid", cls=Command)
@click.argument("model")
@click.argument("folder", type=FilePath(path_type=Path), metavar="DATA")
@click.option(
    "--kind",
    "dataset",
    type=OneOf(_DATASETS),
    default="market1501",
    show_default=True,
    help="What DATA is: DukeMTMC-reID is laid out as market1501.",
)
@click.option("--ranks", type=RANKS_TYPE, multiple=True, default=[RANKS],
              callback=joined, help=f"Ranks to report. [{','.join(map(str, RANKS))}]")  # fmt: skip
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1),
              help="Pictures in one forward pass.")  # fmt: skip
@makes(
    "Reidentification",
    "Folder to write: reid.json, queries.csv, failures.csv, failures.png, reid.npz. [none]",
)
@model_options
def reid(
    model: str,
    folder: Path,
    dataset: str,
    ranks: tuple[int, ...],
    batch_size: int,
    **given: Any,
) -> Made:
    """Measure whether persons are found again in pictures from other cameras.

    DATA has bounding_box_train, query and bounding_box_test, as published. Reported are
    rank-1, rank-5, rank-10 and mAP of single queries; junk, and pictures of the same person from
    the query's own camera, are ignored. For example:

    \b
      simexplain evaluate reid model.pt Market-1501-v15.09.15/ --out scores
      simexplain evaluate reid model.pt cuhk03-np/detected/ --kind cuhk03
      simexplain evaluate reid timm:tf_efficientnet_lite0 Market/ --size 384x128 --fit squash
    """  # noqa: D301 - click wants the backspace character
    data = read_dataset(dataset, folder, strict=False)
    again = _again(model, given)
    with busy(f"Loading {model}"):
        network = model_from(model, given)
    if any(isinstance(part, PCB) for part in network.modules()):
        again += ["--cam", "hires_cam"]  # Grad-CAM mixes what the stripes want
    with progress_bars("Embedding queries") as progress:
        result = evaluate_reid(network, data, ranks=ranks, batch_size=batch_size, progress=progress)
    protocol = {"folder": str(folder), "dataset": dataset}
    result = replace(result, settings={**result.settings, **protocol})
    return Made(
        result,
        partial(report, result, again, data.problems),
        more={"warnings": list(data.problems)},
    )


def report(result: Reidentification, model: list[str], problems: Sequence[str]) -> Sequence[str]:
    """Prints the table, for a person, and returns what to warn of; ``model`` as words."""
    echo(
        f"{result.settings['model']}, {result.settings['data']}: "
        f"{_counted(len(result.queries) - result.skipped, 'query', 'queries')} of "
        f"{_counted(result.persons, 'person', 'persons')}, searched in "
        f"{_counted(result.searched, 'picture', 'pictures')} ({result.distractors} of "
        f"distractors, {result.junk} more of junk ignored)"
    )
    echo_lines(str(result))
    if result.failures:
        worst = result.failures[0]
        paths = [str(record.path) for record in (worst.query, worst.right, worst.wrong)]
        failed = _counted(len(result.failures), "query", "queries")
        echo(f"{failed} found another person first; the worst, explained:")
        words = [model[0], *paths, "--arch", "triplet", *model[1:]]
        echo(f"  simexplain explain {shlex.join(words)}")
    lines = list(problems)
    if result.skipped:
        what = _counted(result.skipped, "query has", "queries have")
        lines.append(f"{what} no picture before another camera and take no part in the means.")
    lines += [f"left out: {reason}" for reason in list(result.errors.values())[:_LISTED]]
    if len(result.errors) > _LISTED:
        lines.append(f"{len(result.errors) - _LISTED} more, listed by --json.")
    return lines


def _again(model: str, given: Mapping[str, Any]) -> list[str]:
    """The model with its options as another command would be given them."""
    words = [model]
    for name in _MODEL:
        value = given[name]
        if value:
            words.append(f"--{name.replace('_', '-')}")
            if value is not True:
                words.append("x".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return words


def _counted(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"
