"""Linear heads on the pooled features of a frozen network, with and without labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from simexplain.networks import unit_rows

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
