"""What a training step is given: whether it is of the kind that an objective takes."""

from __future__ import annotations

from torch import Tensor, nn

from simexplain.errors import ModelError
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model


def similarity_model(model: nn.Module) -> SimilarityModel:
    """Any network as a similarity model; one that is one already stays as it is.

    Raises:
        ModelError: If it is not a network, or one in DDP, whose averaging would be left out.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ModelError(
            "Expected the network itself, got it in DistributedDataParallel, which averages "
            "gradients only of what its own forward computes; put a module in it whose forward "
            "calls the objective with the network."
        )
    return as_similarity_model(model)


def check_batch(images: Tensor, labels: Tensor, masks: Tensor | None, seed: int) -> None:
    """Refuses what cannot be a batch.

    Raises:
        ModelError: If something is not a tensor or has another shape, or the seed is not an
            integer.
    """
    for name, value in (("images", images), ("labels", labels), ("masks", masks)):
        if not isinstance(value, Tensor) and not (name == "masks" and value is None):
            raise ModelError(
                f"Expected {name} as a tensor, got {type(value).__name__}; make one with "
                "torch.as_tensor."
            )
    if images.dim() != 4 or not len(images) or not images.is_floating_point():
        raise ModelError(
            "Expected preprocessed images (M,3,H,W) of floating point, at least one, got "
            f"{tuple(images.shape)} of {images.dtype}; prepare them as the network wants them."
        )
    if labels.shape != images.shape[:1]:
        raise ModelError(
            f"Expected a label for each of {len(images)} images, got {tuple(labels.shape)}."
        )
    if labels.is_floating_point() or labels.is_complex():
        raise ModelError(f"Expected whole numbers as labels, got {labels.dtype}; use .long().")
    if masks is not None and masks.shape != (len(images), *images.shape[2:]):
        raise ModelError(
            f"Expected masks of shape {(len(images), *images.shape[2:])}, "
            f"got {tuple(masks.shape)}; prepare them as the images."
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ModelError(f"Expected a whole number as the seed of this step, got {seed!r}.")
