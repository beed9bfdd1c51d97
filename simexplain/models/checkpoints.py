"""Tensors from files without running code: what is in a file and how it fits a network."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.errors import DAMAGED, ModelError, first_line

FORMAT_KEY = "simexplain"
SCHEMA = 1
_PREFIXES = ("module.", "model.", "_orig_mod.", "network.", "backbone.", "encoder.", "net.")
_LISTED = 4


def kind_of(path: Path) -> str:
    """What a model file is: safetensors, onnx, exported, torchscript or torch.

    Raises:
        ModelError: If there is no such file.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ModelError(
            f"Expected a model file, but '{path}' {what}; for a network by name write timm:NAME "
            "or torchvision:NAME."
        )
    if path.suffix in (".safetensors", ".onnx"):
        return path.suffix[1:]
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, OSError) as error:
            raise ModelError(f"'{path}' is damaged ({error}); copy or save it again.") from error
        if any("/code/" in name or name.endswith("constants.pkl") for name in names):
            return "torchscript"
        if any(
            name.endswith(("archive_format", "serialized_exported_program.json")) for name in names
        ):
            return "exported"
    return "exported" if path.suffix == ".pt2" else "torch"


def read_torch(path: Path, *, trust_pickle: bool) -> Any:
    """Reads a file of ``torch.save``: tensors and plain values only, unless told otherwise.

    Raises:
        ModelError: If it is damaged, or holds objects whose loading could run code.
    """
    _check_zip(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except pickle.UnpicklingError as error:
        if "weights" not in str(error).lower() or not _is_torch_file(path):
            raise ModelError(
                f"'{path}' is not a file that torch.save wrote, or it is damaged; save it again."
            ) from error
        raise ModelError(
            f"'{path}' holds pickled Python objects, and loading those can run any code in the "
            "file; save the state_dict instead, or pass --trust-pickle (trust_pickle=True) if you "
            "trust where it comes from."
        ) from error
    except (RuntimeError, OSError, EOFError, ImportError, *DAMAGED) as error:
        raise ModelError(
            f"'{path}' cannot be read as a PyTorch file ({first_line(error)}); save it again."
        ) from error


def _check_zip(path: Path) -> None:
    """Compares the checksums that torch.save wrote but torch.load ignores."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken:
            raise ModelError(
                f"'{path}' is damaged in its part {broken}; copy or save the file again."
            )


def _is_torch_file(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(2)
    return start == b"PK" or start[:1] == b"\x80"


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Reads a ``.safetensors`` file.

    Raises:
        ModelError: If it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"'{path}' is no intact safetensors file ({error}).") from error
    return tensors


def state_dict_in(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors by name out of a bare state_dict or a training checkpoint that holds one.

    Raises:
        ModelError: If there is none.
    """
    for key in ("state_dict", "model_state_dict", "model", "state_dict_ema"):
        inner = content.get(key) if isinstance(content, Mapping) else None
        if isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values()):
            content = inner
            break
    if isinstance(content, Mapping):
        tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
        if tensors:
            return tensors
    raise ModelError(
        f"Expected a state_dict in '{path}', got {type(content).__name__} without tensors."
    )


def fitted(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The state with whatever prefix (``module.``, ``model.``) makes most keys known stripped."""
    own = network.state_dict().keys()
    best = state
    candidates = [state]
    for _ in range(2):
        candidates = [
            {key.removeprefix(prefix): value for key, value in candidate.items()}
            for candidate in candidates
            for prefix in _PREFIXES
            if any(key.startswith(prefix) for key in candidate)
        ]
        for candidate in candidates:
            if len(candidate.keys() & own) > len(best.keys() & own):
                best = candidate
    return best


def load_fitting(network: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Loads a state into a network, all of it or nothing.

    Raises:
        ModelError: If any key is missing, unexpected or of another shape; lists them.
    """
    own = network.state_dict()
    # Counters that only training reads may be missing, as in files of other frameworks.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    shapes = [
        f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    complaints = [
        f"{len(keys)} {what} ({', '.join(keys[:_LISTED])}{', ...' if len(keys) > _LISTED else ''})"
        for what, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
        )
        if keys
    ]
    if complaints:
        raise ModelError(
            f"'{source}' does not fit this network: keys {'; '.join(complaints)}; "
            "name the backbone it was saved from."
        )
    network.load_state_dict(state, strict=False)
