"""The pictures of a training run as a data set for torch's loaders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from simexplain.arguments import typed
from simexplain.data.augmenting import AUGMENTATIONS, Augmentation
from simexplain.data.folders import Record
from simexplain.data.images import read_picture
from simexplain.data.mask_files import mask_of
from simexplain.data.preprocessing import Preprocess
from simexplain.data.sampling import Index
from simexplain.errors import ImageError

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
