"""Queries of which a part is hidden: as large a part as asked for, and at the right place."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from simexplain import Comparison, Preprocess, as_similarity_model, evaluate_retrieval, explain
from simexplain.data.datasets import read_dataset
from simexplain.models.base import SimilarityModel

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("hidden_queries")


def test_boxes_have_their_share_and_lie_anywhere(bench: ModuleType) -> None:
    result = bench.boxes(50, (96, 64), 0.25, seed=0)
    assert result.shape == (50, 96, 64)
    assert bool((result.sum((1, 2)) == 48 * 32).all())
    rows, columns = result.any(2), result.any(1)
    assert bool((rows.sum(1) == 48).all())
    assert bool((columns.sum(1) == 32).all())
    assert len(result.unique(dim=0)) > 40
    assert result.any(0).float().mean() > 0.95
    assert torch.equal(result, bench.boxes(50, (96, 64), 0.25, seed=0))


@pytest.fixture
def model(tiny: nn.Module) -> SimilarityModel:
    return as_similarity_model(tiny, preprocess=Preprocess(size=(64, 64)))


def test_what_is_attended_is_what_the_map_shows_most(
    bench: ModuleType, model: SimilarityModel
) -> None:
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    hidden = bench.attended(model, images, 0.25)
    assert bool((hidden.sum((1, 2)) == 1024).all())
    maps = explain(model, Comparison.pair(images, images), "similarity_cam").heatmaps[:, 0]
    for own, heat in zip(hidden, maps, strict=True):
        assert heat[own].min() >= heat[~own].max()


def test_only_queries_lose_something(
    bench: ModuleType, model: SimilarityModel, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    for number in range(20):
        folder = tmp_path / f"class{number:02d}"
        folder.mkdir()
        picture = random.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        for vendor in ("one", "two"):
            noisy = np.clip(picture + random.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).resize((64, 64)).save(folder / f"{vendor}.png")
    result = bench.measure(model, tmp_path, share=0.5, seeds=[0, 1])
    queries = read_dataset("folder", tmp_path, train_share=0.6, group="name").queries
    plain = evaluate_retrieval(model, queries, ranks=(1,), grouped=True)
    assert result["whole"] == pytest.approx((100 * plain.recall[1], 100 * plain.map_at_r))
    assert set(result) == {"whole", "box 0", "box 1", "attended"}
    assert all(result[name][0] < result["whole"][0] for name in ("box 0", "box 1", "attended"))
    boxes = [(result["box 0"][n] + result["box 1"][n]) / 2 for n in (0, 1)]
    assert bench.averaged(result)[1] == f"{boxes[0]:.1f} / {boxes[1]:.1f}"
