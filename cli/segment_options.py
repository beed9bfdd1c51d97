"""What ``segment`` and ``evaluate segmentation`` share: from a map to a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import click

from simexplain.evaluation.comparing import setup_from
from simexplain.segmentation.cue import REFINEMENTS, GrabCut, default_cue
from simexplain.segmentation.segmenting import AGGREGATES, ANCHORS, METHOD, VIEWS

from .method_options import METHOD_HELP, MethodText
from .options import OneOf

F = TypeVar("F", bound=Callable[..., Any])

_THRESHOLDS = ("sure", "probable", "background")
_CUT = GrabCut()
_OPTIONS = (
    click.option(
        "--method", type=MethodText(), default=METHOD,
        help=f"{METHOD_HELP}. [{METHOD}, the row of explain that shows where the match is]",
    ),
    click.option(
        "--refine", type=OneOf(list(REFINEMENTS)), default="grabcut", show_default=True,
        help="How the map becomes a mask: GrabCut from the map, a threshold, Otsu's threshold, "
        "GrabCut from the box of the map, or GrabCut of the whole picture.",
    ),
    click.option("--sure", type=click.FloatRange(0), metavar="SHARE",
                 help="Share of the map's maximum from which a pixel is object. [the method's]"),
    click.option("--probable", type=click.FloatRange(0, 1, min_open=True), metavar="SHARE",
                 help="Share from which it is probably object. [the method's]"),
    click.option("--background", type=click.FloatRange(0, 1), metavar="SHARE",
                 help="Share below which it is background. [the method's]"),
    click.option("--iterations", default=_CUT.iterations, show_default=True,
                 type=click.IntRange(1), help="How often GrabCut is repeated."),
    click.option("--longest", default=_CUT.longest, show_default=True, type=click.IntRange(16),
                 help="Pixels of the longer side at which GrabCut works."),
    click.option("--aggregate", type=OneOf(list(AGGREGATES)), default="averaged",
                 show_default=True,
                 help="Several supports. "
                 + "; ".join(f"{name}: {about}" for name, about in AGGREGATES.items()) + "."),
    click.option("--anchor", type=OneOf(list(ANCHORS)), default="test", show_default=True,
                 help="Which image is the anchor. "
                 + "; ".join(f"{name}: {about}" for name, about in ANCHORS.items()) + "."),
    click.option("--view", type=OneOf(list(VIEWS)),
                 help="What of a picture is seen. "
                 + "; ".join(f"{name}: {about}" for name, about in VIEWS.items())
                 + ". [whole, or model with --fit]"),
)  # fmt: skip


def segment_options(command: F) -> F:
    """Adds everything that :func:`segmenting_from` wants."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def segmenting_from(given: dict[str, Any]) -> dict[str, Any]:
    """Takes these options out of ``given``, as ``segment`` has them.

    Raises:
        ComparisonError: If thresholds are not in order.
    """
    method, layer, options = setup_from(given.pop("method"))
    named = {name: given.pop(name) for name in _THRESHOLDS}
    chosen = {name: value for name, value in named.items() if value is not None}
    # If a model's own fit is requested together with a named one.
    view = given.pop("view") or ("model" if given.get("fit") else "whole")
    return {
        "method": method,
        "layer": layer,
        **options,
        "cue": replace(default_cue(method), **chosen),
        "cut": GrabCut(given.pop("iterations"), longest=given.pop("longest")),
        "refine": given.pop("refine"),
        "aggregate": given.pop("aggregate"),
        "anchor": given.pop("anchor"),
        "view": view,
    }
