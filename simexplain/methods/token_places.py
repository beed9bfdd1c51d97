"""Where in an image the tokens lie that an attention is over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from simexplain.models.base import SimilarityModel
from simexplain.models.layers import Layout, to_grid
from simexplain.models.moving import WHOLE, Region

_MOST_PREFIX_TOKENS = 16


def token_places(
    model: SimilarityModel, count: int, grids: Sequence[tuple[int, int]], images: Tensor
) -> tuple[Tensor | None, Region]:
    """The token of each cell ``(h,w)``, or None, and the part of the image where the cells lie.

    Taken from the survey of the network; where it has no layer of so many tokens, from their
    number.

    Args:
        model: The model.
        count: Number of tokens.
        grids: Rows and columns of the outputs of convolutions before the attention.
        images: ``(M,C,H,W)``.
    """
    pixels = (int(images.shape[-2]), int(images.shape[-1]))
    cells = token_cells(model, count, grids, pixels)
    return _usual(cells, model.token_layouts(count, images))


def _usual(cells: Tensor | None, layouts: Sequence[Layout]) -> tuple[Tensor | None, Region]:
    """How most layers have their tokens: those of the blocks, not of what comes before them.

    Args:
        cells: Row by row ``(h,w)``, as their number suggests; where no layer is known.
        layouts: The layouts of the survey for layers with as many tokens.
    """
    if not layouts:
        return cells, WHOLE
    ways = Counter(
        (layout.grid, tuple(layout.places.tolist()), layout.region) for layout in layouts
    )
    (grid, order, region), _ = ways.most_common(1)[0]
    return torch.tensor(order).view(grid), region


def token_cells(
    model: SimilarityModel,
    count: int,
    grids: Sequence[tuple[int, int]],
    pixels: tuple[int, int],
) -> Tensor | None:
    """Which token lies where: indices ``(h,w)`` into ``count`` tokens, or None.

    The grid is that of the latest convolution that fits (it cut the image into patches); where no
    convolution ran, what the model makes of so many tokens.

    Args:
        model: Knows how tokens become a grid.
        count: Number of tokens, class and register tokens first.
        grids: Rows and columns of the outputs of convolutions before the attention.
        pixels: Height and width of the images.
    """
    for height, width in reversed(grids):
        prefix = count - height * width
        if 0 <= prefix <= _MOST_PREFIX_TOKENS and height * width > 1:
            return torch.arange(prefix, count).view(height, width)
    if grids:
        return None
    numbers = torch.arange(count, dtype=torch.float32).view(1, count, 1)
    cells = to_grid(numbers, pixels, model.hints)
    return None if cells is None else cells[0, 0].long()
