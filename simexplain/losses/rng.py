"""Seeds the global random state of a training step from the step's own generator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded_by(generator: torch.Generator) -> Iterator[None]:
    """Seeds PyTorch's global random state by a generator inside the block, and restores it.

    The miners of pytorch-metric-learning draw from the global state. It differs between processes,
    which would then not compute the same loss, and between a run and its resumption.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
