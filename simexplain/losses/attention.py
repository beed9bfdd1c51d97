"""Attention maps inside a training step: differentiable, from the pass that was made anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain.arguments import typed
from simexplain.errors import ComparisonError
from simexplain.losses.objective import Batch, unit_embeddings
from simexplain.methods.cams import at_grid, fuse, layer_cams, unit_scaled
from simexplain.networks import unit_rows
from simexplain.tracing import Trace

_TOLERANCE = 1e-4


def linear_maps(
    activations: Tensor, head: nn.Linear | None, embeddings: Tensor, weights: Tensor
) -> Tensor | None:
    """Grad-CAM maps (Eq. 2) in closed form, where average pooling and a linear head end the net.

    For ``e = W mean(A) + b``, ``f = e / |e|`` and the score ``w . f`` the gradient with respect to
    every position of ``A`` is ``W^T (w - (w . f) f) / (|e| h w)``, so no backward pass is needed.

    Args:
        activations: ``(M,C,h,w)`` of the last layer, in the graph.
        head: The linear layer behind the pooling, or None where the pooled vector is the embedding.
        embeddings: Unit rows ``(M,E)`` of the same images: the closed form is only right if it
            gives these.
        weights: ``(M,E)``, constant.

    Returns:
        Maps ``(M,h,w)`` before the ReLU, differentiable; None where the network ends otherwise.
    """
    pooled = activations.mean(dim=(2, 3))
    if head is not None and head.in_features != pooled.shape[1]:
        return None
    vectors = pooled if head is None else head(pooled)
    if vectors.shape != embeddings.shape:
        return None
    sizes = vectors.norm(dim=1, keepdim=True)
    rows = unit_rows(vectors)
    same = torch.allclose(rows.detach().float(), embeddings.detach().float(), atol=_TOLERANCE)
    if not same or not bool((sizes.detach() > 0).all()):
        return None
    slopes = (weights - (weights * rows).sum(dim=1, keepdim=True) * rows) / sizes
    alphas = slopes if head is None else slopes @ head.weight
    return torch.einsum("mc,mchw->mhw", alphas, activations) / activations.shape[2:].numel()


def last_linear(network: nn.Module) -> nn.Linear | None:
    """The linear layer that a network lists last, if it has any."""
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear else None


def attention_maps(
    traced: Trace,
    rows: Tensor,
    network: nn.Module,
    layers: Sequence[str],
    which: Tensor,
    weights: Tensor,
    cam: str | None = None,
) -> Tensor:
    """The maps of some images of a pass for a score ``w . f`` each, non-negative (Eq. 2).

    Several layers give one map, as in ``explain``: those of the layers multiplied, each scaled to
    one.

    Args:
        traced: The pass, opened at the layers.
        rows: Unit rows of its images ``(M,E)``, in the graph.
        network: Where the linear head is looked for.
        layers: Their names.
        which: Places of the images in the pass ``(m,)``, each at most once.
        weights: The weight vector of each ``(m,E)``, held constant.
        cam: The formula at all layers, a key of ``CAMS``; None for Grad-CAM at the coarsest and
            LayerCAM at the finer ones. Only Grad-CAM at one layer has a closed form.

    Returns:
        ``(m,h,w)``, differentiable with respect to everything below the layers and to the head.
    """
    activations, weights = traced.maps, weights.detach()
    closed = len(layers) == 1 and cam in (None, "grad_cam")
    for head in _candidates(network) if closed else ():
        attention = linear_maps(activations[layers[0]][which], head, rows[which], weights)
        if attention is not None:
            return attention.relu()
    through = torch.is_grad_enabled()
    with torch.enable_grad():  # the score needs a graph even where the maps shall have none
        score = (rows[which] * weights).sum()
    gradients = traced.gradients(score, create_graph=through)
    maps = layer_cams(
        {layer: activations[layer][which] for layer in layers},
        {layer: gradients[layer][which] for layer in layers},
        cam,
        scale=weights.new_ones(len(which)),
        keep_negative=False,
    )
    return fuse(list(maps.values()))


def _candidates(network: nn.Module) -> Sequence[nn.Linear | None]:
    last = last_linear(network)
    return (None,) if last is None else (last, None)


def scaled_images(images: Tensor, scale: float) -> Tensor:
    """Images at another size, antialiased; the same where the scale is one."""
    if scale == 1:
        return images
    height, width = (max(1, round(scale * int(side))) for side in images.shape[2:])
    return F.interpolate(
        images, size=(height, width), mode="bilinear", align_corners=False, antialias=True
    )


def attention_mask(
    maps: Tensor, size: tuple[int, int], *, alpha: float = 10.0, beta: float = 0.5
) -> Tensor:
    """``sigmoid(alpha * (M - beta))`` of maps brought to the images' size, in (0, 1).

    Maps are upsampled bilinearly and divided by their maximum; a map that is zero everywhere
    stays zero, which hides next to nothing.

    Args:
        maps: ``(M,h,w)``, non-negative.
        size: ``(H,W)`` of the images.
        alpha: Steepness.
        beta: The share of the maximum at which a pixel is half hidden.

    Returns:
        ``(M,H,W)``, differentiable in the maps.
    """
    scaled = unit_scaled(at_grid(maps, size))
    return (alpha * (scaled - beta)).sigmoid()


@typed
def soft_mask(
    images: Tensor,
    maps: Tensor,
    *,
    alpha: float = 10.0,
    beta: float = 0.5,
    ground: Tensor | None = None,
) -> Tensor:
    """Images without the pixels of high attention: ``x * (1 - sigmoid(alpha * (M - beta)))``.

    On preprocessed images a hidden pixel takes the data set's mean colour, which is zero there.

    Args:
        images: ``(M,3,H,W)``.
        maps: ``(M,h,w)``, non-negative; any scale.
        alpha: See :func:`attention_mask`.
        beta: Likewise.
        ground: What shows where an image is hidden, in place of zeros; broadcasts to ``images``.

    Returns:
        ``(M,3,H,W)``, differentiable in both.

    Raises:
        ComparisonError: If there is not one map for each image.
    """
    if maps.dim() != 3 or images.dim() != 4 or len(maps) != len(images):
        raise ComparisonError(
            f"Expected images (M,3,H,W) and as many maps (M,h,w), got {tuple(images.shape)} and "
            f"{tuple(maps.shape)}."
        )
    size = int(images.shape[2]), int(images.shape[3])
    mask = attention_mask(maps, size, alpha=alpha, beta=beta).unsqueeze(1)
    shown = images * (1 - mask)
    return shown if ground is None else shown + ground * mask


@dataclass(frozen=True)
class Own:
    """Which of the images of all comparisons are this process's own.

    Attributes:
        which: Places of its own images in its pass ``(m,)``.
        order: Places of the same images among those of all comparisons ``(m,)``.
        orders: The same of every process, in the order of ranks.
    """

    which: Tensor
    order: Tensor
    orders: tuple[Tensor, ...]

    @classmethod
    def of(cls, batch: Batch, places: Tensor) -> Own:
        """Divides the images of all comparisons ``(T*K,)`` by the process that has them."""
        each = len(batch.images)
        orders = tuple(
            ((places >= rank * each) & (places < (rank + 1) * each)).nonzero().flatten()
            for rank in range(batch.processes.world)
        )
        order = orders[batch.processes.rank]
        return cls(places[order] - batch.start, order, orders)

    def together(self, batch: Batch, rows: Tensor) -> Tensor:
        """Rows of this process's images ``(m,E)`` as those of all comparisons ``(T*K,E)``."""
        gathered = batch.processes.gathered(rows, [len(order) for order in self.orders])
        return gathered[torch.cat(self.orders).argsort()]


def own_maps(
    batch: Batch, own: Own, weights: Tensor, layers: Sequence[str], cam: str | None = None
) -> Tensor:
    """The maps ``(m,h,w)`` of this process's own images for scores ``w . f``, non-negative.

    Args:
        batch: The pass, opened at the layers.
        own: Which images are meant.
        weights: The weight vector of each image of all comparisons ``(T*K,E)``, held constant.
        layers: The layers of the maps.
        cam: Their formula, as in :func:`~simexplain.losses.attention.attention_maps`.
    """
    if not len(own.which):  # the other processes have all images of this step's comparisons
        return batch.traced.maps[layers[0]][own.which].sum(dim=1)
    rows = unit_embeddings(batch.model, batch.traced.embeddings)
    network = batch.model.network
    return attention_maps(batch.traced, rows, network, layers, own.which, weights[own.order], cam)
