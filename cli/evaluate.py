"""``simexplain evaluate``: models and methods measured on data sets."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from simexplain.data.dataset_split import ALPHA, DataSplit, everything
from simexplain.data.datasets import DATASETS, read_dataset
from simexplain.data.folders import Record
from simexplain.evaluation.evaluating import evaluate_faithfulness
from simexplain.evaluation.faithfulness import CONTROLS
from simexplain.evaluation.items import SAMPLED, read_comparisons, sample_comparisons
from simexplain.evaluation.retrieval import RANKS, RECALLS, evaluate_reid, evaluate_retrieval
from simexplain.evaluation.retrieval_result import Reidentification, Retrieval
from simexplain.models.pcb import PCB
from simexplain.segmentation.dataset import (
    FOLDS,
    SegmentationData,
    is_pascal,
    read_masked,
    read_pascal,
)
from simexplain.segmentation.evaluating import OVERLAPS, SegmentationScores, evaluate_segmentation

from .console import busy, echo, echo_lines, progress_bar, progress_bars, tell_left_out
from .method_options import asked_recipes, measuring_options, tell_long_work
from .options import (
    GROUP_HELP,
    OWN_GROUP,
    RANKS_TYPE,
    Command,
    FilePath,
    OneOf,
    batch_size_option,
    joined,
    model_from,
    model_options,
    option,
    rare_option,
)
from .result_commands import Made, makes
from .segment import segment_options, segmenting_from

if TYPE_CHECKING:
    from collections.abc import Sequence


if TYPE_CHECKING:
    from simexplain.evaluation.items import Item
    from simexplain.evaluation.results import Evaluation

_SAMPLED, _LISTED, _SHARE = 50, 3, 0.5
_SPLITS = ("all", "train", "test")


@click.group("evaluate")
def command() -> None:
    """Measure a model or explanations on a data set."""


@command.command("retrieval", cls=Command)
@click.argument("model")
@click.argument("data", type=FilePath(path_type=Path))
@option("--gallery", type=FilePath(path_type=Path),
              help="Folder of classes to search. [the queries themselves]")  # fmt: skip
@option("--kind", type=OneOf(list(DATASETS)), default="folder",
              show_default=True, help="What DATA is.")  # fmt: skip
@option(
    "--split",
    type=OneOf(_SPLITS),
    help="Which part of DATA: its pictures are the queries. [test if DATA has a split, else all]",
)
@option("--train-share", type=click.FloatRange(0, 1, min_open=True, max_open=True),
              help="Share of the classes that trains, the first by name: with --split, where DATA "
              f"does not say. [{_SHARE}]")  # fmt: skip
@option("--group", metavar="name|own|REGEX", help=GROUP_HELP)
@option(
    "--ranks",
    type=RANKS_TYPE,
    multiple=True,
    default=[RECALLS],
    callback=joined,
    help=f"Ranks to report: the K of Recall@K. [{','.join(map(str, RECALLS))}]",
)
@batch_size_option
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
    return Made(result, partial(_report_retrieval, result))


def _chosen(
    data: DataSplit, split: str | None, gallery: Path | None, rule: str | None
) -> tuple[str, Sequence[Record], Sequence[Record] | None]:
    """Which split it is, the queries and, where it is another set, the gallery."""
    split = split or ("test" if data.has_split else "all")
    queries = {"train": data.train, "test": data.queries, "all": everything(data)}[split]
    if gallery is not None:
        return split, queries, everything(read_dataset("folder", gallery, group=rule))
    return split, queries, data.gallery if split == "test" else None


def _report_retrieval(result: Retrieval) -> Sequence[str]:
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
    return [*lines, *_listed([f"left out: {reason}" for reason in result.errors.values()])]


def _counted(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def _listed(lines: Sequence[str]) -> list[str]:
    """The first lines, and how many more there are."""
    more = [f"{len(lines) - _LISTED} more, listed by --json."] if len(lines) > _LISTED else []
    return [*lines[:_LISTED], *more]


_DATASETS = ("market1501", "cuhk03")
_MODEL = ("backbone", "keep_head", "untrained", "trust_pickle", "size", "fit", "distance", "fast")


@command.command("reid", cls=Command)
@click.argument("model")
@click.argument("folder", type=FilePath(path_type=Path), metavar="DATA")
@option(
    "--kind",
    "dataset",
    type=OneOf(_DATASETS),
    default="market1501",
    show_default=True,
    help="What DATA is: DukeMTMC-reID is laid out as market1501.",
)
@option("--ranks", type=RANKS_TYPE, multiple=True, default=[RANKS],
              callback=joined, help=f"Ranks to report. [{','.join(map(str, RANKS))}]")  # fmt: skip
@batch_size_option
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
        partial(_report_reid, result, again, data.problems),
        more={"warnings": list(data.problems)},
    )


def _report_reid(
    result: Reidentification, model: list[str], problems: Sequence[str]
) -> Sequence[str]:
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
    return [*lines, *_listed([f"left out: {reason}" for reason in result.errors.values()])]


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


_KINDS = ("pascal", "folder", "csv")


@command.command("segmentation", cls=Command)
@click.argument("model")
@click.argument("data", type=FilePath(path_type=Path))
@option("--kind", type=OneOf(_KINDS),
              help="What DATA is. [detected: a CSV file, PASCAL VOC 2012, or class folders]",
)  # fmt: skip
@option("--fold", "folds", type=click.IntRange(0, FOLDS - 1), multiple=True,
              help="Fold of PASCAL-5i; repeat. [all four]")  # fmt: skip
@option(
    "--split",
    type=OneOf(("all", "train", "test")),
    help="Which part of DATA: of PASCAL-5i the fold's classes (test) or the other "
    "fifteen (train), for choosing thresholds. [test of PASCAL-5i, else all]",
)
@rare_option("--masks", metavar="FOLDER|alpha",
              help="Folder of masks: one of the same relative path for each picture, or alpha for "
              "their alpha channels. [alpha, of class folders]")  # fmt: skip
@option("--ways", type=click.IntRange(1, 2), default=1, show_default=True,
              help="Classes to find in a test picture.")  # fmt: skip
@option("--shots", type=click.IntRange(1), default=1, show_default=True,
              help="Supports for each class.")  # fmt: skip
@option("--episodes", type=click.IntRange(1), default=1000, show_default=True,
              help="Test pictures with their supports, drawn from each fold.")  # fmt: skip
@rare_option("--overlaps", type=OneOf(list(OVERLAPS)), default="hotter", show_default=True,
              help="Two ways: " + "; ".join(f"{k}: {v}" for k, v in OVERLAPS.items()) + ".",
)  # fmt: skip
@option("--seed", default=0, show_default=True, help="Random seed.")
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
    return Made(result, partial(_report_segmentation, result))


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


def _report_segmentation(result: SegmentationScores) -> Sequence[str]:
    """Prints the tables, for a person; returns what to warn of."""
    settings = result.settings
    count = sum(len(fold.episodes) for fold in result.folds)
    echo(
        f"{settings['model']}, {settings['method']}, {settings['refine']}: {count} episodes, "
        f"{settings['ways']}-way {settings['shots']}-shot"
    )
    echo_lines(str(result))
    lines = _listed([f"left out: {where}: {why}" for where, why in result.errors.items()])
    if lines:
        drawn = settings["episodes"] * len(result.folds)
        lines.insert(0, f"{drawn - count} of {drawn} episodes cannot be measured and are left out.")
    return lines


@command.command("faithfulness", cls=Command)
@click.argument("model")
@click.argument("data", type=FilePath(path_type=Path))
@measuring_options
@option("--comparisons", type=click.IntRange(1), metavar="N",
              help=f"How many to draw from a folder [{_SAMPLED}], or the first N lines of a file "
              "[all].")  # fmt: skip
@option("--arch", type=OneOf(list(SAMPLED)), default="triplet", show_default=True,
              help="What is compared: drawn so from a folder.")  # fmt: skip
@rare_option("--control", "controls", type=OneOf(list(CONTROLS)), multiple=True,
              default=list(CONTROLS), show_default=True,
              help="Maps that know nothing of the network, measured as well; repeat.")  # fmt: skip
@rare_option(
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
    return Made(result, partial(_report_faithfulness, result))


def _items(data: Path, count: int | None, arch: str, seed: int) -> list[Item]:
    if data.is_dir():
        return sample_comparisons(data, count or _SAMPLED, arch=arch, seed=seed)
    return read_comparisons(data)[:count]


def _report_faithfulness(result: Evaluation) -> Sequence[str]:
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
    return _listed([f"{where}: {reason}" for where, reason in broken.items()])
