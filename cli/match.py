"""``simexplain match``: which region of one picture answers to which of another."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from simexplain.matching.factors import SCORES, STYLES
from simexplain.matching.matching import Patience, match
from simexplain.matching.pictures import summary

from .console import aligned, busy, echo, echo_lines, tell_hardly_seen, tell_shares
from .options import Command, FilePath, OneOf, model_from, model_options, option
from .result_commands import Made, makes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simexplain.matching.result import Matching, Point

_FOLDER = "matching"


class Place(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """``120,85``: x from the left edge and y from the upper one, in pixels of the picture."""

    name = "X,Y"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, float]:
        """``(x, y)``."""
        try:
            x, y = (float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"expected a point such as 120,85 (x,y in pixels), got {value!r}.")
        return x, y


@click.command("match", cls=Command)
@click.argument("model")
@click.argument("a", type=FilePath())
@click.argument("b", type=FilePath())
@option(
    "--at", "points", type=Place(), multiple=True,
    help="A point of A in pixels: show what corresponds to it in B; repeat. [the strongest "
    "matches]",
)  # fmt: skip
@option("--layer", help="Layer of the maps: its positions are matched. [the model's default]")
@option("--score", type=OneOf(list(SCORES)), default="cosine", show_default=True,
              help="Score that is taken apart. "
              + "; ".join(f"{name}: {score.about}" for name, score in SCORES.items()) + ".",
)  # fmt: skip
@option("--formula", type=OneOf(list(STYLES)), default="exact", show_default=True,
              help="Formula for the pairs. "
              + "; ".join(f"{name}: {about}" for name, about in STYLES.items()) + ".",
)  # fmt: skip
@option("--jacobians", default=16, show_default=True, type=click.IntRange(min=1),
              help="How many Jacobians to average where the network above the layer is curved.",
)  # fmt: skip
@option("--top", default=8, show_default=True, type=click.IntRange(min=0),
              help="How many to list: pairs of positions.")  # fmt: skip
@makes("Matching", f"Folder to write. [a new {_FOLDER}-N]", folder=_FOLDER)
@model_options
def command(
    model: str,
    a: str,
    b: str,
    points: tuple[Point, ...],
    layer: str | None,
    score: str,
    formula: str,
    jacobians: int,
    top: int,
    **given: Any,
) -> Made:
    """Show which region of picture A corresponds to which region of picture B.

    The score of the two is taken apart, exactly, into what every pair of their positions adds.
    MODEL is timm:NAME, torchvision:NAME, hf:ORG/NAME, a folder or a file. Example:

    \b
      simexplain match timm:tf_efficientnet_lite0 a.jpg b.jpg --at 120,85
    """  # noqa: D301 - click wants the backspace character
    with busy(f"Loading {model}"):
        network = model_from(model, given)
    patience = Patience(lambda text: echo(f"Note: {text}", err=True))
    with busy("Matching 2 images"):
        result = match(
            network,
            a,
            b,
            layer,
            score=score,
            formula=formula,
            jacobians=jacobians,
            progress=patience,
        )
    chosen = points or None
    return Made(result, partial(report, result, chosen, top), {"points": chosen, "top": top})


def report(result: Matching, points: Sequence[Point] | None, top: int) -> Sequence[str]:
    """Prints what was found, for a person; returns what to warn of."""
    first, second = (picture.path for picture in result.pictures[0])
    echo(f"{result.model}, layer {result.layer}, formula {result.style}")
    echo(f"{first} and {second}")
    tell_hardly_seen(
        (picture.path for pair in result.pictures for picture in pair),
        (geometry for pair in result.geometries for geometry in pair),
    )
    echo(summary(result, 0))
    tell_shares(result.bypass, None if (own := result.unexplained) is None else float(own[0]))
    shown = result.default_points() if points is None else points
    answers = [result.best(*point) for point in shown]
    for title, pairs in (
        ("What answers most to a point", answers),
        ("The strongest pairs of positions", result.top(top)),
        (
            "Each other's best, by what is particular to the two",
            result.top(top, mutual=True, by="specific"),
        ),
    ):
        if pairs:
            rows = [("in A (x, y)", "in B (x, y)", "adds", "share", "particular")]
            rows += [
                (_pixel(p.a), _pixel(p.b), f"{p.value:+.6f}", f"{p.share:+.2%}",
                 f"{p.specific:+.6f}")
                for p in pairs
            ]  # fmt: skip
            echo_lines(f"\n{title}\n{aligned(rows)}")
    return result.warnings


def _pixel(point: Point) -> str:
    return f"{point[0]:.0f}, {point[1]:.0f}"
