"""Which pictures make a batch: drawn from a seed and the number of the epoch, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias, TypeVar

import numpy as np

from simexplain.arguments import typed
from simexplain.errors import ImageError

Index: TypeAlias = tuple[int, int, int]
"""Of a picture in training: the epoch, its place, and how often it came before in the epoch."""

_T = TypeVar("_T")


class _Batches(ABC):
    """What samplers have in common: the batches of an epoch, and a process's part of them."""

    rank: int
    world: int

    @property
    @abstractmethod
    def size(self) -> int:
        """Pictures in a batch of all processes."""

    @abstractmethod
    def __len__(self) -> int:
        """Batches in an epoch."""

    @abstractmethod
    def whole(self, epoch: int) -> list[list[int]]:
        """The batches of all processes together: places of pictures."""

    def batches(self, epoch: int) -> list[list[int]]:
        """The batches of this process in an epoch, places of pictures."""
        return [self._own(batch) for batch in self.whole(epoch)]

    def indices(self, epoch: int) -> list[list[Index]]:
        """:meth:`batches` as ``TrainingImages`` takes them.

        A picture that comes more than once in an epoch is another time another draw.
        """
        before: Counter[int] = Counter()
        batches = []
        for batch in self.whole(epoch):
            numbered = []
            for index in batch:
                numbered.append((epoch, index, before[index]))
                before[index] += 1
            batches.append(self._own(numbered))
        return batches

    def _own(self, batch: list[_T]) -> list[_T]:
        part = len(batch) // self.world
        return batch[self.rank * part : (self.rank + 1) * part]

    def _check_ranks(self) -> None:
        if not 0 <= self.rank < self.world or self.size % self.world:
            raise ImageError(
                f"Expected batches that {self.world} processes can share equally, got {self.size} "
                f"pictures for process {self.rank}; choose a multiple of {self.world}."
            )


@dataclass(frozen=True)
@typed
class ClassBalanced(_Batches):
    """Batches of P classes with K pictures each.

    Classes are dealt from shuffled decks of all classes, so that in an epoch no class comes twice
    more than another; so are the pictures of a class, and those of a class smaller than K are
    repeated. pytorch-metric-learning's ``MPerClassSampler`` is not used: it draws from a global
    generator, so that neither an epoch nor the middle of one could be drawn again to resume, and
    it draws the classes of each batch anew, so that some never come in an epoch.

    Attributes:
        labels: Of the pictures, in their order.
        classes: P, different classes in a batch.
        each: K, pictures of each.
        seed: Of all draws, together with the epoch.
        steps: Batches in an epoch; None for the number that draws as many pictures as the data set
            has, and each class at least once.
        rank: The number of this process...
        world: ...of how many.

    Raises:
        ImageError: If there are fewer classes than a batch needs, or a number is not possible.
    """

    labels: Sequence[Hashable]
    classes: int
    each: int
    seed: int = 0
    steps: int | None = None
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if min(self.classes, self.each) < 1 or (self.steps is not None and self.steps < 1):
            raise ImageError(
                f"Expected at least one class, picture and step, got {self.classes} classes, "
                f"{self.each} of each and {self.steps} steps."
            )
        if len(self._places) < self.classes:
            raise ImageError(
                f"Expected at least {self.classes} classes for batches of as many, got "
                f"{len(self._places)}; choose fewer classes in a batch."
            )
        self._check_ranks()

    @property
    def size(self) -> int:
        """P * K."""
        return self.classes * self.each

    def __len__(self) -> int:
        """Batches in an epoch."""
        if self.steps is not None:
            return self.steps
        return max(-(-len(self.labels) // self.size), -(-len(self._places) // self.classes))

    def of_rank(self, rank: int, world: int) -> ClassBalanced:
        """The part of one process: those of all ranks, one after the other, are the whole batch.

        Raises:
            ImageError: If a batch cannot be shared equally.
        """
        return replace(self, rank=rank, world=world)

    def whole(self, epoch: int) -> list[list[int]]:
        """The batches of all processes together: K places of one class, K of the next..."""
        draw = _generator(self.seed, epoch)
        decks = [_Deck(places, draw) for places in self._places.values()]
        classes = _Deck(range(len(decks)), draw)
        return [
            [
                index
                for number in classes.deal(self.classes)
                for index in decks[number].deal(self.each)
            ]
            for _ in range(len(self))
        ]

    @cached_property
    def _places(self) -> dict[Hashable, list[int]]:
        members: dict[Hashable, list[int]] = {}
        for index, label in enumerate(self.labels):
            members.setdefault(label, []).append(index)
        return members


@dataclass(frozen=True)
class Shuffled(_Batches):
    """Plain batches in random order, for losses without pairs; no incomplete last one.

    Attributes:
        count: How many pictures there are.
        batch_size: Of the batch of all processes.
        seed: Of all draws, together with the epoch.
        rank: The number of this process...
        world: ...of how many.

    Raises:
        ImageError: If there are fewer pictures than a batch needs.
    """

    count: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= self.count:
            raise ImageError(
                f"Expected batches of 1 to {self.count} pictures, which is all there are, got "
                f"{self.batch_size}."
            )
        self._check_ranks()

    @property
    def size(self) -> int:
        """Pictures in a batch."""
        return self.batch_size

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.count // self.batch_size

    def of_rank(self, rank: int, world: int) -> Shuffled:
        """As :meth:`ClassBalanced.of_rank`."""
        return replace(self, rank=rank, world=world)

    def whole(self, epoch: int) -> list[list[int]]:
        """The batches of all processes together."""
        order = _generator(self.seed, epoch).permutation(self.count).tolist()
        return [order[at * self.size : (at + 1) * self.size] for at in range(len(self))]


class _Deck:
    """Cards that are dealt until none is left, then shuffled again."""

    @typed
    def __init__(self, cards: Sequence[int], draw: np.random.Generator) -> None:
        self.cards, self.draw = cards, draw
        self.left: list[int] = []

    def deal(self, count: int) -> list[int]:
        """The next cards; no card twice while others are left."""
        hand: list[int] = []
        while len(hand) < count:
            if not self.left:
                order = self.draw.permutation(len(self.cards))
                self.left = [self.cards[index] for index in order]
                # Cards in the hand come last in the new deck, or a hand could hold them twice.
                held = set(hand)
                self.left.sort(key=held.__contains__)
            taken = min(count - len(hand), len(self.left))
            hand += self.left[:taken]
            del self.left[:taken]
        return hand


def _generator(seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence((seed % 2**63, epoch)))
