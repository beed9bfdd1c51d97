"""``simexplain bank``: grad-weights of a labelled folder, for maps without a backward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from simexplain.errors import json_text
from simexplain.fitting.bank import BankOptions, build_bank

from .console import busy, echo, echo_lines, few, progress_bars, tell_left_out
from .options import (
    Command,
    FilePath,
    check_file,
    model_from,
    model_options,
    option,
    saving_options,
)

_OWN = BankOptions()


@click.command("bank", cls=Command)
@click.argument("model")
@click.argument("folder", type=FilePath(path_type=Path))
@saving_options("File to write.", required=True)
@option("--layer", help="Layer of the maps. [the model's default]")
@option(
    "--triplets", default=_OWN.triplets, show_default=True, help="Triplets drawn for each picture."
)
@option(
    "--margin",
    default=_OWN.margin,
    show_default=True,
    help="Margin of the triplet loss, on squared distances of unit embeddings.",
)
@option("--seed", default=_OWN.seed, show_default=True, help="Random seed.")
@model_options
def command(
    model: str,
    folder: Path,
    out: Path,
    force: bool,
    layer: str | None,
    triplets: int,
    margin: float,
    seed: int,
    as_json: bool,
    **given: Any,
) -> None:
    """Store what sets the pictures of each class apart, for maps without a backward pass.

    FOLDER has a sub-folder of pictures for each class. The method weight_bank then explains any
    picture with the weights of the most similar ones in the bank. Example:

    \b
      simexplain bank timm:tf_efficientnet_lite0 pictures/ --out bank.safetensors
      simexplain explain timm:tf_efficientnet_lite0 a.jpg b.jpg \\
        --method weight_bank:bank=bank.safetensors
    """  # noqa: D301 - click wants the backspace character
    check_file(out, force=force)
    with busy(f"Loading {model}"):
        network = model_from(model, given)
    with progress_bars() as progress:
        bank = build_bank(
            network,
            folder,
            progress=progress,
            layer=layer,
            triplets=triplets,
            margin=margin,
            seed=seed,
        )
    bank.save(out, force=force)
    report = dict(bank.report)
    skipped = report.pop("skipped", [])
    if as_json:
        record = {
            "schema": 1, "model": bank.model, "layer": bank.layer,
            "channels": bank.weights.shape[1], "report": dict(bank.report), "file": str(out),
        }  # fmt: skip
        echo_lines(json_text(record))
        return
    echo(f"{bank.model}, layer {bank.layer}, {bank.weights.shape[1]} channels")
    echo(f"{report['images']} images of {report['classes']} classes")
    echo(f"{report['active']:.0%} of {report['triplets']} triplets each have a loss above zero")
    tell_left_out(folder)
    if report["left_out"]:
        echo(
            f"Warning: {report['left_out']} pictures are left out, being alone in their class or "
            "without a triplet whose loss is above zero.",
            err=True,
        )
    if skipped:
        echo(f"Warning: {len(skipped)} pictures cannot be read: {few(skipped)}.", err=True)
    echo(f"bank: {out}")
