"""What a network is trained on: random views of pictures, and which of them make a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, TypeAlias, TypedDict, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import functional as F

from simexplain.arguments import typed
from simexplain.data.folders import Record, mask_of
from simexplain.data.images import read_picture
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ImageError


@dataclass(frozen=True)
class Augmentation:
    """How training views are drawn. Lengths are shares of the input's, so that they fit any size.

    In this order: resize, crop, rotate with scale and shift, flip, pad and crop, erase.

    Attributes:
        about: What it does, in a line.
        source: Where that comes from.
        resize: Sides after the first resize, over the input's; None for the network's own
            preprocessing, with nothing drawn before a flip.
        keep_aspect: That resize is of the shorter side alone.
        crop_scale: Share of the area that a crop keeps, drawn from this range, after which it is
            resized to the input; None for no such crop.
        crop_ratio: Range of its width over its height.
        rotate: Largest angle in degrees, either way.
        zoom: Range of the scale.
        shift: Largest shift over the side, either way.
        flip: How often left and right are swapped.
        pad: Border on all sides, over the input's height, from which the input is cropped again.
        erase: How often a rectangle is set to the mean colour. The mask stays as it is there.
        erase_scale: Range of its area over the input's.
        erase_ratio: Range of its width over its height.
    """

    about: str
    source: str
    resize: float | None = 1.0
    keep_aspect: bool = False
    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    rotate: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    shift: float = 0.0
    flip: float = 0.0
    pad: float = 0.0
    erase: float = 0.0
    erase_scale: tuple[float, float] = (0.02, 0.4)
    erase_ratio: tuple[float, float] = (0.3, 1 / 0.3)

    def fixed(
        self, picture: Image.Image, mask: NDArray[np.uint8] | None, prepare: Preprocess
    ) -> tuple[Tensor, Tensor | None]:
        """What does not depend on chance, to be kept: image ``(3,h,w)``, mask ``(h,w)``, uint8.

        Args:
            picture: Upright RGB.
            mask: ``(H,W)`` of the picture, 255 where the object is, or None.
            prepare: The network's preprocessing.

        Raises:
            ImageError: If the picture is too elongated for the network's own preprocessing.
        """
        if self.resize is None:
            tensor, geometry = prepare(picture)
            image = torch.from_numpy(prepare.undo(tensor)).movedim(-1, -3)
            if mask is None:
                return image, None
            # Level by level of the mask, which is hard nearly everywhere, as the view sees it.
            seen = np.zeros(geometry.size, np.uint8)
            for level in np.unique(mask):
                seen[geometry.from_original(mask == level)] = level
            return image, torch.from_numpy(seen)
        height, width = (round(self.resize * side) for side in prepare.size)
        wanted = [min(height, width)] if self.keep_aspect else [height, width]
        how = InterpolationMode(prepare.interpolation)
        resized = torch.from_numpy(np.array(F.resize(picture, wanted, how))).movedim(-1, -3)
        if mask is None:
            return resized, None
        plane = F.resize(Image.fromarray(mask), wanted, InterpolationMode.BILINEAR)
        return resized, torch.from_numpy(np.array(plane))

    def drawn(
        self, image: Tensor, mask: Tensor | None, prepare: Preprocess, seeds: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """One random view.

        Args:
            image: Of :meth:`fixed`.
            mask: Of :meth:`fixed`.
            prepare: The network's preprocessing.
            seeds: Non-negative numbers that determine the view; the random state of torch is left
                as it was.

        Returns:
            The network's input ``(3,H,W)``, normalised, and the mask ``(H,W)`` in [0, 1], NaN
            where there is none.
        """
        index, late = _steps(self, prepare.size)
        with _seeded(seeds):
            if mask is None:
                view = index(tv_tensors.Image(image))
                plane = torch.full(prepare.size, torch.nan)
            else:
                view, moved = index(tv_tensors.Image(image), tv_tensors.Mask(mask))
                plane = moved.as_subclass(Tensor).float() / 255
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (prepare.mean, prepare.std))
            tensor = (view.as_subclass(Tensor).float() / 255 - mean) / std
            return late(tensor), plane


@lru_cache(maxsize=64)
def _steps(options: Augmentation, size: tuple[int, int]) -> tuple[v2.Transform, v2.Transform]:
    """What is drawn: on picture and mask, and on the normalised picture alone."""
    steps: list[v2.Transform] = []
    if options.crop_scale is not None:
        steps.append(v2.RandomResizedCrop(size, options.crop_scale, options.crop_ratio))
    if options.rotate or options.shift or options.zoom != (1.0, 1.0):
        turn = v2.RandomAffine(
            degrees=options.rotate,
            translate=(options.shift, options.shift),
            scale=options.zoom,
            interpolation=InterpolationMode.BILINEAR,
        )
        # On white: torchvision mixes black into the edge of what it fills, which shows on white,
        # and is right on a negative. Masks have no negative and are left alone.
        negative = v2.RandomInvert(1.0)
        steps += [negative, turn, negative]
    if options.flip:
        steps.append(v2.RandomHorizontalFlip(options.flip))
    if options.pad:
        steps.append(v2.RandomCrop(size, padding=round(options.pad * size[0])))
    late: v2.Transform = v2.Identity()
    if options.erase:
        late = v2.RandomErasing(options.erase, options.erase_scale, options.erase_ratio)
    return v2.Compose(steps) if steps else v2.Identity(), late


@contextmanager
def _seeded(seeds: tuple[int, ...]) -> Iterator[None]:
    """Random draws of torch that depend on these numbers alone.

    The CPU's generator only: seeding torch as a whole would also seed the devices.
    """
    before = torch.get_rng_state()
    state = np.random.SeedSequence(seeds).generate_state(1, np.uint64)
    torch.default_generator.manual_seed(int(state[0]) >> 1)
    try:
        yield
    finally:
        torch.set_rng_state(before)


_LIGHT = Augmentation(
    "rotation, scale, shift and flip on white, no change of colour",
    "simexplain, for drawings and objects that are cut out: nearly all of them stays in view",
    rotate=15.0,
    zoom=(0.8, 1.2),
    shift=0.1,
    flip=0.5,
)

AUGMENTATIONS: dict[str, Augmentation] = {
    "avsl": Augmentation(
        "squashed to a square, random part of any shape, flip",
        "AVSL, section 4.2: resized to 256x256, random reshaping, flip, crop to 224x224; ranges of "
        "the part from the transforms of GeDML, which its official code runs with",
        resize=256 / 224,
        crop_scale=(0.16, 1.0),
        crop_ratio=(0.75, 1.33),
        flip=0.5,
    ),
    "sam": Augmentation(
        "random part of any shape, flip",
        "similarity attention (SAM) gives none; its section 4.1 follows Wang et al. (2019), whose "
        "official code resizes the shorter side to 256 and crops 16 to 100 % of the area to 227",
        resize=256 / 224,
        keep_aspect=True,
        crop_scale=(0.16, 1.0),
        flip=0.5,
    ),
    "light": _LIGHT,
    "erased": replace(
        _LIGHT,
        about="as light, and a rectangle erased",
        source="simexplain, for pictures of which a part may be hidden; the rectangle is that of "
        "reid",
        erase=0.5,
    ),
    "reid": Augmentation(
        "squashed to the input, flip, shift by padding, a rectangle erased",
        "Luo et al. (2019), Bag of tricks, section 3, at 256x128 with a border of 10; PCB (Sun et "
        "al., 2018), which SAM trains for persons, takes 384x128 and the flip alone",
        flip=0.5,
        pad=10 / 256,
        erase=0.5,
    ),
    "pcb": Augmentation(
        "squashed to the input, flip",
        "PCB (Sun et al., 2018), section 4.2: 384x128 and the flip alone",
        flip=0.5,
    ),
    "none": Augmentation(
        "the network's own preprocessing, as in evaluation",
        "what the model was evaluated with",
        resize=None,
    ),
}
"""Random views for training, by name. At an input of 224 their sizes are those of their sources."""


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


_MB = 2**20


class Sample(TypedDict):
    """One picture as the loaders collate it.

    Attributes:
        image: The network's input ``(3,H,W)``.
        label: The number of its class.
        mask: ``(H,W)`` in [0, 1], where the object is; NaN without a mask.
        place: Of the picture among the records.
    """

    image: Tensor
    label: int
    mask: Tensor
    place: int


class TrainingImages(Dataset[Sample]):
    """Augmented pictures with label and mask, by ``(epoch, place, repetition)``.

    A sample depends on its index and the seed alone: not on the process that reads it, nor on what
    was read before. Give ``ClassBalanced.indices`` to a loader as its ``batch_sampler``.

    Attributes:
        classes: All labels, sorted; the place of one is its number.
    """

    @typed
    def __init__(
        self,
        records: Sequence[Record],
        augmentation: str | Augmentation,
        preprocess: Preprocess,
        seed: int = 0,
        *,
        cache_mb: float = 512.0,
        classes: Sequence[str] | None = None,
    ) -> None:
        """Takes the pictures; opens none.

        Args:
            records: With labels.
            augmentation: A name in ``AUGMENTATIONS``, or one's own.
            preprocess: As the network expects.
            seed: Of all draws.
            cache_mb: Memory for pictures that are decoded and resized already, in all processes of
                a loader together; 0 for none.
            classes: All labels in the order of their numbers, if not those of the records.

        Raises:
            ImageError: If a record has no label, or the augmentation does not exist.
        """
        if isinstance(augmentation, str):
            if augmentation not in AUGMENTATIONS:
                raise ImageError(
                    f"Expected augmentation to be one of {', '.join(AUGMENTATIONS)}, got "
                    f"'{augmentation}'."
                )
            augmentation = AUGMENTATIONS[augmentation]
        labels = [record.label for record in records]
        known = {label for label in labels if label is not None}
        self.classes = tuple(sorted(known) if classes is None else classes)
        numbers = {label: number for number, label in enumerate(self.classes)}
        wrong = next((r for r in records if r.label not in numbers), None)
        if wrong is not None:
            raise ImageError(f"'{wrong.path}' has no label among the classes to train on.")
        self.records, self.augmentation, self.preprocess = tuple(records), augmentation, preprocess
        self.labels = [numbers[label] for label in labels if label is not None]
        self.seed, self.cache_mb = seed, cache_mb
        self._kept: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Index) -> Sample:
        """One sample.

        Args:
            index: The epoch, the place of the picture, and how often it came before in the epoch.

        Raises:
            ImageError: If the picture or its mask cannot be read.
        """
        epoch, position, repetition = index
        image, mask = self._fixed(position)
        seeds = (self.seed % 2**63, epoch, position, repetition)
        tensor, plane = self.augmentation.drawn(image, mask, self.preprocess, seeds)
        return {"image": tensor, "label": self.labels[position], "mask": plane, "place": position}

    def _fixed(self, index: int) -> tuple[Tensor, Tensor | None]:
        if index in self._kept:
            return self._kept[index]
        record = self.records[index]
        picture = read_picture(record.path).image
        mask = mask_of(record, (picture.height, picture.width))
        view = self.augmentation.fixed(picture, mask, self.preprocess)
        size = sum(tensor.numel() for tensor in view if tensor is not None)
        worker = get_worker_info()
        bound = self.cache_mb * _MB / (worker.num_workers if worker else 1)
        if self._bytes + size <= bound:
            self._kept[index] = view
            self._bytes += size
        return view

    def __getstate__(self) -> dict[str, Any]:
        """Without the kept pictures, which another process reads itself."""
        return {**self.__dict__, "_kept": {}, "_bytes": 0}
