"""Any ``nn.Module`` that returns an embedding, as a similarity model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain.data.preprocessing import IMAGENET, Preprocess
from simexplain.errors import ModelError
from simexplain.models.backbones import preprocess_of_timm
from simexplain.models.base import DISTANCES, SimilarityModel
from simexplain.networks import at_least_single

Output = Callable[[Any], Tensor] | str | int | None


class Embedder(SimilarityModel):
    """Wraps a network without changing it; see :func:`as_similarity_model`."""

    def __init__(
        self,
        module: nn.Module,
        *,
        output: Output = None,
        preprocess: Preprocess = IMAGENET,
        distance: str = "euclidean",
        name: str = "",
        batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if distance not in DISTANCES:
            raise ModelError(f"Expected a distance of {', '.join(DISTANCES)}, got '{distance}'.")
        self.module = module
        self.output = output
        self.preprocess = preprocess
        self.distance_name = distance
        self.name = name or type(module).__name__
        self.batch_size = batch_size

    @property
    def network(self) -> nn.Module:
        """The user's own module."""
        return self.module

    def embed(self, images: Tensor) -> Tensor:
        """Unit rows ``(M,E)``; a zero vector stays zero. Half precision becomes float32.

        Raises:
            ModelError: If the network does not return one vector per image.
        """
        return F.normalize(self.vectors(images), dim=1)

    def vectors(self, images: Tensor) -> Tensor:
        """What the network returns ``(M,E)``, not normalised; float32 or float64.

        Raises:
            ModelError: If the network does not return one vector per image.
        """
        if images.dim() != 4:
            raise ModelError(
                f"Expected images of shape (M,3,H,W), got {tuple(images.shape)}; "
                "add a batch axis with unsqueeze(0)."
            )
        reference = next((p for p in self.module.parameters() if p.is_floating_point()), images)
        result = self.module(images.to(reference.device, reference.dtype))
        vectors = _picked(result, self.output)
        if vectors.dim() > 2 and vectors.shape[2:].numel() == 1:
            vectors = vectors.flatten(1)
        if vectors.dim() != 2 or len(vectors) != len(images):
            raise ModelError(
                f"Expected an embedding of shape ({len(images)}, E) from the model, got "
                f"{tuple(vectors.shape)}; add pooling to the model or pick the embedding with "
                "output=."
            )
        return at_least_single(vectors)

    def distance(self, q: Tensor, g: Tensor) -> Tensor:
        """Distances ``(Q,G)`` of unit rows ``(Q,E)`` and ``(G,E)``, as named at construction."""
        return DISTANCES[self.distance_name](q, g)


def as_similarity_model(
    module: nn.Module,
    *,
    output: Output = None,
    preprocess: Preprocess | None = None,
    distance: str = "euclidean",
    name: str = "",
    batch_size: int | None = None,
) -> SimilarityModel:
    """Wraps any ``nn.Module`` that returns an embedding. The module itself is not changed.

    Args:
        module: The network. ``DataParallel`` and compiled modules are unwrapped.
        output: Where the network returns more than a tensor: an index, a key or attribute name,
            or a function that picks the embedding.
        preprocess: How pictures become input tensors; used by ``explain_files`` and the dry run.
            Networks of timm know it; else ImageNet's usual values are assumed, with a note.
        distance: ``euclidean`` (Eq. 1 of the paper), ``squared`` or ``cosine``, on unit rows.
        name: What to call the model in figures; its class name unless given.
        batch_size: The only number of images that one forward pass takes, or None.

    Raises:
        ModelError: If the module cannot be traced or an option is unknown.
    """
    if isinstance(module, SimilarityModel):
        return module
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"Expected an nn.Module, got {type(module).__name__}; load files with load_model."
        )
    module = _unwrapped(module)
    if isinstance(module, torch.jit.ScriptModule):
        from simexplain.models.blackbox import BlackBox  # which is built on this module

        return BlackBox(
            module,
            output=output,
            preprocess=preprocess or _assumed(module),
            distance=distance,
            name=name,
            batch_size=batch_size,
        )
    return Embedder(
        module,
        output=output,
        preprocess=preprocess or _assumed(module),
        distance=distance,
        name=name,
        batch_size=batch_size,
    )


def _assumed(module: nn.Module) -> Preprocess:
    """What is known or usual where the caller says nothing about preprocessing."""
    if getattr(module, "pretrained_cfg", None):
        return preprocess_of_timm(module)
    note = "The model does not say how pictures are prepared; ImageNet's usual values are used."
    return replace(IMAGENET, size=declared_size(module) or IMAGENET.size, notes=(note,))


def declared_size(network: nn.Module) -> tuple[int, int] | None:
    """``(height, width)`` of the images that a network says it was built for, or None.

    Read from ``image_size``, ``config.image_size`` (Hugging Face) or ``patch_embed.img_size``
    (timm), of the network itself or of the first part that has one.
    """
    for module in network.modules():
        config = getattr(module, "config", None)
        vision = getattr(config, "vision_config", None)
        patches = getattr(module, "patch_embed", None)
        for holder, name in (
            (module, "image_size"),
            (vision, "image_size"),
            (config, "image_size"),
            (patches, "img_size"),
            (module, "img_size"),
        ):
            size = getattr(holder, name, None)
            if isinstance(size, int) and size > 0:
                return size, size
            if isinstance(size, (tuple, list)) and len(size) == 2:
                return int(size[0]), int(size[1])
    return None


def _unwrapped(module: nn.Module) -> nn.Module:
    """The network inside DataParallel and torch.compile, in whatever order they were put on."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def _picked(result: Any, output: Output) -> Tensor:
    """The embedding out of whatever the network returned."""
    try:
        if callable(output):
            result = output(result)
        elif isinstance(output, int):
            result = result[output]
        elif isinstance(output, str):
            result = result[output] if isinstance(result, Mapping) else getattr(result, output)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise ModelError(
            f"output={output!r} does not pick anything from the {_described(result)} that the "
            "model returned; name a part that is there."
        ) from error
    if not isinstance(result, Tensor):
        raise ModelError(
            f"Expected a tensor from the model, got {_described(result)}; "
            "pick the embedding with output=."
        )
    return result


def _described(result: Any) -> str:
    kind = type(result).__name__
    if isinstance(result, Mapping):
        return f"{kind} with keys {', '.join(map(str, result))}"
    if isinstance(result, (tuple, list)):
        return f"{kind} of {len(result)}"
    fields = list(vars(result)) if hasattr(result, "__dict__") else []
    return f"{kind} with {', '.join(fields)}" if fields else kind
