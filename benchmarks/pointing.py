"""Do the maps point at the right thing? Scenes of two cut-out photographs, one of them the match.

The query shows the positive itself (``same``) or another picture of its category (``category``) on
white. A pair compares it with the scene; a triplet has a picture of the distractor's category as
its negative. Of the scene's heatmap we ask whether its maximum lies in the positive (hit), in the
distractor, and which share of the heat lies in the positive (energy).

    python benchmarks/pointing.py --stamps FOLDER --scenes 200 --seeds 0 1 2 --out docs/results.md

FOLDER holds a folder for each category with RGBA pictures, whose alpha is the object's mask.
"""

from __future__ import annotations

import argparse
import platform
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scenes import Scene, compose_scenes, read_stamps
from store import publish
from torch import Tensor
from torch.nn import functional as F

from simexplain import Comparison, SimilarityModel, load_model
from simexplain.methods.cams import CAMS, fuse
from simexplain.methods.similarity_attention import similarity_weights
from simexplain.tracing import Trace
from simexplain.tracing import trace as trace_model

SETTINGS = ("same", "category")
CHUNK = 20


@dataclass(frozen=True)
class Choice:
    """One way to explain.

    Attributes:
        arrangement: ``pair`` or ``triplet``.
        weights: A rule in ``WEIGHTS``.
        layers: ``last``, ``mid`` or ``last x mid``.
        magnify: As for ``explain``.
        mid_cam: The formula at the finer layer; the last one always has ``grad_cam``.
        through_weights: As for ``SimilarityAttention``.
    """

    arrangement: str
    weights: str
    layers: str = "last"
    magnify: int = 1
    mid_cam: str = "layer_cam"
    through_weights: bool = False


RULES = (
    ("pair", "paper"),
    ("pair", "relative"),
    ("triplet", "paper"),
    ("triplet", "relative"),
    ("triplet", "signed"),
)
TABLES: dict[str, list[Choice]] = {
    "Weights, layers and magnification": [
        Choice(arrangement, weights, layers, magnify)
        for magnify in (1, 2)
        for layers in ("last", "last x mid")
        for arrangement, weights in RULES
    ],
    "The CAM formula at the finer layer alone": [
        Choice(arrangement, weights, "mid", mid_cam=cam)
        for arrangement, weights in (("pair", "relative"), ("triplet", "signed"))
        for cam in ("grad_cam", "hires_cam", "layer_cam")
    ],
    "Gradient through the weights": [
        Choice(arrangement, weights, through_weights=through)
        for arrangement, weights in RULES
        for through in (False, True)
    ],
}

Scores = dict[Choice, dict[str, np.ndarray]]


def measure(
    model: SimilarityModel, scenes: Sequence[Scene], layers: tuple[str, str], choices: set[Choice]
) -> Scores:
    """Hit, distractor hit and energy of every scene ``(scenes,3)``, by choice and setting.

    All choices share one forward pass of a scene; see :func:`scene_maps`.
    """
    result: dict[Choice, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    for start in range(0, len(scenes), CHUNK):
        chunk = scenes[start : start + CHUNK]
        for magnify in sorted({choice.magnify for choice in choices}):
            wanted = {choice for choice in choices if choice.magnify == magnify}
            for choice, setting, maps in scene_maps(model, chunk, layers, wanted, magnify):
                result[choice][setting].append(judged(maps, chunk, magnify))
    return {
        choice: {setting: np.concatenate(parts) for setting, parts in settings.items()}
        for choice, settings in result.items()
    }


def scene_maps(
    model: SimilarityModel,
    scenes: Sequence[Scene],
    layers: tuple[str, str],
    choices: set[Choice],
    magnify: int,
) -> Iterator[tuple[Choice, str, Tensor]]:
    """The scenes' maps ``(M,h,w)`` for every choice and setting.

    They are the maps that ``explain`` gives for the scene in each comparison (a test compares the
    two), but a scene and every other picture pass through the network only once.
    """
    tensors = _prepared(model, magnify)
    traced = trace_model(model, tensors([scene.picture for scene in scenes]), layers)
    negatives = _embedded(model, tensors([scene.negative for scene in scenes]))
    for setting in SETTINGS:
        queries = _embedded(model, tensors([scene.queries[setting] for scene in scenes]))
        for arrangement, rule, through in sorted(
            {(c.arrangement, c.weights, c.through_weights) for c in choices}
        ):
            others = (queries, negatives) if arrangement == "triplet" else (queries,)
            gradients = _gradients(traced, others, rule, through=through)
            for choice in choices:
                if (choice.arrangement, choice.weights) != (arrangement, rule):
                    continue
                if choice.through_weights == through:
                    yield choice, setting, _map(traced, gradients, layers, choice)


def _prepared(model: SimilarityModel, magnify: int) -> Callable[[list], Tensor]:
    """Pictures to tensors, enlarged as ``explain(upscale=...)`` enlarges them."""
    prepare = replace(model.preprocess, fit="squash")  # the scenes have the size of the input

    def tensors(pictures: list) -> Tensor:
        stack = torch.stack([prepare(picture)[0] for picture in pictures])
        if magnify == 1:
            return stack
        size = [side * magnify for side in stack.shape[-2:]]
        return F.interpolate(stack, size=size, mode="bilinear", align_corners=False)

    return tensors


def _embedded(model: SimilarityModel, images: Tensor) -> Tensor:
    return trace_model(model, images, ()).embeddings


def _gradients(
    traced: Trace, others: tuple[Tensor, ...], rule: str, *, through: bool
) -> dict[str, Tensor]:
    """Gradients of ``w . f`` of the scenes, which are the positive of every comparison."""
    rows = traced.embeddings
    scenes = rows if through else rows.detach()
    make = Comparison.triplet if len(others) == 2 else Comparison.pair
    weights = similarity_weights(make(others[0], scenes, *others[1:]), rule)
    # Large, because the squares of small gradients would vanish; maps are scaled when drawn.
    return traced.gradients((weights * rows).sum() * 1024)


def _map(
    traced: Trace, gradients: dict[str, Tensor], layers: tuple[str, str], choice: Choice
) -> Tensor:
    formulas = dict(zip(layers, ("grad_cam", choice.mid_cam), strict=True))
    used = {"last": layers[:1], "mid": layers[1:], "last x mid": layers}[choice.layers]
    maps = traced.maps
    with torch.no_grad():
        single = [CAMS[formulas[name]](maps[name], gradients[name]).relu() for name in used]
        return fuse([one.unsqueeze(1) for one in single]).squeeze(1)


def heatmaps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps as ``Explanation.heatmaps`` draws them, but for their scale."""
    grown = F.interpolate(maps.unsqueeze(1), size=size, mode="bilinear", align_corners=False)
    return grown.squeeze(1)


def judged(maps: Tensor, scenes: Sequence[Scene], magnify: int) -> np.ndarray:
    """Hit, distractor hit and energy inside the positive, ``(M,3)``; zeros for an empty map."""
    grow = np.ones((magnify, magnify), dtype=bool)
    result = np.zeros((len(scenes), 3))
    masks = [[np.kron(m, grow) for m in (scene.positive, scene.distractor)] for scene in scenes]
    heat = heatmaps(maps, masks[0][0].shape).numpy().astype(np.float64)
    for number, (one, (positive, distractor)) in enumerate(zip(heat, masks, strict=True)):
        if one.max() > 0:
            peak = np.unravel_index(one.argmax(), one.shape)
            result[number] = positive[peak], distractor[peak], one[positive].sum() / one.sum()
    return result


def finer_layer(model: SimilarityModel) -> str:
    """The last layer of the next finer resolution than the default layer's."""
    return next(name for name in reversed(model.stages) if name != model.default_layer)


HIT, DISTRACTOR = range(2)


def page(
    tables: Mapping[str, Sequence[Any]],
    scores: Scores,
    options: argparse.Namespace,
    layers: tuple[str, str],
    chance: tuple[float, float],
) -> str:
    """The whole Markdown page.

    Args:
        tables: The choices of each table, by its title.
        scores: Hit, distractor hit and energy of every scene, by choice and setting.
        options: The command line.
        layers: The last and the finer layer.
        chance: Share of the scene that the positive and the distractor cover.
    """
    seeds = " ".join(map(str, options.seeds))
    packages = ("torch", "timm", "scikit-image", "simexplain")
    software = ", ".join(f"{name} {version(name)}" for name in packages)
    total = len(options.seeds) * options.scenes
    lines = [
        "# Measured results",
        "",
        "What can be cut out of pictures with such maps is told in "
        "[Segmentation, measured](segmentation-results.md), what training with attention does for "
        "retrieval in [Training, measured](training-results.md).",
        "",
        "## Do the maps point at the right thing?",
        "",
        "Each scene of 224 x 224 pixels shows two cut-out photographs of 106 pixels on grass, "
        "gravel or brick: the positive, mirrored, and a distractor of another category. The query "
        "is the positive itself (*same*) or another picture of its category (*category*), alone on "
        "white. A pair is query and scene; a triplet adds a picture of the distractor's category, "
        "alone on white, as the negative. On the scene's heatmap, *hit* is how often the maximum "
        "lies in the positive, *distractor* how often it lies in the distractor (the rest is "
        "background), and *energy* the mean share of the heat inside the positive, each with its "
        f"standard error over {total} scenes. A point thrown at random hits the positive "
        f"{chance[0]:.2f} of the time and the distractor {chance[1]:.2f}.",
        "",
        f"Network: `{options.model}`, *last* = `{layers[0]}` with Grad-CAM, *mid* = `{layers[1]}` "
        "with LayerCAM unless said otherwise, *last x mid* = the product of both maps. Signed "
        "weights differ from the published ones only where there is a negative, so pairs have no "
        "row of their own for them. Written by",
        "",
        f"    python benchmarks/pointing.py --stamps FOLDER --scenes {options.scenes} "
        f"--seeds {seeds} --model {options.model} --out docs/results.md",
        "",
        f"Python {platform.python_version()}, {software}. The stamps are not part of the project; "
        "any folder of cut-outs in category folders will do, with other numbers. One network and "
        "one collection of pictures were measured, and scenes share pictures, so the standard "
        "errors tell how sure the numbers are for these pictures, not for others.",
        "",
        "### What follows",
        "",
        *conclusion(tables, scores),
        "",
    ]
    for title, choices in tables.items():
        lines += [f"### {title}", "", *_table(choices, scores), ""]
    return "\n".join(lines)


def _table(choices: Sequence[Any], scores: Scores) -> list[str]:
    varying = [name for name in vars(choices[0]) if len({getattr(c, name) for c in choices}) > 1]
    head = [name.replace("_", " ") for name in varying]
    for setting in scores[choices[0]]:
        head += [f"{setting}: hit", "distractor", "energy"]
    lines = [f"| {' | '.join(head)} |", "| " + " | ".join("---" for _ in head) + " |"]
    for choice in choices:
        cells = [_told(getattr(choice, name)) for name in varying]
        for values in scores[choice].values():
            error = values.std(axis=0) / len(values) ** 0.5
            cells += [f"{m:.2f} ± {e:.2f}" for m, e in zip(values.mean(axis=0), error, strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _told(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def conclusion(tables: Mapping[str, Sequence[Any]], scores: Scores) -> list[str]:
    """What to choose when, read off the numbers: the sentences change with the measurement."""
    first, second, third = tables.values()
    formulas = [choice for choice in second if choice.arrangement == "triplet"]
    lines = [f"`{choice.mid_cam}` {_category(scores, choice)}" for choice in formulas]
    changes = [
        f"{off.arrangement} `{off.weights}` from {_category(scores, off)} to "
        f"{_category(scores, replace(off, through_weights=True))}"
        for off in third
        if not off.through_weights
    ]
    return [
        "Hits against distractor hits on *category* scenes, the harder ones; a choice is better "
        "the more its hits exceed its distractor hits. *Best* names every choice that, compared "
        "scene by scene, is within two standard errors of the first. A miss is anything outside "
        "the exact outline, however near.",
        "",
        _advice(first, scores, "pair"),
        _advice(first, scores, "triplet"),
        f"- **The finer layer alone**, `{formulas[0].weights}` triplets: {', '.join(lines)}. Best: "
        f"{' or '.join(f'`{choice.mid_cam}`' for choice in _leaders(scores, formulas))}.",
        f"- **The gradient through the weights** takes {'; '.join(changes)}.",
    ]


def _advice(choices: Sequence[Any], scores: Scores, arrangement: str) -> str:
    """Which weights, and what a second layer and magnification add to them."""
    own = [choice for choice in choices if choice.arrangement == arrangement]
    plain = [choice for choice in own if choice.layers == "last" and choice.magnify == 1]
    rules = [f"`{choice.weights}` {_category(scores, choice)}" for choice in plain]
    leaders = _leaders(scores, plain)
    rule = leaders[0]
    fused = replace(rule, layers="last x mid")
    larger, both = replace(rule, magnify=2), replace(fused, magnify=2)
    return (
        f"- **{arrangement.capitalize()}s**, last layer alone: {', '.join(rules)}. Best: "
        f"{' or '.join(f'`{choice.weights}`' for choice in leaders)}. `{rule.weights}` with a "
        f"second, finer layer: {_category(scores, fused)}; with `upscale=2`: "
        f"{_category(scores, larger)}; with both: {_category(scores, both)}. Best of all rows: "
        f"{' or '.join(_described(choice) for choice in _leaders(scores, own))}."
    )


def _category(scores: Scores, choice: Any) -> str:
    hit, distractor, _ = scores[choice]["category"].mean(axis=0)
    return f"{hit:.2f} against {distractor:.2f}"


def _leaders(scores: Scores, candidates: Sequence[Any]) -> list[Any]:
    """The choice with most hits less distractor hits, then all that may be as good."""

    def margins(choice: Any) -> np.ndarray:
        result = scores[choice]["category"]
        return result[:, HIT] - result[:, DISTRACTOR]

    ranked = sorted(candidates, key=lambda choice: -margins(choice).mean())
    behind = [margins(ranked[0]) - margins(choice) for choice in ranked]
    return [
        choice
        for choice, lost in zip(ranked, behind, strict=True)
        if lost.mean() <= 2 * lost.std() / len(lost) ** 0.5
    ]


def _described(choice: Any) -> str:
    size = f" with `upscale={choice.magnify}`" if choice.magnify != 1 else ""
    return f"`{choice.weights}` at {choice.layers}{size}"


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--stamps", type=Path, required=True, metavar="FOLDER",
                        help="category folders with RGBA pictures")  # fmt: skip
    parser.add_argument("--scenes", type=int, default=200, help="for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="timm:tf_efficientnet_lite0")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, metavar="FILE", help="Markdown file to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes the page; prints it where no file is named."""
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    model = load_model(options.model)
    layers = (model.default_layer, finer_layer(model))
    stamps = read_stamps(options.stamps)
    choices = {choice for table in TABLES.values() for choice in table}
    parts = []
    areas = []
    for seed in options.seeds:
        scenes = compose_scenes(stamps, options.scenes, seed)
        areas += [(scene.positive.mean(), scene.distractor.mean()) for scene in scenes]
        parts.append(measure(model, scenes, layers, choices))
        print(f"seed {seed}: {len(scenes)} scenes measured", flush=True)
    scores = {
        choice: {s: np.concatenate([part[choice][s] for part in parts]) for s in SETTINGS}
        for choice in choices
    }
    chance = tuple(float(value) for value in np.mean(areas, axis=0))
    text = page(TABLES, scores, options, layers, chance)
    publish(text, options.out)


if __name__ == "__main__":
    main()
