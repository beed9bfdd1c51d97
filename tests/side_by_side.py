"""Two processes at once that need not import torch each: they fork from one that has done so."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path

import torch

PRELOADED = ["pytest", "timm", "simexplain.models.loading", "simexplain.losses.classification"]


def another_process() -> BaseContext:
    """What starts processes that have imported torch and simexplain already."""
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    if forks:
        multiprocessing.set_forkserver_preload(PRELOADED)
    return multiprocessing.get_context("forkserver" if forks else "spawn")


def in_two_processes(work: Callable[[int, str], None], folder: Path) -> None:
    """Calls ``work(rank, folder)`` in both and waits for them; an error in one is raised here."""
    # Forks of this process could not run backward any more.
    method = another_process().get_start_method()
    torch.multiprocessing.start_processes(work, args=(str(folder),), nprocs=2, start_method=method)
