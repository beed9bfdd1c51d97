"""Designs from the literature: aggregation, parts, tokens dropped or merged, frequencies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from compat_heads import EIGHTH, Block, conv, make, trunk
from compat_net import DEPTH, Grid, Net, halving
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 32


class Headed(nn.Module):
    """A trunk, and a head that makes the vector of its map."""

    def __init__(self, head: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.trunk, self.head = trunk(), head()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images))


class Powers(nn.Module):
    """GeM whose power is learnt for every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.power = nn.Parameter(3 + torch.rand(WIDTH))

    def forward(self, maps: Tensor) -> Tensor:
        power = self.power[:, None, None]
        return maps.clamp(min=1e-6).pow(power).mean((2, 3)).pow(1 / self.power)


class Transport(nn.Module):
    """As in SALAD: features go to clusters and a dustbin by a few steps of Sinkhorn's."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Linear(WIDTH, 16)
        self.features, self.score = nn.Conv2d(WIDTH, 12, 1), nn.Conv2d(WIDTH, 8, 1)
        self.dustbin = nn.Parameter(torch.tensor(1.0))

    def forward(self, maps: Tensor) -> Tensor:
        scores = self.score(maps).flatten(2)
        scores = torch.cat((scores, self.dustbin.expand(len(maps), 1, scores.shape[2])), dim=1)
        for _ in range(3):
            scores = scores.log_softmax(dim=2)
            scores = scores.log_softmax(dim=1)
        share = scores.exp()[:, None, :-1]
        sums = (self.features(maps).flatten(2)[:, :, None] * share).sum(3)
        both = (F.normalize(self.whole(maps.mean((2, 3))), dim=1), F.normalize(sums, dim=1))
        return F.normalize(torch.cat([part.flatten(1) for part in both], dim=1), dim=1)


class Ghosts(nn.Module):
    """NetVLAD some of whose clusters are left out in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.assign = nn.Conv2d(WIDTH, 8, 1)
        self.centres = nn.Parameter(torch.rand(8, WIDTH))

    def forward(self, maps: Tensor) -> Tensor:
        share = self.assign(maps).flatten(2).softmax(1)
        sums = share @ maps.flatten(2).transpose(1, 2) - share.sum(2)[..., None] * self.centres
        return F.normalize(F.normalize(sums[:, :6], dim=2).flatten(1), dim=1)


class PlacesMixed(nn.Module):
    """As in MixVPR: layers over all places beside a residual, then fewer channels and places."""

    def __init__(self) -> None:
        super().__init__()
        self.mixes = nn.Sequential(PlaceMix(), PlaceMix())
        self.channels, self.rows = nn.Linear(WIDTH, 16), nn.Linear(96, 4)

    def forward(self, maps: Tensor) -> Tensor:
        mixed = self.mixes(maps.flatten(2)).transpose(1, 2)
        return F.normalize(self.rows(self.channels(mixed).transpose(1, 2)).flatten(1), dim=1)


class PlaceMix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.LayerNorm(96), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 96))

    def forward(self, flat: Tensor) -> Tensor:
        return flat + self.mix(flat)


class NonLocal(nn.Module):
    """As in AGW: every place reads all others beside a residual, and a norm over the pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.theta, self.phi, self.w = (nn.Conv2d(WIDTH, WIDTH, 1) for _ in range(4))
        self.norm = nn.BatchNorm2d(WIDTH)

    def forward(self, maps: Tensor) -> Tensor:
        g, theta, phi = (layer(maps).flatten(2) for layer in (self.g, self.theta, self.phi))
        table = theta.transpose(1, 2) @ phi / g.shape[2]
        read = (g @ table.transpose(1, 2)).view_as(maps)
        return maps + self.norm(self.w(read))


class Capsules(nn.Module):
    """Primary capsules, and five whose agreement with them routes what they get."""

    def __init__(self) -> None:
        super().__init__()
        self.primary = nn.Conv2d(WIDTH, 32, 1)
        self.weight = nn.Parameter(0.1 * torch.randn(1, 384, 5, 6, 8))

    def forward(self, maps: Tensor) -> Tensor:
        own = self.primary(maps).view(len(maps), 4, 8, -1).transpose(2, 3).flatten(1, 2)
        votes = (self.weight @ squashed(own)[:, :, None, :, None]).squeeze(-1)
        logits = torch.zeros_like(votes[..., :1])
        for _ in range(3):
            result = squashed((logits.softmax(2) * votes).sum(1, keepdim=True))
            logits = logits + (votes * result).sum(-1, keepdim=True)
        return result.flatten(1)


def squashed(vectors: Tensor) -> Tensor:
    length = vectors.norm(dim=-1, keepdim=True)
    return length / (1 + length * length) * vectors


class Attended(nn.Module):
    """An attention branch whose map weighs the features, which a convolution reads."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Sequential(conv(WIDTH, 16, 1), nn.Conv2d(16, 1, 1), nn.Sigmoid())
        self.last = conv(WIDTH, WIDTH, 1)

    def forward(self, maps: Tensor) -> Tensor:
        return self.last(maps + maps * self.weigh(maps)).mean((2, 3))


class Granular(nn.Module):
    """As in MGN: three branches of one map, each with its whole, its halves or its thirds."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(conv(3, 16), conv(16, 24))
        self.branches = nn.ModuleList(conv(24, WIDTH, stride) for stride in (2, 1, 1))
        self.reduce = nn.ModuleList(nn.Conv2d(WIDTH, 8, 1) for _ in range(8))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.trunk(images)
        parts: list[Tensor] = []
        for branch, count in zip(self.branches, (1, 2, 3), strict=True):
            own = branch(maps)
            parts.append(F.adaptive_max_pool2d(own, 1))
            if count > 1:
                parts.extend(F.adaptive_max_pool2d(own, (count, 1)).split(1, dim=2))
        both = zip(self.reduce, parts, strict=True)
        return torch.cat([reduce(part).flatten(1) for reduce, part in both], dim=1)


class Decoder(nn.Module):
    """A U-Net: what went down comes up again, joined with what was there."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 16), conv(16, 24), conv(24, 32)
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(32, 24, 2, 2), nn.ConvTranspose2d(48, 16, 2, 2)]
        )
        self.last = conv(32, 24, 1)

    def forward(self, images: Tensor) -> Tensor:
        a = self.a(images)
        b = self.b(a)
        joined = torch.cat((self.up[0](self.c(b)), b), dim=1)
        return self.last(torch.cat((self.up[1](joined), a), dim=1)).mean((2, 3))


class Weighted(nn.Module):
    """A pyramid read both ways with learnt weights, as in BiFPN; its coarsest level is read."""

    def __init__(self) -> None:
        super().__init__()
        self.downs = nn.ModuleList([conv(3, 16, 4, 5), conv(16, 24), conv(24, 32)])
        self.sides = nn.ModuleList(nn.Conv2d(width, 24, 1) for width in (16, 24, 32))
        self.fuses = nn.ModuleList(conv(24, 24, 1) for _ in range(4))
        self.weights = nn.Parameter(0.5 + torch.rand(4, 3))

    def fused(self, number: int, *levels: Tensor) -> Tensor:
        weights = self.weights[number, : len(levels)].relu()
        parts = zip(weights / (weights.sum() + 1e-4), levels, strict=True)
        return self.fuses[number](sum(weight * level for weight, level in parts))

    def forward(self, images: Tensor) -> Tensor:
        maps, levels = images, []
        for down, side in zip(self.downs, self.sides, strict=True):
            maps = down(maps)
            levels.append(side(maps))
        fine, middle, coarse = levels
        up = self.fused(0, middle, F.interpolate(coarse, size=middle.shape[2:]))
        fine = self.fused(1, fine, F.interpolate(up, size=fine.shape[2:]))
        middle = self.fused(2, middle, up, F.max_pool2d(fine, 3, 2, 1))
        return self.fused(3, coarse, F.max_pool2d(middle, 3, 2, 1)).mean((2, 3))


class Stemmed(nn.Module):
    """What is done to the picture first, and convolutions after it."""

    def __init__(self, stem: Callable[[Tensor], Tensor], channels: int, strides: int) -> None:
        super().__init__()
        self.stem = stem
        widths = [channels, 24, WIDTH, WIDTH][: strides + 1]
        self.rest = nn.Sequential(*(conv(a, b) for a, b in itertools.pairwise(widths)))

    def forward(self, images: Tensor) -> Tensor:
        return self.rest(self.stem(images)).mean((2, 3))


def haar(images: Tensor) -> list[Tensor]:
    rows = [images[:, :, 0::2], images[:, :, 1::2]]
    rows = [rows[0] + rows[1], rows[0] - rows[1]]
    return [
        result
        for row in rows
        for result in (row[..., 0::2] + row[..., 1::2], row[..., 0::2] - row[..., 1::2])
    ]


def as_channels(images: Tensor) -> Tensor:
    return torch.cat(haar(images), dim=1)


def as_quarters(images: Tensor) -> Tensor:
    a, b, c, d = haar(images)
    return torch.cat((torch.cat((a, b), dim=3), torch.cat((c, d), dim=3)), dim=2)


def spectrum(images: Tensor) -> Tensor:
    return torch.fft.fftshift(torch.fft.fft2(images), dim=(2, 3)).abs().add(1).log()


def cosines(images: Tensor) -> Tensor:
    """A discrete cosine transform of every 8 x 8 pixels, its coefficients as channels."""
    steps = torch.arange(8.0)
    table = torch.cos(math.pi / 8 * (steps + 0.5) * steps[:, None]) / 8
    m, c, h, w = images.shape
    blocks = images.view(m, c, h // 8, 8, w // 8, 8).transpose(3, 4)
    blocks = table.to(images) @ blocks @ table.mT.to(images)
    return blocks.permute(0, 1, 4, 5, 2, 3).reshape(m, c * 64, h // 8, w // 8)


def squared(images: Tensor) -> Tensor:
    """Padded to a square and made smaller."""
    padded = F.pad(images, (0, 0, 16, 16))
    return F.interpolate(padded, size=(64, 64), mode="bicubic", antialias=True)


class Tokens(nn.Module):
    """Blocks over patches and a class token, with something between them."""

    def __init__(
        self,
        between: Callable[[Tensor], Tensor],
        read: Callable[[Tensor], Tensor],
        *,
        after: int = 0,
        extra: int = 1,
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 16, 16)
        self.extra = nn.Parameter(torch.randn(extra, WIDTH))
        self.positions = nn.Parameter(0.1 * torch.randn(24 + extra, WIDTH))
        self.blocks = nn.ModuleList(Block(WIDTH, batch_first=True) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.between, self.read, self.after = between, read, after

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.extra.expand(len(images), -1, -1), tokens), 1) + self.positions
        for number, block in enumerate(self.blocks):
            tokens = block(tokens)
            tokens = self.between(tokens) if number == self.after else tokens
        return self.read(self.norm(tokens))


def mean(tokens: Tensor) -> Tensor:
    return tokens.mean(1)


def first(tokens: Tensor) -> Tensor:
    return tokens[:, 0]


def kept(tokens: Tensor) -> Tensor:
    """As in EViT: the class token and the twelve longest of the others."""
    index = tokens[:, 1:].norm(dim=2).topk(12, dim=1).indices[..., None]
    return torch.cat((tokens[:, :1], tokens[:, 1:].take_along_dim(index, dim=1)), dim=1)


def merged(tokens: Tensor) -> Tensor:
    """As in ToMe: of every second token the six that are most like one of the others join it."""
    unit = F.normalize(tokens, dim=2)
    likeness = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    likeness = torch.cat((torch.full_like(likeness[:, :1], -9), likeness[:, 1:]), dim=1)
    most, where = likeness.max(2)
    order = most.argsort(1, descending=True)[..., None]
    source, rest = order[:, :6], order[:, 6:].sort(1).values
    width = (-1, -1, tokens.shape[2])
    into = where[..., None].gather(1, source).expand(*width)
    moved = tokens[:, ::2].gather(1, source.expand(*width))
    joined = tokens[:, 1::2].scatter_reduce(1, into, moved, reduce="mean")
    return torch.cat((tokens[:, ::2].gather(1, rest.expand(*width)), joined), dim=1)


def in_pairs(tokens: Tensor) -> Tensor:
    """Two neighbours of a row become one: 4 x 6 cells become 4 x 3."""
    return tokens.view(len(tokens), 4, 3, 2, -1).mean(3).flatten(1, 2)


class Resampled(nn.Module):
    """As many latents as cells read patches and themselves, without a norm at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 16, 16)
        self.latents = nn.Parameter(torch.randn(24, WIDTH))
        self.reads = nn.ModuleList(nn.MultiheadAttention(WIDTH, 4, batch_first=True) for _ in "ab")
        self.mlps = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in "ab")

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        latents = self.latents.expand(len(images), -1, -1)
        for read, mlp in zip(self.reads, self.mlps, strict=True):
            both = torch.cat((tokens, latents), dim=1)
            latents = latents + read(latents, both, both, need_weights=False)[0]
            latents = latents + mlp(latents).relu()
        return latents.mean(1)


class Jigsaw(nn.Module):
    """As in TransReID: beside the class token, groups of shifted and shuffled patches are read."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = Tokens(lambda tokens: tokens, lambda tokens: tokens)
        self.whole, self.parts = (Block(WIDTH, batch_first=True) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.tokens(images)
        groups = tokens[:, 1:].roll(-5, 1).unflatten(1, (2, 12)).transpose(1, 2).flatten(1, 2)
        parts = (torch.cat((tokens[:, :1], group), dim=1) for group in groups.split(6, dim=1))
        return torch.cat([self.whole(tokens)[:, 0], *(self.parts(p)[:, 0] for p in parts)], dim=1)


class Scans(nn.Module):
    """As in VMamba: rows and columns are summed up with decay, both ways, beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.enter = conv(3, WIDTH, 8, 9), nn.Conv2d(WIDTH, WIDTH, 1)
        self.leave, self.norm = nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH)

    def scanned(self, rows: Tensor) -> Tensor:
        state, states = torch.zeros_like(rows[..., 0]), []
        for step in rows.unbind(-1):
            state = 0.7 * state + step
            states.append(state)
        return torch.stack(states, dim=-1)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        own = self.enter(maps)
        total = sum(
            self.scanned(way.flip(3) if back else way).flip(3 if back else ()).transpose(2, axis)
            for axis in (2, 3)
            for way in (own.transpose(2, axis),)
            for back in (False, True)
        )
        return self.norm(maps + self.leave(total)).mean((2, 3))


class Merging(nn.Module):
    """Patches merged four to one, as in Swin, where their sides are odd: zeros are added."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.reduce, self.norm = nn.Linear(64, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.patch(images).permute(0, 2, 3, 1)
        maps = F.pad(maps, (0, 0, 0, maps.shape[2] % 2, 0, maps.shape[1] % 2))
        parts = [maps[:, down::2, right::2] for right in (0, 1) for down in (0, 1)]
        return self.norm(self.reduce(torch.cat(parts, dim=-1))).mean((1, 2))


class Crops(nn.Module):
    """The mean of the vectors of the middle and the four corners."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = trunk()

    def forward(self, images: Tensor) -> Tensor:
        corners = [(0, 0), (0, 32), (16, 0), (16, 32), (8, 16)]
        crops = [images[:, :, top : top + 48, left : left + 64] for top, left in corners]
        return torch.stack([self.trunk(crop).mean((2, 3)) for crop in crops]).mean(0)


class Mixed(nn.Module):
    """Enters autocast in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = trunk(), nn.Linear(WIDTH, 16)

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.head(self.trunk(images).mean((2, 3))).float()


def headed(name: str, head: Callable[[], nn.Module], why: str, default: str = "trunk.4",
           grids: tuple[Grid, ...] = EIGHTH, tokens: bool = False) -> Net:  # fmt: skip
    return Net(f"head: {name}", "own", make(Headed, head), (64, 96), (default,), (8, 12), grids,
               tokens=tokens, route="export", why=why)  # fmt: skip


def gem_after(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(layer(), Powers(), nn.BatchNorm1d(WIDTH))


NETS = [
    headed("GeM, a power a channel", Powers, "pooling with learnt powers follows"),
    headed("SALAD-like", Transport, "clusters, a dustbin and a token of the whole read the map"),
    headed("GhostVLAD-like", Ghosts, "clusters read the map"),
    headed("MixVPR-like", PlacesMixed, "places are mixed beside a residual, then channels reduced",
           "head.channels", tokens=True),
    headed("non-local and GeM", gem_after(NonLocal), "the non-local block ends in a sum that it "
           "returns", "head.0"),
    headed("capsules", Capsules, "primary capsules are channels of places", "head.primary"),
    headed("attention branch", Attended, "a convolution reads the weighed map", "head.last"),
    Net("three granularities", "own", Granular, (64, 96), ("trunk.1", "trunk"), (16, 24),
        halving((16, 24), 2), why="all branches come of it; the warning says that it is early"),
    Net("U-Net", "own", Decoder, (64, 96), ("last",), (32, 48), DEPTH, route="export",
        why="the last map is as fine as the first"),
    Net("pyramid: both ways, coarsest level", "own", Weighted, (64, 96), ("fuses.3",), (4, 6), None,
        why="everything passes the last fusion"),
    Net("wavelets as channels", "own", make(Stemmed, as_channels, 12, 2), (64, 96), ("rest",),
        (8, 12), halving((8, 12), 2), why="four bands of half the side lie on each other"),
    Net("wavelets as quarters", "own", make(Stemmed, as_quarters, 3, 3), (64, 96), (), (8, 12),
        refused=r"no layer with a map", why="the picture lies four times beside itself"),
    Net("spectrum of the picture", "own", make(Stemmed, spectrum, 3, 3), (64, 96), (), (8, 12),
        refused=r"no layer with a map", why="places of a spectrum are frequencies"),
    Net("cosine transforms of blocks", "own", make(Stemmed, cosines, 192, 1), (64, 96), ("rest",),
        (4, 6), DEPTH, why="coefficients of 8 x 8 pixels are channels of a place"),
    Net("padded to a square inside", "own", make(Stemmed, squared, 3, 3), (64, 96), ("rest",),
        (8, 8), halving((8, 8), 3), why="cells above and below the picture see padding alone"),
    Net("tokens: half of them dropped", "own", make(Tokens, kept, mean), (64, 96), ("blocks.0",),
        (4, 6), None, tokens=True, prefix=1, why="which are kept depends on the image"),
    Net("tokens: merged by likeness", "own", make(Tokens, merged, first), (64, 96), ("blocks.0",),
        (4, 6), None, tokens=True, prefix=1, why="which are merged depends on the image"),
    Net("tokens: merged in pairs", "own", make(Tokens, in_pairs, mean, extra=0), (64, 96),
        ("norm", "blocks.2"), (4, 3), None, tokens=True, why="pairs of neighbours are a grid"),
    Net("tokens: as many latents", "own", Resampled, (64, 96), ("patch",), (4, 6), None,
        tokens=True, why="24 latents are no 4 x 6 places"),
    Net("tokens: shifted and shuffled groups", "own", Jigsaw, (64, 96),
        ("tokens.norm", "tokens.blocks.2"), (4, 6), DEPTH, tokens=True, prefix=1,
        also={"tokens": (4, 6)}, why="class token and groups of patches come of it"),
    Net("scanned four ways", "own", Scans, (64, 96), ("norm",), (8, 12), DEPTH,
        why="sums along rows and columns beside a residual"),
    Net("odd sides merged", "own", Merging, (68, 108), ("norm",), (9, 14), None,
        why="17 x 27 patches are padded to 18 x 28"),
    Net("five crops", "own", Crops, (64, 96), (), (6, 8), None, refused=r"bypass|layer=",
        or_warned={f"trunk@{n}": (6, 8) for n in range(5)}, why="the trunk runs five times"),
    Net("autocast inside", "own", Mixed, (64, 96), ("trunk",), (8, 12), EIGHTH, tolerance=0.05,
        exact=2e-2, why="half precision in the network's own forward"),
]  # fmt: skip
