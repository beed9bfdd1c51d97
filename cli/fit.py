"""``simexplain fit``: AVSL heads for a network that is already trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from simexplain.errors import json_text
from simexplain.fitting.posthoc import PostHoc, fit
from simexplain.models.avsl_options import ORIGINS, PRESETS
from simexplain.models.writing import check_savable, save_model

from .console import busy, echo, echo_lines, few, progress_bars, tell_left_out
from .options import (
    Command,
    FilePath,
    OneOf,
    check_file,
    model_from,
    model_options,
    option,
    saving_options,
)

_OWN = PostHoc()


@click.command("fit", cls=Command)
@click.argument("model")
@click.argument("folder", type=FilePath(path_type=Path))
@saving_options("File to write.", required=True)
@option("--unlabelled", is_flag=True, help="PCA heads and edges from images alone.")
@option(
    "--level",
    "levels",
    multiple=True,
    help="Layer that makes a level of AVSL; repeat. [the last three stages]",
)
@option("--nodes-per-level", "nodes", default=_OWN.nodes, show_default=True,
              help="How many nodes each level gets.")  # fmt: skip
@option(
    "--preset",
    type=OneOf(list(PRESETS)),
    default="paper",
    show_default=True,
    help="AVSL as in the paper or as in its authors' code.",
)
@option(
    "--epochs",
    default=_OWN.epochs,
    show_default=True,
    help="Passes over the pictures: to train the heads.",
)
@option(
    "--reliability-batches",
    default=_OWN.reliability_batches,
    show_default=True,
    help="Batches that train the reliabilities.",
)
@option("--seed", default=_OWN.seed, show_default=True, help="Random seed.")
@model_options
def command(
    model: str,
    folder: Path,
    out: Path,
    force: bool,
    unlabelled: bool,
    levels: tuple[str, ...],
    as_json: bool,
    nodes: int,
    preset: str,
    epochs: int,
    reliability_batches: int,
    seed: int,
    **given: Any,
) -> None:
    """Fit AVSL to a trained network, so that simexplain attribute can take its distances apart.

    FOLDER has a sub-folder of pictures for each class, or any pictures with --unlabelled. The
    network itself is not changed. Example:

    \b
      simexplain fit timm:tf_efficientnet_lite0 pictures/ --out avsl.pt
    """  # noqa: D301 - click wants the backspace character
    check_file(out, force=force)
    if given["fast"]:
        raise click.UsageError("--fast changes the network, which could then not be saved.")
    with busy(f"Loading {model}"):
        network = model_from(model, given)
    check_savable(network)
    with progress_bars() as progress:
        fitted = fit(
            network,
            folder,
            labelled=not unlabelled,
            progress=progress,
            levels=levels or None,
            nodes=nodes,
            preset=preset,
            epochs=epochs,
            reliability_batches=reliability_batches,
            seed=seed,
        )
    save_model(fitted, out, force=force)
    record = {"schema": 1, "model": fitted.name, **fitted.to_json(), "file": str(out)}
    if as_json:
        echo_lines(json_text(record))
        return
    echo(f"{fitted.name}: {ORIGINS[fitted.origin]}")
    for number, (level, width) in enumerate(zip(fitted.levels, fitted.widths, strict=True)):
        echo(f"level {number}: {level}, {width} nodes")
    report = dict(fitted.report)
    skipped, warnings = report.pop("skipped", []), report.pop("warnings", [])
    echo(", ".join(f"{name} {value}" for name, value in report.items()))
    if skipped:
        echo(f"Warning: {len(skipped)} pictures cannot be read: {few(skipped)}.", err=True)
    tell_left_out(folder)
    for text in warnings:
        echo(f"Warning: {text}", err=True)
    echo(f"model: {out}")
