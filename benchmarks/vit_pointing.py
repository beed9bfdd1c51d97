"""Which method for a transformer: small ones trained here, scenes of two emoji, one of them sought.

A vision transformer with a convolutional stem learns the first 60 % of the emoji classes, alone on
white and two at a time on a ground. Scenes and queries are of the other classes: the map of a scene
should point at the emoji that the query shows, not at its neighbour.

    python benchmarks/vit_pointing.py DATA --record benchmarks/records/vit_pointing.json \
        --out docs/benchmarks/vit_pointing.md
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from held_out import TRAINED
from PIL import Image, ImageOps
from pointing import heatmaps
from scenes import GROUNDS, SIDE, Scene, Stamps, compose_scenes, divided, read_stamps
from skimage import data
from store import keep, publish
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain import Comparison, Preprocess, SimilarityModel, as_similarity_model, explain

PIXELS, SMALL, LARGE = 64, 30, 52
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
BATCH, CHUNK = 64, 25
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("attention", {}),
    "attention rollout": ("attention", {"rollout": True}),
    "attention_relevance": ("attention_relevance", {}),
    "attention_relevance, score held": ("attention_relevance", {"score": "held"}),
    "grad_eclip": ("grad_eclip", {}),
    "grad_eclip, score held": ("grad_eclip", {"score": "held"}),
    "sam relative": ("sam", {"weights": "relative"}),
    "similarity_cam held": ("similarity_cam", {"score": "held"}),
    "focus": ("focus", {}),
    "decomposition": ("decomposition", {}),
    "occlusion": ("occlusion", {}),
}


def network(pool: str) -> nn.Module:
    """A transformer of three blocks on an 8 x 8 grid; ``pool`` is ``token`` or ``avg``."""
    from timm.models.vision_transformer import VisionTransformer
    from timm.models.vision_transformer_hybrid import HybridEmbed

    widths, stem = (3, 16, 32, 64), nn.Sequential()
    for below, width in itertools.pairwise(widths):
        stem.extend([nn.Conv2d(below, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()])
    return VisionTransformer(
        PIXELS, embed_layer=partial(HybridEmbed, stem), patch_size=1, embed_dim=64, depth=3,
        num_heads=4, num_classes=0, global_pool=pool,
    )  # fmt: skip


class Views:
    """Training pictures, composed as they are drawn: one emoji on white, or two on a ground."""

    def __init__(self, stamps: Stamps, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.names = sorted(stamps)
        self.grounds = [np.asarray(getattr(data, name)()) for name in GROUNDS]
        self.small, self.large = (
            [[np.asarray(_contained(one, side)) for one in stamps[name]] for name in self.names]
            for side in (SMALL, LARGE)
        )

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Pictures ``(size,3,64,64)``, normalised, and what is in them ``(size,classes)``."""
        pictures = np.empty((size, PIXELS, PIXELS, 3), np.float32)
        shown = torch.zeros(size, len(self.names))
        for number in range(size):
            alone = self.random.random() < 0.5
            picked = self.random.choice(len(self.names), 1 if alone else 2, replace=False)
            pictures[number] = self._alone(picked[0]) if alone else self._scene(picked)
            shown[number, picked] = 1 / len(picked)
        images = torch.from_numpy(pictures / 255).permute(0, 3, 1, 2)
        return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), shown

    def _alone(self, label: int) -> np.ndarray:
        page = np.full((PIXELS, PIXELS, 3), 255, np.float32)
        return self._pasted(page, self.large[label], (0, PIXELS))

    def _scene(self, labels: Sequence[int]) -> np.ndarray:
        texture = self.grounds[self.random.integers(len(self.grounds))][::3, ::3]
        top, left = (int(self.random.integers(side - PIXELS + 1)) for side in texture.shape)
        grey = texture[top : top + PIXELS, left : left + PIXELS, None].astype(np.float32)
        page = grey * self.random.uniform(0.6, 1.0, 3).astype(np.float32)
        for label, half in zip(labels, self.random.permutation(2), strict=True):
            edges = (half * PIXELS // 2, (half + 1) * PIXELS // 2)
            page = self._pasted(page, self.small[label], edges)
        return page

    def _pasted(self, page: np.ndarray, variants: list, edges: tuple[int, int]) -> np.ndarray:
        stamp = variants[self.random.integers(len(variants))]
        stamp = stamp[:, ::-1] if self.random.random() < 0.5 else stamp
        height, width = stamp.shape[:2]
        top = int(self.random.integers(PIXELS - height + 1))
        left = int(self.random.integers(edges[0], edges[1] - width + 1))
        alpha = stamp[:, :, 3:].astype(np.float32) / 255
        part = page[top : top + height, left : left + width]
        part[:] = alpha * stamp[:, :, :3] + (1 - alpha) * part
        return page


def _contained(stamp: Image.Image, side: int) -> Image.Image:
    return ImageOps.contain(stamp, (side, side), Image.Resampling.LANCZOS)


def trained(stamps: Stamps, pool: str, steps: int, seed: int) -> nn.Module:
    """A network after so many batches: cosines with a vector of each class as logits."""
    torch.manual_seed(seed)
    views, made = Views(stamps, seed), network(pool)
    classes = nn.Parameter(torch.randn(len(stamps), 64))
    optimiser = torch.optim.AdamW([*made.parameters(), classes], lr=2e-3, weight_decay=0.02)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.15)
    made.train()
    for step in range(steps):
        images, shown = views.batch(BATCH)
        logits = 16 * F.normalize(made(images), dim=1) @ F.normalize(classes, dim=1).T
        loss = F.cross_entropy(logits, shown)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        plan.step()
        if step % 100 == 0:
            print(f"{pool} seed {seed} step {step} loss {loss.item():.2f}", flush=True)
    return made.eval()


def measured(model: SimilarityModel, scenes: Sequence[Scene], setting: str) -> dict[str, Any]:
    """For each method ``(scenes,3)``: peak in the positive, in the distractor, more heat in it.

    The last is 1 where the mean heat over the positive is above that over the distractor.
    """
    result: dict[str, Any] = {name: [] for name in METHODS}
    right = []
    for start in range(0, len(scenes), CHUNK):
        chunk = scenes[start : start + CHUNK]
        queries, pictures, negatives = (
            torch.stack([model.preprocess(picture)[0] for picture in pictures])
            for pictures in (
                [scene.queries[setting] for scene in chunk],
                [scene.picture for scene in chunk],
                [scene.negative for scene in chunk],
            )
        )
        with torch.no_grad():
            query, seen, other = map(model.embed, (queries, pictures, negatives))
        right += ((query * seen).sum(1) > (query * other).sum(1)).tolist()
        comparison = Comparison.pair(queries, pictures)
        for name, (method, options) in METHODS.items():
            maps = explain(model, comparison, method, **options, check=False).maps[:, 1]
            result[name].append(judged(maps, chunk))
    return {"nearer": right, **{name: np.concatenate(parts) for name, parts in result.items()}}


def judged(maps: Tensor, scenes: Sequence[Scene]) -> np.ndarray:
    """Peak in the positive, peak in the distractor, and more heat in the positive, ``(M,3)``."""
    rows = []
    for heat, scene in zip(heatmaps(maps, (SIDE, SIDE)).double().numpy(), scenes, strict=True):
        peak = np.unravel_index(heat.argmax(), heat.shape)
        flat = float(heat.max()) == float(heat.min())
        inside, beside = heat[scene.positive].mean(), heat[scene.distractor].mean()
        side = 0.5 if inside == beside else float(inside > beside)
        rows.append((scene.positive[peak] * (not flat), scene.distractor[peak] * (not flat), side))
    return np.array(rows, dtype=float)


def record(options: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures; what the page and later readers need."""
    folder = options.data / "images" if (options.data / "images").is_dir() else options.data
    known, held = divided(read_stamps(folder), TRAINED)
    prepare = Preprocess(size=(PIXELS, PIXELS), mean=MEAN, std=STD, fit="squash")
    runs = _kept(options)
    for pool in options.pools:
        for seed in options.seeds:
            if any((run["pool"], run["seed"]) == (pool, seed) for run in runs):
                continue
            begun = time.process_time()
            made = trained(known, pool, options.steps, seed)
            model = as_similarity_model(made, preprocess=prepare, name=f"vit {pool}")
            scenes = compose_scenes(held, options.scenes, 100 + seed)
            run: dict[str, Any] = {"pool": pool, "seed": seed, "layer": model.default_layer}
            run["train_seconds"] = round(time.process_time() - begun)
            areas = [(scene.positive.mean(), scene.distractor.mean()) for scene in scenes]
            run["areas"] = np.mean(areas, axis=0).round(4).tolist()
            for setting in ("same", "category"):
                scores = measured(model, scenes, setting)
                nearer = scores.pop("nearer")
                run[setting] = {name: rows.astype(float).tolist() for name, rows in scores.items()}
                run[setting]["nearer"] = float(np.mean(nearer))
            runs.append(run)
            print(f"{pool} seed {seed} measured, {time.process_time() - begun:.0f} s", flush=True)
    return {
        "classes": {"trained": len(known), "held_out": len(held)}, "steps": options.steps,
        "batch": BATCH, "scenes": options.scenes, "torch": torch.__version__, "runs": runs,
    }  # fmt: skip


def _kept(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs in the record that were made in the same way; they are not made again."""
    if not (options.record and options.record.exists()):
        return []
    result = json.loads(options.record.read_text(encoding="utf-8"))
    same = (result["steps"], result["scenes"]) == (options.steps, options.scenes)
    return list(result["runs"]) if same else []


def summary(runs: Sequence[dict[str, Any]], setting: str, method: str) -> list[tuple[float, float]]:
    """Mean and standard error of each measure over all scenes of some runs.

    The error is that of the means of runs where there are several, and at least that of scenes.
    """
    scores = [np.array(run[setting][method]) for run in runs]
    every = np.concatenate(scores)
    error = every.std(axis=0, ddof=1) / np.sqrt(len(every))
    if len(scores) > 1:
        means = np.array([one.mean(axis=0) for one in scores])
        error = np.maximum(error, means.std(axis=0, ddof=1) / np.sqrt(len(means)))
    return list(zip(every.mean(axis=0).tolist(), error.tolist(), strict=True))


def page(result: dict[str, Any], command: str) -> str:
    """The tables in Markdown."""
    lines = [
        "# Methods on small transformers", "",
        f"Written by `{command}`: {result['classes']['trained']} emoji classes trained on, scenes "
        f"of the other {result['classes']['held_out']}; {result['steps']} batches of "
        f"{result['batch']}, {result['scenes']} scenes a run. `hit`: the peak lies in the emoji "
        "that the query shows; `other`: in its neighbour; `right`: more mean heat in the former "
        "(chance 0.5). Mean ± standard error, the larger of that over scenes and that over runs.",
    ]  # fmt: skip
    for pool, title in (("token", "Class token"), ("avg", "Mean over the patches")):
        runs = [run for run in result["runs"] if run["pool"] == pool]
        for setting in ("same", "category") if runs else ():
            chance = np.mean([run["areas"] for run in runs], axis=0)
            nearer = np.mean([run[setting]["nearer"] for run in runs])
            layers = ", ".join(sorted({run["layer"] for run in runs}))
            lines += [
                "", f"## {title}, query of the {'very emoji' if setting == 'same' else 'category'}",
                "", f"{len(runs)} runs; default layer `{layers}`. The embedding of the scene is "
                f"nearer to the query than to a picture of the neighbour in {nearer:.0%} of the "
                "scenes.", "", "| method | hit | other | right |", "| --- | --- | --- | --- |",
                f"| chance | {chance[0]:.2f} | {chance[1]:.2f} | 0.50 |",
            ]  # fmt: skip
            for name in METHODS:
                cells = [f"{m:.2f} ± {e:.2f}" for m, e in summary(runs, setting, name)]
                lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, measures, keeps the record and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data", type=Path, help="category folders with RGBA pictures")
    parser.add_argument("--steps", type=int, default=1500, help="batches of training")
    parser.add_argument("--scenes", type=int, default=100, help="for each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--pools", nargs="+", default=["token", "avg"], choices=["token", "avg"])
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="JSON with every scene; runs in it are not repeated",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="Markdown file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result = record(options)
    if options.record:
        keep("vit_pointing", result, options.record)
    lines = f"--steps {options.steps} --scenes {options.scenes}"
    publish(
        page(result, f"python benchmarks/vit_pointing.py DATA {lines}"), options.out, numbers=False
    )


if __name__ == "__main__":
    main()
