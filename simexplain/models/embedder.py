"""Any ``nn.Module`` that returns an embedding, as a similarity model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.arguments import check_pixels, described, typed
from simexplain.data.preprocessing import IMAGENET, Preprocess
from simexplain.errors import ModelError, TwoImagesError
from simexplain.models.base import DISTANCES, SimilarityModel
from simexplain.models.layers import Layer
from simexplain.models.preparing import assumed_preprocess
from simexplain.models.readouts import readout_of, weights_for_images
from simexplain.models.sidecar import LayerTable
from simexplain.models.texts import TextEncoder, text_vectors
from simexplain.networks import at_least_single, running, unit_rows

Output = Callable[[Any], Tensor] | str | int | None


class Embedder(SimilarityModel):
    """Wraps a network without changing it; see :func:`as_similarity_model`.

    Attributes:
        readout: How a network of a known package is called and read, or None.
        layer_table: Which layers to use when none are named, out of a file; or None.
        processor: The image processor that came with the network, or None.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        output: Output = None,
        preprocess: Preprocess = IMAGENET,
        distance: str = "euclidean",
        name: str = "",
        batch_size: int | None = None,
        text: TextEncoder | None = None,
    ) -> None:
        super().__init__()
        if distance not in DISTANCES:
            raise ModelError(f"Expected a distance of {', '.join(DISTANCES)}, got '{distance}'.")
        self.module = module
        self.output = output
        self.readout = readout_of(module, output)
        self.preprocess = preprocess
        self.distance_name = distance
        self.name = name or type(module).__name__
        self.batch_size = batch_size
        self.layer_table: LayerTable | None = None
        self.processor: Any = None
        self.text = text

    @property
    def network(self) -> nn.Module:
        """The user's own module."""
        return self.module

    def layers_for(self, images: Tensor) -> tuple[Layer, ...]:
        """As for every model; marks the layers that a file beside the model names."""
        layers = super().layers_for(images)
        return layers if self.layer_table is None else self.layer_table.marked(layers)

    def embed(self, images: Tensor) -> Tensor:
        """Unit rows ``(M,E)``; a zero vector stays zero. Half precision becomes float32.

        Raises:
            ModelError: If the network does not return one vector per image.
        """
        return unit_rows(self.vectors(images))

    def vectors(self, images: Tensor) -> Tensor:
        """What the network returns ``(M,E)``, not normalised; float32 or float64.

        Raises:
            ModelError: If the network does not return one vector per image.
        """
        check_pixels("images", images)
        if images.dim() != 4:
            raise ModelError(
                f"Expected images of shape (M,C,H,W), got {tuple(images.shape)}; "
                "add a batch axis with unsqueeze(0)."
            )
        reference = next(weights_for_images(self.module), images)
        with running(self.module, images):
            images = images.to(reference.device, reference.dtype)
            if self.readout is None:
                result, rest = self.module(images), self.output
            else:
                result = self.readout(self.module, images)
                rest = self.output if self.readout.output is None else None
        vectors = picked(result, rest)
        if vectors.dim() > 2 and vectors.shape[2:].numel() == 1:
            vectors = vectors.flatten(1)
        if vectors.is_complex() or vectors.is_quantized:
            raise ModelError(
                f"Expected an embedding of real numbers from the model, got {vectors.dtype}; "
                "change the model's last step or pick another part of its output with output=."
            )
        if vectors.dim() != 2 or len(vectors) != len(images):
            raise ModelError(
                f"Expected an embedding of shape ({len(images)}, E) from the model, got "
                f"{tuple(vectors.shape)}; add pooling to the model or pick the embedding with "
                "output=."
            )
        return at_least_single(vectors)

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Unit rows ``(T,E)`` of texts, by ``text`` or the text tower of the network.

        Raises:
            ModelError: If the model has no text tower, or a text is blank or too long for it.
        """
        return unit_rows(at_least_single(text_vectors(self.module, self.text, texts)))

    def distance(self, q: Tensor, g: Tensor) -> Tensor:
        """Distances ``(Q,G)`` of unit rows ``(Q,E)`` and ``(G,E)``, as named at construction."""
        return DISTANCES[self.distance_name](q, g)


@typed
def as_similarity_model(
    module: nn.Module,
    *,
    output: Output = None,
    preprocess: Preprocess | None = None,
    distance: str = "euclidean",
    name: str = "",
    batch_size: int | None = None,
    text: TextEncoder | None = None,
) -> SimilarityModel:
    """Wraps any ``nn.Module`` that returns an embedding. The module itself is not changed.

    Args:
        module: The network. ``DataParallel`` and compiled modules are unwrapped. Of whole CLIP
            models (transformers, open_clip, the original, sentence-transformers) the image tower
            with its projection is used.
        output: Where the network returns more than a tensor: an index, a key or attribute name,
            or a function that picks the embedding. Networks of transformers, open_clip,
            sentence-transformers and timm also take a word of ``OUTPUTS``: ``projected``,
            ``class_token``, ``patch_mean`` or ``pooled``; the default is what their authors
            compare with.
        preprocess: How pictures become input tensors; used by ``explain`` and the dry run.
            Networks of timm and open_clip know it; else the usual values are assumed, with a note.
        distance: ``euclidean`` (Eq. 1 of the paper), ``squared`` or ``cosine``, on unit rows.
        name: What to call the model in figures; its class name unless given.
        batch_size: The only number of images that one forward pass takes, or None.
        text: What makes vectors ``(T,E)`` of a list of texts, in the space of the image
            embeddings; CLIP-like networks of transformers and open_clip bring it along.

    Raises:
        ModelError: If the module cannot be traced or an option is unknown.
    """
    if isinstance(module, SimilarityModel):
        return module
    if isinstance(getattr(module, "learned", None), bool):  # a PairModel, which lies above
        raise ModelError(
            "A pair model compares two images and has no embedding of one alone, which is wanted "
            "here; use it with explain, or give one of its towers."
        )
    if not isinstance(module, nn.Module):
        mend = "make an instance" if isinstance(module, type) else "load files with load_model"
        raise ModelError(f"Expected an nn.Module, got {described(module)}; {mend}.")
    module = _unwrapped(module)
    _check_inputs(module)
    if isinstance(module, torch.jit.ScriptModule):
        from simexplain.models.blackbox import BlackBox  # which is built on this module

        return BlackBox(
            module,
            output=output,
            preprocess=preprocess or assumed_preprocess(module),
            distance=distance,
            name=name,
            batch_size=batch_size,
        )
    return Embedder(
        module,
        output=output,
        preprocess=preprocess or assumed_preprocess(module),
        distance=distance,
        name=name,
        batch_size=batch_size,
        text=text,
    )


def _check_inputs(module: nn.Module) -> None:
    """Refuses a module whose forward wants more than one input.

    Raises:
        ModelError: If so; names what takes such a module.
    """
    if any(hasattr(module, name) for name in ("encode_image", "get_image_features")):
        return  # a CLIP-like network, whose image tower can be called by itself
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # programs without a signature
        return
    wanted = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if len(wanted) > 1:
        raise (TwoImagesError if len(wanted) == 2 else ModelError)(
            f"Expected a network that embeds one image, but {type(module).__name__} takes "
            f"{', '.join(wanted)}; for a score of two images use as_pair_model, else give a module "
            "around it that takes images alone."
        )


def _unwrapped(module: nn.Module) -> nn.Module:
    """The network inside DataParallel and torch.compile, in whatever order they were put on."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def picked(result: Any, output: Output) -> Tensor:
    """The embedding out of whatever a network returned; of a single one in a list it is that.

    Raises:
        ModelError: If ``output`` picks nothing, or no tensor.
    """
    if output is None and isinstance(result, (tuple, list)) and len(result) == 1:
        result = result[0]
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
            'pick the embedding with output=, for a file by "output" in a JSON file beside it.'
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
