"""Gathers rows over the processes of a training run, which share one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a training run; this one alone without others.

    Attributes:
        rank: The number of this process.
        world: How many there are.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def present(cls) -> ProcessGroup:
        """The process group that is running now, or this process alone."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def gathered(self, own: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """The rows of all processes one after the other, differentiable.

        Where every process computes the same loss from them and gradients of parameters are
        averaged, as DDP does, training is the same as that of one process with the whole batch.
        Every process must then go through the same ``backward``.

        Args:
            own: ``(m,...)`` of this process.
            counts: How many rows each process has, where they differ.

        Returns:
            ``(sum of m,...)``.
        """
        if self.world == 1:
            return own
        most = max(counts) if counts is not None else len(own)
        missing = most - len(own)
        padded = torch.cat((own, own.new_zeros(missing, *own.shape[1:]))) if missing else own
        if counts is not None and torch.is_grad_enabled() and not padded.requires_grad:
            # A process without rows must still take part in the backward pass of the others.
            padded = padded.requires_grad_()
        parts = list(_Gathered.apply(padded.contiguous()))
        if counts is not None:
            parts = [part[:count] for part, count in zip(parts, counts, strict=True)]
        return torch.cat(parts)

    def mean(self, own: Tensor) -> Tensor:
        """The mean over all processes, without a gradient."""
        if self.world == 1:
            return own.detach()
        total = own.detach().clone()
        distributed.all_reduce(total)
        return total / self.world


class _Gathered(torch.autograd.Function):
    """Rows of all processes. The backward pass all-reduces the gradients."""

    @staticmethod
    def forward(_: object, own: Tensor) -> tuple[Tensor, ...]:
        parts = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, own)
        return tuple(parts)

    @staticmethod
    def backward(_: object, *slopes: Tensor) -> Tensor:
        total = torch.stack(slopes)
        distributed.all_reduce(total)
        return total[distributed.get_rank()]
