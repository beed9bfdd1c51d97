"""Two processes that share every batch train the network that one process trains."""

from __future__ import annotations

import csv
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")
pytest.importorskip("pytorch_metric_learning")

import torch
from cli_runs import environment
from training_cases import TINY, state_of, striped

from simexplain.errors import ModelError
from simexplain.losses.objective import ProcessGroup
from simexplain.training.module import share
from simexplain.training.options import TrainOptions
from simexplain.training.training import train

if not torch.distributed.is_available():
    pytest.skip("PyTorch was built without torch.distributed", allow_module_level=True)

# Plain gradient descent, since Adam would hide a gradient that is twice as large.
CASES: dict[str, dict[str, Any]] = {
    "mining": {
        "mining": "triplet", "mining_start": 1, "warmup_epochs": 1, "bce": 0.1,
        "optimiser": "sgd", "lr": 0.05, "head_lr": 0.05, "proxy_lr": 0.05,
    },
    "avsl": {
        "avsl": True, "loss": "proxy_anchor", "optimiser": "sgd", "lr": 1e-3, "head_lr": 1e-3,
        "clip": 10.0,
    },
}  # fmt: skip
# Both processes write to one pipe: ``os.write`` keeps a line whole, ``print`` does not.
SCRIPT = """
import json, os, sys, torch
torch.set_num_threads(1)
from simexplain.errors import ModelError
from simexplain.training.training import train
if __name__ == "__main__":
    data, out, runs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    for name, settings in runs.items():
        result = train(data, out=f"{out}/{name}", devices=2, **settings)
        os.write(1, f"{name} ended {result.best_epoch} {len(result.rows)}\\n".encode())
    try:
        train(data, out=f"{out}/alone", **settings)
    except ModelError as error:
        os.write(1, f"{error}\\n".encode())
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return striped(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def by_two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Runs of one script, as a user's; lightning starts its second process. And what it printed."""
    out = tmp_path_factory.mktemp("two")
    runs = {name: {**TINY, "batches_per_epoch": 3, **case} for name, case in CASES.items()}
    script = out / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    done = subprocess.run(
        [sys.executable, script, data, out, json.dumps(runs)],
        env={**environment(), "MASTER_PORT": port},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, done.stdout + done.stderr


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(
    case: str, data: Path, by_two: tuple[Path, str], tmp_path: Path
) -> None:
    settings = {**TINY, "batches_per_epoch": 3, **CASES[case]}
    alone = train(data, out=tmp_path / "one", **settings)
    assert by_two[1].count(f"{case} ended {alone.best_epoch} 3") == 2, by_two[1]
    both = by_two[0] / case
    one, two = state_of(tmp_path / "one" / "last.pt"), state_of(both / "last.pt")
    begun = state_of_untrained(settings)
    moved = max(float((one[n] - begun[n]).abs().max()) for n in begun)
    assert moved > 1e-3, moved
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-3 * moved, msg=name)
    for first, second in zip(rows_of(tmp_path / "one"), rows_of(both), strict=True):
        if first["epoch"] != "0":
            assert float(second["loss"]) == pytest.approx(float(first["loss"]), rel=1e-3)
    # What several began one can go on with, since a checkpoint knows nothing of processes.
    longer = train(data, out=both, resume=True, devices=1, epochs=3)
    assert [row["epoch"] for row in longer.rows] == [0, 1, 2, 3]


def test_a_script_goes_on_in_all_its_processes(by_two: tuple[Path, str]) -> None:
    """Another run on two devices shares them; one on one device would run in both."""
    out, record = by_two
    assert record.count(" ended ") == 2 * len(CASES) > 2, record
    assert record.count("goes on in 2 processes, got one device; begin it in a script of") == 2
    assert not (out / "alone").exists()


def state_of_untrained(settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    from simexplain.training.building import build_model

    model = build_model(TrainOptions(**settings))
    own = model.base.network if settings.get("avsl") else model.network
    return {n: t for n, t in own.state_dict().items() if t.is_floating_point()}


def test_the_shares_of_a_batch_are_the_batch() -> None:
    batch = list(range(12))
    parts = [share(batch, ProcessGroup(rank, 3)) for rank in range(3)]
    assert parts[0] + parts[1] + parts[2] == batch
    with pytest.raises(ModelError, match="3 processes can share evenly"):
        TrainOptions(classes_per_batch=4, images_per_class=2, devices=3)


def test_the_command_line_starts_two_processes_and_speaks_once(data: Path, tmp_path: Path) -> None:
    given = [
        "--backbone", "timm:test_efficientnet", "--untrained", "--size", "32", "--embedding",
        "12", "--classes-per-batch", "4", "--images-per-class", "2", "--epochs", "1",
        "--attention-triplets", "0", "--batches-per-epoch", "2",
    ]  # fmt: skip
    done = subprocess.run(
        [
            sys.executable, "-m", "simexplain", "train", data, "--out", tmp_path / "run",
            "--accelerator", "cpu", "--devices", "2", "--json", *given,
        ],
        env=environment(),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["best_epoch"] == 1
    assert done.stderr == ""


def test_parameters_without_a_part_in_the_embedding_are_found() -> None:
    from simexplain.training.building import build_model
    from simexplain.training.module import has_idle

    plain = build_model(TrainOptions(**TINY))
    assert not has_idle(plain)
    plain.network.extra = torch.nn.Linear(2, 2)
    assert has_idle(plain)
    full = {**TINY, "avsl": True, "loss": "proxy_anchor"}
    model = build_model(TrainOptions(**full))
    lower = build_model(TrainOptions(**full, levels=model.levels[:2]))
    assert has_idle(lower)
    assert has_idle(build_model(TrainOptions(**full, ablation="+M")))
    assert all(parameter.grad is None for parameter in lower.parameters())
