"""Files that hold no model, or only a part of one: a clear refusal that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from conftest import refusal

from simexplain import save_model


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
