"""The page of ``scene_kinds.py``, from its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import trained_networks
from faithfulness_data import SETTINGS
from scenes import KINDS
from store import header, line

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
