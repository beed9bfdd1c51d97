"""The page of ``correspondence.py``, from its record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from store import header, line
from warps import CONTROLS, GRID, LEVELS

TOLERANCES = (0.05, 0.1, 0.2)
"""Of answers that count as correct, as shares of the side."""

MIDDLE = 1
"""The place among the tolerances of the one that methods are compared at."""

OWN = ("match, adds", "match, particular")
SEEN = ("nearest neighbour", "neighbour by relevance")
FREE = ("same place", "chance")
"""Need no network."""

WARPS = tuple(f"{kind}, {level}" for kind in CONTROLS for level in LEVELS)
SOURCES = ("photographs", "cut-outs")

LEVEL_TEXT = "; ".join(
    f"*{level}*, at most {share} of the side and {degrees} degrees"
    for level, (share, degrees) in LEVELS.items()
)

HEAD = f"""# Is the same place found again?

A picture and its warped copy: a point of the copy has a known partner in the picture. Does
[match](../matching.md) find it? Homographies move the four corners, thin-plate splines a grid of
4 x 4 points, at random, after a turn by half to all of an angle: {LEVEL_TEXT}.
Each picture is warped once in each of the six ways; {GRID} x {GRID} points are queried, except
those whose partner lies outside. Pictures: squares cut from photographs of scikit-image,
scikit-learn and OpenCV's examples, every third one for each seed, and scenes of two held-out
cut-outs on a ground, where the objects' points alone count.

PCK is the share of points whose answer, the centre of the position where the method's map is
hottest, is at most so far from the partner, in sides of the picture. A grid of 7 x 7 has centres up
to 0.1 away from a point, one of 14 x 14 up to 0.05, one of 4 x 4 up to 0.18. ± is the standard
error over pairs; *less neighbour* is the difference in PCK at 0.1 from the nearest neighbour at the
same layer, pair by pair. *Mutual* is the share of points whose answer's best answer is in turn the
point's position, then comes PCK at 0.1 of these alone.

| method | the map of a point |
| --- | --- |
| `match, adds` | `Matching.at`: what the positions add to the cosine |
| `match, particular` | of `Matching.interaction`: what is particular to the two positions |
| `nearest neighbour` | cosine of the layer's features |
| `neighbour by relevance` | cosine of the features' relevance, see below |
| `same place` | the point's own place |
| `chance` | a random place |

Relevance is feature times gradient of the dot product of the two embeddings. It stands for PAIR-X,
which matches intermediate features and weighs them by relevance; it has the idea, not the code.

`default` is the model's default layer, `finer` the last one of the next finer resolution (of the
transformer, of the block before). Where the network above a layer is not linear, `match` takes one
Jacobian for each of 4 steps; that is the more costly the earlier the layer, so at the finer one it
ran on one photograph a seed and two networks.

A warped copy has the same colours and textures, so that networks with random weights find places as
well: the task measures whether a method keeps places apart, not whether a network has learned
anything.
"""


def page(record: Mapping[str, Any]) -> str:
    """The tables, as Markdown."""
    lines = [HEAD, "Written by", "", f"    {record['command']}", "", "## What follows", ""]
    lines += [*_follows(record["networks"]), "", "## All pairs", "", *_all(record["networks"])]
    for name, layers in record["networks"].items():
        lines += ["", f"## {name}", "", "PCK at 0.1.", "", *_by_group(layers)]
    return "\n".join(lines) + "\n"


def _follows(networks: Mapping[str, Any]) -> list[str]:
    """One sentence a network."""
    lines = []
    for name, layers in networks.items():
        own = layers["default"]["all"]
        best = max((m for m in OWN if m in own), key=lambda m: _at(own, m))
        apart, error = own[best]["mean"][-1], own[best]["error"][-1]
        verdict = "above" if apart > 0 else "below"
        verdict = "about as good as" if abs(apart) <= 2 * error else verdict
        record = (
            f"- **{name}**: at the default layer `{best}` finds {_at(own, best):.2f} of the points "
            f"within a tenth of the side, {verdict} the nearest neighbour of the features there "
            f"({_at(own, SEEN[0]):.2f})."
        )
        if "finer" in layers:
            finer = _at(layers["finer"]["all"], SEEN[0])
            record += f" The nearest neighbour at the finer layer finds {finer:.2f}"
            record += f", the point's own place {_at(own, FREE[0]):.2f}."
        lines.append(record)
    return lines


def _at(methods: Mapping[str, Any], name: str) -> float:
    return methods[name]["mean"][MIDDLE]


def _all(networks: Mapping[str, Any]) -> list[str]:
    head = ["network", "layer", "method", "pairs", *(f"PCK {share}" for share in TOLERANCES)]
    lines = header([*head, "less neighbour", "mutual", "PCK of these"])
    free = next(iter(networks.values()))["default"]["all"]
    for name in FREE:
        lines.append(line(["–", "–", f"`{name}`", *_cells(free[name], free=True)]))
    for network, layers in networks.items():
        for layer, groups in layers.items():
            result = groups["all"]
            for name in (*OWN, *SEEN):
                if name in result:
                    lines.append(line([network, layer, f"`{name}`", *_cells(result[name])]))
    return lines


def _cells(record: Mapping[str, Any], *, free: bool = False) -> list[str]:
    shown = [_told(m, e) for m, e in zip(record["mean"], record["error"], strict=True)]
    *shares, mutual, trusted, apart = shown
    return [str(record["n"]), *shares, *(["–"] * 3 if free else [apart, mutual, trusted])]


def _told(mean: float | None, error: float | None) -> str:
    return "–" if mean is None or error is None else f"{mean:.2f} ± {error:.2f}"


def _by_group(layers: Mapping[str, Any]) -> list[str]:
    """A row for each method and layer, a column for each kind of pair."""
    groups = [g for g in (*WARPS, *SOURCES) if g in layers["default"]]
    lines = header(["layer", "method", *groups])
    rows: list[tuple[str, str]] = [("default", name) for name in FREE]
    rows += [(layer, name) for layer in layers for name in (*OWN, *SEEN)]
    for layer, name in rows:
        if name in layers[layer]["all"]:
            cells = [_middle(layers[layer][group].get(name)) for group in groups]
            lines.append(line(["–" if name in FREE else layer, f"`{name}`", *cells]))
    return lines


def _middle(record: Mapping[str, Any] | None) -> str:
    return "–" if record is None else _told(record["mean"][MIDDLE], record["error"][MIDDLE])
