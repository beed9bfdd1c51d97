"""The contestants of ``explain.py``: one function each, from a network to a call to be timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision
from captum.attr import LayerGradCam
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import scale_cam_image
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain import Comparison, as_similarity_model, explain
from simexplain.methods.similarity_attention import similarity_weights
from simexplain.models.accelerating import accelerated

PLAIN, OURS, FAST = "plain forward", "simexplain", "simexplain, fast mode"
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Setting:
    """What is explained.

    Attributes:
        network: A name in ``torchvision.models`` of a network with ``fc`` as its last layer.
        size: Height and width of the images.
        triplets: How many triplets one call explains.
        threads: Threads that PyTorch may use.
    """

    network: str
    size: int
    triplets: int
    threads: int

    def module(self) -> nn.Module:
        """The network with a linear head of 512 and random weights, the same in every process."""
        torch.manual_seed(0)
        network = getattr(torchvision.models, self.network)(weights=None)
        network.fc = nn.Linear(network.fc.in_features, 512)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):  # statistics of a fresh one are trivial to fold
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.data.uniform_(0.5, 1.0)
        return network.eval()

    def images(self) -> Comparison:
        """Triplets of noise."""
        generator = torch.Generator().manual_seed(1)
        shape = (3, self.triplets, 3, self.size, self.size)
        return Comparison.triplet(*torch.randn(shape, generator=generator))


def plain_forward(module: nn.Module, images: Comparison, layer: str) -> Run:
    """The network on the same images, as anyone would embed them."""
    flat = images.stacked().flatten(0, 1)

    def run() -> Tensor:
        with torch.inference_mode():
            return module(flat)

    return run


def ours(module: nn.Module, images: Comparison, layer: str) -> Run:
    """Similarity attention with its defaults."""
    model = as_similarity_model(module)
    return lambda: explain(model, images, layer=layer, check=False).maps.flatten(0, 1)


def ours_fast(module: nn.Module, images: Comparison, layer: str) -> Run:
    """The same with batch norm folded and channels-last memory."""
    model = accelerated(as_similarity_model(module))
    return lambda: explain(model, images, layer=layer, check=False).maps.flatten(0, 1)


def captum_layer(module: nn.Module, images: Comparison, layer: str) -> Run:
    """Captum's layer Grad-CAM of ``w . f``, with ``w`` from a first forward."""
    flat = images.stacked().flatten(0, 1)

    def run() -> Tensor:
        weights = _weights(module, images)
        attribution = LayerGradCam(
            lambda batch: (F.normalize(module(batch), dim=1) * weights).sum(dim=1),
            module.get_submodule(layer),
        )
        return attribution.attribute(flat, relu_attributions=True)[:, 0].detach()

    return run


def grad_cam(module: nn.Module, images: Comparison, layer: str) -> Run:
    """The grad-cam package with an embedding target for each image, all in one batch."""
    return _grad_cam(module, images, layer, chunk=len(images.stacked().flatten(0, 1)))


def grad_cam_singly(module: nn.Module, images: Comparison, layer: str) -> Run:
    """The same image by image, as the package's own example of embeddings does it."""
    return _grad_cam(module, images, layer, chunk=1)


def _grad_cam(module: nn.Module, images: Comparison, layer: str, chunk: int) -> Run:
    flat = images.stacked().flatten(0, 1)

    def run() -> Tensor:
        weights = _weights(module, images)
        targets = [lambda out, w=w: F.normalize(out, dim=0) @ w for w in weights]
        # Entered anew each time: its hooks would slow down the other methods.
        with GradCAM(model=module, target_layers=[module.get_submodule(layer)]) as cam:
            parts = [
                torch.from_numpy(cam(flat[i : i + chunk], targets[i : i + chunk]))
                for i in range(0, len(flat), chunk)
            ]
        return torch.cat(parts)

    return run


def _weights(module: nn.Module, images: Comparison) -> Tensor:
    """The published weights, one row per image, from a forward pass of its own."""
    with torch.no_grad():
        rows = F.normalize(module(images.stacked().flatten(0, 1)), dim=1)
    weights = similarity_weights(images.like(images.restacked(rows)))
    return weights.repeat_interleave(images.count, dim=0)


METHODS: dict[str, Callable[[nn.Module, Comparison, str], Run]] = {
    PLAIN: plain_forward,
    "plain forward again": plain_forward,
    OURS: ours,
    FAST: ours_fast,
    "captum LayerGradCam": captum_layer,
    "grad-cam, one batch": grad_cam,
    "grad-cam, image by image": grad_cam_singly,
}
"""What is measured, by the name in the table; the first is what all are divided by."""


def difference(name: str, maps: Tensor, reference: Tensor, size: int) -> float:
    """Largest difference of any map from ours, as a share of that map's maximum."""
    if name.startswith("grad-cam"):  # which returns maps enlarged and scaled to [0, 1]
        enlarged = scale_cam_image(reference.numpy(), (size, size))
        reference = torch.from_numpy(scale_cam_image(enlarged))  # it scales twice
    apart = (maps - reference).abs().amax(dim=(1, 2))
    top = reference.amax(dim=(1, 2))
    return float((apart / top.clamp_min(1e-30)).max())
