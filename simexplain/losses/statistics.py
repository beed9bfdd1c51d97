"""Batch norm that normalises by the batch as before, but learns nothing from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """No running statistics of batch norm move while the block runs; modes stay as they are."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm, norm.momentum) for norm in norms if norm.training]
    counts = [norm.num_batches_tracked for norm, _ in kept if norm.num_batches_tracked is not None]
    before = [int(count) for count in counts]
    try:
        for norm, _ in kept:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in kept:
            norm.momentum = momentum
        for count, value in zip(counts, before, strict=True):
            count.fill_(value)
