"""Where do maps point in scenes that are harder: more objects, touching, hidden, small or large?

All networks of ``faithfulness.py`` on cut-outs on which nothing was chosen, and those of
``trained_networks.py`` on emoji of classes that no network and no constant saw, in every kind of
scene of ``scenes.py``.

    python benchmarks/scene_kinds.py --stamps FOLDER --emoji FOLDER --runs FOLDER --mobilenet FILE \
        --cache FOLDER --record benchmarks/records/scenes.json --out docs/benchmarks/scenes.md

Ten scenes have a seed of their own and are measured together; those in the folder of the cache are
not measured again. With ``--networks``, ``--kinds`` and ``--rows`` several processes share the
work; ``--done`` shows what is there. Without ``--cache`` the page is written from the record.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trained_networks
import trained_pointing
from faithfulness_data import SETTINGS, Data, kind_scenes
from faithfulness_measures import CHUNK, Record
from faithfulness_networks import LITE0, MOBILENET, Network, mobilenet_v2
from scenes import KINDS, read_stamps
from store import Store, header, keep, line, publish
from trained_pointing import BLACK_BOXES

from simexplain import load_model

PIXELS = (224, 112)
"""Sides of the pictures of the networks trained on ImageNet; the smaller one for black boxes."""


def imagenet(
    mobilenet: Path | None, wanted: Sequence[str] | None, *, load: bool
) -> Iterator[tuple[str, str, Network | None]]:
    """As :func:`trained_pointing.networks`, those that know ImageNet alone."""
    makers = {"Lite0": lambda: load_model(LITE0)}
    if mobilenet is not None:
        makers[MOBILENET] = lambda: mobilenet_v2(mobilenet)
    for side in PIXELS:
        for short, make in makers.items():
            name = f"{short}, {side}"
            if wanted and not any(name.startswith(start) for start in wanted):
                continue
            model = make() if load else None
            if model is not None:
                model.preprocess = replace(model.preprocess, size=(side, side))
            yield name, "imagenet", Network.of(name, model) if model else None


def summary(rows: Mapping[str, Record]) -> dict[str, dict[str, Any]]:
    """By row and setting: number of scenes, means and standard errors."""
    return {
        name: {
            setting: _told(record[f"points_{setting}"])
            for setting in SETTINGS
            if f"points_{setting}" in record
        }
        for name, record in rows.items()
    }


def beside_focus(kinds: Sequence[Mapping[str, Record]]) -> dict[str, Any]:
    """Of every black box, over all kinds: itself, `focus` on the same scenes, and their difference.

    The difference is that in hits less distractor hits.
    """
    result = {}
    key = f"points_{SETTINGS[-1]}"
    for box in BLACK_BOXES:
        both = [(own[box][key], own["focus"][key]) for own in kinds if {box, "focus"} <= set(own)]
        if both:
            counts = [min(map(len, pair)) for pair in both]
            own, other = (
                np.concatenate([pair[side][:n] for pair, n in zip(both, counts, strict=True)])
                for side in (0, 1)
            )
            apart = _told((own - other) @ np.array([[1], [-1], [0]]))
            result[box] = {"own": _told(own), "focus": _told(other), "apart": apart}
    return result


def _told(values: np.ndarray) -> dict[str, Any]:
    error = values.std(axis=0) / len(values) ** 0.5
    return {"n": len(values), "mean": _rounded(values.mean(axis=0)), "error": _rounded(error)}


def _rounded(values: Any) -> list[float]:
    return np.round(values, 4).tolist()


def means(points: Mapping[str, Mapping[str, Record]]) -> dict[str, Record]:
    """Over networks, scene by scene: rows that all of them have, and the scenes that all have."""
    first, *others = points.values()
    result = {}
    for row in first:
        if not all(row in other for other in others):
            continue
        keys = [key for key in first[row] if all(key in other[row] for other in others)]
        parts = {key: [own[row][key] for own in points.values()] for key in keys}
        result[row] = {
            key: np.mean([part[: min(map(len, own))] for part in own], axis=0)
            for key, own in parts.items()
        }
    return result


def areas(data: Data) -> list[float]:
    """The share of the picture that the positive covers, which is chance, and that of the rest."""
    scenes = [scene for seed in range(1000, 1006) for scene in data.make(CHUNK, seed)]
    return _rounded(np.mean([(s.positive.mean(), s.distractor.mean()) for s in scenes], axis=0))


Points = dict[str, dict[str, dict[str, Record]]]
"""Records by kind, network and row."""


def measured(options: argparse.Namespace) -> tuple[dict[str, dict[str, Data]], Points]:
    """Measures what is not there yet; the scenes by source and kind, and all records."""
    emoji = options.emoji / "images" if (options.emoji / "images").is_dir() else options.emoji
    data = {
        "cut-outs": kind_scenes("cut-outs", read_stamps(options.stamps), options.kinds),
        "emoji": kind_scenes("emoji", trained_pointing.halves_of(emoji)["held-out"], options.kinds),
    }
    load = not options.done
    every = [
        *(("cut-outs", *one) for one in imagenet(options.mobilenet, options.networks, load=load)),
        *(
            ("emoji", *one)
            for one in trained_pointing.networks(options.runs, 0, options.networks, load=load)
        ),
    ]
    points: Points = {kind: {} for kind in options.kinds}
    for kind in options.kinds:
        for source, name, weights, network in every:
            store = Store(options.cache / weights[:12])
            result = trained_pointing.record_of(name, network, data[source][kind], store, options)
            if result:
                points[kind][name] = result
    return data, points


def summed(
    data: Mapping[str, Mapping[str, Data]], points: Points, options: argparse.Namespace
) -> dict[str, Any]:
    """What the page needs."""
    names = dict.fromkeys(name for own in points.values() for name in own)
    boxes = {n: beside_focus([own[n] for own in points.values() if n in own]) for n in names}
    for result in points.values():
        for title, members in GROUPS.items():
            own = {name: result[name] for name in members if name in result}
            if len(own) > 1:
                result[title] = means(own)
    command = (
        "python benchmarks/scene_kinds.py --stamps FOLDER --emoji FOLDER --runs FOLDER --mobilenet "
        f"FILE --cache FOLDER --scenes {options.scenes} --few {options.few}"
    )
    if options.networks:
        command += f" --networks {shlex.join(options.networks)}"
    return {
        "command": command,
        "areas": {
            kind: {source: areas(own[kind]) for source, own in data.items()}
            for kind in options.kinds
        },
        "kinds": {
            kind: {name: summary(rows) for name, rows in result.items()}
            for kind, result in points.items()
        },
        "boxes": {name: own for name, own in boxes.items() if own},
    }


METHODS = {
    "sam paper, last": "sam paper, last",
    "similarity_cam cosine, last": "similarity_cam, last",
    "similarity_cam cosine, last x mid": "similarity_cam, last x mid",
    "focus": "focus",
}
"""Those that every network has, and how the short tables call them."""

GROUPS = {
    "ImageNet, 224 pixels": ("Lite0, 224", "MobileNetV2, 224"),
    "ImageNet, 112 pixels": ("Lite0, 112", "MobileNetV2, 112"),
    "trained for similarity": tuple(trained_networks.RUNS),
    "random weights": tuple(trained_networks.RANDOM),
}
"""Over which networks means are taken."""

HEAD = """# Harder scenes

Every scene of 224 x 224 pixels shows the positive, mirrored, among objects of other categories; the
query is the positive itself (*same*) or another picture of its category (*category*), alone on
white. *Hit*: the maximum of the scene's map lies in what is to be seen of the positive;
*distractor*: in another object; *energy*: the share of the heat inside the positive; ± the standard
error over scenes. Networks that know ImageNet alone have cut-out photographs on which nothing was
chosen, those trained for similarity have emoji of classes that none of them saw. A network's own
input is smaller where its name says so (trained ones: 112 pixels, the transformer 64, the residual
network 150), so what is small in the scene is a few pixels to it.
"""


def page(record: Mapping[str, Any]) -> str:
    """The tables, as Markdown."""
    lines = [HEAD, "Written by", "", f"    {record['command']}", "", "## The scenes", ""]
    lines += [*_scenes(record["areas"]), "", "## What follows", "", *_follows(record["kinds"])]
    lines += ["", "## Methods and kinds", "", *_short(record["kinds"])]
    if record["boxes"]:
        lines += ["", "## Black boxes", "", *_boxes(record["boxes"])]
    for kind, networks in record["kinds"].items():
        lines += ["", f"## {kind.capitalize()}", "", f"{KINDS[kind].about.capitalize()}.", ""]
        lines += _table({n: own for n, own in networks.items() if n not in GROUPS})
    return "\n".join(lines) + "\n"


def _scenes(areas: Mapping[str, Any]) -> list[str]:
    """What each kind is, and what a random point would hit."""
    sources = next(iter(areas.values()))
    lines = header(["kind", "what it shows", *(f"{source}: chance" for source in sources)])
    for kind, own in areas.items():
        chances = [f"{positive:.3f} / {other:.3f}" for positive, other in own.values()]
        lines.append(line([f"*{kind}*", KINDS[kind].about, *chances]))
    return [*lines, "", "*Chance*: the share of the picture in the positive / in other objects."]


def _follows(kinds: Mapping[str, Any]) -> list[str]:
    """Methods by kind, over the networks that have every kind, but for those that know nothing."""
    first, *others = kinds.values()
    names = [
        name
        for name in first
        if name not in (*GROUPS, *trained_networks.RANDOM) and all(name in own for own in others)
    ]
    if not names:
        return ["No network has been measured on every kind."]
    lines = [
        f"Hits less distractor hits on *category*, means over {'; '.join(names)}; ± the standard "
        "error, the networks taken as independent.",
        "",
    ]
    for kind, own in kinds.items():
        result = {m: [own[name][m]["category"] for name in names] for m in METHODS
                 if all(m in own[name] for name in names)}  # fmt: skip
        ranked = sorted(result.items(), key=lambda entry: -_margin(entry[1])[0])
        printed = (f"`{METHODS[m]}` {mean:.2f} ± {error:.2f}"
                for m, (mean, error) in ((m, _margin(record)) for m, record in ranked))  # fmt: skip
        counts = sorted({record["n"] for rows in result.values() for record in rows})
        lines.append(f"- *{kind}* (n {' to '.join(map(str, counts))}): {'; '.join(printed)}.")
    return lines


def _margin(networks: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Hits less distractor hits over networks, and the error; no scene is both."""
    means = np.array([record["mean"][:2] for record in networks])
    apart = means[:, 0] - means[:, 1]
    spread = (means.sum(axis=1) - apart**2) / np.array([record["n"] for record in networks])
    return float(round(apart.mean(), 2) + 0.0), float(np.sqrt(spread.sum()) / len(networks))


def _short(kinds: Mapping[str, Any]) -> list[str]:
    """A table for each group of networks: kinds by methods."""
    lines = ["*category*, hit / distractor / energy; means over networks, scene by scene."]
    for group, members in GROUPS.items():
        there = [n for n in members if any(n in own for own in kinds.values())]
        name = group if len(there) > 1 else "".join(there)
        rows = {kind: own[name] for kind, own in kinds.items() if name in own}
        if rows:
            lines += ["", f"**{group}** ({'; '.join(there)})", ""]
            lines += header(["kind", "n", *(f"`{method}`" for method in METHODS.values())])
        for kind, own in rows.items():
            cells = [_brief(own.get(method, {}).get("category")) for method in METHODS]
            counts = {own[method]["category"]["n"] for method in METHODS if method in own}
            lines.append(line([f"*{kind}*", " to ".join(map(str, sorted(counts))), *cells]))
    return lines


def _brief(record: Mapping[str, Any] | None) -> str:
    return "–" if record is None else " / ".join(f"{value:.2f}" for value in record["mean"])


def _cells(record: Mapping[str, Any]) -> list[str]:
    pairs = zip(record["mean"], record["error"], strict=True)
    return [f"{mean:.2f} ± {error:.2f}" for mean, error in pairs]


def _boxes(boxes: Mapping[str, Any]) -> list[str]:
    """Black boxes and focus on the same scenes."""
    lines = [
        "*category*, the first scenes of every kind together; *difference*: hits less distractor "
        "hits of the black box, less those of `focus` on the same scenes.",
        "",
    ]
    measures = ("hit", "distractor", "energy")
    head = ["network", "method", "n", *measures, *(f"`focus`: {what}" for what in measures)]
    lines += header([*head, "difference"])
    for network, own in boxes.items():
        for name, record in own.items():
            cells = [*_cells(record["own"]), *_cells(record["focus"]), *_cells(record["apart"])]
            lines.append(line([network, f"`{name}`", str(record["own"]["n"]), *cells]))
    return lines


def _table(networks: Mapping[str, Any]) -> list[str]:
    """Every network and method, with standard errors."""
    head = [
        f"{setting}: {what}" for setting in SETTINGS for what in ("hit", "distractor", "energy")
    ]
    lines = header(["network", "method", "n", *head])
    for network, rows in networks.items():
        for name, record in rows.items():
            cells = [network, f"`{name}`", str(record["category"]["n"])]
            for setting in SETTINGS:
                cells += _cells(record[setting]) if setting in record else ["–"] * 3
            lines.append(line(cells))
    return lines


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--stamps", type=Path, metavar="FOLDER", help="category folders with RGBA pictures")
    add("--emoji", type=Path, metavar="FOLDER", help="class folders with one picture a vendor")
    add("--runs", type=Path, metavar="FOLDER", help="of trained_networks.py")
    add("--mobilenet", type=Path, metavar="FILE", help="weights of MobileNetV2")
    add("--cache", type=Path, metavar="FOLDER", help="where records are kept")
    add("--scenes", type=int, default=200, help="of each kind, for methods of a few passes")
    add("--few", type=int, default=10, help="of each kind, for black boxes")
    add("--networks", nargs="+", metavar="NAME", help="names begin like that")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    add("--rows", nargs="+", metavar="NAME", help="names begin like that")
    add("--fast", action="store_true", help="measure no black box that is not there yet")
    add("--done", action="store_true", help="measure nothing; show what is in the cache")
    add("--record", type=Path, metavar="FILE", help="JSON that the page is written from")
    add("--out", type=Path, metavar="FILE", help="Markdown file to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, keeps the record and writes the page."""
    options = parsed(arguments)
    torch.set_num_threads(1)
    if not options.cache:
        publish(page(json.loads(options.record.read_text("utf-8"))), options.out, numbers=False)
        return
    data, points = measured(options)
    if not (options.record or options.out):
        return
    record = summed(data, points, options)
    if options.record:
        keep("scenes", record, options.record)
    publish(page(record), options.out, numbers=False)


if __name__ == "__main__":
    main()
