"""The benchmark of networks that are believed: what it counts, and its page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("skimage", reason="scikit-image has the backgrounds: pip install -e .[dev]")
pytest.importorskip("lightning", reason="training needs it: pip install -e .[train]")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import believed  # noqa: E402
from scenes import compose_scenes, read_stamps  # noqa: E402
from test_benchmark_faithfulness import folder  # noqa: E402, F401

from simexplain import Preprocess, as_similarity_model  # noqa: E402
from simexplain.metrics.curves import blurred  # noqa: E402


def test_a_rate_counts_every_network_the_same() -> None:
    doubted, fine = [[0.1, 0.1], [0.5]], [[0.5, 0.5], [0.5]]
    first = {"a, triplet": [doubted, doubted], "b, triplet": [doubted, doubted]}
    second = {"a, triplet": [fine], "b, triplet": [doubted], "b, similar pair": [doubted]}
    assert believed.rate([first, second], "triplet", 0.8) == (0.75, 6)
    assert believed.rate([first, second], "triplet", 0.1) == (0.0, 6)


def test_sights_are_those_of_the_check(folder: Path) -> None:  # noqa: F811
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = as_similarity_model(network.eval(), preprocess=Preprocess(size=(48, 48), fit="squash"))
    scenes = compose_scenes(read_stamps(folder), 2, 0)
    result = believed.sights_of(model, {"emoji": scenes})
    assert list(result) == [f"emoji, {part}" for part in believed.PARTS]
    shown = (scenes[1].queries["category"], scenes[1].picture)
    images = torch.stack([model.preprocess(picture)[0] for picture in shown])
    with torch.no_grad():
        rows, veiled = (F.normalize(network(one), dim=1) for one in (images, blurred(images)))
    moved, (spread,) = result["emoji, similar pair"][1]
    assert np.allclose(moved, 1 - (rows * veiled).sum(1), atol=2e-5)
    away = max(float(1 - one[0] @ one[1]) for one in (rows, veiled))
    assert spread == pytest.approx(away, abs=2e-5)


def test_the_page_is_that_of_the_record() -> None:
    record = json.loads((ROOT / "benchmarks/records/believed.json").read_text("utf-8"))
    written = (ROOT / "docs/benchmarks/believed.md").read_text("utf-8")
    assert written == believed.page(record)
    explained = (ROOT / "docs/explain.md").read_text("utf-8")
    for kind in believed.KINDS:
        own = [one["sights"] for one in record["held-out"].values() if one["kind"] == kind]
        rates = [f"{believed.rate(own, part, believed.SEES)[0]:.2f}" for part in believed.PARTS]
        assert f"| {' | '.join(rates)} |" in explained, kind
