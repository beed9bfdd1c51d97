"""``simexplain search``: the nearest pictures of a gallery, and why each was found."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from simexplain.searching.search import search
from simexplain.searching.search_pictures import verdict

from .console import aligned, busy, echo, echo_lines, progress_bars, tell_hardly_seen, tell_shares
from .options import Command, FilePath, model_from, model_options, option
from .result_commands import Made, makes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simexplain.searching.query import Box
    from simexplain.searching.search_result import Hit, SearchResult

_FOLDER = "search"


class BoxType(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """``40,60,120,90``: left, top, width and height in pixels of the picture."""

    name = "X,Y,W,H"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Box:
        """``(x, y, width, height)``."""
        try:
            x, y, width, height = (float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(
                f"expected a box such as 40,60,120,90 (left,top,width,height in pixels), got "
                f"{value!r}."
            )
        return x, y, width, height


@click.command("search", cls=Command)
@click.argument("model")
@click.argument("query", type=FilePath())
@click.argument("index", type=FilePath())
@option("-k", "k", type=click.IntRange(min=1), help="How many hits to show. [5, or all there are]")
@option("--region", type=BoxType(),
              help="Search for this part of the query alone, in pixels: left, top, width, height.",
)  # fmt: skip
@option(
    "--region-mask",
    "mask",
    type=FilePath(),
    metavar="FILE",
    help="As --region, by a picture of the query's size that is white there.",
)
@option(
    "--root",
    type=FilePath(),
    help="Folder that relative paths start from: where the gallery is now, if it was moved.",
)
@makes("SearchResult", f"Folder to write. [a new {_FOLDER}-N]", folder=_FOLDER)
@model_options
def command(
    model: str,
    query: str,
    index: str,
    k: int | None,
    region: Box | None,
    mask: str | None,
    root: str | None,
    **given: Any,
) -> Made:
    """Find the pictures nearest to QUERY and show why each was found.

    INDEX is a file made by simexplain index, or a folder of pictures, which is then indexed for
    this search alone. For each hit the figure shows where it and the query agree, and what sets it
    apart from the next class down; classes are the folders that the gallery is in, if it is. With
    --region or --region-mask only that part of the query is searched for, and boxed in every hit.
    For example:

    \b
      simexplain index timm:tf_efficientnet_lite0 photos/ --out photos.index
      simexplain search timm:tf_efficientnet_lite0 query.jpg photos.index --out found
      simexplain search timm:tf_efficientnet_lite0 query.jpg photos/ --region 40,60,120,90
    """  # noqa: D301 - click wants the backspace character
    if region is not None and mask is not None:
        raise click.UsageError("--region and --region-mask exclude each other; say one of them.")
    with busy(f"Loading {model}"):
        network = model_from(model, given)
    with progress_bars("Searching") as progress:
        result = search(
            network, query, index, k, region=region, mask=mask, root=root, progress=progress
        )
    return Made(result, partial(report, result))


def report(result: SearchResult) -> Sequence[str]:
    """Prints what was found, for a person; returns what to warn of."""
    layer = f", layer {result.layer}" if result.layer else ""
    echo(f"{result.model}{layer}")
    echo(verdict(result))
    if result.closeness:
        echo(result.closeness)
    shown = (result.query, *(hit.path for hit in result.hits))
    tell_hardly_seen(shown, (result.geometries[path] for path in shown))
    rests = [hit.unexplained for hit in result.hits if hit.unexplained is not None]
    tell_shares(result.bypass, max(rests, default=None))
    classes = any(hit.label is not None for hit in result.hits)
    head = ["rank", "cosine", "distance", "close", *(["class"] if classes else []), "picture"]
    reasons = result.query_maps is not None
    head += ["agrees most at"] if reasons else []
    head += ["box (x, y, w, h)"] if result.region is not None else []
    head += ["set apart by", "from"]
    rows = [head, *(_row(hit, result, classes=classes, reasons=reasons) for hit in result.hits)]
    echo_lines(aligned(rows))
    if result.hits[0].levels:
        echo("")
        echo("What each level adds to the distance")
        layers = [layer for layer, _ in result.hits[0].levels]
        shares = [[str(h.rank), *(f"{value:.4f}" for _, value in h.levels)] for h in result.hits]
        echo_lines(aligned([["rank", *layers], *shares]))
    return result.warnings


def _row(hit: Hit, result: SearchResult, *, classes: bool, reasons: bool) -> list[str]:
    cosine = "-" if hit.similarity is None else f"{hit.similarity:.4f}"
    close = "-" if hit.close is None else "yes" if hit.close else "no"
    row = [str(hit.rank), cosine, f"{hit.distance:.4f}", close]
    row += [hit.label or "-"] if classes else []
    row.append(_near(hit.path))
    if reasons:
        row.append("-" if hit.peak is None else f"{hit.peak[0]:.0f}, {hit.peak[1]:.0f}")
    if result.region is not None:
        row.append("-" if hit.box is None else ", ".join(f"{value:.0f}" for value in hit.box))
    if hit.rival is None or hit.gap is None:
        return [*row, "-", "-"]
    other = hit.rival.label or _near(hit.rival.path)
    return [*row, f"{hit.gap:+.4f}", f"{other} (rank {hit.rival.rank})"]


def _near(path: str) -> str:
    """A path as short as it can be written from here."""
    here = Path.cwd()
    full = Path(path)
    return str(full.relative_to(here)) if full.is_relative_to(here) else path
