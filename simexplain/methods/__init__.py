"""Methods: from a model and a comparison to maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, fields, is_dataclass
from typing import Any

from simexplain.methods.avsl_maps import AVSLMaps
from simexplain.methods.bank_maps import BankMaps
from simexplain.methods.decomposition import Decomposition
from simexplain.methods.perturbation import SBSM, Occlusion, RandomMasks
from simexplain.methods.pixel_gradients import (
    InputXGradient,
    IntegratedGradients,
    Saliency,
    SmoothGrad,
)
from simexplain.methods.scoring import PIXELS as PIXELS
from simexplain.methods.similarity_attention import AttentionMaps, SimilarityAttention
from simexplain.methods.similarity_cam import SimilarityCAM

Method = Callable[..., AttentionMaps]

METHODS: dict[str, Callable[..., Method]] = {
    "sam": SimilarityAttention,
    "similarity_cam": SimilarityCAM,
    "decomposition": Decomposition,
    "saliency": Saliency,
    "smoothgrad": SmoothGrad,
    "input_x_gradient": InputXGradient,
    "integrated_gradients": IntegratedGradients,
    "occlusion": Occlusion,
    "sbsm": SBSM,
    "random_masks": RandomMasks,
    "weight_bank": BankMaps,
    "avsl": AVSLMaps,
}
"""Every method by name: called with its options it gives ``(model, images, layers) -> maps``."""


def options_of(method: Any) -> tuple[Field[Any], ...]:
    """The options of a method in :data:`METHODS`: the fields of its dataclass."""
    return fields(method) if is_dataclass(method) else ()
