"""Methods: from a model and a comparison to maps.

Public: ``METHODS``, here, and the classes in it: ``similarity_attention.py``, ``focus.py``,
``cams.py``, ``decomposition.py``, ``attention.py``, ``pixel_gradients.py``, ``pixel_methods.py``,
``weight_bank.py``, ``avsl_maps.py``. A method derives from ``Method`` (``method.py``); which ones
run is decided in ``rows.py`` and ``kinds.py``. Vectors before their normalisation:
``raw_vectors.py``, with ``held_norms.py`` and ``short_tails.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, fields, is_dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from simexplain.errors import ComparisonError, meant
from simexplain.methods.attention import AttentionRelevance, GradECLIP, RawAttention
from simexplain.methods.avsl_maps import AVSLMaps
from simexplain.methods.cams import SimilarityCAM
from simexplain.methods.decomposition import Decomposition
from simexplain.methods.focus import Focus
from simexplain.methods.method import AttentionMaps as AttentionMaps
from simexplain.methods.method import Method as Method
from simexplain.methods.pixel_gradients import (
    InputXGradient,
    IntegratedGradients,
    Saliency,
    SmoothGrad,
)
from simexplain.methods.pixel_methods import PIXELS as PIXELS
from simexplain.methods.pixel_methods import SBSM, Occlusion, PixelMethod, RandomMasks
from simexplain.methods.similarity_attention import SimilarityAttention
from simexplain.methods.weight_bank import BankMaps
from simexplain.models.base import SimilarityModel
from simexplain.models.blackbox import PIXEL_METHODS

MethodLike = Callable[..., AttentionMaps]
"""A :class:`Method`, or any function with its arguments."""

METHODS: dict[str, type[Method]] = {
    "sam": SimilarityAttention,
    "focus": Focus,
    "similarity_cam": SimilarityCAM,
    "decomposition": Decomposition,
    "attention": RawAttention,
    "attention_relevance": AttentionRelevance,
    "grad_eclip": GradECLIP,
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

PIXEL_METHODS.update(
    (name, method.needs_gradient)
    for name, method in METHODS.items()
    if issubclass(method, PixelMethod)
)


ELSEWHERE = {
    **dict.fromkeys(("gradcam", "gradcampp", "hirescam", "layercam", "cam"), "similarity_cam"),
    **dict.fromkeys(("ig", "integratedgradient", "intgrad"), "integrated_gradients"),
    **dict.fromkeys(("similarityattention", "attentionmap", "paper"), "sam"),
    **dict.fromkeys(("rollout", "attentionrollout", "rawattention"), "attention"),
    **dict.fromkeys(("chefer", "relevance", "lrp"), "attention_relevance"),
    **dict.fromkeys(("gradient", "gradients", "vanillagradient"), "saliency"),
    **dict.fromkeys(("rise", "masks"), "random_masks"),
    **dict.fromkeys(("perturbation", "slidingwindow"), "occlusion"),
    **dict.fromkeys(("bank", "gradweights"), "weight_bank"),
    **dict.fromkeys(("eclip", "gradclip"), "grad_eclip"),
}
"""What others call our methods, or what comes nearest, in small letters and digits alone."""


def check_method(method: str) -> None:
    """Refuses a name that no method has.

    Raises:
        ComparisonError: If so; suggests what may have been meant.
    """
    if method not in METHODS:
        hint = meant(method, METHODS, ELSEWHERE)
        known = ", ".join(METHODS)
        raise ComparisonError(f"Expected method to be one of {known}, got '{method}'{hint or '.'}")


@runtime_checkable
class ChoosesLayers(Protocol):
    """A method that names its layers itself where the user names none."""

    def layers_for(self, model: SimilarityModel, images: Tensor) -> tuple[str, ...] | None:
        """The layers for these images, such as the anchors ``(B,3,H,W)`` of comparisons.

        None leaves the choice to the model (its default layer). ``model.layers_for(images)`` has
        the layers to choose from. A method with ``uses_layers = False`` has exactly these layers.

        Raises:
            ModelError: If the method cannot be used with this model.
        """


def takes_layers(method: str | MethodLike) -> bool:
    """Whether a user may name the layers of a method, given by name or as an object."""
    made: Any = METHODS[method] if isinstance(method, str) else method
    return bool(getattr(made, "uses_layers", True))


def options_of(method: Any) -> tuple[Field[Any], ...]:
    """The options of a method in :data:`METHODS`: the fields of its dataclass."""
    return fields(method) if is_dataclass(method) else ()


_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def option_from(default: Any, option: str, text: str) -> Any:
    """The text of an option as a value of the kind that its default has; names stay text.

    Args:
        default: A number, true or false, or anything else for text.
        option: Its name, for the error.
        text: What was written.

    Raises:
        ComparisonError: If it is not such a value.
    """
    if isinstance(default, bool):
        if text.lower() in _TRUTH:
            return _TRUTH[text.lower()]
    elif isinstance(default, (int, float)):
        try:
            return type(default)(text)
        except ValueError:
            pass
    else:
        return text
    kind = {bool: "true or false", int: "a whole number"}.get(type(default), "a number")
    raise ComparisonError(f"Expected {option} to be {kind}, got '{text}'.")
