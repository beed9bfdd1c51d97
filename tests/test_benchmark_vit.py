"""The benchmark of transformers trains, judges what explain gives, and repeats no run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("skimage", reason="scikit-image has the backgrounds: pip install -e .[dev]")
pytest.importorskip("timm")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import scenes
import vit_pointing as bench
from test_benchmark_faithfulness import folder  # noqa: F401


@pytest.mark.slow
def test_it_writes_its_tables_and_keeps_its_runs(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    record, out = tmp_path / "a.json", tmp_path / "a.md"
    tiny = [str(folder), "--steps", "5", "--scenes", "2", "--seeds", "0", "--record", str(record)]
    bench.main([*tiny, "--pools", "token", "--out", str(out)])
    first = json.loads(record.read_text())["runs"]
    bench.main([*tiny, "--pools", "token", "avg", "--out", str(out)])
    runs = json.loads(record.read_text())["runs"]
    assert runs[0] == first[0]
    assert [run["pool"] for run in runs] == ["token", "avg"]
    page = out.read_text()
    assert str(folder) not in page
    for setting in ("same", "category"):
        for name in bench.METHODS:
            scores = np.array(runs[1][setting][name])
            assert scores.shape == (2, 3)
            assert (scores[:, :2].sum(axis=1) <= 1).all()
            assert page.count(f"| {name} |") == 4


def test_judging_a_map(folder: Path) -> None:  # noqa: F811
    (scene,) = scenes.compose_scenes(scenes.read_stamps(folder), 1, seed=2)
    ideal = torch.from_numpy(scene.positive).float()
    wrong = torch.from_numpy(scene.distractor).float()
    maps = torch.stack([ideal, wrong, ideal + 3 * wrong, torch.zeros_like(ideal)])
    result = bench.judged(maps, [scene] * 4)
    np.testing.assert_array_equal(result, [[1, 0, 1], [0, 1, 0], [0, 1, 0], [0, 0, 0.5]])


def test_errors_are_those_of_runs_where_runs_differ_more_than_scenes() -> None:
    def run(values: list[float]) -> dict:
        return {"same": {"x": [[value, 0.0, 0.0] for value in values]}}

    (mean, error), *_ = bench.summary([run([1, 1, 1]), run([0, 0, 0])], "same", "x")
    assert (mean, error) == pytest.approx((0.5, 0.5))
    (mean, error), *_ = bench.summary([run([1, 0, 1, 0])], "same", "x")
    assert (mean, error) == pytest.approx((0.5, np.std([1, 0, 1, 0], ddof=1) / 2))


def test_training_pictures_show_what_their_labels_say(folder: Path) -> None:  # noqa: F811
    views = bench.Views(scenes.read_stamps(folder), seed=0)
    images, shown = views.batch(20)
    assert images.shape == (20, 3, 64, 64)
    torch.testing.assert_close(shown.sum(1), torch.ones(20))
    teal = views.names.index("teal")
    pixels = images * torch.tensor(bench.STD).view(3, 1, 1) + torch.tensor(bench.MEAN).view(3, 1, 1)
    colour = torch.tensor([0.0, 128 / 255, 128 / 255]).view(3, 1, 1)
    close = ((pixels - colour).abs().amax(1) < 0.05).flatten(1).sum(1)
    assert (close[shown[:, teal] > 0] > 50).all()
    assert (close[shown[:, teal] == 0] < 5).all()
