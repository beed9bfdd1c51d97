"""From a model to a file that load_model takes without any further option."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ModelError, OutputError, first_line
from simexplain.models.avsl import AVSL
from simexplain.models.avsl_files import avsl_tensors
from simexplain.models.backbones import preprocess_of_timm
from simexplain.models.checkpoints import FORMAT_KEY, SCHEMA
from simexplain.models.embedder import Embedder, as_similarity_model
from simexplain.models.rebuilding import rebuilt


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
    _write(_content(model, backbone, preprocess, distance), Path(path))


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
    avsl = model if isinstance(model, AVSL) else None
    backbone = backbone or backbone_of(model)
    if isinstance(model, AVSL):
        preprocess, model = preprocess or model.preprocess, model.base
    if isinstance(model, Embedder):
        preprocess, distance = preprocess or model.preprocess, model.distance_name
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
    if avsl is not None:
        options["avsl"] = avsl.to_json()
        state |= avsl_tensors(avsl)
    return {FORMAT_KEY: options, "state_dict": state}


def backbone_of(model: nn.Module) -> str:
    """The name that rebuilds a model's network, ``timm:NAME`` or ``torchvision:NAME``.

    Raises:
        ModelError: If it is not known.
    """
    wrapped = as_similarity_model(model)
    if wrapped.backbone is not None:
        return wrapped.backbone
    config: dict[str, Any] = getattr(wrapped.network, "pretrained_cfg", {})
    if not config:
        raise ModelError(
            f"Expected a network that timm:NAME or torchvision:NAME rebuilds, got a "
            f"{type(wrapped.network).__name__}; say backbone= if it is one, or write it with "
            "torch.export.save (an AVSL model over it can be kept in memory only)."
        )
    return f"timm:{config['architecture']}"


def _write(content: dict[str, Any], path: Path) -> None:
    try:
        with tempfile.TemporaryDirectory(prefix=".simexplain-", dir=path.absolute().parent) as made:
            draft = Path(made) / "draft"
            torch.save(content, draft)
            draft.replace(path)
    except (OSError, RuntimeError) as error:
        raise OutputError(f"'{path}' cannot be written ({first_line(error)}).") from error
