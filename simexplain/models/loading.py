"""From a path or a name to a similarity model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from simexplain.data.preprocessing import FITS, Preprocess
from simexplain.errors import ImageError, ModelError, first_line
from simexplain.models.avsl_files import avsl_from, split_state
from simexplain.models.backbones import ZOOS, Backbone, build_backbone, check_registered
from simexplain.models.base import SimilarityModel
from simexplain.models.blackbox import load_blackbox
from simexplain.models.checkpoints import (
    FORMAT_KEY,
    SCHEMA,
    kind_of,
    load_fitting,
    printable,
    read_safetensors,
    read_torch,
    state_dict_in,
)
from simexplain.models.embedder import as_similarity_model
from simexplain.models.exported import load_exported
from simexplain.models.rebuilding import rebuilt

RANDOM = "random"


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
            ``backbone``, a ``torch.export`` program (.pt2), or one
            without layers: TorchScript (with ``trust_pickle``) or .onnx.
        weights: For a name: a file of weights, or ``random``. None is the zoo's pretrained ones.
        backbone: For a file of weights: the network it belongs to, ``timm:NAME``.
        keep_head: The last linear layer in the file makes the embedding and is no classifier.
        trust_pickle: Load pickled modules and TorchScript, which can run any code in the file.
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
    distance = wanted.distance or "euclidean"
    if kind in ("torchscript", "onnx"):
        return load_blackbox(path, kind=kind, distance=distance, trust=wanted.trust_pickle)
    if kind == "exported":
        return load_exported(path, trust=wanted.trust_pickle, distance=distance)
    if kind == "safetensors":
        return _from_state(read_safetensors(path), path, wanted)
    return _from_content(read_torch(path, trust_pickle=wanted.trust_pickle), path, wanted)


def _from_content(content: Any, path: Path, wanted: _Wanted) -> SimilarityModel:
    if isinstance(content, nn.Module):
        name = f"{path.stem} ({type(content).__name__})"
        return as_similarity_model(content, name=name, distance=wanted.distance or "euclidean")
    options = content.get(FORMAT_KEY) if isinstance(content, dict) else None
    if options is None:
        return _from_state(state_dict_in(content, path), path, wanted)
    try:
        return _from_checkpoint(options, content["state_dict"], path, wanted)
    except ImageError as error:
        raise ModelError(
            f"'{path}' is a simexplain file with unusable preprocessing: {error}"
        ) from error
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
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
    if not isinstance(name, str) or type(outputs) is not int:
        raise TypeError(f"backbone {name!r}, outputs {outputs!r}")
    if not isinstance(state, dict) or not isinstance(options["preprocess"], dict):
        raise TypeError("state_dict and preprocess must be dictionaries")
    check_registered(name)
    preprocess = _preprocess_from(options["preprocess"])
    size = wanted.size or preprocess.size
    built = build_backbone(name, pretrained=False, outputs=outputs, size=size)
    own, avsl = split_state(state)
    load_fitting(built.network, own, str(path))
    built = replace(built, title=f"{path.stem} ({name})", preprocess=preprocess)
    if "avsl" not in options:
        return _embedder(built, wanted.distance or options["distance"])
    if wanted.distance is not None:
        raise ModelError(
            f"'{path}' holds an AVSL model, whose distance is its own; leave --distance "
            "(distance=) away."
        )
    return avsl_from(_embedder(built, options["distance"]), options["avsl"], avsl, str(path))


def _preprocess_from(values: dict[str, Any]) -> Preprocess:
    found = Preprocess.from_json(values)
    if len(found.mean) != 3:
        raise ImageError(f"Expected mean and std of three channels, got {len(found.mean)}.")
    notes = tuple(printable(note) for note in found.notes)
    return replace(found, source=printable(found.source), notes=notes)


def _from_state(state: dict[str, Tensor], path: Path, wanted: _Wanted) -> SimilarityModel:
    if wanted.backbone is None:
        raise ModelError(
            f"'{path}' holds weights only, so the network must be named: --backbone timm:NAME or "
            "torchvision:NAME (backbone=)."
        )
    built, _ = rebuilt(
        wanted.backbone, state, str(path), keep_head=wanted.keep_head, size=wanted.size
    )
    built = replace(built, title=f"{path.stem} ({wanted.backbone})")
    return _embedder(built, wanted.distance or "euclidean")


def _embedder(built: Backbone, distance: str) -> SimilarityModel:
    model = as_similarity_model(
        built.network,
        preprocess=built.preprocess,
        name=built.title or built.name,
        distance=distance,
    )
    model.backbone = built.name
    return model


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
