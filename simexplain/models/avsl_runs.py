"""AVSL models as verbs take them: expected, run over many images, a word on their heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simexplain.errors import ModelError
from simexplain.models.avsl import AVSL
from simexplain.models.avsl_options import ORIGINS
from simexplain.networks import preserve_state


def expected_avsl(model: nn.Module, purpose: str = "to attribute a distance") -> AVSL:
    """The model itself.

    Args:
        model: Any model.
        purpose: What it is needed for, for the error.

    Raises:
        ModelError: If it is not an AVSL model.
    """
    if not isinstance(model, AVSL):
        name = getattr(model, "name", type(model).__name__)
        raise ModelError(
            f"Expected an AVSL model {purpose}, got {name}, which has no heads on "
            "its lower levels; fit some with simexplain fit (simexplain.fit)."
        )
    return model


def features_and_rows(
    model: AVSL, images: Tensor, max_batch: int | None
) -> tuple[list[Tensor], Tensor]:
    """Feature maps per level ``(M,C,h,w)`` and embedding rows ``(M,E)``, without any graph."""
    features, rows = [], []
    with torch.no_grad(), preserve_state(model.network):
        for part in torch.split(images, model.pass_size(len(images), max_batch)):
            # A network may normalise its input in place.
            maps = [grid.detach() for grid in model.feature_maps(part.clone())]
            features.append(maps)
            rows.append(model.rows(maps))
    return [torch.cat(level) for level in zip(*features, strict=True)], torch.cat(rows)


def origin_warnings(model: AVSL, still: str = "") -> tuple[str, ...]:
    """What to know where heads were never trained, had no labels or few pictures.

    Args:
        model: The model.
        still: What holds nevertheless, before what does not.
    """
    few = tuple(str(text) for text in model.report.get("warnings", ()))
    about = f"This model has {ORIGINS[model.origin]}"
    if model.origin == "untrained":
        return (f"{about}; fit or train it first.",)
    if model.origin == "unlabelled":
        return (f"{about}: {still}nodes are directions of variance, not learned concepts.", *few)
    return few
