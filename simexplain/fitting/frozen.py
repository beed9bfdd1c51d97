"""What is learned over a frozen network: its features, heads on them, certainties of nodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from simexplain.data.folders import Batches, StageProgress
from simexplain.errors import ModelError
from simexplain.graph.inference import Graph, Rows, broadcast
from simexplain.models.base import SimilarityModel
from simexplain.networks import at_least_single, preserve_state, unit_rows
from simexplain.tracing import trace


def check_numbers(options: Any, *positive: str) -> None:
    """Raises a ModelError unless these options are at least 1 and the seed fits a generator."""
    for name in positive:
        if not getattr(options, name) >= 1:
            raise ModelError(f"Expected {name} of at least 1, got {getattr(options, name)}.")
    if not -(2**63) <= options.seed < 2**63:
        raise ModelError(f"Expected a seed of at most 63 bits, got {options.seed}.")


def silent(what: str, done: int, total: int) -> None:
    """No progress shown."""


class FeaturePasses:
    """Passes over the feature maps of some levels of a frozen network.

    The first pass keeps the maps while they fit into ``budget`` bytes; later passes run the network
    again only for the rest. The network is left as it was: no gradients, no modes, no statistics.
    """

    def __init__(
        self,
        model: SimilarityModel,
        batches: Batches,
        levels: Sequence[str],
        *,
        budget: int,
        progress: StageProgress,
    ) -> None:
        self.model, self.batches, self.levels = model, batches, tuple(levels)
        self.progress = progress
        self._budget = budget
        self._kept: list[tuple[list[int], list[Tensor]]] = []
        self._complete = False

    def __call__(self, what: str) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Yields the places of the pictures and their maps ``(M,C,h,w)`` level by level."""
        total = len(self.batches.records)
        done = 0
        for places, maps in self._maps():
            yield places, maps
            done += len(places)
            self.progress(what, done, total)

    def _maps(self) -> Iterator[tuple[list[int], list[Tensor]]]:
        kept = {index for places, _ in self._kept for index in places}
        yield from list(self._kept)
        if self._complete:
            return
        filling = not kept
        rest = [n for n in range(len(self.batches.records)) if n not in kept]
        for places, images in self.batches.over(rest):
            maps = self._run(images)
            size = sum(level.numel() * level.element_size() for level in maps)
            if filling and size <= self._budget:
                self._budget -= size
                self._kept.append((places, maps))
            else:
                filling = False
            yield places, maps
        self._complete = filling

    def _run(self, images: Tensor) -> list[Tensor]:
        with torch.no_grad(), preserve_state(self.model.network):
            maps = trace(self.model, images, self.levels, differentiable=True).maps.values()
        return [at_least_single(level) for level in maps]


_TEMPERATURE = 16.0
_BATCH = 512
_LEAST_STEPS = 200


@dataclass(frozen=True)
class Head:
    """A linear head.

    Attributes:
        weight: ``(r,C)``.
        bias: ``(r,)`` or None.
    """

    weight: Tensor
    bias: Tensor | None


def pca_head(vectors: Tensor, width: int) -> Head:
    """The ``width`` directions in which pooled features ``(M,C)`` vary most, centred.

    Fewer where the features have fewer: nodes that never differ would explain nothing.
    """
    exact = vectors.double()
    mean = exact.mean(dim=0)
    _, strength, directions = torch.linalg.svd(exact - mean, full_matrices=False)
    rank = int((strength > strength[0] * 1e-6).sum()) if len(strength) else 0
    weight = directions[: max(1, min(width, rank))].to(vectors)
    return Head(weight, -(weight @ mean.to(vectors)))


def trained_head(
    vectors: Tensor,
    labels: Tensor,
    width: int,
    *,
    bias: bool,
    epochs: int,
    generator: torch.Generator,
    learning_rate: float = 3e-3,
) -> Head:
    """A head that draws classes together: cross-entropy over cosines with learned proxies.

    Args:
        vectors: Pooled features ``(M,C)``.
        labels: Class numbers ``(M,)``.
        width: ``r``.
        bias: Whether the head has one.
        epochs: Passes over the vectors in batches of 512; at least 200 batches.
        generator: The only source of chance.
        learning_rate: Of Adam, falling to zero along a cosine.
    """
    scale = vectors.std().clamp_min(1e-12)
    inputs = vectors / scale
    classes = int(labels.max()) + 1
    weight = _start(inputs, width, generator).requires_grad_()
    offset = torch.zeros(width, device=vectors.device, requires_grad=bias)
    proxies = _class_means(inputs @ weight.detach().T, labels, classes).requires_grad_()
    learned = [weight, proxies, *([offset] if bias else [])]
    optimiser = torch.optim.Adam(learned, lr=learning_rate)
    steps = max(_LEAST_STEPS, epochs * -(-len(inputs) // _BATCH))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    with torch.enable_grad():
        for _ in range(steps):
            chosen = torch.randint(len(inputs), (_BATCH,), generator=generator)
            chosen = chosen.to(labels.device)
            rows = unit_rows(inputs[chosen] @ weight.T + offset)
            cosines = rows @ unit_rows(proxies).T
            loss = F.cross_entropy(_TEMPERATURE * cosines, labels[chosen])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
    return Head((weight / scale).detach(), offset.detach() if bias else None)


def _start(inputs: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """The principal directions, then random mixtures of them where more are needed."""
    first = pca_head(inputs, width).weight
    if len(first) == width:
        return first.clone()
    mixture = torch.randn((width - len(first), len(first)), generator=generator)
    mixture = (mixture / len(first) ** 0.5).to(first)
    return torch.cat((first, mixture @ first))


def _class_means(rows: Tensor, labels: Tensor, classes: int) -> Tensor:
    sums = torch.zeros((classes, rows.shape[1]), device=rows.device, dtype=rows.dtype)
    return unit_rows(sums.index_add(0, labels, unit_rows(rows)))


_PAIRS = 4096
_CLASSES, _EACH = 24, 4


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
