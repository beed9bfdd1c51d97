"""Scenes on which the best method is right and the published one wrong, and the other way round."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from faithfulness_data import free_emoji
from faithfulness_measures import CHUNK, pointed
from faithfulness_networks import Network
from faithfulness_rows import Batch, Explainer, scene_maps
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from scenes import SIDE, Scene, compose_scenes
from torch import Tensor

from simexplain.explanation import ROOTED
from simexplain.methods.weight_bank import WeightBank
from simexplain.metrics.maps import grown
from simexplain.rendering.overlay import overlay
from simexplain.rendering.sheet import png_of

SHOWN = (
    "focus",
    "sam signed, last x mid",
    "similarity_cam cosine, last",
    "grad-cam: LayerCAM, last + mid",
    "sam paper, last",
)
"""The best is the first that is measured; the last is the published one."""

EXAMPLES, SCENES, SEED, WIDTH = 4, 60, 7, 1000


@dataclass(frozen=True)
class Example:
    """One scene with the maps of all methods shown ``(SIDE,SIDE)``, and where they point."""

    scene: Scene
    heats: Mapping[str, Tensor]
    right: Mapping[str, bool]


def make_pictures(
    network: Network,
    rows: Mapping[str, Explainer],
    emoji: Path,
    bank: WeightBank | None,
    out: Path,
) -> dict[str, str]:
    """Writes two figures of scenes of emoji whose licences allow it, as small JPEG files.

    Returns:
        A caption for each file.
    """
    names = [name for name in SHOWN if name in rows]
    if len(names) < 2:
        print("No pictures: at least two of the rows shown in them have to be measured.")
        return {}
    result = examples(network, {name: rows[name] for name in names}, emoji, bank)
    best, published = names[0], names[-1]
    wins = [one for one in result if one.right[best] and not one.right[published]]
    failures = [one for one in result if not one.right[best]]
    # Failures that another method does not share say the most.
    failures.sort(key=lambda one: -sum(one.right.values()))
    out.mkdir(parents=True, exist_ok=True)
    captions = {
        "wins": (wins, f"`{best}` is right and `{published}` wrong"),
        "failures": (failures, f"`{best}` is wrong, those first that others get right"),
    }
    made = {}
    for title, (chosen, what) in captions.items():
        if chosen:
            file = f"faithfulness_{title}.jpg"
            _small(chosen[:EXAMPLES], names).save(out / file, quality=82, optimize=True)
            shown = min(EXAMPLES, len(chosen))
            made[file] = f"{shown} of the {len(chosen)} scenes of {len(result)} on which {what}"
    return made


def examples(
    network: Network, rows: Mapping[str, Explainer], emoji: Path, bank: WeightBank | None
) -> list[Example]:
    """The maps of some scenes, with another vendor's drawing as the query."""
    scenes = compose_scenes(free_emoji(emoji), SCENES, SEED)
    result = []
    for start in range(0, SCENES, CHUNK):
        chunk = scenes[start : start + CHUNK]
        network.forget()
        batch = Batch.of(network, chunk, "category")
        maps, hits = {}, {}
        for name, one in rows.items():
            made = scene_maps(one, network.shared, network.layers, batch, bank).float()
            maps[name] = grown(made, (SIDE, SIDE)).relu()
            hits[name] = pointed(made, chunk)[:, 0] > 0
        for index, scene in enumerate(chunk):
            heats = {name: own[index] for name, own in maps.items()}
            right = {name: bool(own[index]) for name, own in hits.items()}
            result.append(Example(scene, heats, right))
    return result


def _small(chosen: Sequence[Example], names: Sequence[str]) -> Image.Image:
    """A figure with one row for each scene."""
    titles = ["query", "negative", "scene", *(name.replace(", ", "\n", 1) for name in names)]
    figure = Figure(figsize=(1.7 * len(titles), 1.78 * len(chosen) + 0.45), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(len(chosen), len(titles), squeeze=False)
    for line, one in zip(axes, chosen, strict=True):
        plain = [one.scene.queries["category"], one.scene.negative, one.scene.picture]
        shown = [np.asarray(picture) for picture in plain]
        shown += [
            _drawn(shown[2], one.heats[name], rooted=name.startswith(ROOTED)) for name in names
        ]
        for axis, picture in zip(line, shown, strict=True):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(color="0.8", linewidth=0.6)
        line[2].contour(one.scene.positive, [0.5], colors="#1a9e3f", linewidths=1.3)
        line[2].contour(one.scene.distractor, [0.5], colors="#d02f2f", linewidths=1.3)
        for axis, name in zip(line[3:], names, strict=True):
            top, left = np.unravel_index(int(one.heats[name].argmax()), (SIDE, SIDE))
            colour = "#1a9e3f" if one.right[name] else "#d02f2f"
            axis.plot(left, top, "o", ms=6.5, mfc=colour, mec="white", mew=1.3)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8.5)
    drawn = Image.open(io.BytesIO(png_of(figure))).convert("RGB")
    size = (WIDTH, round(drawn.height * WIDTH / drawn.width))
    return drawn.resize(size, Image.Resampling.LANCZOS)


def _drawn(picture: NDArray[np.uint8], heat: Tensor, *, rooted: bool) -> NDArray[np.uint8]:
    """As the figures of ``explain`` show it."""
    top = float(heat.max())
    scaled = heat / top if top > 0 else torch.zeros_like(heat)
    scaled = scaled.sqrt() if rooted else scaled
    return overlay(picture, scaled.numpy().astype(np.float32))
