"""Harder scenes show what their masks say, and the benchmark on them keeps and writes records."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

pytest.importorskip("skimage", reason="scikit-image has the backgrounds: pip install -e .[dev]")
pytest.importorskip("torchvision")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import faithfulness_data as data
import scene_kinds as bench
import scenes
from scipy.ndimage import binary_dilation
from test_benchmark_faithfulness import network  # noqa: F401

COLOURS = {
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0),
    "pink": (255, 0, 255), "cyan": (0, 255, 255),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six categories, each a colour that no ground has, with three shapes that fill their frame."""
    made = tmp_path_factory.mktemp("stamps")
    for name, colour in COLOURS.items():
        (made / name).mkdir()
        for number, height in enumerate((120, 90, 70)):
            picture = Image.new("RGBA", (120, height))
            ImageDraw.Draw(picture).ellipse((0, 0, 119, height - 1), fill=colour)
            picture.save(made / name / f"{number}.png")
    return made


@pytest.fixture(scope="module")
def stamps(folder: Path) -> scenes.Stamps:
    return scenes.read_stamps(folder)


def shown(scene: scenes.Scene) -> dict[str, np.ndarray]:
    """Where the picture has each colour, but for the soft edges of shapes."""
    pixels = np.asarray(scene.picture)
    result = {name: (pixels == colour).all(axis=2) for name, colour in COLOURS.items()}
    return {name: mask for name, mask in result.items() if mask.sum() > 9}


def own_colour(scene: scenes.Scene) -> str:
    """That of the query, in the middle of its page."""
    middle = np.asarray(scene.queries["same"])[112, 112]
    return next(name for name, colour in COLOURS.items() if (middle == colour).all())


def extent(mask: np.ndarray) -> int:
    """The longest side of what a mask covers."""
    return max(int(np.ptp(places)) + 1 for places in np.nonzero(mask))


@pytest.mark.parametrize("kind", list(scenes.KINDS))
def test_masks_cover_what_is_to_be_seen(stamps, kind: str) -> None:
    some = scenes.compose_scenes(stamps, 8, 3, scenes.KINDS[kind])
    fewer = scenes.compose_scenes(stamps, 3, 3, scenes.KINDS[kind])
    for scene, again in zip(some, fewer, strict=False):
        assert (np.asarray(scene.picture) == np.asarray(again.picture)).all()
    for scene in some:
        assert not (scene.positive & scene.distractor).any()
        colours, own = shown(scene), own_colour(scene)
        others = np.any([mask for name, mask in colours.items() if name != own], axis=0)
        # Whatever shows the colour lies in the mask, and the mask is that but for soft edges.
        for mask, seen in ((scene.positive, colours[own]), (scene.distractor, others)):
            assert not (seen & ~mask).any()
            assert (mask & ~binary_dilation(seen, iterations=2)).sum() < 0.02 * mask.sum()
        negative = np.asarray(scene.negative)[112, 112]
        assert (negative != COLOURS[own]).any()
        assert any((negative == COLOURS[name]).all() for name in colours)
    pictures = [np.asarray(scene.picture) for scene in some]
    assert all((one != other).any() for one, other in pairwise(pictures))


def test_several_are_three_to_five(stamps) -> None:
    some = scenes.compose_scenes(stamps, 20, 0, scenes.KINDS["several"])
    assert {len(shown(scene)) for scene in some} == {3, 4, 5}
    for scene in some:
        for mask in shown(scene).values():
            assert 0.22 * scenes.SIDE <= extent(mask) <= scenes.SIDE / 3


def test_touching_objects_touch(stamps) -> None:
    plain = scenes.compose_scenes(stamps, 8, 0)
    for scene in scenes.compose_scenes(stamps, 8, 0, scenes.KINDS["touching"]):
        assert (binary_dilation(scene.positive) & scene.distractor).any()
    assert not all((binary_dilation(s.positive) & s.distractor).any() for s in plain)


def test_a_third_of_the_positive_is_hidden(stamps) -> None:
    shares = []
    for scene in scenes.compose_scenes(stamps, 10, 0, scenes.KINDS["occluded"]):
        query = np.asarray(scene.queries["same"]).astype(int)
        whole = (query.sum(axis=2) < 700).sum() * (scenes.STAMP / scenes.ALONE) ** 2
        shares.append(1 - scene.positive.sum() / whole)
        assert (binary_dilation(scene.positive) & scene.distractor).any()
    np.testing.assert_allclose(shares, 1 / 3, atol=0.05)


@pytest.mark.parametrize(("kind", "own", "other"), [("small", 0.1, 0.1), ("large", 0.7, 0.3)])
def test_sizes_are_what_they_claim(stamps, kind: str, own: float, other: float) -> None:
    for scene in scenes.compose_scenes(stamps, 10, 0, scenes.KINDS[kind]):
        for mask, share in ((scene.positive, own), (scene.distractor, other)):
            assert extent(mask) / scenes.SIDE == pytest.approx(share, abs=0.008)


def test_margins_of_a_cut_out_do_not_count() -> None:
    picture = Image.new("RGBA", (200, 100))
    ImageDraw.Draw(picture).rectangle((150, 40, 169, 49), fill="red")
    assert scenes._sized(picture, 60).size == (60, 30)


def test_photographs_are_grounds_in_colour(stamps) -> None:
    def hues(kind: str) -> Iterator[float]:
        for scene in scenes.compose_scenes(stamps, 6, 0, scenes.KINDS[kind]):
            ground = ~binary_dilation(scene.positive | scene.distractor, iterations=3)
            pixels = np.asarray(scene.picture)[ground].astype(float) + 8
            yield (pixels[:, 0] / pixels[:, 2]).std()

    assert max(hues("plain")) < 0.05 < min(hues("photographs"))


def test_a_square_of_a_photograph_has_no_border() -> None:
    random = np.random.default_rng(0)
    photograph = np.full((70, 90, 3), (10, 200, 60), np.uint8)
    for _ in range(5):
        cut = np.asarray(scenes.textured(photograph, random, 64))
        assert cut.shape == (64, 64, 3)
        assert (cut == (10, 200, 60)).all()


def test_what_cannot_be_composed(stamps) -> None:
    few = {name: stamps[name] for name in list(stamps)[:4]}
    with pytest.raises(SystemExit, match="need as many categories"):
        scenes.compose_scenes(few, 1, 0, scenes.KINDS["several"])
    lines = {}  # mirrored, they cross those that are not
    for name, colour in COLOURS.items():
        thin = Image.new("RGBA", (100, 100))
        ImageDraw.Draw(thin).line((0, 0, 99, 99), fill=colour, width=3)
        lines[name] = [thin, thin]
    with pytest.raises(SystemExit, match="No 1 scenes"):
        scenes.compose_scenes(lines, 1, 0, scenes.KINDS["occluded"])


def test_collections_have_names(stamps) -> None:
    result = data.kind_scenes("held-out", stamps, ["small", "large"])
    assert [one.name for one in result.values()] == ["held-out small", "held-out large"]
    assert "tenth" in result["small"].note
    (scene,) = result["large"].make(1, 0)
    assert scene.positive.mean() > 4 * scene.distractor.mean()


def test_black_boxes_are_compared_on_the_scenes_that_both_have() -> None:
    key = "points_category"
    right, wrong = [1.0, 0.0, 0.5], [0.0, 1.0, 0.1]
    kinds = [
        {"focus": {key: np.array([right, right, wrong])}, "occlusion": {key: np.array([wrong])}},
        {"focus": {key: np.array([wrong])}, "occlusion": {key: np.array([wrong, right])}},
        {"focus": {key: np.array([right])}},
    ]
    (record,) = bench.beside_focus(kinds).values()
    assert record["own"]["mean"] == [0, 1, 0.1]
    assert record["focus"]["mean"] == [0.5, 0.5, 0.3]
    assert (record["apart"]["n"], record["apart"]["mean"], record["apart"]["error"]) == (
        2,
        [-1],
        [0.7071],
    )


def test_means_are_over_networks_scene_by_scene() -> None:
    one = {"a": {"points_same": np.ones((3, 3))}, "b": {"points_same": np.ones((3, 3))}}
    two = {"a": {"points_same": np.zeros((2, 3))}}
    result = bench.means({"one": one, "two": two})
    assert list(result) == ["a"]
    np.testing.assert_equal(result["a"]["points_same"], np.full((2, 3), 0.5))


def test_the_page_and_the_record(network, folder, tmp_path, monkeypatch) -> None:  # noqa: F811
    names = ("Lite0, 112", "MobileNetV2, 112")
    named = [(name, "imagenet", replace(network, name=name)) for name in names]
    absent = [(name, "imagenet", None) for name in names]
    monkeypatch.setattr(bench, "imagenet", lambda *requested, load: named if load else absent)
    monkeypatch.setattr(bench.trained_pointing, "networks", lambda *requested, load: ())
    monkeypatch.setattr(bench.trained_pointing, "TRAINED", 0)
    record, page = tmp_path / "scenes.json", tmp_path / "page.md"
    kept = ["--record", str(record), "--out", str(page)]
    requested = ["--stamps", str(folder), "--emoji", str(folder), "--runs", str(tmp_path), *kept]
    requested += ["--cache", str(tmp_path / "cache"), "--scenes", "3", "--few", "1"]
    requested += ["--kinds", "plain", "small", "--rows", "sam paper", "focus", "occlusion"]
    bench.main(requested)
    printed, text = json.loads(record.read_text()), page.read_text()
    assert printed["kinds"]["small"]["Lite0, 112"]["focus"]["same"]["n"] == 3
    assert printed["kinds"]["small"]["ImageNet, 112 pixels"]["focus"]["same"]["n"] == 3
    assert printed["kinds"]["plain"]["Lite0, 112"]["occlusion"]["category"]["n"] == 1
    assert printed["boxes"]["Lite0, 112"]["occlusion"]["own"]["n"] == 2
    assert "| *small* | 3 |" in text
    assert str(tmp_path) not in text
    monkeypatch.setattr(network.__class__, "tensors", None)
    bench.main([*requested, "--done"])
    assert json.loads(record.read_text()) == printed
    bench.main(kept)
    assert page.read_text() == text
