"""The page of training results: from records alone, with means, spreads and paired gains."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("lightning", reason="training wants lightning: pip install -e .[train]")
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("training_results")


@pytest.fixture
def page(
    bench: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Writes a page of one table from records alone."""

    def made(known: Mapping[str, Mapping[str, float]], table: str) -> str:
        records, out = tmp_path / "records.json", tmp_path / "page.md"
        records.write_text(json.dumps(known), encoding="utf-8")
        fixed = ["folder", "--runs", str(tmp_path / "runs"), "--epochs", "6", "--done"]
        files = ["--records", str(records), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["bench", *fixed, *files, "--tables", table])
        bench.main()
        return out.read_text(encoding="utf-8")

    return made


def recalls(value: float) -> dict[str, float]:
    return {"recall@1": value, "recall@2": value, "map_at_r": value / 2}


def test_gains_are_paired_over_the_seeds_that_both_rows_have(page: Callable[..., str]) -> None:
    mined = "gamma=0.05-loss=triplet-mining=triplet"
    values = {
        "loss=triplet-seed0": 0.70, "loss=triplet-seed1": 0.72, "loss=triplet-seed2": 0.77,
        f"{mined}-seed0": 0.71, f"{mined}-seed1": 0.75,
    }  # fmt: skip
    known = {f"{run}, 6 epochs": recalls(value) for run, value in values.items()}
    text = page(known, "architectures")
    row = next(line for line in text.splitlines() if line.startswith("| triplet + SAM"))
    assert "| 2 | 73.0 ± 2.8 |" in row
    assert "| +2.0 ± 1.0 |" in row
    assert "| triplet | 3 | 73.0 ± 3.6 |" in text
    assert "siamese" not in text.split("## ")[-1]


def test_trials_are_of_one_seed_and_compared_with_their_own_baseline(
    page: Callable[..., str],
) -> None:
    known = {
        "loss=triplet-seed0, 6 epochs": recalls(0.5),
        "loss=triplet-seed1, 6 epochs": recalls(0.9),
        "epochs=15-loss=triplet-seed0, 15 epochs": recalls(0.8),
        "epochs=15-gamma=0.05-loss=triplet-mining=triplet-seed0, 15 epochs": recalls(0.77),
    }
    text = page(known, "trials")
    assert "| no mining | 1 | 50.0 | 50.0 | 25.0 |  |" in text
    assert "| + SAM, 15 epochs | 1 | 77.0 | 77.0 | 38.5 | -3.0 |" in text


def test_no_two_different_runs_share_a_folder(bench: ModuleType) -> None:
    args = argparse.Namespace(gamma=0.05, gamma_bce=0.25, avsl={"eta": "raw"}, widths=[32, 128])
    result: dict[str, object] = {}
    for row in bench.rows(args):
        assert result.setdefault(row.run, dict(row.settings)) == dict(row.settings)
