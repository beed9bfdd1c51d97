"""From a path or a name to a similarity model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from simexplain.arguments import typed
from simexplain.data.preprocessing import FITS, Preprocess
from simexplain.errors import ImageError, ModelError, first_line, printable
from simexplain.models.avsl_files import avsl_from, split_state
from simexplain.models.backbones import (
    ZOOS,
    Backbone,
    build_backbone,
    check_registered,
)
from simexplain.models.base import SimilarityModel
from simexplain.models.blackbox import load_blackbox
from simexplain.models.checkpoints import (
    FORMAT_KEY,
    SCHEMA,
    kind_of,
    load_fitting,
    read_safetensors,
    read_torch,
    state_dict_in,
)
from simexplain.models.embedder import Embedder, as_similarity_model
from simexplain.models.exported import load_exported, load_exported_pair
from simexplain.models.hub import (
    HUBS,
    HubModel,
    Request,
    check_output,
    load_folder,
    load_hub,
    offline,
)
from simexplain.models.pairs import PairModel, as_pair_model, check_pair
from simexplain.models.preparing import UNSTATED
from simexplain.models.rebuilding import rebuilt
from simexplain.models.sidecar import Sidecar, read_sidecar, with_values

RANDOM = "random"
_MOST_CHANNELS = 1024


@dataclass(frozen=True)
class _Wanted:
    """What a caller states about a file; see :func:`load_model`."""

    backbone: str | None
    keep_head: bool
    trust_pickle: bool
    size: tuple[int, int] | None
    distance: str | None
    output: str | None


@dataclass(frozen=True)
@typed
class Pixels:
    """How pictures become input, where a model does not declare it correctly; None: as it is.

    Attributes:
        mean: Subtracted from channels in [0, 1]; one number serves all channels.
        std: What channels are divided by afterwards, above 0.
        interpolation: ``bilinear``, ``bicubic`` and so on, as ``Preprocess`` has it.
        channels: How many channels the network takes.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    channels: int | None = None


AS_STORED = Pixels()


@typed
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
    output: str | None = None,
    pixels: Pixels = AS_STORED,
) -> SimilarityModel:
    """Loads a model to explain. Nothing in a file is ever run unless ``trust_pickle``.

    A file or folder never leads to the network; a name may, once, and announces it.

    Args:
        source: ``timm:NAME``, ``torchvision:NAME``, ``hf:ORG/NAME`` (transformers),
            ``open_clip:NAME/TAG``, ``st:NAME`` (sentence-transformers); a folder that one of these
            packages or :func:`save_model` wrote; or a file: one that :func:`save_model` wrote,
            a ``state_dict`` (.pt, .pth, Lightning .ckpt) or ``.safetensors`` together with
            ``backbone``, a ``torch.export`` program (.pt2), or one
            without layers: TorchScript (with ``trust_pickle``) or .onnx.
        weights: For a name: a file of weights, or ``random``. None is the zoo's pretrained ones.
        backbone: For a file of weights: the network it belongs to, ``timm:NAME``.
        keep_head: The last linear layer in the file makes the embedding and is not a classifier.
        trust_pickle: Load pickled modules and TorchScript, which can run any code in the file.
        size: ``(height, width)`` of the input where it is not the network's own.
        fit: ``crop``, ``squash`` or ``pad`` in place of the network's own way.
        distance: ``euclidean`` (default), ``squared`` or ``cosine``.
        output: Which vector of a network of transformers, open_clip, sentence-transformers or timm:
            ``projected``, ``class_token``, ``patch_mean`` or ``pooled``; the default is what its
            authors compare with.
        pixels: Normalisation, interpolation and channels where the model does not know them. They
            may also lie in a JSON file beside the model file, see ``docs/models.md``.

    Raises:
        ModelError: If the source cannot be used; the error has the reason and what to do.
    """
    check_output(output)
    name = str(source)
    prefix = name.partition(":")[0]
    named = not Path(name).exists()
    if prefix in HUBS and named:
        model = _from_hub(name, weights, size, output, distance)
        return _adjusted(model, size, fit, pixels)
    if prefix in ZOOS and named:
        if weights is None or str(weights) == RANDOM:
            built = build_backbone(name, pretrained=weights is None, size=size)
            model = _embedder(built, distance or "euclidean", output)
            return _adjusted(model, size, fit, pixels)
        source, backbone = weights, name
    path = Path(source)
    beside = read_sidecar(path)
    wanted = _Wanted(backbone, keep_head, trust_pickle, size, distance or beside.distance, output)
    if path.is_dir():
        model = _from_folder(path, wanted, beside, random=str(weights) == RANDOM)
    else:
        model = _from_file(path, wanted, beside)
    return _adjusted(_beside(model, beside), size, fit, pixels)


def load_pair_model(
    source: str | Path,
    second: str | Path | None = None,
    *,
    size: tuple[int, int] | None = None,
    second_size: tuple[int, int] | None = None,
    fit: str | None = None,
    pixels: Pixels = AS_STORED,
    trust_pickle: bool = False,
    **options: Any,
) -> PairModel:
    """Loads a model of two images: two towers, or a file whose forward takes two images.

    Args:
        source: As for :func:`load_model`: the tower of the anchor; or, without ``second``, a
            pickled module (with ``trust_pickle``) or exported program that gives a score of two
            images.
        second: The tower of the other images, likewise.
        size: ``(height, width)`` of the first input where it is not the model's own.
        second_size: Of the second input; that of the first unless given, or the model's own.
        fit: As for :func:`load_model`, for both.
        pixels: As for :func:`load_model`, for both.
        trust_pickle: As for :func:`load_model`.
        **options: Of :func:`load_model`, for both towers.

    Raises:
        ModelError: If a model cannot be used, or the only one embeds single images.
    """
    if second is not None:
        common: dict[str, Any] = {"fit": fit, "pixels": pixels, "trust_pickle": trust_pickle}
        return as_pair_model(
            load_model(source, size=size, **common, **options),
            load_model(second, size=second_size or size, **common, **options),
        )
    path = Path(source)
    both: tuple[SimilarityModel, SimilarityModel]
    if path.is_file() and kind_of(path) == "exported":
        both = load_exported_pair(path, trust=trust_pickle)
        sizes = (size, second_size)
    else:
        content = read_torch(path, trust_pickle=trust_pickle) if path.is_file() else None
        if not isinstance(content, nn.Module):
            raise ModelError(
                f"'{source}' embeds single images; name the tower of the other images with "
                "--second-model (second=) to compare two kinds of images."
            )
        pair = as_pair_model(content)
        both = pair.first, pair.second
        sizes = (size, second_size or size)
    beside = read_sidecar(path)
    first, second_side = (
        _adjusted(_beside(side, beside), own, fit, pixels).preprocess
        for side, own in zip(both, sizes, strict=True)
    )
    pair = as_pair_model(
        both[0].network, preprocess=first, second_preprocess=second_side, name=path.stem
    )
    for own, known in zip((pair.first, pair.second), both, strict=True):
        own.batch_size, own.largest_batch = known.batch_size, known.largest_batch
    check_pair(pair)
    return pair


def _from_hub(
    name: str,
    weights: str | Path | None,
    size: tuple[int, int] | None,
    output: str | None,
    distance: str | None,
) -> SimilarityModel:
    """A model by its name on a hub, or with weights out of a file."""
    random = str(weights) == RANDOM
    file = None if weights is None or random else Path(weights)
    request = Request(name=name, output=output, random=random, size=size, weights=file)
    return _hub_embedder(load_hub(name, request), distance)


def _from_folder(
    folder: Path, wanted: _Wanted, beside: Sidecar, *, random: bool
) -> SimilarityModel:
    """A folder that another package wrote; never uses the network."""
    if wanted.backbone is not None and wanted.backbone.partition(":")[0] in HUBS:
        name = wanted.backbone
        model = _from_hub(name, folder, wanted.size, wanted.output, wanted.distance)
        model.name = folder.name
        return model
    output = wanted.output or (beside.output if isinstance(beside.output, str) else None)
    check_output(output)
    title = folder.resolve().name
    request = Request(
        name=title, output=output, random=random, size=wanted.size, keep_head=wanted.keep_head
    )
    return _hub_embedder(load_folder(folder, request), wanted.distance)


def _hub_embedder(hub: HubModel, distance: str | None) -> SimilarityModel:
    model = as_similarity_model(
        hub.network,
        output=hub.output,
        preprocess=hub.preprocess,
        name=hub.name,
        distance=distance or "euclidean",
    )
    if isinstance(model, Embedder):
        model.processor = hub.processor
    return model


def _beside(model: SimilarityModel, beside: Sidecar) -> SimilarityModel:
    """The model with the preprocessing and layers that lie beside its file."""
    if beside.preprocess:
        values = dict(beside.preprocess)
        if values.get("fit", "crop") != "crop":  # as with fit=: all of the picture, no margin off
            values.setdefault("crop_fraction", 1.0)
        model.preprocess = _stated(with_values(model.preprocess, values), beside)
    if isinstance(model, Embedder) and beside.layers is not None:
        model.layer_table = beside.layers
    return model


def _stated(own: Preprocess, beside: Sidecar) -> Preprocess:
    """Without the note that values are assumed, where they no longer are."""
    if not {"mean", "std"} <= set(beside.preprocess) or "notes" in beside.preprocess:
        return own
    notes = tuple(note for note in own.notes if UNSTATED not in note)
    return replace(own, notes=notes, source=beside.preprocess.get("source", "the file beside it"))


def _from_file(path: Path, wanted: _Wanted, beside: Sidecar) -> SimilarityModel:
    kind = kind_of(path)
    distance = wanted.distance or "euclidean"
    if kind in ("torchscript", "onnx"):
        return load_blackbox(path, kind=kind, distance=distance, trust=wanted.trust_pickle)
    if kind == "exported":
        model = load_exported(path, trust=wanted.trust_pickle, distance=distance)
        if isinstance(model, Embedder) and beside.output is not None:
            model.output = beside.output
        return model
    if wanted.backbone is not None and wanted.backbone.partition(":")[0] in HUBS:
        model = _from_hub(wanted.backbone, path, wanted.size, wanted.output, wanted.distance)
        model.name = f"{path.stem} ({wanted.backbone})"
        return model
    if kind == "safetensors":
        return _from_state(read_safetensors(path), path, wanted)
    content = read_torch(path, trust_pickle=wanted.trust_pickle)
    return _from_content(content, path, wanted, beside.output)


def _from_content(
    content: Any, path: Path, wanted: _Wanted, picked: str | int | None
) -> SimilarityModel:
    if isinstance(content, nn.Module):
        return as_similarity_model(
            content,
            output=wanted.output or picked,
            name=f"{path.stem} ({type(content).__name__})",
            distance=wanted.distance or "euclidean",
        )
    options = content.get(FORMAT_KEY) if isinstance(content, dict) else None
    if options is None:
        return _from_state(state_dict_in(content, path), path, wanted)
    try:
        return _from_checkpoint(options, content["state_dict"], path, wanted)
    except ImageError as error:
        raise ModelError(
            f"'{path}' is a simexplain file with unusable preprocessing: {error}"
        ) from error
    except ModelError:
        raise
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
    check_registered(name, str(path))
    output = wanted.output or options.get("output")
    check_output(output)
    preprocess = _preprocess_from(options["preprocess"])
    size = wanted.size or preprocess.size
    with offline():
        built = build_backbone(name, pretrained=False, outputs=outputs, size=size)
    own, avsl = split_state(state)
    load_fitting(built.network, own, str(path))
    built = replace(built, title=f"{path.stem} ({name})", preprocess=preprocess)
    if "avsl" not in options:
        return _embedder(built, wanted.distance or options["distance"], output)
    if wanted.distance is not None:
        raise ModelError(
            f"'{path}' holds an AVSL model, whose distance is its own; leave --distance "
            "(distance=) away."
        )
    base = _embedder(built, options["distance"], output)
    return avsl_from(base, options["avsl"], avsl, str(path))


def _preprocess_from(values: dict[str, Any]) -> Preprocess:
    preprocess = Preprocess.from_json(values)
    if len(preprocess.mean) != 3:  # all networks of the zoos take colours
        raise ImageError(f"Expected mean and std of three channels, got {len(preprocess.mean)}.")
    notes = tuple(printable(note) for note in preprocess.notes)
    return replace(preprocess, source=printable(preprocess.source), notes=notes)


def _from_state(state: dict[str, Tensor], path: Path, wanted: _Wanted) -> SimilarityModel:
    if wanted.backbone is None:
        raise ModelError(
            f"'{path}' holds weights only, so the network must be named: --backbone timm:NAME or "
            "torchvision:NAME (backbone=), hf:FOLDER or open_clip:NAME."
        )
    built, _ = rebuilt(
        wanted.backbone, state, str(path), keep_head=wanted.keep_head, size=wanted.size
    )
    built = replace(built, title=f"{path.stem} ({wanted.backbone})")
    return _embedder(built, wanted.distance or "euclidean", wanted.output)


def _embedder(built: Backbone, distance: str, output: str | None) -> SimilarityModel:
    model = as_similarity_model(
        built.network,
        output=output,
        preprocess=built.preprocess,
        name=built.title or built.name,
        distance=distance,
    )
    model.backbone = built.name
    return model


def _adjusted(
    model: SimilarityModel, size: tuple[int, int] | None, fit: str | None, pixels: Pixels
) -> SimilarityModel:
    if fit is not None and fit not in FITS:
        raise ModelError(f"Expected fit to be one of {', '.join(FITS)}, got '{fit}'.")
    own = model.preprocess
    if fit is not None and fit != own.fit:
        # Whoever wants all of the picture does not want a margin cut off either.
        own = replace(own, fit=fit, crop_fraction=own.crop_fraction if fit == "crop" else 1.0)
    model.preprocess = _with_pixels(replace(own, size=size or own.size), pixels)
    model.eval()
    return model


def _with_pixels(own: Preprocess, pixels: Pixels) -> Preprocess:
    """The preprocessing with the caller's normalisation, interpolation and channels."""
    channels = pixels.channels or max(len(pixels.mean or ()), len(pixels.std or ()), len(own.mean))
    if channels > _MOST_CHANNELS:
        raise ModelError(f"Expected at most {_MOST_CHANNELS} channels, got {channels}.")
    own = own.for_channels(channels)
    values: dict[str, Any] = {}
    for key, numbers in (("mean", pixels.mean), ("std", pixels.std)):
        if numbers is not None:
            values[key] = _per_channel(key, numbers, channels)
    if pixels.interpolation is not None:
        values["interpolation"] = pixels.interpolation
    if {"mean", "std"} <= set(values):
        notes = tuple(note for note in own.notes if UNSTATED not in note)
        values |= {"notes": notes, "source": "the caller's values"}
    return with_values(own, values) if values else own


def _per_channel(key: str, numbers: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(numbers) not in (1, channels):
        raise ModelError(
            f"Expected one number or {channels} for {key}, got {len(numbers)}; give one for each "
            "channel."
        )
    if not all(abs(number) < 1e30 and (number > 0 or key == "mean") for number in numbers):
        what = "finite numbers" if key == "mean" else "numbers above 0"
        raise ModelError(f"Expected {what} for {key}, got {', '.join(map(str, numbers))}.")
    return tuple(numbers) * (channels if len(numbers) == 1 else 1)
