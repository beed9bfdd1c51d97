"""The papers' tables at a small scale: what mining and AVSL do for retrieval, seed by seed.

    python benchmarks/training_results.py FOLDER --runs FOLDER --out docs/training-results.md

FOLDER has a class in each sub-folder (emoji: a code point, with a picture of each vendor). The
first 60 % of the classes in order of their names are trained on, the others searched; pictures of
the query's own file name (its vendor) are left out of the gallery. Every row is a run of
``simexplain train`` with the options that the page shows; runs that are in the folder of runs are
not repeated, interrupted ones go on. With ``--records benchmarks/records/training_runs.json``
neither
are those whose results are in that file, which new results are added to.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from held_out import TRAINED, held_out

from simexplain import evaluate_retrieval, load_model
from simexplain.models.avsl import AVSL
from simexplain.training.training import Source, train

KS = (1, 2, 4, 8)
_KS = (1, 2, 8, 32, 128)
COMMON: dict[str, Any] = {
    "size": (96, 96), "embedding": 128, "augmentation": "light", "lr": 1e-4, "head_lr": 1e-3,
    "weight_decay": 1e-4, "classes_per_batch": 16, "images_per_class": 2, "grouped": True,
    "ranks": KS, "attention_triplets": 0, "checkpoint_every": 0, "schedule": "cosine",
}  # fmt: skip
WARM = {"warmup_epochs": 1}
"""Head and proxies alone train for an epoch, as in AVSL's code, which does so for longer."""


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: What the line is called.
        tables: The tables that it stands in.
        settings: Of the run, beside :data:`COMMON`.
        measured: In place of the trained model's own distance: a change of its AVSL options.
    """

    name: str
    tables: tuple[str, ...]
    settings: Mapping[str, Any]
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> str:
        """The name of the run, which rows that are measured otherwise share."""
        record = "-".join(f"{name}={value}" for name, value in sorted(self.settings.items()))
        return "".join(c if c.isalnum() or c in "=-." else "_" for c in record)


def rows(args: argparse.Namespace) -> list[Row]:
    """Every row; what several tables show is one."""
    bce, mine = args.gamma_bce, args.gamma
    arrangements = {"siamese": "contrastive", "triplet": "triplet", "quadruplet": "quadruplet"}
    also = {"siamese": ("table1",), "triplet": ("fill",)}
    result = []
    for arch, loss in arrangements.items():
        plain = {"loss": loss}
        tables = ("architectures", *also.get(arch, ()))
        mined = {**plain, "mining": arch, "gamma": mine}
        result.append(Row(f"{arch}", tables, plain))
        if arch == "siamese":
            both = {**plain, "bce": bce, "bce_mining": mine, "mining_options": (("arch", arch),)}
            result.append(Row("siamese + BCE", ("table1",), {**plain, "bce": bce}))
            result.append(Row("siamese + BCE + mining", ("table1",), both))
        result.append(Row(f"{arch} + SAM", tables, mined))
        if arch == "triplet":
            border = {**mined, "mining_options": (("fill", "border"),)}
            result.append(Row("triplet + SAM, border", ("fill",), border))
    return result + graphs(args) + widths(args) + trials(mine)


def graphs(args: argparse.Namespace) -> list[Row]:
    """AVSL: with and without, part by part, and with other k."""
    result = []
    for loss, name in (("margin", "Margin"), ("proxy_anchor", "ProxyAnchor")):
        plain, whole = settings_of(loss, args)
        tables = ("avsl", f"ablation {loss}")
        result.append(Row(name, tables, plain))
        result += [
            Row(f"{name} {part}", (f"ablation {loss}",), whole, {"inference": inference})
            for part, inference in (
                ("+ M", "top"),
                ("+ M & R", "reliable"),
                ("+ M (concat)", "levels"),
            )
        ]
        result.append(Row(f"{name} + AVSL", tables, whole))
        result += [
            Row(f"{name} + AVSL, k = {k}", (f"k {loss}",), whole, {"edges_per_node": k})
            for k in _KS
        ]
    return result


def settings_of(loss: str, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a run without AVSL and of one with it."""
    graph = {"avsl": True, "edges_per_node": 32, **args.avsl, "loss": loss}
    if loss != "proxy_anchor":
        return {"loss": loss}, graph
    return {"loss": loss, "distance": "cosine", **WARM}, {**graph, **WARM}


def widths(args: argparse.Namespace) -> list[Row]:
    """Embeddings of other sizes; and without the warm-up that proxies need."""
    result = []
    plain, whole = settings_of("proxy_anchor", args)
    for width in args.widths:
        wide = {"embedding": width} if width != COMMON["embedding"] else {}
        result.append(Row(f"ProxyAnchor, {width}", ("width", "warmup"), plain | wide))
        result.append(Row(f"ProxyAnchor + AVSL, {width}", ("width",), whole | wide))
        cold = {name: value for name, value in plain.items() if name not in WARM}
        result.append(Row(f"ProxyAnchor, {width}, no warm-up", ("warmup",), cold | wide))
    return result


def trials(mine: float) -> list[Row]:
    """What else might help mining, on the first seed alone; triplets."""
    fine = (("layer", "bn2,blocks.4"), ("weights", "signed"))
    still = (*fine, ("through_mask", False))
    tried: dict[str, dict[str, Any]] = {
        "no mining": {},
        "+ SAM": {"gamma": mine},
        "+ SAM, maps of two layers, signed weights": {"gamma": mine, "mining_options": fine},
        "+ SAM, the same, hidden pixels as the border": {
            "gamma": mine, "mining_options": (("fill", "border"), *fine)
        },
        "+ SAM, attention alone learns": {
            "gamma": 0.25, "mining_options": (("through_network", False),)
        },
        "+ SAM, attention alone learns, less": {
            "gamma": 0.1, "mining_options": (("through_network", False),)
        },
        "+ SAM, Eq. 3 as printed, no gradient through masks": {
            "gamma": mine, "mining_options": (("rule", "printed"), *still)
        },
        "+ SAM, hidden triplets shall hold, larger masks": {
            "gamma": 0.2, "mining_options": (("rule", "held"), *still, ("beta", 0.3))
        },
        "no mining, rectangles erased": {"augmentation": "erased"},
        "no mining, 15 epochs": {"epochs": 15},
        "+ SAM, 15 epochs": {"epochs": 15, "gamma": mine},
        "no mining, constant rate, 12 epochs": {"epochs": 12, "schedule": "constant"},
        "+ SAM, constant rate, 12 epochs": {
            "epochs": 12, "schedule": "constant", "gamma": mine
        },
    }  # fmt: skip
    return [
        Row(name, ("trials",), {"loss": "triplet", **changes} | _mines(changes))
        for name, changes in tried.items()
    ]


def _mines(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {"mining": "triplet"} if "gamma" in changes else {}


def folder_of(row: Row, seed: int, args: argparse.Namespace) -> Path:
    """Where a run is."""
    return Path(args.runs / f"{row.run or 'plain'}-seed{seed}")


class Records:
    """What runs reached at their last epoch, by run and measure; with a file, kept from then on."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.known: dict[str, dict[str, float]] = {}
        if path and path.is_file():
            self.known = json.loads(path.read_text(encoding="utf-8"))

    def add(self, name: str, result: Mapping[str, float]) -> None:
        """Keeps shares of retrieval; other figures of an epoch, such as its seconds, are not."""
        kept = {key: v for key, v in result.items() if key.startswith(("recall@", "map_at_r"))}
        self.known[name] = kept
        if self.path:
            text = json.dumps(self.known, indent=1, sort_keys=True)
            self.path.write_text(text + "\n", encoding="utf-8")


def name_of(row: Row, seed: int, args: argparse.Namespace) -> str:
    """A run, all that sets it apart, and how it is measured."""
    options = "".join(f", {n}={v}" for n, v in sorted(row.measured.items()))
    epochs = row.settings.get("epochs", args.epochs)
    return f"{row.run}-seed{seed}, {epochs} epochs{options}"


def measured(
    row: Row, seed: int, args: argparse.Namespace, records: Records
) -> dict[str, float] | None:
    """Recall@K of one row and seed at the last epoch; None if it is unknown and not to be made."""
    name, folder = name_of(row, seed, args), folder_of(row, seed, args)
    if name not in records.known:
        there = (folder / "results.json").is_file()
        if args.done and not there:
            return None
        source = Source(train_share=TRAINED, group=args.group)
        if not there:
            trained(row, seed, folder, source, args)
        if row.measured:
            records.add(name, again(row, folder, args))
        else:
            record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            records.add(name, record["epochs"][-1])
    return records.known[name]


def trained(row: Row, seed: int, folder: Path, source: Source, args: argparse.Namespace) -> None:
    """Trains one run, or goes on with it."""
    start = time.perf_counter()
    settings = {**COMMON, "epochs": args.epochs, **row.settings, "seed": seed}
    given = {"eval_every": args.eval_every, **settings}
    resume = (folder / "checkpoints" / "last.ckpt").is_file()
    train(args.folder, out=folder, source=source, resume=resume, force=True, **given)
    print(f"{folder.name}: {time.perf_counter() - start:.0f} s", flush=True)


def again(row: Row, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """A trained AVSL model, its distance inferred otherwise."""
    model = load_model(folder / "last.pt")
    if not isinstance(model, AVSL):
        raise SystemExit(f"'{folder}' holds no AVSL model.")
    model.options = replace(model.options, **row.measured)
    queries = held_out(args.folder, args.group)
    result = evaluate_retrieval(model, queries, ranks=KS, grouped=True)
    return {f"recall@{k}": v for k, v in result.recall.items()}


TITLES = {
    "table1": (
        "Similarity attention, Table 1: siamese, with Grad-CAM's classifier, with SAM",
        "On CUB the paper has 65.9, 64.2, 63.4 and 68.3.",
    ),
    "architectures": (
        "Similarity attention, Table 2 (left): three arrangements with and without mining",
        "On CUB the paper gains 1.8, 1.9 and 1.7 points.",
    ),
    "fill": (
        "Similarity attention: what hidden pixels show",
        "The mask multiplies normalised pixels, so that what is hidden turns grey, also on these "
        "pictures' white ground; with `fill=border` it takes the colour of the picture's border.",
    ),
    "trials": (
        "Similarity attention: what else was tried",
        "Triplets, the first seed alone, whose standard error is 1.6 points of Recall@1. The gain "
        "is over the row without mining before it.",
    ),
    "avsl": (
        "AVSL, Table 1: margin loss and proxy anchor with and without AVSL",
        "On CUB the paper gains 3.2 points with margin and 2.2 with proxy anchor.",
    ),
    "ablation proxy_anchor": (
        "AVSL, Table 2: what each part does",
        "On Cars196 the paper has 87.7 for the baseline, then 89.7 (+ M), 89.9 (+ M & R), 90.6 "
        "(concat) and 91.5 (AVSL). All rows but the first are one training run measured in "
        "different ways: the parts differ in how a distance is inferred.",
    ),
    "ablation margin": ("The same with the margin loss", "Not in the paper."),
    "k proxy_anchor": (
        "AVSL, figure 5a: how many lower nodes stand in for a higher one",
        "One run a seed, trained with k = 32, measured with other k. The gain is over the first.",
    ),
    "k margin": ("The same with the margin loss", "Not in the paper."),
    "width": ("AVSL, figure 5b: the size of the embedding", "Nodes of each level for AVSL."),
    "warmup": (
        "Proxies need a warm-up",
        "Head and proxies alone train in the first epoch, as in all rows above with "
        "ProxyAnchor. Without that, proxies that are still random spoil the network. The gain is "
        "over the row before.",
    ),
}
Found = Mapping[str, Sequence[Mapping[str, Any]]]


def page(
    args: argparse.Namespace, rows: Sequence[Row], results: Found, common: Mapping[str, Any]
) -> str:
    """The page of the documentation."""
    lines = [
        "# Training, measured",
        "",
        "What similarity mining and AVSL do for retrieval at a scale that a processor can train:",
        "EfficientNet-Lite0 with its ImageNet weights at 96 pixels, emoji as pictures (a class is",
        "a code point, drawn by up to five vendors). The first 60 % of the classes are trained on,",
        "the others searched; the query's own vendor is left out of the gallery. Recall@K in %",
        f"after {args.epochs} epochs, mean and standard deviation over the seeds",
        f"{', '.join(map(str, args.seeds))}. *Gain* is the mean difference in Recall@1 to the row",
        "that it is compared with, seed by seed, with its standard error: seeds differ in head,",
        "order and views, but a seed's runs share them.",
        "",
        f"`python benchmarks/training_results.py FOLDER --runs FOLDER --epochs {args.epochs} "
        f"--gamma {args.gamma:g}{told(args.avsl)}`, with `--records` for runs that are known "
        f"already; torch {torch.__version__.split('+')[0]}, "
        f"Python {platform.python_version()}, processor only. Every run is a run of",
        "`simexplain train` with these settings and those of its row: "
        + ", ".join(f"`{name}={value}`" for name, value in common.items())
        + ".",
        "",
    ]
    for table in TITLES:
        chosen = [row for row in rows if table in row.tables and results[row.name]]
        if chosen:
            lines += [*section(table, chosen, results), ""]
    return "\n".join(lines)


def told(avsl: Mapping[str, Any]) -> str:
    """The option that settings of AVSL were given by."""
    return f" --avsl '{json.dumps(dict(avsl))}'" if avsl else ""


def section(table: str, rows: Sequence[Row], results: Found) -> list[str]:
    """A table; the gain is over the plain row before it, or over the first."""
    title, record = TITLES[table]
    cuts = [name for name in results[rows[0].name][0]["last"] if name.startswith("recall@")]
    if table == "trials":
        cuts.append("map_at_r")
    head = [name.replace("recall", "Recall").replace("map_at_r", "MAP@R") for name in cuts]
    lines = [
        f"## {title}",
        "",
        record,
        "",
        f"| row | seeds | {' | '.join(head)} | gain | settings |",
        "| --- |" + " --- |" * (len(cuts) + 3),
    ]
    reference = rows[0]
    for row in rows:
        if starts_anew(table, row.name):
            reference = row
        cells = [spread([100 * seed["last"][cut] for seed in results[row.name]]) for cut in cuts]
        gained = "" if row is reference else gain(results[row.name], results[reference.name])
        shown = {**row.settings, **row.measured}
        options = ", ".join(f"`{name}={value}`" for name, value in shown.items())
        count = len(results[row.name])
        lines.append(f"| {row.name} | {count} | {' | '.join(cells)} | {gained} | {options} |")
    return lines


def starts_anew(table: str, name: str) -> bool:
    """Whether a row is what those after it are compared with."""
    if table == "warmup":
        return "no warm-up" not in name
    return table in ("architectures", "trials", "avsl", "width") and "+" not in name


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def gain(own: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> str:
    """The paired difference in Recall@1 with its standard error, over the seeds of both."""
    known = {one["seed"]: one["last"]["recall@1"] for one in other}
    result = [
        100 * (one["last"]["recall@1"] - known[one["seed"]]) for one in own if one["seed"] in known
    ]
    if not result:
        return ""
    if len(result) == 1:
        return f"{result[0]:+.1f}"
    error = statistics.stdev(result) / len(result) ** 0.5
    return f"{statistics.mean(result):+.1f} ± {error:.1f}"


def main() -> None:
    """Trains what is missing, and writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="one sub-folder of pictures per class")
    parser.add_argument("--runs", type=Path, required=True, help="where runs are kept")
    parser.add_argument("--records", type=Path, help="results of earlier runs, and of these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--eval-every", type=int, default=4)
    parser.add_argument("--gamma", type=float, default=0.05)
    parser.add_argument("--gamma-bce", type=float, default=0.25)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--avsl", type=json.loads, default={}, help="settings of AVSL as JSON")
    parser.add_argument("--group", default="name")
    parser.add_argument("--tables", nargs="+", help="only these")
    parser.add_argument("--threads", type=int, default=1, help="1 makes runs repeat bit for bit")
    parser.add_argument("--done", action="store_true", help="train nothing; show what there is")
    parser.add_argument("--out", type=Path, help="write the page here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.runs.mkdir(parents=True, exist_ok=True)
    records = Records(args.records)
    wanted = [row for row in rows(args) if not args.tables or {*row.tables} & {*args.tables}]
    results: dict[str, list[dict[str, Any]]] = {row.name: [] for row in wanted}
    for seed in args.seeds:
        for row in wanted:
            if row.tables == ("trials",) and seed != args.seeds[0]:
                continue
            result = measured(row, seed, args, records)
            if result is not None:
                results[row.name].append({"seed": seed, "last": result})
    text = page(args, wanted, results, COMMON)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
