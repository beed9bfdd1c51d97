"""From a path or a name to a similarity model, and back to a file."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.data.preprocessing import FITS, Preprocess
from simexplain.errors import ModelError, OutputError, first_line
from simexplain.models.backbones import ZOOS, Backbone, build_backbone, preprocess_of_timm
from simexplain.models.base import SimilarityModel
from simexplain.models.checkpoints import (
    FORMAT_KEY,
    SCHEMA,
    fitted,
    kind_of,
    load_fitting,
    read_safetensors,
    read_torch,
    state_dict_in,
)
from simexplain.models.embedder import Embedder, as_similarity_model
from simexplain.models.exported import load_exported

RANDOM = "random"
_REFUSED = {
    "torchscript": "a TorchScript program, whose layers cannot be tapped; save the state_dict or "
    "export the network with torch.export (.pt2)",
    "onnx": "an ONNX graph, whose layers cannot be tapped and have no gradients; load the network "
    "in PyTorch and save its state_dict or export it with torch.export (.pt2)",
}


@dataclass(frozen=True)
class _Wanted:
    """What a caller says about a file; see :func:`load_model`."""

    backbone: str | None
    keep_head: bool
    trust_pickle: bool
    size: tuple[int, int] | None
    distance: str | None


def load_model(
    source: str | Path,
    *,
    weights: str | Path | None = None,
    backbone: str | None = None,
    keep_head: bool = False,
    trust_pickle: bool = False,
    size: tuple[int, int] | None = None,
    fit: str | None = None,
    distance: str | None = None,
) -> SimilarityModel:
    """Loads a model to explain. Nothing in a file is ever run unless ``trust_pickle``.

    Args:
        source: ``timm:NAME``, ``torchvision:NAME``, or a file: one that :func:`save_model` wrote,
            a ``state_dict`` (.pt, .pth, Lightning .ckpt) or ``.safetensors`` together with
            ``backbone``, or a ``torch.export`` program (.pt2).
        weights: For a name: a file of weights, or ``random``. None is the zoo's pretrained ones.
        backbone: For a file of weights: the network it belongs to, ``timm:NAME``.
        keep_head: The last linear layer in the file makes the embedding and is no classifier.
        trust_pickle: Load pickled modules, which can run any code in the file.
        size: ``(height, width)`` of the input where it is not the network's own.
        fit: ``crop``, ``squash`` or ``pad`` in place of the network's own way.
        distance: ``euclidean`` (default), ``squared`` or ``cosine``.

    Raises:
        ModelError: If the source cannot be used; says why and what to do.
    """
    name = str(source)
    if name.partition(":")[0] in ZOOS and not Path(name).exists():
        if weights is None or str(weights) == RANDOM:
            built = build_backbone(name, pretrained=weights is None, size=size)
            model = _embedder(built, distance or "euclidean")
            return _adjusted(model, size, fit)
        source, backbone = weights, name
    wanted = _Wanted(backbone, keep_head, trust_pickle, size, distance)
    return _adjusted(_from_file(Path(source), wanted), size, fit)


def _from_file(path: Path, wanted: _Wanted) -> SimilarityModel:
    kind = kind_of(path)
    if kind in _REFUSED:
        raise ModelError(f"'{path}' is {_REFUSED[kind]}.")
    if kind == "exported":
        distance = wanted.distance or "euclidean"
        return load_exported(path, trust=wanted.trust_pickle, distance=distance)
    if kind == "safetensors":
        return _from_state(read_safetensors(path), path, wanted)
    return _from_content(read_torch(path, trust_pickle=wanted.trust_pickle), path, wanted)


def save_model(
    model: nn.Module,
    path: str | Path,
    *,
    backbone: str | None = None,
    preprocess: Preprocess | None = None,
    distance: str = "euclidean",
) -> None:
    """Writes a file that ``load_model`` and the command line take without any further option.

    It holds tensors and plain values only. The network must be one that its name rebuilds.

    Args:
        model: A network from timm or torchvision, with or without its last linear layer, or a
            similarity model made from one.
        path: Where to; written whole or not at all.
        backbone: ``timm:NAME`` or ``torchvision:NAME``; timm's networks know their own.
        preprocess: Where the network was trained on something else than its zoo says.
        distance: What ``model.distance`` shall be.

    Raises:
        ModelError: If the network cannot be rebuilt from the name.
        OutputError: If the file cannot be written.
    """
    network = model
    if isinstance(model, Embedder):
        network, preprocess = model.network, preprocess or model.preprocess
        distance = model.distance_name
    network = as_similarity_model(network).network
    config: dict[str, Any] = getattr(network, "pretrained_cfg", {})
    backbone = backbone or (f"timm:{config['architecture']}" if config else None)
    if backbone is None:
        raise ModelError(
            f"Expected backbone='timm:NAME' or 'torchvision:NAME' for a {type(network).__name__}; "
            "export any other network with torch.export.save to a .pt2 file."
        )
    state = {key: value.detach().cpu() for key, value in network.state_dict().items()}
    rebuilt, outputs = _rebuilt(backbone, state, str(path), keep_head=True, size=None)
    if preprocess is None:
        preprocess = preprocess_of_timm(network) if config else rebuilt.preprocess
    options = {
        "schema": SCHEMA, "backbone": backbone, "outputs": outputs,
        "preprocess": preprocess.to_json(), "distance": distance,
    }  # fmt: skip
    _write({FORMAT_KEY: options, "state_dict": state}, Path(path))


def _write(content: dict[str, Any], path: Path) -> None:
    try:
        with tempfile.TemporaryDirectory(prefix=".simexplain-", dir=path.absolute().parent) as made:
            draft = Path(made) / "draft"
            torch.save(content, draft)
            draft.replace(path)
    except (OSError, RuntimeError) as error:
        raise OutputError(f"'{path}' cannot be written ({first_line(error)}).") from error


def _from_content(content: Any, path: Path, wanted: _Wanted) -> SimilarityModel:
    if isinstance(content, nn.Module):
        name = f"{path.stem} ({type(content).__name__})"
        return as_similarity_model(content, name=name, distance=wanted.distance or "euclidean")
    options = content.get(FORMAT_KEY) if isinstance(content, dict) else None
    if options is None:
        return _from_state(state_dict_in(content, path), path, wanted)
    try:
        return _from_checkpoint(options, content["state_dict"], path, wanted)
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"'{path}' is a simexplain file with damaged options ({first_line(error)}); save it "
            "again with save_model."
        ) from error


def _from_checkpoint(
    options: dict[str, Any], state: dict[str, Tensor], path: Path, wanted: _Wanted
) -> SimilarityModel:
    """A model from what :func:`save_model` wrote."""
    if options.get("schema") != SCHEMA:
        raise ModelError(
            f"'{path}' was written in schema {options.get('schema')}, but this version reads "
            f"schema {SCHEMA}; use a matching version of simexplain."
        )
    name, outputs = options["backbone"], options["outputs"]
    if not isinstance(name, str) or not isinstance(outputs, int):
        raise TypeError(f"backbone {name!r}, outputs {outputs!r}")
    built = build_backbone(name, pretrained=False, outputs=outputs, size=wanted.size)
    load_fitting(built.network, state, str(path))
    preprocess = Preprocess.from_json(options["preprocess"])
    built = replace(built, name=f"{path.stem} ({name})", preprocess=preprocess)
    return _embedder(built, wanted.distance or options["distance"])


def _from_state(state: dict[str, Tensor], path: Path, wanted: _Wanted) -> SimilarityModel:
    if wanted.backbone is None:
        raise ModelError(
            f"'{path}' holds weights only, so the network must be named: --backbone timm:NAME or "
            "torchvision:NAME (backbone=)."
        )
    built, _ = _rebuilt(
        wanted.backbone, state, str(path), keep_head=wanted.keep_head, size=wanted.size
    )
    built = replace(built, name=f"{path.stem} ({wanted.backbone})")
    return _embedder(built, wanted.distance or "euclidean")


def _rebuilt(
    backbone: str,
    state: dict[str, Tensor],
    source: str,
    *,
    keep_head: bool,
    size: tuple[int, int] | None,
) -> tuple[Backbone, int]:
    """The named network with this state, and the width of its last linear layer if kept."""
    built = build_backbone(backbone, pretrained=False, size=size)
    state = fitted(state, built.network)
    prefix = f"{built.classifier}."
    head = state.get(f"{prefix}weight") if built.classifier else None
    if head is not None and keep_head:
        built = build_backbone(backbone, pretrained=False, outputs=len(head), size=size)
        load_fitting(built.network, state, source)
        return built, len(head)
    own = built.network.state_dict()
    kept = {k: v for k, v in state.items() if not (k.startswith(prefix) and k not in own)}
    load_fitting(built.network, kept, source)
    if head is not None:
        told = (
            f"The last layer of the file ({prefix}weight {tuple(head.shape)}) was taken as a "
            "classifier and left out; --keep-head (keep_head=True) makes it the embedding."
        )
        built = replace(built, preprocess=replace(built.preprocess, notes=(told,)))
    return built, 0


def _embedder(built: Backbone, distance: str) -> SimilarityModel:
    return as_similarity_model(
        built.network, preprocess=built.preprocess, name=built.name, distance=distance
    )


def _adjusted(
    model: SimilarityModel, size: tuple[int, int] | None, fit: str | None
) -> SimilarityModel:
    if fit is not None and fit not in FITS:
        raise ModelError(f"Expected fit to be one of {', '.join(FITS)}, got '{fit}'.")
    own = model.preprocess
    if fit is not None and fit != own.fit:
        # Someone who asks for all of the picture wants no margin cut off either.
        own = replace(own, fit=fit, crop_fraction=own.crop_fraction if fit == "crop" else 1.0)
    model.preprocess = replace(own, size=size or own.size)
    model.eval()
    return model
