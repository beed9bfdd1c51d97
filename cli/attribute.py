"""``simexplain attribute``: a distance taken apart into the nodes of several levels."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from simexplain.attribution.attributing import attribute
from simexplain.models.avsl_options import ORIGINS
from simexplain.models.avsl_runs import expected_avsl

from .console import aligned, busy, echo, echo_lines, tell_hardly_seen
from .options import Command, FilePath, model_from, model_options, option
from .result_commands import Made, makes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simexplain.attribution.result import Attribution, Node, NodeDecomposition

_FOLDER = "attribution"
_DECOMPOSED = 8


@click.command("attribute", cls=Command)
@click.argument("model")
@click.argument("a", type=FilePath())
@click.argument("b", type=FilePath())
@click.argument("more", type=FilePath(), nargs=-1)
@option("--top", default=8, show_default=True, help="How many to list: nodes.")
@option(
    "--decompose",
    metavar="LEVEL:NODE",
    help="Take this node apart into the lower nodes that stand in for it; the graph shows it. "
    "LEVEL is a number from 0, the lowest, or a layer.",
)
@makes("Attribution", f"Folder to write. [a new {_FOLDER}-N]", folder=_FOLDER)
@model_options
def command(
    model: str,
    a: str,
    b: str,
    more: tuple[str, ...],
    top: int,
    decompose: str | None,
    **given: Any,
) -> Made:
    """Take the distance of pictures A and B apart: which nodes of which level make it up.

    MODEL is an AVSL model, such as simexplain fit writes. MORE pictures are compared with A as
    well; with one, the three are a triplet of anchor, positive and negative. Example:

    \b
      simexplain fit timm:tf_efficientnet_lite0 FOLDER --out avsl.pt
      simexplain attribute avsl.pt a.jpg b.jpg
    """  # noqa: D301 - click wants the backspace character
    if top < 0:
        raise click.BadParameter(f"expected a number of nodes, got {top}.", param_hint="--top")
    with busy(f"Loading {model}"):
        network = expected_avsl(model_from(model, given))
    with busy(f"Attributing {2 + len(more)} images"):
        result = attribute(network, a, [b, *more])
    apart = None if decompose is None else _place(result, decompose)
    parts = [] if apart is None else [result.decompose(*apart, n) for n in range(len(result))]
    return Made(result, partial(report, result, top, parts), {"top": top, "node": apart})


def _place(result: Attribution, text: str) -> tuple[int, int]:
    """``LEVEL:NODE`` as numbers."""
    level, _, node = text.rpartition(":")
    if not level or not (node.isascii() and node.isdigit()):
        raise click.BadParameter(
            f"expected LEVEL:NODE such as 2:17 or {result.levels[-1]}:17, got {text!r}.",
            param_hint="--decompose",
        )
    digits = level.removeprefix("-")
    number = int(level) if digits.isascii() and digits.isdigit() else level
    chosen = result.node(number, int(node))
    return chosen.level, chosen.node


def report(result: Attribution, top: int, parts: list[NodeDecomposition]) -> Sequence[str]:
    """Prints the account of every pair, for a person; returns what to warn of."""
    echo(f"{result.model}: {ORIGINS[result.origin]}")
    tell_hardly_seen(
        (picture.path for pair in result.pictures for picture in pair),
        (geometry for pair in result.geometries for geometry in pair),
    )
    for index in range(len(result)):
        _report_pair(result, index, top)
        if parts:
            _report_parts(parts[index])
    return result.warnings


def _report_pair(result: Attribution, index: int, top: int) -> None:
    first, second = (picture.path for picture in result.pictures[index])
    role = f" ({result.roles[index]})" if result.roles[index] else ""
    echo("")
    echo(f"{first} and {second}{role}")
    rows = [("level", "layer", "nodes", "contribution", "share")]
    contributions = result.level_contributions[index].tolist()
    shares = result.shares[index].tolist()
    for number in reversed(range(len(result.levels))):
        count = result.nodes[number].shape[1]
        rows.append(
            (
                str(number),
                result.levels[number],
                str(count),
                f"{contributions[number]:.6f}",
                f"{shares[number]:.1%}",
            )
        )
    total = sum(contributions)
    rows.append(("", "sum", "", f"{total:.6f}", f"{sum(shares):.1%}"))
    echo_lines(aligned(rows))
    residual = float(result.residual[index])
    echo(f"distance {float(result.distances[index]):.6f}, residual {residual:+.1e}")
    if top:
        nodes = result.top(top, index)
        echo("")
        echo(f"The {len(nodes)} nodes that contribute most")
        echo_lines(aligned([_HEAD, *(_line(node) for node in nodes)]))


_HEAD = ("node", "value", "reliability", "sensitivity", "contribution", "share")


def _line(node: Node) -> tuple[str, ...]:
    return (
        f"{node.level}:{node.node}",
        f"{node.value:.6f}",
        f"{node.reliability:.3f}",
        f"{node.sensitivity:.4f}",
        f"{node.contribution:.6f}",
        f"{node.share:.1%}",
    )


def _report_parts(parts: NodeDecomposition) -> None:
    """What a node brings to the distance by itself and through others."""
    name = f"{parts.node.level}:{parts.node.node}"
    echo("")
    echo(f"Node {name} brings {parts.flow:.6f}, {parts.own:.6f} of it its own value")
    if not parts.stand_ins:
        echo("no lower node stands in for it")
        return
    shown, rest = parts.stand_ins[:_DECOMPOSED], parts.stand_ins[_DECOMPOSED:]
    rows = [("stands in", "edge", "part", "value", "reliability")]
    rows += [
        (
            f"{part.node.level}:{part.node.node}",
            f"{part.edge:.4f}",
            f"{part.part:.6f}",
            f"{part.node.value:.6f}",
            f"{part.node.reliability:.3f}",
        )
        for part in shown
    ]
    if rest:
        rows.append((f"{len(rest)} more", "", f"{sum(part.part for part in rest):.6f}", "", ""))
    echo_lines(aligned(rows))
