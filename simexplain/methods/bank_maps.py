"""Grad-CAM with weights from a bank: one forward pass, no backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simexplain.arguments import typed
from simexplain.comparison import Comparison
from simexplain.errors import ComparisonError, ModelError
from simexplain.methods.cams import weighted
from simexplain.methods.method import AttentionMaps, Method, check_embeddings
from simexplain.methods.scoring import check_range
from simexplain.methods.weight_bank import BankWeights, WeightBank
from simexplain.models.base import SimilarityModel
from simexplain.networks import find_layer, split_call, unit_rows
from simexplain.tracing import trace


class BankName(str):
    """The name of a bank, which results report, with the bank itself."""

    bank: WeightBank

    def __new__(cls, bank: WeightBank) -> BankName:
        """The name of this bank."""
        name = super().__new__(cls, str(bank))
        name.bank = bank
        return name

    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        """The name alone: options are copied into results."""
        return str(self)


@dataclass(frozen=True, init=False)
class BankMaps(Method):
    """Grad-CAM with the weights of similar images (Chen et al. 2020, arXiv 2001.06538).

    ``relu(sum over k of alpha_k A_k)``, where ``alpha`` is the mean of the grad-weights of the
    nearest images in a :class:`WeightBank`. Each image is mapped by itself: the map shows what set
    its neighbours apart from other classes when the bank was made, not what this comparison does.

    Built from the paper's abstract and the SAM paper's account of it; the rest is ours.

    Attributes:
        bank: A bank or the file of one.
        neighbours: How many images of the bank lend their weights.
        channels: Keep only so many channels, those with the largest ``|alpha|``; 0 for all. Both
            the option and its default are choices of ours.
        keep_negative: Leave out the final ReLU.
    """

    bank: BankName  # without a default, since one has to be given
    neighbours: int = 2
    channels: int = 0
    keep_negative: bool = False

    @typed
    def __init__(
        self,
        bank: WeightBank | str | Path | None = None,
        neighbours: int = 2,
        channels: int = 0,
        keep_negative: bool = False,
    ) -> None:
        """Reads the bank, if it is given by its file.

        Raises:
            ComparisonError: If no bank is given or an option is out of range.
            OutputError: If the file is not a bank.
        """
        if bank is None or bank == "":
            raise ComparisonError(
                "Method 'weight_bank' needs a bank of grad-weights; make one from a labelled "
                "folder with simexplain bank MODEL FOLDER --out FILE (build_bank) and give it as "
                "the method's option bank=FILE."
            )
        if not isinstance(bank, (WeightBank, BankName)):
            bank = WeightBank.load(bank)
        check_range("neighbours", neighbours, 1, 1_000_000)
        check_range("channels", channels, 0, 1_000_000)
        known = bank if isinstance(bank, BankName) else BankName(bank)
        for name, value in (
            ("bank", known), ("neighbours", neighbours), ("channels", channels),
            ("keep_negative", keep_negative),
        ):  # fmt: skip
            object.__setattr__(self, name, value)

    def layers_for(self, model: SimilarityModel, images: Tensor) -> tuple[str, ...]:
        """The layer of the bank."""
        return (self.bank.bank.layer,)

    def attribute(
        self,
        model: SimilarityModel,
        images: Comparison,
        layers: Sequence[str],
        max_batch: int | None,
    ) -> AttentionMaps:
        """Maps for preprocessed images, from one forward pass.

        ``weights`` are the channel weights ``(B,K,C)``; ``scores`` the sums of the maps before the
        ReLU, which with average pooling and a linear tail is what the weights make of the image's
        pooled features.

        Raises:
            ModelError: If the bank is not of this model and layer.
            ComparisonError: If the bank has fewer images than ``neighbours``.
        """
        bank = self.bank.bank
        bank.check(model)
        layer = _fitting_layer(bank, model, layers)
        flat = images.stacked().flatten(0, 1)
        with torch.no_grad():
            traced = trace(model, flat, (layer,), max_batch=max_batch)
            embeddings = unit_rows(traced.embeddings.detach())
            rows = images.restacked(traced.embeddings.detach())
            check_embeddings(rows, images.roles)
            grids = traced.maps[layer].detach().to(embeddings)
            if grids.shape[1] != bank.weights.shape[1]:
                raise ModelError(
                    f"The bank '{bank}' has weights for {bank.weights.shape[1]} channels of layer "
                    f"'{layer}', got {grids.shape[1]}; make a bank for this model."
                )
            neighbours = bank.weights_for(embeddings, self.neighbours)
            weights = self._kept(neighbours.weights)
            signed = weighted(weights, grids)
            maps = images.restacked(signed if self.keep_negative else signed.relu())
            return AttentionMaps(
                maps=maps,
                layer_maps={layer: maps},
                weights=images.restacked(weights),
                scores=images.restacked(signed.sum(dim=(1, 2))),
                embeddings=rows,
                warnings=_warnings(bank, neighbours, images),
            ).detached()

    def _kept(self, weights: Tensor) -> Tensor:
        """Weights ``(M,C)`` with all but the strongest channels set to zero."""
        if not 0 < self.channels < weights.shape[1]:
            return weights
        order = weights.abs().argsort(dim=1, descending=True, stable=True)[:, : self.channels]
        return torch.zeros_like(weights).scatter(1, order, weights.gather(1, order))


def _fitting_layer(bank: WeightBank, model: SimilarityModel, layers: Sequence[str]) -> str:
    """The layer of the bank, if it is the requested one."""
    if tuple(layers) == (bank.layer,):
        return bank.layer
    for layer in layers:
        find_layer(model.network, split_call(layer)[0])  # which raises where there is none
    raise ModelError(
        f"The bank '{bank}' was made at layer {bank.layer}, got {' x '.join(layers)}; leave "
        "the layer away or make a bank at that layer."
    )


def _warnings(bank: WeightBank, neighbours: BankWeights, images: Comparison) -> tuple[str, ...]:
    """Whose weights the maps are made of, and whether they are close enough to mean anything."""
    nearest = neighbours.distances[:, 0].tolist()
    if images.batch == 1:
        nearest_text = "; ".join(
            f"{role}: {', '.join(_neighbours(bank, *one))}"
            for role, *one in zip(
                images.roles, neighbours.places, neighbours.distances, strict=True
            )
        )
    else:
        nearest_text = f"the nearest are {min(nearest):.3f} to {max(nearest):.3f} away"
    warnings = [
        f"Maps have the weights of images in the bank, not of this comparison ({nearest_text})."
    ]
    if far := [position for position, distance in enumerate(nearest) if distance > bank.usual]:
        worst = max(far, key=lambda position: nearest[position])
        comparison, position = divmod(worst, images.count)
        warnings.append(
            f"The bank has nothing like {len(far)} of {len(nearest)} images: the nearest to the "
            f"{images.roles[position]} (image {position + 1} of comparison {comparison + 1}) is "
            f"{nearest[worst]:.3f} away, while 99% of the bank's own images have another within "
            f"{bank.usual:.3f}; such a map explains something else."
        )
    height, width = images.image_size
    if (height, width) != bank.size:
        warnings.append(
            f"The bank was made from images of {bank.size[0]}x{bank.size[1]}, these are of "
            f"{height}x{width}, so its neighbours and weights may fit less well."
        )
    return tuple(warnings)


def _neighbours(bank: WeightBank, places: Tensor, distances: Tensor) -> list[str]:
    return [
        f"{bank.names[position] or bank.labels[position]} {distance:.3f}"
        for position, distance in zip(places.tolist(), distances.tolist(), strict=True)
    ][:3]
