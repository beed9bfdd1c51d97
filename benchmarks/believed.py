"""How often is a network that knows nothing found out, and how often is one that knows doubted?

With every explanation all pictures are shown blurred as well (``simexplain.checking``). Here that
is done for triplets and pairs of scenes, with networks that were trained and with networks whose
weights are random. The least ratio for a network to be believed was chosen on one half of the
classes and of the cut-outs; the page has the rates on the other.

    python benchmarks/believed.py EMOJI --stamps tuned=FOLDER --stamps held-out=FOLDER \
        --runs FOLDER --mobilenet FILE \
        --record benchmarks/records/believed.json --out docs/benchmarks/believed.md

Networks in the record are not measured again. For the file of MobileNetV2 and the cut-outs see
``faithfulness.py``, for the folder of runs ``trained_networks.py``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import trained_networks
from faithfulness_networks import LITE0, mobilenet_v2
from scenes import Scene, compose_scenes, read_stamps
from store import header, keep, line, publish
from trained_pointing import DATA, scenes_of

from simexplain import SimilarityModel, as_similarity_model, load_model
from simexplain.checking import CONSTANT, SEES, blind, sight
from simexplain.metrics.curves import blurred

SEED = 2000
SIDE = 112
RANDOM_SEEDS = (0, 1)

ARCHITECTURES = {
    "tuned": (
        "resnet18", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_100",
        "efficientnet_b0",
    ),
    "held-out": (
        "resnet26", "deit_tiny_patch16_224", "regnetx_002", "mixer_s32_224", "densenet121",
        "xcit_nano_12_p16_224", "edgenext_xx_small", "vgg11_bn", "ghostnet_100", "tinynet_e",
    ),
}  # fmt: skip
"""Of timm, with random weights; those of each half are measured there alone."""
_SIZED = ("vit_", "deit_", "mixer_", "xcit_")

KINDS = ("trained", "trained little", "random")
PARTS = {"triplet": (0, 1, 2), "similar pair": (0, 1), "dissimilar pair": (0, 2)}
"""Which of query, scene and negative."""
LEASTS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1)

Sights = dict[str, list[list[list[float]]]]
"""By data and part: of every scene what moved ``(K,)``, and the spread."""
Record = dict[str, dict[str, dict[str, Any]]]
"""By half and network: its kind and its sights."""


def networks(
    half: str, runs: Path, mobilenet: Path | None, seed: int = 0
) -> Iterator[tuple[str, str, Callable[[], SimilarityModel]]]:
    """Kind, name and maker of every network that is measured on a half."""
    yield "trained", "Lite0, ImageNet", lambda: load_model(LITE0)
    if mobilenet is not None:
        yield "trained", "MobileNetV2, ImageNet", lambda: mobilenet_v2(mobilenet)
    for name, settings in trained_networks.RUNS.items():
        file = trained_networks.weights_of(name, seed, runs)
        if file.is_file():
            kind = "trained" if settings.get("pretrained", True) else "trained little"
            yield kind, name, lambda file=file: load_model(str(file))
    for name in trained_networks.RANDOM:
        for own in RANDOM_SEEDS:
            made = lambda name=name, own=own: trained_networks.random_network(name, own)  # noqa: E731
            yield "random", f"{name}, seed {own}", made
    for name in ARCHITECTURES[half]:
        yield "random", f"timm {name}", lambda name=name: random_timm(name)


def random_timm(name: str) -> SimilarityModel:
    """A network of timm with random weights, at a small size."""
    torch.manual_seed(0)
    size = {"img_size": SIDE} if name.startswith(_SIZED) else {}
    model = as_similarity_model(timm.create_model(name, num_classes=0, **size).eval())
    model.preprocess = replace(model.preprocess, size=(SIDE, SIDE))
    return model


def sights_of(model: SimilarityModel, data: Mapping[str, Sequence[Scene]]) -> Sights:
    """What blurring does to all scenes, scene by scene."""
    prepare = replace(model.preprocess, fit="squash")
    result: Sights = {}
    for name, scenes in data.items():
        for scene in scenes:
            pictures = (scene.queries["category"], scene.picture, scene.negative)
            images = torch.stack([prepare(picture)[0] for picture in pictures])
            with torch.no_grad():
                rows, blurs = model.embed(torch.cat([images, blurred(images)])).chunk(2)
            for part, places in PARTS.items():
                moved, spread = sight(rows[list(places)], blurs[list(places)])
                values = [moved.tolist(), [float(spread)]]
                result.setdefault(f"{name}, {part}", []).append(
                    [[round(value, 5) for value in own] for own in values]
                )
    return result


def rate(sights: Sequence[Sights], part: str, least: float) -> tuple[float, int]:
    """The share of comparisons that are doubted, each network counting the same, and how many."""
    shares, count = [], 0
    for one in sights:
        judged = [
            blind(torch.tensor(moved), torch.tensor(spread[0]), least)
            for name, values in one.items()
            if name.endswith(f", {part}")
            for moved, spread in values
        ]
        shares.append(sum(judged) / len(judged))
        count += len(judged)
    return sum(shares) / max(1, len(shares)), count


def page(record: Record) -> str:
    """The whole Markdown page, from the record alone."""
    first = next(iter(record["held-out"].values()))["sights"]
    command = (
        "python benchmarks/believed.py EMOJI --stamps tuned=FOLDER --stamps held-out=FOLDER --runs "
        f"FOLDER --mobilenet FILE --scenes {len(next(iter(first.values())))} --record "
        "benchmarks/records/believed.json --out docs/benchmarks/believed.md"
    )
    lines = [
        "# Which networks are believed",
        "",
        "With every explanation the pictures are shown blurred as well. It is doubted where that "
        f"moves no embedding by a cosine distance of {CONSTANT}, or the embeddings by less on "
        f"average than {SEES} of the distance between the pictures of the comparison, blurred "
        "or not, whichever is larger. Comparisons are query, scene and negative of scenes of two "
        "emoji and of two cut-outs. Written by",
        "",
        f"    {command}",
        "",
        "*Trained* are networks with ImageNet weights, as they come and fine-tuned for similarity; "
        "*trained little* those that were trained from nothing and retrieve hardly better than "
        "random weights ([Networks trained for similarity](trained_networks.md)).",
        "",
        "## How often there is doubt",
        "",
        "Classes, cut-outs and architectures on which nothing was chosen; shares of comparisons, "
        "each network counting the same, and their number.",
        "",
        *_rates(record["held-out"], [SEES]),
    ]
    if "tuned" in record:
        lines += ["", "## How it was chosen", "", "The other half, for several least ratios.", ""]
        lines += _rates(record["tuned"], LEASTS)
    lines += [
        "",
        "## Each network",
        "",
        "Held-out; the share of triplets and pairs with a doubt.",
        "",
    ]
    lines += header(["network", "kind", *PARTS])
    for name, own in record["held-out"].items():
        rates = [f"{rate([own['sights']], part, SEES)[0]:.2f}" for part in PARTS]
        lines.append(line([name, own["kind"], *rates]))
    return "\n".join(lines) + "\n"


def _rates(result: Mapping[str, Any], leasts: Sequence[float]) -> list[str]:
    rows = header(["kind", "networks", "least ratio", *PARTS])
    for kind in KINDS:
        own = [one["sights"] for one in result.values() if one["kind"] == kind]
        for least in leasts if own else ():
            cells = ["{:.2f} ({})".format(*rate(own, part, least)) for part in PARTS]
            rows.append(line([kind, str(len(own)), str(least), *cells]))
    return rows


def measured(options: argparse.Namespace, record: Record) -> Iterator[Record]:
    """Adds what is not in the record yet, network by network."""
    emoji = options.emoji / "images" if (options.emoji / "images").is_dir() else options.emoji
    folders = dict(given.split("=", 1) for given in options.stamps)
    for half in DATA:
        data = {
            "emoji": scenes_of(emoji)[half].make(options.scenes, SEED),
            "cut-outs": compose_scenes(read_stamps(Path(folders[half])), options.scenes, SEED),
        }
        for kind, name, make in networks(half, options.runs, options.mobilenet):
            if name not in record.setdefault(half, {}):
                record[half][name] = {"kind": kind, "sights": sights_of(make(), data)}
                print(f"{half}, {name}: measured", flush=True)
                yield record


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("emoji", type=Path, help="class folders with one RGBA picture a vendor")
    add("--stamps", action="append", required=True, metavar="HALF=FOLDER", help="cut-outs")
    add("--runs", type=Path, required=True, metavar="FOLDER", help="of trained_networks.py")
    add("--mobilenet", type=Path, metavar="FILE", help="see faithfulness.py")
    add("--scenes", type=int, default=10, help="of emoji, and of cut-outs, for each half")
    add("--record", type=Path, required=True, metavar="FILE", help="JSON with every comparison")
    add("--out", type=Path, metavar="FILE", help="Markdown file to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, keeps the record and writes the page."""
    options = parsed(arguments)
    torch.set_num_threads(1)
    record: Record = {}
    if options.record.is_file():
        record = json.loads(options.record.read_text("utf-8"))
    for result in measured(options, record):
        keep("believed", result, options.record)
    publish(page(record), options.out, numbers=False)


if __name__ == "__main__":
    main()
