"""``simexplain evaluate retrieval``: Recall@K and MAP@R on labelled pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from simexplain.data.dataset_split import DataSplit, everything
from simexplain.data.datasets import DATASETS, read_dataset
from simexplain.data.folders import Record
from simexplain.evaluation.retrieval import RECALLS, evaluate_retrieval
from simexplain.evaluation.retrieval_result import Retrieval

from .console import echo, echo_lines
from .options import (
    GROUP_HELP,
    OWN_GROUP,
    RANKS_TYPE,
    Command,
    FilePath,
    OneOf,
    busy,
    joined,
    model_from,
    model_options,
    progress_bars,
    tell_left_out,
)
from .result_commands import Made, makes

_LISTED = 3
_SHARE = 0.5
_SPLITS = ("all", "train", "test")


@click.command("retrieval", cls=Command)
@click.argument("model")
@click.argument("data", type=FilePath(path_type=Path))
@click.option("--gallery", type=FilePath(path_type=Path),
              help="Folder of classes to search. [the queries themselves]")  # fmt: skip
@click.option("--kind", type=OneOf(list(DATASETS)), default="folder",
              show_default=True, help="What DATA is.")  # fmt: skip
@click.option(
    "--split",
    type=OneOf(_SPLITS),
    help="Which part of DATA: its pictures are the queries. [test if DATA has a split, else all]",
)
@click.option("--train-share", type=click.FloatRange(0, 1, min_open=True, max_open=True),
              help="Share of the classes that trains, the first by name: with --split, where DATA "
              f"does not say. [{_SHARE}]")  # fmt: skip
@click.option("--group", metavar="name|own|REGEX", help=GROUP_HELP)
@click.option(
    "--ranks",
    type=RANKS_TYPE,
    multiple=True,
    default=[RECALLS],
    callback=joined,
    help=f"Ranks to report: the K of Recall@K. [{','.join(map(str, RECALLS))}]",
)
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1),
              help="Pictures in one forward pass.")  # fmt: skip
@makes(
    "Retrieval",
    "Folder to write: retrieval.json, queries.csv, classes.csv, retrieval.npz. [none]",
)
@model_options
def retrieval(
    model: str,
    data: Path,
    kind: str,
    split: str | None,
    train_share: float | None,
    gallery: Path | None,
    group: str | None,
    ranks: tuple[int, ...],
    batch_size: int,
    **given: Any,
) -> Made:
    """Measure whether the nearest pictures are of the query's own class.

    DATA has a sub-folder of pictures for each class, or another layout (--kind). Each picture is
    a query once and searches all others, or the folder given by --gallery. Examples:

    \b
      simexplain evaluate retrieval timm:tf_efficientnet_lite0 pictures/ --out scores
      simexplain evaluate retrieval model.pt pictures/ --split test --train-share 0.5
      simexplain evaluate retrieval model.pt queries/ --gallery gallery/ --ranks 1,10
    """  # noqa: D301 - click wants the backspace character
    if kind == "folder":
        tell_left_out(data)
    rule = None if group == OWN_GROUP else group
    dataset = read_dataset(kind, data, train_share=train_share or _SHARE, group=rule)
    split, queries, searched = _chosen(dataset, split, gallery, rule)
    shared = not dataset.has_split and split != "all"
    if train_share is not None and not shared:
        why = (
            "DATA has its own split" if dataset.has_split else "say --split test (or train) with it"
        )
        raise click.BadParameter(why, param_hint="--train-share")
    with busy(f"Loading {model}"):
        network = model_from(model, given)
    with progress_bars("Embedding queries") as progress:
        result = evaluate_retrieval(
            network,
            queries,
            searched,
            ranks=ranks,
            grouped=group is not None,
            batch_size=batch_size,
            progress=progress,
        )
    protocol: dict[str, Any] = {"data": str(data), "kind": kind, "split": split, "group": group}
    if shared:
        protocol["train_share"] = train_share or _SHARE
    result = replace(result, settings={**result.settings, **protocol})
    return Made(result, partial(report, result))


def _chosen(
    data: DataSplit, split: str | None, gallery: Path | None, rule: str | None
) -> tuple[str, Sequence[Record], Sequence[Record] | None]:
    """Which split it is, the queries and, where it is another set, the gallery."""
    split = split or ("test" if data.has_split else "all")
    queries = {"train": data.train, "test": data.queries, "all": everything(data)}[split]
    if gallery is not None:
        return split, queries, everything(read_dataset("folder", gallery, group=rule))
    return split, queries, data.gallery if split == "test" else None


def report(result: Retrieval) -> Sequence[str]:
    """Prints the tables, for a person; returns what to warn of."""
    settings = result.settings
    among = "searched among themselves"
    if settings["gallery"] == "separate":
        among = f"searched in {_counted(len(result.gallery), 'picture', 'pictures')}"
    left = ", without their own groups" if settings["own group"] == "ignored" else ""
    queries = _counted(len(result.queries) - result.skipped, "query", "queries")
    echo(f"{settings['model']}, {settings['split']}: {queries}, {among}{left}")
    echo_lines(str(result))
    lines = []
    if result.skipped:
        lines.append(
            f"{_counted(result.skipped, 'query has', 'queries have')} nothing of the same class "
            "to find and take no part in the means."
        )
    lines += [f"left out: {reason}" for reason in list(result.errors.values())[:_LISTED]]
    if len(result.errors) > _LISTED:
        lines.append(f"{len(result.errors) - _LISTED} more, listed by --json.")
    return lines


def _counted(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"
