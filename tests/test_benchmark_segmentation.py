"""The benchmark of segmentation measures what ``segment`` gives, on scenes that say the truth."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from test_benchmarks import table_rows
from test_segmentation import ColourNet

from simexplain import Preprocess, as_similarity_model, segment
from simexplain.models.base import SimilarityModel
from simexplain.segmentation.cue import CUES, Cue

KINDS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("skimage", reason="scikit-image has the backgrounds: pip install -e .[dev]")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("segmentation")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two kinds with six discs each, of other shades, and one kind with too few."""
    for kind, colour in {**KINDS, "few": (0, 0, 0)}.items():
        (tmp_path / kind).mkdir()
        for number in range(2 if kind == "few" else 6):
            picture = Image.new("RGBA", (100, 90))
            shade = tuple(min(255, part + 5 * number) for part in colour)
            ImageDraw.Draw(picture).ellipse((10 + number, 10, 90, 80), fill=(*shade, 255))
            picture.save(tmp_path / kind / f"{number}.png")
    return tmp_path


@pytest.fixture
def network() -> SimilarityModel:
    prepare = Preprocess(size=(112, 112), mean=(0, 0, 0), std=(1, 1, 1))
    return as_similarity_model(ColourNet().eval(), preprocess=prepare)


def test_scenes_show_what_their_masks_say(bench: ModuleType, folder: Path) -> None:
    stamps = bench.read_stamps(folder)
    scenes = bench.segmentation_scenes(stamps, 4, seed=1)
    again = bench.segmentation_scenes(stamps, 4, seed=1)
    assert [np.asarray(s.picture).sum() for s in scenes] == [
        np.asarray(s.picture).sum() for s in again
    ]
    for scene in scenes:
        assert set(scene.labels) == set(KINDS)
        pixels = np.asarray(scene.picture).astype(int)
        for label, mask, supports in zip(scene.labels, scene.masks, scene.supports, strict=True):
            channel = 0 if label == "red" else 2
            others = np.delete(pixels, channel, axis=2).max(axis=2)
            assert (pixels[:, :, channel] > others + 100)[mask].mean() > 0.97
            assert (pixels[:, :, channel] > others + 100)[~mask].mean() < 0.005
            shades = {tuple(one.getpixel((112, 112))) for one in supports}
            assert len(shades) == len(supports) == 5
        assert not (scene.masks[0] & scene.masks[1]).any()
    with pytest.raises(SystemExit, match="6 pictures"):
        bench.segmentation_scenes({"few": stamps["few"], "red": stamps["red"]}, 1, 0)


def test_its_masks_are_those_of_segment(
    bench: ModuleType, folder: Path, network: SimilarityModel
) -> None:
    scene = bench.segmentation_scenes(bench.read_stamps(folder), 1, seed=2)[0]
    result = {
        (name, setting): own for name, setting, own in bench.heats(network, scene, bench.MAPS)
    }
    assert len(result) == len(bench.MAPS) * 3
    tensors = [
        torch.stack([network.preprocess(one)[0] for one in group])
        for group in ((scene.picture,), *scene.supports)
    ]
    for setting, shots in (("two-way", 1), ("five-shot", 5)):
        near, far = (group[:shots] for group in tensors[1:])
        heat = segment(network, tensors[0][0], near, far, method="focus").heat
        grown = torch.nn.functional.interpolate(
            torch.from_numpy(heat)[None, None], size=(224, 224), mode="bilinear"
        )
        np.testing.assert_allclose(result["focus", setting][0], grown[0, 0], atol=1e-5)


def test_the_page_tells_means_and_spread(
    bench: ModuleType, folder: Path, network: SimilarityModel
) -> None:
    stamps = bench.read_stamps(folder)
    options = argparse.Namespace(seeds=[0, 1], scenes=1, model="m", cache=folder / "cache")
    results = [bench.remembered(network, stamps, seed, options) for seed in options.seeds]
    page = bench.page(results, tuple(bench.MAPS), options)
    rows = table_rows(page, "map | mask")
    assert len(rows) == len(bench.MAPS) * 3 + 1
    for _, _, *cells in rows:
        for cell in cells:
            mean, spread = map(float, cell.split(" ± "))
            assert 0 <= mean <= 1
            assert 0 <= spread <= 0.8
    best = {(name, by): float(cells[2].split()[0]) for name, by, *cells in rows}
    assert best["focus", "GrabCut from the map"] > 0.9, "colours are all there is to know"
    assert bench.remembered(network, stamps, 0, options) == results[0], "from the cache"
    assert "--scenes 1 --seeds 0 1" in page


def test_thresholds_are_ranked(
    bench: ModuleType, folder: Path, network: SimilarityModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, values in (("SURE", (0.6, 0.95)), ("PROBABLE", (0.1,)), ("BACKGROUND", (0.05,))):
        monkeypatch.setattr(bench, name, values)
    scenes = bench.segmentation_scenes(bench.read_stamps(folder), 1, seed=0)
    ranked = bench.tune(network, scenes)
    assert set(ranked) == set(bench.MAPS)
    for values in ranked.values():
        assert {cue for cue, _ in values} == {Cue(0.6, 0.1, 0.05), Cue(0.95, 0.1, 0.05)}
        sums = [sum(by.values()) for _, by in values]
        assert sums == sorted(sums, reverse=True)
    assert "| focus | " in bench.tuned(ranked)


def test_the_defaults_are_in_the_grid_that_is_ranked(bench: ModuleType) -> None:
    for cue in CUES.values():
        assert cue.sure in bench.SURE
        assert cue.probable in bench.PROBABLE
        assert cue.background in bench.BACKGROUND
