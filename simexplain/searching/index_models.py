"""The model behind an index: whether it is the same, and exact neighbours by its distance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ComparisonError, ModelError, cause_of
from simexplain.models.avsl import AVSL
from simexplain.models.base import DISTANCES, SimilarityModel
from simexplain.models.embedder import as_similarity_model
from simexplain.tracing import trace

_OTHER = 1e-3
"""Difference of two answers to the same image, relative to their length, that rounding explains."""


@dataclass(frozen=True)
class Identity:
    """What a model is known by.

    Attributes:
        name: What it is called; two models may share it, and one may have several.
        weights: A digest of its tensors, and of the graph's options for AVSL.
        preprocess: How it wants its pictures.
        probe: What it makes of a fixed image of noise ``(E,)``, on the CPU.
    """

    name: str
    weights: str
    preprocess: Preprocess
    probe: Tensor

    @classmethod
    def of(cls, model: SimilarityModel) -> Identity:
        """Reads all weights once and runs the model on one image."""
        return cls(model.name, weights_of(model), model.preprocess, _answer(model))

    def check(self, model: SimilarityModel, where: str) -> None:
        """Refuses a model that is not this one.

        Args:
            model: Any.
            where: The index, for the error.

        Raises:
            ModelError: If weights, preprocessing or outputs differ; names which.
        """
        advice = "give that model, or index the gallery again with this one (--force)."
        theirs, ours = _steps(model.preprocess), _steps(self.preprocess)
        name = next((key for key in ours if ours[key] != theirs[key]), "")
        prepared_otherwise = name and model.name == self.name
        if not prepared_otherwise and weights_of(model) != self.weights:
            raise ModelError(
                f"'{where}' was made with {self.name} and other weights than this {model.name} "
                f"has (--fast changes them as well); {advice}"
            )
        if name:
            raise ModelError(
                f"'{where}' was made from pictures prepared with {name} {_text(ours[name])}, got a "
                f"model with {_text(theirs[name])}; {advice}"
            )
        try:
            probe = _answer(model)
        except RuntimeError as error:
            raise ModelError(
                f"'{where}' was made with {self.name}, but this {model.name} does not take images "
                f"of {model.preprocess.size[0]}x{model.preprocess.size[1]} ({cause_of(error)}); "
                f"{advice}"
            ) from error
        if probe.shape != self.probe.shape or not bool(
            (probe - self.probe).norm() <= _OTHER * self.probe.norm()
        ):
            raise ModelError(
                f"'{where}' was made with {self.name}, which embeds the same image differently "
                f"from this {model.name}; {advice}"
            )


def weights_of(model: SimilarityModel) -> str:
    """A digest of all parameters and buffers, their names, types and shapes.

    Programs without named tensors have those of their parameters, or none at all; they are
    distinguished by their output for a fixed image.
    """
    digest = hashlib.blake2b(digest_size=16)
    tensors = dict(model.state_dict())
    if not tensors:  # black boxes name none
        tensors = {str(number): tensor for number, tensor in enumerate(model.parameters())}
    for name, tensor in sorted(tensors.items()):
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        plain = tensor.detach().cpu().contiguous()
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    if isinstance(model, AVSL):
        graph = {key: value for key, value in model.to_json().items() if key != "report"}
        digest.update(json.dumps(graph, sort_keys=True).encode())
    return digest.hexdigest()


def _answer(model: SimilarityModel) -> Tensor:
    """What the model makes of a fixed image of noise ``(E,)``."""
    rows = trace(model, model.example(), ()).embeddings
    return rows[0].detach().float().cpu()


def _steps(preprocess: Preprocess) -> dict[str, Any]:
    """The fields that change the tensor, without those that only describe it."""
    return {k: v for k, v in vars(preprocess).items() if k not in ("source", "notes")}


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


Distance = Callable[[Tensor, Tensor], Tensor]

_PAIRS = 2**21
_SPARE = 32
_ROUNDING = 2.0**-24


def distance_name_of(model: SimilarityModel, width: int) -> str:
    """The name in ``DISTANCES`` of what a model computes on unit rows; empty for anything else."""
    if isinstance(model, AVSL):
        return ""
    drawn = torch.randn((6, width), generator=torch.Generator().manual_seed(0))
    units = torch.nn.functional.normalize(drawn, dim=1)
    own = model.distance(units[:2], units[2:])
    for name, distance in DISTANCES.items():
        known = distance(units[:2], units[2:])
        if own.shape == known.shape and torch.allclose(own.float(), known, atol=1e-5):
            return name
    return ""


@torch.no_grad()
def nearest(
    gallery: Tensor, query: Tensor, k: int, name: str = "", model: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest rows of a gallery, exact; of equal distances the smaller row first.

    Args:
        gallery: ``(G,E)``, float32, perhaps mapped into memory.
        query: ``(Q,E)``.
        k: From 1 to ``G``.
        name: A name in ``DISTANCES``, unless a model has its own.
        model: Whose distance counts; needed where the name is empty.

    Returns:
        Distances ``(Q,k)`` and rows ``(Q,k)``, on the CPU.

    Raises:
        ComparisonError: If queries or ``k`` do not fit.
        ModelError: If a model is needed, or faiss is missing.
    """
    if query.dim() != 2 or query.shape[1] != gallery.shape[1]:
        raise ComparisonError(
            f"Expected queries (Q,{gallery.shape[1]}) for this index, got {tuple(query.shape)}; "
            "embed them with the model that it was made with."
        )
    if not 1 <= k <= len(gallery):
        raise ComparisonError(
            f"Expected k between 1 and the {len(gallery)} pictures of the index, got {k}."
        )
    if not bool(query.isfinite().all()):
        raise ModelError("Expected finite embeddings of queries, got NaN or infinity.")
    wrapped = None if model is None else as_similarity_model(model)
    query = query.detach().cpu()
    if isinstance(wrapped, AVSL):
        reference = next(wrapped.heads.parameters())
        neighbours = wrapped.neighbours(query.to(reference), gallery.to(reference), k)
        return neighbours.distances.cpu(), neighbours.indices.cpu()
    name = name if wrapped is None else distance_name_of(wrapped, gallery.shape[1])
    if name:
        return _by_faiss(gallery, query.float(), k, name)
    if wrapped is None:
        raise ModelError(
            "The distance of this index is the model's own; give the model as well (model=)."
        )
    return _by_blocks(gallery, query, k, wrapped.distance)


def _by_faiss(gallery: Tensor, query: Tensor, k: int, name: str) -> tuple[Tensor, Tensor]:
    """By flat search in faiss, and the distances of what it proposes once more in float64.

    Its own round: ``|q|^2 + |g|^2 - 2 q.g`` is off by up to four sums of ``E`` products. So it
    proposes more than ``k``, until none that it left out can be as near as the ``k``-th.
    """
    faiss = _faiss()
    inner = name == "cosine"
    metric = faiss.METRIC_INNER_PRODUCT if inner else faiss.METRIC_L2
    rows, vectors = gallery.numpy(), query.contiguous().numpy()
    longest = torch.linalg.vector_norm(gallery, dim=1).amax()
    lengths = torch.linalg.vector_norm(query, dim=1).maximum(longest)
    slack = 4 * (gallery.shape[1] + 8) * _ROUNDING * lengths.double().square()
    distances = torch.empty(len(query), k)
    indices = torch.empty(len(query), k, dtype=torch.long)
    open_, size = torch.arange(len(query)), min(len(gallery), 2 * k + _SPARE)
    while len(open_):
        proposed, listed = faiss.knn(vectors[open_.numpy()], rows, size, metric=metric)
        last = torch.from_numpy(proposed)[:, -1].double()
        bounds = (1 - last if inner else last) - slack[open_]
        proven = []
        for row, candidates, bound in zip(open_.tolist(), listed, bounds, strict=True):
            some = torch.from_numpy(candidates).sort().values
            exact = _PRECISE[inner](query[row].double(), gallery[some].double())
            order = exact.argsort(stable=True)[:k]
            distances[row], indices[row] = _NAMED[name](exact[order]), some[order]
            proven.append(size == len(gallery) or bool(exact[order[-1]] < bound))
        open_, size = open_[~torch.tensor(proven)], min(len(gallery), 4 * size)
    return distances, indices


_PRECISE: dict[bool, Distance] = {
    True: lambda q, g: 1 - (q * g).sum(dim=1),
    False: lambda q, g: (q - g).square().sum(dim=1),
}
"""Of one query and rows in float64: by products or by squares; equal rows give equal numbers."""

_NAMED: dict[str, Callable[[Tensor], Tensor]] = {
    "euclidean": torch.sqrt,
    "squared": torch.clone,
    "cosine": torch.clone,
}
"""From those to each distance in ``DISTANCES``."""


def _by_blocks(gallery: Tensor, query: Tensor, k: int, distance: Distance) -> tuple[Tensor, Tensor]:
    """Any distance: all of them, a block of the gallery at a time."""
    step = max(1, _PAIRS // max(1, len(query)))
    best, indices = torch.empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.long)
    for start in range(0, len(gallery), step):
        block = gallery[start : start + step].to(query)
        here = distance(query, block).cpu()
        rows = torch.arange(start, start + len(block)).expand(len(query), -1)
        best, indices = torch.cat((best.to(here), here), dim=1), torch.cat((indices, rows), dim=1)
        order = best.argsort(dim=1, stable=True)[:, :k]
        best, indices = best.gather(1, order), indices.gather(1, order)
    return best, indices


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ModelError(
            "Searching an index needs faiss, which is not installed; pip install "
            "'simexplain[search]'."
        ) from error
    return faiss
