"""The trained networks of the benchmarks: how they are built, trained and measured."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from store import Store
from torch import nn

pytest.importorskip("skimage", reason="scikit-image has the backgrounds: pip install -e .[dev]")
pytest.importorskip("lightning", reason="training needs it: pip install -e .[train]")
torchvision = pytest.importorskip("torchvision")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import trained_architectures as nets  # noqa: E402
import trained_networks as bench  # noqa: E402
import trained_pointing as pointing  # noqa: E402
from faithfulness_data import SETTINGS, Data  # noqa: E402
from faithfulness_measures import Counts  # noqa: E402
from faithfulness_networks import Network  # noqa: E402
from scenes import compose_scenes, read_stamps  # noqa: E402
from test_benchmark_faithfulness import folder  # noqa: E402, F401

from simexplain.models.backbones import build_backbone  # noqa: E402


def test_strided_blocks_have_smaller_maps_inside() -> None:
    block = nets.Residual(3, 5, 2).eval()
    maps = torch.rand(1, 3, 8, 8)
    inside = block.bn1(block.conv1(maps))
    assert inside.shape[2:] == (3, 3)
    result = block(maps)
    assert result.shape == (1, 5, 4, 4)
    # Where the convolutions do not reach there is the mean alone, and for new channels nothing.
    means = nn.functional.avg_pool2d(maps, 2)
    assert torch.equal(result[:, :3, 3, :], means[:, :, 3, :])
    assert not result[:, 3:, 3, :].any()


def test_the_stages_of_the_small_networks() -> None:
    grids = {}
    for name in bench.RANDOM:
        model = bench.random_network(name, 0)
        size = model.preprocess.size
        images = torch.rand(2, 3, *size)
        assert model.embed(images).shape == (2, 128)
        shapes = {layer.name: layer.shape[1:] for layer in model.layers_for(images)}
        grids[name] = [shapes[stage] for stage in model.stages_for(images)]
    sides = [17, 8, 4, 2]
    assert grids["unpadded ResNet, random weights"][-4:] == [(side, side) for side in sides]
    assert set(grids["plain ViT, random weights"]) == {(8, 8)}
    assert grids["Lite0, random weights"][-1] == (4, 4)


def test_random_networks_are_those_of_their_seed() -> None:
    images = torch.rand(1, 3, 64, 64)
    first, again, other = (
        bench.random_network("plain ViT, random weights", seed).embed(images) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-2)


def test_packaged_weights_under_a_name_of_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v2(weights=None)
    network.classifier = nn.Identity()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    name = nets.mobilenet_folder(tmp_path / "weights.pt", tmp_path / "folder")
    built = build_backbone(name, pretrained=True, outputs=7).network
    assert built(torch.rand(1, 3, 64, 64)).shape == (1, 7)
    built.reset_classifier(0)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(built(images), network.eval()(images), atol=1e-5)
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(SystemExit, match="does not hold the weights"):
        nets.mobilenet_folder(tmp_path / "weights.pt", tmp_path / "folder")


def test_views_are_of_the_classes_that_are_trained_on(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    counts = bench.make_views(folder, tmp_path / "a", 0)
    assert counts == {"classes": 2, "other classes": 1, "views": 12, "queries": 3}
    used = sorted(path.name for path in folder.iterdir())[:: bench.EVERY]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == used
    names = [sorted(path.name for path in (tmp_path / "a" / name).iterdir()) for name in used]
    assert names[0] == ["0-1.png", "0.png", "1-1.png", "1.png", "2-1.png", "2.png"]
    assert names[2] == ["0.png", "1.png", "2.png"]
    bench.make_views(folder, tmp_path / "b", 0)
    bench.make_views(folder, tmp_path / "c", 1)
    views = [np.asarray(Image.open(tmp_path / run / used[0] / "0-1.png")) for run in "abc"]
    assert views[0].shape == (bench.VIEW, bench.VIEW, 3)
    assert np.array_equal(views[0], views[1])
    assert not np.array_equal(views[0], views[2])


def test_crops_show_the_positive_the_distractor_and_neither(folder: Path) -> None:  # noqa: F811
    for scene in compose_scenes(read_stamps(folder), 4, 0):
        drawn = np.stack([scene.positive, scene.distractor, scene.positive & False], 2)
        shown = [
            np.asarray(crop) > 0
            for crop in pointing.crops(
                replace(scene, picture=Image.fromarray(drawn.astype(np.uint8) * 255))
            )
        ]
        assert {crop.shape for crop in shown} == {(112, 112, 3)}
        result = np.array([crop[..., :2].sum(axis=(0, 1)) for crop in shown])
        whole = np.array([scene.positive.sum(), scene.distractor.sum()])
        assert result[0, 0] > 0.9 * whole[0]
        assert result[1, 1] > 0.9 * whole[1]
        assert result[2].sum() <= min(result[0].sum(), result[1].sum())


def test_the_network_chooses_among_the_crops(folder: Path) -> None:  # noqa: F811
    """One that embeds the mean colour, on scenes whose positive alone has the query's."""
    scenes = []
    for scene in compose_scenes(read_stamps(folder), 3, 0):
        page = np.full((224, 224, 3), 90, np.uint8)
        page[scene.positive], page[scene.distractor] = (250, 10, 10), (10, 250, 10)
        red = Image.new("RGB", (224, 224), (250, 10, 10))
        scenes.append(
            replace(scene, picture=Image.fromarray(page), queries=dict.fromkeys(SETTINGS, red))
        )
    data = Data("emoji held-out", lambda count, seed: scenes[:count])
    network = SimpleNamespace(
        plain=SimpleNamespace(
            embed=lambda images: nn.functional.normalize(images.mean(dim=(2, 3)), dim=1)
        ),
        tensors=lambda shown: torch.stack(
            [
                torch.from_numpy(np.asarray(one.resize((64, 64))) / 255.0).permute(2, 0, 1)
                for one in shown
            ]
        ),
    )
    (result,) = pointing.choices("colours", network, data, 0, Counts(3, 3, 0, 0, 1), Store(None))
    for setting in SETTINGS:
        assert result[f"points_{setting}"][:, :2].tolist() == [[1, 0]] * 3
        assert np.isnan(result[f"points_{setting}"][:, 2]).all()
    assert pointing.listed(result)["same"][0] == [1, 0, None]


@pytest.mark.slow
def test_it_trains_measures_and_repeats_nothing(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = {**bench.RUNS["plain ViT"], "batches_per_epoch": 2, "epochs": 1, "classes_per_batch": 2}
    monkeypatch.setattr(bench, "EVERY", 1)
    monkeypatch.setattr(bench, "RUNS", {"plain ViT": tiny})
    monkeypatch.setattr(
        bench, "RANDOM", {k: v for k, v in bench.RANDOM.items() if k.startswith("plain")}
    )
    monkeypatch.setattr(pointing, "TRAINED", 0)
    record, runs = tmp_path / "trained.json", tmp_path / "runs"
    given = [str(folder), "--runs", str(runs), "--record", str(record)]
    bench.main(given)
    printed = json.loads(record.read_text())
    (run,) = printed["runs"].values()
    assert (run["steps"], run["images"], run["seed"]) == (2, 16, 0)
    assert 0 <= run["reached"]["recall@1"] <= 1
    monkeypatch.setattr(bench, "train", None)
    bench.main(given)
    assert json.loads(record.read_text()) == printed
    points, out = tmp_path / "points.json", tmp_path / "page.md"
    requested = [str(folder), "--runs", str(runs), "--trained", str(record), "--cache"]
    requested += [str(tmp_path / "cache"), "--scenes", "2", "--few", "1"]
    pointing.main([*requested, "--record", str(points), "--out", str(out)])
    result = json.loads(points.read_text())
    assert list(result) == ["plain ViT", "plain ViT, random weights"]
    for halves in result.values():
        assert np.array(halves["held-out"]["focus"]["same"]).shape == (2, 3)
        assert np.array(halves["held-out"][pointing.CROPS]["same"]).shape == (2, 3)
        assert np.array(halves["held-out"]["occlusion"]["category"]).shape == (1, 3)
        assert "occlusion" not in halves["tuned"]
    monkeypatch.setattr(Network, "tensors", None)
    pointing.main([*requested, "--done", "--record", str(points)])
    assert json.loads(points.read_text()) == result
    assert str(tmp_path) not in out.read_text()
