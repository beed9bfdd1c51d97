"""Class-activation-map formulas: activations and their gradients in, one map per image out.

Each takes ``activations`` and ``gradients`` of shape ``(M,C,h,w)`` and returns ``(M,h,w)`` before
the final ReLU, which the caller applies unless it wants the sign. All are differentiable.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Cam = Callable[[Tensor, Tensor], Tensor]


def channel_weights(gradients: Tensor) -> Tensor:
    """The alpha of Eq. 2: gradients averaged over all positions, ``(M,C)``."""
    return gradients.mean(dim=(2, 3))


def weighted(weights: Tensor, activations: Tensor) -> Tensor:
    """Channels ``(M,C,h,w)`` times weights ``(M,C)``, summed to ``(M,h,w)``.

    Not a matrix product, whose rounding depends on how many images it is taken over.
    """
    return (weights[:, :, None, None] * activations).sum(dim=1)


def grad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017; Eq. 2 of similarity attention): sum_k alpha_k A_k."""
    return weighted(channel_weights(gradients), activations)


def hires_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """The variant without global average pooling (HiResCAM, Draelos and Carin 2020).

    Gradient times activation at every position, summed over channels; exact for a linear tail.
    """
    return (gradients * activations).sum(dim=1)


def layer_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """LayerCAM (Jiang et al. 2021): only positive gradients count, position by position."""
    return (gradients.relu() * activations).sum(dim=1)


def grad_cam_plus_plus(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM++ (Chattopadhay et al. 2018), with the published closed form for its alphas.

    ``alpha = g^2 / (2 g^2 + sum(A) g^3)`` and weights ``sum alpha relu(g)``; where ``g`` or the
    denominator vanishes the alpha is zero. Unlike the others it changes shape with the scale of
    the score.
    """
    total = activations.sum(dim=(2, 3), keepdim=True)
    # g^2 cancelled in numerator and denominator, since the squares of small gradients underflow.
    denominator = 2 + total * gradients
    usable = (gradients != 0) & (denominator.abs() > 1e-12)
    alpha = torch.where(usable, 1 / torch.where(usable, denominator, 1.0), 0.0)
    weights = (alpha * gradients.relu()).sum(dim=(2, 3))
    return weighted(weights, activations)


CAMS: dict[str, Cam] = {
    "grad_cam": grad_cam,
    "hires_cam": hires_cam,
    "layer_cam": layer_cam,
    "grad_cam_plus_plus": grad_cam_plus_plus,
}
"""Every formula by name; a new one is one function and one line here."""
