"""What ``segment`` and ``evaluate segmentation`` share: from a map to a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import click

from simexplain.errors import ComparisonError
from simexplain.evaluation.recipes import recipe_from
from simexplain.methods import METHODS
from simexplain.segmentation.attending import ANCHORS, SEVERAL
from simexplain.segmentation.cue import REFINEMENTS, default_cue
from simexplain.segmentation.grabcut import GrabCut
from simexplain.segmentation.segmenting import METHOD
from simexplain.segmentation.segmenting_files import VIEWS

from .options import OneOf

F = TypeVar("F", bound=Callable[..., Any])

_THRESHOLDS = ("sure", "probable", "background")
_CUT = GrabCut()
_OPTIONS = (
    click.option(
        "--method", metavar="NAME[@LAYER+LAYER][:OPTION=VALUE,...]", default=METHOD,
        show_default=True,
        help=f"What makes the map; sam is the paper's. NAME is one of {', '.join(METHODS)}.",
    ),
    click.option(
        "--by", type=OneOf(list(REFINEMENTS)), default="grabcut", show_default=True,
        help="From the map to a mask: GrabCut from the map, its probable threshold, Otsu's, "
        "GrabCut from its box, or GrabCut without it.",
    ),
    click.option("--sure", type=click.FloatRange(0), metavar="SHARE",
                 help="Of the map's maximum: from here on a pixel is object. [the method's]"),
    click.option("--probable", type=click.FloatRange(0, 1, min_open=True), metavar="SHARE",
                 help="From here on it is probably object. [the method's]"),
    click.option("--background", type=click.FloatRange(0, 1), metavar="SHARE",
                 help="Below it is background. [the method's]"),
    click.option("--iterations", default=_CUT.iterations, show_default=True,
                 type=click.IntRange(1), help="Of GrabCut."),
    click.option("--longest", default=_CUT.longest, show_default=True, type=click.IntRange(16),
                 help="Pixels of the longer side at which GrabCut works."),
    click.option("--several", type=OneOf(list(SEVERAL)), default="averaged",
                 show_default=True,
                 help="; ".join(f"{name}: {about}" for name, about in SEVERAL.items()) + "."),
    click.option("--anchor", type=OneOf(list(ANCHORS)), default="test", show_default=True,
                 help="; ".join(f"{name}: {about}" for name, about in ANCHORS.items()) + "."),
    click.option("--view", type=OneOf(list(VIEWS)),
                 help="; ".join(f"{name}: {about}" for name, about in VIEWS.items())
                 + ". [whole, or model with --fit]"),
)  # fmt: skip


def segment_options(command: F) -> F:
    """Adds everything that :func:`segmenting_from` wants."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def segmenting_from(given: dict[str, Any]) -> dict[str, Any]:
    """Takes these options out of ``given``, as ``segment_files`` has them.

    Raises:
        click.BadParameter: If the method or an option of it is unknown.
        ComparisonError: If thresholds are not in order.
    """
    try:
        method, layer, options = recipe_from(given.pop("method"))
    except ComparisonError as error:
        raise click.BadParameter(str(error), param_hint="--method") from error
    named = {name: given.pop(name) for name in _THRESHOLDS}
    chosen = {name: value for name, value in named.items() if value is not None}
    # A model's own fit was asked for where one is named.
    view = given.pop("view") or ("model" if given.get("fit") else "whole")
    return {
        "method": method,
        "layer": layer,
        **options,
        "cue": replace(default_cue(method), **chosen),
        "cut": GrabCut(given.pop("iterations"), longest=given.pop("longest")),
        "by": given.pop("by"),
        "several": given.pop("several"),
        "anchor": given.pop("anchor"),
        "view": view,
    }
