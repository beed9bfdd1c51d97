"""``simexplain segment``: find in a picture what other pictures show."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from simexplain.segmentation.segmenting import segment

from .console import echo
from .options import (
    Command,
    FilePath,
    busy,
    model_from,
    model_options,
    tell_hardly_seen,
    tell_shares,
)
from .result_commands import Made, makes
from .segment_options import segment_options, segmenting_from

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simexplain.segmentation.result import Segmentation

_FOLDER = "segmentation"


@click.command("segment", cls=Command)
@click.argument("model")
@click.argument("test", type=FilePath())
@click.argument("support", type=FilePath(), nargs=-1, required=True)
@click.option("--other", "others", type=FilePath(), multiple=True,
              help="A picture of another class, which the mask should leave out; repeat.",
)  # fmt: skip
@click.option("--support-mask", "support_masks", type=FilePath(), multiple=True,
              help="Where the object is in a support, white or opaque; one for each support, in "
              "their order. [none is needed]")  # fmt: skip
@segment_options
@makes("Segmentation", f"Folder to write. [a new {_FOLDER}-N]", folder=_FOLDER)
@model_options
def command(
    model: str,
    test: str,
    support: tuple[str, ...],
    others: tuple[str, ...],
    support_masks: tuple[str, ...],
    **given: Any,
) -> Made:
    """Find in the picture TEST what the SUPPORT pictures show, and cut it out.

    The attention map of TEST, compared with the supports, is the cue for GrabCut. MODEL is
    timm:NAME, torchvision:NAME, hf:ORG/NAME, a folder or a file. Examples:

    \b
      simexplain segment timm:tf_efficientnet_lite0 test.jpg cat.jpg
      simexplain segment timm:tf_efficientnet_lite0 test.jpg cat.jpg --other dog.jpg
    """  # noqa: D301 - click wants the backspace character
    options = segmenting_from(given)
    with busy(f"Loading {model}"):
        network = model_from(model, given)
    with busy(f"Segmenting {test}"):
        result = segment(
            network, test, support, others, support_masks=support_masks or None, **options
        )
    return Made(result, partial(report, result))


def report(result: Segmentation) -> Sequence[str]:
    """Prints what was found, for a person; returns what to warn of."""
    echo(f"{result.model}, layer {' x '.join(result.layers)}, method {result.method}")
    counts = [sum(one.role == role for one in result.images) for role in ("support", "other")]
    against = f", {counts[1]} of another class" if counts[1] else ""
    echo(f"{result.name}: {counts[0]} of the class to find{against}, by {result.refine}")
    tell_hardly_seen((result.name, *(one.name for one in result.images)), result.geometries)
    tell_shares(result.bypass, None)
    if result.box is None:
        echo("nothing was found")
        return result.warnings
    left, top, right, bottom = result.box
    height, width = result.mask.shape
    echo(
        f"the mask covers {result.share:.1%} of {width}x{height} pixels, from ({left}, {top}) to "
        f"({right - 1}, {bottom - 1})"
    )
    return result.warnings
