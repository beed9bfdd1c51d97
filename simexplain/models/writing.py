"""From a model to a file or folder that load_model takes without any further option."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from simexplain.arguments import typed
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ModelError, NetworkError, OutputError, TwoImagesError, first_line
from simexplain.models.avsl import AVSL
from simexplain.models.avsl_files import avsl_tensors
from simexplain.models.backbones import preprocess_of_timm
from simexplain.models.base import SimilarityModel
from simexplain.models.checkpoints import FORMAT_KEY, SCHEMA
from simexplain.models.embedder import Embedder, as_similarity_model
from simexplain.models.exported import ExportedNetwork
from simexplain.models.exporting import exported_bytes, exported_pair_bytes
from simexplain.models.hub import quiet_transformers
from simexplain.models.pairs import as_pair_model
from simexplain.models.preparing import UNSTATED
from simexplain.models.readouts import OUTPUTS, package_of
from simexplain.models.rebuilding import rebuilt
from simexplain.models.sidecar import IN_FOLDER, LayerTable, Sidecar
from simexplain.publishing import atomic_file, check_new_file

_FOLDERS = ("transformers", "sentence_transformers")
"""Packages whose networks are written as folders."""


@typed
def save_model(
    model: nn.Module,
    path: str | Path,
    *,
    backbone: str | None = None,
    preprocess: Preprocess | None = None,
    distance: str = "euclidean",
    force: bool = True,
) -> None:
    """Writes what ``load_model`` and the command line take without any further option.

    What is written depends on the network, and never holds anything that could run code:

    * one that timm or torchvision rebuilds from its name: a file of tensors and plain values;
    * one of transformers or sentence-transformers: a folder, as the package itself writes it, with
      preprocessing, distance and the choice of vector in ``simexplain.json``;
    * any other module, also one whose ``forward`` takes two images: an exported program
      (``.pt2``), with the same and the default layers in a JSON file beside it
      (``model.pt2.json``).

    Args:
        model: A network, or a similarity model made from one.
        path: Where to; written atomically. A folder must be new or empty.
        backbone: ``timm:NAME`` or ``torchvision:NAME``; timm's networks know their own.
        preprocess: Where the network was trained on other input than its zoo declares.
        distance: What ``model.distance`` shall be.
        force: Replace a file that is there. A folder is never replaced.

    Raises:
        ModelError: If the network cannot be rebuilt from the name, or cannot be exported.
        OutputError: If the file or folder cannot be written.
    """
    path = Path(path)
    if not path.is_dir():
        check_new_file(path, force=force)
    try:
        by_name = backbone is not None or isinstance(model, AVSL) or _is_rebuilt_by_name(model)
    except TwoImagesError:
        pair = as_pair_model(model, preprocess=preprocess)
        beside = Sidecar(_prepared(pair.first.preprocess)).to_json()
        _write_program(exported_pair_bytes(pair), beside, path)
        return
    if not by_name:
        wrapped = as_similarity_model(model, preprocess=preprocess, distance=distance)
        if preprocess is not None and wrapped is model:
            wrapped = copy.copy(wrapped)
            wrapped.preprocess = preprocess
        if package_of(wrapped.network) in _FOLDERS:
            _write_folder(wrapped, path)
        elif not isinstance(wrapped, Embedder) or isinstance(wrapped.network, ExportedNetwork):
            raise ModelError(
                f"{wrapped.name} is a program already, which cannot be written again; copy its "
                "file."
            )
        else:
            beside = _beside(wrapped)
            beside.pop("output", None)  # the program gives the vectors themselves
            _write_program(exported_bytes(wrapped), beside, path)
        return
    _write(_content(model, backbone, preprocess, distance), path, force=force)


def check_savable(model: nn.Module) -> None:
    """Finds out before long work whether :func:`save_model` will take what comes of it.

    Raises:
        ModelError: If the network cannot be rebuilt from its name.
    """
    _content(model, None, None, "euclidean")


def _content(
    model: nn.Module, backbone: str | None, preprocess: Preprocess | None, distance: str
) -> dict[str, Any]:
    """Options and tensors of a model, after rebuilding its network from its name."""
    avsl, output = (model if isinstance(model, AVSL) else None), None
    backbone = backbone or backbone_of(model)
    if isinstance(model, AVSL):
        preprocess, model = preprocess or model.preprocess, model.base
    if isinstance(model, Embedder):
        preprocess, distance = preprocess or model.preprocess, model.distance_name
        output = model.readout.output if model.readout is not None else None
    network = as_similarity_model(model).network
    config: dict[str, Any] = getattr(network, "pretrained_cfg", {})
    state = {key: value.detach().cpu() for key, value in network.state_dict().items()}
    size = preprocess.size if preprocess else None
    again, outputs = rebuilt(backbone, state, "The network", keep_head=True, size=size)
    if preprocess is None:
        preprocess = preprocess_of_timm(network) if config else again.preprocess
    options = {
        "schema": SCHEMA, "backbone": backbone, "outputs": outputs,
        "preprocess": preprocess.to_json(), "distance": distance,
    }  # fmt: skip
    if output is not None:
        options["output"] = output
    if avsl is not None:
        options["avsl"] = avsl.to_json()
        state |= avsl_tensors(avsl)
    return {FORMAT_KEY: options, "state_dict": state}


def backbone_of(model: nn.Module) -> str:
    """The name that rebuilds a model's network, ``timm:NAME`` or ``torchvision:NAME``.

    Raises:
        ModelError: If it is not known.
    """
    name = _name_of(model)
    if name is None:
        raise ModelError(
            f"Expected a network that timm:NAME or torchvision:NAME rebuilds, got a "
            f"{type(as_similarity_model(model).network).__name__}; say backbone= if it is one "
            "(models to be trained and AVSL models can be kept in no other way)."
        )
    return name


def _name_of(model: nn.Module) -> str | None:
    """The name that rebuilds a model's network, or None."""
    wrapped = as_similarity_model(model)
    if wrapped.backbone is not None:
        return wrapped.backbone
    config: dict[str, Any] = getattr(wrapped.network, "pretrained_cfg", None) or {}
    return f"timm:{config['architecture']}" if "architecture" in config else None


def _is_rebuilt_by_name(model: nn.Module) -> bool:
    """Whether a name and tensors say all: not where a function or a key picks the embedding."""
    output = model.output if isinstance(model, Embedder) else None
    return _name_of(model) is not None and (output is None or output in OUTPUTS)


def _beside(model: SimilarityModel) -> dict[str, Any]:
    """Preprocessing, distance, vector and layers of a model, as a sidecar has them."""
    sidecar = Sidecar(
        _prepared(model.preprocess),
        getattr(model, "distance_name", None),
        model.readout.output if isinstance(model, Embedder) and model.readout else None,
        _layer_table(model),
    )
    return sidecar.to_json()


def _prepared(preprocess: Preprocess) -> dict[str, Any]:
    """Preprocessing as a sidecar has it, without the note that it is assumed."""
    notes = [note for note in preprocess.notes if UNSTATED not in note]
    return preprocess.to_json() | {"notes": notes}


def _layer_table(model: SimilarityModel) -> LayerTable | None:
    """The layers to use when none are named; None for a network that pixels alone explain."""
    try:
        layers = model.layers
    except NetworkError:
        raise
    except ModelError:
        return None
    default = next((layer.name for layer in layers if layer.default), None)
    stages = tuple(layer.name for layer in layers if layer.stage)
    return None if default is None else LayerTable(default, stages)


def _write_program(content: bytes, beside: dict[str, Any], path: Path) -> None:
    """An exported program, and what it cannot say of itself beside it."""
    sidecar = path.with_name(f"{path.name}.json")
    try:
        with tempfile.TemporaryDirectory(prefix=".simexplain-", dir=path.absolute().parent) as made:
            program, text = Path(made) / "program", Path(made) / "text"
            program.write_bytes(content)
            text.write_text(json.dumps(beside, indent=2), encoding="utf-8")
            if path.is_dir() or sidecar.is_dir():
                raise OSError(f"'{path if path.is_dir() else sidecar}' is a folder")
            text.replace(sidecar)
            program.replace(path)
    except OSError as error:
        raise OutputError(f"'{path}' cannot be written ({first_line(error)}).") from error


def _write_folder(model: SimilarityModel, path: Path) -> None:
    """A folder as its package writes it, and ``simexplain.json`` in it."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(
            f"'{path}' is there already; choose a new folder for this "
            f"{type(model.network).__name__}."
        )
    beside, network = _beside(model), cast(Any, model.network)
    try:
        with tempfile.TemporaryDirectory(prefix=".simexplain-", dir=path.absolute().parent) as made:
            draft = Path(made) / "draft"
            with quiet_transformers():
                network.save_pretrained(str(draft))
                if isinstance(model, Embedder) and model.processor is not None:
                    model.processor.save_pretrained(str(draft))
            text = json.dumps(beside, indent=2)
            (draft / IN_FOLDER).write_text(text, encoding="utf-8")
            draft.replace(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise OutputError(f"'{path}' cannot be written ({first_line(error)}).") from error


def _write(content: dict[str, Any], path: Path, *, force: bool) -> None:
    try:
        with atomic_file(path, force=force) as draft:
            torch.save(content, draft)
    except (OSError, RuntimeError) as error:
        raise OutputError(f"'{path}' cannot be written ({first_line(error)}).") from error
