"""Tensors from files without running code: what is in a file and how it fits a network."""

from __future__ import annotations

import pickle
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.errors import DAMAGED, ModelError, first_line, missing, printable

FORMAT_KEY = "simexplain"
SCHEMA = 1
_LISTED = 4


def kind_of(path: Path) -> str:
    """What a model file is: safetensors, onnx, exported, torchscript or torch.

    Raises:
        ModelError: If the file does not exist.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ModelError(
            missing(
                path,
                f"Expected a model file, but '{path}' {what}; for a network by name write "
                "timm:NAME or torchvision:NAME.",
            )
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
    """Reads a file of ``torch.save``: by default tensors and plain values only.

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
        raise ModelError(f"'{path}' is not an intact safetensors file ({error}).") from error
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


def network_part(
    state: dict[str, Tensor], network: nn.Module, classifier: str | tuple[str, ...]
) -> tuple[dict[str, Tensor], str]:
    """The tensors of a network in the state of whatever it was trained in.

    A Lightning module, ``DataParallel`` or ``torch.compile`` keep them under a prefix (``model.``,
    ``module.``), and may hold tensors of their own beside them, such as the proxies of a loss.

    Args:
        state: Tensors by name.
        network: Whose names are looked for.
        classifier: How the names of a last layer start that the network may lack; ``()`` for none.

    Returns:
        The state without the prefix under which most of the network's names are found, and a note
        on what was left out because it is not under that prefix; empty if nothing was.
    """
    own = network.state_dict().keys()
    counts = Counter(
        key.removesuffix(name) for key in state for name in _endings(key) if name in own
    )
    # The shortest of several equally good ones: a plain state_dict stays as it is.
    prefix = min(counts, key=lambda each: (-counts[each], len(each)), default="")
    if not prefix:
        return state, ""
    kept = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    beside = {k: v for k, v in state.items() if not k.startswith(prefix)}
    kept |= {k: v for k, v in beside.items() if k in own or k.startswith(classifier)}
    others = [printable(key) for key in beside if key not in kept]
    listed = ", ".join(others[:_LISTED]) + (", ..." if len(others) > _LISTED else "")
    note = f"Only the tensors under '{prefix}' were loaded; left out: {listed}." if others else ""
    return kept, note


def _endings(key: str) -> list[str]:
    """A dotted name and what remains of it when parts are taken off its front."""
    parts = key.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def load_fitting(network: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Loads a state into a network, all of it or nothing.

    Raises:
        ModelError: If any key is missing, unexpected or of another shape; lists them. If a tensor
            is not one of plain numbers.
    """
    own = network.state_dict()
    for key, value in state.items():
        _check_plain(key, value, source, complex_too=key in own and own[key].is_complex())
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
            "check that this is the network it was saved from."
        )
    network.load_state_dict(state, strict=False)


def _check_plain(key: str, value: Any, source: str, *, complex_too: bool) -> None:
    """Refuses what would end in an error of torch's own, or in weights that are not the file's."""
    if not isinstance(value, Tensor):
        kind, remedy = f"a {type(value).__name__}", "save the state_dict of the network"
    elif value.is_meta:
        kind, remedy = "a tensor on the meta device, without values", "save the network with values"
    elif value.layout != torch.strided or value.is_nested:
        kind, remedy = "a sparse or nested tensor", "save it dense (to_dense())"
    elif value.is_quantized:
        kind, remedy = "a quantised tensor", "save it in floating point (dequantize())"
    elif value.is_complex() and not complex_too:
        kind, remedy = "a tensor of complex numbers", "save the real one that the network has"
    else:
        return
    raise ModelError(f"Expected a plain tensor for {key} in '{source}', got {kind}; {remedy}.")
