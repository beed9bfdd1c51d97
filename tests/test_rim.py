"""Patches that do not divide the image leave a rim that the network never sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from simexplain import Comparison, as_similarity_model, explain, match
from simexplain.data.preprocessing import Preprocess
from simexplain.metrics.maps import placed

WIDTH = 16


class Patches(nn.Module):
    """A patch convolution; its tokens go through a block, beside a class token or alone."""

    def __init__(self, patch: int, *, classed: bool = False, last: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, WIDTH, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, 0.0, batch_first=True)
        self.classed, self.last = classed, last

    def forward(self, images: Tensor) -> Tensor:
        cells = self.patch(images)
        tokens = cells.flatten(2).transpose(1, 2)
        if self.classed:
            tokens = torch.cat((self.token.expand(len(tokens), -1, -1), tokens), dim=1)
        if self.last:
            tokens = tokens.view(len(cells), *cells.shape[2:], WIDTH)
            return tokens.add(self.block(tokens.flatten(1, 2)).view_as(tokens)).mean(dim=(1, 2))
        return self.block(tokens).mean(dim=1)


def pair(size: tuple[int, int]) -> Comparison:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    return Comparison.pair(images[:1], images[1:])


def seen(network: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """How many rows and columns the embedding depends on: plain autograd."""
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(2)).requires_grad_()
    network(image).pow(2).sum().backward()
    assert image.grad is not None
    felt = image.grad.abs().sum(dim=(0, 1)) > 0
    return int(felt.any(dim=1).nonzero().max()) + 1, int(felt.any(dim=0).nonzero().max()) + 1


@pytest.mark.parametrize("classed", [False, True])
@pytest.mark.parametrize(
    ("patch", "size", "covered"),
    [
        (14, (64, 64), (56, 56)),
        (16, (60, 60), (48, 48)),
        (7, (64, 64), (63, 63)),
        (14, (256, 256), (252, 252)),
        (14, (64, 56), (56, 56)),
        (16, (48, 76), (48, 64)),
    ],
)
def test_the_rim_beyond_the_patches_gets_no_heat(
    patch: int, size: tuple[int, int], covered: tuple[int, int], classed: bool
) -> None:
    network = Patches(patch, classed=classed).eval()
    assert seen(network, size) == covered
    model = as_similarity_model(network, preprocess=Preprocess(size=size))
    images = pair(size)
    region = (0, 0, covered[0] / size[0], covered[1] / size[1])
    for layer in model.layers_for(images.stacked()[0]):
        assert layer.region == pytest.approx(region, abs=1e-4), layer.name
        assert layer.stride == pytest.approx((patch, patch), abs=0.05)
    result = explain(model, images)
    assert result.layers != ("patch",)
    assert result.region == pytest.approx(region, abs=1e-4)
    for heat in result.heatmaps:
        assert heat.shape[-2:] == size
        assert bool(heat[..., : covered[0], : covered[1]].ne(0).any())
        assert not bool(heat[..., covered[0] :, :].ne(0).any())
        assert not bool(heat[..., covered[1] :].ne(0).any())
    for frame in match(model, images.stacked()[0][:1], images.stacked()[0][1:2]).regions:
        assert frame == pytest.approx(region, abs=1e-4)


def test_one_hot_cells_peak_in_the_middle_of_their_patches() -> None:
    layer = as_similarity_model(
        Patches(14).eval(), preprocess=Preprocess(size=(64, 64))
    ).layers_for(torch.rand(1, 3, 64, 64))[-1]
    for row, column in ((0, 0), (1, 3), (3, 3)):
        cells = torch.zeros(1, 1, 4, 4)
        cells[0, 0, row, column] = 1
        heat = placed(cells, (64, 64), layer.region)[0, 0]
        rows, columns = (heat > 0.5 * heat.max()).nonzero().T
        assert (int(rows.min()), int(rows.max())) == (14 * row, 14 * row + 13)
        assert (int(columns.min()), int(columns.max())) == (14 * column, 14 * column + 13)


class Padded(nn.Module):
    """Convolutions of stride 2 that see every pixel, whatever the size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = (
            nn.Conv2d(3 if n == 0 else 8, 8, 3, 2, padding=1) for n in range(3)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.three(self.two(self.one(images).relu()).relu()).mean(dim=(2, 3))


@pytest.mark.parametrize("size", [(64, 64), (60, 61), (33, 47)])
def test_padded_convolutions_keep_the_whole_image(size: tuple[int, int]) -> None:
    model = as_similarity_model(Padded().eval(), preprocess=Preprocess(size=size))
    assert {each.region for each in model.layers_for(torch.rand(1, 3, *size))} == {(0, 0, 1, 1)}


def test_tokens_with_the_axes_of_the_grid_keep_its_part() -> None:
    model = as_similarity_model(Patches(14, last=True).eval(), preprocess=Preprocess(size=(64, 64)))
    regions = {each.region for each in model.layers_for(torch.rand(1, 3, 64, 64))}
    assert regions == {(0, 0, 0.875, 0.875)}
