"""``simexplain train``: a network whose distances mean dissimilarity, from a folder of pictures."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from simexplain.data.datasets import DATASETS
from simexplain.errors import json_text
from simexplain.training.options import TrainOptions, titled
from simexplain.training.recipes import RECIPES, recipe_named
from simexplain.training.run_folder import CHECKPOINT, first_process
from simexplain.training.training import Source, begun_source, check_extra, train

from .console import aligned, echo, echo_lines, tell_files
from .options import (
    GROUP_HELP,
    OWN_GROUP,
    Command,
    FilePath,
    OneOf,
    field_options,
    given_fields,
    option,
    rare_option,
    saving_options,
)

if TYPE_CHECKING:
    from simexplain.training.recording import Listeners
    from simexplain.training.run_folder import TrainResult


def _list_recipes(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        rows = [(name, recipe.kind, recipe.about) for name, recipe in RECIPES.items()]
        echo_lines(aligned([("recipe", "kind", "what it trains"), *rows]))
        context.exit()


def _show_recipe(context: click.Context, option: click.Parameter, name: str | None) -> None:
    if name and not context.resilient_parsing:
        values = recipe_named(name).values.items()
        shown = [(setting, json.dumps(value), source) for setting, (value, source) in values]
        echo_lines(aligned([("setting", "value", "source"), *shown]))
        context.exit()


@click.command("train", cls=Command)
@click.argument("data", type=FilePath(path_type=Path))
@saving_options("Folder to write.", required=True)
@option("--resume", is_flag=True, help="Go on with the run in the folder, exactly.")
@option("--recipe", type=OneOf(list(RECIPES)), metavar="NAME",
              help="Settings of a paper, where none are given.")  # fmt: skip
@option("--list-recipes", is_flag=True, is_eager=True, expose_value=False,
              callback=_list_recipes, help="List the recipes and end.")  # fmt: skip
@rare_option("--show-recipe", metavar="NAME", is_eager=True, expose_value=False,
              callback=_show_recipe, help="Show a recipe with its sources and end.")  # fmt: skip
@option("--kind", type=OneOf(list(DATASETS)),
              help="What DATA is. [that of the recipe, else folder]")  # fmt: skip
@rare_option("--train-share", type=click.FloatRange(0, 1, min_open=True, max_open=True),
              help="Share of the classes that trains, the first by name: where DATA does not say. "
              "[0.5]")  # fmt: skip
@rare_option("--group", metavar="name|own|REGEX", help=GROUP_HELP)
@rare_option("--masks", metavar="FOLDER|alpha",
              help="Folder of masks: one of the same relative path for each picture, or alpha for "
              "their alpha channels. [none]")  # fmt: skip
@field_options(TrainOptions)
def command(
    data: Path,
    out: Path,
    force: bool,
    resume: bool,
    recipe: str | None,
    kind: str | None,
    train_share: float | None,
    group: str | None,
    masks: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Train a network so that distances between its embeddings mean dissimilarity.

    DATA is a folder with a sub-folder of pictures for each class (the first half of the classes
    trains, the rest is held out), or another data set by --kind. Every epoch retrieval is measured
    and attention is drawn; model.pt is the best model. Examples:

    \b
      simexplain train pictures/ --out trained
      simexplain train pictures/ --out trained --mining triplet --gamma 0.05
      simexplain train CUB/ --recipe avsl-proxyanchor-cub --out cub --devices 2
      simexplain train pictures/ --out trained --resume
    """  # noqa: D301 - click wants the backspace character
    if resume and force:
        raise click.UsageError("--resume goes on with a run, --force replaces it; say one of them.")
    check_extra()
    rule = None if group == OWN_GROUP else group
    reading = {"kind": kind, "train_share": train_share, "group": rule, "masks": masks}
    if group is not None and given["grouped"] is None:
        given["grouped"] = True
    source = _source(out, recipe, reading, resume=resume)
    earlier = None if resume else _stamp(out)
    settings = given_fields(TrainOptions, given)
    try:
        with _listening(quiet=as_json) as listeners:
            result = train(
                data, out=out, source=source, recipe=recipe, resume=resume, force=force,
                listeners=listeners, **settings,
            )  # fmt: skip
    except KeyboardInterrupt:
        _interrupted(out, earlier)
    if not first_process():
        return
    with _while_read():
        if as_json:
            echo_lines(json_text(result.to_json()))
        else:
            report(result)


def _source(
    out: Path, recipe: str | None, reading: dict[str, Any], *, resume: bool
) -> Source | None:
    """How the data are read: as given, else as in the run to resume, else as in the recipe."""
    given = {name: value for name, value in reading.items() if value is not None}
    if resume:
        return replace(begun_source(out), **given) if given else None
    return Source(**{"kind": recipe_named(recipe).kind if recipe else "folder", **given})


def _stamp(out: Path) -> tuple[int, int] | None:
    """What identifies a checkpoint, None without one."""
    try:
        stat = (out / CHECKPOINT).stat()
    except (OSError, ValueError):
        return None
    return stat.st_ino, stat.st_mtime_ns


def _interrupted(out: Path, earlier: tuple[int, int] | None) -> None:
    """Says how to go on, where there is something to go on with.

    Args:
        out: The folder of the run.
        earlier: The stamp of the checkpoint that this run was to replace.
    """
    if first_process():
        if _stamp(out) == earlier:
            raise KeyboardInterrupt
        words = [word for word in sys.argv[1:] if word not in ("--resume", "--force")]
        again = shlex.join(["simexplain", *words, "--resume"])
        echo(f"Error: Interrupted; go on with: {again}", err=True)
    raise click.exceptions.Exit(130)


def report(result: TrainResult) -> None:
    """Prints what came of it, for a person."""
    if result.untrained:
        names = list(result.reached)
        rows = [
            (what, *(f"{values[name]:.3f}" for name in names))
            for what, values in (
                ("before training", result.untrained),
                (f"epoch {result.best_epoch}, the best", result.reached),
            )
        ]
        echo_lines(aligned([("", *map(titled, names)), *rows]))
    tell_files(result.files, result.warnings)


def epoch_line(row: dict[str, Any], epochs: int | None = None) -> str:
    """A row of ``metrics.csv`` in a line."""
    number = f"epoch {row['epoch']:>3}" + (f"/{epochs}" if epochs else "")
    cells = [number]
    if "loss" in row:
        cells.append(f"loss {row['loss']:.4f}")
    cells += [f"{titled(n)} {v:.3f}" for n, v in row.items() if n.startswith(("recall", "map_at"))]
    return "  ".join([*cells, f"{row['seconds']:.0f} s"])


@contextmanager
def _listening(*, quiet: bool) -> Iterator[Listeners | None]:
    """Bars and a line an epoch on a terminal, the lines alone in a pipe, nothing for JSON."""
    from simexplain.training.recording import Listeners

    if not sys.stderr.isatty() or not first_process():
        listener = None if quiet or not first_process() else _echo
        yield Listeners(epoch=listener)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
        main = bars.add_task("Training", total=None)
        side = bars.add_task("", visible=False)

        def step(done: int, total: int, loss: float) -> None:
            bars.update(main, completed=done, total=total, description=f"Training, loss {loss:.4f}")

        def work(what: str, done: int, total: int) -> None:
            bars.update(side, completed=done, total=total, description=what, visible=done < total)

        def epoch(row: dict[str, Any]) -> None:
            bars.console.print(epoch_line(row), highlight=False, soft_wrap=True)

        yield Listeners(step, epoch, work)


def _echo(row: dict[str, Any]) -> None:
    with _while_read():
        echo(epoch_line(row))


@contextmanager
def _while_read() -> Iterator[None]:
    """Says what there is to say; who reads a pipe may go away, since the run matters more."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
