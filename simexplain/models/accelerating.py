"""A faster twin of a model: batch norm folded into convolutions, channels-last memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from simexplain.arguments import typed
from simexplain.errors import ModelError
from simexplain.models.avsl import AVSL
from simexplain.models.avsl_files import avsl_from, avsl_tensors, split_state
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import Embedder
from simexplain.models.exported import ExportedNetwork
from simexplain.networks import preserve_state
from simexplain.surveying import survey

_TOLERANCE = 1e-3


@typed
def accelerated(model: SimilarityModel) -> SimilarityModel:
    """A copy of a model that gives the same maps in less time; the original is not touched.

    Batch norms that directly follow a convolution are folded into it, and weights and images use
    channels-last memory. Maps at the default layer agree within 1e-3 of their maximum; at finer
    layers a ReLU within rounding of zero may switch its gradient and move a map a little more.
    A convolution that was folded carries other values itself; activations and stages do not.

    Args:
        model: A model from ``load_model`` or ``as_similarity_model``.

    Raises:
        ModelError: If the fast copy does not give the same embeddings, or the model is of a kind
            that cannot be rewritten (exported programs).
    """
    if isinstance(model, AVSL):
        _, heads = split_state(avsl_tensors(model))
        return avsl_from(accelerated(model.base), model.to_json(), heads, model.name)
    if not isinstance(model, Embedder) or isinstance(model.network, ExportedNetwork):
        raise ModelError(
            f"Expected a network of PyTorch modules to make faster, got {model.name}, whose "
            "program is fixed; use it as it is."
        )
    example = model.example()
    fast = _Fast(copy.deepcopy(model))
    runs = survey(fast, example).runs
    # A layer that runs twice is called name@call here, and so is left alone.
    once = {run.name: run.module for run in runs}
    with torch.no_grad():
        for run in runs:
            before = once.get(run.follows or "")
            if "@" in run.name or not isinstance(run.module, nn.BatchNorm2d):
                continue
            if isinstance(before, nn.Conv2d):
                _fold(fast.network, run.follows or "", run.name)
    fast = fast.to(memory_format=torch.channels_last)
    _check(model, fast, example)
    return fast


class _Fast(Embedder):
    """An embedder that lays its images out channels-last."""

    def __init__(self, original: Embedder) -> None:
        super().__init__(
            original.module,
            output=original.output,
            preprocess=original.preprocess,
            distance=original.distance_name,
            name=f"{original.name} (fast)",
            text=original.text,
        )
        self.layer_table = original.layer_table

    def vectors(self, images: Tensor) -> Tensor:
        """As for every embedder."""
        return super().vectors(images.contiguous(memory_format=torch.channels_last))


def _fold(network: nn.Module, convolution: str, norm: str) -> None:
    """Moves a batch norm into the convolution before it; what follows the norm stays."""
    conv: Any = network.get_submodule(convolution)
    bn: Any = network.get_submodule(norm)
    if bn.running_mean is None:
        return
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
    # timm's BatchNormAct2d also drops and activates; its name stays for layers to be found.
    rest = [child for child in (getattr(bn, "drop", None), getattr(bn, "act", None)) if child]
    network.set_submodule(norm, nn.Sequential(*rest) if rest else nn.Identity())


def _check(model: SimilarityModel, fast: SimilarityModel, example: Tensor) -> None:
    with torch.no_grad(), preserve_state(model.network), preserve_state(fast.network):
        apart = float((model.embed(example) - fast.embed(example)).abs().max())
    if not apart <= _TOLERANCE:
        raise ModelError(
            f"The fast copy of {model.name} moves its embeddings by {apart:.2g}, so this network "
            "cannot be made faster safely; use it as it is."
        )
