"""``simexplain compare``: several methods on one comparison, side by side, with their scores."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from simexplain.comparison import positives_of
from simexplain.evaluation.comparing import compare
from simexplain.picturing import verdict
from simexplain.rendering.overlay import RENDERERS

from .console import busy, echo, echo_lines, progress_bar
from .method_options import asked_recipes, measuring_options, tell_long_work
from .options import (
    Command,
    FilePath,
    OneOf,
    comparison_options,
    model_from,
    model_options,
    option,
)
from .result_commands import Made, makes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simexplain.evaluation.results import MethodComparison

_FOLDER = "comparison"


@click.command("compare", cls=Command)
@click.argument("model")
@click.argument("images", type=FilePath(), nargs=-1, required=True)
@comparison_options
@option("--mask", "masks", multiple=True, type=FilePath(), metavar="FILE",
              help="What the map of an image should point at: once for each image, in their order, "
              "or none for an image without a mask. It is light or opaque there; a cut-out picture "
              "can be its own mask.")  # fmt: skip
@measuring_options
@option("--style", type=OneOf(list(RENDERERS)), default="overlay", show_default=True,
              help="How to draw.")  # fmt: skip
@makes("MethodComparison", f"Folder to write. [a new {_FOLDER}-N]", folder=_FOLDER)
@model_options
def command(
    model: str,
    images: tuple[str, ...],
    arch: str | None,
    masks: tuple[str, ...],
    style: str,
    **given: Any,
) -> Made:
    """Explain IMAGES by several methods, and measure how faithful each of them is to MODEL.

    IMAGES are the anchor, then positives, then negatives. Methods that do not apply to the model
    are skipped with the reason. Example:

    \b
      simexplain compare timm:tf_efficientnet_lite0 a.jpg b.jpg c.jpg \\
        --method sam:weights=signed --method decomposition
    """  # noqa: D301 - click wants the backspace character
    positives_of(arch, len(images), negative=given["negative"], positives=given["positives"])
    if masks and len(masks) != len(images):
        raise click.BadParameter(
            f"expected it once for each of {len(images)} images (none for no mask), got "
            f"{len(masks)}.",
            param_hint="--mask",
        )
    recipes = asked_recipes(given)
    with busy(f"Loading {model}"):
        network = model_from(model, given)
    known = [None if mask == "none" else mask for mask in masks] or None
    with progress_bar(f"Comparing {len(recipes)} methods") as progress:
        result = compare(
            network,
            images,
            recipes,
            arch=arch,
            masks=known,
            progress=progress,
            estimate=tell_long_work,
            **given,
        )
    return Made(result, partial(report, result), {"style": style})


def report(result: MethodComparison) -> Sequence[str]:
    """Prints the table, for a person; returns what to warn of."""
    echo(f"{result.first.model}, {verdict(result.first)}")
    echo_lines(str(result))
    own = [f"{one.name}: {text}" for one in result.methods for text in one.explanation.warnings]
    return (*result.notes, *own)
