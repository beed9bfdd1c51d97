"""``simexplain explain``: pictures in, heatmaps and a verdict out."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from simexplain.comparison import positives_of
from simexplain.explaining import explain
from simexplain.methods import PIXELS
from simexplain.models.frames import POOLINGS
from simexplain.models.pairs import PairModel
from simexplain.picturing import findings, verdict
from simexplain.rendering.overlay import RENDERERS

from .console import echo, echo_lines
from .given_vectors import vector_options, vectors_from
from .method_options import method_from, method_options
from .options import (
    Command,
    FilePath,
    OneOf,
    aligned,
    busy,
    comparison_options,
    model_options,
    tell_hardly_seen,
    tell_shares,
)
from .pair_models import any_model_from, explain_pair, pair_options, report_pair
from .result_commands import Made, makes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simexplain.explanation import Explanation

_FOLDER = "explanation"
_ALONE = (
    "Expected another image beside ANCHOR, or --text, --vector, --class-folder or --direction to "
    "compare it with."
)


@click.command("explain", cls=Command)
@click.argument("model")
@click.argument("anchor", type=FilePath())
@click.argument("other", type=FilePath(), nargs=-1)
@comparison_options
@click.option("--frames", "pooling", type=click.Choice(list(POOLINGS)),
              help="How frames of one item are pooled: pictures of a folder given in place of a "
              "picture [mean], and with this option also pages of one file.")  # fmt: skip
@pair_options
@vector_options
@method_options
@click.option("--style", type=OneOf(list(RENDERERS)), multiple=True, default=["overlay"],
              show_default=True, help="How to draw; repeat for more rows.")  # fmt: skip
@makes("Explanation", f"Folder to write. [a new {_FOLDER}-N]", folder=_FOLDER)
@click.option(
    "--check/--no-check",
    default=True,
    show_default=True,
    help="Test each map: hide what it marks, and as much elsewhere, and run the model again.",
)
@model_options
def command(
    model: str,
    anchor: str,
    other: tuple[str, ...],
    arch: str | None,
    style: tuple[str, ...],
    **given: Any,
) -> Made:
    """Explain why MODEL finds ANCHOR and the OTHER images alike or different.

    MODEL is timm:NAME, torchvision:NAME, hf:ORG/NAME, a folder or a file. In place of OTHER images
    there may be texts, vectors from files and centroids of folders, all positives or, with --not-,
    negatives. A folder in place of a picture is one item of several frames, such as a video clip or
    photographs of one thing, with a map for each. MODEL may be a file that scores two images, or
    the first of two towers. Examples:

    \b
      simexplain explain timm:tf_efficientnet_lite0 a.jpg b.jpg c.jpg
      simexplain explain timm:tf_efficientnet_lite0 a.jpg b.jpg --method sam:weights=relative
      simexplain explain clip-folder/ a.jpg --text "a red bag" --not-text "a blue bag"
      simexplain explain timm:tf_efficientnet_lite0 a.jpg --class-folder shop/bags
      simexplain explain tracker.pt2 template.jpg frame.jpg
    """  # noqa: D301 - click wants the backspace character
    paths = [anchor, *other]
    negative, positives = given.pop("negative"), given.pop("positives")
    vectors = vectors_from(given)
    if not vectors:
        if not other:
            raise click.UsageError(_ALONE)
        near = positives_of(arch, len(paths), negative=negative, positives=positives)
    elif other or arch or negative:
        raise click.UsageError(
            "Expected one image to explain against texts, vectors or folders, without other "
            "images, --arch or --negative."
        )
    with busy(f"Loading {model}"):
        network = any_model_from(model, given)
    if isinstance(network, PairModel):
        if vectors:
            raise click.UsageError(f"{model} scores pairs of images; give another image.")
        with busy(f"Explaining {len(paths)} images"):
            pair = explain_pair(network, paths, near, given)
        return Made(pair, partial(report_pair, pair), {"styles": style})
    given = method_from(network, given)
    with busy(f"Explaining {len(paths)} images"):
        if vectors:
            result = vectors.explain(network, anchor, given)
        else:
            result = explain(
                network, paths, arch=arch, negative=negative, positives=positives, **given
            )
    return Made(result, partial(report, result), {"styles": style})


def report(result: Explanation) -> Sequence[str]:
    """Prints what was found, for a person; returns what to warn of."""
    several = len(result.rows) > 1
    for number, row in enumerate(result.rows, start=1):
        where = "" if row.layers == (PIXELS,) else f"layer {row.layer}, "
        about = f"row {number}, {row.title}: " if several else ""
        echo(f"{about}{result.model}, {where}method {row.method}")
    echo_lines(aligned(_table(result)))
    tell_hardly_seen((picture.path for picture in result.pictures), result.geometries)
    echo(verdict(result))
    for row in result.rows:
        tell_shares(row.bypass, None if row.unexplained is None else row.unexplained.max())
    for index, role in enumerate(result.roles):
        for number, row in enumerate(result.rows, start=1):
            sentence = "" if row.check is None else row.check.says(0, index)
            if sentence:
                echo(f"{role}, row {number}: {sentence}" if several else f"{role}: {sentence}")
    for line in findings(result):
        echo(line)
    if result.check is not None:
        images = sum(row.check.images for row in result.rows if row.check is not None)
        echo(f"The check took {images} more passes of an image; --no-check leaves it away.")
    if result.moved is not None:
        moved = ", ".join(f"{value:.3f}" for value in result.moved[0].tolist())
        echo(f"upscaling moved the embeddings by cosine distances of {moved}")
    return result.notes()


def _table(result: Explanation) -> list[tuple[str, ...]]:
    """Every image and vector: role, distance, and where each row of maps peaks."""
    several = len(result.rows) > 1
    named = {vector.member: vector for vector in result.vectors}
    peaks = [row.peaks() for row in result.rows]
    heads = [f"peak {number} (x, y)" for number in range(1, 1 + len(peaks))]
    rows: list[tuple[str, ...]] = [
        ("image", "role", "distance", *(heads if several else ["peak (x, y)"]))
    ]
    distances = ["", *(f"{distance:.4f}" for distance in result.distances[0].tolist())]
    for member, (role, distance) in enumerate(zip(result.members, distances, strict=True)):
        if member in named:
            measured = "" if named[member].direction else distance
            rows.append((named[member].label, role, measured, *[""] * len(peaks)))
            continue
        for index in (number for number, own in enumerate(result.places) if own == member):
            columns = [
                "none" if (peak := own[index]) is None else f"{peak[0]:.0f}, {peak[1]:.0f}"
                for own in peaks
            ]
            rows.append((result.pictures[index].path, role, distance, *columns))
    return rows
