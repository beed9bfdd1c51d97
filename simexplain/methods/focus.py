"""The regions on which a comparison turns, found in one forward pass: simexplain's own method."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from simexplain.arguments import typed
from simexplain.comparison import Comparison
from simexplain.errors import ComparisonError, ModelError
from simexplain.methods.cams import (
    at_grid,
    finest_grid,
    fuse,
    layer_cam,
    layer_cams,
    unit_scaled,
    weighted,
)
from simexplain.methods.kinds import LEAST_SIDE, SMALL, kind_of, layers_for
from simexplain.methods.method import AttentionMaps, Method, Task, check_embeddings
from simexplain.methods.raw_vectors import trace_vectors
from simexplain.metrics.curves import gaussian
from simexplain.models.base import SimilarityModel
from simexplain.models.frames import FrameSets, present_frames, split_frames
from simexplain.models.moving import WHOLE, Region
from simexplain.networks import at_least_single, unit_rows
from simexplain.tracing import Trace

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

    def matched(self, maps: Tensor, counts: Sequence[int] = ()) -> Tensor:
        """How much better each position finds its like among the supporting images.

        The best cosine of a position's features with any position of the supporting images, minus
        the best with any of the opposing images or, where there are none, the mean of the former.
        Zero where the supporting members are given vectors.

        Args:
            maps: Feature maps ``(B,K,C,h,w)``.
            counts: How many of them belong to each image, frame by frame; one unless given.

        Returns:
            ``(B,K,h,w)``, at least 0.
        """
        counts = counts or (1,) * maps.shape[1]
        parts = torch.split(F.normalize(maps, dim=2), list(counts), dim=1)
        cells = [part.movedim(1, 2).flatten(2) for part in parts]
        matches = []
        image = {position: number for number, position in enumerate(self.places)}
        for own, members in enumerate(zip(self.supporting, self.opposing, strict=True)):
            near, far = (tuple(image[p] for p in side if p in image) for side in members)
            if not near:
                matches.append(torch.zeros_like(cells[own][:, 0]))
                continue
            found_near = _best(cells, own, near)
            against = _best(cells, own, far) if far else found_near.mean(dim=1, keepdim=True)
            matches.append((found_near - against).relu())
        return torch.cat(matches, dim=1).view(*maps.shape[:2], *maps.shape[-2:])


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


def _best(cells: Sequence[Tensor], own: int, others: tuple[int, ...]) -> Tensor:
    """The highest cosine of each position of one image with any of some others, ``(B,h*w)``."""
    tops = []
    for other in others:
        # Not all pairs of positions at once: on a fine grid they would not fit into memory.
        parts = torch.split(cells[own], _ROWS, dim=2)
        best = [_nearest(part, cells[other]) for part in parts]
        tops.append(torch.cat(best, dim=1))
    return torch.stack(tops).amax(dim=0)


def _nearest(part: Tensor, others: Tensor) -> Tensor:
    """The largest product of each cell ``(B,C,p)`` with any of the others ``(B,C,r)``: ``(B,p)``.

    Comparison by comparison, since a batched product may round them differently than one alone.
    """
    return torch.stack([(a.T @ b).amax(dim=1) for a, b in zip(part, others, strict=True)])


class Shots:
    """Which maps of a pass are of which image: one of each, or those of the frames of each set.

    A frame is scored as an image is, against what the sets beside its own have as vectors. It finds
    its like in any of their frames, and all frames of a set are on one scale.
    """

    def __init__(self, images: Comparison, sets: FrameSets | None = None) -> None:
        """Takes a comparison of images, or of sets of frames as tall images.

        Args:
            images: The comparison.
            sets: The model of its sets.
        """
        self.images, self.sets = images, sets
        self.flat = images.stacked().flatten(0, 1)
        self.counts = (1,) * images.count
        if sets is not None:
            frames = split_frames(self.flat, sets.frames)
            self.present = present_frames(frames)
            self.flat = frames[self.present]
            self.counts = tuple(self.present[: images.count].sum(dim=1).tolist())

    def units(self, rows: Tensor) -> Tensor:
        """The unit rows ``(B,K,E)`` of the images from those of what the network saw ``(M,E)``."""
        if self.sets is None:
            return self.images.restacked(rows)
        return self.images.restacked(unit_rows(torch.stack(
            [self.sets.pooled(own) for own in torch.split(rows, self._each)]
        )))  # fmt: skip

    def directions(self, directions: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Those of what the network saw ``(M,E)``, and how much each frame counts in its set.

        A frame is scored along the dimensions in which the pooled vector follows it.

        Args:
            directions: Of the images ``(B,K,E)``.
            rows: Unit rows of what the network saw ``(M,E)``.
        """
        flat = directions.flatten(0, 1)
        if self.sets is None:
            return flat, None
        along, counts = [], []
        for own, direction in zip(torch.split(rows, self._each), flat, strict=True):
            with torch.enable_grad():
                own = own.detach().requires_grad_()
                (share,) = torch.autograd.grad(self.sets.pooled(own).sum(), own)
            along.append(direction * share / share.amax(dim=0))
            lengths = along[-1].norm(dim=1)
            counts.append(lengths / lengths.max().clamp_min(1e-30))
        return torch.cat(along), torch.cat(counts).view(-1, 1, 1)

    def repeated(self, values: Tensor) -> Tensor:
        """What there is of each image ``(B,K,...)`` for all that the network saw ``(M,...)``."""
        flat = values.flatten(0, 1)
        if self.sets is None:
            return flat
        return flat.repeat_interleave(torch.tensor(self._each, device=flat.device), dim=0)

    def level(self, cells: Tensor) -> Tensor:
        """The mean over all positions of an image, for each of its maps ``(M,1,1)``."""
        if self.sets is None:
            return cells.mean(dim=(1, 2), keepdim=True)
        means = [own.mean().expand(len(own)) for own in torch.split(cells, self._each)]
        return torch.cat(means).view(-1, 1, 1)

    def scaled(self, maps: Tensor) -> Tensor:
        """Maps ``(M,h,w)`` divided by the largest absolute value of any map of their image."""
        if self.sets is None:
            return unit_scaled(maps)
        sides = maps.shape[-1]
        tall = [own.reshape(-1, sides) for own in torch.split(maps, self._each)]
        return torch.cat([unit_scaled(own) for own in tall]).view(maps.shape)

    def stacked(self, maps: Tensor) -> Tensor:
        """Maps ``(M,h,w)`` as those of the images ``(B,K,h,w)``, of a set below each other."""
        if self.sets is None:
            return self.images.restacked(maps)
        frames = maps.new_zeros((*self.present.shape, *maps.shape[1:]))
        frames[self.present] = maps
        return self.images.restacked(frames.flatten(1, 2))

    @property
    def _each(self) -> list[int]:
        return list(self.counts) * self.images.batch


_APART = 1e-3
"""The sine between an image and its support from which on their cosine has a gradient to show."""


@dataclass(frozen=True)
@typed
class Focus(Method):
    """Position by position: more like the images on its own side than like those on the other?

    1. At the coarsest layer every position ``p`` with features ``A_p`` is compared by itself. With
       ``d`` the mean of the unit embeddings that support the image minus those that oppose it
       (``rivals_of``), and ``alpha`` the gradient of ``d . v`` there, averaged over positions, its
       evidence is ``c_p = |d| cos(alpha, A_p)``; for average pooling alone ``d . A_p / |A_p|``.
       Unlike in Grad-CAM, a position that speaks for the other side cannot be drawn along by the
       length of its features. Without opposing images ``c`` is measured from its mean.
    2. The gradient of ``sum_p softplus(contrast c_p) |A_p|`` carries that to finer layers
       (LayerCAM): one backward pass, in which each position counts by the sigmoid of its evidence.
    3. The maps of the finer layers are multiplied with each other, with ``sigmoid(contrast c)``
       and with ``1 + matching m``, where ``m`` is how much better a position finds its like in the
       supporting images than in the opposing ones (``Rivals.matched``), scaled to one.
    4. A Gaussian moves maxima from contours into the regions they surround, and decides where the
       map has its peak: smoothed and raised to the power ``peak``, it is low all around.
    5. Below the peak the product itself is more informative: ``detail (product^2 +
    like^2)^(sharpness/2)``,
       where ``like`` is the cosine with the supporting images as Grad-CAM shows it at the coarsest
       layer, times LayerCAM at the next; it is zero where an image supports itself.

    One forward pass serves all images; gradients go down to the finest of the layers. Where the
    coarsest map has too few positions to be compared one by one, a second pass shows the network
    larger images. The documentation ("Focus") has its derivation and results.

    Attributes:
        contrast: Steepness of softplus and sigmoid, per unit of cosine.
        matching: Weight of the matched positions; 0 leaves that factor out.
        smoothing: Standard deviation of the Gaussian as a share of the side of the map; 0 for none.
        sharpness: The power of the product.
        peak: The power of the smoothed product.
        detail: Weight of the former beside the latter; 0 leaves a smooth map.
        positions: The least shorter side of the coarsest map: where it has fewer positions, images
            are enlarged before the network, if that takes them, until it has so many; 1 for never.
    """

    joined: ClassVar[str] = "focus"

    contrast: float = 20.0
    matching: float = 3.0
    smoothing: float = 0.07
    sharpness: float = 3.0
    peak: float = 16.0
    detail: float = 0.1
    positions: int = LEAST_SIDE

    def __post_init__(self) -> None:
        positive = all(0 < v < math.inf for v in (self.contrast, self.sharpness, self.peak))
        least_zero = all(0 <= v < math.inf for v in (self.matching, self.detail))
        sensible = 0 <= self.smoothing <= 0.5 and 1 <= self.positions <= 64
        if not (positive and least_zero and sensible):
            values = ", ".join(f"{name} {value}" for name, value in asdict(self).items())
            raise ComparisonError(
                "Expected contrast, sharpness and peak above 0, matching and detail of at least 0, "
                "all finite, smoothing between 0 and 0.5 and positions between 1 and 64, got "
                f"{values}."
            )

    def layers_for(self, model: SimilarityModel, images: Tensor) -> tuple[str, ...] | None:
        """The last layer of each of the three coarsest resolutions, where there are so many."""
        return layers_for(model, images) or None

    def attribute(self, task: Task) -> AttentionMaps:
        """Maps on the grid of the finest layer; evidence is taken at the one with fewest positions.

        Of several with so few, at the last.
        """
        model, images, layers, max_batch = task
        sets = model if isinstance(model, FrameSets) else None
        shots = Shots(images, sets)
        base = model if sets is None else sets.base
        traced = trace_vectors(
            base, shots.flat, layers, max_batch=max_batch, middle=False,
            by_rows=base.of_tokens(layers, shots.flat),
        ).trace  # fmt: skip
        return self.follow(base, shots, traced, max_batch=max_batch)

    def follow(
        self,
        model: SimilarityModel,
        shots: Shots,
        traced: Trace,
        *,
        max_batch: int | None = None,
    ) -> AttentionMaps:
        """Maps from a pass, or from one more on larger images where its coarsest map is too small.

        Args:
            model: What was run.
            shots: The images that it saw.
            traced: As for :meth:`attend`.
            max_batch: Bounds the images of one forward pass.
        """
        layers, flat = traced.layers, shots.flat
        grids = [(maps.shape[-2], maps.shape[-1]) for maps in traced.maps.values()]
        if kind_of(grids, self.positions) is SMALL:
            rows, columns = min(grids, key=min)
            factor = self.positions / min(rows, columns)
            size = [round(side * factor) for side in flat.shape[-2:]]
            larger = F.interpolate(flat, size=size, mode="bilinear", align_corners=False)
            try:
                again = trace_vectors(model, larger, layers, max_batch=max_batch, middle=False)
                regions = model.regions(layers, larger)
                followed = self.attend(again.trace, shots, regions)
            except (ModelError, RuntimeError):  # it takes images of its own size alone
                return self.attend(traced, shots, model.apart(layers, flat))
            own = shots.units(unit_rows(at_least_single(traced.embeddings.detach())))
            note = (
                f"Focus saw the images enlarged by {factor:.3g}, since at their own size the "
                f"coarsest of its maps has only {rows}x{columns} positions."
            )
            return replace(followed, embeddings=own, warnings=(*followed.warnings, note))
        return self.attend(traced, shots, model.apart(layers, flat))

    def attend(self, traced: Trace, shots: Shots, apart: Sequence[Region] = ()) -> AttentionMaps:
        """Maps from a pass that has been made already, without a graph.

        Args:
            traced: A trace of ``shots.flat`` up to the vectors that are explained, not normalised,
                as ``trace_vectors`` makes it with ``middle=False``.
            shots: Tells which image has which role; its values are not read.
            apart: Where in the joined map each layer's own lies; all over it unless given.
        """
        layers, images = traced.layers, shots.images
        places = dict(zip(layers, apart or (WHOLE,) * len(layers), strict=True))
        vectors = at_least_single(traced.embeddings.detach())
        units = shots.units(unit_rows(vectors))
        check_embeddings(units, images.roles)
        rivals = rivals_of(images)
        members = images.joined(units)
        directions = rivals.directions(members)
        along, counts = shots.directions(directions, unit_rows(vectors))
        sizes = {layer: maps.shape[-2:].numel() for layer, maps in traced.maps.items()}
        order = sorted(layers, key=lambda layer: (sizes[layer], -layers.index(layer)))
        parts = [places[layer] for layer in order]
        cells, evidence = _evidence(traced, order, along, rivals.unopposed, self.contrast, shots)
        like = torch.zeros_like(cells)
        if self.detail:
            support = shots.repeated(rivals.support(members))
            like = _likeness(traced, order[:2], support, parts[:2], shots)
        with torch.no_grad():
            middle = at_least_single(traced.maps[order[min(1, len(order) - 1)]])
            middle = middle.view(images.batch, -1, *middle.shape[1:])
            matched = rivals.matched(middle, shots.counts).flatten(0, 1)
            cams = [evidence[layer] for layer in order[1:] or order]
            if counts is not None:
                cams[0], like = cams[0] * counts, like * counts
            joined = self._joined(cams, cells, matched, like, parts, shots.scaled)
        return AttentionMaps(
            maps=shots.stacked(joined),
            layer_maps={layer: shots.stacked(evidence[layer]) for layer in layers},
            weights=directions,
            scores=(units * directions).sum(dim=2),
            embeddings=units,
            warnings=(),
        ).detached()

    def _joined(
        self,
        cams: Sequence[Tensor],
        cells: Tensor,
        matched: Tensor,
        like: Tensor,
        parts: Sequence[Region],
        scaled: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """One map ``(M,h,w)`` from those of the layers and the scores of the positions.

        ``parts`` tell where in it each layer lies, the coarsest first.
        """
        top, middle = parts[0], parts[min(1, len(parts) - 1)]
        own_parts = parts[1:] or parts
        grid = finest_grid(cams, own_parts)
        first, *finer = (
            at_grid(scaled(cam), grid, part) for cam, part in zip(cams, own_parts, strict=True)
        )
        gate = torch.sigmoid(self.contrast * at_grid(cells, grid, top))
        own = first * gate * (1 + self.matching * scaled(at_grid(matched, grid, middle)))
        product = math.prod(finer, start=own)
        blurred = math.prod((scaled(self._smoothed(cam)) for cam in finer), start=own)
        smooth = scaled(self._smoothed(scaled(blurred)))
        detail = scaled(product).square() + scaled(at_grid(like, grid)).square()
        joined = smooth**self.peak + self.detail * scaled(detail) ** (self.sharpness / 2)
        return scaled(joined)

    def _smoothed(self, maps: Tensor) -> Tensor:
        """Maps ``(M,h,w)`` under the Gaussian; nothing is taken to lie beyond their borders."""
        if self.smoothing == 0:
            return maps
        sigma = self.smoothing * math.sqrt(maps.shape[-2:].numel())
        rows, columns = (gaussian(side, sigma) for side in maps.shape[-2:])
        # Cut off, not renormalised, at the borders: the same divisor for all rows of weights.
        down, along = (weights / weights.sum(dim=1).amax() for weights in (rows, columns))
        down, along = down.to(maps), along.T.to(maps)
        # One by one, since a product over several maps may round each of them differently.
        return torch.stack([down @ one @ along for one in maps])


def _evidence(
    traced: Trace,
    order: Sequence[str],
    directions: Tensor,
    unopposed: tuple[bool, ...],
    contrast: float,
    shots: Shots,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The ``c`` of every position of the coarsest layer ``(M,h,w)``, and the map of every layer."""
    top, *finer = order
    alone = shots.repeated(torch.tensor(unopposed).repeat(shots.images.batch, 1))
    with torch.enable_grad():
        maps = {layer: at_least_single(grid) for layer, grid in traced.maps.items()}
        margin = (at_least_single(traced.embeddings) * directions).sum()
        slope = at_least_single(traced.at([top]).gradients(margin)[top])
        alpha = unit_rows(slope.mean(dim=(2, 3)))
        cosines = weighted(alpha, F.normalize(maps[top], dim=1))
        cells = cosines * directions.norm(dim=1).to(cosines).view(-1, 1, 1)
        level = shots.level(cells.detach())
        cells = cells - level * alone.to(level).view(-1, 1, 1)
        evidence = F.softplus(contrast * cells) * maps[top].detach().norm(dim=1)
        gradients = traced.at(finer).gradients(evidence.sum()) if finer else {}
    # Some layers have values of both signs: only what is there can be evidence.
    cams = {
        name: layer_cam(maps[name].detach().relu(), at_least_single(gradients[name]))
        for name in finer
    }
    return cells.detach(), {top: evidence.detach(), **cams}


def _likeness(
    traced: Trace, layers: Sequence[str], support: Tensor, parts: Sequence[Region], shots: Shots
) -> Tensor:
    """Where an image is like those on its own side ``(M,h,w)``, non-negative.

    Grad-CAM of the cosine at the first of the layers, times LayerCAM at the second. Zero where the
    cosine is as large as it can be: there its gradient is rounding alone.

    Args:
        traced: The pass.
        layers: The coarsest and the next, or one.
        support: The mean unit embedding of the supporting images ``(M,E)``.
        parts: Where in the joined map each of the layers lies.
        shots: Which maps are of which image.
    """
    with torch.enable_grad():
        units = unit_rows(at_least_single(traced.embeddings))
        cosines = (units * support).sum(dim=1)
        gradients = traced.at(layers).gradients(cosines.sum())
    with torch.no_grad():
        rest = support - cosines.unsqueeze(1) * units
        cams = layer_cams(
            {layer: at_least_single(traced.maps[layer]) for layer in layers},
            {layer: at_least_single(gradients[layer]) for layer in layers},
            None,
            scale=(rest.norm(dim=1) > _APART).to(units),
            keep_negative=False,
        )
        return fuse(list(cams.values()), parts, shots.scaled)
