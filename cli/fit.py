"""``simexplain fit``: AVSL heads for a network that is already trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from simexplain.fitting.posthoc import PostHoc, fit
from simexplain.models.avsl_options import ORIGINS, PRESETS
from simexplain.models.writing import check_savable, save_model
from simexplain.printing import json_text

from .console import echo, echo_lines
from .options import (
    FilePath,
    OneOf,
    busy,
    check_file,
    few,
    model_from,
    model_options,
    progress_bars,
    tell_left_out,
)

_OWN = PostHoc()


@click.command("fit")
@click.argument("model")
@click.argument("folder", type=FilePath(path_type=Path))
@click.option("--out", type=FilePath(path_type=Path), required=True, help="The file to write.")
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
@click.option("--unlabelled", is_flag=True, help="PCA heads and edges from images alone.")
@click.option("--level", "levels", multiple=True, help="Layer; repeat. [the last three stages]")
@click.option("--nodes", default=_OWN.nodes, show_default=True, help="Nodes of each level.")
@click.option(
    "--preset",
    type=OneOf(list(PRESETS)),
    default="paper",
    show_default=True,
    help="Follow the paper's text or its authors' code where they differ.",
)
@click.option("--epochs", default=_OWN.epochs, show_default=True, help="For the heads.")
@click.option(
    "--steps", default=_OWN.steps, show_default=True, help="Batches for the reliabilities."
)
@click.option("--seed", default=_OWN.seed, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
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
    steps: int,
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
            steps=steps,
            seed=seed,
        )
    save_model(fitted, out)
    said = {"schema": 1, "model": fitted.name, **fitted.to_json(), "file": str(out)}
    if as_json:
        echo_lines(json_text(said))
        return
    echo(f"{fitted.name}: {ORIGINS[fitted.origin]}")
    for number, (level, width) in enumerate(zip(fitted.levels, fitted.widths, strict=True)):
        echo(f"level {number}: {level}, {width} nodes")
    told = dict(fitted.report)
    skipped, warnings = told.pop("skipped", []), told.pop("warnings", [])
    echo(", ".join(f"{name} {value}" for name, value in told.items()))
    if skipped:
        echo(f"Warning: {len(skipped)} pictures cannot be read: {few(skipped)}.", err=True)
    tell_left_out(folder)
    for text in warnings:
        echo(f"Warning: {text}", err=True)
    echo(f"model: {out}")
