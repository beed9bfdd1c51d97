"""The page of kinds of networks and methods, from the records of the other benchmarks alone.

The kinds are those of ``simexplain.methods.kinds``, where ``explain`` reads what to show. Numbers
are those of classes on which nothing was chosen.

    python benchmarks/kinds_page.py --out docs/benchmarks/kinds.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from store import header, line, publish

from simexplain.methods.kinds import GRID, KINDS, SMALL, STAGES, Kind

RECORDS = Path("docs/benchmarks")
SETTINGS = ("same", "category")
FEWEST = 20
"""Scenes from which on a method is listed."""


@dataclass(frozen=True)
class Group:
    """Networks of one kind that were measured on the same scenes.

    Attributes:
        title: As the page calls it.
        kind: Their kind.
        networks: Their names in ``trained_pointing.json``.
        pool: Or how transformers of ``vit_pointing.json`` pool.
    """

    title: str
    kind: Kind
    networks: tuple[str, ...] = ()
    pool: str = ""


GROUPS = (
    Group(
        "fine-tuned EfficientNet-Lite0 and MobileNetV2, last map 4 x 4", STAGES,
        ("Lite0, proxy anchor", "MobileNetV2, proxy anchor", "MobileNetV2, triplet"),
    ),
    Group(
        "the first of them at 64 and 96 pixels, last map 2 x 2 and 3 x 3", SMALL,
        ("Lite0, proxy anchor, 64 pixels", "Lite0, proxy anchor, 96 pixels"),
    ),
    Group("a residual network trained from nothing, last map 2 x 2", SMALL, ("unpadded ResNet",)),
    Group("transformers that read a class token", GRID, pool="token"),
    Group("transformers that average patches", GRID, pool="avg"),
)  # fmt: skip


def points_of(
    group: Group, trained: Mapping[str, Any], transformers: Mapping[str, Any]
) -> dict[str, dict[str, list[np.ndarray]]]:
    """By method and setting, for each network the hits and distractor hits ``(scenes,2)``."""
    if group.pool:
        sources: Iterable[Mapping[str, Any]] = (
            {row: {s: run[s][row] for s in SETTINGS} for row in run["same"] if row != "nearer"}
            for run in transformers["runs"]
            if run["pool"] == group.pool
        )
    else:
        sources = (trained[name]["held-out"] for name in group.networks)
    result: dict[str, dict[str, list[np.ndarray]]] = {}
    for source in sources:
        for row, settings in source.items():
            for setting, points in settings.items():
                own = np.array(points, dtype=float)[:, :2]
                result.setdefault(row, {}).setdefault(setting, []).append(own)
    return result


def table(points: Mapping[str, Mapping[str, Sequence[np.ndarray]]]) -> list[str]:
    """A line for each method that all networks of a group have, the best first."""
    most = max(len(own["category"]) for own in points.values())
    rows = []
    for name, own in points.items():
        if any(len(parts) < most or len(parts[0]) < FEWEST for parts in own.values()):
            continue
        cells, gains = [], []
        for setting in SETTINGS:
            if setting not in own:
                cells.append("–")
                continue
            hit, distractor = np.mean([part.mean(axis=0) for part in own[setting]], axis=0)
            spread = np.mean([part[:, 0].var() / len(part) for part in own[setting]])
            error = (spread / len(own[setting])) ** 0.5
            cells.append(f"{hit:.2f} ± {error:.2f} / {distractor:.2f}")
            gains.append(hit - distractor)
        rows.append((np.mean(gains), line([f"`{name}`", f"{np.mean(gains):.2f}", *cells])))
    ranked = [text for _, text in sorted(rows, key=lambda row: -row[0])]
    return [*header(["method", "hit less distractor", *SETTINGS]), *ranked]


def page(trained: Mapping[str, Any], transformers: Mapping[str, Any]) -> str:
    """The whole Markdown page."""
    lines = [
        "# Kinds of networks",
        "",
        "What `explain` shows where no method is named depends on the kind of network. This is the "
        "rule as it is in the code (`simexplain/methods/kinds.py`), with the reason that was "
        "measured; below are the measurements. Written by `python benchmarks/kinds_page.py --out "
        "docs/benchmarks/kinds.md` from the records of [Networks trained for "
        "similarity](trained_networks.md) and [Methods on small transformers](vit_pointing.md).",
        "",
        *header(["kind", "rows", "where `focus` looks", "why"]),
    ]
    for kind in KINDS:
        rows = ", ".join(f"`{name}`" for name in kind.rows)
        lines.append(line([kind.name, rows, kind.layers, kind.why]))
    lines += [
        "",
        "In the tables: hit ± standard error over scenes / distractor, means over the networks of "
        "a group; `same`: the query is the positive itself, `category`: another drawing of it. "
        f"Methods with fewer than {FEWEST} scenes a network are left out. Scenes are of classes "
        "that no network was trained on, and differ between the last two groups and the others. "
        "*nearest of three crops* is no method but what the network itself knows.",
    ]
    for group in GROUPS:
        lines += ["", f"## {group.kind.name.capitalize()}: {group.title}", ""]
        lines += table(points_of(group, trained, transformers))
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trained", type=Path, default=RECORDS / "trained_pointing.json")
    parser.add_argument("--transformers", type=Path, default=RECORDS / "vit_pointing.json")
    parser.add_argument("--out", type=Path, metavar="FILE", help="Markdown file to write")
    options = parser.parse_args(arguments)
    trained, transformers = (
        json.loads(file.read_text("utf-8")) for file in (options.trained, options.transformers)
    )
    publish(page(trained, transformers), options.out, numbers=False)


if __name__ == "__main__":
    main()
