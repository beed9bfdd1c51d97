"""Small networks whose maps lie in the image in unusual ways, and where autograd says they lie."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 12
Cells = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """Attention and a hidden layer beside a residual connection: tokens stay where they are."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        own = self.norm(tokens)
        result = F.scaled_dot_product_attention(own, own, self.mix(own))
        tokens = tokens + 0.3 * result
        return tokens + self.mlp(self.norm2(tokens))


class Tokens(nn.Module):
    """Patches, in any way and order, through two blocks; the mean is the embedding."""

    def __init__(self, cut: nn.Module | Cells, order: Cells | None = None) -> None:
        super().__init__()
        self.cut = cut
        self.order = order or (lambda tokens: tokens)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(self.order(self.cut(images))).mean(dim=1)


class Patches(nn.Module):
    """A patch convolution of any kernel, stride and padding."""

    def __init__(self, kernel: int, stride: int | tuple[int, int], padding: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, kernel, stride, padding)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).flatten(2).transpose(1, 2)


class Unfolded(nn.Module):
    """Patches by ``nn.Unfold``, without a convolution."""

    def __init__(self, kernel: int, stride: int, padding: int = 0) -> None:
        super().__init__()
        self.unfold = nn.Unfold(kernel, stride=stride, padding=padding)
        self.lin = nn.Linear(3 * kernel * kernel, WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        return self.lin(self.unfold(images).transpose(1, 2))


class Rearranged(nn.Module):
    """Patches by a view and a permutation, as with einops; what does not fit is cut or padded."""

    def __init__(self, patch: int, *, pad: bool = False) -> None:
        super().__init__()
        self.patch, self.pad = patch, pad
        self.norm = nn.LayerNorm(3 * patch * patch)
        self.lin = nn.Linear(3 * patch * patch, WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        p = self.patch
        height, width = images.shape[2:]
        if self.pad:
            images = F.pad(images, (0, -width % p, 0, -height % p))
        h, w = images.shape[2] // p, images.shape[3] // p
        images = images[:, :, : h * p, : w * p]
        cut = images.reshape(len(images), 3, h, p, w, p).permute(0, 2, 4, 3, 5, 1)
        return self.lin(self.norm(cut.reshape(len(images), h * w, p * p * 3)))


class Sliding(nn.Module):
    """Patches by ``Tensor.unfold``."""

    def __init__(self, size: int, step: int) -> None:
        super().__init__()
        self.size, self.step = size, step
        self.lin = nn.Linear(3 * size * size, WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        cut = images.unfold(2, self.size, self.step).unfold(3, self.size, self.step)
        return self.lin(cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2))


def snake(tokens: Tensor, width: int = 8) -> Tensor:
    """Every second row from right to left, in place."""
    grid = tokens.unflatten(1, (-1, width)).clone()
    grid[:, 1::2] = grid[:, 1::2].flip(2)
    return grid.flatten(1, 2)


def snake_by_index(tokens: Tensor, width: int = 8) -> Tensor:
    index = torch.arange(tokens.shape[1]).view(-1, width)
    index[1::2] = index[1::2].flip(1)
    return tokens[:, index.flatten()]


def snake_by_rows(tokens: Tensor, width: int = 8) -> Tensor:
    rows = tokens.unflatten(1, (-1, width)).unbind(1)
    return torch.cat([row.flip(1) if number % 2 else row for number, row in enumerate(rows)], dim=1)


def spiral(tokens: Tensor, width: int = 8) -> Tensor:
    left = torch.arange(tokens.shape[1]).view(-1, width)
    order: list[Tensor] = []
    while left.numel():
        order.append(left[0])
        left = left[1:].rot90()
    index = torch.cat(order)[None, :, None].expand(len(tokens), -1, tokens.shape[2])
    return tokens.gather(1, index)


def by_columns(tokens: Tensor, width: int = 8) -> Tensor:
    return tokens.unflatten(1, (-1, width)).transpose(1, 2).flatten(1, 2)


def with_registers(tokens: Tensor) -> Tensor:
    extra = tokens.new_ones(len(tokens), 3, tokens.shape[2])
    return torch.cat((tokens, extra), dim=1)


def rolled(tokens: Tensor) -> Tensor:
    return tokens.roll(5, 1)


def by_image(tokens: Tensor) -> Tensor:
    """The order of how large tokens are, which is another one for every image."""
    return tokens[:, tokens[0].norm(dim=1).argsort()]


class Convs(nn.Module):
    """A stem, something between, and a last layer whose mean is the embedding."""

    def __init__(
        self, between: Cells, *, stem: nn.Module | None = None, width: int = WIDTH
    ) -> None:
        super().__init__()
        self.stem = stem or nn.Conv2d(3, WIDTH, 4, 4)
        self.between = between
        self.last = nn.Conv2d(width, WIDTH, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.between(self.stem(images)).tanh()).mean((2, 3))


class Layout(nn.Module):
    """Cells with their axes in another order, and a layer that takes them so."""

    def __init__(self, away: Cells, layer: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 8, 8)
        self.away, self.layer = away, layer

    def forward(self, images: Tensor) -> Tensor:
        result = self.layer(self.away(self.stem(images)))
        images_axis = next(n for n, side in enumerate(result.shape) if side == len(images))
        result = result.movedim(images_axis, 0)
        return result.flatten(1) @ torch.linspace(-1, 1, result[0].numel() * 5).view(-1, 5)


class Elementwise(nn.Module):
    """A layer of a weight for every number of its last axis but one or last."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(*shape) + 0.5)

    def forward(self, values: Tensor) -> Tensor:
        return values * self.weight + 1


class Pyramid(nn.Module):
    """Branches of unlike strides that are joined late."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, WIDTH, 4, 4), nn.GELU(), nn.Conv2d(WIDTH, WIDTH, 2, 2))
        self.b = nn.Conv2d(3, WIDTH, 16, 16)
        self.c = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 1, 1), nn.AvgPool2d(8))
        self.last = nn.Conv2d(3 * WIDTH, WIDTH, 1)

    def forward(self, images: Tensor) -> Tensor:
        a, b, c = self.a(images), self.b(images), self.c(images)
        b = F.interpolate(b, size=a.shape[2:], mode="bilinear")
        return self.last(torch.cat((a, 0.3 * b, c), dim=1).tanh()).mean((2, 3))


class Inside(nn.Module):
    """What is done to the image itself before the network."""

    def __init__(self, first: Cells) -> None:
        super().__init__()
        self.first = first
        self.stem = nn.Conv2d(3, WIDTH, 4, 4)
        self.last = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.stem(self.first(images)).tanh()).mean((2, 3))


class Gated(nn.Module):
    """A map with gates from all of it, and from each of its rows and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 8, 8)
        self.gate, self.line = nn.Linear(WIDTH, WIDTH), nn.Conv2d(WIDTH, WIDTH, 1)
        self.last = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        maps = maps * self.gate(maps.mean((2, 3)))[:, :, None, None].sigmoid()
        height, width = maps.shape[2:]
        both = torch.cat((maps.mean(3, keepdim=True), maps.mean(2, keepdim=True).mT), dim=2)
        rows, columns = self.line(both).split([height, width], dim=2)
        return self.last(maps * rows.sigmoid() * columns.mT.sigmoid()).tanh().mean((2, 3))


class Mixer(nn.Module):
    """Tokens mixed by a matrix over positions, beside a residual connection or alone."""

    def __init__(self, *, residual: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 8, 8)
        self.mix = nn.Linear(48, 48)
        self.residual = residual
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2)
        mixed = self.mix(tokens)
        tokens = tokens + 0.3 * mixed if self.residual else mixed
        return self.last(tokens.transpose(1, 2)).mean(1)


class Dropped(nn.Module):
    """Half of the tokens are dropped, by what they are: what is left is no grid."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = Patches(8, 8)
        self.first, self.second = Block(), Block()

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.first(self.cut(images))
        index = tokens.norm(dim=2).topk(24, dim=1).indices
        kept = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))
        return self.second(kept).mean(1)


class Several(nn.Module):
    """Tokens of two scales, or of an image and its mirror image, in one sequence."""

    def __init__(self, *, mirrored: bool) -> None:
        super().__init__()
        self.fine = Patches(8, 8)
        self.other = self.fine if mirrored else Patches(16, 16)
        self.mirrored = mirrored
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, images: Tensor) -> Tensor:
        own = self.fine(images)
        other = self.other(images.flip(3) if self.mirrored else images)
        both = (own, other) if self.mirrored else (other, own)
        return self.blocks(torch.cat(both, dim=1)).mean(1)


class Windows(nn.Module):
    """Windows of tokens, which need padding, and maps again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 8, 8)
        self.block, self.last = Block(), nn.Linear(WIDTH, WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images).permute(0, 2, 3, 1)
        height, width = maps.shape[1:3]
        maps = F.pad(maps, (0, 0, 0, -width % 5, 0, -height % 5)).roll((-2, -2), (1, 2))
        n, h, w, c = maps.shape
        cut = maps.view(n, h // 5, 5, w // 5, 5, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 25, c)
        cut = self.block(cut).view(n, h // 5, w // 5, 5, 5, c).permute(0, 1, 3, 2, 4, 5)
        maps = cut.reshape(n, h, w, c).roll((2, 2), (1, 2))[:, :height, :width]
        return self.last(maps).mean((1, 2))


class Crops(nn.Module):
    """Two halves of the image as images of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, WIDTH, 4, 4), nn.ReLU(), nn.Conv2d(WIDTH, 8, 1))

    def forward(self, images: Tensor) -> Tensor:
        half = images.shape[3] // 2
        both = torch.cat((images[..., :half], images[..., half:]))
        return self.trunk(both).mean((2, 3)).view(2, len(images), -1).mean(0)


class Overwritten(nn.Module):
    """A map parts of which are written anew, as where channels are shifted."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, WIDTH, 8, 8), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        moved = torch.zeros_like(maps)
        moved[:, :, 2:] = maps[:, :, :-2]
        moved[:, :, :2] = maps[:, :, -2:]
        return self.last(moved).tanh().mean((2, 3))


class Hidden(torch.autograd.Function):
    """A mirror image by a function whose inside no graph shows."""

    @staticmethod
    def forward(ctx: object, maps: Tensor) -> Tensor:
        return maps.flip(3)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient.flip(3)


def by_rows(maps: Tensor) -> Tensor:
    """Every second row mirrored, by a condition."""
    return torch.where(torch.arange(maps.shape[2])[:, None] % 2 == 0, maps, maps.flip(3))


def looks_at(grid: Cells, image: Tensor) -> Tensor:
    """The centre ``(h,w,2)`` of the pixels that each cell of a map looks at: plain autograd.

    Args:
        grid: The map ``(1,C,h,w)`` of an image, in the graph.
        image: ``(1,C,H,W)``.
    """
    image = image.clone().requires_grad_()
    maps = grid(image)
    height, width = image.shape[2:]
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    result = torch.zeros(*maps.shape[2:], 2)
    direction = torch.randn(maps.shape[1], generator=torch.Generator().manual_seed(0))
    felt = torch.zeros(*maps.shape[2:], height, width)
    for row in range(maps.shape[2]):
        for column in range(maps.shape[3]):
            score = (maps[0, :, row, column] * direction).sum()
            (change,) = torch.autograd.grad(score, image, retain_graph=True)
            felt[row, column] = change[0].square().sum(0)
    # What all cells look at alike, through attention, says nothing of where one of them is.
    if maps.shape[2] * maps.shape[3] > 4:
        felt = (felt - 2 * felt.flatten(0, 1).median(0).values).clamp_min(0)
    felt = felt / felt.sum((2, 3), keepdim=True)  # NaN where a cell sees nothing
    result[..., 0] = felt.sum(3) @ rows
    result[..., 1] = felt.sum(2) @ columns
    return result


class Glimpse(nn.Module):
    """A part of the image, or of a map of it, that lies where a function of the image says.

    Args:
        find: From maps ``(1,C,h,w)`` to the first row and column, tensors or Python's numbers.
        stem: Cut from the maps of this, and not from the image.
    """

    def __init__(self, find: Callable[[Tensor], tuple[object, object]], *, stem: bool) -> None:
        super().__init__()
        self.find = find
        self.stem = nn.Conv2d(3, WIDTH, 4, 4) if stem else None
        self.after = nn.Conv2d(WIDTH if stem else 3, WIDTH, 1 if stem else 4, 1 if stem else 4)
        self.last = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = images if self.stem is None else self.stem(images)
        part = []
        for one in maps.split(1):
            top, left = self.find(one)
            side = one.shape[2] // 2
            part.append(one[:, :, top : top + side, left : left + side])
        return self.last(self.after(torch.cat(part)).tanh()).mean((2, 3))


def brightest(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Where the window of half the side with most light begins; tensors."""
    side = maps.shape[2] // 2
    light = F.avg_pool2d(maps.mean(1, keepdim=True), side, 1)
    index = light.flatten().argmax()
    return index // light.shape[3], index % light.shape[3]
