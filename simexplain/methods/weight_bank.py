"""Grad-CAM with weights from a bank of images whose weights are known: no backward pass."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from simexplain.arguments import typed
from simexplain.comparison import Comparison
from simexplain.errors import (
    DAMAGED,
    ArgumentError,
    ComparisonError,
    ModelError,
    OutputError,
    cause_of,
)
from simexplain.methods.cams import weighted
from simexplain.methods.method import AttentionMaps, Method, Task, check_embeddings
from simexplain.methods.pixel_methods import check_range
from simexplain.models.base import SimilarityModel
from simexplain.networks import find_layer, split_call, unit_rows
from simexplain.publishing import atomic_file, check_new_file
from simexplain.tracing import trace

FORMAT_KEY, SCHEMA = "simexplain_bank", 1
_TENSORS = ("embeddings", "weights", "probe")
_OTHER_MODEL = 1e-3


@dataclass(frozen=True)
class BankWeights:
    """What a bank has for ``M`` rows.

    Attributes:
        weights: The mean of the neighbours' grad-weights ``(M,C)``.
        places: The neighbours in the bank ``(M,k)``, the nearest first.
        distances: Euclidean distances of the unit rows ``(M,k)``, in [0, 2].
    """

    weights: Tensor
    places: Tensor
    distances: Tensor


@dataclass(frozen=True, eq=False)
class WeightBank:
    """Grad-weights of the triplet loss for many images (Chen et al. 2020, arXiv 2001.06538).

    Attributes:
        embeddings: Unit rows ``(M,E)``.
        weights: For each image the mean ``(M,C)`` of its Grad-CAM channel weights over triplets
            in which it is the anchor and the loss is not zero: minus the gradient of the loss at
            the layer's map, averaged over positions. Positive where more of a channel lowers the
            loss.
        labels: The class of each image.
        names: The picture of each image, as a path below the folder; empty for tensors.
        model: Name of the model.
        layer: The layer whose maps the weights are for.
        size: Of the images ``(height, width)``.
        probe: What the model makes of a fixed image of noise ``(E,)``, to know it by.
        usual: How far an image of the bank is from its nearest other one, see
            :func:`usual_distance`.
        report: How the bank was made, as plain JSON values.
        source: The file it was read from, if any.
    """

    embeddings: Tensor
    weights: Tensor
    labels: tuple[str, ...]
    names: tuple[str, ...]
    model: str
    layer: str
    size: tuple[int, int]
    probe: Tensor
    usual: float
    report: Mapping[str, Any]
    source: str = ""

    def __post_init__(self) -> None:
        count = len(self.embeddings)
        if (
            self.embeddings.dim() != 2
            or self.weights.dim() != 2
            or not count == len(self.weights) == len(self.labels) == len(self.names) > 0
            or self.probe.shape != self.embeddings.shape[1:]
        ):
            raise ComparisonError(
                f"Expected a row, weights, a label and a name for each image of a bank, got "
                f"{tuple(self.embeddings.shape)}, {tuple(self.weights.shape)}, {len(self.labels)} "
                f"labels and {len(self.names)} names."
            )

    def __len__(self) -> int:
        return len(self.embeddings)

    def __str__(self) -> str:
        return self.source or f"bank of {len(self)} images"

    def weights_for(self, rows: Tensor, k: int = 2) -> BankWeights:
        """The mean weights of the ``k`` nearest images of the bank; of equally near, the first.

        Args:
            rows: Embeddings ``(M,E)`` of the same model, of any length.
            k: How many; the SAM paper's comparison takes two.

        Raises:
            ComparisonError: If rows or ``k`` do not fit the bank.
        """
        if rows.dim() != 2 or rows.shape[1] != self.embeddings.shape[1]:
            raise ComparisonError(
                f"Expected rows (M,{self.embeddings.shape[1]}) for this bank, got "
                f"{tuple(rows.shape)}; embed them with the model it was made with."
            )
        if not 1 <= k <= len(self):
            raise ComparisonError(
                f"Expected neighbours between 1 and the {len(self)} images of the bank, got {k}."
            )
        with torch.no_grad():
            units = unit_rows(rows.detach())
            # Exact: those of a row never depend on other rows.
            distances = torch.cdist(
                units, self.embeddings.to(units), compute_mode="donot_use_mm_for_euclid_dist"
            )
            distances, places = distances.sort(stable=True)
            places, distances = places[:, :k], distances[:, :k]
            weights = self.weights.to(units)[places].mean(dim=1)
        return BankWeights(weights, places, distances)

    def check(self, model: SimilarityModel) -> None:
        """Refuses a model that the bank was not made with, by its name and a noise image.

        Raises:
            ModelError: If it is another model; names the expected one.
        """
        advice = "make a bank for this model with simexplain bank (build_bank)."
        if model.name != self.model:
            raise ModelError(
                f"The bank '{self}' was made with {self.model}, got {model.name}; {advice}"
            )
        try:
            probe = probe_of(model, self.size)
        except (ArgumentError, RuntimeError) as error:
            raise ModelError(
                f"The bank '{self}' was made from images of {self.size[0]}x{self.size[1]}, which "
                f"{model.name} does not take ({cause_of(error)}); {advice}"
            ) from error
        if len(probe) != len(self.probe) or (
            1 - F.cosine_similarity(probe, self.probe.to(probe), dim=0) > _OTHER_MODEL
        ):
            raise ModelError(
                f"The bank '{self}' was made with other weights of {self.model}; {advice}"
            )

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Writes one safetensors file atomically: tensors, and the rest as JSON.

        Raises:
            OutputError: If the file is there already (without ``force``) or cannot be written.
        """
        from safetensors.torch import save

        path = Path(path)
        check_new_file(path, force=force)
        metadata = {
            "schema": SCHEMA, "labels": self.labels, "names": self.names, "model": self.model,
            "layer": self.layer, "size": self.size, "usual": self.usual,
            "report": dict(self.report),
        }  # fmt: skip
        tensors = {name: getattr(self, name).cpu().contiguous() for name in _TENSORS}
        try:
            with atomic_file(path, force=force) as draft:
                # Written here: save_file makes files that only their owner may read.
                draft.write_bytes(save(tensors, metadata={FORMAT_KEY: json.dumps(metadata)}))
        except OSError as error:
            raise OutputError(f"'{path}' cannot be written ({cause_of(error)}).") from error

    @classmethod
    def load(cls, path: str | Path) -> WeightBank:
        """Reads what :meth:`save` wrote; no code in it is ever run.

        Raises:
            OutputError: If the file does not exist, is damaged, is not a bank or is of another
                version.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise OutputError(f"There is no bank '{path}'; make one with simexplain bank.")
        try:
            with safe_open(path, framework="pt") as file:
                content = (file.metadata() or {}).get(FORMAT_KEY)
                if content is None:
                    raise OutputError(
                        f"Expected a bank of grad-weights, got '{path}'; see simexplain bank."
                    )
                metadata = json.loads(content)
                if metadata["schema"] != SCHEMA:
                    raise OutputError(
                        f"'{path}' was written in schema {metadata['schema']}, but this version"
                        f" reads schema {SCHEMA}; make the bank again."
                    )
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
            height, width = metadata["size"]
            return cls(
                **tensors,
                labels=tuple(metadata["labels"]),
                names=tuple(metadata["names"]),
                model=metadata["model"],
                layer=metadata["layer"],
                size=(height, width),
                usual=float(metadata["usual"]),
                report=metadata["report"],
                source=str(path),
            )
        except (OSError, SafetensorError, *DAMAGED) as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(
                f"The bank '{path}' is damaged ({cause_of(error)}); make it again."
            ) from error


def probe_of(model: SimilarityModel, size: tuple[int, int]) -> Tensor:
    """What the model makes of fixed noise of a size ``(E,)``, a unit row."""
    rows = trace(model, model.example(size), ()).embeddings.float()
    row: Tensor = unit_rows(rows)[0]
    return row


def usual_distance(units: Tensor) -> float:
    """How far unit rows ``(M,E)`` are from their nearest other one: the 99th percentile, in [0, 2].

    Of the first 2000 rows; 2 where there is only one.
    """
    if len(units) < 2:
        return 2.0
    alike = units[:2000] @ units.T  # much quicker than distances, and close enough for a warning
    own = torch.arange(len(alike), device=alike.device)
    alike[own, own] = -1
    nearest = (2 - 2 * alike.amax(dim=1)).clamp_min(0).sqrt()
    return float(torch.quantile(nearest, 0.99))


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

    def attribute(self, task: Task) -> AttentionMaps:
        """Maps for preprocessed images, from one forward pass.

        ``weights`` are the channel weights ``(B,K,C)``; ``scores`` the sums of the maps before the
        ReLU, which with average pooling and a linear tail is what the weights make of the image's
        pooled features.

        Raises:
            ModelError: If the bank is not of this model and layer.
            ComparisonError: If the bank has fewer images than ``neighbours``.
        """
        model, images, layers, max_batch = task
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
