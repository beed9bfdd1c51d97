"""Feature maps of many pictures, as often as needed, with one forward pass where memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from simexplain.data.folders import Batches
from simexplain.models.base import SimilarityModel
from simexplain.networks import at_least_single, preserve_state
from simexplain.tracing import trace

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how far it is, and how far it goes."""


class FeaturePasses:
    """Passes over the feature maps of some levels of a frozen network.

    The first pass keeps the maps while they fit into ``budget`` bytes; later passes run the network
    again only for the rest. The network is left as it was: no gradients, no modes, no statistics.
    """

    def __init__(
        self,
        model: SimilarityModel,
        batches: Batches,
        levels: Sequence[str],
        *,
        budget: int,
        progress: Progress,
    ) -> None:
        self.model, self.batches, self.levels = model, batches, tuple(levels)
        self.progress = progress
        self._budget = budget
        self._kept: list[tuple[list[int], list[Tensor]]] = []
        self._complete = False

    def __call__(self, what: str) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Yields the places of the pictures and their maps ``(M,C,h,w)`` level by level."""
        total = len(self.batches.records)
        done = 0
        for places, maps in self._maps():
            yield places, maps
            done += len(places)
            self.progress(what, done, total)

    def _maps(self) -> Iterator[tuple[list[int], list[Tensor]]]:
        kept = {index for places, _ in self._kept for index in places}
        yield from list(self._kept)
        if self._complete:
            return
        filling = not kept
        rest = [n for n in range(len(self.batches.records)) if n not in kept]
        for places, images in self.batches.over(rest):
            maps = self._run(images)
            size = sum(level.numel() * level.element_size() for level in maps)
            if filling and size <= self._budget:
                self._budget -= size
                self._kept.append((places, maps))
            else:
                filling = False
            yield places, maps
        self._complete = filling

    def _run(self, images: Tensor) -> list[Tensor]:
        with torch.no_grad(), preserve_state(self.model.network):
            maps = trace(self.model, images, self.levels, differentiable=True).maps.values()
        return [at_least_single(level) for level in maps]
