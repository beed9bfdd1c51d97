"""A network built again from its zoo name, with the tensors of a file."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from simexplain.errors import ModelError
from simexplain.models.backbones import Backbone, build_backbone, check_registered
from simexplain.models.checkpoints import load_fitting, network_part


def rebuilt(
    backbone: str,
    state: dict[str, Tensor],
    source: str,
    *,
    keep_head: bool,
    size: tuple[int, int] | None,
) -> tuple[Backbone, int]:
    """The named network with this state, and the width of its last linear layer if kept.

    Raises:
        ModelError: If the name is not that of a registered network, or the state does not fit it.
    """
    check_registered(backbone, source)
    built = build_backbone(backbone, pretrained=False, size=size)
    prefix = f"{built.classifier}."
    state, others = network_part(state, built.network, prefix)
    if others:
        built = _noted(built, others)
    head = state.get(f"{prefix}weight") if built.classifier else None
    if head is not None and keep_head:
        if head.dim() == 0:
            raise ModelError(
                f"Expected {prefix}weight in '{source}' to be a matrix, got a single number; leave "
                "--keep-head (keep_head=) away."
            )
        notes = built.preprocess.notes
        outputs = len(head) * built.parts
        built = build_backbone(backbone, pretrained=False, outputs=outputs, size=size)
        built = replace(built, preprocess=replace(built.preprocess, notes=notes))
        load_fitting(built.network, state, source)
        return built, outputs
    own = built.network.state_dict()
    kept = {k: v for k, v in state.items() if not (k.startswith(prefix) and k not in own)}
    load_fitting(built.network, kept, source)
    if head is not None:
        note = (
            f"The last layer of the file ({prefix}weight {tuple(head.shape)}) was taken as a "
            "classifier and left out; --keep-head (keep_head=True) makes it the embedding."
        )
        built = _noted(built, note)
    return built, 0


def _noted(built: Backbone, note: str) -> Backbone:
    notes = (*built.preprocess.notes, note)
    return replace(built, preprocess=replace(built.preprocess, notes=notes))
