"""Re-identification on drawn persons: ImageNet's features, PCB, and PCB with similarity mining.

    python benchmarks/reid.py --out docs/benchmarks/reid.md

Persons are drawn (``persons.py``) into the folders of Market-1501: 60 to train on, 100 others to be
found before other cameras, among distractors. They show that recipe, protocol and commands work
together; they say nothing about photographs of people.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from persons import write_persons
from store import publish

from simexplain import evaluate_reid, load_model, train
from simexplain.data.datasets import read_dataset
from simexplain.evaluation.retrieval_result import Reidentification

BACKBONE = "timm:tf_efficientnet_lite0"
SETTINGS: dict[str, Any] = {
    "backbone": f"pcb:{BACKBONE}", "size": (128, 64), "embedding": 384, "lr": 5e-4, "head_lr": 2e-3,
    "proxy_lr": 1e-2, "attention_triplets": 0, "accelerator": "cpu", "step_epochs": 100,
}  # fmt: skip
"""In place of the recipe's: a smaller network and picture, and rates for a hundred steps."""


HEAD = """# Re-identification of drawn persons

EfficientNet-Lite0 on inputs of 128x64, the settings those of the recipes, but smaller. Written by

    python benchmarks/reid.py --out FILE
"""


def trained(recipe: str, data: Path, out: Path, epochs: int, seed: int) -> Path:
    """The last model of a run."""
    run = train(
        read_dataset("market1501", data), out=out, recipe=recipe, epochs=epochs,
        eval_every=epochs, seed=seed, **SETTINGS,
    )  # fmt: skip
    return Path(run.files["last"])


def row(name: str, result: list[Reidentification]) -> str:
    """A line of the table: means over the seeds, their range where there are several."""
    cells = []
    for values in (
        *([one.rank[k] for one in result] for k in (1, 5, 10)),
        [one.map for one in result],
    ):
        mean = f"{sum(values) / len(values):.3f}"
        several = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
        cells.append(mean + several)
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Draws, trains, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=1, help="Runs of each recipe.")
    parser.add_argument(
        "--persons", type=int, nargs=2, default=(60, 100), metavar=("TRAIN", "TEST")
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="Folder for the persons and the runs. [none]")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as made:
        folder = given.keep or Path(made)
        data = write_persons(folder / "persons", train=given.persons[0], test=given.persons[1])
        split = read_dataset("market1501", data)
        rows = []
        for name, source in (
            ("ImageNet, one vector", BACKBONE),
            ("ImageNet, six stripes", f"pcb:{BACKBONE}"),
        ):
            model = load_model(source, size=SETTINGS["size"], fit="squash")
            rows.append(row(name, [evaluate_reid(model, split)]))
        for name, recipe in (
            ("PCB (`pcb-market1501`)", "pcb-market1501"),
            ("PCB and mining (`sam-reid-market1501`)", "sam-reid-market1501"),
        ):
            result = []
            for seed in range(given.seeds):
                out = folder / f"{recipe}-{seed}"
                path = trained(recipe, data, out, given.epochs, seed)
                result.append(evaluate_reid(load_model(path), split))
            rows.append(row(name, result))
    first = result[0]
    page = f"""| {len(first.queries)} queries | rank-1 | rank-5 | rank-10 | mAP |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

{first.persons} persons searched in {first.searched} pictures, {first.distractors} of them
distractors; {first.junk} of junk ignored. {len(split.classes)} other persons in
{len(split.train)} pictures to train on, {given.epochs} epochs, {given.seeds} seed(s),
{given.threads} thread(s).
"""
    publish(f"{HEAD}\n{page}", given.out)


if __name__ == "__main__":
    main()
