"""A network built again from its zoo name, with the tensors of a file."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from simexplain.models.backbones import Backbone, build_backbone
from simexplain.models.checkpoints import fitted, load_fitting


def rebuilt(
    backbone: str,
    state: dict[str, Tensor],
    source: str,
    *,
    keep_head: bool,
    size: tuple[int, int] | None,
) -> tuple[Backbone, int]:
    """The named network with this state, and the width of its last linear layer if kept."""
    built = build_backbone(backbone, pretrained=False, size=size)
    state = fitted(state, built.network)
    prefix = f"{built.classifier}."
    head = state.get(f"{prefix}weight") if built.classifier else None
    if head is not None and keep_head:
        outputs = len(head) * built.parts
        built = build_backbone(backbone, pretrained=False, outputs=outputs, size=size)
        load_fitting(built.network, state, source)
        return built, outputs
    own = built.network.state_dict()
    kept = {k: v for k, v in state.items() if not (k.startswith(prefix) and k not in own)}
    load_fitting(built.network, kept, source)
    if head is not None:
        told = (
            f"The last layer of the file ({prefix}weight {tuple(head.shape)}) was taken as a "
            "classifier and left out; --keep-head (keep_head=True) makes it the embedding."
        )
        built = replace(built, preprocess=replace(built.preprocess, notes=(told,)))
    return built, 0
