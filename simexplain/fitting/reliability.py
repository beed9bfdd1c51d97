"""Alpha and beta of Eq. 6 for a frozen network: how far each node is to be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from simexplain.graph.inference import Graph, Rows, broadcast

_PAIRS = 4096
_CLASSES, _EACH = 24, 4
_TEMPERATURE = 16.0


@dataclass(frozen=True)
class Scale:
    """Where the products of two certainties of one level lie.

    Attributes:
        mean: Their mean over nodes and pairs.
        deviation: Their standard deviation.
    """

    mean: float
    deviation: float


def certainty_scales(rows: Rows, generator: torch.Generator) -> list[Scale]:
    """The scale of ``eta`` (Eq. 5) of every level but the lowest, over random pairs of images."""
    first, second = torch.randint(len(rows), (2, _PAIRS), generator=generator)
    scales = []
    for level in rows.certainties[1:]:
        eta = level[first.to(level.device)] * level[second.to(level.device)]
        scales.append(Scale(float(eta.mean()), float(eta.std().clamp_min(1e-12))))
    return scales


def slopes_and_offsets(
    scales: Sequence[Scale], steepness: Sequence[Tensor], shift: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Eq. 6 written for standardised ``eta``: ``p = sigmoid(steepness * z + shift)``.

    Raw ``eta`` spans about a thousandth, so alpha would have to grow to hundreds to matter. In
    units of its own spread one learning rate fits every level.
    """
    parts = list(zip(scales, steepness, shift, strict=True))
    slopes = tuple(a / s.deviation for s, a, _ in parts)
    offsets = tuple(b - a * s.mean / s.deviation for s, a, b in parts)
    return slopes, offsets


def trained_reliability(
    graph: Graph,
    rows: Rows,
    labels: Tensor,
    scales: Sequence[Scale],
    *,
    steps: int,
    generator: torch.Generator,
    learning_rate: float = 0.03,
) -> Graph:
    """Learns alpha and beta alone, from the overall distance, as in Eq. 10.

    Alpha is kept from becoming negative, which the paper leaves open: reliable shall mean focused.
    Left free, half of a top level's nodes turned it round without finding more images.

    Args:
        graph: Edges, and offsets that are infinite for nodes which stay their own.
        rows: Of all images.
        labels: Class numbers ``(M,)``.
        scales: From :func:`certainty_scales`.
        steps: Batches of some images of each of some classes.
        generator: The only source of chance.
        learning_rate: Of Adam.

    Returns:
        The graph with what was learned.
    """
    if not graph.slopes:  # one level: nothing stands in, nothing to learn
        return graph
    always = [torch.isinf(offset) for offset in graph.offsets]
    steepness = [torch.ones_like(part, requires_grad=True) for part in graph.slopes]
    shift = [torch.zeros_like(part, requires_grad=True) for part in graph.slopes]
    optimiser = torch.optim.Adam([*steepness, *shift], lr=learning_rate)

    def current() -> Graph:
        slopes, offsets = slopes_and_offsets(scales, steepness, shift)
        infinite = zip(offsets, always, strict=True)
        kept = tuple(part.masked_fill(own, torch.inf) for part, own in infinite)
        return replace(graph, slopes=slopes, offsets=kept)

    with torch.enable_grad():
        for _ in range(steps):
            chosen = _balanced(labels.cpu(), generator).to(labels.device)
            part = rows[chosen]
            loss = _same_class_nearer(broadcast(current(), part, part), labels[chosen])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            with torch.no_grad():
                for learned in steepness:
                    learned.clamp_(min=0.0)
    return current().detached()


def _same_class_nearer(distance: Tensor, labels: Tensor) -> Tensor:
    """The probability that a neighbour drawn by distance has the same class, as a loss."""
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    same = (labels[:, None] == labels[None]) & ~own
    scores = (-_TEMPERATURE / 2 * distance).masked_fill(own, -torch.inf)
    drawn = F.log_softmax(scores, dim=1).masked_fill(~same, -torch.inf)
    return -torch.logsumexp(drawn[same.any(dim=1)], dim=1).mean()


def _balanced(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A few images of each of a few classes that have at least two."""
    classes, counts = torch.unique(labels, return_counts=True)
    usable = classes[counts > 1]
    drawn = usable[torch.randperm(len(usable), generator=generator)[:_CLASSES]]
    if len(usable) == 1:  # single pictures of other classes are all there is to tell it from
        single = classes[counts == 1]
        order = torch.randperm(len(single), generator=generator)[: _CLASSES - 1]
        drawn = torch.cat((drawn, single[order]))
    picked = []
    for label in drawn:
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)[:_EACH]
        picked.append(members[order])
    return torch.cat(picked)
