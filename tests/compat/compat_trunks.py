"""Networks whose maps are hard to find: orders of tokens, parallel ways, odd stems and heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from compat_heads import EIGHTH, EMBEDDING, Block, Pooled, conv, make, trunk
from compat_net import DEPTH, Net, halving
from torch import Tensor, nn
from torch.nn import functional as F

CLASS = "only the class token is read, so the last map is what the last block's attention reads"
WIDTH = 48


class Tokens(nn.Module):
    """Blocks over patches; what happens to the patches before and after is a row's own."""

    def __init__(
        self,
        patch: Any = 16,
        stride: Any = None,
        *,
        cells: int = 24,
        extra: int = 0,
        enter: Callable[[Tensor, Tensor], Tensor] = lambda tokens, extra: tokens,
        leave: Callable[[Tensor], Tensor] = lambda tokens: tokens.mean(1),
        width: int = WIDTH,
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, patch, stride or patch)
        self.positions = nn.Parameter(0.1 * torch.randn(cells, WIDTH))
        self.extra = nn.Parameter(torch.randn(extra, WIDTH))
        self.blocks = nn.Sequential(*(Block(WIDTH, batch_first=True) for _ in range(3)))
        self.head = nn.Linear(width, EMBEDDING)
        self.enter, self.leave = enter, leave

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2) + self.positions
        tokens = self.enter(tokens, self.extra.expand(len(images), -1, -1))
        return self.head(self.leave(self.blocks(tokens)))


def in_the_middle(tokens: Tensor, extra: Tensor) -> Tensor:
    half = tokens.shape[1] // 2
    return torch.cat([tokens[:, :half], extra, tokens[:, half:]], 1)


def before(tokens: Tensor, extra: Tensor) -> Tensor:
    return torch.cat([extra, tokens], 1)


def in_windows(tokens: Tensor, extra: Tensor) -> Tensor:
    """8 x 8 cells in windows of 4 x 4, one after the other."""
    cut = tokens.view(len(tokens), 2, 4, 2, 4, -1).permute(0, 1, 3, 2, 4, 5)
    return cut.reshape(len(tokens), 64, -1)


def by_columns(tokens: Tensor, extra: Tensor) -> Tensor:
    return tokens.view(len(tokens), 4, 6, -1).transpose(1, 2).reshape(len(tokens), 24, -1)


def merged(tokens: Tensor, extra: Tensor) -> Tensor:
    """Every token is joined with the next but six, which is no cell of a grid any more."""
    return (tokens + tokens.roll(5, 1))[:, torch.randperm(24, generator=torch.Generator())[:12]]


class Flat(nn.Module):
    """A transformer whose residual sums no layer returns, as many people write them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 16, 16)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(0.1 * torch.randn(25, WIDTH))
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.LayerNorm(WIDTH),
                    nn.MultiheadAttention(WIDTH, 4, batch_first=True),
                    nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 96), nn.GELU(),
                                  nn.Linear(96, WIDTH)),
                ]
            )
            for _ in range(3)
        )  # fmt: skip
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(images), -1, -1), x], 1) + self.positions
        for norm, attention, mlp in self.layers:
            y = norm(x)
            x = x + attention(y, y, y, need_weights=False)[0]
            x = x + mlp(x)
        return self.norm(x)[:, 0]


class Aside(nn.Module):
    """Blocks that give their attention weights first and the tokens second."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 16, 16)
        self.blocks = nn.ModuleList(Weighing() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            _, tokens = block(tokens)
        return self.norm(tokens).mean(1)


class Weighing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        result, weights = self.attn(x, x, x)
        return weights, x + result


class Latents(nn.Module):
    """Perceiver-like: as many latents as there are cells read the map twice."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = trunk(width=WIDTH)
        self.latents = nn.Parameter(torch.randn(1, 96, WIDTH))
        self.reads = nn.ModuleList(nn.MultiheadAttention(WIDTH, 4, batch_first=True) for _ in "ab")
        self.blocks = nn.ModuleList(Block(WIDTH, batch_first=True) for _ in "ab")

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.trunk(images).flatten(2).transpose(1, 2)
        latents = self.latents.expand(len(images), -1, -1)
        for read, block in zip(self.reads, self.blocks, strict=True):
            latents = block(latents + read(latents, tokens, tokens)[0])
        return latents.mean(1)


class Weighted(nn.Module):
    """Attention pooling: a gate says how much each place counts."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = trunk()
        self.gate = nn.Sequential(nn.Conv2d(32, 16, 1), nn.Tanh(), nn.Conv2d(16, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        features = self.trunk(images)
        share = self.gate(features).flatten(2).softmax(2)
        return (features.flatten(2) * share).sum(2)


class Strips(nn.Module):
    """The mean of every row, and convolutions along them."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = trunk()
        self.along = nn.Sequential(nn.Conv1d(32, 32, 3, padding=1), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        return self.along(self.trunk(images).mean(3)).mean(2)


class Sums(nn.Module):
    """Two ways of one grid, summed; from the trunk on, or from the picture on."""

    def __init__(self, *, whole: bool, after: bool) -> None:
        super().__init__()
        self.t = nn.Identity() if whole else trunk()  # where it is whole, the picture itself
        self.a = trunk() if whole else conv(32, 32, 1)
        self.b = trunk() if whole else conv(32, 32, 1, 1)
        self.after = conv(32, 32, 1) if after else None

    def forward(self, images: Tensor) -> Tensor:
        t = self.t(images)
        total = self.a(t) + self.b(t)
        return (self.after(total) if self.after is not None else total).mean((2, 3))


class Pyramid(nn.Module):
    """A feature pyramid, of which the finest level or all levels are read."""

    def __init__(self, read: str) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = conv(3, 16), conv(16, 24), conv(24, 32)
        self.side2, self.side3 = nn.Conv2d(24, 24, 1), nn.Conv2d(32, 24, 1)
        self.smooth2, self.smooth3 = conv(24, 24, 1), conv(24, 24, 1)
        self.fuse = nn.Conv2d(48, 24, 1)
        self.read = read

    def forward(self, images: Tensor) -> Tensor:
        c2 = self.c2(self.c1(images))
        p3 = self.side3(self.c3(c2))
        up = F.interpolate(p3, size=c2.shape[2:], mode="nearest")
        if self.read == "joined":
            return self.fuse(torch.cat([self.side2(c2), up], 1)).mean((2, 3))
        p2 = self.smooth2(self.side2(c2) + up)
        if self.read == "finest":
            return p2.mean((2, 3))
        return torch.cat([p2.mean((2, 3)), self.smooth3(p3).mean((2, 3))], 1)


class Dilated(nn.Module):
    """Parallel dilations and the mean of the picture, joined by a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = trunk()
        self.ways = nn.ModuleList(nn.Conv2d(32, 8, 3, padding=d, dilation=d) for d in (1, 2, 4))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 8, 1))
        self.project = conv(32, 32, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        t = self.trunk(images)
        whole = self.pool(t).expand(-1, -1, *t.shape[2:])
        return self.project(torch.cat([*(way(t) for way in self.ways), whole], 1)).mean((2, 3))


class Sampled(nn.Module):
    """Samples its map where a convolution says, or the picture where it is told."""

    def __init__(self, *, picture: bool) -> None:
        super().__init__()
        self.trunk = trunk()
        self.offset = nn.Conv2d(32, 2, 3, padding=1)
        self.mix = conv(32, 32, 1)
        self.picture = picture

    def forward(self, images: Tensor) -> Tensor:
        turn = torch.tensor([[0.5, 0.0, 0.3], [0.0, 0.5, -0.3]]).to(images)
        if self.picture:
            where = F.affine_grid(turn.expand(len(images), 2, 3), list(images.shape),
                                  align_corners=False)  # fmt: skip
            images = F.grid_sample(images, where, align_corners=False)
        t = self.trunk(images)
        if not self.picture:
            turn = torch.eye(2, 3).to(images).expand(len(images), 2, 3)
            where = F.affine_grid(turn, list(t.shape), align_corners=False)
            where = where + 0.1 * self.offset(t).permute(0, 2, 3, 1)
            t = F.grid_sample(t, where, align_corners=False)
        return self.mix(t).mean((2, 3))


class Recurrent(nn.Module):
    """A gated cell that reads the same features three times, its state and memory a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = trunk()
        self.cell = Cell()

    def forward(self, images: Tensor) -> Tensor:
        features = self.trunk(images)
        state = memory = torch.zeros_like(features)
        for _ in range(3):
            state, memory = self.cell(features, state, memory)
        return state.mean((2, 3))


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Conv2d(64, 128, 3, padding=1)

    def forward(self, x: Tensor, state: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        i, f, o, g = self.gates(torch.cat([x, state], 1)).chunk(4, 1)
        memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
        return o.sigmoid() * memory.tanh(), memory


class Stems(nn.Module):
    """Two stems of one kind, for the picture and its edges, joined for the trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.rest = nn.Sequential(conv(16, 24), conv(24, 32))

    def forward(self, images: Tensor) -> Tensor:
        edges = images - F.avg_pool2d(images, 3, 1, 1)
        return self.rest(torch.cat([self.stem(images), self.stem(edges)], 1)).mean((2, 3))


class Unshuffled(nn.Module):
    """Space to depth at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 24, 3, padding=1), nn.ReLU())
        self.rest = conv(24, 32)

    def forward(self, images: Tensor) -> Tensor:
        return self.rest(self.stem(images)).mean((2, 3))


class Last(nn.Module):
    """Channels last from the stem on, in blocks whose sum is their output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, (8, 16), (8, 16))
        self.mixes = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24), nn.GELU()) for _ in range(2)
        )
        self.norm = nn.LayerNorm(24)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).permute(0, 2, 3, 1)
        for mix in self.mixes:
            x = x + mix(x)
        return self.norm(x).mean((1, 2))


class Tiles(nn.Module):
    """Cuts the picture in four, which go through the trunk as pictures of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = trunk()

    def forward(self, images: Tensor) -> Tensor:
        m, c, h, w = images.shape
        tiles = images.view(m, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5)
        return self.trunk(tiles.reshape(4 * m, c, h // 2, w // 2)).mean((2, 3)).view(m, -1)


class Scaled(nn.Module):
    """The picture and the picture at half size through one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = trunk()

    def forward(self, images: Tensor) -> Tensor:
        small = F.avg_pool2d(images, 2)
        return torch.cat([self.trunk(x).mean((2, 3)) for x in (images, small)], 1)


class Volume(nn.Module):
    """Convolutions over a picture and its mirror image as two frames."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 16, 3, (1, 4, 4), 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(torch.stack([images, images.flip(3)], 2)).relu().mean((2, 3, 4))


class Cut(Pooled):
    """Looks at the middle of the picture alone."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images[:, :, 16:-16, 24:-24])


class Filters(nn.Module):
    """Global filters in the frequency domain, beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 8, 8)
        self.blocks = nn.Sequential(Filter(), Filter())

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(self.patch(images)).mean((2, 3))


class Filter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(WIDTH, 8, 7, 2))
        self.mix = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        result = torch.fft.rfft2(x) * torch.view_as_complex(self.weight)
        return x + self.mix(torch.fft.irfft2(result, s=x.shape[2:])).relu()


def first_and_mean(tokens: Tensor) -> Tensor:
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)


class Residuals(nn.Module):
    """Residuals of tokens to as many centres as there are cells, and a layer for every centre."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 16, 16)
        self.blocks = nn.Sequential(*(Block(WIDTH, batch_first=True) for _ in range(2)))
        self.assign = nn.Linear(WIDTH, 24)
        self.centres = nn.Parameter(torch.randn(24, WIDTH))
        self.f = nn.Linear(WIDTH, 8)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.blocks(self.patch(images).flatten(2).transpose(1, 2))
        share = self.assign(tokens).softmax(-1)
        sums = torch.einsum("mtk,mtc->mkc", share, tokens) - share.sum(1)[..., None] * self.centres
        return self.f(F.normalize(sums, dim=2)).flatten(1)


READ = ("blocks.2.ln_1", "blocks.1")
NETS = [
    Net("tokens: registers in the middle", "own", make(Tokens, extra=4, enter=in_the_middle),
        (64, 96), ("blocks.2", "blocks"), (4, 6), DEPTH, tokens=True, prefix=4,
        middle=True,
        why="four registers stand between the two halves of the patches; the mean of all follows"),
    Net("tokens: class token in the middle", "own",
        make(Tokens, extra=1, enter=in_the_middle, leave=lambda tokens: tokens[:, 12]),
        (64, 96), READ, (4, 6), DEPTH, tokens=True, prefix=1, middle=True,
        why=f"as in Vim; {CLASS}"),
    Net("tokens: in windows", "own", make(Tokens, 8, cells=64, enter=in_windows), (64, 64),
        ("blocks.2", "blocks"), (8, 8), DEPTH, tokens=True,
        order=lambda grid: in_windows(torch.arange(64.0).view(1, 64, 1), grid).flatten().argsort(),
        why="the sequence has one window of 4 x 4 after the other"),
    Net("tokens: by columns", "own", make(Tokens, enter=by_columns), (64, 96),
        ("blocks.2", "blocks"), (4, 6), DEPTH, tokens=True,
        order=lambda grid: by_columns(torch.arange(24.0).view(1, 24, 1), grid).flatten().argsort(),
        why="the sequence has one column after the other"),
    Net("tokens: merged", "own", make(Tokens, enter=merged), (64, 96), ("patch",), (4, 6), None,
        why="merged tokens are no places, so the patches are the last map"),
    Net("tokens: patches of 8 x 16", "own",
        make(Tokens, (8, 16), cells=48, extra=1, enter=before, leave=lambda tokens: tokens[:, 0]),
        (64, 96), READ, (8, 6), DEPTH, tokens=True, prefix=1, why=f"patches not square; {CLASS}"),
    Net("tokens: overlapping patches", "own",
        make(Tokens, 16, 8, cells=77, extra=1, enter=before, leave=lambda tokens: tokens[:, 0]),
        (64, 96), READ, (7, 11), DEPTH, tokens=True, prefix=1,
        why=f"patches of 16 every 8 pixels; {CLASS}"),
    Net("tokens: class token and mean", "own",
        make(Tokens, extra=1, enter=before, leave=first_and_mean, width=2 * WIDTH),
        (64, 96), ("blocks.2", "blocks"), (4, 6), DEPTH, tokens=True, prefix=1,
        why="both are read, so the last block's output is the last map"),
    Net("tokens: a linear layer over all", "own",
        make(Tokens, leave=lambda tokens: tokens.flatten(1), width=24 * WIDTH), (64, 96),
        ("blocks.2", "blocks"), (4, 6), DEPTH, tokens=True, route="export",
        why="every place has its own weights"),
    Net("tokens: sums that no layer returns", "own", Flat, (64, 96), ("layers.2.0",), (4, 6), None,
        tokens=True, prefix=1, why=CLASS),
    Net("tokens: attention weights first", "own", Aside, (64, 64), ("norm",), (4, 4), None,
        tokens=True, why="blocks return weights before tokens; the norm has the tokens"),
    Net("head: 96 latents", "own", Latents, (64, 96), ("trunk",), (8, 12), EIGHTH,
        why="latents read the map twice; 96 are no 8 x 12 places"),
    Net("head: NetVLAD of tokens", "own", Residuals, (64, 96), ("blocks.1", "blocks"), (4, 6),
        DEPTH, tokens=True, why="24 clusters of 24 tokens are no 4 x 6 places"),
    Net("head: attention pooling", "own", Weighted, (64, 96), ("trunk",), (8, 12), EIGHTH,
        route="export", why="the gate is passed by"),
    Net("head: means of rows", "own", Strips, (64, 96), ("trunk",), (8, 12), EIGHTH,
        why="after it there are rows, no places"),
    Net("two ways summed", "own", make(Sums, whole=False, after=False), (64, 96), ("t",), (8, 12),
        EIGHTH, why="the sum is no layer's output"),
    Net("two trunks summed", "own", make(Sums, whole=True, after=False), (64, 96), (), (8, 12),
        None, refused=r"bypass|layer=", or_warned={"a.4": (8, 12), "b.4": (8, 12)},
        why="the sum is no layer's output, and each trunk is passed by"),
    Net("two trunks summed, a layer after", "own", make(Sums, whole=True, after=True), (64, 96),
        ("after",), (8, 12), DEPTH, why="everything passes the layer after the sum, and no other"),
    Net("pyramid: finest level", "own", make(Pyramid, "finest"), (64, 96), ("smooth2",), (16, 24),
        halving((16, 24), 2), why="the way up ends at the finer grid"),
    Net("pyramid: all levels", "own", make(Pyramid, "all"), (64, 96), ("c2",), (16, 24),
        halving((16, 24), 2), or_warned={"smooth2": (16, 24)}, why="c2 is what all levels come of"),
    Net("pyramid: levels joined", "own", make(Pyramid, "joined"), (64, 96), ("fuse",), (16, 24),
        halving((16, 24), 2), why="the coarser map is enlarged and joined"),
    Net("parallel dilations", "own", Dilated, (64, 96), ("project",), (8, 12), EIGHTH,
        route="export",
        why="four ways, one of them the mean of all places, joined by a convolution"),
    Net("deformed", "own", make(Sampled, picture=False), (64, 96), ("mix",), (8, 12), EIGHTH,
        why="the map is sampled where a convolution says, and a convolution follows"),
    Net("samples a part of the picture", "own", make(Sampled, picture=True), (64, 96), (), (8, 12),
        None, refused=r"no layer with a map", or_warned={"mix": (8, 12)},
        why="sees the upper right part, by grid sampling, which has no place that can be read"),
    Net("recurrent", "own", Recurrent, (64, 96), ("cell@2",), (8, 12), EIGHTH,
        why="the last state of a cell that runs three times"),
    Net("two stems", "own", Stems, (64, 96), ("rest",), (8, 12), halving((8, 12), 2),
        why="one stem runs twice, and the rest joins both; each run of the stem is passed by"),
    Net("space to depth", "own", Unshuffled, (64, 96), ("rest",), (8, 12), halving((8, 12), 2),
        route="export", why="the stem moves pixels into channels"),
    Net("channels last, patches 8 x 16", "own", Last, (64, 96), ("norm",), (8, 6), None,
        why="maps (M,h,w,C)"),
    Net("tiles as pictures", "own", Tiles, (64, 96), (), (4, 6), refused=r"no layer with a map",
        why="four pictures for one: which cell is where cannot be known"),
    Net("two sizes of the picture", "own", Scaled, (64, 96), (), (8, 12), None,
        refused=r"bypass|layer=", or_warned={"trunk@0": (8, 12), "trunk@1": (4, 6)},
        why="one trunk runs twice, and each run is passed by"),
    Net("frames", "own", Volume, (64, 96), (), (16, 24), refused=r"no layer with a map",
        why="maps with an axis of time"),
    Net("the middle alone", "own", Cut, (96, 144), ("trunk",), (8, 12), EIGHTH,
        why="the picture is cut inside the network"),
    Net("filters of frequencies", "own", Filters, (64, 96), ("blocks", "blocks.1"), (8, 12), DEPTH,
        tokens=True, why="all places are mixed beside a residual"),
]  # fmt: skip
