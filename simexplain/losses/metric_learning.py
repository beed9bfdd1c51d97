"""pytorch-metric-learning, an optional extra: asked for where it is needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from simexplain.errors import ModelError


def metric_learning(part: str) -> Any:
    """A package of pytorch-metric-learning: ``losses``, ``miners``, ``distances`` and so on.

    Raises:
        ModelError: If it is not installed.
    """
    try:
        return import_module(f"pytorch_metric_learning.{part}")
    except ModuleNotFoundError as error:
        raise ModelError(
            "Expected pytorch-metric-learning for this loss, which is not installed; run "
            "pip install 'simexplain[train]'."
        ) from error
