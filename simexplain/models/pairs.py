"""Models of two images: two towers that share nothing, a learned score, two input sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from simexplain.arguments import typed
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ModelError, first_line
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import Embedder, as_similarity_model
from simexplain.models.layers import Layer
from simexplain.models.preparing import assumed_preprocess
from simexplain.networks import at_least_single, preserve_state
from simexplain.tracing import trace


@final
@dataclass(frozen=True)
class PairModel:
    """A model that takes two images at once; see :func:`as_pair_model`.

    Attributes:
        first: The tower of the anchor (query, template), or the whole module where ``joint``.
        second: The tower of the other images.
        head: A module ``(f1, f2) -> scores`` on the vectors of the towers; None where embeddings
            are compared by their distance.
        joint: A module ``(x1, x2) -> scores`` on images; None where there are towers.
        name: What to call it in figures.
    """

    first: SimilarityModel
    second: SimilarityModel
    head: nn.Module | None
    joint: nn.Module | None
    name: str

    @property
    def learned(self) -> bool:
        """Whether the score is learned rather than a distance of embeddings."""
        return self.head is not None or self.joint is not None

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Evaluates all parts inside; modes and the random state are restored after it."""
        parts = (self.first.network, self.second.network, self.head, self.joint)
        with ExitStack() as stack:
            for part in parts:
                if part is not None:
                    stack.enter_context(preserve_state(part))
            yield

    def score(self, first: Tensor, second: Tensor) -> Tensor:
        """The learned score ``(M,)`` of pairs of images ``(M,C,H,W)``, in the user's modes.

        Raises:
            ModelError: If the score is not learned, or is not one number for each pair.
        """
        if self.joint is not None:
            return _one_each(self.joint(first, second), len(first))
        if self.head is None:
            raise ModelError(f"{self.name} has no learned score; compare embeddings instead.")
        vectors = self.first.vectors(first), self.second.vectors(second)
        return _one_each(self.head(*vectors), len(first))

    def given(self, side: int, other: Tensor) -> SimilarityModel:
        """The score as a model of the image on one side, the other one ``(1,C,H,W)`` held.

        Its embedding is ``(score, 1)``, so that the direction ``(1, 0)`` gives the score.

        Args:
            side: 0 for the first image, 1 for the second.
            other: The image on the other side.
        """
        return _OneSide(self, side, other)


@typed
def as_pair_model(
    first: nn.Module,
    second: nn.Module | None = None,
    *,
    head: nn.Module | None = None,
    preprocess: Preprocess | None = None,
    second_preprocess: Preprocess | None = None,
    name: str = "",
) -> PairModel:
    """A model of two images. The modules themselves are not changed.

    Three kinds are known: ``as_pair_model(query, gallery)``, two towers whose embeddings are
    compared by the first one's distance; with ``head=`` their vectors go into a learned score
    ``head(f1, f2)``, also of one tower for both, ``as_pair_model(tower, head=head)``; and
    ``as_pair_model(module)``, whose ``forward(x1, x2)`` gives the score itself.

    Args:
        first: The tower of the anchor, or the whole module.
        second: The tower of all other images; None for one tower or a whole module.
        head: A module from two batches of vectors to one score for each pair.
        preprocess: How pictures become the first input.
        second_preprocess: Likewise for the second, which may have another size; like the first's
            unless given.
        name: What to call it in figures.

    Raises:
        ModelError: If a part is not a module.
    """
    prepared = (preprocess, second_preprocess or preprocess)
    if second is None and head is None:
        whole = [
            Embedder(first, preprocess=prepare or assumed_preprocess(first)) for prepare in prepared
        ]
        return PairModel(whole[0], whole[1], None, first, name or type(first).__name__)
    towers = [
        as_similarity_model(tower, preprocess=prepare)
        for tower, prepare in zip((first, second or first), prepared, strict=True)
    ]
    title = towers[0].name if second is None else f"{towers[0].name} | {towers[1].name}"
    return PairModel(towers[0], towers[1], head, None, name or title)


def check_pair(pair: PairModel) -> None:
    """Runs a learned score once on noise, in the sizes of its inputs.

    Raises:
        ModelError: If it does not run, or gives something other than one score.
    """
    one, two = pair.first.example(), pair.second.example()
    count = pair.first.batch_size or 1
    try:
        with torch.no_grad(), pair.settled():
            pair.score(one.expand(count, -1, -1, -1), two.expand(count, -1, -1, -1))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        sizes = " and ".join("x".join(map(str, side.shape[1:])) for side in (one, two))
        raise ModelError(
            f"{pair.name} does not run on two images of {sizes} ({first_line(error).rstrip('.')}); "
            "give their sizes with --size and --second-size, or a module whose forward takes two "
            "images."
        ) from error


class _OneSide(SimilarityModel):
    """A learned score as a model of one of the two images."""

    def __init__(self, pair: PairModel, side: int, other: Tensor) -> None:
        super().__init__()
        self.pair, self.side = pair, side
        self.tower = (pair.first, pair.second)[side]
        reference = next(self.tower.parameters(), other)
        self.other = other.detach().to(reference.device, reference.dtype)
        self.name, self.preprocess = pair.name, self.tower.preprocess
        self.batch_size = None if pair.joint is None else self.tower.batch_size
        self.largest_batch = self.tower.largest_batch
        self.kept: Tensor | None = None
        if pair.joint is None:
            with torch.no_grad(), pair.settled():
                self.kept = (pair.second, pair.first)[side].vectors(self.other.clone())

    @property
    def network(self) -> nn.Module:
        """The tower of this side, or the whole module."""
        return self.tower.network

    def embed(self, images: Tensor) -> Tensor:
        """``(score, 1)`` for each image ``(M,2)``."""
        if self.kept is None:
            images = images.to(self.other.device, self.other.dtype)
            score = self._score(self.pair.joint, images, self.other)
        else:
            score = self._score(self.pair.head, self.tower.vectors(images), self.kept)
        return torch.stack((score, torch.ones_like(score)), dim=1)

    def rows_of(self, units: Tensor) -> Tensor:
        """``(score, 1)`` from what that is at unit length."""
        return units / units[..., 1:]

    def _score(self, module: Any, own: Tensor, other: Tensor) -> Tensor:
        held = other.expand(len(own), *other.shape[1:]).clone()  # it may be changed in place
        ordered = (own, held) if self.side == 0 else (held, own)
        return _one_each(module(*ordered), len(own))

    def distance(self, q: Tensor, g: Tensor) -> Tensor:
        """The negative score: smaller is closer, as for embeddings."""
        return -(q @ g.T)

    def layers_for(self, images: Tensor) -> tuple[Layer, ...]:
        """The layers that see this side's image and nothing of the other one.

        Raises:
            ModelError: If there is none.
        """
        layers = super().layers_for(images)
        if self.pair.joint is None:
            return layers
        names = [layer.name for layer in layers]
        generator = torch.Generator().manual_seed(1)
        noise = torch.rand(images.shape[1:], generator=generator)
        other = _OneSide(self.pair, self.side, torch.rand(self.other.shape, generator=generator))
        moved = [
            trace(model, sample, names).outputs
            for model, sample in (
                (self, images[:1]), (self, noise[None].to(images)), (other, images[:1])
            )
        ]  # fmt: skip
        own = [
            layer
            for layer in layers
            if not torch.equal(moved[0][layer.name][0], moved[1][layer.name][0])
            and torch.equal(moved[0][layer.name][0], moved[2][layer.name][0])
        ]
        if not own:
            raise ModelError(
                f"No layer of {self.name} sees image {self.side + 1} alone; give its towers and "
                "its head apart: as_pair_model(first, second, head=head)."
            )
        return tuple(replace(layer, default=layer is own[-1]) for layer in own)


def _one_each(scores: Any, count: int) -> Tensor:
    """One score for each pair ``(M,)``."""
    if isinstance(scores, Tensor) and scores.shape[:1] == (count,) and scores.numel() == count:
        return at_least_single(scores.reshape(count))
    shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    raise ModelError(
        f"Expected one score for each of {count} pairs from the pair model, got {shape}; pick or "
        "pool it inside the module (a response map has its maximum or its mean)."
    )
