"""pytorch-metric-learning, an optional extra, imported where it is needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from simexplain.errors import ModelError, meant


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


NEGATIVES = ("hard", "semihard", "easy", "all")
"""Which negatives of a batch make triplets."""


def triplet_miner(negatives: str, margin: float) -> Any:
    """A miner of triplets with all positives; semihard negatives are those of Schroff et al. 2015.

    Raises:
        ModelError: If the kind of negatives does not exist, or the package is not installed.
    """
    if negatives not in NEGATIVES:
        raise ModelError(
            f"Expected negatives to be one of {', '.join(NEGATIVES)}, got '{negatives}'"
            f"{meant(negatives, NEGATIVES) or '.'}"
        )
    miners = metric_learning("miners")
    if negatives == "semihard":
        return miners.TripletMarginMiner(margin=margin, type_of_triplets="semihard")
    return miners.BatchEasyHardMiner("all", negatives)
