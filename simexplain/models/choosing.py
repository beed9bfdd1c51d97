"""From a survey to layers: which outputs are maps over the image, the default and the stages."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from simexplain.errors import ModelError
from simexplain.models.layers import GridHints, Layer, Layout
from simexplain.models.moving import PARTS, WHOLE, Likeness, Moved, Region
from simexplain.models.orders import orders_of, tokens_of
from simexplain.surveying import Input, LayerRun, Source, Survey, gradient_through

STAGES = 4
_MUCH = 0.3
_MOST_OFFSETS = 1024
_MOST_PREFIX = 16
_MOST_COLOURS = 3
_STATED, _LATEST, _KNOWN, _HALVED, _BESIDE, _ORDERED, _PART, _SHAPED = range(8)
_TIERS = (
    (0.2, 1.7, 0.02),
    (0.5, 3.0, 0.05),
    (0.5, 3.0, 0.05),
    (0.5, 3.5, 0.1),
    (0.6, 2.6, 0.1),
    (0.6, 3.5, 0.1),
    (0.75, 3.5, 0.2),
    (0.75, 3.5, 0.2),
)
"""What a layout must reach: likeness, its multiple of chance, and slope; guesses need more.

Where the graph states the layout it need only be borne out: LeViT's last 4x4 tokens, each of which
looks far around, reach 0.33, and as many that all look at the same 0.06; of outputs that everything
passes and that are no maps, none in the matrix reaches more than 0.13. Other
sequences of the networks in the matrix that are maps reach 0.55 at the least, sums over as many
clusters as there are cells 0.4 at most.
"""
_TWO_AXES = (0.35, 2.5, 0.02)
"""What is enough where a tensor has the two axes of a known grid, which clusters have not."""
_CLEAR, _CHANCE, _INNER = 0.1, 0.8, 1.5
"""How much more cells must follow all that lies before them than their own place to be no map.

The second is over the root of the number of cells, of which few correlate with much by chance, the
third a factor for what not everything passes. On 8 x 12 cells that is 0.18, where sums along an
axis reach 0.36 and a convolution over them 0.22; on 4 x 4 it is 0.3, where LeViT's last map, each
token of which looks far around, reaches 0.21.
"""
_POOLING = tuple(
    kind
    for kind in vars(nn.modules.pooling).values()
    if isinstance(kind, type) and kind.__module__ == nn.modules.pooling.__name__
)

_INSIDE = re.compile(r"\.\w*(attn|attention)\w*\.", re.IGNORECASE)
"""The name of a layer inside a module of attention."""

SINGLE_NUMBER = (
    "The embedding is a single number, which is 1 or -1 at unit length, so nothing in it can be "
    "explained; pick the vector before it with output=, or make a score of two images a pair model."
)
Grid = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Map:
    """A layer whose output is a map over the image."""

    run: LayerRun
    layout: Layout

    @property
    def cells(self) -> int:
        """How many there are."""
        return self.layout.grid[0] * self.layout.grid[1]


class Maps:
    """Finds the layout of every output, proven by what its cells respond to."""

    def __init__(self, survey: Survey, moved: Moved, hints: GridHints) -> None:
        """Takes a survey of ``moved.pictures``."""
        self.likeness = Likeness(moved.parts)
        height, width = moved.pictures.shape[2:]
        self.size = (int(height), int(width))
        self.grids: dict[Grid, Region] = {}
        base = hints.base_grid(self.size)
        if base is not None:
            known = (run.cells for run in survey.runs if run.cells is not None)
            alike = (cells.region(self.size) for cells in known if cells.grid == base)
            self.grids[base] = next(alike, WHOLE)
        self.lengths = {
            run.output.shape[axis]
            for run in survey.runs
            for kind, axis in (("NLC", 1), ("LNC", 0))
            if kind in run.responses
        }
        self.doubted: dict[str, Grid] = {}
        self._known: dict[object, Layout | None] = {}
        self._exact: dict[tuple[Grid, Region], Region] = {}
        self._latest: dict[tuple[str, int], Layout] = {}
        self.candidates: list[Map] = []
        for run in survey.runs:
            layout = self._remembered(run)
            if layout is None:
                self._doubt(run)
            else:
                self.candidates.append(Map(run, layout))

    def _remembered(self, run: LayerRun) -> Layout | None:
        if run.same not in self._known:
            self._known[run.same] = self._layout(run)
        return self._known[run.same]

    def _layout(self, run: LayerRun) -> Layout | None:
        if run.moves:
            return None
        layout = self._stated(run)
        if layout is None or run.cells is None or not run.cells.sure:
            layout = self._proven(run, layout)
        if layout is None:
            return None
        if len(layout.kind) > 3:
            self.grids.setdefault(layout.grid, layout.region)
        else:
            self._latest[layout.kind, layout.tokens] = layout
        return layout

    def _stated(self, run: LayerRun) -> Layout | None:
        """The layout that the graph of the network states."""
        cells = run.cells
        if cells is None:
            return None
        region = cells.region(self.size)
        exact = cells.region(self.size, stretched=False)
        self._exact.setdefault((cells.grid, region), exact)
        return Layout(cells.kind, cells.grid, cells.count, cells.tokens, region)

    def _doubt(self, run: LayerRun) -> None:
        """Keeps in mind a sequence that could be a map by its length alone."""
        tokens = {int(r.shape[1]) for kind, r in run.responses.items() if kind in ("NLC", "LNC")}
        grids = {r.shape[1:] for kind, r in run.responses.items() if kind in ("NCHW", "NHWC")}
        for grid in self._halved() if run.main else ():
            if (grid[0] * grid[1] in tokens or grid in grids) and grid[0] * grid[1] > 3:
                self.doubted[run.name] = grid

    def _proven(self, run: LayerRun, known: Layout | None) -> Layout | None:
        """The layout whose cells follow the picture best, of the likeliest tier that has one."""
        best: tuple[int, float, Layout] | None = None
        for tier, layout, responses in self._proposed(run, known):
            if best is not None and tier > best[0]:
                break
            exact = self._exact.get((layout.grid, layout.region), layout.region)
            # Above what padding shifts, layers may look elsewhere again.
            likeness, slope = max(self.likeness(responses, r) for r in {exact, layout.region})
            two_axes = tier <= _KNOWN and len(layout.kind) > 3
            least, chance, least_slope = _TWO_AXES if two_axes else _TIERS[tier]
            least = max(least, chance / math.sqrt(3 * layout.grid[0] * layout.grid[1]))
            if likeness < least or slope < least_slope:
                continue
            clear = _CLEAR + _CHANCE / math.sqrt(layout.grid[0] * layout.grid[1])
            wanted = likeness + clear * (1 if run.main else _INNER)
            if wanted < 1 and self.likeness.of_earlier(responses, exact) > wanted:
                continue
            if best is None or likeness > best[1] + 1e-6:
                best = (tier, likeness, layout)
        return None if best is None else best[2]

    def _proposed(
        self, run: LayerRun, known: Layout | None
    ) -> Iterator[tuple[int, Layout, NDArray[np.float64]]]:
        """Layouts in tiers, the likeliest first; those derived from the graph come first."""
        changes = {kind: each.double().cpu().numpy() for kind, each in run.responses.items()}
        if known is not None and known.kind in changes:
            flat = changes[known.kind].reshape(PARTS, -1)[:, known.places.numpy()]
            yield _STATED, known, flat.reshape(PARTS, *known.grid)
        for kind, responses in changes.items():
            if kind in ("NCHW", "NHWC"):
                grid = (int(responses.shape[1]), int(responses.shape[2]))
                # Nothing whose sides are numbers of tokens: attention weights are such tables.
                if grid in self._halved() or not self.lengths.intersection(grid):
                    for tier, region in self._regions(grid):
                        yield tier, Layout(kind, grid, grid[0] * grid[1], (), region), responses
            elif kind in ("NLC", "LNC"):
                for tier, layout in self._sequences(kind, int(responses.shape[1])):
                    flat = responses[:, layout.places.numpy()]
                    yield tier, layout, flat.reshape(len(flat), *layout.grid)

    def _regions(self, grid: Grid) -> Iterator[tuple[int, Region]]:
        """Where a map may lie: as a known grid of its size, over the image, or on a part of it."""
        if grid in self.grids:
            yield _KNOWN, self.grids[grid]
        if self._fits(grid) and not _rimmed(grid, self.grids.get(grid, WHOLE)):
            yield _KNOWN, WHOLE
        for region in self._parts_of(grid):
            yield _PART, region

    def _parts_of(self, grid: Grid) -> Iterator[Region]:
        for (rows, columns), region in list(self.grids.items()):
            seen = region == WHOLE or _rimmed((rows, columns), region)
            if not seen or (grid[0] == rows) == (grid[1] == columns):
                continue
            down, right = rows - grid[0], columns - grid[1]
            if min(down, right) < 0 or (down + 1) * (right + 1) > _MOST_OFFSETS:
                continue
            for top in range(down + 1):
                for left in range(right + 1):
                    ends = (
                        top / rows,
                        left / columns,
                        (top + grid[0]) / rows,
                        (left + grid[1]) / columns,
                    )
                    yield _within(region, ends)

    def _sequences(self, kind: str, tokens: int) -> Iterator[tuple[int, Layout]]:
        """How a sequence may be laid out, in tiers, the likeliest first."""
        if (kind, tokens) in self._latest:
            yield _LATEST, self._latest[kind, tokens]
        halved = self._halved()
        for grid, region in halved.items():
            if grid[0] * grid[1] == tokens:
                tier = _KNOWN if grid in self.grids else _HALVED
                yield tier, Layout(kind, grid, tokens, (), region)
        for grid, region in self.grids.items():
            beside = tokens - grid[0] * grid[1]
            if 0 < beside <= 3 * grid[0] * grid[1] and grid[0] * grid[1] > 1:
                for prefix in range(beside, -1, -1) if beside <= _MOST_PREFIX else (beside, 0):
                    cells = tokens_of(grid[0] * grid[1], prefix)
                    yield _BESIDE, Layout(kind, grid, tokens, cells, region)
                middle = grid[0] * grid[1] // 2
                for split in {middle, grid[0] * grid[1] - middle} if beside <= _MOST_PREFIX else ():
                    cells = tokens_of(grid[0] * grid[1], beside, split)
                    yield _BESIDE, Layout(kind, grid, tokens, cells, region)
        for grid, region in halved.items():
            if grid[0] * grid[1] == tokens:
                for order in orders_of(grid):
                    cells = tokens_of(tokens, order=order)
                    yield _ORDERED, Layout(kind, grid, tokens, cells, region)
        for rows, columns in list(self.grids):
            for grid in {(tokens // columns, columns), (rows, tokens // rows)}:
                if grid[0] * grid[1] == tokens and min(grid) > 1:
                    for region in self._parts_of(grid):
                        yield _PART, Layout(kind, grid, tokens, (), region)
        yield from self._shaped(kind, tokens)

    def _shaped(self, kind: str, tokens: int) -> Iterator[tuple[int, Layout]]:
        """Grids with the shape of the image, for networks that cut patches without convolutions."""
        for beside in range(_MOST_PREFIX):
            for grid in _factors(tokens - beside):
                if self._fits(grid):
                    for prefix in {beside, 0}:
                        cells = tokens_of(grid[0] * grid[1], prefix) if beside else ()
                        yield _PART + (beside > 0), Layout(kind, grid, tokens, cells)

    def _halved(self) -> dict[Grid, Region]:
        """The known grids and their halves, rounded down and up."""
        grids: dict[Grid, Region] = dict(self.grids)
        for (rows, columns), region in self.grids.items():
            for times in (2, 4, 8):
                for up in (0, times - 1):
                    grid = ((rows + up) // times, (columns + up) // times)
                    if grid[0] * grid[1] > 1:
                        grids.setdefault(grid, region)
        return grids

    def _fits(self, grid: Grid) -> bool:
        """Whether ``(h,w)`` has the shape of the image and is not finer than its pixels."""
        (h, w), (height, width) = grid, self.size
        return h <= height and w <= width and abs(h * width - w * height) <= max(height, width)


def _within(region: Region, part: Region) -> Region:
    """A part of a region, given as shares of it, as shares of the image."""
    top, left, bottom, right = region
    high, wide = bottom - top, right - left
    return top + part[0] * high, left + part[1] * wide, top + part[2] * high, left + part[3] * wide


def _rimmed(grid: Grid, region: Region) -> bool:
    """Whether a grid lies on the image but for less than a cell at each side."""
    gaps = [abs(end - whole) for end, whole in zip(region, WHOLE, strict=True)]
    return region != WHOLE and all(
        gap * cells < 1 for gap, cells in zip(gaps, grid * 2, strict=True)
    )


def _factors(cells: int) -> Iterator[Grid]:
    for rows in range(1, cells + 1):
        if cells % rows == 0 and cells > 1:
            yield rows, cells // rows


def usable_layers(
    survey: Survey,
    maps: Sequence[Map],
    size: tuple[int, int],
    measure: Callable[[str], float],
    compare: Callable[[str], float],
) -> tuple[Layer, ...]:
    """The layers of a survey that feed the embedding from more than one place of the image.

    A layer whose patch tokens the embedding ignores (the last block of a network that reads only
    its class token) would give an empty map and is left out.

    Args:
        survey: From :func:`~simexplain.surveying.survey`.
        maps: Its outputs that are maps over the image.
        size: ``(height, width)`` of the image.
        measure: Gives the share of the embedding that bypasses a layer.
        compare: The same from pictures that never change, for choices.

    Raises:
        ModelError: If there is none; the error has the reason.
    """
    usable = [candidate for candidate in maps if candidate.cells > 1 and feeds(candidate)]
    if not usable or survey.embedding.numel() == 1:
        raise ModelError(_why_none(survey, maps))
    candidates = _without_last_pooling(usable, size)
    chosen = _default(survey, candidates, compare)
    stages = [_named(stage, candidates, survey.runs) for stage in _stages(chosen, candidates)]
    chosen = _named(chosen, candidates, survey.runs)
    return tuple(
        _layer(one, size, measure, default=one is chosen, stage=one in stages) for one in usable
    )


def is_picture(one: Map, size: tuple[int, int]) -> bool:
    """Whether a layer gives the picture itself, perhaps with other means and deviations."""
    channels = one.run.output.shape[one.layout.channels]
    return one.layout.grid == size and channels <= _MOST_COLOURS


def _without_last_pooling(usable: Sequence[Map], size: tuple[int, int]) -> Sequence[Map]:
    """What a person would choose from.

    Not the picture itself, the pooling that ends a network, nor attention's inside. Pooling between
    other layers is as good as they are.
    """
    usable = [one for one in usable if not is_picture(one, size)] or usable
    outside = [one for one in usable if not _INSIDE.search(f".{one.run.name}")] or usable
    pools = {one.run.same for one in outside if isinstance(one.run.module, _POOLING)}
    rest = [position for position, one in enumerate(outside) if one.run.same not in pools]
    if not rest:
        return outside
    last = max([position for position in rest if outside[position].run.main] or rest)
    # What parts into ways of its own resolution starts from a pooled map as from any other.
    parted = any(
        outside[position].cells < outside[last].cells for position in rest if position > last
    )
    return [
        one
        for position, one in enumerate(outside)
        if not isinstance(one.run.module, _POOLING) or position < last or parted
    ]


def _layer(
    candidate: Map,
    size: tuple[int, int],
    measure: Callable[[str], float],
    *,
    default: bool,
    stage: bool,
) -> Layer:
    (height, width), (h, w) = size, candidate.layout.grid
    top, left, bottom, right = candidate.layout.region
    return Layer(
        candidate.run.name,
        type(candidate.run.module).__name__,
        (int(candidate.run.output.shape[candidate.layout.channels]), h, w),
        (height * (bottom - top) / h, width * (right - left) / w),
        default=default,
        stage=stage,
        region=candidate.layout.region,
        measure=None if candidate.run.main and not candidate.layout.beside else measure,
    )


def feeds(candidate: Map) -> bool:
    """Whether the embedding depends on the cells of a map."""
    gradient = candidate.run.gradient
    grid = None if gradient is None else candidate.layout(gradient)
    return grid is not None and bool(grid.ne(0).any())


def _default(survey: Survey, candidates: Sequence[Map], measure: Callable[[str], float]) -> Map:
    """The last map that everything passes; where none is, the one that least bypasses."""
    main = [one for one in candidates if one.run.main]
    if not main:
        last = {one.run.name.partition(".")[0]: one for one in candidates}
        shares = {name: measure(one.run.name) for name, one in last.items()}
        least = min(shares.values())
        return next(last[name] for name in reversed(last) if shares[name] <= least + 1e-6)
    later = candidates[candidates.index(main[-1]) + 1 :]
    # What a layer is called with may be what everything passes, though no layer returned it.
    for number in reversed(range(len(later))):
        source = later[number].run.source
        if source is not None and (deepest := _deepest(source, later[number:])):
            return deepest
    last_main = main[-1]
    if not last_main.layout.beside:
        return last_main
    return _deepest(last_main.run, later, last_main.layout) or last_main


def _deepest(
    lower: LayerRun | Source, later: Sequence[Map], layout: Layout | None = None
) -> Map | None:
    """The last map that all cells of something lower feed, though a class token bypasses it.

    In the last block of a network that reads its class token, that is what goes into attention.

    Args:
        lower: A tensor that everything passes.
        later: Maps above it, in order of execution.
        layout: That of the tensor, or None for that of the first of these.
    """
    best = None
    layout = layout or later[0].layout
    if lower.gradient is None or (own := layout(lower.gradient)) is None:
        return None
    for one in later:
        if one.layout != layout or one.run.output.shape != lower.gradient.shape:
            continue
        gradient = gradient_through(one.run, lower)
        through = None if gradient is None else layout(gradient)
        if through is not None and float((through - own).norm()) <= 1e-3 * float(own.norm()):
            best = one
    return best


def _stages(default: Map, candidates: Sequence[Map]) -> list[Map]:
    """The last map of each resolution that everything passes, or blocks spread over the depth."""
    if not any(one.run.main for one in candidates):
        return [default]  # others may lie beside it, where joining them means nothing
    main = [one for one in candidates if one.run.main and not _inside_coarser(one, candidates)]
    stages = [default]
    for one in reversed(main):
        if one.cells > stages[0].cells:
            stages.insert(0, one)
    if len(stages) > 1:
        return stages[-STAGES:]
    same = [
        one
        for one in main or candidates
        if one.run.same != default.run.same and one.cells == default.cells
    ]
    numbered = [one for one in same if one.run.name.rpartition(".")[2].isdigit()]
    numbered = numbered or [one for one in same if one.run.name[-1].isdigit()]  # as torchvision's
    numbered.append(default)
    chosen = {round((len(numbered) - 1) * (n + 1) / STAGES) for n in range(STAGES)}
    return [numbered[position] for position in sorted(chosen)]


def _inside_coarser(one: Map, candidates: Sequence[Map]) -> bool:
    """Whether a map lies inside a block that ends coarser, and so belongs to the next stage.

    A module with more than two resolutions and much of the network inside is not a block.
    """
    for name in _around(one.run.name):
        ends = [each for each in candidates if each.run.name == name]
        if not ends or ends[-1].cells >= one.cells or type(ends[-1].run.module) is nn.Sequential:
            continue
        inside = [each.cells for each in candidates if name in _around(each.run.name)]
        if len(set(inside)) <= 2 or len(inside) < _MUCH * len(candidates):
            return True
    return False


def _plain(one: Map) -> str:
    """The name of a layer without the number of its call."""
    return one.run.name.partition("@")[0]


def _around(name: str) -> set[str]:
    """The names of all modules that contain this one."""
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


def _named(chosen: Map, candidates: Sequence[Map], runs: Sequence[LayerRun]) -> Map:
    """The same map under the name a person would give it: ``layer4``, not ``layer4.1.act2``."""
    same = [one for one in candidates if one.run.same == chosen.run.same]
    # The module that made the map and those around it, not what passes it on unchanged.
    maker = same[0].run.name
    around = {maker, *_around(maker)}
    same = [one for one in same if one.run.name in around or _plain(one) in around]
    return min(
        reversed(same),
        key=lambda one: (
            isinstance(one.run.module, nn.Identity),
            _is_umbrella(one.run, runs),
            one.run.name.count("."),
        ),
    )


def _is_umbrella(run: LayerRun, runs: Sequence[LayerRun]) -> bool:
    """True for a container of stages at several resolutions, such as ``features``."""
    sizes = {
        other.output.shape[-2:] if other.output.dim() == 4 else other.output.shape[1:2]
        for other in runs
        if other.name.rpartition(".")[0] == run.name
    }
    return len(sizes) > 1


def _why_none(survey: Survey, maps: Sequence[Map]) -> str:
    """Why no layer can carry a heatmap, in one sentence."""
    start = "The model has no layer with a map over the image that feeds the embedding"
    if not bool(survey.embedding.ne(0).any()):
        return (
            "The embedding is the zero vector, so nothing in it can be explained; look for dead or "
            "missing weights, or a factor of zero in the model's forward."
        )
    if survey.embedding.numel() == 1:
        return SINGLE_NUMBER
    if reason := _why_no_gradient(survey, maps):
        return start + reason
    if any(run.moves for run in survey.runs) and not maps:
        return (
            f"{start}: the network computes from each image which part of it to look at, so its "
            "layers lie elsewhere in every image; use a method on pixels such as occlusion."
        )
    several = [
        run for run in survey.runs if run.output.dim() == 4 and len(run.output) > survey.images
    ]
    if several and not maps:
        return (
            f"{start}: layer '{several[0].name}' gives {len(several[0].output)} maps of one image, "
            "which the model cuts or turns into several; use a method on pixels such as occlusion."
        )
    return (
        f"{start}, so there is nothing to draw; name one with layer=, or use a method on pixels "
        "such as occlusion."
    )


def _why_no_gradient(survey: Survey, maps: Sequence[Map]) -> str:
    """The end of that sentence where gradients are what is missing, else nothing."""
    if any("quantized" in type(run.module).__module__ for run in survey.runs):
        return (
            ", since its modules are quantised and have no gradients; explain the network as it "
            "was before, or use occlusion, sbsm or random_masks."
        )
    if survey.obstacles and all(run.gradient is None for run in survey.runs if _wide(run)):
        return (
            f" with a gradient, since {survey.obstacles[0]}; change the model's forward, or use "
            "occlusion, sbsm or random_masks."
        )
    gradients = [one.run.gradient for one in maps if one.run.gradient is not None]
    if maps and not gradients:
        return (
            f": the embedding is detached from {maps[-1].run.name}; check that the model's forward "
            "is differentiable."
        )
    slopes = [r.gradient for r in survey.runs if _wide(r) and r.gradient is not None]
    if gradients and not any(bool(slope.ne(0).any()) for slope in slopes):
        return (
            " with a gradient: it is zero at every layer, as behind rounding, a sign or a "
            "threshold; pick the vector before that with output=, or use occlusion, sbsm or "
            "random_masks."
        )
    return ""


def _wide(run: LayerRun) -> bool:
    return run.output.dim() > 2


def depth(survey: Survey, name: str) -> tuple[int, int]:
    """How many of a network's innermost layers run up to the end of one, and how many in all."""
    names = {run.name.partition("@")[0] for run in survey.runs}
    inside = {name.rpartition(".")[0] for name in names}
    leaves = [
        run.name.partition("@")[0] not in inside and not isinstance(run.module, Input)
        for run in survey.runs
    ]
    position = next(position for position, run in enumerate(survey.runs) if run.name == name)
    return sum(leaves[: position + 1]), sum(leaves)
