"""A bank of grad-weights: maps without a backward pass, from images whose weights are known."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from simexplain.errors import (
    DAMAGED,
    ArgumentError,
    ComparisonError,
    ModelError,
    OutputError,
    cause_of,
)
from simexplain.models.base import SimilarityModel
from simexplain.networks import unit_rows
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
            distances, places = _distances(units, self.embeddings.to(units)).sort(stable=True)
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
        if path.exists() and not force:
            raise OutputError(
                f"'{path}' is there already; choose another file or say --force (force=True)."
            )
        metadata = {
            "schema": SCHEMA, "labels": self.labels, "names": self.names, "model": self.model,
            "layer": self.layer, "size": self.size, "usual": self.usual,
            "report": dict(self.report),
        }  # fmt: skip
        tensors = {name: getattr(self, name).cpu().contiguous() for name in _TENSORS}
        try:
            with tempfile.TemporaryDirectory(
                prefix=".simexplain-", dir=path.absolute().parent
            ) as made:
                draft = Path(made) / "draft"
                # Written here: save_file makes files that only their owner may read.
                draft.write_bytes(save(tensors, metadata={FORMAT_KEY: json.dumps(metadata)}))
                draft.replace(path)
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


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances ``(M,G)``, exact: those of a row never depend on other rows."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
