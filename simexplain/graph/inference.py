"""The AVSL graph on plain tensors: CAMs, certainties and edges, and the inference of pairs.

Sections 3.2 and 3.3 of the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from simexplain.errors import ModelError

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


def _spread_without(cams: Tensor, low: Tensor) -> Tensor:
    return _spread(F.normalize((cams - low).flatten(2), p=1.0, dim=2))


CERTAINTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda cams: _spread(F.normalize(cams.flatten(2), p=2.0, dim=2)),
    "map_min_l1": lambda cams: _spread_without(cams, cams.amin(dim=(2, 3), keepdim=True)),
    "row_min_l1": lambda cams: _spread_without(cams, cams.amin(dim=3, keepdim=True)),
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


@dataclass(frozen=True)
class Rows:
    """What is known of ``M`` images, level by level from the lowest.

    Attributes:
        embeddings: Per level ``(M,r)``, unit rows.
        certainties: Per level ``(M,r)``, how focused each node's CAM is.
    """

    embeddings: tuple[Tensor, ...]
    certainties: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.embeddings[0])

    def __getitem__(self, which: slice | Tensor) -> Rows:
        """The same for some of the images."""
        return self.each(lambda level: level[which])

    def to(self, like: Tensor) -> Rows:
        """The same in the type and on the device of a tensor."""
        return self.each(lambda level: level.to(like))

    def each(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """The same with every tensor changed."""
        return Rows(
            tuple(change(level) for level in self.embeddings),
            tuple(change(level) for level in self.certainties),
        )


def unpack(packed: Tensor, widths: Sequence[int]) -> Rows:
    """The counterpart of ``pack``.

    Raises:
        ModelError: If the rows are not of this model's width.
    """
    if packed.dim() != 2 or packed.shape[1] != 2 * sum(widths):
        raise ModelError(
            f"Expected embeddings of shape (M, {2 * sum(widths)}) from this AVSL model, got "
            f"{tuple(packed.shape)}; embed the images with the same model."
        )
    parts = torch.split(packed, [*widths, *widths], dim=1)
    return Rows(parts[: len(widths)], parts[len(widths) :])


@dataclass(frozen=True)
class Graph:
    """The part of the AVSL graph that all pairs share.

    Attributes:
        edges: For each pair of adjacent levels the normalised edges ``(r_low,r_high)``,
            non-negative; a column sums to one, or to zero where a node has no edge.
        slopes: For each level but the lowest ``(r,)``: what multiplies both certainties in Eq. 6.
        offsets: Likewise what is added; infinite for nodes that are always their own.
        bottom: Nodes of the lowest level.
    """

    edges: tuple[Tensor, ...]
    slopes: tuple[Tensor, ...]
    offsets: tuple[Tensor, ...]
    bottom: int

    @property
    def widths(self) -> tuple[int, ...]:
        """Nodes of each level, from the lowest."""
        return (self.bottom, *(edges.shape[1] for edges in self.edges))

    def to(self, like: Tensor) -> Graph:
        """The same in the type and on the device of a tensor."""
        return self._each(lambda part: part.to(like))

    def detached(self) -> Graph:
        """The same without an autograd graph."""
        return self._each(Tensor.detach)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Graph:
        edges, slopes, offsets = (
            tuple(map(change, parts)) for parts in (self.edges, self.slopes, self.offsets)
        )
        return replace(self, edges=edges, slopes=slopes, offsets=offsets)

    def reliability(self, level: int, q: Tensor, g: Tensor) -> Tensor:
        """``p`` in (0, 1] of Eq. 5 and 6 from two certainties of any shapes that broadcast.

        The lowest level has nothing below it that could stand in, so there ``p`` is 1.
        """
        if level == 0:
            return torch.ones_like(q * g)
        return torch.sigmoid(self.slopes[level - 1] * (q * g) + self.offsets[level - 1])


def normalised_edges(edges: Tensor, k: int, *, ties: str, epsilon: float) -> Tensor:
    """The ``k`` strongest positive edges of each higher node, scaled to sum one (Eq. 7, 8).

    Args:
        edges: ``(r_low,r_high)``, of any sign; negative ones count as none.
        k: How many lower nodes may stand in for a higher one.
        ties: ``first`` keeps exactly ``k``; ``all`` keeps every edge within 1e-8 of the k-th.
        epsilon: Added to each sum. With 0 a column sums to exactly one.

    Returns:
        ``(r_low,r_high)``; a column without a positive edge stays zero.
    """
    positive = edges.relu()
    k = min(k, len(edges))
    if ties == "all":
        kept = positive >= positive.topk(k, dim=0).values[-1:] - 1e-8
    else:
        order = positive.argsort(dim=0, descending=True, stable=True)
        kept = torch.zeros_like(positive, dtype=torch.bool).scatter(0, order[:k], True)
    chosen = positive * kept
    total = chosen.sum(dim=0, keepdim=True) + epsilon
    return chosen / torch.where(total > 0, total, torch.ones_like(total))


@dataclass(frozen=True)
class PairGraph:
    """The graph of pairs; every list runs from the lowest level, every tensor is ``(*S,r)``.

    Attributes:
        nodes: ``delta`` of Eq. 1, squared differences of unit embeddings.
        reliabilities: ``p`` of Eq. 6; 1 at the lowest level.
        rectified: ``delta hat`` of Eq. 8.
        inflows: What weight the rectified node has in the distance; 1 at the top.
        sensitivities: ``lambda`` of Eq. 11, the derivative of the distance by ``delta``.
    """

    nodes: tuple[Tensor, ...]
    reliabilities: tuple[Tensor, ...]
    rectified: tuple[Tensor, ...]
    inflows: tuple[Tensor, ...]
    sensitivities: tuple[Tensor, ...]

    @property
    def distance(self) -> Tensor:
        """The overall distance ``(*S)``: the sum of the rectified nodes at the top."""
        return self.rectified[-1].sum(dim=-1)

    @property
    def contributions(self) -> tuple[Tensor, ...]:
        """``lambda * delta`` per level, ``(*S,r)``; all together they are the distance."""
        return tuple(s * d for s, d in zip(self.sensitivities, self.nodes, strict=True))


def infer(graph: Graph, q: Rows, g: Rows) -> PairGraph:
    """Infers pairs ``(q[i], g[i])``; rows of shapes ``(*S,r)`` that broadcast serve as well.

    Differentiable in every input. For many pairs take the functions for all pairs: this one keeps
    every intermediate value.
    """
    levels = range(len(graph.widths))
    nodes = tuple((q.embeddings[n] - g.embeddings[n]).square() for n in levels)
    sure = tuple(graph.reliability(n, q.certainties[n], g.certainties[n]) for n in levels)
    rectified = [nodes[0]]
    for level in levels[1:]:
        lower = rectified[-1] @ graph.edges[level - 1]
        rectified.append(sure[level] * nodes[level] + (1 - sure[level]) * lower)
    inflows = [torch.ones_like(nodes[-1])]
    for level in reversed(levels[1:]):
        inflows.append((inflows[-1] * (1 - sure[level])) @ graph.edges[level - 1].T)
    inflows.reverse()
    sensitivities = tuple(flow * p for flow, p in zip(inflows, sure, strict=True))
    return PairGraph(nodes, sure, tuple(rectified), tuple(inflows), sensitivities)


def broadcast(graph: Graph, q: Rows, g: Rows) -> Tensor:
    """Distances ``(Q,G)`` by plain broadcasting, differentiable in every input.

    Needs several tensors of ``Q * G * r`` numbers: for training batches, and as the reference.
    """
    rows, columns = q.each(lambda one: one.unsqueeze(1)), g.each(lambda one: one.unsqueeze(0))
    return infer(graph, rows, columns).distance
