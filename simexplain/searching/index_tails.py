"""Tails that treat every position alike, whose parts are one product of matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simexplain.methods.position_parts import EXACT, PositionParts
from simexplain.methods.raw_vectors import trace_vectors
from simexplain.models.base import SimilarityModel
from simexplain.networks import at_least_single, lengths_of

_AT_ONCE = 64


@dataclass(frozen=True)
class UniformTail:
    """The part of a model above a layer, if that is ``v = W mean(A) + b`` (average pooling).

    Parts then are ``W A_p / (h w)`` for any image: no backward pass, and no second forward pass to
    see what is left without the layer. For a convolutional network that is a third of the time
    that ``position_parts`` takes. Whether it is so is not taken on trust: parts and rest of every
    image must add up to its vector.

    Attributes:
        layer: The layer.
        weight: ``W / (h w)``, ``(E,C)``.
        rest: ``b``, ``(E,)``.
    """

    layer: str
    weight: Tensor
    rest: Tensor

    def parts(self, model: SimilarityModel, images: Tensor) -> PositionParts | None:
        """The parts of preprocessed images ``(M,3,H,W)``; None where they do not add up."""
        traced = trace_vectors(model, images, (self.layer,)).trace
        vectors = at_least_single(traced.embeddings.detach())
        grid = at_least_single(traced.maps[self.layer].detach())
        split = PositionParts(
            parts=torch.einsum("ec,mchw->mehw", self.weight.to(grid), grid),
            rest=self.rest.to(vectors).expand_as(vectors),
            vectors=vectors,
            lengths=lengths_of(vectors),
            steps=0,
        )
        return split if bool((split.residual <= EXACT).all()) else None


def uniform_tail(
    model: SimilarityModel, layer: str, image: Tensor, rest: Tensor
) -> UniformTail | None:
    """Finds the matrix of such a tail by its Jacobian on one image; None for any other tail.

    Args:
        model: The model.
        layer: The layer.
        image: ``(1,3,H,W)``, as the model wants it.
        rest: What the layer does not give ``(E,)``.
    """
    if model.batch_size is not None:
        return None  # which may be written out in the network above the layer
    traced = trace_vectors(model, image, (layer,)).trace
    output = traced.outputs[layer][0]
    count, rows = traced.embeddings.shape[1], []
    for start in range(0, count, _AT_ONCE):
        planes = torch.eye(count, device=output.device, dtype=traced.embeddings.dtype)
        planes = planes[start : start + _AT_ONCE].unsqueeze(1)
        try:
            (gradient,) = torch.autograd.grad(
                traced.embeddings, output, planes, retain_graph=True, is_grads_batched=True
            )
        except RuntimeError:  # an operator that takes one gradient at a time
            return None
        grid = at_least_single(traced.to_grid(layer, gradient.flatten(0, 1)))
        mean = grid.mean(dim=(2, 3))
        if bool((grid - mean[:, :, None, None]).abs().amax() > EXACT * grid.abs().amax()):
            return None
        rows.append(mean)
    return UniformTail(layer, torch.cat(rows), rest.detach())
