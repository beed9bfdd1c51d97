"""Whether a model is the one that an index was made with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ModelError, cause_of
from simexplain.models.avsl import AVSL
from simexplain.models.base import SimilarityModel
from simexplain.tracing import trace

_OTHER = 1e-3
"""Difference of two answers to the same image, relative to their length, that rounding explains."""


@dataclass(frozen=True)
class Identity:
    """What a model is known by.

    Attributes:
        name: What it is called; two models may share it, and one may have several.
        weights: A digest of its tensors, and of the graph's options for AVSL.
        preprocess: How it wants its pictures.
        probe: What it makes of a fixed image of noise ``(E,)``, on the CPU.
    """

    name: str
    weights: str
    preprocess: Preprocess
    probe: Tensor

    @classmethod
    def of(cls, model: SimilarityModel) -> Identity:
        """Reads all weights once and runs the model on one image."""
        return cls(model.name, weights_of(model), model.preprocess, _answer(model))

    def check(self, model: SimilarityModel, where: str) -> None:
        """Refuses a model that is not this one.

        Args:
            model: Any.
            where: The index, for the error.

        Raises:
            ModelError: If weights, preprocessing or outputs differ; names which.
        """
        advice = "give that model, or index the gallery again with this one (--force)."
        theirs, ours = _steps(model.preprocess), _steps(self.preprocess)
        name = next((key for key in ours if ours[key] != theirs[key]), "")
        prepared_otherwise = name and model.name == self.name
        if not prepared_otherwise and weights_of(model) != self.weights:
            raise ModelError(
                f"'{where}' was made with {self.name} and other weights than this {model.name} "
                f"has (--fast changes them as well); {advice}"
            )
        if name:
            raise ModelError(
                f"'{where}' was made from pictures prepared with {name} {_told(ours[name])}, got a "
                f"model with {_told(theirs[name])}; {advice}"
            )
        try:
            probe = _answer(model)
        except RuntimeError as error:
            raise ModelError(
                f"'{where}' was made with {self.name}, but this {model.name} does not take images "
                f"of {model.preprocess.size[0]}x{model.preprocess.size[1]} ({cause_of(error)}); "
                f"{advice}"
            ) from error
        if probe.shape != self.probe.shape or not bool(
            (probe - self.probe).norm() <= _OTHER * self.probe.norm()
        ):
            raise ModelError(
                f"'{where}' was made with {self.name}, which embeds the same image differently "
                f"from this {model.name}; {advice}"
            )


def weights_of(model: SimilarityModel) -> str:
    """A digest of all parameters and buffers, their names, types and shapes.

    Programs without named tensors have those of their parameters, or none at all; they are
    distinguished by their output for a fixed image.
    """
    digest = hashlib.blake2b(digest_size=16)
    tensors = dict(model.state_dict())
    if not tensors:  # black boxes name none
        tensors = {str(number): tensor for number, tensor in enumerate(model.parameters())}
    for name, tensor in sorted(tensors.items()):
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        plain = tensor.detach().cpu().contiguous()
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    if isinstance(model, AVSL):
        graph = {key: value for key, value in model.to_json().items() if key != "report"}
        digest.update(json.dumps(graph, sort_keys=True).encode())
    return digest.hexdigest()


def _answer(model: SimilarityModel) -> Tensor:
    """What the model makes of a fixed image of noise ``(E,)``."""
    rows = trace(model, model.example(), ()).embeddings
    return rows[0].detach().float().cpu()


def _steps(preprocess: Preprocess) -> dict[str, Any]:
    """The fields that change the tensor, without those that only describe it."""
    return {k: v for k, v in vars(preprocess).items() if k not in ("source", "notes")}


def _told(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
