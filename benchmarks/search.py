"""Measures what explaining from an index costs, and how well part of a picture is found by itself.

    python benchmarks/search.py STAMPS [--out docs/benchmarks/search.md]

STAMPS has a folder of cut-outs (RGBA) for each category, such as ``stamps.py`` makes.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import torch
from PIL import Image
from scenes import Stamps, read_stamps
from search_scenes import CrowdedScene, Query, compose_category, compose_same
from store import publish
from torch import Tensor
from torch.nn import functional as F

from simexplain import SimilarityModel, build_index, load_model, match
from simexplain.data.images import Picture
from simexplain.data.preprocessing import prepared
from simexplain.searching.hit_maps import HitMaps, hit_maps, marginals
from simexplain.searching.index_gallery import GalleryIndex
from simexplain.searching.query import Region, SearchQuery, best_box, prepare_query, similarities

SETTINGS = {"same": compose_same, "category": compose_category}
NETWORKS = {"EfficientNet-Lite0": "timm:tf_efficientnet_lite0"}
KS = (1, 5)
HITS = 5


@dataclass(frozen=True)
class Answer:
    """What one way of searching made of one query.

    Attributes:
        ranks: Of the right scenes, from 1.
        overlaps: The IoU of its box with the nearest right piece, in every right scene; empty for
            ways that make no box.
    """

    ranks: tuple[int, ...]
    overlaps: tuple[float, ...]


@dataclass(frozen=True)
class Cost:
    """Seconds of the median round.

    Attributes:
        forward: One comparison by the network: the forward pass of two pictures.
        explained: One hit explained from the index: maps over both pictures and the contrast.
        ratio: Of the two, the median over rounds.
        worst: The largest difference of a map from that of ``match``, over its largest value.
        rounds: How many.
    """

    forward: float
    explained: float
    ratio: float
    worst: float
    rounds: int


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of boxes ``(x, y, width, height)``."""
    across = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    down = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(0.0, across) * max(0.0, down)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


class Searching:
    """A gallery, indexed, and the ways of searching it."""

    def __init__(
        self, model: SimilarityModel, scenes: Sequence[CrowdedScene], folder: Path
    ) -> None:
        self.model = model
        for number, scene in enumerate(scenes):
            scene.picture.save(folder / f"{number:04d}.png")
        self.index: GalleryIndex = build_index(model, folder, folder / "gallery.index")
        every = range(len(self.index))
        self.parts = self.index.factors(every)

    def answers(self, query: Query) -> dict[str, Answer]:
        """What every way makes of a query."""
        requested = self._asked(query)
        assert requested.region is not None
        assert requested.factors is not None
        local = similarities(self.parts, requested.region)
        whole = marginals(requested.factors, self.parts).images
        cut = self._cut_out(query)
        vectors = F.normalize(self.parts.vectors, dim=1)
        ways: dict[str, tuple[Tensor, Tensor | None]] = {
            "the whole picture": (self.index.embeddings @ requested.row[0], whole),
            "the region cut out, embedded anew": (self.index.embeddings @ cut, None),
            "the region against whole pictures": (vectors @ requested.region, None),
            "the region against positions": (local.flatten(1).amax(dim=1), local),
        }
        result = {name: self._answer(query, *way) for name, way in ways.items()}
        side = float(query.scene.picture.width)
        frame = self._overlaps(query, lambda _: (0.0, 0.0, side, side))
        result["the whole frame as box"] = Answer((), frame)
        return result

    def _asked(self, query: Query) -> SearchQuery:
        views, (geometry,) = prepared(self.index.preprocess, [Picture("", query.scene.picture)])
        size = (query.scene.picture.height, query.scene.picture.width)
        box = tuple(float(value) for value in query.scene.pieces[0].box)
        region = Region.of_box((box[0], box[1], box[2], box[3]), size)
        return prepare_query(self.model, self.index, views, geometry, region)

    def _cut_out(self, query: Query) -> Tensor:
        x, y, width, height = query.scene.pieces[0].box
        part: Image.Image = query.scene.picture.crop((x, y, x + width, y + height))
        with torch.no_grad():
            return self.model.embed(self.index.preprocess(part)[0][None])[0]

    def _answer(self, query: Query, scores: Tensor, maps: Tensor | None) -> Answer:
        order = scores.argsort(descending=True, stable=True).tolist()
        ranks = tuple(order.index(index) + 1 for index in query.answers)
        if maps is None:
            return Answer(ranks, ())
        boxes = {
            index: best_box(maps[index], self.index.geometry(index)) for index in query.answers
        }
        return Answer(ranks, self._overlaps(query, boxes.__getitem__))

    @staticmethod
    def _overlaps(query: Query, box: Callable[[int], Sequence[float]]) -> tuple[float, ...]:
        return tuple(
            max(overlap(box(index), right) for right in boxes)
            for index, boxes in query.answers.items()
        )


def regions(
    source: str, stamps: Stamps, setting: str, size: int, options: argparse.Namespace
) -> list[dict[str, list[Answer]]]:
    """For each seed the answers of every way."""
    model = load_model(source, size=(size, size), fit="squash")
    result = []
    for seed in options.seeds:
        gallery, queries = SETTINGS[setting](stamps, options.scenes, options.queries, seed)
        with tempfile.TemporaryDirectory() as folder:
            searching = Searching(model, gallery, Path(folder))
            lines: dict[str, list[Answer]] = {}
            for query in queries:
                for way, answer in searching.answers(query).items():
                    lines.setdefault(way, []).append(answer)
        result.append(lines)
    return result


def chance(answers: Sequence[Answer], scenes: int, k: int) -> float:
    """The chance that a random ranking has a right scene among its first ``k``."""
    missed = []
    for answer in answers:
        wrong = scenes - len(answer.ranks)
        missed.append(np.prod([(wrong - n) / (scenes - n) for n in range(k)]))
    return 1 - float(np.mean(missed))


def cost(source: str, scenes: Sequence[CrowdedScene], rounds: int) -> Cost:
    """Explaining hits from an index against running the network on query and hit, side by side."""
    model = load_model(source)
    with tempfile.TemporaryDirectory() as folder:
        searching = Searching(model, scenes, Path(folder))
    index = searching.index
    views, (geometry,) = prepared(index.preprocess, [Picture("", scenes[0].picture)])
    requested = prepare_query(model, index, views, geometry, None)
    assert requested.factors is not None
    distances, places = index.neighbours(requested.row, HITS + 1)
    rows, rivals = places[0].tolist(), list(range(1, HITS + 1))
    pair = torch.cat((views, prepared(index.preprocess, [Picture("", scenes[1].picture)])[0]))

    def forward() -> None:
        with torch.no_grad():
            model.embed(pair)

    def reasons() -> HitMaps:
        assert requested.factors is not None
        own, every = index.factors(rows[:HITS]), index.embeddings[places[0]]
        return hit_maps(requested.factors, own, every, rivals, distances[0], index.distance_name)

    times = [(_seconds(forward), _seconds(reasons) / HITS) for _ in range(rounds + 3)][3:]
    maps = reasons()
    worst = 0.0
    for number, row in enumerate(rows[:HITS]):
        other = prepared(index.preprocess, [Picture("", scenes[row].picture)])[0]
        direct = match(model, views, other).marginals()
        for own, wanted in zip((maps.query[number], maps.hits[number]), direct, strict=True):
            worst = max(worst, float((own - wanted[0]).abs().max() / wanted.abs().max()))
    return Cost(
        median(first for first, _ in times),
        median(second for _, second in times),
        median(second / first for first, second in times),
        worst,
        rounds,
    )


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


Found = Mapping[tuple[str, str, int], Sequence[Mapping[str, Sequence["Answer"]]]]
OURS = "the region against positions"
TITLES = {
    "same": (
        "Finding the same thing again",
        "The marked cut-out is in one scene of the gallery, mirrored, in another size and place; "
        "its neighbours in the query are in many.",
    ),
    "category": (
        "Finding a thing of the same kind",
        "Another cut-out of the category is marked, which is nowhere in the gallery. Right is "
        "every scene with one of that category: detection from one example.",
    ),
}


def page(
    options: argparse.Namespace, costs: Mapping[str, Cost], result: Found, pictures: int, kinds: int
) -> str:
    """The page of the documentation."""
    seeds = ", ".join(map(str, options.seeds))
    lines = [
        "# Search, measured",
        "",
        "What explaining a hit costs once the gallery is indexed, and how well a part of a picture",
        "is found by itself ([Search](../search.md)).",
        "",
        f"`python benchmarks/search.py STAMPS --scenes {options.scenes} --queries "
        f"{options.queries} --seeds {' '.join(map(str, options.seeds))} --sizes "
        f"{' '.join(map(str, options.sizes))} --rounds {options.rounds} "
        "--out docs/benchmarks/search.md` makes this page; torch "
        f"{torch.__version__.split('+')[0]}, Python "
        f"{platform.python_version()}, one thread of a processor.",
        f"STAMPS: {pictures} cut-out photographs of {kinds} categories that no choice in this",
        "project was tuned on (`benchmarks/stamps.py` makes the folder; the rule for boxes was",
        "chosen on other ones).",
        "",
        "## What a reason costs",
        "",
        "One comparison by the network is one forward pass of query and hit. From the index come",
        "the maps over both pictures and the contrast with the next class down, of five hits at",
        "once, reading the index included. Rounds take turns; the ratio is the median of theirs.",
        "",
        "| network | one comparison | one hit explained | ratio | difference from `match` |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, one in costs.items():
        lines.append(
            f"| {name}, 224 | {1000 * one.forward:.1f} ms | {1e6 * one.explained:.0f} µs | "
            f"1/{1 / one.ratio:.0f} ({one.rounds} rounds) | {one.worst:.0e} of the map's largest "
            "value |"
        )
    lines += [
        "",
        "Float16 resolves 5e-04 of a number.",
        "",
        "## Part of a picture",
        "",
        f"Galleries of {options.scenes} scenes of 448 x 448 pixels, each with four cut-outs of 110",
        "to 200 pixels on a photographic ground, one in each quarter. The query is another such",
        "scene in which one cut-out is marked by its box. Recall@K: how often a right scene is",
        "among the first K. IoU: of the box made in each right scene with the cut-out there,",
        "wherever the scene was ranked; in brackets the share of boxes with at least 0.5. Mean and",
        f"standard deviation over the seeds {seeds}. *Size* is the network's input (`--size`).",
    ]
    for setting, (title, about) in TITLES.items():
        lines += ["", f"### {title}", "", about, "", *_table(setting, result, options)]
    return "\n".join([*lines, "", *_said(), ""])


def _table(setting: str, result: Found, options: argparse.Namespace) -> list[str]:
    from search import KS, chance

    rows = [
        "| network, size | what is compared | "
        + " | ".join(f"Recall@{k}" for k in KS)
        + " | IoU (at least 0.5) |",
        "| --- | --- |" + " --- |" * (len(KS) + 1),
    ]
    for (name, kind, size), seeds in result.items():
        if kind != setting:
            continue
        for way in seeds[0]:
            answers = [seed[way] for seed in seeds]
            label = f"**{way}**" if way == OURS else way
            cells = [_recall(answers, k) for k in KS]
            rows.append(f"| {name}, {size} | {label} | {' | '.join(cells)} | {_boxes(answers)} |")
    some = [
        seed[OURS] for (_, kind, _), seeds in result.items() if kind == setting for seed in seeds
    ]
    by_chance = [mean(chance(answers, options.scenes, k) for answers in some) for k in KS]
    counts = sorted({len(answers) for answers in some})
    lines = " and ".join(f"{100 * value:.0f}" for value in by_chance)
    return [
        *rows,
        "",
        f"{'-'.join(map(str, counts))} queries a seed; by chance Recall@1 and @5 are {lines}.",
    ]


def _recall(seeds: Sequence[Sequence[Answer]], k: int) -> str:
    if not seeds[0][0].ranks:
        return "-"
    return _spread([100 * mean(min(a.ranks) <= k for a in answers) for answers in seeds], 0)


def _boxes(seeds: Sequence[Sequence[Answer]]) -> str:
    if not seeds[0][0].overlaps:
        return "-"
    every = [[value for answer in answers for value in answer.overlaps] for answers in seeds]
    good = [100 * mean(value >= 0.5 for value in values) for values in every]
    return f"{_spread([mean(values) for values in every], 2)} ({mean(good):.0f} %)"


def _spread(values: Sequence[float], digits: int) -> str:
    spread = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.{digits}f} ± {spread:.{digits}f}"


def _said() -> list[str]:
    return [
        "- **the whole picture**: what a search without `--region` does; the box is made by the",
        "  same rule from the map of where the hit agrees with the query.",
        "- **the region cut out, embedded anew**: the box is cropped, resized to the network's",
        "  input and compared with whole pictures; costs a second forward pass.",
        "- **the region against whole pictures**: the cosine of what the region's positions add to",
        "  the query's vector, summed, with the vectors of the gallery.",
        "- **the region against positions**: what `--region` does. The cosine of that sum with",
        "  what each position of a gallery picture adds; the best position ranks the picture, and",
        "  the box is the rectangle that gathers most above a threshold 0.4 of the way from the",
        "  map's mean to its maximum.",
        "",
        "Larger inputs have finer grids, 14 x 14 positions at 448 pixels against 7 x 7 at 224, and",
        "show the network the things larger. That is what finds small things; it costs as much",
        "more to index as there are more pixels, and as much more space.",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("stamps", type=Path, help="folder of categories of cut-outs (RGBA)")
    parser.add_argument("--scenes", type=int, default=100, help="in the gallery")
    parser.add_argument("--queries", type=int, default=40, help="at most, for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 320, 448])
    parser.add_argument("--rounds", type=int, default=40, help="of the cost")
    parser.add_argument("--out", type=Path, help="write the page here instead of printing it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    stamps = read_stamps(options.stamps)
    gallery, _ = compose_same(stamps, max(HITS + 1, 12), 1, options.seeds[0])
    costs = {name: cost(source, gallery, options.rounds) for name, source in NETWORKS.items()}
    result = {
        (name, setting, size): regions(source, stamps, setting, size, options)
        for name, source in NETWORKS.items()
        for setting in SETTINGS
        for size in options.sizes
    }
    publish(page(options, costs, result, sum(map(len, stamps.values())), len(stamps)), options.out)


if __name__ == "__main__":
    main()
