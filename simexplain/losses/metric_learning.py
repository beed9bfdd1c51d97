"""pytorch-metric-learning, an optional extra: asked for where it is needed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
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


def check_settings(name: str, factory: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raises a ModelError that lists the settings of a loss, if one of those given is none."""
    known = [
        parameter.name
        for parameter in inspect.signature(factory).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    if unknown := [setting for setting in given if setting not in known]:
        raise ModelError(
            f"Expected settings of loss '{name}' among {', '.join(known)}, got {unknown[0]!r}."
        )
