"""Which method is right on networks trained for similarity, and on networks that know nothing?

The networks are those of ``trained_networks.py``, the scenes those of ``faithfulness.py``, made of
emoji classes that no network was trained on: two drawings on a ground, the query another vendor's
drawing of one of them. Constants of ``focus`` were chosen on every second class; the page has the
others. What a map can reach at all is what the network itself knows: which of three crops of the
scene, with the positive, the distractor and neither, it embeds nearest to the query.

    python benchmarks/trained_pointing.py EMOJI --runs FOLDER --cache FOLDER \
        --record benchmarks/records/trained_pointing.json --out docs/benchmarks/trained_networks.md

Scenes are measured ten at a time; those in the folder of the cache are not measured again, and
``--done`` shows what is there. With ``--networks`` several processes share the work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trained_networks
from faithfulness import described, group
from faithfulness_data import SETTINGS, Data
from faithfulness_measures import CHUNK, Counts, Record
from faithfulness_networks import Network
from faithfulness_rows import BOTH, FEW, ROWS, Explainer, Row
from held_out import TRAINED
from PIL import Image
from scenes import SIDE, Scene, Stamps, compose_scenes, divided, read_stamps
from store import Store, header, keep, line, publish, told

from simexplain import load_model

FAST = (
    "sam paper, last",
    "similarity_cam cosine, last",
    "similarity_cam cosine, last x mid",
    "focus",
)
BLACK_BOXES = ("occlusion", "sbsm", "random_masks")
NOT_ENLARGED = {"focus, not enlarged": Row("focus", options={"positions": 1})}
"""Beside ``focus`` where the last map is so small that it enlarges the images."""
CROPS = "nearest of three crops"
SMALL = {f"Lite0, proxy anchor, {side} pixels": ("Lite0, proxy anchor", side) for side in (64, 96)}
"""Networks whose pictures are made smaller, so that their last maps are, and the side."""
ON_ATTENTION = {name: Row(name) for name in ("attention", "attention_relevance", "grad_eclip")}
DATA = ("tuned", "held-out")

MEASURES = ("hit", "distractor", "energy")

Networks = dict[str, dict[str, dict[str, list[list[float | None]]]]]
"""By network, row and setting: hit, distractor hit and energy of every scene."""

Points = dict[str, dict[str, dict[str, dict[str, list[list[float]]]]]]
"""The same by network and then by half of the classes."""


def halves_of(emoji: Path) -> dict[str, Stamps]:
    """The classes that no network saw; every second one is for choosing constants."""
    held = divided(read_stamps(emoji), TRAINED)[1]
    return {
        name: {label: held[label] for label in sorted(held)[start::2]}
        for start, name in enumerate(DATA)
    }


def scenes_of(emoji: Path) -> dict[str, Data]:
    """Scenes of both halves; black boxes are measured on the second one alone."""
    return {
        name: Data(
            f"emoji {name}", partial(compose_scenes, half), curves=False, dear=name == DATA[1]
        )
        for name, half in halves_of(emoji).items()
    }


def rows_for(name: str, network: Network | None) -> dict[str, Explainer]:
    """What is measured: two layers where there are two, attention where there is some."""
    result: dict[str, Explainer] = {row: ROWS[row] for row in (*FAST, *BLACK_BOXES)}
    if name.startswith("unpadded") or name in SMALL:
        result |= NOT_ENLARGED
    if network is not None and network.layers[0] == network.layers[1]:
        result = {n: row for n, row in result.items() if getattr(row, "layers", "") != BOTH}
    return result | ON_ATTENTION if "ViT" in name else result


def networks(
    runs: Path, seed: int, wanted: Sequence[str] | None, *, load: bool = True
) -> Iterator[tuple[str, str, Network | None]]:
    """Of every network its name, what tells its weights and, if asked for, the network itself."""
    for name in (*trained_networks.RUNS, *SMALL, *trained_networks.RANDOM):
        if wanted and not any(name.startswith(start) for start in wanted):
            continue
        run, side = SMALL.get(name, (name, None))
        file = trained_networks.weights_of(run, seed, runs)
        if name in trained_networks.RANDOM:
            model = trained_networks.random_network(name, seed) if load else None
            yield name, f"seed{seed}", Network.of(name, model) if model else None
        elif file.is_file():
            model = load_model(str(file), size=side and (side, side)) if load else None
            weights = trained_networks.digest(file)
            yield name, weights, Network.of(name, model) if model else None


def record_of(
    name: str, network: Network | None, data: Data, store: Store, options: argparse.Namespace
) -> dict[str, Record]:
    """All rows on the scenes of one half, a seed for every ten; without a network those known."""
    rows = rows_for(name, network)
    if options.rows:
        rows = {n: row for n, row in rows.items() if any(n.startswith(w) for w in options.rows)}
    result: dict[str, list[Record]] = {row: [] for row in rows}
    for shard in range(-(-max(options.scenes, options.few) // CHUNK)):
        most = (options.scenes, options.scenes, options.few)
        seed, counts = 1000 + shard, Counts(*(_part(number, shard) for number in most), 0, 1)
        for dear in (False, True):
            own = {n: row for n, row in rows.items() if (row.tier == FEW) == dear}
            if network is None:
                made = {n: f"{described(row)} {counts.told(row, data)}" for n, row in own.items()}
                part = {n: store.read((name, data.name, seed, n), made[n]) for n in own}
            else:
                done = dear and options.fast
                part = group(network, data, seed, own, counts, None, (), store, done=done)
            for title, record in part.items():
                result[title] += [record] if record is not None else []
        if not options.rows or any(CROPS.startswith(start) for start in options.rows):
            result.setdefault(CROPS, []).extend(choices(name, network, data, seed, counts, store))
    return {
        title: {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for title, parts in result.items()
        if parts
    }


def choices(
    name: str, network: Network | None, data: Data, seed: int, counts: Counts, store: Store
) -> list[Record]:
    """Which of three crops of each scene the network embeds nearest to the query, as points."""
    index, made = (name, data.name, seed, CROPS), f"scenes={counts.scenes}"
    known = store.read(index, made)
    if known is not None or network is None:
        return [known] if known is not None else []
    result: Record = {}
    for setting in SETTINGS:
        points = []
        for scene in data.make(counts.scenes, seed):
            shown = [scene.queries[setting], *crops(scene)]
            with torch.no_grad():
                query, *rows = network.plain.embed(network.tensors(shown))
            best = int(torch.stack([row @ query for row in rows]).argmax())
            points.append([best == 0, best == 1, np.nan])
        result[f"points_{setting}"] = np.array(points, dtype=float)
    store.write(index, made, result)
    return [result]


def crops(scene: Scene) -> list[Image.Image]:
    """Of a scene the part around the positive, that around the distractor, and the emptiest one."""
    half, there = SIDE // 2, scene.positive | scene.distractor
    corners = []
    for mask in (scene.positive, scene.distractor):
        spans = [np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0)]
        middles = [(int(span[0]) + int(span[-1])) // 2 for span in spans]
        corners.append(tuple(min(max(middle - half // 2, 0), SIDE - half) for middle in middles))
    places = range(0, SIDE - half + 1, 8)
    corners.append(
        min(
            ((top, left) for top in places for left in places),
            key=lambda c: int(there[c[0] : c[0] + half, c[1] : c[1] + half].sum()),
        )
    )
    return [scene.picture.crop((left, top, left + half, top + half)) for top, left in corners]


def _part(count: int, shard: int) -> int:
    """How many of so many scenes are in a shard."""
    return min(CHUNK, max(0, count - shard * CHUNK))


def listed(record: Record) -> dict[str, list[list[float]]]:
    """A record as plain numbers, None where there is none."""
    return {
        setting: [
            [None if np.isnan(value) else round(float(value), 3) for value in scene]
            for scene in record[f"points_{setting}"]
        ]
        for setting in SETTINGS
        if f"points_{setting}" in record
    }


def page(points: Points, trained: Mapping[str, Any], command: str) -> str:
    """The whole Markdown page, from the two records alone."""
    held = {name: result["held-out"] for name, result in points.items() if "held-out" in result}
    lines = ["# Networks trained for similarity", "", *_about(trained, command), ""]
    lines += ["## Networks and methods", "", *_overview(held), ""]
    lines += ["## Means", "", *_means(held), ""]
    for network, result in held.items():
        lines += [f"## {network}", "", *_table(result), ""]
    tuned = {name: result["tuned"] for name, result in points.items() if "tuned" in result}
    if tuned:
        lines += ["## The other half of the classes", "", "Left for choosing constants.", ""]
        lines += _overview(tuned)
    return "\n".join(lines).rstrip() + "\n"


def _about(trained: Mapping[str, Any], command: str) -> list[str]:
    data, runs = trained.get("data", {}), trained.get("runs", {})
    lines = [
        "Scenes of two emoji on a ground, of classes that no network was trained on; the query is "
        "the positive itself (*same*) or another vendor's drawing of it (*category*). *Hit*: the "
        "maximum of the scene's map lies in the positive; *distractor*: in the other emoji; "
        "*energy*: the share of the heat inside the positive; ± the standard error over scenes. "
        f"Chance is about 0.09. *{CROPS}*: how often the network itself embeds the part of the "
        "scene around the positive (*hit*), or that around the distractor, nearer to the query "
        "than that and a part with neither. No map can be expected to know much better. Written by",
        "",
        f"    {command}",
        "",
        f"The networks were trained by `benchmarks/trained_networks.py` on {data.get('classes')} "
        f"classes ({data.get('views')} pictures of {data.get('pixels')} pixels), alone on white "
        "and alone on a ground; Recall@1 is that of "
        f"{data.get('other classes')} other classes, the query's own vendor left out of the "
        "gallery.",
        "",
        *header(["network", "input", "loss", "pictures seen", "Recall@1 before", "after"]),
    ]
    for name, run in runs.items():
        record = run["options"]
        size = record["size"][0] if record["size"] else {"plain ViT": 64}.get(name, 150)
        recall = [
            f"{run[when].get('recall@1', float('nan')):.2f}" for when in ("before", "reached")
        ]
        lines.append(line([name, f"{size}", record["loss"], f"{run['images']}", *recall]))
    notes = [f"{name}: {run['note']}." for name, run in runs.items() if "note" in run]
    return [*lines, "", *notes] if notes else lines


def _overview(result: Networks) -> list[str]:
    """Every row and network, in short."""
    names = list(dict.fromkeys(name for rows in result.values() for name in rows))
    lines = ["*category*, hit / distractor / energy.", "", *header(["method", *result])]
    for name in names:
        cells = [
            " / ".join(map(_cell, _mean(rows[name]["category"]))) if name in rows else "–"
            for rows in result.values()
        ]
        lines.append(line([f"`{name}`", *cells]))
    return lines


def _means(result: Networks) -> list[str]:
    """Over the trained and over the random networks; rows that all networks of a kind have."""
    lines = []
    not_alone = {*trained_networks.RANDOM, *SMALL}
    for kind, own in (
        ("trained networks", [v for k, v in result.items() if k not in not_alone]),
        ("random weights", [v for k, v in result.items() if k in trained_networks.RANDOM]),
    ):
        if not own:
            continue
        columns = [f"{s}: {what}" for s in SETTINGS for what in MEASURES]
        lines += ["", *header([f"{len(own)} {kind}", *columns])]
        for row in own[0]:
            if all(set(SETTINGS) <= set(one.get(row, {})) for one in own):
                means = [np.mean([_mean(one[row][s]) for one in own], 0) for s in SETTINGS]
                cells = list(map(_cell, np.concatenate(means)))
                lines.append(line([f"`{row}`", *cells]))
    return lines[1:]


def _mean(points: Sequence[Sequence[float | None]]) -> np.ndarray:
    return np.array(points, dtype=float).mean(axis=0)


def _cell(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"


def _table(rows: Mapping[str, Mapping[str, list[list[float]]]]) -> list[str]:
    """One network, with standard errors."""
    lines = header(["method", "n", *(f"{s}: {what}" for s in SETTINGS for what in MEASURES)])
    for name, result in rows.items():
        cells = [f"`{name}`", f"{len(result['category'])}"]
        for setting in SETTINGS:
            cells += (
                told(np.array(result[setting], dtype=float))
                if setting in result
                else ["–"] * len(MEASURES)
            )
        lines.append(line(cells))
    return lines


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("emoji", type=Path, help="class folders with one RGBA picture a vendor")
    add("--runs", type=Path, required=True, metavar="FOLDER", help="of trained_networks.py")
    add("--trained", type=Path, default=Path("benchmarks/records/trained_networks.json"))
    add("--cache", type=Path, required=True, metavar="FOLDER", help="where records are kept")
    add("--scenes", type=int, default=60, help="for methods of a few passes")
    add("--few", type=int, default=30, help="for black boxes, held-out classes alone")
    add("--networks", nargs="+", metavar="NAME", help="names begin like that")
    add("--rows", nargs="+", metavar="NAME", help="names begin like that")
    add("--halves", nargs="+", choices=DATA, default=list(DATA))
    add("--fast", action="store_true", help="measure no black box that is not there yet")
    add("--done", action="store_true", help="measure nothing; show what is in the cache")
    add("--seed", type=int, default=0, help="of the trained networks")
    add("--record", type=Path, metavar="FILE", help="JSON with every scene")
    add("--out", type=Path, metavar="FILE", help="Markdown file to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, keeps the record and writes the page."""
    options = parsed(arguments)
    torch.set_num_threads(1)
    emoji = options.emoji / "images" if (options.emoji / "images").is_dir() else options.emoji
    data = scenes_of(emoji)
    points: Points = {}
    requested = (options.runs, options.seed, options.networks)
    for name, weights, network in networks(*requested, load=not options.done):
        store = Store(options.cache / weights[:12])
        for half in options.halves:
            result = record_of(name, network, data[half], store, options)
            if result:
                rows = {row: listed(record) for row, record in result.items()}
                points.setdefault(name, {})[half] = rows
    if options.record:
        keep("trained_pointing", points, options.record)
    trained = json.loads(options.trained.read_text("utf-8")) if options.trained.is_file() else {}
    command = (
        f"python benchmarks/trained_pointing.py EMOJI --runs FOLDER --cache FOLDER --scenes "
        f"{options.scenes} --few {options.few}"
    )
    publish(page(points, trained, command), options.out, numbers=False)


if __name__ == "__main__":
    main()
