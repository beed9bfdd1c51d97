"""What is trained, in groups that may have learning rates of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from simexplain.errors import ModelError
from simexplain.losses.attention import last_linear
from simexplain.models.avsl import AVSL
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model

GROUPS = {
    "network": "the network, without its embedding head",
    "heads": "the heads of an AVSL model's levels; of any other network its last linear layer",
    "reliability": "alpha and beta of an AVSL model",
    "proxies": "what the objective learns itself: proxies, boundaries",
}
"""Names of parameter groups."""


def parameter_groups(
    objective: nn.Module,
    model: nn.Module,
    *,
    learning_rate: float,
    rates: Mapping[str, float] | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser, each with its ``name``; groups without any are left out.

    Parameters that do not require a gradient are left out, and alpha and beta where the inference
    of the model does not use them.

    Args:
        objective: An objective or any module whose parameters are to be trained too.
        model: The model in training; any network that ``as_similarity_model`` takes.
        learning_rate: Of all groups that ``rates`` does not name.
        rates: Learning rates by name, keys of :data:`GROUPS`.
        weight_decay: Of all groups.

    Raises:
        ModelError: If a group is unknown.
    """
    given = dict(rates or {})
    if unknown := [name for name in given if name not in GROUPS]:
        raise ModelError(f"Expected groups of {', '.join(GROUPS)}, got {unknown[0]!r}.")
    groups = []
    for name, parameters in _grouped(objective, as_similarity_model(model)).items():
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if trained:
            rate = given.get(name, learning_rate)
            own = {"name": name, "params": trained, "lr": rate, "weight_decay": weight_decay}
            groups.append(own)
    return groups


def _grouped(objective: nn.Module, model: SimilarityModel) -> dict[str, list[nn.Parameter]]:
    reliability: list[nn.Parameter] = []
    if isinstance(model, AVSL):
        heads = list(model.heads.parameters())
        network = list(model.base.parameters())
        if model.options.inference in ("full", "reliable"):
            reliability = [*model.alphas, *model.betas]
    else:
        head = last_linear(model.network)
        heads = [] if head is None else list(head.parameters())
        own = {id(parameter) for parameter in heads}
        network = [part for part in model.parameters() if id(part) not in own]
    known = {id(parameter) for parameter in model.parameters()}
    learned = [part for part in objective.parameters() if id(part) not in known]
    return {"network": network, "heads": heads, "reliability": reliability, "proxies": learned}
