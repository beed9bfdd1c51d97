"""Distances of all pairs by the AVSL graph: which way to take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from simexplain.errors import ModelError
from simexplain.graph.expansion import Expansion
from simexplain.graph.inference import Graph, Rows, broadcast
from simexplain.graph.tiled import exact

BROADCAST_NUMBERS = 2**25
"""Numbers a tensor of broadcasting may have; 128 MiB in float32, and a dozen of them are live."""

WORTH_EXPANDING = 2**16
"""Pairs below which exact distances are had sooner than the coefficients of an expansion."""

EXPANSIONS = ((1, 1), (2, 2), (3, 4))
"""Degrees and ranks in the order they are tried, from the cheapest."""


@dataclass(frozen=True)
class DistancePlan:
    """How distances are to be computed.

    Attributes:
        method: ``broadcast`` (differentiable), ``exact`` or ``expansion``.
        error: Measured largest error relative to the mean distance, over sampled pairs; 0 for
            ``broadcast`` and ``exact``, which only round.
        degree: Of the expansion; 0 without one.
        rank: Of the expansion; 0 without one.
        tried: The errors of expansions that were not accurate enough, in turn.
        expansion: The expansion itself.
    """

    method: str
    error: float = 0.0
    degree: int = 0
    rank: int = 0
    tried: tuple[float, ...] = ()
    expansion: Expansion | None = None


def planned(
    graph: Graph, q: Rows, g: Rows | None = None, accuracy: float | None = None
) -> DistancePlan:
    """What :func:`distances` does with the same arguments.

    Args:
        graph: The graph.
        q: Queries, ``Q`` rows.
        g: Gallery, ``G`` rows; None for the queries themselves.
        accuracy: Largest error allowed, relative to the mean distance; None for none.

    Raises:
        ModelError: If the accuracy is not positive, or the rows do not fit the graph.
    """
    gallery = q if g is None else g
    if accuracy is None:
        wanted = torch.is_grad_enabled() and _requires_grad(graph, q, gallery)
        return DistancePlan("broadcast" if wanted else "exact")
    if not accuracy > 0:
        raise ModelError(
            f"Expected an accuracy above 0, got {accuracy}; give None for exact distances."
        )
    tried: list[float] = []
    if len(q) * len(gallery) >= WORTH_EXPANDING:
        for degree, rank in EXPANSIONS:
            expansion = Expansion.build(graph, q, g, degree, rank)
            if expansion.error <= accuracy:
                return DistancePlan(
                    "expansion", expansion.error, degree, rank, tuple(tried), expansion
                )
            tried.append(expansion.error)
    return DistancePlan("exact", tried=tuple(tried))


def distances(
    graph: Graph,
    q: Rows,
    g: Rows | None = None,
    *,
    accuracy: float | None = None,
    tile: int | None = None,
) -> Tensor:
    """Distances of all pairs.

    Without an accuracy: differentiable where gradients are enabled and any input requires them
    (large sets in parts that are computed again on the way back), else exact in tiles. With one:
    the cheapest expansion whose error on sampled pairs is no larger, exact distances if none is;
    outside of autograd. The pairs sampled are few among all, so that the largest error of all pairs
    is somewhat larger than the one measured, up to about twice.

    Args:
        graph: The graph.
        q: Queries, ``Q`` rows.
        g: Gallery, ``G`` rows; None for the queries themselves.
        accuracy: Largest error allowed, relative to the mean distance; None for none.
        tile: Pairs at a time where distances are exact; None for a choice by device.

    Returns:
        ``(Q,G)``, not negative.

    Raises:
        ModelError: If the accuracy is not positive, or the rows do not fit the graph.
    """
    plan = planned(graph, q, g, accuracy)
    if plan.expansion is not None:
        return plan.expansion.matrix()
    if plan.method == "exact":
        return exact(graph, q, g, tile=tile)
    return _differentiable(graph, q, q if g is None else g)


def _requires_grad(graph: Graph, q: Rows, g: Rows) -> bool:
    parts = [graph.edges, graph.slopes, graph.offsets]
    parts += [q.embeddings, q.certainties, g.embeddings, g.certainties]
    return any(tensor.requires_grad for part in parts for tensor in part)


def _differentiable(graph: Graph, q: Rows, g: Rows) -> Tensor:
    """By broadcasting; in parts whose intermediate values are not kept, where there are many."""
    like = q.embeddings[0]
    graph, g = graph.to(like), g.to(like)
    height = max(1, BROADCAST_NUMBERS // max(1, len(g) * max(graph.widths)))
    if height >= len(q):
        return broadcast(graph, q, g)
    parts = [
        checkpoint(
            broadcast, graph, q[top : top + height], g,
            use_reentrant=False, preserve_rng_state=False,
        )
        for top in range(0, len(q), height)
    ]  # fmt: skip
    return torch.cat(parts)
