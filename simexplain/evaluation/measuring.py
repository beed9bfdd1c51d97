"""One explanation measured: what it cost, how faithful it is, and whether it points at masks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.comparison import Comparison, positives_of
from simexplain.data.images import Picture, read_pictures
from simexplain.data.preprocessing import Geometry, prepared
from simexplain.evaluation.faithfulness import faithfulness
from simexplain.evaluation.items import Item, read_mask
from simexplain.explanation import Explanation
from simexplain.metrics.masks import chance, energy, mean_valid, pointing
from simexplain.models.base import SimilarityModel
from simexplain.tracing import listening

METRICS = ("deletion", "insertion", "gain", "pointing", "energy")
"""What is measured; all but deletion are the better the higher."""

_AREAS = METRICS[:3]
_COARSE = 7


def _random(maps: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand((*maps.shape[:2], _COARSE, _COARSE), generator=generator)


def _centre(maps: Tensor, generator: torch.Generator) -> Tensor:
    """A hill in the middle, where photographers put things."""
    side = torch.linspace(-1, 1, 4 * _COARSE)
    hill = (-2 * (side[:, None].square() + side[None].square())).exp()
    return hill.expand(*maps.shape[:2], -1, -1)


CONTROLS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "random": _random,
    "centre": _centre,
}
"""Maps that know nothing of the network: what a method must beat."""


def controlled(sample: Explanation, control: str, seed: int) -> Explanation:
    """An explanation with the maps of a control in place of its own."""
    maps = CONTROLS[control](sample.maps, torch.Generator().manual_seed(seed))
    return replace(sample, maps=maps.to(sample.maps.device))


@dataclass(frozen=True)
class LoadedItem:
    """One comparison as tensors: what all methods are measured on.

    Attributes:
        comparison: Preprocessed images.
        masks: For the places that have one, a boolean mask ``(H0,W0)`` in the size of the picture.
        pictures: Where files are compared.
        geometries: Where the images lie in the pictures; empty where tensors are compared.
    """

    comparison: Comparison
    masks: Mapping[int, Tensor]
    pictures: tuple[Picture, ...] = ()
    geometries: tuple[Geometry, ...] = ()

    def mask(self, index: int) -> Tensor:
        """The mask of an image, in the part that the network saw."""
        return self.seen(index, self.masks[index])

    def seen(self, index: int, picture: Tensor) -> Tensor:
        """The part of a picture ``(H0,W0)`` that the network saw."""
        if not self.geometries:
            return picture
        left, top, right, bottom = self.geometries[index].box
        rows = slice(math.floor(top), math.ceil(bottom))
        return picture[rows, math.floor(left) : math.ceil(right)]

    def chances(self, tolerance: float) -> dict[str, float]:
        """What random points (``pointing``) and flat maps (``energy``) reach; {} without masks."""
        masks = [self.mask(index)[None] for index in self.masks]
        if not masks:
            return {}
        hits = torch.cat([chance(mask, tolerance) for mask in masks])
        areas = torch.cat([chance(mask) for mask in masks])
        return {"pointing": mean_valid(hits), "energy": mean_valid(areas)}


def load_item(model: SimilarityModel, item: Item) -> LoadedItem:
    """Reads the pictures and masks of an item.

    Raises:
        ImageError: If one cannot be read.
        ComparisonError: If the pictures do not fit the arrangement.
    """
    near = positives_of(
        item.arch, len(item.paths), negative=item.negative, positives=item.positives
    )
    pictures = read_pictures(item.paths)
    views, geometries = prepared(model.preprocess, pictures)
    comparison = Comparison(views[:1], views[None, 1 : 1 + near], views[None, 1 + near :])
    masks = {
        index: read_mask(path, (picture.image.height, picture.image.width))
        for index, (path, picture) in enumerate(zip(item.masks or (), pictures, strict=False))
        if path is not None
    }
    return LoadedItem(comparison, masks, tuple(pictures), tuple(geometries))


def measured(
    model: SimilarityModel,
    question: LoadedItem,
    explanation: Explanation,
    curves: Mapping[str, Any],
    *,
    tolerance: float = 0,
    max_batch: int | None = None,
) -> dict[str, tuple[float, ...]]:
    """Every metric of an explanation of one comparison, one number an image.

    Args:
        model: The model that is explained.
        question: The comparison.
        explanation: Of that comparison.
        curves: ``perturb``, ``steps`` and ``baseline`` of ``faithfulness``.
        tolerance: Of the pointing game, in pixels of the pictures.
        max_batch: Bounds the images in one forward pass.

    Returns:
        Areas of all images, one number where they are masked together; with masks ``pointing`` and
        ``energy``, NaN for images without one.
    """
    scores = faithfulness(model, question.comparison, explanation, max_batch=max_batch, **curves)
    areas = {name: tuple(getattr(scores, name)[0].tolist()) for name in _AREAS}
    if not question.masks:
        return areas
    hits = [math.nan] * question.comparison.count
    shares = list(hits)
    for index in question.masks:
        heat = torch.from_numpy(explanation.on_picture(index, raw=True)[1])
        pair = question.seen(index, heat)[None], question.mask(index)[None]
        hits[index] = float(pointing(*pair, tolerance))
        shares[index] = float(energy(*pair))
    return {**areas, "pointing": tuple(hits), "energy": tuple(shares)}


def means(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean over images of each metric; NaN where none has a value."""
    return {
        name: mean_valid(torch.tensor(values, dtype=torch.float64))
        for name, values in scores.items()
    }


def timed(
    model: SimilarityModel, explained: Callable[[], Explanation]
) -> tuple[Explanation, float, int]:
    """An explanation, its seconds, and how many images passed forward for it."""
    start = time.perf_counter()
    with counted(model.network) as passed:
        explanation = explained()
        explanation.maps.cpu()  # an accelerator may still be at work
    return explanation, time.perf_counter() - start, sum(passed)


@contextmanager
def counted(network: nn.Module) -> Iterator[list[int]]:
    """Notes how many images each forward pass through the network takes."""
    passed: list[int] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        first = args[0] if args else None
        passed.append(len(first) if isinstance(first, Tensor) else 1)

    with listening(network, {"": note}):
        yield passed
