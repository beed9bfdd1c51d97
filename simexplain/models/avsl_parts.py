"""What an AVSL model is put together from: its levels, its heads, the graph of its options."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from simexplain.errors import ModelError
from simexplain.graph.inference import Graph, normalised_edges
from simexplain.models.avsl_options import AVSLOptions
from simexplain.models.base import SimilarityModel
from simexplain.models.layers import Layer

LEVELS = 3
"""How many levels are taken where none are named: those of the paper's ResNet-50."""


def found_levels(
    base: SimilarityModel, levels: Sequence[str] | None, size: tuple[int, int] | None = None
) -> list[Layer]:
    """The layers of the levels in order of execution, for images of a size or the model's own.

    Raises:
        ModelError: If a level is unknown or named twice, or there is none.
    """
    layers = base.layers_for(base.example(size))
    wanted = [layer.name for layer in layers if layer.stage][-LEVELS:]
    wanted = wanted if levels is None else list(levels)
    known = [layer.name for layer in layers]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted or len(set(wanted)) < len(wanted):
        what = f"'{unknown[0]}'" if unknown else f"{wanted}"
        raise ModelError(
            f"Expected different layers of {base.name} as levels, got {what}; "
            "`simexplain layers` lists them."
        )
    return [layer for layer in layers if layer.name in wanted]


def checked_widths(nodes: int | Sequence[int], levels: int) -> tuple[int, ...]:
    """The nodes of each level.

    Raises:
        ModelError: If there are not as many as levels, or a level has none.
    """
    widths = (nodes,) * levels if isinstance(nodes, int) else tuple(nodes)
    if len(widths) != levels or any(width < 1 for width in widths):
        raise ModelError(
            f"Expected a number of nodes, one for all or for each of {levels} levels, got {nodes}."
        )
    return widths


def new_head(channels: int, width: int, *, bias: bool) -> nn.Linear:
    """A head as it is before training."""
    head = nn.Linear(channels, width, bias=bias)
    nn.init.kaiming_normal_(head.weight, mode="fan_out")
    if bias:
        nn.init.zeros_(head.bias)
    return head


def shared_graph(
    options: AVSLOptions,
    correlations: Sequence[Tensor],
    alphas: Iterable[Tensor],
    betas: Iterable[Tensor],
    scales: Sequence[Tensor],
    bottom: int,
) -> Graph:
    """The graph of all pairs, whichever way the options infer a distance.

    Args:
        options: Of the model.
        correlations: Eq. 4 between adjacent levels, each ``(r_low,r_high)``.
        alphas: Of every level but the lowest ``(r,)``.
        betas: Likewise.
        scales: Likewise ``(2,)``: what is subtracted from ``eta``, and what it is divided by.
        bottom: Nodes of the lowest level.
    """
    if options.inference in ("top", "levels"):
        return _fixed_graph(correlations, bottom, mean=options.inference == "levels")
    edges = tuple(_edges(options, part) for part in correlations)
    slopes, offsets = [], []
    for part, alpha, beta, scale in zip(edges, alphas, betas, scales, strict=True):
        centre, spread = scale
        slope: Tensor = options.scale * alpha / spread
        offset: Tensor = options.scale * beta - slope * centre
        if options.orphans == "keep" and options.inference == "full":
            always = torch.full_like(offset, torch.inf)
            offset = torch.where(part.sum(dim=0) > 0, offset, always)
        slopes.append(slope)
        offsets.append(offset)
    return Graph(edges, tuple(slopes), tuple(offsets), bottom)


def _edges(options: AVSLOptions, correlations: Tensor) -> Tensor:
    if options.inference == "reliable":
        return torch.zeros_like(correlations)
    return normalised_edges(correlations, options.k, ties=options.ties, epsilon=options.epsilon)


def _fixed_graph(correlations: Sequence[Tensor], bottom: int, *, mean: bool) -> Graph:
    """The top level alone, or the mean of all levels, as a graph with constant reliabilities.

    For the mean every lower node spreads evenly over the nodes above, and the ``l``-th level from
    below has reliability ``1/l``: what comes up is the mean of all levels below.
    """
    edges, slopes, offsets = [], [], []
    for level, part in enumerate(correlations, start=2):
        edges.append(torch.full_like(part, 1 / part.shape[1] if mean else 0.0))
        slopes.append(part.new_zeros(part.shape[1]))
        odds = -math.log(level - 1) if mean else math.inf  # of 1/l
        offsets.append(part.new_full((part.shape[1],), odds))
    return Graph(tuple(edges), tuple(slopes), tuple(offsets), bottom)


def eta_moments(certainties: Tensor) -> Tensor:
    """Means over images of the certainties ``(M,r)`` and of their squares, ``(2,r)``."""
    return torch.stack((certainties.mean(dim=0), certainties.square().mean(dim=0)))


def eta_scale(moments: Tensor) -> Tensor:
    """Mean and standard deviation of ``eta`` (Eq. 5) over all nodes and pairs of images, ``(2,)``.

    The mean over pairs of a product is the product of the means, so no pair is formed; an image
    counts as a pair with itself too.

    Args:
        moments: From :func:`eta_moments`, averaged over processes where there are several.
    """
    mean, square = moments.square().mean(dim=1)
    return torch.stack((mean, (square - mean.square()).clamp_min(0).sqrt().clamp_min(1e-12)))
