"""The page of results: tables of what was measured and what follows from them."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np

Scores = Mapping[Any, Mapping[str, np.ndarray]]
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
