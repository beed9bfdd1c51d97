"""More than 60 files and folders that somebody calls models: damaged, forged, or something else."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from exported_exploits import EXPLOITS, Archive, Plain, write_plain
from hostile_pictures import Springing
from safetensors.torch import save as tensors_as_bytes

from simexplain import save_model

BACKBONE = "timm:test_efficientnet"


def _saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def good_models(folder: Path) -> dict[str, Path]:
    """One sound file of each kind that is damaged below."""
    torch.manual_seed(0)
    network = timm.create_model("test_efficientnet", num_classes=0).eval()
    own, weights, program = (folder / f"good.{end}" for end in ("pt", "safetensors", "pt2"))
    save_model(network, own, backbone=BACKBONE)
    weights.write_bytes(tensors_as_bytes(network.state_dict()))
    write_plain(program, 16)
    return {"pt": own, "safetensors": weights, "pt2": program}


def _damaged(good: dict[str, Path]) -> Iterator[tuple[str, bytes]]:
    for kind, path in good.items():
        content = path.read_bytes()
        for tenth in (0, 1, 5, 8, 9):
            yield f"cut-{tenth}.{kind}", content[: len(content) * tenth // 10]
        for seed in range(4):
            random, changed = np.random.default_rng(seed), bytearray(content)
            for index in random.integers(0, 300 if seed < 2 else len(content), 6):
                changed[index] = random.integers(0, 256)
            yield f"flipped-{seed}.{kind}", bytes(changed)


def _springing() -> Iterator[tuple[str, bytes]]:
    """Files that run code when somebody unpickles them."""
    for ending in ("pt", "pth", "ckpt", "bin", "pkl", "pt2"):
        yield f"pickle.{ending}", pickle.dumps(Springing())
        yield f"zipped.{ending}", _saved({"state_dict": Springing()})
    yield "module.pt", _saved(Plain())
    yield "options.pt", _saved({"simexplain": Springing(), "state_dict": {}})
    yield "protocol-0.pt", pickle.dumps(Springing(), protocol=0)


def _odd() -> Iterator[tuple[str, bytes]]:
    for name, content in {
        "text.pt": b"no model\n", "html.pt": b"<html>", "zeros.pt": bytes(4000),
        "net.onnx": b"\x08\x07", "net.h5": b"\x89HDF\r\n\x1a\n", "net.tflite": b"\0\0\0\0TFL3",
        "net.pb": b"\x08\x01", "net.mar": b"PK\x03\x04", "script.py": b"open('sprung', 'w')\n",
        "empty.safetensors": b"", "empty.pt2": b"", "empty.ckpt": b"",
    }.items():  # fmt: skip
        yield name, content
    for name, state in {
        "empty-dict": {}, "numbers": {"conv1.weight": 3.0}, "list": [torch.zeros(2)],
        "tensor": torch.zeros(3), "nested": {"a": {"b": {"c": torch.zeros(1)}}},
        "other-shapes": {"conv_stem.weight": torch.zeros(1)}, "integers": {1: torch.zeros(2)},
        "escape": {"\x1b[31mred\n": torch.zeros(2)},
        "endless": {"a": torch.zeros(1).expand(2**20, 2**20)},
    }.items():  # fmt: skip
        yield f"state-{name}.pt", _saved(state)
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    yield "claims.safetensors", struct.pack("<Q", len(header)) + header.encode()
    yield "header.safetensors", struct.pack("<Q", 2**63) + b"{}"
    yield "overlap.safetensors", struct.pack("<Q", 2) + b"{}" + bytes(100)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50 * 2**20))
    yield "bomb.pt", buffer.getvalue()


def _own(good: dict[str, Path]) -> Iterator[tuple[str, bytes]]:
    """Files of simexplain itself whose options say something else."""
    for name, changes in {
        "elsewhere": {"backbone": "timm:hf-hub:someone/something"},
        "local": {"backbone": "timm:local-dir:/etc"}, "unknown": {"backbone": "timm:none"},
        "future": {"version": 10**6}, "size": {"size": [10**9, 10**9]},
        "nan": {"std": [float("nan")]},
    }.items():  # fmt: skip
        content = torch.load(good["pt"], weights_only=True)
        for key, value in changes.items():
            options = content["simexplain"]
            (options if key in options else options["preprocess"])[key] = value
        yield f"own-{name}.pt", _saved(content)
    content = torch.load(good["pt"], weights_only=True)
    key = next(key for key, value in content["state_dict"].items() if value.is_floating_point())
    content["state_dict"][key] = content["state_dict"][key] * float("nan")
    yield "own-nan-weights.pt", _saved(content)


def _folders(folder: Path) -> Iterator[Path]:
    """Folders as of transformers, of which none is a model."""
    for name, files in {
        "hf-empty": {}, "hf-no-weights": {"config.json": '{"model_type": "vit"}'},
        "hf-bad-json": {"config.json": "{"}, "hf-list": {"config.json": "[1]"},
        "hf-unknown": {"config.json": '{"model_type": "nothing"}', "model.safetensors": ""},
        "hf-remote-code": {
            "config.json": '{"model_type": "own", "auto_map": {"AutoModel": "own.Own", '
            '"AutoConfig": "own.Config"}}',
            "own.py": "open('sprung', 'w')\n", "model.safetensors": "",
        },
        "hf-elsewhere": {
            "config.json": '{"model_type": "vit", "_name_or_path": "someone/something"}',
            "model.safetensors.index.json": '{"weight_map": {"a": "../../good.safetensors"}}',
        },
        "hf-huge": {
            "config.json": '{"model_type": "vit", "hidden_size": 1000000000, '
            '"architectures": ["ViTModel"]}', "model.safetensors": "",
        },
    }.items():  # fmt: skip
        own = folder / name
        own.mkdir()
        for file, text in files.items():
            (own / file).write_text(text, encoding="utf-8")
        yield own
    pickled = folder / "hf-pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Springing()))
    yield pickled


def write_models(folder: Path, mark: Path) -> list[Path]:
    """Makes all of them; forged programs would touch ``mark``."""
    folder.mkdir(parents=True, exist_ok=True)
    good = good_models(folder)
    paths = []
    for made in (_damaged(good), _springing(), _odd(), _own(good)):
        for name, content in made:
            paths.append(folder / name)
            paths[-1].write_bytes(content)
    for exploit in EXPLOITS:
        archive = Archive.of(good["pt2"])
        try:
            exploit(archive, mark)
        except (KeyError, IndexError, StopIteration):  # made for a program of another shape
            continue
        paths.append(archive.write(folder / f"forged-{exploit.__name__}.pt2"))
    return [*paths, *_folders(folder)]
