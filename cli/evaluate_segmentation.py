"""``simexplain evaluate segmentation``: one- and few-shot, one- and two-way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from simexplain.data.dataset_split import ALPHA
from simexplain.segmentation.dataset import (
    FOLDS,
    SegmentationData,
    is_pascal,
    read_masked,
    read_pascal,
)
from simexplain.segmentation.evaluating import OVERLAPS, SegmentationScores, evaluate_segmentation

from .console import echo, echo_lines
from .options import (
    Command,
    FilePath,
    OneOf,
    busy,
    model_from,
    model_options,
    progress_bars,
)
from .result_commands import Made, makes
from .segment_options import segment_options, segmenting_from

_KINDS = ("pascal", "folder", "csv")
_LISTED = 3


@click.command("segmentation", cls=Command)
@click.argument("model")
@click.argument("data", type=FilePath(path_type=Path))
@click.option("--kind", type=OneOf(_KINDS),
              help="What DATA is. [detected: a CSV file, PASCAL VOC 2012, or class folders]",
)  # fmt: skip
@click.option("--fold", "folds", type=click.IntRange(0, FOLDS - 1), multiple=True,
              help="Fold of PASCAL-5i; repeat. [all four]")  # fmt: skip
@click.option(
    "--split",
    type=OneOf(("all", "train", "test")),
    help="Which part of DATA: of PASCAL-5i the fold's classes (test) or the other "
    "fifteen (train), for choosing thresholds. [test of PASCAL-5i, else all]",
)
@click.option("--masks", metavar="FOLDER|alpha",
              help="Folder of masks: one of the same relative path for each picture, or alpha for "
              "their alpha channels. [alpha, of class folders]")  # fmt: skip
@click.option("--ways", type=click.IntRange(1, 2), default=1, show_default=True,
              help="Classes to find in a test picture.")  # fmt: skip
@click.option("--shots", type=click.IntRange(1), default=1, show_default=True,
              help="Supports for each class.")  # fmt: skip
@click.option("--episodes", type=click.IntRange(1), default=1000, show_default=True,
              help="Test pictures with their supports, drawn from each fold.")  # fmt: skip
@click.option("--overlaps", type=OneOf(list(OVERLAPS)), default="hotter", show_default=True,
              help="Two ways: " + "; ".join(f"{k}: {v}" for k, v in OVERLAPS.items()) + ".",
)  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Random seed.")
@segment_options
@makes(
    "SegmentationScores",
    "Folder to write: scores.json, episodes.csv and scores.npz. [none]",
)
@model_options
def segmentation(
    model: str,
    data: Path,
    kind: str | None,
    folds: tuple[int, ...],
    split: str | None,
    masks: str | None,
    ways: int,
    shots: int,
    episodes: int,
    overlaps: str,
    seed: int,
    **given: Any,
) -> Made:
    """Measure one- and few-shot segmentation of MODEL over DATA.

    DATA is the folder of PASCAL VOC 2012 (its four folds of PASCAL-5i are measured), a CSV file
    with the columns path, label, mask, or a folder with a sub-folder of pictures for each class.
    For example:

    \b
      simexplain evaluate segmentation timm:tf_efficientnet_lite0 VOCdevkit/ --fold 0
      simexplain evaluate segmentation model.pt VOCdevkit/ --ways 2 --shots 5 --out scores
      simexplain evaluate segmentation model.pt objects.csv --method sam:weights=paper
    """  # noqa: D301 - click wants the backspace character
    options = segmenting_from(given)
    kind = kind or _kind(data)
    with busy(f"Reading {data}"):
        sets = _sets(kind, data, folds, split, masks)
    with busy(f"Loading {model}"):
        network = model_from(model, given)
    with progress_bars() as progress:
        result = evaluate_segmentation(
            network, sets, ways=ways, shots=shots, episodes=episodes, seed=seed,
            overlaps=overlaps, progress=progress, **options,
        )  # fmt: skip
    protocol = {"data": str(data), "kind": kind, "split": split}
    result = replace(result, settings={**result.settings, **protocol})
    return Made(result, partial(report, result))


def _kind(data: Path) -> str:
    if data.suffix.lower() == ".csv":
        return "csv"
    return "pascal" if is_pascal(data) else "folder"


def _sets(
    kind: str, data: Path, folds: tuple[int, ...], split: str | None, masks: str | None
) -> tuple[SegmentationData, ...]:
    if kind == "pascal":
        if masks is not None or split == "all":
            what = "--masks" if masks is not None else "--split"
            raise click.BadParameter("PASCAL-5i has its own; leave it out.", param_hint=what)
        return tuple(read_pascal(data, fold, split or "test") for fold in folds or range(FOLDS))
    if folds:
        raise click.BadParameter("only PASCAL-5i has folds.", param_hint="--fold")
    chosen = masks or (ALPHA if kind == "folder" else None)
    return (read_masked(kind, data, masks=chosen, part=split or "all"),)


def report(result: SegmentationScores) -> Sequence[str]:
    """Prints the tables, for a person; returns what to warn of."""
    settings = result.settings
    count = sum(len(fold.episodes) for fold in result.folds)
    echo(
        f"{settings['model']}, {settings['method']}, {settings['refine']}: {count} episodes, "
        f"{settings['ways']}-way {settings['shots']}-shot"
    )
    echo_lines(str(result))
    lines = [f"left out: {where}: {why}" for where, why in list(result.errors.items())[:_LISTED]]
    if lines:
        drawn = settings["episodes"] * len(result.folds)
        lines.insert(0, f"{drawn - count} of {drawn} episodes cannot be measured and are left out.")
    if len(result.errors) > _LISTED:
        lines.append(f"{len(result.errors) - _LISTED} more, listed by --json.")
    return lines
