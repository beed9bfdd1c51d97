"""The pictures of a batch as tensors, and what is to be remembered of each for all its rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from simexplain.data.images import Picture, read_picture
from simexplain.data.preprocessing import Geometry, Preprocess, prepared
from simexplain.errors import ImageError

Size = tuple[int, int]


@dataclass(frozen=True)
class Seen:
    """What a row has of a picture beside its maps.

    Attributes:
        geometry: Where the network's view lies in it.
        notes: What had to be changed when it was read.
    """

    geometry: Geometry
    notes: tuple[str, ...]


class Reader:
    """Reads pictures by their number.

    Attributes:
        preprocess: As the network expects.
        view: ``(height, width)`` that maps lie on; larger than the network's own if upscaled.
        seen: What was read so far.
        broken: What could not be read, with the reason.
    """

    def __init__(self, pictures: Sequence[Path], preprocess: Preprocess, view: Size) -> None:
        self.preprocess, self.view = preprocess, view
        self.seen: dict[int, Seen] = {}
        self.broken: dict[int, str] = {}
        self._pictures = pictures

    def picture(self, number: int) -> Picture:
        """A picture itself.

        Raises:
            ImageError: If it cannot be read.
        """
        if number in self.broken:
            raise ImageError(self.broken[number])
        try:
            return read_picture(self._pictures[number])
        except ImageError as error:
            self.broken[number] = str(error)
            raise

    def tensor(self, number: int, size: Size) -> Tensor:
        """A picture ``(3,H,W)`` of this size, as the network takes it.

        Raises:
            ImageError: If it cannot be read or is too elongated.
        """
        picture = self.picture(number)
        prepare = replace(self.preprocess, size=size)
        try:
            views, geometries = prepared(prepare, [picture])
        except ImageError as error:
            self.broken[number] = str(error)
            raise
        if size == self.view:
            self.seen[number] = Seen(geometries[0], picture.notes)
        elif number not in self.seen:
            there = replace(self.preprocess, size=self.view).geometry(geometries[0].original)
            self.seen[number] = Seen(there, picture.notes)
        return views[0]

    def readable(self, numbers: Sequence[int], size: Size) -> tuple[list[int], Tensor]:
        """Those of some pictures that can be read, and their tensors ``(M,3,H,W)``.

        Raises:
            ImageError: If none can be read.
        """
        tensors: dict[int, Tensor] = {}
        for number in numbers:
            with suppress(ImageError):  # which is in ``broken`` now
                tensors[number] = self.tensor(number, size)
        if not tensors:
            raise ImageError(self.broken[numbers[0]])
        return list(tensors), torch.stack(list(tensors.values()))
