"""Does ``match`` find the same place again? Pictures and their warped copies, whose map is known.

A point of the warped picture has a known partner in the other; the answer of a method is where its
map for the point is hottest. Counted is the percentage of correct keypoints (PCK): answers at most
0.05, 0.1 and 0.2 of the side away. Beside ``match``: nearest neighbours of the layer's features,
those of the features' relevance for the similarity (the idea of PAIR-X), a random place, and the
point's own place, which needs no network.

    python benchmarks/correspondence.py --photographs FOLDER --stamps FOLDER --mobilenet FILE \
        --runs FOLDER --cache FOLDER --record benchmarks/records/correspondence.json \
        --out docs/benchmarks/correspondence.md

Photographs come with scikit-image and scikit-learn; the folder has more, such as those of Debian's
package opencv-doc. With ``--cache`` an interrupted run goes on where it was; without, the page is
written from the record.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trained_pointing
from faithfulness_networks import Network
from scene_kinds import imagenet
from scenes import read_stamps
from store import Store, header, keep, line, publish
from torch import Tensor
from torch.nn import functional as F
from warps import CONTROLS, GRID, LEVELS, Pair, Subject, counted, pairs, subjects

from simexplain import match
from simexplain.matching.result import Frame, centred
from simexplain.methods.raw_vectors import trace_vectors

NETWORKS = (
    "Lite0, 224",
    "MobileNetV2, 224",
    "unpadded ResNet",
    "plain ViT",
    "Lite0, random weights",
)
"""Names begin like that."""

STEPS = 4
"""Of ``match`` where the network above the layer is not linear; its default is 16."""

DEEP = ("unpadded ResNet", "plain ViT")
"""Networks on which ``match`` is also measured at the finer layer, on one photograph a seed. On
Lite0 at 112 pixels one picture takes 26 seconds a step there, so it is left out."""

PLACES = torch.cartesian_prod(*[(torch.arange(56, dtype=torch.float64) + 0.5) / 56] * 2)
"""All over a picture ``(A,2)``, as shares of its side."""

MADE = f"steps={STEPS} deep={DEEP}"

COLUMNS = 5

Record = dict[str, np.ndarray]
"""By method for every pair of a subject ``(6,5)``: see :func:`scored`."""

Answers = dict[str, Tensor]
"""By method what every position of the first picture says of the second ``(M,n,m)``."""


def answers(
    network: Network, layer: str, firsts: Tensor, second: Tensor, *, deep: bool
) -> tuple[Answers, Frame]:
    """All methods on pairs of ``(M,3,H,W)`` and ``(3,H,W)``, and where the positions lie.

    Relevance is feature times gradient of the dot product, channel by channel; a pair of positions
    gets the cosine of the features, or of their relevance.
    """
    count = len(firsts)
    images = torch.cat((firsts, second.expand(count, *second.shape)))
    # Of alike pictures the gradients of the cosine point away from each other: those of the dot
    # product do not.
    traced = trace_vectors(network.shared, images, (layer,)).trace
    rows, features = traced.embeddings, traced.maps[layer]
    gradients = traced.gradients((rows[:count] * rows[count:]).sum())[layer]
    with torch.no_grad():
        kinds = (features, features * gradients)
        units = [F.normalize(one.flatten(2), dim=1) for one in kinds]
        result = {
            name: torch.einsum("mcn,mcr->mnr", unit[:count], unit[count:])
            for name, unit in zip(SEEN, units, strict=True)
        }
    if layer == network.layers[0] or deep:
        matching = match(network.shared, firsts, second, layer, jacobians=STEPS, progress=_patient)
        values = matching.matrix.flatten(3).flatten(1, 2)
        special = torch.stack([centred(one) for one in values])
        result |= dict(zip(OWN, (values, special), strict=True))
    view, grid = ((int(shape[-2]), int(shape[-1])) for shape in (images.shape, features.shape))
    region = network.shared.region((layer,), firsts)
    return result, Frame("the picture", view, grid, region=region)


def _patient(done: int, work: int) -> None:
    """Waits without a warning."""


def scored(actual: Answers, frame: Frame, subject: Subject, made: Sequence[Pair]) -> Record:
    """For every method ``(M,5)``: PCK, the share of mutual answers, and PCK of those at 0.1."""
    result: dict[str, list[np.ndarray]] = {name: [] for name in (*actual, *FREE)}
    side, count = frame.view[1], frame.grid[0] * frame.grid[1]
    centres = torch.tensor([frame.centre(index) for index in range(count)]).double() / side
    for index, pair in enumerate(made):
        points, partners = (torch.from_numpy(one) for one in counted(pair, subject.inside))
        weights = [frame.weights(x, y, points).flatten() for x, y in (points * side).tolist()]
        for name, matrices in actual.items():
            result[name].append(judged(matrices[index], weights, centres, partners))
        result[FREE[0]].append(_free(partners, points[:, None]))
        result[FREE[1]].append(_free(partners, PLACES.expand(len(points), -1, -1)))
    return {name: np.stack(rows) for name, rows in result.items()}


def judged(
    matrix: Tensor, weights: Sequence[Tensor], centres: Tensor, partners: Tensor
) -> np.ndarray:
    """One method on one pair ``(5,)``; NaN where no point counts.

    The answer is the centre of the best position, as that of ``Matching.best``.

    Args:
        matrix: What positions of the first picture say of those of the second ``(n,m)``.
        weights: Of each point over the positions of the first ``(n,)``.
        centres: Of the positions of the second, as shares of the side ``(m,2)``.
        partners: The right answers ``(P,2)``.
    """
    if not len(partners):
        return np.full(COLUMNS, np.nan)
    shares = torch.stack(list(weights))
    best = (shares @ matrix.double()).argmax(dim=1)
    near = _near((centres[best] - partners).norm(dim=1)).double()
    mutual = matrix.argmax(dim=0)[best] == shares.argmax(dim=1)
    trusted = near[mutual, MIDDLE].mean()
    return torch.stack([*near.mean(dim=0), mutual.double().mean(), trusted]).numpy()


def _free(partners: Tensor, answers: Tensor) -> np.ndarray:
    """The share of answers ``(P,A,2)`` that are near the partners ``(P,2)``, as :func:`judged`."""
    near = _near((answers - partners[:, None]).norm(dim=2)).double()
    return np.array([*near.mean(dim=(0, 1)), np.nan, np.nan])


def _near(distances: Tensor) -> Tensor:
    """Whether distances ``(...)`` are within each tolerance ``(...,3)``."""
    return distances.unsqueeze(-1) <= torch.tensor(TOLERANCES, dtype=distances.dtype)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Measures what is not there yet; what the page needs."""
    stamps = read_stamps(options.stamps) if options.stamps else None
    store = Store(options.cache)
    made = {
        (seed, source, number): (subject, pairs(subject, np.random.default_rng((seed, number))))
        for seed in options.seeds
        for source, own in subjects(options.photographs, stamps, options.scenes, seed).items()
        for number, subject in enumerate(own)
    }
    printed: dict[str, Any] = {}
    for name, weights, network in networks(options):
        layers = dict(zip(("default", "finer"), network.layers, strict=True))
        for depth, layer in layers.items():
            result: dict[str, list[Record]] = {}
            for (seed, source, number), case in made.items():
                where = (name, weights[:12], depth, seed, source, number)
                record = store.read(where, MADE)
                if record is None and not options.done:
                    deep = name in DEEP and (source, number) == ("photographs", 0)
                    record = measured_pairs(network, layer, *case, deep=deep)
                    store.write(where, MADE, record)
                if record is not None:
                    result.setdefault(source, []).append(record)
            if result:
                printed.setdefault(name, {})[depth] = summary(result)
            print(f"{name}, {depth}: {sum(map(len, result.values()))} pictures", flush=True)
    return printed


def measured_pairs(
    network: Network, layer: str, subject: Subject, made: Sequence[Pair], *, deep: bool
) -> Record:
    """All methods on the pairs of one subject."""
    firsts = network.tensors([pair.first for pair in made])
    second = network.tensors([subject.picture])[0]
    return scored(*answers(network, layer, firsts, second, deep=deep), subject, made)


def networks(options: argparse.Namespace) -> Iterator[tuple[str, str, Network]]:
    """Those of :data:`NETWORKS` that are wanted and there."""
    wanted = options.networks or NETWORKS
    yield from imagenet(options.mobilenet, wanted, load=True)
    if options.runs:
        yield from trained_pointing.networks(options.runs, 0, wanted)


def summary(records: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, Any]]:
    """By group of pairs and method what :func:`_told` says; not every method has all."""
    methods = list(dict.fromkeys(m for own in records.values() for one in own for m in one))
    empty = np.full((len(WARPS), COLUMNS), np.nan)
    every = {
        source: {m: np.stack([one.get(m, empty) for one in own]) for m in methods}
        for source, own in records.items()
    }
    joined = {m: np.concatenate([own[m] for own in every.values()]) for m in methods}
    groups = {"all": joined, **every}
    groups |= {k: {m: joined[m][:, [n]] for m in methods} for n, k in enumerate(WARPS)}
    return {group: _told(own) for group, own in groups.items()}


def _told(methods: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Number of pairs, means and standard errors over them.

    Of every column of ``(S,kinds,5)``, and last of the difference from the nearest neighbour at
    0.1, pair by pair.
    """
    neighbour = methods[SEEN[0]][:, :, MIDDLE]
    result = {}
    for name, values in methods.items():
        rows = values.reshape(-1, COLUMNS)
        columns = [*rows.T, (values[:, :, MIDDLE] - neighbour).reshape(-1)]
        valid = [column[~np.isnan(column)] for column in columns]
        means = [round(float(v.mean()), 4) if len(v) else None for v in valid]
        errors = [round(float(v.std() / len(v) ** 0.5), 4) if len(v) else None for v in valid]
        if len(valid[0]):
            result[name] = {"n": len(valid[0]), "mean": means, "error": errors}
    return result


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
    shown = [_spread(m, e) for m, e in zip(record["mean"], record["error"], strict=True)]
    *shares, mutual, trusted, apart = shown
    return [str(record["n"]), *shares, *(["–"] * 3 if free else [apart, mutual, trusted])]


def _spread(mean: float | None, error: float | None) -> str:
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
    return "–" if record is None else _spread(record["mean"][MIDDLE], record["error"][MIDDLE])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, keeps the record and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--photographs", type=Path, metavar="FOLDER", help="more of them")
    add("--stamps", type=Path, metavar="FOLDER", help="category folders with RGBA pictures")
    add("--mobilenet", type=Path, metavar="FILE", help="weights of MobileNetV2")
    add("--runs", type=Path, metavar="FOLDER", help="of trained_networks.py")
    add("--cache", type=Path, metavar="FOLDER", help="where records are kept")
    add("--scenes", type=int, default=4, help="of cut-outs, for each seed")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--networks", nargs="+", metavar="NAME", help="names begin like that")
    add("--done", action="store_true", help="measure nothing; show what is in the cache")
    add("--record", type=Path, metavar="FILE", help="JSON that the page is written from")
    add("--out", type=Path, metavar="FILE", help="Markdown file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.cache:
        seeds = " ".join(map(str, options.seeds))
        command = (
            "python benchmarks/correspondence.py --photographs FOLDER --stamps FOLDER --mobilenet "
            f"FILE --runs FOLDER --cache FOLDER --scenes {options.scenes} --seeds {seeds}"
        )
        record = {"command": command, "networks": measured(options)}
        if options.record:
            keep("correspondence", record, options.record)
    else:
        record = json.loads(options.record.read_text("utf-8"))
    publish(page(record), options.out, numbers=False)


if __name__ == "__main__":
    main()
