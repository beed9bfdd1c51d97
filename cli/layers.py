"""``simexplain layers``: what can be named with ``--layer``."""

from __future__ import annotations

from typing import Any

import click

from simexplain.errors import json_text

from .console import aligned, busy, echo, echo_lines
from .options import Command, model_from, model_options, option


@click.command("layers", cls=Command)
@click.argument("model")
@option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@model_options
def command(model: str, as_json: bool, **given: Any) -> None:
    """List every layer of MODEL that can carry a heatmap, in the order of execution.

    The layer marked with * is used when none is named, those with + by explain --sweep. Stride is
    image pixels per cell of the map.
    """
    with busy(f"Loading {model}"):
        loaded = model_from(model, given)
        layers = loaded.layers
    if as_json:
        rows = [layer.to_json() for layer in layers]
        echo_lines(json_text({"schema": 1, "model": loaded.name, "layers": rows}))
        return
    height, width = loaded.preprocess.size
    echo(f"{loaded.name}: {len(layers)} layers for images of {height}x{width}")
    table = [("", "layer", "kind", "channels", "map", "stride")]
    for layer in layers:
        channels, h, w = layer.shape
        vertical, horizontal = layer.stride
        stride = f"{vertical:g}" if vertical == horizontal else f"{vertical:g}, {horizontal:g}"
        mark = "*" if layer.default else "+" if layer.stage else ""
        table.append((mark, layer.name, layer.kind, str(channels), f"{h}x{w}", stride))
    echo_lines(aligned(table))
