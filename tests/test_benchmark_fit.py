"""The benchmark of fits makes the scenes that it says, and judges maps on the pictures."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("skimage", reason="scikit-image has the backgrounds: pip install -e .[dev]")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import fit as bench
import fit_scenes
import scenes
from test_benchmark_faithfulness import folder  # noqa: F401

from simexplain.data.preprocessing import IMAGENET

DOCS = Path(__file__).parents[1] / "docs" / "benchmarks"


def test_pictures_are_wide_or_tall_and_the_same_for_a_seed(folder: Path) -> None:  # noqa: F811
    stamps = scenes.read_stamps(folder)
    one, again = (fit_scenes.placed(stamps, 3, middle=False) for _ in range(2))
    middle = fit_scenes.placed(stamps, 3, middle=True)
    ratios = [max(p.picture.size) / min(p.picture.size) for p in one]
    assert all(1.39 <= ratio <= 2.41 for ratio in ratios)
    assert {p.picture.width > p.picture.height for p in one} == {True, False}
    for first, second, centred in zip(one, again, middle, strict=True):
        np.testing.assert_array_equal(first.picture, second.picture)
        assert (first.label, first.picture.size) == (centred.label, centred.picture.size)


def test_a_map_is_judged_where_the_picture_is(folder: Path) -> None:  # noqa: F811
    (scene,) = fit_scenes.long_scenes(scenes.read_stamps(folder), 1, seed=0)
    assert not (scene.positive & scene.distractor).any()
    size = (scene.picture.height, scene.picture.width)
    geometry = replace(IMAGENET, fit="pad").geometry(size)
    for mask, wanted in ((scene.positive, [1, 0]), (scene.distractor, [0, 1])):
        heat = geometry.from_original(mask).astype(np.float32)
        hit, other, inside = bench.judged(heat, geometry, scene)
        assert [hit, other] == wanted
        assert (inside > 0.8) == (wanted[0] == 1)
    assert bench.judged(np.zeros(geometry.size), geometry, scene) == [0, 0, 0]


def test_fits_differ_in_what_they_show() -> None:
    sizes = {fit: bench.fitted(IMAGENET, fit).geometry((200, 400)).seen for fit in bench.FITS}
    assert sizes["crop"] < sizes["squash"] < 0.99
    assert (sizes["whole"], sizes["pad"]) == pytest.approx((1, 1))


def test_the_page_is_that_of_its_record() -> None:
    record = json.loads((DOCS.parents[1] / "benchmarks" / "records" / "fit.json").read_text())
    assert (DOCS / "fit.md").read_text() == bench.page(record)
