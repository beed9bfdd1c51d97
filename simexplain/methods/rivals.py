"""For each image of a comparison: which images speak for one of its regions, and which against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from simexplain.comparison import Comparison

_ROWS = 1024


@dataclass(frozen=True)
class Rivals:
    """Members of a comparison, by their number, one entry for each of its ``K`` images.

    A region of the anchor or of a positive counts as evidence as far as it is more like the images
    on its own side than like the negatives. A region of a negative counts as far as it is its own
    and not the anchor's, which is what keeps the two apart; so do both images of a dissimilar pair.
    In a comparison without negatives, a region is measured against the
    rest of its own image.

    Attributes:
        supporting: The images a region should be like; the image itself where it is to differ.
        opposing: The images it should not be like; empty without negatives.
        places: Which member of the comparison each of the images is. Given vectors are members
            that support and oppose as a whole, but have no regions to be like.
    """

    supporting: tuple[tuple[int, ...], ...]
    opposing: tuple[tuple[int, ...], ...]
    places: tuple[int, ...]

    @property
    def unopposed(self) -> tuple[bool, ...]:
        """For each image whether its regions are measured against the rest of the image."""
        return tuple(not places for places in self.opposing)

    def directions(self, units: Tensor) -> Tensor:
        """Mean of the supporting minus mean of the opposing unit rows, for each image ``(B,K,E)``.

        Args:
            units: Of all members, ``(B,1+P+N,E)``.
        """
        against = [
            units[:, list(far)].mean(dim=1) if far else torch.zeros_like(units[:, 0])
            for far in self.opposing
        ]
        return self.support(units) - torch.stack(against, dim=1)

    def support(self, units: Tensor) -> Tensor:
        """Mean of the supporting unit rows ``(B,1+P+N,E)`` of all members, ``(B,K,E)``."""
        return torch.stack([units[:, list(near)].mean(dim=1) for near in self.supporting], dim=1)

    def matched(self, maps: Tensor) -> Tensor:
        """How much better each position finds its like among the supporting images.

        The best cosine of a position's features with any position of the supporting images, minus
        the best with any of the opposing images or, where there are none, the mean of the former.
        Zero where the supporting members are given vectors.

        Args:
            maps: Feature maps ``(B,K,C,h,w)``.

        Returns:
            ``(B,K,h,w)``, at least 0.
        """
        cells = F.normalize(maps, dim=2).flatten(3)
        matches = []
        image = {position: number for number, position in enumerate(self.places)}
        for own, members in enumerate(zip(self.supporting, self.opposing, strict=True)):
            near, far = (tuple(image[p] for p in side if p in image) for side in members)
            if not near:
                matches.append(torch.zeros_like(cells[:, own, 0]))
                continue
            found_near = _best(cells, own, near)
            against = _best(cells, own, far) if far else found_near.mean(dim=1, keepdim=True)
            matches.append((found_near - against).relu())
        return torch.stack(matches, dim=1).view(*maps.shape[:2], *maps.shape[-2:])


def rivals_of(images: Comparison) -> Rivals:
    """Who speaks for and against the regions of each image of a comparison."""
    count = images.positives.shape[1]
    near = tuple(range(1, 1 + count))
    far = tuple(range(1 + count, 1 + count + images.negatives.shape[1]))
    supporting = (near or (0,), *((0,) for _ in near), *((position,) for position in far))
    opposing = (far, *(far for _ in near), *((0,) for _ in far))
    return Rivals(
        supporting=tuple(supporting[position] for position in images.places),
        opposing=tuple(opposing[position] for position in images.places),
        places=images.places,
    )


def _best(cells: Tensor, own: int, others: tuple[int, ...]) -> Tensor:
    """The highest cosine of each position of one image with any of some others, ``(B,h*w)``."""
    tops = []
    for other in others:
        # Not all pairs of positions at once: on a fine grid they would not fit into memory.
        parts = torch.split(cells[:, own], _ROWS, dim=2)
        best = [_nearest(part, cells[:, other]) for part in parts]
        tops.append(torch.cat(best, dim=1))
    return torch.stack(tops).amax(dim=0)


def _nearest(part: Tensor, others: Tensor) -> Tensor:
    """The largest product of each cell ``(B,C,p)`` with any of the others ``(B,C,r)``: ``(B,p)``.

    Comparison by comparison, since a batched product may round them differently than one alone.
    """
    return torch.stack([(a.T @ b).amax(dim=1) for a, b in zip(part, others, strict=True)])
