"""``simexplain explain``: pictures in, heatmaps and a verdict out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from simexplain.comparison import ARCHITECTURES, positives_of
from simexplain.errors import ComparisonError
from simexplain.explaining_files import explain_files
from simexplain.explanation import SCALES
from simexplain.methods import METHODS, PIXELS, option_from, options_of
from simexplain.methods.cams import CAMS
from simexplain.methods.weights import WEIGHTS
from simexplain.picturing import verdict
from simexplain.publishing import check_writable
from simexplain.rendering.overlay import RENDERERS
from simexplain.saving import MAIN_FILES, manifest

from .options import aligned, busy, free_folder, model_from, model_options

if TYPE_CHECKING:
    from simexplain.explanation import Explanation

_FOLDER = "explanation"
_OWN_OPTIONS = ("weights", "cam", "through_weights", "keep_negative")
"""Options of the default method that have a name of their own here."""


@click.command("explain")
@click.argument("model")
@click.argument("anchor", type=click.Path())
@click.argument("other", type=click.Path(), nargs=-1, required=True)
@click.option(
    "--arch",
    type=click.Choice(list(ARCHITECTURES)),
    required=True,
    help="siamese: 2 images; triplet: anchor, positive, negative; quadruplet: anchor, positive, "
    "2 negatives; set: anchor, positives, negatives.",
)
@click.option("--different", is_flag=True, help="The pair of a siamese comparison is dissimilar.")
@click.option("--positives", default=1, show_default=True, help="For set: how many are positives.")
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    metavar="NAME",
    default="sam",
    show_default=True,
    help=f"One of {', '.join(METHODS)}.",
)
@click.option(
    "--layer", multiple=True, help="Layer to explain; repeat to multiply several layers' maps."
)
@click.option("--sweep", is_flag=True, help="Explain the last layer of every resolution.")
@click.option(
    "--weights",
    type=click.Choice(list(WEIGHTS)),
    default="paper",
    show_default=True,
    help="; ".join(f"{name}: {rule.about}" for name, rule in WEIGHTS.items()) + ".",
)
@click.option(
    "--cam", type=click.Choice(list(CAMS)), multiple=True, help="Formula; once, or per layer."
)
@click.option("--through-weights", is_flag=True, help="Gradient through the weights as well.")
@click.option("--keep-negative", is_flag=True, help="Keep negative evidence in the saved maps.")
@click.option(
    "--option", "more", metavar="NAME=VALUE", multiple=True,
    help="Any option of the method, such as score=held; repeat.",
)  # fmt: skip
@click.option("--magnify", default=1.0, show_default=True, help="Enlarge the images, finer maps.")
@click.option("--scale", type=click.Choice(SCALES), default="image", show_default=True,
              help="Full heat: each image's own maximum, or one shared by all.")  # fmt: skip
@click.option("--style", type=click.Choice(list(RENDERERS)), multiple=True, default=["overlay"],
              show_default=True, help="How to draw; repeat for more rows.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), help=f"Folder. [a new {_FOLDER}-N]")
@click.option("--force", is_flag=True, help="Replace an explanation that is in the folder.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@model_options
def command(
    model: str,
    anchor: str,
    other: tuple[str, ...],
    arch: str,
    out: Path | None,
    force: bool,
    as_json: bool,
    style: tuple[str, ...],
    **given: Any,
) -> None:
    """Explain why MODEL finds ANCHOR and the OTHER images alike or different.

    MODEL is timm:NAME, torchvision:NAME or a file. Example:

    \b
      simexplain explain timm:tf_efficientnet_lite0 a.jpg b.jpg c.jpg --arch triplet
    """  # noqa: D301 - click wants the backspace character
    paths = [anchor, *other]
    different, positives = given.pop("different"), given.pop("positives")
    positives_of(arch, len(paths), different=different, positives=positives)
    out = out or free_folder(Path(_FOLDER))
    check_writable(out, MAIN_FILES, force=force)
    with busy(f"Loading {model}"):
        network = model_from(model, given)
    layer = network.stages if given.pop("sweep") else given["layer"] or None
    given.update(cam=_cams(given["cam"]), layer=layer)
    given = _for_method(given)
    with busy(f"Explaining {len(paths)} images"):
        result = explain_files(
            network, paths, arch, different=different, positives=positives, **given
        )
    with busy(f"Writing {out}"):
        files = result.save(out, force=force, styles=style)
    if as_json:
        click.echo(json.dumps(manifest(result, files), indent=2, ensure_ascii=False))
    else:
        report(result, files)


def _for_method(given: dict[str, Any]) -> dict[str, Any]:
    """Leaves options out that the method has not, unless they were given on purpose."""
    context = click.get_current_context()
    fields = {field.name: field for field in options_of(METHODS[given["method"]])}
    for name in _OWN_OPTIONS:
        source = context.get_parameter_source(name)
        if name not in fields and source is ParameterSource.DEFAULT:
            del given[name]
    for pair in given.pop("more"):
        name, equals, text = pair.partition("=")
        if not equals or name not in fields:
            raise click.BadParameter(
                f"expected NAME=VALUE with an option of {given['method']} "
                f"({', '.join(fields)}), got {pair!r}.",
                param_hint="--option",
            )
        try:
            given[name] = option_from(fields[name].default, name, text)
        except ComparisonError as error:
            raise click.BadParameter(str(error), param_hint="--option") from error
    return given


def report(result: Explanation, files: dict[str, str]) -> None:
    """Prints what was found, for a person."""
    where = "" if result.layers == (PIXELS,) else f"layer {result.layer}, "
    click.echo(f"{result.model}, {where}method {result.method}")
    rows = [("image", "role", "distance", "peak (x, y)")]
    distances = [None, *result.distances[0].tolist()]
    for picture, role, distance, peak in zip(
        result.pictures, result.roles, distances, result.peaks(), strict=True
    ):
        rows.append(
            (
                picture.path,
                role,
                "" if distance is None else f"{distance:.4f}",
                "none" if peak is None else f"{peak[0]:.0f}, {peak[1]:.0f}",
            )
        )
    click.echo(aligned(rows))
    click.echo(verdict(result))
    if result.moved is not None:
        moved = ", ".join(f"{value:.3f}" for value in result.moved[0].tolist())
        click.echo(f"magnifying moved the embeddings by cosine distances of {moved}")
    for warning in result.warnings:
        click.echo(f"Warning: {warning}", err=True)
    for kind in ("figure", "manifest", "maps"):
        click.echo(f"{kind}: {files[kind]}")
    heatmaps = [path for kind, path in files.items() if kind.startswith("heatmap")]
    click.echo(f"heatmaps: {', '.join(heatmaps)}")


def _cams(names: tuple[str, ...]) -> str | tuple[str, ...] | None:
    if len(names) == 1:
        return names[0]
    return names or None
