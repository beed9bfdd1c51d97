"""A loss made of weighted terms that share one forward pass of the batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.arguments import typed
from simexplain.errors import ModelError
from simexplain.losses.distributed import ProcessGroup
from simexplain.losses.inputs import check_batch, similarity_model
from simexplain.losses.rng import seeded_by
from simexplain.losses.settings import check_kind
from simexplain.models.avsl import AVSL
from simexplain.models.base import SimilarityModel
from simexplain.tracing import Trace, trace


@dataclass(frozen=True)
class Batch:
    """One forward pass of a batch, as every term of an objective sees it.

    ``M`` images are this process's own; ``N >= M`` those of all processes that train together,
    in the order of their ranks. In one process they are the same.

    Attributes:
        model: The model in training.
        images: Its own preprocessed images ``(M,3,H,W)``.
        traced: The pass of these images, traced at the layers that the terms need.
        embeddings: Rows of all processes ``(N,E)``, in the graph.
        labels: Class numbers of all processes ``(N,)``.
        masks: Where the object is, ``(M,H,W)`` in [0, 1]; NaN where an image has no mask. None
            where no image has one.
        everyone: The processes.
        generator: The only source of chance in a step; the same in all processes.
    """

    model: SimilarityModel
    images: Tensor
    traced: Trace
    embeddings: Tensor
    labels: Tensor
    masks: Tensor | None
    processes: ProcessGroup
    generator: torch.Generator

    @classmethod
    def alone(cls, model: SimilarityModel, images: Tensor, traced: Trace) -> Batch:
        """Images without labels, of this process only."""
        return cls(
            model=model,
            images=images,
            traced=traced,
            embeddings=traced.embeddings,
            labels=torch.arange(len(images), device=images.device),
            masks=None,
            processes=ProcessGroup(),
            generator=torch.Generator().manual_seed(0),
        )

    @property
    def start(self) -> int:
        """Where the images of this process start among those of all."""
        return self.processes.rank * len(self.images)

    @property
    def units(self) -> Tensor:
        """Unit rows of all processes ``(N,D)``, also of a model whose own rows are more."""
        return unit_rows(self.model, self.embeddings)


def unit_rows(model: SimilarityModel, rows: Tensor) -> Tensor:
    """Embeddings of unit length ``(M,D)`` from a model's rows ``(M,E)``.

    For AVSL those of all levels side by side, so that their squared distance is the mean of the
    levels'; any other model's rows are such embeddings.
    """
    if not isinstance(model, AVSL):
        return rows
    levels = model.unpacked(rows).embeddings
    return torch.cat(levels, dim=1) / math.sqrt(len(levels))


class Term(nn.Module, ABC):
    """One part of an objective. Its parameters, such as proxies, are trained with the model."""

    def layers(self, model: SimilarityModel) -> tuple[str, ...]:
        """The layers whose maps the term reads."""
        return ()

    def layers_for(self, model: SimilarityModel, images: Tensor) -> tuple[str, ...]:
        """Like :meth:`layers`, for images ``(M,C,H,W)`` of this size."""
        return self.layers(model)

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch, a scalar."""


@dataclass(frozen=True)
class Losses:
    """The losses of an objective for one batch.

    Attributes:
        total: The weighted sum, to call ``backward`` on.
        parts: Each term by name, before its weight, without a graph.
        embeddings: Rows of all processes ``(N,E)``, without a graph.
    """

    total: Tensor
    parts: dict[str, Tensor]
    embeddings: Tensor


class Objective(nn.Module):
    """``L = sum of weight * term`` over one forward pass (Eq. 6 of similarity attention).

    Use it in any training loop::

        objective = Objective({
            "triplet": (1.0, MetricLoss(losses.TripletMarginLoss(0.2))),
            "mining": (0.05, SimilarityMiningLoss()),
        })
        objective(model, images, labels).total.backward()

    Where several processes train together (``torch.distributed``), every term works on the
    embeddings of all. Each then needs the mean of all gradients. ``DistributedDataParallel``
    takes it only of what its own ``forward`` computes, so that the objective has to be called
    inside of it; ``objective(wrapped.module, ...)`` would leave each process its own gradient::

        class Step(nn.Module):
            def __init__(self, model, objective):
                super().__init__()
                self.model, self.objective = model, objective

            def forward(self, images, labels, seed):
                return self.objective(self.model, images, labels, seed=seed).total

        step = DistributedDataParallel(Step(model, objective))
        step(images, labels, seed).backward()
    """

    def __init__(self, terms: Mapping[str, tuple[float, Term]]) -> None:
        """Takes the terms.

        Args:
            terms: For each name, which must be an identifier, a weight and a term.

        Raises:
            ModelError: If no term is given, a name cannot be used, or a weight is not a finite
                number.
        """
        super().__init__()
        _check_terms(terms)
        self.weights = {name: float(weight) for name, (weight, _) in terms.items()}
        self.terms = nn.ModuleDict({name: term for name, (_, term) in terms.items()})
        # In a tuple, which does not make them a part of this module.
        self._known: tuple[nn.Module, SimilarityModel] | None = None

    def forward(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        masks: Tensor | None = None,
        seed: int = 0,
    ) -> Losses:
        """The loss of a batch; model modes stay as they are.

        Args:
            model: The model in training: a similarity model or any network that
                :func:`as_similarity_model` takes, compiled or in ``DataParallel`` too (neither of
                which is then made use of), but not in ``DistributedDataParallel``, see above.
            images: Preprocessed ``(M,3,H,W)``.
            labels: Class numbers ``(M,)``.
            masks: ``(M,H,W)`` in [0, 1], for terms that want them; NaN where there is none.
            seed: Of this step, for terms that draw; give every step another one.

        Raises:
            ModelError: If the shapes do not fit, or a term cannot work on this batch.
        """
        model = self._wrapped(model)
        batch = run_batch(
            model, images, labels, self._layers(model, images), masks=masks, seed=seed
        )
        parts = {name: term(batch) for name, term in self.terms.items()}
        total = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        return Losses(
            total,
            {name: part.detach() for name, part in parts.items()},
            batch.embeddings.detach(),
        )

    def _wrapped(self, model: nn.Module) -> SimilarityModel:
        """As a similarity model; the last is remembered, as looking up its layers takes a pass."""
        if self._known is None or self._known[0] is not model:
            self._known = (model, similarity_model(model))
        return self._known[1]

    def __getstate__(self) -> dict[str, Any]:
        """Without the network, of which a copy would have its own."""
        return {**self.__dict__, "_known": None}

    def _layers(self, model: SimilarityModel, images: Tensor) -> tuple[str, ...]:
        wanted: dict[str, None] = {}
        for term in self.terms.values():
            assert isinstance(term, Term)
            wanted |= dict.fromkeys(term.layers_for(model, images))
        return tuple(wanted)


def _check_terms(terms: Mapping[str, tuple[float, Term]]) -> None:
    if not isinstance(terms, Mapping) or not terms:
        raise ModelError(
            f"Expected at least one term in an objective, got {terms!r}; "
            "give {name: (weight, term)}."
        )
    for name, entry in terms.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise ModelError(f"Expected an identifier as the name of a term, got {name!r}.")
        pair = isinstance(entry, (tuple, list)) and len(entry) == 2
        if not pair or not isinstance(entry[1], Term):
            raise ModelError(
                f"Expected (weight, term) for '{name}', got {_told(entry)}; losses on embeddings "
                "become terms with MetricLoss(loss)."
            )
        check_kind(f"the weight of '{name}'", entry[0], float)


def _told(entry: object) -> str:
    if isinstance(entry, (tuple, list)):
        return f"({', '.join(type(part).__name__ for part in entry)})"
    return type(entry).__name__


def run_batch(
    model: SimilarityModel,
    images: Tensor,
    labels: Tensor,
    layers: Sequence[str],
    *,
    masks: Tensor | None = None,
    seed: int = 0,
) -> Batch:
    """The one forward pass, in the model's present modes, and what all processes know of it.

    Raises:
        ModelError: If labels or masks do not fit the images, or are not tensors.
    """
    check_batch(images, labels, masks, seed)
    processes = ProcessGroup.present()
    traced = trace(model, images, layers, differentiable=True)
    return Batch(
        model=model,
        images=images,
        traced=traced,
        embeddings=processes.gathered(traced.embeddings),
        labels=processes.gathered(labels),
        masks=masks,
        processes=processes,
        generator=torch.Generator().manual_seed(seed),
    )


class MetricLoss(Term):
    """Any loss on embeddings and labels, such as those of pytorch-metric-learning (L_ml)."""

    @typed
    def __init__(
        self, loss: Callable[..., Tensor], miner: Callable[..., Any] | None = None
    ) -> None:
        """Takes the loss.

        Args:
            loss: ``(embeddings (N,E), labels (N,), indices or None) -> scalar``; a module's
                parameters (proxies) are trained too.
            miner: ``(embeddings, labels) -> indices`` for the loss, as in pytorch-metric-learning.
        """
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, batch: Batch) -> Tensor:
        """The loss on the rows of all processes.

        Raises:
            ModelError: If the model is AVSL, whose rows are not unit vectors.
        """
        if isinstance(batch.model, AVSL):
            raise ModelError(
                "Expected AVSLLoss for an AVSL model, got a loss on plain embeddings; its rows "
                "hold several levels and their certainties."
            )
        with seeded_by(batch.generator):
            tuples = None
            if self.miner is not None:
                tuples = self.miner(batch.embeddings.detach(), batch.labels)
            return self.loss(batch.embeddings, batch.labels, tuples)
