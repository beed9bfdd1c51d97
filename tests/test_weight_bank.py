"""Banks of grad-weights: plain autograd, files, and maps without a backward pass."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from cli_runs import FAST, NETWORK, Run
from conftest import TinyNet, varied
from pictures import noise
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain import (
    Comparison,
    as_similarity_model,
    build_bank,
    compare,
    evaluate_faithfulness,
    explain,
)
from simexplain.data.folders import Record
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ComparisonError, ImageError, ModelError, OutputError
from simexplain.evaluation.comparing import setups_of
from simexplain.evaluation.items import Item
from simexplain.methods.weight_bank import BankMaps, WeightBank
from simexplain.models.base import SimilarityModel

LABELS = list("aabbbcc")


@pytest.fixture
def pictures() -> Tensor:
    return torch.rand(7, 3, 24, 32, generator=torch.Generator().manual_seed(5)).double()


@pytest.fixture
def model() -> SimilarityModel:
    network = varied(TinyNet().double())
    return as_similarity_model(network, preprocess=Preprocess(size=(24, 32)), name="tiny")


def plain_weights(network: TinyNet, a: Tensor, p: Tensor, n: Tensor, margin: float) -> Tensor:
    """Minus the gradient of one triplet's loss at the anchor's map, averaged: plain autograd."""
    rows, maps = [], []
    handle = network.last.register_forward_hook(lambda *args: maps.append(args[2]))
    try:
        rows = [F.normalize(network(image[None]), dim=1)[0] for image in (a, p, n)]
    finally:
        handle.remove()
    loss = ((rows[0] - rows[1]).square().sum() - (rows[0] - rows[2]).square().sum() + margin).relu()
    return -torch.autograd.grad(loss, maps[0])[0].mean(dim=(2, 3))[0] if loss > 0 else None


def test_weights_of_a_forced_triplet_are_those_of_plain_autograd(
    model: SimilarityModel, pictures: Tensor
) -> None:
    bank = build_bank(model, (pictures[:3], ["x", "x", "y"]), margin=4, triplets=3)
    assert bank.labels == ("x", "x")  # the third is alone in its class
    assert bank.report["left_out"] == 1
    for index in range(2):
        plain = plain_weights(
            model.network, pictures[index], pictures[1 - index], pictures[2], margin=4
        )
        torch.testing.assert_close(bank.weights[index], plain, rtol=1e-9, atol=1e-12)
    assert bank.weights.abs().max() > 1e-6


def test_weights_are_the_mean_over_triplets_with_a_loss(
    model: SimilarityModel, pictures: Tensor
) -> None:
    """With many draws every pair of a positive and a negative comes about equally often."""
    bank = build_bank(model, (pictures, LABELS), margin=0.0, triplets=6000)
    kept, partial = 0, False
    for index, label in enumerate(LABELS):
        near = [n for n in range(7) if LABELS[n] == label and n != index]
        far = [n for n in range(7) if LABELS[n] != label]
        result = [
            plain_weights(model.network, pictures[index], pictures[p], pictures[n], 0.0)
            for p in near
            for n in far
        ]
        active = [weights for weights in result if weights is not None]
        if not active:
            continue
        partial = partial or len(active) < len(result)
        plain = torch.stack(active).mean(dim=0)
        error = (bank.weights[kept] - plain).norm() / plain.norm()
        assert error < 0.08
        kept += 1
    assert kept == len(bank)
    assert partial


def test_banks_do_not_depend_on_batches_or_what_is_kept(
    model: SimilarityModel, pictures: Tensor
) -> None:
    whole = build_bank(model, (pictures, LABELS), triplets=20)
    for options in ({"batch_size": 2}, {"max_cache": 0}, {"batch_size": 3, "max_cache": 60_000}):
        other = build_bank(model, (pictures, LABELS), triplets=20, **options)
        torch.testing.assert_close(other.weights, whole.weights, rtol=1e-9, atol=1e-14)
    early = build_bank(model, (pictures, LABELS), triplets=20, layer="act")
    assert early.weights.shape == (7, 8)
    assert not torch.equal(
        build_bank(model, (pictures, LABELS), triplets=20, seed=1).weights, whole.weights
    )


def test_building_touches_nothing(pictures: Tensor) -> None:
    network = TinyNet().double().train()
    state, kept = copy.deepcopy(network.state_dict()), pictures.clone()
    before = torch.get_rng_state()
    build_bank(network, (pictures, LABELS), triplets=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert network.training
    assert network.norm.training
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(pictures, kept)


def test_neighbours_by_hand(model: SimilarityModel, pictures: Tensor) -> None:
    bank = build_bank(model, (pictures, LABELS), margin=1.0)
    rows = torch.randn(4, 10, dtype=torch.float64)
    result = bank.weights_for(rows, 3)
    for row, places, distances, weights in zip(
        rows, result.places, result.distances, result.weights, strict=True
    ):
        away = [float((row / row.norm() - other).norm()) for other in bank.embeddings]
        order = sorted(range(len(away)), key=away.__getitem__)[:3]
        assert places.tolist() == order
        torch.testing.assert_close(distances, torch.tensor([away[n] for n in order]).double())
        torch.testing.assert_close(weights, bank.weights[order].sum(dim=0) / 3)
    with pytest.raises(ComparisonError, match="between 1 and the 7 images"):
        bank.weights_for(rows, 8)
    with pytest.raises(ComparisonError, match=r"rows \(M,10\)"):
        bank.weights_for(rows[:, :5])


@pytest.mark.parametrize("channels", [0, 3])
def test_maps_without_a_backward_pass(
    model: SimilarityModel, pictures: Tensor, monkeypatch: pytest.MonkeyPatch, channels: int
) -> None:
    bank = build_bank(model, (pictures, LABELS), margin=1.0)
    images = torch.rand(3, 3, 24, 32).double()
    comparison = Comparison.triplet(images[:1], images[1:2], images[2:])

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a backward pass")

    with monkeypatch.context() as patched:
        patched.setattr(torch.autograd, "grad", refuse)
        patched.setattr(Tensor, "backward", refuse)
        result = explain(
            model, comparison, "weight_bank", bank=bank, neighbours=2, channels=channels,
            keep_negative=True,
        )  # fmt: skip
    maps: list[Tensor] = []
    handle = model.network.last.register_forward_hook(lambda *args: maps.append(args[2]))
    rows = model.embed(images).detach()
    handle.remove()
    for index in range(3):
        away = (bank.embeddings - rows[index]).norm(dim=1)
        alpha = bank.weights[away.topk(2, largest=False).indices].mean(dim=0)
        if channels:
            least = alpha.abs().sort(descending=True).values[channels - 1]
            alpha = torch.where(alpha.abs() >= least, alpha, 0.0)
            assert int((alpha != 0).sum()) == channels
        plain = sum(weight * grid for weight, grid in zip(alpha, maps[0][index], strict=True))
        torch.testing.assert_close(result.maps[0, index], plain.detach(), rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(result.scores[0, index], plain.sum().detach())
    only_positive = explain(model, comparison, "weight_bank", bank=bank, channels=channels)
    assert torch.equal(only_positive.maps, result.maps.relu())


def test_the_nearest_are_told_and_far_ones_warned_of(
    model: SimilarityModel, pictures: Tensor
) -> None:
    bank = build_bank(model, (pictures, LABELS), margin=1.0)
    own = Comparison.pair(pictures[:1], pictures[1:2])
    (record,) = explain(model, own, "weight_bank", bank=bank).warnings
    assert "anchor: a 0.000" in record
    away = torch.cdist(bank.embeddings, bank.embeddings) + 9 * torch.eye(len(bank))
    assert bank.usual == pytest.approx(float(torch.quantile(away.amin(dim=1), 0.99)), rel=1e-6)
    strange = Comparison.pair(pictures[:1], 9 * torch.rand_like(pictures[:1]).round() - 4)
    record = explain(model, strange, "weight_bank", bank=bank).warnings[1]
    assert "nothing like 1 of 2 images: the nearest to the positive" in record
    assert f"within {bank.usual:.3f}" in record
    many = Comparison.pair(pictures[:3], pictures[3:6])
    assert "0.000 to 0.000 away" in explain(model, many, "weight_bank", bank=bank).warnings[0]


def test_files(model: SimilarityModel, pictures: Tensor, tmp_path: Path) -> None:
    bank = build_bank(model, (pictures, LABELS))
    path = tmp_path / "b.safetensors"
    bank.save(path)
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    with pytest.raises(OutputError, match="there already"):
        bank.save(path)
    bank.save(path, force=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b.safetensors"]
    again = WeightBank.load(path)
    assert torch.equal(again.weights, bank.weights)
    assert torch.equal(again.embeddings, bank.embeddings)
    assert replace(again, source="", embeddings=bank.embeddings, weights=bank.weights,
                   probe=bank.probe).__dict__ == bank.__dict__  # fmt: skip
    content = path.read_bytes()
    for number, damaged in enumerate((b"", content[:100], content[:-8], b"PK" + content)):
        (tmp_path / str(number)).write_bytes(damaged)
        with pytest.raises(OutputError, match="damaged"):
            WeightBank.load(tmp_path / str(number))
    from safetensors.torch import save_file

    save_file({"weights": bank.weights}, tmp_path / "other")
    with pytest.raises(OutputError, match="a bank of grad-weights"):
        WeightBank.load(tmp_path / "other")
    save_file({"weights": bank.weights}, tmp_path / "old", {"simexplain_bank": '{"schema": 0}'})
    with pytest.raises(OutputError, match="schema 0"):
        WeightBank.load(tmp_path / "old")
    with pytest.raises(OutputError, match="no bank 'nowhere'"):
        BankMaps("nowhere")
    with pytest.raises(OutputError, match="cannot be written"):
        bank.save(tmp_path / "none" / "b")


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_options_of_a_result_name_the_bank(
    model: SimilarityModel, pictures: Tensor, tmp_path: Path
) -> None:
    bank = build_bank(model, (pictures, LABELS), margin=1.0)
    bank.save(tmp_path / "b")
    method = BankMaps(tmp_path / "b", neighbours=1)
    assert json.loads(json.dumps(asdict(method)))["bank"] == str(tmp_path / "b")
    assert replace(method, neighbours=3).bank.bank is method.bank.bank
    comparison = Comparison.pair(pictures[:1], pictures[1:2])
    result = explain(model, comparison, BankMaps(bank))
    assert result.method == "weight_bank"
    assert result.options["bank"] == "bank of 7 images"
    with pytest.raises(ComparisonError, match="simexplain bank MODEL FOLDER"):
        explain(model, comparison, "weight_bank")
    with pytest.raises(ComparisonError, match="neighbours between"):
        BankMaps(bank, neighbours=0)


def test_a_bank_of_another_model_is_refused(model: SimilarityModel, pictures: Tensor) -> None:
    bank = build_bank(model, (pictures, LABELS), margin=1.0)
    comparison = Comparison.pair(pictures[:1], pictures[1:2])

    def refused(other: nn.Module, layer: str | None = None, **changed: object) -> str:
        with pytest.raises(ModelError) as caught:
            explain(other, comparison, "weight_bank", layer, bank=replace(bank, **changed))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    torch.manual_seed(7)
    twin = as_similarity_model(TinyNet().double(), preprocess=model.preprocess, name="tiny")
    assert "other weights of tiny" in refused(twin)
    wide = as_similarity_model(
        TinyNet(embedding=4).double(), preprocess=model.preprocess, name="tiny"
    )
    assert "other weights of tiny" in refused(wide)
    assert "was made with other, got tiny" in refused(model, model="other")
    assert "images of 0x0, which tiny does not take" in refused(model, size=(0, 0))
    assert "made at layer last, got act" in refused(model, "act")
    assert "no layer 'nowhere'" in refused(model, "nowhere")
    assert "weights for 5 channels" in refused(model, weights=bank.weights[:, :5])


def test_the_layer_is_that_of_the_bank_where_none_is_named(
    model: SimilarityModel, pictures: Tensor
) -> None:
    bank = build_bank(model, (pictures, LABELS), margin=1.0, layer="act")
    comparison = Comparison.pair(pictures[:1], pictures[1:2])
    assert model.default_layer != "act"
    result = explain(model, comparison, "weight_bank", bank=bank)
    assert result.layers == ("act",)
    named = explain(model, comparison, "weight_bank", "act", bank=bank)
    assert torch.equal(result.maps, named.maps)


def test_a_bank_is_read_once_for_all_items(
    model: SimilarityModel, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        noise(30, 40, seed=ord(name)).save(here / f"{name}.png")
    views = torch.stack([model.preprocess(noise(30, 40, seed=n))[0] for n in range(4)]).double()
    build_bank(model, (views, "aabb"), margin=4.0, triplets=4).save(here / "x.bank")
    read, load = [], WeightBank.load
    monkeypatch.setattr(WeightBank, "load", lambda path: read.append(path) or load(path))
    recipes = setups_of(["weight_bank:bank=x.bank,neighbours=1", "sam"])
    items = [Item(("a.png", "b.png"), "siamese"), Item(("a.png", "c.png"), "siamese")] * 2
    scores = evaluate_faithfulness(model, items, recipes, curve_steps=1)
    assert not scores.errors
    assert read == ["x.bank"]
    result = compare(model, ["a.png", "b.png"], recipes, arch="siamese", curve_steps=1)
    assert read == ["x.bank"] * 2
    name = "weight_bank:bank=x.bank,neighbours=1"
    assert result[name].asked["bank"] == result[name].explanation.options["bank"] == "x.bank"
    json.dumps(result.to_json())
    missing = {"w": ("weight_bank", None, {"bank": "nowhere"})}
    with pytest.raises(OutputError, match="no bank 'nowhere'"):
        compare(model, ["a.png", "b.png"], missing, arch="siamese", curve_steps=1)
    with pytest.raises(OutputError, match="no bank 'nowhere'"):
        evaluate_faithfulness(model, items[:1], missing, curve_steps=1)
    without = compare(
        model, ["a.png", "b.png"], ["weight_bank", "sam"], arch="siamese", curve_steps=1
    )
    assert "the method's option bank=FILE" in without.skipped["weight_bank"]


def test_what_cannot_make_a_bank(model: SimilarityModel, pictures: Tensor, tmp_path: Path) -> None:
    for labels, record in (("aaaaaaa", "at least two classes"), ("abcdefg", "with two pictures")):
        with pytest.raises(ImageError, match=record):
            build_bank(model, (pictures, labels))
    with pytest.raises(ImageError, match="a label for each"):
        build_bank(model, (pictures, "ab"))
    same = pictures[[0, 0, 1, 1]]
    with pytest.raises(ImageError, match="larger margin"):
        build_bank(model, (same, "aabb"), margin=0.0)
    with pytest.raises(ImageError, match="a label for each picture"):
        build_bank(model, [Record(tmp_path / "a.png")])
    with pytest.raises(ModelError, match="no layer 'nowhere'"):
        build_bank(model, (pictures, LABELS), layer="nowhere")
    with pytest.raises(ModelError, match="has the options"):
        build_bank(model, (pictures, LABELS), surprise=1)
    with pytest.raises(ModelError, match="margin between"):
        build_bank(model, (pictures, LABELS), margin=-1)
    with pytest.raises(ModelError, match="triplets of at least"):
        build_bank(model, (pictures, LABELS), triplets=0)


def test_the_command_line(run: Callable[..., Run], fails: Callable[..., str], here: Path) -> None:
    for label in "xy":
        (here / "classes" / label).mkdir(parents=True)
        for number in range(2):
            noise(40, 40, seed=number + ord(label)).save(here / "classes" / label / f"{number}.png")
    (here / "classes" / "x" / "bad.png").write_text("no picture", encoding="utf-8")
    made = ("bank", NETWORK, "classes", "--out", "b.bank", *FAST)
    done = run(*made, "--margin", "2", "--triplets", "4", "--seed", "3", "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["schema"] == 1
    assert record["layer"] == "layer4"
    assert record["channels"] == 96
    assert {key: record["report"][key] for key in ("images", "classes", "triplets", "seed")} == {
        "images": 4, "classes": 2, "triplets": 4, "seed": 3,
    }  # fmt: skip
    assert [Path(name).name for name in record["report"]["skipped"]] == ["bad.png"]
    assert WeightBank.load("b.bank").names == ("x/0.png", "x/1.png", "y/0.png", "y/1.png")
    assert "is there already" in fails(*made)
    again = run(*made, "--force", "--margin", "2")
    assert "4 images of 2 classes" in again.out
    assert "1 pictures cannot be read" in again.err
    requested = ("explain", NETWORK, "a.png", "b.jpg", "--arch", "siamese", *FAST)
    assert "simexplain bank" in fails(*requested, "--method", "weight_bank")
    wanted = ("--method", "weight_bank", "--option", "neighbours=1")
    assert "no bank 'c'" in fails(*requested, *wanted, "--option", "bank=c")
    # Both runs draw untrained weights from the same random state.
    done = run(*requested, *wanted, "--option", "bank=b.bank", "--out", "out")
    assert done.code == 0
    assert "layer layer4, method weight_bank" in done.out
    assert "weights of images in the bank" in done.err
    manifest = json.loads((here / "out" / "explanation.json").read_text())
    assert manifest["options"]["bank"] == "b.bank"
    assert manifest["options"]["neighbours"] == 1
    small = run(*requested[:-1], "96", *wanted, "--option", "bank=b.bank", "--out", "small")
    assert small.code == 0, small.err
    assert "made from images of 64x64, these are of 96x96" in small.err
    assert "'nowhere'" in fails(*made[:3], "--out", "c", *FAST, "--layer", "nowhere")
