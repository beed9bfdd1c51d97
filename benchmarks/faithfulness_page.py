"""The page of ``faithfulness.py``: what was measured, on what, and what it cost."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from faithfulness_data import Data
from faithfulness_measures import BASELINES, Counts, Record
from peers import PEERS
from store import header, line, told

from simexplain.metrics.intervals import bootstrap_difference

Results = dict[str, dict[str, dict[str, Record]]]
"""By data, network and row."""

Costs = dict[str, tuple[float, float]]
"""Passes and seconds by row."""

REFERENCE = "sam paper, last"
NOTES = {
    "tuned": "The defaults and the methods of this project were chosen on scenes of these "
    "cut-outs, so the numbers say what was reached, not what to expect.",
    "held-out": "No choice was made on these cut-outs: other categories and other photographs, "
    "made into a folder by `benchmarks/stamps.py`.",
    "emoji scenes": "The same with drawings: the last 40 % of the classes by code point, a "
    "category being one emoji as several vendors draw it. The bank of `weight_bank` is made of two "
    "drawings of each of the first 60 %, for all tables.",
    "emoji pairs": "Two vendors' drawings of one emoji as anchor and positive, another emoji as "
    "the negative, each alone on white. The object is most of what there is to see, so pointing "
    "says little; only the curves count.",
}
COLUMNS = 4
"""Of one baseline in a record of curves."""


def page(
    results: Results,
    costs: Mapping[str, Costs],
    collections: Sequence[Data],
    skipped: Mapping[str, str],
    counts: Counts,
    options: argparse.Namespace,
    captions: Mapping[str, str],
) -> str:
    """The whole Markdown page."""
    nets = list(costs)
    lines = ["# Which map is right?", "", *_measured(nets, counts), "", *_command(options), ""]
    lines += ["## What follows", ""]
    lines += [line for data in collections if data.points for line in _short(results, data)]
    lines += _pictures(captions, options)
    for data in collections:
        lines += ["", f"## {data.name[0].upper()}{data.name[1:]}", ""]
        if note := NOTES.get(data.name, data.note):
            lines += [note, ""]
        if len(results[data.name]) < len(nets):
            lines += [f"Measured with {' and '.join(results[data.name])} alone.", ""]
        if data.points:
            lines += [*_pointing(results[data.name], data), ""]
            if len(results[data.name]) > 1:
                lines += [*_by_network(results[data.name], data), ""]
        lines += _curves(results[data.name])
    lines += ["", "## Cost", "", *_costs(costs), "", "## Limits", "", *_limits(skipped)]
    return "\n".join(lines) + "\n"


def _measured(nets: Sequence[str], counts: Counts) -> list[str]:
    return [
        "Each scene of 224 x 224 pixels shows two cut-outs on grass, gravel or brick: the "
        "positive, mirrored, and a distractor of another category. The query is the positive "
        "itself (*same*) or another picture of its category (*category*), alone on white; the "
        "negative is another picture of the distractor's category. Every method maps the scene. "
        "*Hit* is how often the map's maximum lies in the positive, *distractor* how often it lies "
        "in the distractor, *energy* the share of positive heat inside the positive, all on the "
        "map drawn at the size of the scene.",
        "",
        "Deletion and insertion follow the similarity of query and scene while the scene's hottest "
        f"pixels are replaced, or revealed, in {counts.steps} steps, by a blur or by the mean "
        "colour. Given are the mean areas under the curves, on a scale on which the replaced scene "
        "has 0 and the whole one 1 on average (single scenes are not divided by their own loss, "
        "which may be next to nothing), and insertion minus deletion in units of the similarity "
        "(*gain*). Low deletion, high insertion and high gain are good.",
        "",
        f"Networks: {' and '.join(nets)} with ImageNet weights and average-pooled features. "
        "*last* is the last map before pooling, *mid* the last layer of the next finer resolution, "
        "*last x mid* the product of both maps. Numbers are means over the networks and then over "
        "*n* scenes of all seeds, ± the standard error over scenes. Rows that need hundreds of "
        "passes ran on the first scenes of every seed only; the last column is the difference from "
        f"`{REFERENCE}` in what the table is sorted by, on the very scenes that both have, with a "
        "95 % bootstrap interval. Names with a colon are other packages, used as their users "
        "would: the scene alone, with the similarity to the query (or query minus negative: "
        "*margin*) as the target.",
    ]


def _command(options: argparse.Namespace) -> list[str]:
    parts = [f"--stamps {name}=FOLDER" for name, _ in options.stamps]
    parts += ["--emoji FOLDER"] if options.emoji else []
    parts += ["--mobilenet FILE"] if options.mobilenet else []
    parts += [f"--{n} {getattr(options, n)}" for n in ("scenes", "some", "few", "curves", "steps")]
    parts += [f"--kinds {' '.join(options.kinds)}"] if options.kinds else []
    parts += [f"--seeds {' '.join(map(str, options.seeds))}"]
    parts += [f"--rows {shlex.join(options.rows)}"] if options.rows else []
    parts += ["--pictures docs/pictures"] if options.pictures else []
    own = ("torch", "timm", "scikit-image", "simexplain")
    software = [f"{name} {version(name)}" for name in own]
    software += sorted({f"{p.package} {p.version}" for p in PEERS.values() if p.installed})
    return [
        "Written by",
        "",
        f"    python benchmarks/faithfulness.py {' '.join(parts)} "
        "--out docs/benchmarks/faithfulness.md",
        "",
        f"Python {platform.python_version()}, {', '.join(software)}; {options.threads} threads.",
    ]


def _pictures(captions: Mapping[str, str], options: argparse.Namespace) -> list[str]:
    """The figures with their captions, found from the page."""
    if not captions:
        return []
    here = options.out.parent if options.out else Path()
    folder = Path(os.path.relpath(options.pictures, here)).as_posix()
    lines = ["", "## Pictures", ""]
    lines += [
        "Scenes of emoji with Lite0, the query drawn by another vendor. The outlines are green "
        "around the positive and red around the distractor; a dot marks the maximum of each map, "
        "green where it lies in the positive. Drawings: Noto (Apache-2.0) and Fluent (MIT).",
    ]
    for file, caption in captions.items():
        lines += ["", f"![{caption.replace('`', '')}]({folder}/{file})", "", f"*{caption}.*"]
    return lines


def _short(results: Results, data: Data) -> list[str]:
    """One sentence: the best row, the best peer and the published method."""
    result = {name: _means(results[data.name], name, "points_category") for name in
             _rows(results[data.name])}  # fmt: skip
    enough = max(_count(values) for values in result.values()) / 2
    ranked = [n for n in _ranked(result, _margin) if _count(result[n]) >= enough]
    peers = [name for name in ranked if name in PEERS]
    shown = [("Best", ranked[0])]
    shown += [("best of the other packages", peers[0])] if peers else []
    shown += [("as published", REFERENCE)] if REFERENCE in result else []
    record = []
    for what, name in shown:
        hit, distractor, _ = np.nanmean(result[name], axis=0)
        record.append(f"{what}: `{name}`, {hit:.2f} against {distractor:.2f}")
    return [f"- **{data.name}**, hits against distractor hits on *category*. {'; '.join(record)}."]


def _pointing(nets: Mapping[str, Mapping[str, Record]], data: Data) -> list[str]:
    """Means over the networks, best row first."""
    key = f"points_{data.settings[-1]}"
    result = {name: _means(nets, name, key) for name in _rows(nets)}
    head = ["method", "n"]
    for setting in data.settings:
        head += [f"{setting}: hit", "distractor", "energy"]
    lines = [
        "Sorted by hits less distractor hits on *category*.",
        "",
        *header([*head, "above published"]),
    ]
    for name in _ranked(result, _margin):
        cells = [name, str(_count(result[name]))]
        for setting in data.settings:
            kind = f"points_{setting}"
            cells += told(_means(nets, name, kind)) if _has(nets, name, kind) else ["–"] * 3
        lines.append(line([*cells, _above(result, name, _margin)]))
    return lines


def _by_network(nets: Mapping[str, Mapping[str, Record]], data: Data) -> list[str]:
    rows = _rows(nets)
    key = f"points_{data.settings[-1]}"
    result = {name: _means(nets, name, key) for name in rows}
    head = [f"{net}, {setting}" for net in nets for setting in data.settings]
    lines = ["Each network: hit / distractor.", "", *header(["method", *head])]
    for name in _ranked(result, _margin):
        cells = [name]
        for own in nets.values():
            for setting in data.settings:
                values = own.get(name, {}).get(f"points_{setting}")
                if values is None or np.isnan(values).all():
                    cells.append("–")
                else:
                    hit, distractor, _ = np.nanmean(values, axis=0)
                    cells.append(f"{hit:.2f} / {distractor:.2f}")
        lines.append(line(cells))
    return lines


def _curves(nets: Mapping[str, Mapping[str, Record]]) -> list[str]:
    result = {n: _means(nets, n, "curves") for n in _rows(nets) if _has(nets, n, "curves")}
    if not result:
        return []
    head = ["method", "n"]
    for baseline in BASELINES:
        head += [f"{baseline}: deletion", "insertion", "gain"]
    lines = ["Deletion and insertion on *category*, sorted by the mean of both gains.", ""]
    lines += header([*head, "above published"])
    for name in _ranked(result, _gains):
        cells = [name, str(_count(result[name])), *_areas(result[name])]
        lines.append(line([*cells, _above(result, name, _gains)]))
    return lines


def _costs(costs: Mapping[str, Costs]) -> list[str]:
    head = [f"{net}: {what}" for net in costs for what in ("passes", "seconds")]
    lines = [
        "One triplet explained by the plain network: images that pass forward through it, counted "
        "in images of its own size (backward passes are not counted, they are in the seconds), and "
        "the median time. Other packages explain the scene alone, simexplain all three images.",
        "",
        *header(["method", *head]),
    ]
    names = list(dict.fromkeys(name for own in costs.values() for name in own))
    first = next(iter(costs.values()))
    for name in sorted(names, key=lambda n: first.get(n, (0, 0))):
        cells = [name]
        for own in costs.values():
            passes, seconds = own.get(name, (np.nan, np.nan))
            cells += [f"{passes:g}", f"{seconds:.2f}"]
        lines.append(line(cells))
    return lines


def _limits(skipped: Mapping[str, str]) -> list[str]:
    lines = [
        "Two small networks trained to classify, none of them for similarity; scenes of two "
        "objects whose place and size are known; no photographs of whole scenes. Scenes share "
        "pictures, so the errors tell how sure the numbers are for these pictures, not for others. "
        "A miss is anything outside the exact outline, however near. Deletion and insertion judge "
        "a map by pictures that the network has never seen, and favour maps that follow its "
        "errors. The cut-outs are not part of the project; other folders give other numbers.",
    ]
    if skipped:
        lines += ["", "Not measured:", ""]
        lines += [f"- {name}: {reason.rstrip('.')}." for name, reason in skipped.items()]
    return lines


def _rows(nets: Mapping[str, Mapping[str, Record]]) -> list[str]:
    """Rows that every network has."""
    first, *others = nets.values()
    return [name for name in first if all(name in other for other in others)]


def _has(nets: Mapping[str, Mapping[str, Record]], name: str, kind: str) -> bool:
    return all(kind in own[name] for own in nets.values())


def _means(nets: Mapping[str, Mapping[str, Record]], name: str, kind: str) -> np.ndarray:
    """Over the networks, scene by scene."""
    return np.mean([own[name][kind] for own in nets.values()], axis=0)


def _margin(values: np.ndarray) -> np.ndarray:
    return values[:, 0] - values[:, 1]


def _gains(values: np.ndarray) -> np.ndarray:
    return (values[:, 1::COLUMNS] - values[:, 0::COLUMNS]).mean(axis=1)


def _count(values: np.ndarray) -> int:
    return int((~np.isnan(values).all(axis=1)).sum())


def _ranked(result: Mapping[str, np.ndarray], key: Callable[[np.ndarray], np.ndarray]) -> list[str]:
    return sorted(result, key=lambda name: -np.nanmean(key(result[name])))


def _above(
    result: Mapping[str, np.ndarray], name: str, key: Callable[[np.ndarray], np.ndarray]
) -> str:
    """The paired difference from the reference with its interval."""
    if REFERENCE not in result or name == REFERENCE:
        return "–"
    interval = bootstrap_difference(key(result[name]), key(result[REFERENCE]))
    return f"{interval.mean:+.3f} [{interval.low:+.3f}..{interval.high:+.3f}]"


def _areas(values: np.ndarray) -> list[str]:
    """Deletion, insertion and gain under each baseline, with their standard errors."""
    valid = values[~np.isnan(values).any(axis=1)]
    cells = []
    for start in range(0, values.shape[1], COLUMNS):
        down, up, whole, empty = valid[:, start : start + COLUMNS].T
        lost = whole - empty
        for area in (down, up):
            ratio = (area - empty).mean() / lost.mean()
            # The error of a ratio of means, by its first derivative.
            error = (area - empty - ratio * lost).std() / len(lost) ** 0.5 / abs(lost.mean())
            cells.append(f"{ratio:.2f} ± {error:.2f}")
        gain = up - down
        cells.append(f"{gain.mean():.3f} ± {gain.std() / len(gain) ** 0.5:.3f}")
    return cells
