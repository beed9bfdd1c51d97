"""Chance in a training step comes from its own generator, whatever library draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def drawn_from(generator: torch.Generator) -> Iterator[None]:
    """Inside the block PyTorch's global random state is seeded by the generator; then as before.

    The miners of pytorch-metric-learning draw from the global state. It differs between processes,
    which would then not compute the same loss, and between a run and its resumption.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
