"""What an AVSL model adds to a file: its tensors under a prefix, and plain options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from simexplain.models.avsl import AVSL
from simexplain.models.avsl_options import AVSLOptions
from simexplain.models.base import SimilarityModel
from simexplain.models.checkpoints import load_fitting

_PREFIX, _BASE = "avsl.", "base."


def avsl_tensors(model: AVSL) -> dict[str, Tensor]:
    """Heads, reliabilities and edges, without the network's own tensors."""
    return {
        f"{_PREFIX}{key}": value.detach().cpu()
        for key, value in model.state_dict().items()
        if not key.startswith(_BASE)
    }


def split_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The network's tensors, and AVSL's without their prefix."""
    own = {key: value for key, value in state.items() if not key.startswith(_PREFIX)}
    avsl = {key.removeprefix(_PREFIX): value for key, value in state.items() if key not in own}
    return own, avsl


def avsl_from(
    base: SimilarityModel, metadata: Mapping[str, Any], state: dict[str, Tensor], source: str
) -> AVSL:
    """The counterpart of :func:`avsl_tensors` and ``AVSL.to_json``.

    Raises:
        ModelError: If tensors are missing or of another shape.
    """
    with torch.random.fork_rng(devices=[]):
        model = AVSL(
            base,
            levels=metadata["levels"],
            nodes=metadata["nodes"],
            preset=AVSLOptions.from_json(metadata["options"]),
            origin=metadata["origin"],
            report=metadata["report"],
        )
    own = {key: value for key, value in model.state_dict().items() if key.startswith(_BASE)}
    load_fitting(model, {**own, **state}, source)
    return model
