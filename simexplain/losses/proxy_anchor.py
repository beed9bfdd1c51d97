"""Losses on distances alone, for the levels of AVSL and their whole: what one is, proxy anchor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class DistanceBatch:
    """Distances of a batch.

    Attributes:
        distances: ``(N,K)``, squared as Eq. 10 has them.
        labels: Class numbers of the rows ``(N,)``.
        columns: Class numbers of the columns ``(K,)``.
        nodes: How many nodes were summed, the dimension of the space.
        generator: The only source of chance.
        attract_only: Only distances to the own class count.
    """

    distances: Tensor
    labels: Tensor
    columns: Tensor
    nodes: int
    generator: torch.Generator
    attract_only: bool = False


class LossOnDistances(nn.Module, ABC):
    """One loss ``L(d)``.

    Attributes:
        settings: Its numbers, as plain JSON values.
    """

    uses_proxies: ClassVar[bool] = False  # else the columns are the rows

    settings: dict[str, Any]

    @abstractmethod
    def forward(self, measured: DistanceBatch) -> Tensor:
        """The loss, a scalar."""


class ProxyAnchor(LossOnDistances):
    """Proxy anchor (Kim et al. 2020, Eq. 4) on distances, in the form of the AVSL paper.

    Per proxy ``log(1 + sum exp(alpha (d - positive)))`` over the images of its class, mean over
    the classes of the batch, plus ``log(1 + sum exp(alpha (negative - d)))`` over all others, mean
    over all proxies. On squared distances of unit vectors, ``d = 2 - 2 cos``, this is Kim et al.'s
    loss with scale ``2 alpha`` on ``cos = 1 - d/2``: ``positive = 2 (1 - margin)`` and
    ``negative = 2 (1 + margin)``. AVSL's 16, 1.8 and 2.2 are Kim et al.'s 32 and 0.1.
    """

    uses_proxies: ClassVar[bool] = True

    def __init__(
        self,
        classes: int | None = None,
        *,
        alpha: float = 16.0,
        positive: float = 1.8,
        negative: float = 2.2,
    ) -> None:
        super().__init__()
        self.alpha, self.positive, self.negative = alpha, positive, negative
        self.settings = {"alpha": alpha, "positive": positive, "negative": negative}

    def forward(self, measured: DistanceBatch) -> Tensor:
        """The loss of images (rows) and proxies (columns)."""
        same = measured.labels[:, None] == measured.columns[None]
        pull = _log_one_plus(self.alpha * (measured.distances - self.positive), same)
        present = same.any(dim=0)
        pulled = (pull * present).sum() / present.sum().clamp_min(1)
        if measured.attract_only:
            return pulled
        push = _log_one_plus(self.alpha * (self.negative - measured.distances), ~same)
        return pulled + push.mean()


def _log_one_plus(exponents: Tensor, kept: Tensor) -> Tensor:
    """``log(1 + sum of exp)`` over the rows that are kept, ``(K,)``; 0 where none is."""
    chosen = exponents.masked_fill(~kept, -torch.inf)
    return torch.cat((torch.zeros_like(chosen[:1]), chosen)).logsumexp(dim=0)
