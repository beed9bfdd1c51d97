"""Files that hold no model, or only a part of one: a clear refusal that names the file."""

from __future__ import annotations

import math
import socket
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import TinyNet, refusal
from torch import nn

from simexplain import as_similarity_model, load_model, save_model
from simexplain.errors import ImageError, ModelError

pytestmark = pytest.mark.usefixtures("offline")


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "pt2", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK", b"\x80", b"some text, no model", b"\0" * 300])
def test_files_that_hold_no_model(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)
    assert str(path) in refusal(path, backbone="timm:resnet18")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_checkpoint(tmp_path: Path, share: float) -> None:
    path = tmp_path / "model.pt"
    save_model(timm.create_model("mobilenetv3_small_050", num_classes=0), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert str(path) in refusal(path)


@pytest.mark.parametrize(
    "options",
    [
        5,
        {},
        {"schema": 1},
        {"schema": 2},
        {"schema": 1, "backbone": 3, "outputs": 0, "preprocess": {}, "distance": "euclidean"},
        {"schema": 1, "backbone": "timm:resnet18", "outputs": 0, "preprocess": {"odd": 1}},
        {"schema": 1, "backbone": "timm:resnet18", "outputs": "x", "preprocess": {}},
    ],
    ids=str,
)
def test_own_checkpoint_with_odd_options(tmp_path: Path, options: object) -> None:
    path = tmp_path / "model.pt"
    torch.save({"simexplain": options, "state_dict": {"a": torch.zeros(1)}}, path)
    assert str(path) in refusal(path)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.zeros(3), {"state_dict": {}}], ids=str)
def test_files_without_a_state_dict(tmp_path: Path, content: object) -> None:
    path = tmp_path / "model.pt"
    torch.save(content, path)
    assert "state_dict" in refusal(path, backbone="timm:resnet18")


NAMES = (
    "timm:hf-hub:someone/something",
    "timm:hf_hub:someone/something",
    "timm:local-dir:/etc",
    "timm:local-dir:.",
    "timm:resnet18.hf-hub:someone/something",
    "timm:../resnet18",
    "timm:resnet18 ",
    "timm:https://example.org/model",
    "timm:no_such_network",
    "torchvision:hf-hub:someone/something",
    "torchvision:no_such_network",
    "torchvision:../resnet18",
    "pcb:timm:hf-hub:someone/something",
    "pcb:pcb:timm:resnet18",
    "timm:pcb:timm:resnet18",
    "hf-hub:someone/something",
    "timm:",
    "",
)


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    path = tmp_path / "own.pt"
    network = timm.create_model("mobilenetv3_small_050", num_classes=0)
    save_model(network, path, backbone="timm:mobilenetv3_small_050")
    return path


def rewritten(path: Path, **changes: Any) -> Path:
    """The file with options exchanged; those of preprocessing under their own names."""
    content = torch.load(path, weights_only=True)
    for name, value in changes.items():
        options = content["simexplain"]
        (options if name in options else options["preprocess"])[name] = value
    torch.save(content, path)
    return path


def test_the_network_is_watched() -> None:
    """Otherwise no test of this file would prove that loading leaves it alone."""
    with pytest.raises(pytest.fail.Exception, match="network was used"):
        socket.create_connection(("example.org", 443))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_cannot_choose_what_is_fetched(
    own_file: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own_file.parent)
    assert "\n" not in refusal(rewritten(own_file, backbone=name))


@pytest.mark.parametrize("name", NAMES[:-1])
def test_weights_need_a_registered_network(tmp_path: Path, name: str) -> None:
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "weights.pt")
    refusal(tmp_path / "weights.pt", backbone=name)
    network = timm.create_model("mobilenetv3_small_050", num_classes=0)
    with pytest.raises(ModelError):
        save_model(network, tmp_path / "out.pt", backbone=name)
    assert not (tmp_path / "out.pt").exists()


def test_names_with_a_tag_are_registered(own_file: Path) -> None:
    name = timm.list_pretrained("mobilenetv3_small_050")[0]
    model = load_model(rewritten(own_file, backbone=f"timm:{name}"))
    assert model.embed(model.example()).shape == (1, 1024)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("interpolation", "odd"),
        ("interpolation", 3),
        ("interpolation", None),
        ("interpolation", ["bilinear"]),
        ("size", (0, 64)),
        ("size", (-64, 64)),
        ("size", (64,)),
        ("size", (64, 64, 3)),
        ("size", 64),
        ("size", "64x64"),
        ("size", None),
        ("size", (64.5, 64)),
        ("size", (True, 64)),
        ("size", (10**9, 64)),
        ("size", (10**30, 10**30)),
        ("size", (math.nan, 64)),
        ("std", (0.0, 0.2, 0.2)),
        ("std", (0.2, 0.2, -0.2)),
        ("std", (math.nan, 0.2, 0.2)),
        ("std", (math.inf, 0.2, 0.2)),
        ("std", (0.2, 0.2)),
        ("std", ()),
        ("std", 0.2),
        ("std", "abc"),
        ("std", ("a", "b", "c")),
        ("std", (0.2, 0.2, None)),
        ("std", (0.2, 0.2, True)),
        ("mean", (math.nan, 0.2, 0.2)),
        ("mean", (0.2, 0.2)),
        ("mean", None),
        ("mean", {"r": 1}),
        ("crop_fraction", 0),
        ("crop_fraction", math.nan),
        ("crop_fraction", "0.9"),
        ("crop_fraction", None),
        ("fit", "zoom"),
        ("fit", None),
        ("fit", ["crop"]),
        ("notes", 5),
        ("notes", (5,)),
        ("source", 5),
        ("outputs", -1),
        ("outputs", 10**12),
        ("outputs", True),
        ("outputs", 1.5),
        ("outputs", 3),
        ("preprocess", []),
        ("preprocess", "x"),
        ("distance", "far"),
        ("distance", ["cosine"]),
        ("distance", None),
        ("schema", "1"),
        ("schema", None),
    ],
)
def test_own_file_with_unusable_options(own_file: Path, option: str, value: object) -> None:
    load_model(own_file)
    text = refusal(rewritten(own_file, **{option: value}))
    assert str(own_file) in text or option in text


def test_two_channels_are_refused_and_notes_are_printable(own_file: Path) -> None:
    rewritten(own_file, notes=("a \x1b[31mred\nnote",), source="b\x07")
    model = load_model(own_file)
    assert model.preprocess.notes == ("a \\x1b[31mred\\nnote",)
    assert model.preprocess.source == "b\\x07"
    text = refusal(rewritten(own_file, mean=(0.5, 0.5), std=(0.5, 0.5)))
    assert "three channels" in text


@pytest.mark.parametrize("value", [{"a": 1}, [1], 5, None, torch.zeros(1)], ids=str)
def test_own_file_with_another_state(own_file: Path, value: object) -> None:
    content = torch.load(own_file, weights_only=True)
    content["state_dict"] = value
    torch.save(content, own_file)
    assert str(own_file) in refusal(own_file)


ODD_TENSORS = {
    "meta": (lambda value: value.to("meta"), "meta device"),
    "sparse": (lambda value: value.to_sparse(), "to_dense"),
    "complex": (lambda value: value.to(torch.complex64), "complex"),
    "quantised": (
        lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
        "dequantize",
    ),
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
@pytest.mark.parametrize("own", [False, True])
def test_tensors_that_are_not_plain(own_file: Path, kind: str, own: bool) -> None:
    change, word = ODD_TENSORS[kind]
    content = torch.load(own_file, weights_only=True)
    state = content["state_dict"]
    state["conv_stem.weight"] = change(state["conv_stem.weight"])
    torch.save(content if own else state, own_file)
    text = refusal(own_file, backbone=None if own else "timm:mobilenetv3_small_050")
    assert word in text
    assert "conv_stem.weight" in text


@pytest.mark.parametrize("prefix", ["model.", "net.module.", "trunk.", "a.b.c."])
def test_lightning_checkpoint_with_more_than_the_network(tmp_path: Path, prefix: str) -> None:
    network = timm.create_model("mobilenetv3_small_050", num_classes=0).eval()
    state = {f"{prefix}{key}": value for key, value in network.state_dict().items()}
    state |= {"loss.proxies": torch.rand(5, 4), "metric.\x1b[31mcount": torch.zeros(1)}
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": state, "epoch": 1}, path)
    model = load_model(path, backbone="timm:mobilenetv3_small_050")
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.embed(images), nn.functional.normalize(network(images), dim=1))
    (note,) = model.preprocess.notes
    assert "loss.proxies" in note
    assert prefix in note
    assert "\x1b" not in note
    del state[f"{prefix}conv_stem.weight"]
    torch.save({"state_dict": state}, path)
    text = refusal(path, backbone="timm:mobilenetv3_small_050")
    assert "1 missing (conv_stem.weight)" in text
    assert "name the backbone" not in text


def test_a_head_beside_the_network_is_kept(tmp_path: Path) -> None:
    network = timm.create_model("resnet18", num_classes=7).eval()
    state = {
        (key if key.startswith("fc.") else f"backbone.{key}"): value
        for key, value in network.state_dict().items()
    }
    torch.save(state | {"loss.proxies": torch.rand(5, 4)}, tmp_path / "a.pt")
    model = load_model(tmp_path / "a.pt", backbone="timm:resnet18", keep_head=True)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.embed(images), nn.functional.normalize(network(images), dim=1))
    assert "loss.proxies" in model.preprocess.notes[0]


def test_a_head_that_is_a_number(tmp_path: Path) -> None:
    state = timm.create_model("resnet18", num_classes=7).state_dict()
    torch.save(state | {"fc.weight": torch.tensor(1.0)}, tmp_path / "a.pt")
    refusal(tmp_path / "a.pt", backbone="timm:resnet18", keep_head=True)


@pytest.mark.parametrize("value", [(0.2, 0, 0.2), (0.2, math.nan, 0.2), (0.2, 0.2)])
def test_preprocessing_is_checked_where_it_is_made(value: tuple[float, ...]) -> None:
    from simexplain.data.preprocessing import Preprocess

    with pytest.raises(ImageError, match="std"):
        as_similarity_model(TinyNet(), preprocess=Preprocess(std=value))
