"""``simexplain segment``: find in a picture what other pictures show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click

from simexplain.evaluation.comparing import setup_from
from simexplain.segmentation.cue import REFINEMENTS, Cue, GrabCut, default_cue
from simexplain.segmentation.segmenting import AGGREGATES, ANCHORS, METHOD, VIEWS, segment

from .console import busy, echo, tell_hardly_seen, tell_shares
from .method_options import METHOD_HELP, MethodText
from .options import (
    Command,
    FilePath,
    OneOf,
    field_options,
    given_fields,
    model_from,
    model_options,
    option,
    rare_option,
    together,
)
from .result_commands import Made, makes

if TYPE_CHECKING:
    from collections.abc import Sequence


if TYPE_CHECKING:
    from simexplain.segmentation.result import Segmentation

F = TypeVar("F", bound=Callable[..., Any])
_FOLDER = "segmentation"

_of_mask = partial(rare_option, group="From the map to the mask")
segment_options = together(
    option(
        "--method", type=MethodText(), default=METHOD,
        help=f"{METHOD_HELP}. [{METHOD}, the row of explain that shows where the match is]",
    ),
    option(
        "--refine", type=OneOf(list(REFINEMENTS)), default="grabcut", show_default=True,
        help="How the map becomes a mask: GrabCut from the map, a threshold, Otsu's threshold, "
        "GrabCut from the box of the map, or GrabCut of the whole picture.",
    ),
    field_options(Cue),
    field_options(GrabCut),
    _of_mask("--aggregate", type=OneOf(list(AGGREGATES)), default="averaged",
                 show_default=True,
                 help="Several supports. "
                 + "; ".join(f"{name}: {about}" for name, about in AGGREGATES.items()) + "."),
    _of_mask("--anchor", type=OneOf(list(ANCHORS)), default="test", show_default=True,
                 help="Which image is the anchor. "
                 + "; ".join(f"{name}: {about}" for name, about in ANCHORS.items()) + "."),
    _of_mask("--view", type=OneOf(list(VIEWS)),
                 help="What of a picture is seen. "
                 + "; ".join(f"{name}: {about}" for name, about in VIEWS.items())
                 + ". [whole, or model with --fit]"),
)  # fmt: skip
"""Everything that :func:`segmenting_from` wants."""


def segmenting_from(given: dict[str, Any]) -> dict[str, Any]:
    """Takes these options out of ``given``, as ``segment`` has them.

    Raises:
        ComparisonError: If thresholds are not in order.
    """
    method, layer, options = setup_from(given.pop("method"))
    cue = replace(default_cue(method), **given_fields(Cue, given))
    # If a model's own fit is requested together with a named one.
    view = given.pop("view") or ("model" if given.get("fit") else "whole")
    return {
        "method": method,
        "layer": layer,
        **options,
        "cue": cue,
        "cut": GrabCut(**given_fields(GrabCut, given)),
        "refine": given.pop("refine"),
        "aggregate": given.pop("aggregate"),
        "anchor": given.pop("anchor"),
        "view": view,
    }


@click.command("segment", cls=Command)
@click.argument("model")
@click.argument("test", type=FilePath())
@click.argument("support", type=FilePath(), nargs=-1, required=True)
@option("--other", "others", type=FilePath(), multiple=True,
              help="A picture of another class, which the mask should leave out; repeat.",
)  # fmt: skip
@option("--support-mask", "support_masks", type=FilePath(), multiple=True,
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
