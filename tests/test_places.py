"""Maps of odd networks lie where plain autograd says that their cells look."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from odd_networks import (
    WIDTH,
    Cells,
    Convs,
    Crops,
    Dropped,
    Elementwise,
    Gated,
    Glimpse,
    Hidden,
    Inside,
    Layout,
    Mixer,
    Overwritten,
    Patches,
    Pyramid,
    Rearranged,
    Several,
    Sliding,
    Tokens,
    Unfolded,
    Windows,
    brightest,
    by_columns,
    by_image,
    by_rows,
    looks_at,
    rolled,
    snake,
    snake_by_index,
    snake_by_rows,
    spiral,
    with_registers,
)
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain import Comparison, as_similarity_model, explain
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ModelError
from simexplain.metrics.maps import placed
from simexplain.models.base import SimilarityModel
from simexplain.models.layers import Layer
from simexplain.tracing import trace

SIZE = (48, 64)
Build = Callable[[], nn.Module]


def wrapped(build: Build, size: tuple[int, int] = SIZE) -> SimilarityModel:
    torch.manual_seed(0)
    return as_similarity_model(build().eval(), preprocess=Preprocess(size=size))


def pair(size: tuple[int, int] = SIZE) -> Comparison:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    return Comparison.pair(images[:1], images[1:])


def default(model: SimilarityModel, size: tuple[int, int]) -> Layer:
    return next(layer for layer in model.layers_for(torch.zeros(1, 3, *size)) if layer.default)


def off(model: SimilarityModel, layer: Layer, size: tuple[int, int]) -> Tensor:
    """How many cells each cell is drawn off where it looks ``(h,w)``."""

    def grid(image: Tensor) -> Tensor:
        kept: list[Tensor] = []
        module = model.network.get_submodule(layer.name)
        handle = module.register_forward_hook(lambda _m, _a, output: kept.append(output))
        model.network(image)
        handle.remove()
        return model.to_grid(layer.name, kept[0], size)

    _, height, width = layer.shape
    top, left, bottom, right = layer.region
    rows = (top + (torch.arange(height) + 0.5) / height * (bottom - top)) * size[0]
    columns = (left + (torch.arange(width) + 0.5) / width * (right - left)) * size[1]
    there = looks_at(grid, pair(size).stacked()[0][:1])
    down = (there[..., 0] - rows[:, None]).abs() / layer.stride[0]
    return torch.maximum(down, (there[..., 1] - columns).abs() / layer.stride[1])


def between(way: Callable[[Tensor], Tensor], **options: int) -> Build:
    return lambda: Convs(way, stem=nn.Conv2d(3, WIDTH, 8, 8), **options)


def stem(*layers: nn.Module) -> Build:
    def build() -> nn.Module:
        own = copy.deepcopy(nn.Sequential(*layers))
        for module in own.modules():  # made when this file was read, before any seed
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        return Convs(lambda maps: maps, stem=own)

    return build


def listed(*axes: int) -> Callable[[Tensor], Tensor]:
    return lambda maps: maps.flatten(2).permute(axes)


ODD: dict[str, tuple[Build, tuple[int, int], tuple[int, int]]] = {
    "patches of 14": (lambda: Tokens(Patches(14, 14)), (48, 60), (3, 4)),
    "overlapping patches": (lambda: Tokens(Patches(12, 8)), SIZE, (5, 7)),
    "gaps between patches": (lambda: Tokens(Patches(5, 8)), (45, 62), (6, 8)),
    "unlike strides": (lambda: Tokens(Patches(8, (8, 16))), SIZE, (6, 4)),
    "two by two": (lambda: Tokens(Patches(24, 24)), (48, 48), (2, 2)),
    "one row": (lambda: Tokens(Patches(32, 16)), (32, 64), (1, 3)),
    "unfold": (lambda: Tokens(Unfolded(8, 8)), SIZE, (6, 8)),
    "unfold, overlapping": (lambda: Tokens(Unfolded(12, 8)), SIZE, (5, 7)),
    "unfold, odd size": (lambda: Tokens(Unfolded(14, 14)), (49, 66), (3, 4)),
    "view and permute": (lambda: Tokens(Rearranged(8)), SIZE, (6, 8)),
    "view and permute, cut off": (lambda: Tokens(Rearranged(10)), (57, 64), (5, 6)),
    "view and permute, padded": (lambda: Tokens(Rearranged(16, pad=True)), (60, 76), (4, 5)),
    "sliding": (lambda: Tokens(Sliding(10, 8)), SIZE, (5, 7)),
    "snake in place": (lambda: Tokens(Patches(8, 8), snake), SIZE, (6, 8)),
    "snake by index": (lambda: Tokens(Patches(8, 8), snake_by_index), SIZE, (6, 8)),
    "snake of rows": (lambda: Tokens(Patches(8, 8), snake_by_rows), SIZE, (6, 8)),
    "snake by condition": (between(by_rows), SIZE, (6, 8)),
    "spiral": (lambda: Tokens(Patches(8, 8), spiral), SIZE, (6, 8)),
    "columns first": (lambda: Tokens(Patches(8, 8), by_columns), SIZE, (6, 8)),
    "last token first": (lambda: Tokens(Patches(8, 8), lambda t: t.flip(1)), SIZE, (6, 8)),
    "rolled tokens": (lambda: Tokens(Patches(8, 8), rolled), SIZE, (6, 8)),
    "registers after": (lambda: Tokens(Patches(8, 8), with_registers), SIZE, (6, 8)),
    "two scales": (lambda: Several(mirrored=False), SIZE, (6, 8)),
    "with a mirror image": (lambda: Several(mirrored=True), SIZE, (6, 8)),
    "NCL": (lambda: Layout(lambda m: m.flatten(2), nn.BatchNorm1d(WIDTH)), SIZE, (6, 8)),
    "LNC": (lambda: Layout(listed(2, 0, 1), nn.Linear(WIDTH, 5)), SIZE, (6, 8)),
    "LCN": (lambda: Layout(listed(2, 1, 0), Elementwise(WIDTH, 1)), SIZE, (6, 8)),
    "CNL": (lambda: Layout(listed(1, 0, 2), Elementwise(WIDTH, 1, 1)), SIZE, (6, 8)),
    "NHWC": (lambda: Layout(lambda m: m.permute(0, 2, 3, 1), nn.Linear(12, 7)), (49, 66), (6, 8)),
    "HWNC": (lambda: Layout(lambda m: m.permute(2, 3, 0, 1), nn.Linear(12, 7)), (49, 66), (6, 8)),
    "NCDHW": (lambda: Layout(lambda m: m[:, :, None], nn.Conv3d(12, 7, 1)), (49, 66), (6, 8)),
    "mirrored map": (between(lambda m: m.flip(3)), SIZE, (6, 8)),
    "sides exchanged": (between(lambda m: m.mT), SIZE, (6, 8)),
    "turned map": (between(lambda m: m.rot90(1, (2, 3))), SIZE, (6, 8)),
    "rolled map": (between(lambda m: m.roll((2, -3), (2, 3))), SIZE, (6, 8)),
    "channels reversed": (between(lambda m: m.flip(1)), SIZE, (6, 8)),
    "overwritten map": (Overwritten, SIZE, (6, 8)),
    "gates": (Gated, SIZE, (6, 8)),
    "windows": (Windows, SIZE, (6, 8)),
    "branches": (Pyramid, SIZE, (6, 8)),
    "branches, odd size": (Pyramid, (49, 66), (6, 8)),
    "mixed tokens": (lambda: Mixer(residual=True), SIZE, (6, 8)),
    "space to depth": (stem(nn.PixelUnshuffle(8), nn.Conv2d(192, WIDTH, 1)), SIZE, (6, 8)),
    "pooled by view": (
        between(lambda m: m.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))), SIZE, (3, 4),
    ),
    "dilated": (stem(nn.Conv2d(3, WIDTH, 2, 8, dilation=5)), SIZE, (6, 8)),
    "grouped": (stem(nn.Conv2d(3, WIDTH, 8, 8, groups=3)), SIZE, (6, 8)),
    "unpadded pooling": (between(lambda m: F.avg_pool2d(m, 3, 2)), (49, 83), (2, 4)),
    "uneven pooling": (between(lambda m: F.adaptive_avg_pool2d(m, (4, 5))), SIZE, (4, 5)),
    "far padding": (stem(nn.Conv2d(3, WIDTH, 8, 8, padding=8)), SIZE, (8, 10)),
    "reflected edges": (
        stem(nn.Conv2d(3, WIDTH, 10, 8, padding=1, padding_mode="reflect")), SIZE, (6, 8),
    ),
    "enlarged by corners": (
        between(lambda m: F.interpolate(m, size=(9, 11), mode="bilinear", align_corners=True)),
        SIZE, (9, 11),
    ),
    "cropped image": (lambda: Inside(lambda x: x[..., 8:-8, 16:]), SIZE, (8, 12)),
    "padded image": (lambda: Inside(lambda x: F.pad(x, (8, 8, 0, 0))), SIZE, (12, 20)),
    "shrunk image": (
        lambda: Inside(lambda x: F.interpolate(x, size=(24, 24), mode="bilinear")), SIZE, (6, 6),
    ),
    "mirrored image": (lambda: Inside(lambda x: x.flip(3)), SIZE, (12, 16)),
    "sides of the image exchanged": (lambda: Inside(lambda x: x.mT), SIZE, (12, 16)),
}  # fmt: skip
"""By name how to build a network, for which size, and the grid of its default layer."""


@pytest.mark.parametrize("name", ODD)
def test_cells_are_drawn_where_they_look(name: str) -> None:
    build, size, grid = ODD[name]
    model = wrapped(build, size)
    layer = default(model, size)
    assert layer.shape[1:] == grid
    assert layer.name in ("blocks", "last", "layer")
    result = off(model, layer, size)
    seen = result[result.isfinite()]
    assert len(seen) >= 0.6 * result.numel()
    assert float(seen.median()) < 0.25
    assert float((seen < 0.5).float().mean()) > 0.8


def test_a_changed_pixel_is_drawn_where_it_is() -> None:
    """Through `placed`, from a map of the change: the brightest pixel is near the changed one."""
    for name in ("snake in place", "turned map", "view and permute, padded", "overlapping patches"):
        build, size, _ = ODD[name]
        model = wrapped(build, size)
        layer = default(model, size)
        image = pair(size).stacked()[0][:1]
        for row, column in ((10, 12), (30, 50), (21, 33)):
            changed = image.clone()
            changed[..., row - 2 : row + 3, column - 2 : column + 3] += 3
            before, after = (
                trace(model, each, [layer.name]).maps[layer.name].detach()
                for each in (image, changed)
            )
            change = (after - before).square().sum(1, keepdim=True)
            heat = placed(change, size, layer.region)[0, 0]
            top, left = divmod(int(heat.argmax()), size[1])
            assert abs(top - row) <= layer.stride[0], name
            assert abs(left - column) <= layer.stride[1], name


def enlarged(maps: Tensor, *, columns: slice) -> Tensor:
    """A part of a map at the size of all of it."""
    return F.interpolate(maps[..., columns], size=maps.shape[2:], mode="bilinear")


def beside(*ways: Callable[[Tensor], Tensor]) -> Build:
    """A map joined as channels with the same map after something else."""

    def joined(maps: Tensor) -> Tensor:
        return torch.cat([maps, *(way(maps) for way in ways)], dim=1)

    return between(joined, width=(1 + len(ways)) * WIDTH)


def deep(maps: Tensor) -> Tensor:
    for _ in range(6):
        maps = F.avg_pool2d(maps, 3, 1, 1) + maps.tanh()
    return maps + maps.flip(3)


@pytest.mark.parametrize(
    "build",
    [
        between(lambda m: m + m.flip(3)),
        beside(lambda m: m.flip(3)),
        beside(lambda m: m, lambda m: m, lambda m: m.flip(3)),
        beside(lambda m: m.rot90(2, (2, 3))),
        beside(lambda m: m.roll(4, 3)),
        beside(lambda m: enlarged(m, columns=slice(2, -2))),
        beside(lambda m: enlarged(m, columns=slice(4))),
        between(deep),
        between(Hidden.apply),
        lambda: Tokens(Patches(8, 8), lambda t: t + t.flip(1)),
        lambda: Mixer(residual=False),
    ],
)
def test_numbers_that_lie_in_several_places_are_no_maps(build: Build) -> None:
    model = wrapped(build)
    assert default(model, SIZE).name in ("stem", "cut", "cut.conv")


@pytest.mark.parametrize("ways", [("mT",), ("mT", "")])
def test_sides_exchanged_beside_the_map_make_none(ways: tuple[str, ...]) -> None:
    size = (64, 64)
    model = wrapped(beside(*(lambda m, w=way: m.mT if w else m for way in ways)), size)
    assert default(model, size).name == "stem"


@pytest.mark.parametrize(
    "build",
    [
        beside(lambda m: F.pad(m, (1, -1)), lambda m: F.pad(m, (-1, 1)), lambda m: m),
        beside(lambda m: F.pad(m, (0, 0, 1, -1)), lambda m: m.roll(-1, 3)),
        beside(lambda m: F.interpolate(F.avg_pool2d(m, 2), scale_factor=2)),
        beside(lambda m: F.avg_pool2d(m, 5, 1, 2), lambda m: m.mean((2, 3), True).expand_as(m)),
    ],
)
def test_ways_that_differ_by_a_cell_or_by_how_much_they_see_are_one_map(build: Build) -> None:
    model = wrapped(build)
    layer = default(model, SIZE)
    assert (layer.name, layer.shape[1:]) == ("last", (6, 8))
    assert float(off(model, layer, SIZE).nanmedian()) < 0.5


@pytest.mark.parametrize("build", [lambda: Tokens(Patches(8, 8), by_image), Dropped])
def test_orders_that_images_choose_are_no_maps(build: Build) -> None:
    model = wrapped(build)
    assert default(model, SIZE).name in ("cut", "first")
    names = {layer.name.partition(".")[0] for layer in model.layers_for(torch.zeros(1, 3, *SIZE))}
    assert not names & {"blocks", "second"}


def test_several_images_of_one_are_refused_with_the_reason() -> None:
    with pytest.raises(ModelError, match="gives 2 maps of one image"):
        explain(wrapped(Crops), pair())


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (32, 64)])
@pytest.mark.parametrize("kind", ["Segformer", "PvtV2"])
def test_small_last_grids_of_pyramids_are_found(kind: str, size: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers")

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = getattr(transformers, f"{kind}Config")(
                hidden_sizes=[8, 16, 20, 32], depths=[1] * 4, num_attention_heads=[1, 1, 2, 4]
            )
            self.model = getattr(transformers, f"{kind}Model")(config)

        def forward(self, images: Tensor) -> Tensor:
            return self.model(images).last_hidden_state.mean((2, 3))

    model = wrapped(Pooled, size)
    last = (size[0] // 32, size[1] // 32)
    assert default(model, size).shape[1:] == last
    stages = [
        layer.shape[1:] for layer in model.layers_for(torch.zeros(1, 3, *size)) if layer.stage
    ]
    assert stages == [(last[0] << n, last[1] << n) for n in (3, 2, 1, 0)]


def in_python(maps: Tensor) -> tuple[int, int]:
    top, left = brightest(maps)
    return int(top), int(left)


def by_numpy(maps: Tensor) -> tuple[int, int]:
    light = maps.detach().numpy().mean(axis=(0, 1))
    half = light.shape[0] // 2
    return half * int(light[half:].mean() > light[:half].mean()), 0


def by_condition(maps: Tensor) -> tuple[int, int]:
    half = maps.shape[3] // 2
    return 0, half if maps[..., half:].abs().sum() > maps[..., :half].abs().sum() else 0


def not_black(maps: Tensor) -> tuple[int, int]:
    """The bounding box's corner, within which everything of noise lies."""
    seen = (maps.abs().amax((0, 1)) > 0.3).nonzero()
    top, left = seen.amin(0).tolist() if len(seen) else (0, 0)
    return min(top, maps.shape[2] // 2), min(left, maps.shape[3] // 2)


def in_a_corner(maps: Tensor) -> tuple[int, int]:
    """Numbers of Python's, but none that depend on what is in the image."""
    assert not bool(maps.isnan().any())
    return int(maps.mean().item() > 1e9), 2


CHOICES = [brightest, in_python, by_numpy, by_condition, not_black]


@pytest.mark.parametrize("find", CHOICES)
def test_parts_that_the_image_chooses_are_no_maps(find: Cells) -> None:
    model = wrapped(lambda: Glimpse(find, stem=True))
    assert default(model, SIZE).name == "stem"
    named = explain(wrapped(lambda: Glimpse(find, stem=True)), pair(), layer="stem", check=False)
    assert not any("elsewhere" in text for text in named.warnings)
    with pytest.raises(ModelError, match="which part of it to look at"):
        explain(wrapped(lambda: Glimpse(find, stem=False)), pair())
    # A named layer of convolutions needs no survey: the first time it comes with the reason.
    model = wrapped(lambda: Glimpse(find, stem=False))
    first = explain(model, pair(), layer="last", check=False)
    assert any("lies elsewhere in every image" in text for text in first.warnings)
    with pytest.raises(ModelError, match="not a map over an image"):
        explain(model, pair(), layer="last")


@pytest.mark.parametrize("stem", [True, False])
def test_a_part_that_no_image_chooses_is_drawn_where_it_lies(stem: bool) -> None:
    model = wrapped(lambda: Glimpse(in_a_corner, stem=stem))
    layer = default(model, SIZE)
    assert layer.name == "last"
    assert float(off(model, layer, SIZE).nan_to_num().max()) < 0.25
