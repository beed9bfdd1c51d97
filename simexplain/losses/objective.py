"""A loss made of weighted terms that share one forward pass of the batch, over all processes."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, distributed, nn

from simexplain.arguments import typed
from simexplain.errors import ModelError, SimexplainError
from simexplain.models.avsl import AVSL
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model
from simexplain.tracing import Trace, trace


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a training run; this one alone without others.

    Attributes:
        rank: The number of this process.
        world: How many there are.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def present(cls) -> ProcessGroup:
        """The process group that is running now, or this process alone."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def gathered(self, own: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """The rows of all processes one after the other, differentiable.

        Where every process computes the same loss from them and gradients of parameters are
        averaged, as DDP does, training is the same as that of one process with the whole batch.
        Every process must then go through the same ``backward``.

        Args:
            own: ``(m,...)`` of this process.
            counts: How many rows each process has, where they differ.

        Returns:
            ``(sum of m,...)``.
        """
        if self.world == 1:
            return own
        most = max(counts) if counts is not None else len(own)
        missing = most - len(own)
        padded = torch.cat((own, own.new_zeros(missing, *own.shape[1:]))) if missing else own
        if counts is not None and torch.is_grad_enabled() and not padded.requires_grad:
            # A process without rows must still take part in the backward pass of the others.
            padded = padded.requires_grad_()
        parts = list(_Gathered.apply(padded.contiguous()))
        if counts is not None:
            parts = [part[:count] for part, count in zip(parts, counts, strict=True)]
        return torch.cat(parts)

    def mean(self, own: Tensor) -> Tensor:
        """The mean over all processes, without a gradient."""
        if self.world == 1:
            return own.detach()
        total = own.detach().clone()
        distributed.all_reduce(total)
        return total / self.world


class _Gathered(torch.autograd.Function):
    """Rows of all processes. The backward pass all-reduces the gradients."""

    @staticmethod
    def forward(_: object, own: Tensor) -> tuple[Tensor, ...]:
        parts = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, own)
        return tuple(parts)

    @staticmethod
    def backward(_: object, *slopes: Tensor) -> Tensor:
        total = torch.stack(slopes)
        distributed.all_reduce(total)
        return total[distributed.get_rank()]


@contextmanager
def seeded_by(generator: torch.Generator) -> Iterator[None]:
    """Seeds PyTorch's global random state by a generator inside the block, and restores it.

    The miners of pytorch-metric-learning draw from the global state. It differs between processes,
    which would then not compute the same loss, and between a run and its resumption.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def safe_sqrt(squared: Tensor) -> Tensor:
    """The square root, with gradient 0 instead of infinity where a distance is 0."""
    return squared.clamp_min(1e-12).sqrt()


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


_KINDS = {float: "a finite number", int: "a whole number", bool: "true or false", str: "a name"}


def check_kind(
    name: str, value: object, kind: Any, error: type[SimexplainError] = ModelError
) -> None:
    """Refuses a value of another kind than the setting's.

    Args:
        name: Of the setting.
        value: What was given.
        kind: Its type: ``float``, which whole numbers are too, ``int``, ``bool`` or ``str``, or
            such a type or None. Any other type is not looked at.
        error: What to raise.

    Raises:
        SimexplainError: Of the kind ``error``, if it is of another kind or not finite.
    """
    kinds = get_args(kind) or (kind,)
    known = [one for one in kinds if one in _KINDS]
    if not known or (value is None and type(None) in kinds):
        return
    if not any(_is(value, one) for one in known):
        what = " or ".join(_KINDS[one] for one in known)
        raise error(f"Expected {name} to be {what}, got {value!r}; give it such a value.")


def _is(value: object, kind: type) -> bool:
    if kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value)  # type: ignore[arg-type]
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def check_settings(name: str, factory: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuses settings that a loss does not have, or of another kind than it wants.

    Args:
        name: Of the loss.
        factory: Makes it; its keyword-only parameters are the settings.
        given: The settings. Where the value is a list or tuple, each of its parts is looked at.

    Raises:
        ModelError: If there is one.
    """
    known = [
        parameter.name
        for parameter in inspect.signature(factory).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    if unknown := [setting for setting in given if setting not in known]:
        raise ModelError(
            f"Expected settings of loss '{name}' among {', '.join(known)}, got {unknown[0]!r}."
        )
    hints = get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    for setting, value in given.items():
        for part in value if isinstance(value, (list, tuple)) else (value,):
            check_kind(f"{setting} of loss '{name}'", part, hints.get(setting))


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
        return unit_embeddings(self.model, self.embeddings)


def unit_embeddings(model: SimilarityModel, rows: Tensor) -> Tensor:
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
                f"Expected (weight, term) for '{name}', got {_types(entry)}; losses on embeddings "
                "become terms with MetricLoss(loss)."
            )
        check_kind(f"the weight of '{name}'", entry[0], float)


def _types(entry: object) -> str:
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
