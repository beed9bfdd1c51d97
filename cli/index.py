"""``simexplain index``: embeddings of a gallery and what explains them, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from simexplain.data.folders import left_out_of
from simexplain.errors import OutputError, json_text
from simexplain.searching.index import build_index, remove_from_index, update_index
from simexplain.searching.index_file import work_folder
from simexplain.searching.index_gallery import GalleryIndex, open_index, report_of

from .console import busy, echo, echo_lines, progress_bars, tell_hardly_seen, tell_shares
from .options import (
    Command,
    FilePath,
    batch_size_option,
    check_file,
    model_from,
    model_options,
    option,
    saving_options,
)

_LISTED = 3


@click.command("index", cls=Command)
@click.argument("model")
@click.argument("folder", type=FilePath(path_type=Path))
@option("--add", is_flag=True,
              help="Add or refresh the pictures in FOLDER and leave all others in.")  # fmt: skip
@option("--remove", is_flag=True,
              help="Take FOLDER, or a picture, out of the index. MODEL is not loaded.")  # fmt: skip
@option("--layer", help="Layer of the maps: its positions are kept. [the model's default]")
@option("--no-basis", is_flag=True, help="Keep embeddings alone, which explain nothing.")
@option("--width", type=click.IntRange(1), metavar="D",
              help="Keep the D main dimensions of what positions add. [all, exact]")  # fmt: skip
@option(
    "--jacobians",
    type=click.IntRange(1),
    metavar="N",
    help="How many Jacobians to average where the network above the layer is curved.",
)
@batch_size_option
@saving_options(
    "File to write: the index; one that is there is brought up to date.",
    required=True, more=": the index is made anew",
)  # fmt: skip
@model_options
def command(
    model: str,
    folder: Path,
    out: Path,
    add: bool,
    remove: bool,
    force: bool,
    as_json: bool,
    batch_size: int,
    layer: str | None,
    no_basis: bool,
    width: int | None,
    jacobians: int | None,
    **given: Any,
) -> None:
    """Embed a folder of pictures, to be searched and explained.

    Beside each embedding the index keeps what every position adds to it, so that simexplain search
    can explain a hit without running the network on it. Run the same command again to bring the
    index up to date, or to go on after an interruption. Examples:

    \b
      simexplain index timm:tf_efficientnet_lite0 pictures/ --out pictures.index
      simexplain index timm:tf_efficientnet_lite0 more/ --out pictures.index --add
      simexplain index timm:tf_efficientnet_lite0 pictures/old --out pictures.index --remove
    """  # noqa: D301 - click wants the backspace character
    if add + remove + force > 1:
        raise click.UsageError("--add, --remove and --force exclude each other.")
    check_file(out, force=True)
    made = {"layer": layer, "width": width, "jacobians": jacobians, "no_basis": no_basis or None}
    fresh = force or not (out.exists() or add or remove)
    if not fresh:
        _check_choices(open_index(out), made)
    if remove:
        _tell(remove_from_index(out, folder), as_json=as_json)
        return
    with busy(f"Loading {model}"):
        network = model_from(model, given)
    try:
        with progress_bars() as progress:
            if fresh:
                index = build_index(
                    network, folder, out, layer=layer, batch_size=batch_size, basis=not no_basis,
                    width=width, jacobians=jacobians or 0, force=force, progress=progress,
                )  # fmt: skip
            else:
                index = update_index(
                    network, folder, out, drop=not add, batch_size=batch_size, progress=progress
                )
    except KeyboardInterrupt:
        if not work_folder(out).is_dir():
            raise
        echo("Error: Interrupted; the same command goes on where it was.", err=True)
        raise click.exceptions.Exit(130) from None
    left_out = left_out_of(folder) if folder.is_dir() else ""
    _tell(index, left_out, as_json=as_json)


def _check_choices(index: GalleryIndex, made: dict[str, Any]) -> None:
    """Refuses choices other than those with which an index was made.

    Raises:
        OutputError: If one differs; the error states what to do.
    """
    width = None if index.keeping.basis is None else index.keeping.basis.shape[1]
    jacobians = index.keeping.steps if index.has_basis else None
    own = {
        "layer": index.layer, "width": width, "jacobians": jacobians,
        "no_basis": not (index.has_basis or index.has_levels),
    }  # fmt: skip
    for name, value in made.items():
        if value is not None and value != own[name]:
            option = "--" + name.replace("_", "-")
            raise OutputError(
                f"'{index.path}' was not made with {option}"
                f"{'' if value is True else f' {value}'}; leave it away, or make the index anew "
                "with --force."
            )


def _tell(index: GalleryIndex, left_out: str = "", *, as_json: bool) -> None:
    """Prints what was done."""
    record = {**report_of(index), "warnings": [left_out] if left_out else []}
    if as_json:
        echo_lines(json_text(record))
        return
    where = f", layer {index.layer}" if index.layer else ""
    echo(f"{index.model_name}{where}: {_counted(len(index))}")
    tell_hardly_seen(index.paths, map(index.geometry, range(len(index))))
    changes = record["changes"]
    echo(", ".join(f"{number} {name}" for name, number in changes.items()))
    echo(_kept(index, record))
    if left_out:
        echo(left_out, err=True)
    if record["basis"] is not None:
        tell_shares(index.bypass, record["basis"]["unexplained"], of="embeddings")
    errors = list(index.errors.values())
    for reason in errors[:_LISTED]:
        echo(f"Warning: left out: {reason}", err=True)
    if len(errors) > _LISTED:
        echo(f"Warning: {len(errors) - _LISTED} more, listed by --json.", err=True)
    echo(f"index: {index.path}")


def _kept(index: GalleryIndex, record: dict[str, Any]) -> str:
    """What lies beside the embeddings."""
    size = f"{record['bytes_per_image'] / 1000:.0f} kB a picture"
    if index.has_levels:
        return f"kept: embeddings and the maps of {len(index.level_maps([0]))} levels, {size}"
    if not index.has_basis:
        return f"kept: embeddings alone, {size}. {index.without_basis}"
    basis = record["basis"]
    across = f"{basis['grid'][0]}x{basis['grid'][1]}"
    held = "" if basis["held"] == 1 else f", which hold {basis['held']:.1%} of them"
    return f"kept: what {across} positions add in {basis['width']} dimensions{held}, {size}"


def _counted(count: int) -> str:
    return f"{count} picture{'' if count == 1 else 's'}"
