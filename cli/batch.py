"""``simexplain batch``: thousands of comparisons from a CSV file, resumable."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from simexplain.batching.batching import explain_batch
from simexplain.batching.folder import MANIFEST, check_extra
from simexplain.batching.planning import ACCELERATORS, BatchOptions
from simexplain.errors import json_text
from simexplain.methods import PIXELS
from simexplain.training.run_folder import first_process

from .console import busy, echo, echo_lines, progress_bars, tell_files
from .method_options import method_from, method_options
from .options import (
    Command,
    FilePath,
    OneOf,
    model_from,
    model_options,
    option,
    rare_option,
    saving_options,
)

if TYPE_CHECKING:
    from simexplain.batching.result import BatchResult
    from simexplain.data.folders import StageProgress

_HOW = (
    "shard_rows", "memory", "batch_size", "pictures", "figures", "strict", "devices", "nodes",
    "accelerator",
)  # fmt: skip
_LISTED = 20
_of_run = partial(rare_option, group="Run")


@click.command("batch", cls=Command)
@click.argument("model")
@click.argument("comparisons", type=FilePath())
@saving_options("Folder to write.", required=True)
@option("--resume", is_flag=True, help="Go on with the run in the folder, exactly.")
@method_options
@option("--root", type=FilePath(file_okay=False),
              help="Folder that relative paths start from. [that of COMPARISONS]")  # fmt: skip
@option("--strict", is_flag=True, help="Refuse to begin while any row cannot be explained.")
@option("--pictures", is_flag=True, help="Also draw a heatmap over every picture.")
@option("--figures", is_flag=True, help="Also draw a figure of every row.")
@_of_run("--shard-rows", default=64, show_default=True, type=click.IntRange(min=1),
              help="Rows written at a time; what an interruption costs at most.")  # fmt: skip
@_of_run("--memory", default=1.0, show_default=True, type=click.FloatRange(min=0),
              help="Gigabytes to keep of pictures between rows, in each process.")  # fmt: skip
@_of_run("--batch-size", type=click.IntRange(min=1),
              help="Pictures in one forward pass. [1 on a CPU, else 16]")  # fmt: skip
@_of_run("--accelerator", type=OneOf(ACCELERATORS), default="auto", show_default=True,
              help="Where to run.")  # fmt: skip
@option(
    "--devices",
    type=click.IntRange(min=1),
    help="Processes on each host: GPUs, where there are. [1, or those of torchrun]",
)
@_of_run("--nodes", default=1, show_default=True, type=click.IntRange(min=1),
              help="Hosts: they must share one folder.")  # fmt: skip
@model_options
def command(
    model: str,
    comparisons: str,
    out: Path,
    resume: bool,
    force: bool,
    root: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Explain every row of COMPARISONS, a CSV file, with pictures embedded once for all rows.

    Its columns are anchor, positives and negatives (several paths in a cell are separated by ;) and
    perhaps id. The folder gets a table, results.parquet, and the maps; rows that cannot be
    explained are in the table with the reason. Examples:

    \b
      simexplain batch timm:tf_efficientnet_lite0 comparisons.csv --out batch
      simexplain batch timm:tf_efficientnet_lite0 comparisons.csv --out batch --resume
      torchrun --nproc-per-node 2 -m simexplain batch MODEL comparisons.csv --out batch
    """  # noqa: D301 - click wants the backspace character
    if resume and force:
        raise click.UsageError(
            "--resume goes on with a batch, --force replaces it; say one of them."
        )
    check_extra()
    how = BatchOptions(**{name: given.pop(name) for name in _HOW})
    earlier = None if resume else _stamp(out)
    with busy(f"Loading {model}"):
        network = model_from(model, given)
    given = method_from(network, given)
    known: list[str] = []

    def skipped(lines: Sequence[str]) -> None:
        known.extend(lines)
        _warn(lines)

    try:
        with _bars() as progress:
            result = explain_batch(
                network, comparisons, out, root=root, how=how, resume=resume, force=force,
                progress=progress, skipped=skipped, **given,
            )  # fmt: skip
    except KeyboardInterrupt:
        _interrupted(out, earlier)
    if not first_process():
        return
    if as_json:
        echo_lines(json_text(result.to_json()))
    else:
        report(result, known)


@contextmanager
def _bars() -> Iterator[StageProgress | None]:
    """Bars on a terminal, of the first of several processes only."""
    if not first_process():
        yield None
        return
    with progress_bars() as bars:
        yield bars


def _warn(lines: Sequence[str]) -> None:
    """Tells of all rows that are known not to work, before the work."""
    rows = "row" if len(lines) == 1 else "rows"
    echo(f"Warning: {len(lines)} {rows} cannot be explained and will be skipped:", err=True)
    for line in lines[:_LISTED]:
        echo(f"  {line}", err=True)
    if len(lines) > _LISTED:
        echo(f"  and {len(lines) - _LISTED} more, which the table has", err=True)


def report(result: BatchResult, known: Sequence[str] = ()) -> None:
    """Prints the result as text; ``known`` was reported before."""
    record = result.to_json()
    layers = "" if record["layers"] == [PIXELS] else f"layers {', '.join(record['layers'])}, "
    echo(f"{record['model']}, {layers}method {record['method']}")
    echo(f"{record['rows']} rows, {record['explained']} explained, {record['failed']} failed")
    if of := record["conditions"]["of"]:
        echo(f"the distances are as the roles demand in {record['conditions']['holds']} of {of}")
    work = result.work
    if work is None:
        echo("all rows were done already")
    elif work.forwards is not None:
        echo(f"{work.forwards} pictures went through the network; {work.separate} without sharing")
    fresh = [
        f"{own}: {why}"
        for own, why in result.failures.items()
        if not any(line.endswith(why) for line in known)
    ]
    for line in fresh[:_LISTED]:
        echo(f"Warning: row {line}", err=True)
    first = next(iter(record["warnings"]), None)
    tell_files(record["files"], () if first is None else (f"{first} (More: column warnings.)",))


def _stamp(out: Path) -> tuple[int, int] | None:
    """What identifies a manifest, None without one."""
    try:
        stat = (out / MANIFEST).stat()
    except (OSError, ValueError):
        return None
    return stat.st_ino, stat.st_mtime_ns


def _interrupted(out: Path, earlier: tuple[int, int] | None) -> None:
    """Says how to go on, where there is something to go on with."""
    if first_process():
        if _stamp(out) == earlier:
            raise KeyboardInterrupt
        words = [word for word in sys.argv[1:] if word not in ("--resume", "--force")]
        again = shlex.join(["simexplain", *words, "--resume"])
        echo(f"Error: Interrupted; go on with: {again}", err=True)
    raise click.exceptions.Exit(130)
