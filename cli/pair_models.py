"""Models of two images on the command line: two towers, or one file that scores pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from simexplain.errors import ComparisonError, TwoImagesError
from simexplain.explaining import explain
from simexplain.models.loading import load_pair_model
from simexplain.models.pairs import PairModel

from .console import echo, echo_lines
from .method_options import method_from
from .options import Size, aligned, loading_from, model_from

if TYPE_CHECKING:
    from simexplain.models.base import SimilarityModel
    from simexplain.pair_explanation import PairExplanation

F = TypeVar("F", bound=Callable[..., Any])


def pair_options(command: F) -> F:
    """Adds everything that :func:`any_model_from` wants beside the options of one model."""
    for option in (
        click.option("--second-size", type=Size(), help="Input size of that network in pixels."),
        click.option(
            "--second-model", metavar="MODEL",
            help="Another network for the images beside ANCHOR: two towers that share nothing.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def any_model_from(source: str, given: dict[str, Any]) -> SimilarityModel | PairModel:
    """Takes the model options out of ``given`` and loads the model, of one image or of two."""
    second, size = given.pop("second_model"), given.pop("second_size")
    kept = dict(given)
    if second is None:
        try:
            network = model_from(source, given)
        except TwoImagesError:
            given.update(kept)
        else:
            if size is not None:
                raise click.UsageError("--second-size is for models of two images; leave it away.")
            return network
    options = loading_from(given)
    if second is None:
        for name in ("weights", "output", "backbone", "keep_head", "distance"):
            options.pop(name)
    return load_pair_model(source, second, second_size=size, **options)


def explain_pair(
    network: PairModel, paths: Sequence[str], near: int, given: dict[str, Any]
) -> PairExplanation:
    """Explains pictures for a model of two images, with the method's options.

    Args:
        network: The model.
        paths: Anchor first, then positives, then negatives.
        near: How many are positives.
        given: What the command was given beside the options of models.

    Raises:
        ComparisonError: If an option does not apply to such models.
    """
    for name, usual in (("upscale", 1), ("pooling", None), ("sweep", False)):
        value = given[name] if name == "sweep" else given.pop(name)
        if value != usual:
            option = {"pooling": "frames"}.get(name, name)
            raise ComparisonError(
                f"{network.name} is a model of two images, which takes no --{option}; leave it "
                "away."
            )
    given["method"] = given["method"] or ("sam",)
    if network.learned and given["method"] == ("sam",):
        given["method"] = ("similarity_cam",)  # one number has nothing to weigh
    given = method_from(network.first, given)
    layer = given.pop("layer")
    if layer is not None and len(layer) == 1:
        (layer,) = layer
    return explain(network, paths, arch="set", positives=near, layer=layer, **given)


def report_pair(result: PairExplanation) -> Sequence[str]:
    """Prints what was found, for a person; returns what to warn of."""
    names = dict.fromkeys(side.model for side in result.sides)
    layers = " and ".join(side.layer for side in result.sides)
    echo(f"{' | '.join(names)}, layers {layers}, method {result.first.method}")
    rows = [("image", "role", "distance", "peak (x, y)")]
    far = [] if result.distances is None else result.distances[0].tolist()
    distances = ["", *(f"{value:.4f}" for value in far)]
    for side in result.sides:
        for picture, role, peak in zip(side.pictures, side.roles, side.peaks(), strict=True):
            where = "none" if peak is None else f"{peak[0]:.0f}, {peak[1]:.0f}"
            distance = distances[len(rows) - 1] if far else ""
            rows.append((Path(picture.path).name, role, distance, where))
    echo_lines(aligned(rows))
    echo(result.verdict())
    return result.warnings
