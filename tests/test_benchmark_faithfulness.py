"""The benchmark of explanations judges the maps that explain gives, and remembers what it did."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from test_benchmarks import table_rows
from torch import nn
from torch.nn import functional as F

from simexplain import Comparison, as_similarity_model, explain
from simexplain.evaluation.faithfulness import faithfulness
from simexplain.methods import METHODS
from simexplain.metrics.maps import grown

pytest.importorskip("skimage", reason="scikit-image has the backgrounds: pip install -e .[dev]")
torchvision = pytest.importorskip("torchvision")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import faithfulness as bench  # noqa: E402
import faithfulness_data as data  # noqa: E402
import faithfulness_measures as measures  # noqa: E402
import faithfulness_networks as nets  # noqa: E402
import faithfulness_page as pages  # noqa: E402
import faithfulness_rows as rows  # noqa: E402
import peers  # noqa: E402
import scenes  # noqa: E402
import stamps as stamp_maker  # noqa: E402
from store import Store  # noqa: E402


def mobilenet() -> nn.Module:
    """A narrow MobileNetV2 with statistics that are not trivial to fold."""
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v2(weights=None, width_mult=0.25)
    network.classifier = nn.Identity()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


@pytest.fixture(scope="module")
def network() -> nets.Network:
    return nets.Network.of("narrow", as_similarity_model(mobilenet()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five categories with three drawn cut-outs each."""
    made = tmp_path_factory.mktemp("stamps")
    for index, colour in enumerate(("crimson", "navy", "gold", "teal", "purple")):
        (made / colour).mkdir()
        for number in range(3):
            picture = Image.new("RGBA", (110, 90 + 8 * number))
            draw = ImageDraw.Draw(picture)
            shape = draw.ellipse if index % 2 else draw.rectangle
            shape((5, 5, 95, 80), fill=colour, outline="white", width=3 + 3 * number)
            picture.save(made / colour / f"{number}.png")
    return made


@pytest.fixture
def batch(network: nets.Network, folder: Path) -> rows.Batch:
    some = scenes.compose_scenes(scenes.read_stamps(folder), 2, seed=1)
    return rows.Batch.of(network, some, "category")


def triplet(batch: rows.Batch) -> Comparison:
    return Comparison.triplet(batch.queries, batch.scenes, batch.negatives)


def test_every_method_has_a_row_or_a_reason() -> None:
    assert set(METHODS) <= {row.method for row in rows.ROWS.values()} | set(rows.WITHOUT_A_ROW)


@pytest.mark.parametrize(
    "name", ["sam paper, last", "sam signed, last x mid", "similarity_cam hires_cam, mid",
             "decomposition, last", "saliency"]
)  # fmt: skip
def test_the_maps_judged_are_those_of_explain(network, batch, name: str) -> None:
    row = rows.ROWS[name]
    layers = {"last": None, "mid": network.layers[1], "last x mid": network.layers}[row.layers]
    expected = explain(network.plain, triplet(batch), row.method, layers, **row.options).maps[:, 1]
    for _ in range(2):  # the second time from memory
        result = rows.scene_maps(row, network.shared, network.layers, batch, None)
        scale = expected.abs().amax()
        torch.testing.assert_close(result / scale, expected / scale, rtol=0, atol=5e-3)


def test_a_picture_passes_the_lower_part_once(network, batch) -> None:
    network.forget()
    (part,) = (m for m in network.shared.network.modules() if isinstance(m, nets.Remembered))
    passed: list[int] = []
    hook = part.part.register_forward_hook(lambda module, args, out: passed.append(len(out)))
    try:
        for name in ("sam paper, last", "similarity_cam cosine, last"):
            rows.scene_maps(rows.ROWS[name], network.shared, network.layers, batch, None)
        pixels = batch.scenes.clone().requires_grad_()
        network.shared.embed(pixels).sum().backward()
    finally:
        hook.remove()
    assert (sum(passed[:-1]), passed[-1]) == (6, 2)
    assert bool(pixels.grad.any())
    rows_again = rows.unit_rows(network.plain, batch.scenes)
    torch.testing.assert_close(rows.unit_rows(network.shared, batch.scenes), rows_again)


SMALL = {
    "saliency": {}, "input_x_gradient": {}, "smoothgrad": {"samples": 2},
    "integrated_gradients": {"steps": 2}, "occlusion": {"window": 0.5, "stride": 0.5},
    "sbsm": {"window": 0.5, "stride": 0.5}, "random_masks": {"masks": 6},
}  # fmt: skip


def test_pairs_stand_for_triplets_where_the_negative_has_no_say(network, batch) -> None:
    paired = {row.method for row in rows.ROWS.values() if row.pair}
    assert paired == set(SMALL)
    for method, options in SMALL.items():
        row = rows.Row(method, options=options, pair=True)
        alone, whole = (
            rows.scene_maps(row, network.plain, network.layers, batch, None, whole=whole)
            for whole in (False, True)
        )
        torch.testing.assert_close(alone, whole, rtol=1e-3, atol=1e-6)


def test_areas_are_those_of_faithfulness(network, batch) -> None:
    maps = torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(3))
    directions = rows.unit_rows(network.plain, batch.queries)
    requested = (network, batch.scenes, directions, maps, 4, measures.Scores())
    result = measures.areas(*requested)
    np.testing.assert_array_equal(measures.areas(*requested), result)  # now from memory
    for index, baseline in enumerate(measures.BASELINES):
        scores = faithfulness(
            network.plain, triplet(batch), maps[:, None].expand(-1, 3, -1, -1), steps=4,
            baseline=baseline,
        )  # fmt: skip
        expected = [
            getattr(scores, name)[:, 1].numpy()
            for name in ("raw_deletion", "raw_insertion", "whole", "empty")
        ]
        own = result[:, 4 * index : 4 * index + 4]
        np.testing.assert_allclose(own, np.stack(expected, axis=1), atol=1e-4)


def test_where_maps_point(folder: Path) -> None:
    (scene,) = scenes.compose_scenes(scenes.read_stamps(folder), 1, seed=2)
    ideal, wrong = (torch.from_numpy(m).float() for m in (scene.positive, scene.distractor))
    share = scene.positive.sum() / (scene.positive.sum() + 3 * scene.distractor.sum())
    maps = torch.stack([ideal, wrong, ideal + 3 * wrong, torch.zeros_like(ideal)])
    expected = [[1, 0, 1], [0, 1, 0], [0, 1, share], [0, 0, 0]]
    np.testing.assert_allclose(measures.pointed(maps, [scene] * 4), expected, atol=1e-6)


def test_costs_count_images_of_the_networks_own_size(network, batch) -> None:
    row = rows.ROWS["sam paper, last"]
    plain, _, maps = measures.cost(network, row, batch, None)
    large, _, _ = measures.cost(network, replace(row, magnify=2), batch, None)
    assert (plain, large) == (3, 3 * 4 + 3)  # and the embeddings at the own size
    assert measures.same_map(network, row, batch, None, maps)
    other = rows.ROWS["sam signed, last x mid"]
    assert not measures.same_map(network, other, batch, None, maps)


@pytest.mark.parametrize("name", list(peers.PEERS))
def test_peers_explain_the_similarity(network, batch, name: str) -> None:
    peer = peers.PEERS[name]
    if not peer.installed:
        pytest.skip(f"{peer.package} is not installed")
    small = batch[:1] if peer.tier == "few" else batch
    result = rows.scene_maps(peer, network.plain, network.layers, small, None)
    assert result.shape[0] == len(small)
    assert not any(p.grad is not None for p in network.plain.parameters())
    if "GradCAM" not in name and "GradCam" not in name:
        assert bool(result.isfinite().all() and result.any())
        return
    vectors = rows.unit_rows(network.plain, small.queries)
    if peer.target == "margin":
        vectors = vectors - rows.unit_rows(network.plain, small.negatives)
    expected = plain_grad_cam(network, small.scenes, vectors)
    size = (int(result.shape[-2]), int(result.shape[-1]))
    pairs = (result.flatten(1).float(), grown(expected, size).flatten(1))
    assert bool((F.cosine_similarity(*pairs) > 0.97).all())


def plain_grad_cam(network: nets.Network, images, vectors):
    """Grad-CAM of the cosine at the last layer of a MobileNetV2 by plain autograd."""
    features = network.plain.network.features(images)
    rows_ = F.normalize(features.mean(dim=(2, 3)), dim=1)
    (gradient,) = torch.autograd.grad((rows_ * vectors).sum(), features)
    weighted = gradient.mean(dim=(2, 3), keepdim=True) * features
    return weighted.sum(dim=1).relu().detach()


def test_a_peer_that_is_not_there_is_named() -> None:
    absent = {
        "ghost: GradCAM": peers.Peer("ghost-cam", "no_such_module", lambda requested: requested[2])
    }
    assert peers.left_out(absent) == {"ghost: GradCAM": "package `ghost-cam` is not installed"}


def test_the_page_and_the_cache(network, folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench, "networks", lambda file: [network])
    out = tmp_path / "page.md"
    few = ["--scenes", "2", "--some", "1", "--few", "1", "--curves", "1", "--steps", "2"]
    start = ["--stamps", f"held-out={folder}", "--emoji", str(folder), "--seeds", "0", "1", *few]
    start += ["--threads", "1", "--cache", str(tmp_path / "cache"), "--out", str(out)]
    chosen = ["sam paper", "sam signed", "weight_bank", "saliency"]
    bench.main([*start, "--rows", *chosen])
    first = out.read_text(encoding="utf-8")
    result = {cells[0]: cells for cells in table_rows(first, "method | n | same: hit")}
    assert {name: cells[1] for name, cells in result.items()} == {
        "sam paper, last": "4", "sam signed, last": "4", "sam signed, last x mid": "4",
        "weight_bank, last": "4", "saliency": "2",
    }  # fmt: skip
    for cells in result.values():
        for cell in cells[2:-1]:
            mean, error = map(float, cell.split(" ± "))
            assert 0 <= mean <= 1
            assert 0 <= error <= 0.5
    assert {cells[1] for cells in table_rows(first, "method | n | blur: deletion")} == {"2"}
    assert str(folder) not in first
    assert "No choice was made on these cut-outs" in first
    measured = []
    kept = measures.measured
    monkeypatch.setattr(
        bench, "measured", lambda *a, **k: measured.append(sorted(a[3])) or kept(*a, **k)
    )
    bench.main([*start, "--rows", *chosen])
    assert measured == []
    assert out.read_text(encoding="utf-8") == first
    bench.main([*start, "--rows", *chosen, "decomposition"])
    assert measured == [["decomposition, last"]] * 6  # three data sets, two seeds
    assert "decomposition, last" in out.read_text(encoding="utf-8")


def test_records_are_used_only_where_they_fit(tmp_path: Path) -> None:
    record = {"curves": np.arange(8.0)[None]}
    store = Store(tmp_path)
    store.write(("net", "data", 0, "a: b, c"), "as now", record)
    np.testing.assert_equal(store.read(("net", "data", 0, "a: b, c"), "as now"), record)
    assert store.read(("net", "data", 0, "a: b, c"), "otherwise") is None
    assert store.read(("net", "data", 1, "a: b, c"), "as now") is None
    assert Store(None).read(("net",), "as now") is None


def test_seeds_are_joined_scene_by_scene() -> None:
    parts = [{"curves": np.full((2, 8), seed)} for seed in (1.0, 2.0)]
    result = measures.joined(parts, 3)["curves"][:, 0]
    np.testing.assert_equal(result, [1, 1, np.nan, 2, 2, np.nan])


def test_areas_on_the_page_are_ratios_of_means() -> None:
    blur = [[0.5, 0.75, 1.0, 0.0], [0.2, 0.2, 0.2, 0.2 - 1e-9], [np.nan] * 4]  # one loses nothing
    result = pages._areas(np.array(blur))
    assert result[0].startswith("0.50 ±")
    assert result[1].startswith("0.75 ±")
    assert result[2] == "0.125 ± 0.088"


def test_emoji_are_cut_into_bank_and_test(folder: Path) -> None:
    both, pairs, (pictures, labels) = data.emoji_data(folder)
    assert labels == ["crimson", "crimson", "gold", "gold", "navy", "navy"]
    assert len(pictures) == 6
    assert pairs.settings == ("category",)
    assert not pairs.points
    assert both.points


def test_pairs_show_two_pictures_of_one_thing(folder: Path) -> None:
    read = scenes.read_stamps(folder)
    result = data.compose_pairs(read, 5, seed=0)
    for scene in result:
        shown, query = (np.asarray(p) for p in (scene.picture, scene.queries["category"]))
        assert (shown[~scene.positive].mean()) > 240  # white but for soft edges
        assert not scene.distractor.any()
        middle = (112, 112)
        assert (shown[middle] == query[middle]).all()  # the same colour
        assert (shown[middle] != np.asarray(scene.negative)[middle]).any()


def test_mobilenet_takes_weights_by_their_order(tmp_path: Path) -> None:
    whole = torchvision.models.mobilenet_v2(weights=None)
    whole.classifier = nn.Identity()
    state = {f"other.{n}": v for n, (_, v) in enumerate(whole.state_dict().items())}
    torch.save(state, tmp_path / "weights.pt")
    model = nets.mobilenet_v2(tmp_path / "weights.pt")
    for own, given in zip(model.network.state_dict().values(), state.values(), strict=True):
        assert torch.equal(own, given)
    torch.save(dict(list(state.items())[:-1]), tmp_path / "part.pt")
    with pytest.raises(SystemExit, match="does not hold the weights"):
        nets.mobilenet_v2(tmp_path / "part.pt")


def test_stamps_are_chosen_and_made_smaller(tmp_path: Path) -> None:
    root = tmp_path / "package" / stamp_maker.INSIDE
    for category in stamp_maker.CATEGORIES[:2]:
        (root / category).mkdir(parents=True)

    def put(category: str, name: str, size: tuple[int, int], side: int, mode: str = "RGBA") -> None:
        picture = Image.new("RGBA", size)
        ImageDraw.Draw(picture).rectangle((5, 5, 5 + side, 5 + side), fill="green")
        picture.convert(mode).save(root / category / f"{name}.png")

    apes, aquatic = stamp_maker.CATEGORIES[:2]
    for number in range(3):
        put(apes, f"good{number}", (400, 300), 200)
    put(apes, "tiny", (400, 300), 20)
    put(apes, "small", (50, 50), 30)
    put(apes, "grey", (400, 300), 200, "L")
    put(aquatic, "alone", (400, 300), 200)
    out = tmp_path / "out"
    assert stamp_maker.make(tmp_path / "package", out) == {"animals_mammals_apes": 3}
    kept = sorted(out.rglob("*.png"))
    assert [path.name for path in kept] == ["good0.png", "good1.png", "good2.png"]
    assert Image.open(kept[0]).size == (256, 192)
    with pytest.raises(SystemExit, match="there already"):
        stamp_maker.make(tmp_path / "package", out)
    with pytest.raises(SystemExit, match="not the unpacked package"):
        stamp_maker.make(out, tmp_path / "more")
