"""Networks of Hugging Face, open_clip and sentence-transformers, by name or from a folder.

A folder never leads to the network. A name does at most once: what was fetched lies in the hub's
own cache afterwards, and that is looked into first. Code that comes with a model is never run, and
of pickled files only tensors are read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ModelError, first_line
from simexplain.models.backbones import preprocess_of_timm
from simexplain.models.checkpoints import (
    load_fitting,
    network_part,
    read_safetensors,
    read_torch,
    state_dict_in,
)
from simexplain.models.preparing import assumed_preprocess
from simexplain.models.processors import preprocess_of_processor
from simexplain.models.readouts import OUTPUTS, default_output, native_size

LOGGER = logging.getLogger("simexplain")
PACKAGES = {
    "transformers": "transformers",
    "open_clip": "open_clip_torch",
    "sentence_transformers": "sentence-transformers",
}
"""What the extra ``hub`` installs: modules, and the packages that they come in."""

_CONFIGS = ["*.json", "*.txt"]
_WEIGHTS = ["model.safetensors", "model-*.safetensors"]
_PICKLED = ["pytorch_model.bin", "pytorch_model-*.bin"]


@dataclass(frozen=True)
class HubModel:
    """A network out of a folder or a hub, and what came with it.

    Attributes:
        network: The package's own module.
        preprocess: As its image processor has it.
        output: A word of ``OUTPUTS``, or None where the network itself returns the embedding.
        name: What to call it.
        processor: The package's own image processor, to be saved with the network; or None.
    """

    network: nn.Module
    preprocess: Preprocess
    output: str | None
    name: str
    processor: Any = None


@dataclass(frozen=True)
class Request:
    """What a caller states about a model of a hub.

    Attributes:
        name: What to call it.
        output: A word of ``OUTPUTS``, or None for the default.
        random: Random weights in place of the stored ones.
        size: ``(height, width)`` of the input, for networks that must be built for it.
        weights: A file or folder of weights for a named architecture.
        keep_head: The last linear layer of timm's networks makes the embedding.
    """

    name: str
    output: str | None = None
    random: bool = False
    size: tuple[int, int] | None = None
    weights: Path | None = None
    keep_head: bool = False


def load_hub(name: str, request: Request) -> HubModel:
    """Loads ``hf:ORG/NAME``, ``open_clip:NAME[/TAG]`` or ``st:NAME``; a folder may stand for NAME.

    Raises:
        ModelError: If it cannot be had, needs a package that is missing, or has no images.
    """
    prefix, _, bare = name.partition(":")
    if not bare:
        raise ModelError(f"Expected a model as {prefix}:NAME, got '{name}'.")
    # Drawing random weights must not move the user's random state.
    with torch.random.fork_rng(devices=[]):
        return HUBS[prefix](bare, request)


def load_folder(folder: Path, request: Request) -> HubModel:
    """Loads a folder that transformers, sentence-transformers, timm or open_clip wrote.

    Never uses the network.

    Raises:
        ModelError: If it holds none of these, or its network cannot be built.
    """
    with torch.random.fork_rng(devices=[]), offline():
        if (folder / "modules.json").is_file():
            return _sentence_transformers(folder, request)
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        if "model_type" in config:
            return _transformers(folder, config, request)
        if "architecture" in config:
            return _timm(folder, config, request)
        if (folder / "open_clip_config.json").is_file():
            return _open_clip_folder(folder, request)
    raise ModelError(
        f"Expected '{folder}' to be a folder that transformers, timm, sentence-transformers or "
        "open_clip wrote, but it has no config.json with a model_type or architecture, no "
        "modules.json and no open_clip_config.json; give a model file or save it again."
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: If it is not one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"'{path}' cannot be read as JSON ({first_line(error)}).") from error
    if not isinstance(content, dict):
        raise ModelError(f"Expected an object in '{path}', got {type(content).__name__}.")
    return content


def need(module: str) -> Any:
    """A module of the extra ``hub``.

    Raises:
        ModelError: If it is not installed; names the extra.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ModelError(
            f"This model needs the package {PACKAGES[module]}, which is not installed; "
            "pip install 'simexplain[hub]' adds it."
        ) from error


@contextmanager
def offline() -> Iterator[None]:
    """Keeps Hugging Face's library offline inside the block, whatever the environment."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


# ---------------------------------------------------------------------------------- names


def _from_hf(bare: str, request: Request) -> HubModel:
    need("transformers")
    if request.weights is None:
        return load_folder(_found(bare, "hf", _WEIGHTS, request), request)
    request = replace(request, random=True)
    model = load_folder(_found(bare, "hf", _WEIGHTS, request), request)
    state, _ = network_part(_state(request.weights), model.network, ())
    load_fitting(model.network, state, request.name)
    return model


def _from_st(bare: str, request: Request) -> HubModel:
    need("sentence_transformers")
    if "/" not in bare and not Path(bare).is_dir():
        bare = f"sentence-transformers/{bare}"
    folder = _found(bare, "st", ["*.safetensors", "*.model"], request)
    if not (folder / "modules.json").is_file():
        raise ModelError(
            f"Expected st:{bare} to be a model of sentence-transformers, but it has no "
            f"modules.json; hf:{bare} loads a network of transformers."
        )
    return load_folder(folder, request)


def _from_open_clip(bare: str, request: Request) -> HubModel:
    need("open_clip")
    if Path(bare).is_dir():
        with offline():
            return _open_clip_folder(Path(bare), request)
    if bare.startswith("hf-hub:"):
        weights = ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
        folder = _found(bare.removeprefix("hf-hub:"), "open_clip:hf-hub", weights, request)
        with offline():
            return _open_clip_folder(folder, request)
    return _open_clip_named(bare, request)


HUBS: dict[str, Callable[[str, Request], HubModel]] = {
    "hf": _from_hf,
    "open_clip": _from_open_clip,
    "st": _from_st,
}
"""Model hubs by prefix; a new one is one function and one line here."""


def _found(bare: str, prefix: str, weights: list[str], request: Request) -> Path:
    """The folder of a model: one on this machine, or the hub's copy of it in its cache."""
    if Path(bare).is_dir():
        return Path(bare)
    if bare.count("/") != 1 or not all(bare.split("/")):
        raise ModelError(
            f"Expected {prefix}:ORG/NAME or a folder, got '{prefix}:{bare}'; check the spelling."
        )
    wanted = _CONFIGS if request.random else [*_CONFIGS, *weights]
    folder = _cached(bare, wanted)
    if folder is None or not (request.random or _has_weights(folder)):
        folder = _fetched(bare, prefix, wanted)
        if not (request.random or _has_weights(folder)):
            folder = _fetched(bare, prefix, [*_CONFIGS, *_PICKLED])
    return folder


def _has_weights(folder: Path) -> bool:
    return any(path.suffix in (".safetensors", ".bin") for path in folder.rglob("*"))


def _cached(bare: str, wanted: list[str]) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(bare, allow_patterns=wanted, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _fetched(bare: str, prefix: str, wanted: list[str]) -> Path:
    """Downloads into the hub's cache; announces it once.

    Raises:
        ModelError: If the hub cannot be reached or does not have it.
    """
    from huggingface_hub import constants, snapshot_download

    from simexplain.models.backbones import hub_offline_if_unreachable

    with hub_offline_if_unreachable():
        if constants.HF_HUB_OFFLINE:
            raise _unreachable(f"{prefix}:{bare}")
        announce(f"{prefix}:{bare}", constants.HF_HUB_CACHE)
        try:
            return Path(snapshot_download(bare, allow_patterns=wanted))
        except Exception as error:  # every layer of the client has errors of its own
            raise _unreachable(f"{prefix}:{bare}", error) from error


def announce(name: str, cache: str) -> None:
    """Says that the network is used, on standard error unless logging is set up otherwise."""
    LOGGER.warning("Fetching %s over the network, once; it is kept in %s.", name, cache)


def _unreachable(name: str, error: Exception | None = None) -> ModelError:
    why = f" ({first_line(error)})" if error else ""
    return ModelError(
        f"{name} is not in the cache of this machine and cannot be fetched from here{why}; check "
        "the spelling and the connection, or give a local folder."
    )


# ---------------------------------------------------------------------------------- transformers


def _transformers(folder: Path, stored: dict[str, Any], request: Request) -> HubModel:
    """A folder of transformers: its own class where that projects, else its bare network."""
    transformers = need("transformers")
    kind = str(stored["model_type"])
    if kind not in transformers.CONFIG_MAPPING:
        raise ModelError(
            f"'{folder}' holds a network of kind '{kind}', which this version of transformers does "
            "not have; code that comes with a model is never run, so update transformers or wrap "
            "the module with as_similarity_model."
        )
    try:
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            if kind == "vit_mae":
                config.mask_ratio = 0.0  # else random patches are hidden from it
            network, missing = _built(transformers, folder, config, request)
    except ModelError:
        raise
    except Exception as error:  # transformers raises anything from OSError to SafetensorError
        raise ModelError(
            f"'{folder}' cannot be loaded with transformers ({_why(error)})."
        ) from error
    _check_images(network, folder)
    output = _checked_output(network, request.output, missing, folder)
    processor = _processor(folder)
    if processor is None:
        return HubModel(network.eval(), assumed_preprocess(network), output, request.name)
    prepare = preprocess_of_processor(processor, native_size(network))
    return HubModel(network.eval(), prepare, output, request.name, processor)


def _built(
    transformers: Any, folder: Path, config: Any, request: Request
) -> tuple[nn.Module, list[str]]:
    """The network, and the names of weights that the folder does not have."""
    # What AutoModel would build of these lacks the projection, or has a text tower besides.
    own = ["ModelWithProjection"] + ["ForImageClassification"] * hasattr(config, "vision_config")
    names = [name for name in config.architectures or () if name.endswith(tuple(own))]
    kind = getattr(transformers, names[0], None) if names else None
    if request.random:
        factory = kind._from_config if kind is not None else transformers.AutoModel.from_config
        return factory(config, dtype=torch.float32), []
    network, info = (kind or transformers.AutoModel).from_pretrained(
        str(folder),
        config=config,
        local_files_only=True,
        trust_remote_code=False,
        weights_only=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    odd = [str(key) for key in info.get("mismatched_keys", ())]
    if odd:
        raise ModelError(
            f"'{folder}' holds weights of another shape than in its config.json ({odd[0]}); "
            "save it again."
        )
    return network, sorted(map(str, info.get("missing_keys", ())))


def _check_images(network: Any, folder: Path) -> None:
    takes = getattr(network, "main_input_name", "something else")
    films = getattr(network.config, "num_frames", None) or hasattr(network, "get_video_features")
    if hasattr(network, "get_image_features") or (takes == "pixel_values" and not films):
        return
    raise ModelError(
        f"Expected a network of images in '{folder}', got {type(network).__name__}, which takes "
        f"{'videos' if films else takes}."
    )


def _checked_output(
    network: nn.Module, output: str | None, missing: list[str], folder: Path
) -> str:
    """The vector to take, none that would pass through weights that the folder does not have."""
    poolers = [key for key in missing if "pooler" in key.split(".")]
    rest = [key for key in missing if key not in poolers]
    if rest:
        raise ModelError(
            f"'{folder}' lacks {len(rest)} weights of {type(network).__name__} "
            f"({', '.join(rest[:3])}{', ...' if len(rest) > 3 else ''}), which would be random; "
            "save the whole network."
        )
    word = output or default_output(network)
    if not poolers or word != "pooled":
        return word
    if output is not None:
        raise ModelError(
            f"'{folder}' has no weights for the pooler of {type(network).__name__}; choose "
            "class_token or patch_mean (--output, output=)."
        )
    return "class_token"


def _processor(folder: Path) -> Any:
    """The folder's image processor, or None where it has none."""
    transformers = need("transformers")
    names = ("preprocessor_config.json", "processor_config.json")
    if not any((folder / name).is_file() for name in names):
        return None
    try:
        with quiet_transformers():
            return transformers.AutoImageProcessor.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # a processor may be damaged in as many ways as a network
        raise ModelError(
            f"The image processor of '{folder}' cannot be used ({_why(error)}); save it "
            "again or remove its file."
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and reports of transformers inside; restores what they were."""
    log = need("transformers").utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


# ---------------------------------------------------------------------------------- the others


def _sentence_transformers(folder: Path, request: Request) -> HubModel:
    package = need("sentence_transformers")
    if request.random:
        raise ModelError("Random weights are not available for st:NAME; give its stored ones.")
    try:
        with quiet_transformers():
            network = package.SentenceTransformer(
                str(folder), device="cpu", local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # modules raise many kinds
        raise ModelError(
            f"'{folder}' cannot be loaded with sentence-transformers ({_why(error)})."
        ) from error
    if "image" not in getattr(network, "modalities", ["image"]):
        raise ModelError(
            f"Expected a model of sentence-transformers for images in '{folder}', got one for "
            f"{', '.join(map(str, network.modalities))}."
        )
    network = network.float().eval()
    output = request.output or "projected"
    return HubModel(network, assumed_preprocess(network), output, request.name)


def _timm(folder: Path, stored: dict[str, Any], request: Request) -> HubModel:
    """A folder that timm pushed or saved: an architecture of its own, and plain weights."""
    import timm

    name = str(stored["architecture"])
    config = dict(stored.get("pretrained_cfg") or {})
    if not timm.is_model(name):
        raise ModelError(
            f"'{folder}' names the architecture '{name}', which this version of timm does not have."
        )
    options = dict(stored.get("model_args") or {})
    options["num_classes"] = int(stored.get("num_classes") or 0) if request.keep_head else 0
    if request.size is not None and config.get("fixed_input_size"):
        options["img_size"] = request.size
    pooling = stored.get("global_pool")
    if isinstance(pooling, str) and pooling and "global_pool" not in options:
        options["global_pool"] = pooling
    try:
        network = timm.create_model(name, pretrained=False, pretrained_cfg=config, **options)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise ModelError(
            f"The network of '{folder}' cannot be built with timm ({first_line(error)})."
        ) from error
    if not request.random:
        state, _ = network_part(_weights_in(folder), network, ())
        own = network.state_dict()
        head = network.pretrained_cfg.get("classifier") or ()
        heads = tuple(f"{part}." for part in ((head,) if isinstance(head, str) else head))
        kept = {k: v for k, v in state.items() if k in own or not k.startswith(heads)}
        load_fitting(network, kept, str(folder))
    return HubModel(network.eval(), preprocess_of_timm(network), request.output, request.name)


def _weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the folder's only file of weights, safetensors first."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return _state(folder / name)
    raise ModelError(f"Expected model.safetensors in '{folder}', but it is not there.")


def _state(path: Path | None) -> dict[str, torch.Tensor]:
    """The tensors of a file, or of a folder's file."""
    if path is None or path.is_dir():
        return _weights_in(path or Path())
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if not path.is_file():
        raise ModelError(f"There is no file of weights '{path}'; check the path.")
    return state_dict_in(read_torch(path, trust_pickle=False), path)


def _open_clip_folder(folder: Path, request: Request) -> HubModel:
    """A folder that open_clip wrote for a hub: ``open_clip_config.json`` and weights."""
    need("open_clip")
    path = folder / "open_clip_config.json"
    if not path.is_file():
        raise ModelError(f"Expected open_clip_config.json in '{folder}', but it is not there.")
    read_json(path)
    return _open_clip(f"local-dir:{folder}", None, request)


def _open_clip_named(bare: str, request: Request) -> HubModel:
    """A built-in architecture of open_clip, with a tag's, a file's or random weights."""
    package = need("open_clip")
    name, _, tag = bare.partition("/")
    if name not in package.list_models():
        raise ModelError(
            f"open_clip has no network '{name}'; open_clip.list_models() lists what it has."
        )
    if request.random or request.weights is not None:
        with offline():
            return _open_clip(name, request.weights, request)
    tags = package.list_pretrained_tags_by_model(name)
    tag = tag or (tags[0] if len(tags) == 1 else "")
    if tag not in tags:
        raise ModelError(
            f"Expected weights as open_clip:{name}/TAG, got '{tag}'; this network has "
            f"{', '.join(tags) or 'none'}, or give a file of weights (weights=), or ask for random "
            "ones (--untrained)."
        )
    return _open_clip(name, _open_clip_weights(package, name, tag), request)


def _open_clip_weights(package: Any, name: str, tag: str) -> Path:
    """The file of a tag's weights, from the hub's cache or, once, over the network."""
    from huggingface_hub import constants

    from simexplain.models.backbones import hub_offline_if_unreachable

    config = package.get_pretrained_cfg(name, tag)
    with hub_offline_if_unreachable() as reachable:
        try:
            with offline():
                return Path(package.download_pretrained(config))
        except Exception:  # it is not in the cache: any error of the client's layers
            if not reachable:
                raise _unreachable(f"open_clip:{name}/{tag}") from None
        announce(f"open_clip:{name}/{tag}", constants.HF_HUB_CACHE)
        try:
            return Path(package.download_pretrained(config))
        except Exception as error:
            raise _unreachable(f"open_clip:{name}/{tag}", error) from error


def _open_clip(name: str, weights: Path | None, request: Request) -> HubModel:
    package = need("open_clip")
    root = logging.getLogger()
    level = root.level
    try:
        root.setLevel(logging.ERROR)  # it reports through the root logger
        network = package.create_model(
            name,
            pretrained=None if weights is None else str(_weights_file(weights)),
            load_weights=not request.random,
            force_image_size=request.size,
            weights_only=True,
            pretrained_text=False,
            require_pretrained=not request.random,
        )
    except ModelError:
        raise
    except Exception as error:  # checkpoints may be damaged or foreign in any way
        raise ModelError(
            f"{request.name} cannot be loaded with open_clip ({_why(error)})."
        ) from error
    finally:
        root.setLevel(level)
    network = network.float().eval()
    output = request.output or "projected"
    return HubModel(network, assumed_preprocess(network), output, request.name)


def _weights_file(path: Path) -> Path:
    """A file of weights, or the one of a folder that open_clip wrote."""
    if path.is_file():
        return path
    for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors"):
        if (path / name).is_file():
            return path / name
    raise ModelError(f"Expected a file of weights, but '{path}' has none for open_clip.")


def _why(error: Exception) -> str:
    """The text of an error, on one line; of long lists the beginning."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def check_output(output: str | None) -> None:
    """Refuses a word that is none of ``OUTPUTS``.

    Raises:
        ModelError: If it is not one of them.
    """
    if output is not None and output not in OUTPUTS:
        raise ModelError(f"Expected output to be one of {', '.join(OUTPUTS)}, got '{output}'.")
