"""From feature maps to the parts of the AVSL graph: CAMs, certainties, edges (section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

POOLINGS = ("avg", "max", "avg+max")
"""Global pooling before a head: the text has "global pooling", the published code adds both."""


def linearised(features: Tensor, pooling: str) -> Tensor:
    """Features ``(M,C,h,w)`` whose mean over all positions is the pooled feature.

    Average pooling leaves them as they are. Max pooling is linear once it is known where each
    channel has its maximum: that position carries the maximum ``h*w`` times over, all others
    nothing. A head applied to these maps therefore gives CAMs whose mean is the embedding.
    """
    if pooling == "avg":
        return features
    flat = features.flatten(2)
    top, index = flat.max(dim=2, keepdim=True)
    peaks = torch.zeros_like(flat).scatter(2, index, top * flat.shape[2]).view_as(features)
    return peaks if pooling == "max" else features + peaks


def pooled(features: Tensor, pooling: str) -> Tensor:
    """Global pooling ``(M,C,h,w) -> (M,C)``, cheaper than the mean of :func:`linearised`."""
    average, peak = (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)
    parts = [
        pool(features, 1) for pool, used in ((average, "avg"), (peak, "max")) if used in pooling
    ]
    return sum(parts[1:], parts[0]).flatten(1)


def node_cams(features: Tensor, weight: Tensor, bias: Tensor | None, pooling: str) -> Tensor:
    """The CAM of every node (Eq. 2), with the head's bias at every position.

    Args:
        features: ``(M,C,h,w)``.
        weight: The linear head ``(r,C)``.
        bias: ``(r,)`` or None.
        pooling: A name in :data:`POOLINGS`.

    Returns:
        ``(M,r,h,w)``, signed; the mean over positions is the embedding before normalisation.
    """
    return F.conv2d(linearised(features, pooling), weight[:, :, None, None], bias)


def directed_cams(
    features: Tensor, weight: Tensor, bias: Tensor | None, pulls: Tensor, pooling: str
) -> Tensor:
    """How much each position adds to ``pull . f``, where ``f`` is the unit embedding of a level.

    The embedding is the mean of the node CAMs over all positions, scaled to unit length, so for
    every direction ``pull`` its product with it is a sum over positions.

    Args:
        features: ``(M,C,h,w)``.
        weight: The linear head ``(r,C)``.
        bias: ``(r,)`` or None.
        pulls: A direction for each image ``(M,r)``.
        pooling: A name in :data:`POOLINGS`.

    Returns:
        ``(M,h,w)``, signed; the sum over positions is ``pull . f``.
    """
    means = F.linear(pooled(features, pooling), weight, bias)
    steps = pulls / means.norm(dim=1, keepdim=True).clamp_min(1e-12)
    cams = torch.einsum("mc,mchw->mhw", steps @ weight, linearised(features, pooling))
    if bias is not None:
        cams = cams + (steps @ bias)[:, None, None]
    return cams / cams[0].numel()


def _spread(values: Tensor) -> Tensor:
    """The sample standard deviation over the last axis; 0 for a single position."""
    if values.shape[-1] < 2:
        return torch.zeros_like(values[..., 0])
    return values.std(dim=-1)


def _l2(cams: Tensor) -> Tensor:
    return _spread(F.normalize(cams.flatten(2), p=2.0, dim=2))


def _map_min_l1(cams: Tensor) -> Tensor:
    flat = cams.flatten(2)
    return _spread(F.normalize(flat - flat.amin(dim=2, keepdim=True), p=1.0, dim=2))


def _row_min_l1(cams: Tensor) -> Tensor:
    return _spread(F.normalize((cams - cams.amin(dim=3, keepdim=True)).flatten(2), p=1.0, dim=2))


CERTAINTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": _l2,
    "map_min_l1": _map_min_l1,
    "row_min_l1": _row_min_l1,
}
"""How focused each CAM ``(M,r,h,w)`` is, ``(M,r)``: the standard deviation in Eq. 5.

They differ in what "normalised CAM" means. ``l2``: unit length, as in Eq. 3 (the text).
``map_min_l1``: minus its own minimum, then sum one. ``row_min_l1``: minus the minimum of each of
its rows, then sum one (the published code, where that is marked as to be fixed).
"""


def overlap(low: Tensor, high: Tensor) -> Tensor:
    """Edges of one batch: the mean inner product of normalised CAMs (Eq. 3).

    Args:
        low: CAMs ``(M,r_low,h,w)`` of the lower level.
        high: CAMs ``(M,r_high,h',w')`` of the level above. Both are averaged down to the
            smaller of the two grids.

    Returns:
        ``(r_low,r_high)`` in [-1, 1].
    """
    size = (min(low.shape[2], high.shape[2]), min(low.shape[3], high.shape[3]))
    low, high = (F.adaptive_avg_pool2d(cams, size) for cams in (low, high))
    low, high = (F.normalize(cams.flatten(2), dim=2) for cams in (low, high))
    # One matrix product over images and positions together; no (M, r, r) tensor.
    both = low.transpose(0, 1).flatten(1) @ high.transpose(0, 1).flatten(1).T
    return both / len(low)


def pack(embeddings: Sequence[Tensor], certainties: Sequence[Tensor]) -> Tensor:
    """Levels and certainties as one row per image ``(M, 2 * sum of r)``.

    Args:
        embeddings: Per level ``(M,r)``, not normalised; each becomes a unit row.
        certainties: Per level ``(M,r)``.
    """
    units = [F.normalize(level, dim=1) for level in embeddings]
    return torch.cat((*units, *certainties), dim=1)
