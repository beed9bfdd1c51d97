"""A map that explains a network must change when the network forgets (Adebayo et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.arguments import typed
from simexplain.comparison import Comparison
from simexplain.errors import ModelError
from simexplain.evaluation.results import SanityScores
from simexplain.explaining_tensors import explain_tensors
from simexplain.methods import MethodLike, takes_layers
from simexplain.methods.rows import Layers
from simexplain.metrics.randomising import randomisable, randomised
from simexplain.metrics.stability import AGREEMENTS
from simexplain.models.embedder import as_similarity_model


@typed
def sanity_check(
    model: nn.Module,
    comparison: Comparison,
    method: str | MethodLike = "sam",
    layer: Layers = None,
    *,
    depths: int | Sequence[int] = 8,
    order: Sequence[str] | None = None,
    seed: int = 0,
    max_batch: int | None = None,
    **options: Any,
) -> SanityScores:
    """How alike a method's maps stay under cascading randomisation of the network's parameters.

    Maps that stay alike show edges or the middle of the picture rather than the network. The
    similarity is that of the raw maps, with their sign. The network is as before afterwards.

    Args:
        model: A similarity model, or any ``nn.Module`` that returns an embedding.
        comparison: Preprocessed images ``(3,H,W)``.
        method: As for ``explain``.
        layer: As for ``explain``; the default is found before anything is forgotten.
        depths: How many layers to forget each time, or in how many even strides to forget all.
        order: Layers from the last to the first; by default in reverse order of registration.
        seed: Of the new values.
        max_batch: Bounds the images in one forward pass.
        **options: As for ``explain``.

    Raises:
        ModelError: If the network has nothing to forget, or a layer cannot be used.
    """
    wrapped = as_similarity_model(model)
    network = wrapped.network
    names = tuple(order) if order is not None else randomisable(network)
    if not names:
        raise ModelError(f"{wrapped.name} has no parameters that could be randomised.")
    chosen = _depths(depths, len(names))
    own = explain_tensors(
        wrapped, comparison, method, layer, max_batch=max_batch, check=False, **options
    )
    used = own.layers if layer is None and takes_layers(method) else layer
    similarities: list[Tensor] = []
    errors: dict[str, str] = {}
    for depth in chosen:
        maps = None
        with randomised(network, depth, seed, names):
            try:
                maps = explain_tensors(
                    wrapped, comparison, method, used, max_batch=max_batch, check=False, **options
                ).maps
            except ModelError as error:  # such as an embedding that is zero now
                errors[str(depth)] = str(error)
        similarities.append(_alike(own.maps, maps))
    values = torch.stack(similarities)
    return SanityScores(
        depths=chosen,
        layers=tuple(names[depth - 1] if depth else "" for depth in chosen),
        agreement={name: values[..., number] for number, name in enumerate(AGREEMENTS)},
        roles=comparison.roles,
        errors=errors,
        settings={"method": own.method, "layers": own.layers, "model": own.model, "seed": seed},
    )


def _depths(depths: int | Sequence[int], most: int) -> tuple[int, ...]:
    """Which numbers of layers to forget, always beginning with none."""
    if isinstance(depths, int):
        count = max(1, min(depths, most))
        depths = [round(step * most / count) for step in range(1, count + 1)]
    if any(not 0 <= depth <= most for depth in depths):
        raise ModelError(f"Expected depths between 0 and {most} layers, got {list(depths)}.")
    return tuple(sorted({0, *depths}))


def _alike(own: Tensor, maps: Tensor | None) -> Tensor:
    """Every measure for every image, ``(B,K,A)``; NaN without maps."""
    batch, count = own.shape[:2]
    values = torch.full((batch, count, len(AGREEMENTS)), torch.nan, dtype=torch.float64)
    if maps is None or not bool(maps.isfinite().all()):
        return values
    for index in range(batch):
        for position in range(count):
            for number, measure in enumerate(AGREEMENTS.values()):
                values[index, position, number] = measure(
                    own[index, position], maps[index, position]
                )
    return values
