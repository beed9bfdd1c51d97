"""``simexplain explain``: pictures in, heatmaps and a verdict out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from simexplain.comparison import positives_of
from simexplain.data.arrays import read_vectors
from simexplain.errors import ComparisonError, TwoImagesError
from simexplain.explaining import centroid, explain, explain_against
from simexplain.methods import PIXELS
from simexplain.models.frames import POOLINGS
from simexplain.models.loading import load_pair_model
from simexplain.models.pairs import PairModel
from simexplain.picturing import findings, verdict
from simexplain.rendering.overlay import RENDERERS

from .console import aligned, busy, echo, echo_lines, tell_hardly_seen, tell_shares
from .method_options import method_from, method_options
from .options import (
    Command,
    FilePath,
    OneOf,
    Size,
    comparison_options,
    loading_from,
    model_from,
    model_options,
    option,
    rare_option,
    together,
)
from .result_commands import Made, makes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from simexplain.explanation import Explanation
    from simexplain.models.base import SimilarityModel
    from simexplain.pair_explanation import PairExplanation

F = TypeVar("F", bound=Callable[..., Any])

_AGAINST = "Compared with texts, vectors and folders"
_KINDS = {
    "text": ("TEXT", "Text that the image should be like, through the text tower of MODEL"),
    "vector": ("FILE", "Vectors it should be like: .npy, .npz, .safetensors or .json"),
    "class_folder": ("DIR", "Folder whose mean embedding it should be near"),
}


def _vector_options() -> Iterator[Callable[[F], F]]:
    for name, (metavar, what) in _KINDS.items():
        flag, settings = name.replace("_", "-"), dict[str, Any](metavar=metavar, multiple=True)
        made = rare_option if name == "vector" else option
        yield made(f"--{flag}", group=_AGAINST, help=f"{what}; repeat.", **settings)
        yield rare_option(
            f"--not-{flag}", group=_AGAINST,
            help=f"As --{flag}, for what it should not be like; repeat.", **settings,
        )  # fmt: skip
    yield rare_option(
        "--direction", metavar="FILE", group=_AGAINST,
        help="File of one vector as a direction: the score is f . d, with its sign.",
    )  # fmt: skip


vector_options = together(*_vector_options())
"""Everything that :func:`vectors_from` wants."""


@dataclass(frozen=True)
class Sources:
    """Where the vectors come from.

    Attributes:
        positives: For each kind (``text``, ``vector``, ``class_folder``) what was given.
        negatives: Likewise.
        direction: The file of a direction, or None.
    """

    positives: dict[str, tuple[str, ...]]
    negatives: dict[str, tuple[str, ...]]
    direction: str | None

    def __bool__(self) -> bool:
        sides = [*self.positives.values(), *self.negatives.values()]
        return bool(self.direction or any(sides))

    def explain(self, model: SimilarityModel, path: str, given: dict[str, Any]) -> Explanation:
        """The picture at ``path`` explained against these vectors, with the method's options.

        Raises:
            SimexplainError: If a vector cannot be had or does not fit.
        """
        if self.direction:
            vectors = read_vectors(self.direction)
            return explain_against(model, path, vectors, direction=True, **given)
        near, far = (_vectors(model, side) for side in (self.positives, self.negatives))
        return explain_against(model, path, near, far, **given)


def vectors_from(given: dict[str, Any]) -> Sources:
    """Takes the options of :func:`vector_options` out of ``given``.

    Raises:
        click.UsageError: If a direction is given beside something else.
    """
    near = {kind: given.pop(kind) for kind in _KINDS}
    far = {kind: given.pop(f"not_{kind}") for kind in _KINDS}
    sources = Sources(near, far, given.pop("direction"))
    if sources.direction and (any(near.values()) or any(far.values())):
        raise click.UsageError("--direction is a score by itself; leave the other vectors away.")
    return sources


def _vectors(model: SimilarityModel, side: dict[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """The vectors of one side by their labels."""
    vectors: dict[str, Tensor] = {}
    named = list(side["text"])
    if named:
        vectors.update(zip(named, model.embed_text(named).cpu(), strict=True))
    for file in side["vector"]:
        vectors.update(read_vectors(file))
    for folder in side["class_folder"]:
        vectors[f"{Path(folder).name} (mean)"] = centroid(model, folder)
    wanted = len(named) + len(side["class_folder"])
    if len(vectors) < wanted:
        raise ComparisonError(f"Expected {wanted} different texts and folders, got {len(vectors)}.")
    return vectors


pair_options = together(
    rare_option(
        "--second-model", metavar="MODEL", group="Two towers",
        help="Another network for the images beside ANCHOR: two towers that share nothing.",
    ),
    rare_option(
        "--second-size", type=Size(), group="Two towers",
        help="Input size of that network in pixels.",
    ),
)  # fmt: skip
"""Everything that :func:`any_model_from` wants beside the options of one model."""


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
@rare_option("--frames", "pooling", type=click.Choice(list(POOLINGS)),
              help="How frames of one item are pooled: pictures of a folder given in place of a "
              "picture [mean], and with this option also pages of one file.")  # fmt: skip
@pair_options
@vector_options
@method_options
@option("--style", type=OneOf(list(RENDERERS)), multiple=True, default=["overlay"],
              show_default=True, help="How to draw; repeat for more rows.")  # fmt: skip
@makes("Explanation", f"Folder to write. [a new {_FOLDER}-N]", folder=_FOLDER)
@rare_option(
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

    MODEL is timm:NAME, torchvision:NAME, hf:ORG/NAME, a folder or a file, also one that scores two
    images. In place of OTHER there may be texts, vectors from files and centroids of folders. A
    folder in place of a picture is one item of several frames, with a map for each. Examples:

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
