"""Networks as people build them around a trunk: heads, branches, parts, strides, outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from compat_net import DEPTH, Net, halving
from torch import Tensor, nn
from torch.nn import functional as F

EMBEDDING = 16


def conv(a: int, b: int, stride: int = 2, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(a, b, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()
    )


def trunk(channels: int = 3, width: int = 32) -> nn.Sequential:
    """Three halvings: grids of a half, a quarter and an eighth of the image's sides."""
    return nn.Sequential(
        conv(channels, 16), conv(16, 16, 1), conv(16, 24), conv(24, 24, 1), conv(24, width)
    )


class Pooled(nn.Module):
    """The mean of the last map and a linear layer; normalised or not."""

    def __init__(self, channels: int = 3, *, normalise: bool = False, power: float = 1) -> None:
        super().__init__()
        self.trunk = trunk(channels)
        self.head = nn.Linear(32, EMBEDDING)
        self.normalise, self.power = normalise, power

    def forward(self, images: Tensor) -> Tensor:
        features = self.trunk(images)
        if self.power != 1:
            pooled = features.clamp(min=1e-6).pow(self.power).mean((2, 3)).pow(1 / self.power)
        else:
            pooled = features.mean((2, 3))
        vector = self.head(pooled)
        return F.normalize(vector, dim=1) if self.normalise else vector


class HiddenNorm(nn.Module):
    """L2 in the middle of the head: a linear layer without bias comes after it."""

    def __init__(self, *, normalise: bool) -> None:
        super().__init__()
        self.trunk = trunk()
        self.first = nn.Linear(32, 24)
        self.last = nn.Linear(24, EMBEDDING, bias=False)
        self.normalise = normalise

    def forward(self, images: Tensor) -> Tensor:
        vector = self.first(self.trunk(images).mean((2, 3)))
        return self.last(F.normalize(vector, dim=1) if self.normalise else vector)


class Vlad(nn.Module):
    """Residuals to learned centres, softly assigned, normalised within and as a whole."""

    def __init__(self, clusters: int = 64) -> None:
        super().__init__()
        self.trunk = trunk()
        self.assign = nn.Conv2d(32, clusters, 1)
        self.centres = nn.Parameter(torch.rand(clusters, 32))

    def forward(self, images: Tensor) -> Tensor:
        features = self.trunk(images)
        share = self.assign(features).flatten(2).softmax(1)  # (M,K,T)
        places = F.normalize(features, dim=1).flatten(2)  # (M,C,T)
        sums = torch.einsum("mkt,mct->mkc", share, places)
        residuals = sums - share.sum(2)[..., None] * self.centres
        return F.normalize(F.normalize(residuals, dim=2).flatten(1), dim=1)


class Queries(nn.Module):
    """Learned queries read the map by attention, in two layers, as bags of queries do."""

    def __init__(self, queries: int = 64) -> None:
        super().__init__()
        self.trunk = trunk()
        self.queries = nn.Parameter(torch.randn(2, queries, 32))
        self.reads = nn.ModuleList(nn.MultiheadAttention(32, 4, batch_first=True) for _ in "ab")
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in "ab")
        self.fc = nn.Linear(2 * queries, 2)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.trunk(images).flatten(2).transpose(1, 2)
        rows = []
        for query, read, norm in zip(self.queries, self.reads, self.norms, strict=True):
            result, _ = read(query.expand(len(images), -1, -1), tokens, tokens)
            rows.append(norm(result))
        return F.normalize(self.fc(torch.cat(rows, 1).transpose(1, 2)).flatten(1), dim=1)


class Clusters(nn.Module):
    """Sums over places for each of 64 learned centres, kept as tokens (M,64,C) through a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = trunk()
        self.centres = nn.Linear(32, 64, bias=False)
        self.mix = nn.Linear(32, 32)
        self.head = nn.Linear(32, EMBEDDING)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.trunk(images).flatten(2).transpose(1, 2)
        share = self.centres(tokens).softmax(1).transpose(1, 2)  # (M,64,T)
        return self.head(self.mix(share @ tokens).relu().mean(1))


class Branches(nn.Module):
    """Two branches beside each other, the later one of little weight."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.t = trunk()
        self.a = conv(32, 12, 1)
        self.b = conv(32, 12, 1)
        self.weight = weight

    def forward(self, images: Tensor) -> Tensor:
        t = self.t(images)
        return torch.cat([self.a(t).mean((2, 3)), self.weight * self.b(t).mean((2, 3))], 1)


class Scales(nn.Module):
    """A pyramid of features: maps of two depths are pooled and joined."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(conv(3, 16), conv(16, 24))
        self.late = nn.Sequential(conv(24, 32), conv(32, 32))

    def forward(self, images: Tensor) -> Tensor:
        early = self.early(images)
        return torch.cat([early.mean((2, 3)), self.late(early).mean((2, 3))], 1)


class Part(nn.Module):
    """A layer that sees a part of the map alone: the lower rows or the right columns."""

    def __init__(self, side: str, *, alone: bool) -> None:
        super().__init__()
        self.t = nn.Sequential(conv(3, 16), conv(16, 24))
        self.whole = conv(24, 12, 1)
        self.d = conv(24, 12, 1)
        self.side, self.alone = side, alone

    def forward(self, images: Tensor) -> Tensor:
        t = self.t(images)
        half = t.shape[2] // 2 if self.side == "low" else t.shape[3] // 2
        seen = t[:, :, half:] if self.side == "low" else t[..., half:]
        part = self.d(seen).mean((2, 3))
        return part if self.alone else torch.cat([self.whole(t).mean((2, 3)), part], 1)


class Shared(nn.Module):
    """One residual block that runs three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 16), conv(16, 24))
        self.block = Residual(24)
        self.head = nn.Linear(24, EMBEDDING)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        for _ in range(3):
            features = self.block(features)
        return self.head(features.mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class Stripes(nn.Module):
    """Part-based: horizontal stripes of the last map, each with a head, each normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = trunk()
        self.heads = nn.ModuleList(nn.Conv2d(32, 8, 1) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        parts = F.adaptive_avg_pool2d(self.trunk(images), (3, 1))
        rows = [head(parts[:, :, n : n + 1]).flatten(1) for n, head in enumerate(self.heads)]
        return F.normalize(torch.stack(rows, 1), dim=2).flatten(1)


class Shrinking(nn.Module):
    """A residual block whose strided convolution has no padding: inside it is smaller than after.

    8x8 becomes 3x3 inside and 4x4 at the end of the block.
    """

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(a, b, 3, stride=2)
        self.norm1 = nn.BatchNorm2d(b)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(b, b, 2, padding=1)
        self.norm2 = nn.BatchNorm2d(b)
        self.skip = nn.Conv2d(a, b, 2, stride=2)
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        return self.act2(inner + self.skip(x))


class Unpadded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.block1 = Shrinking(16, 16)
        self.block2 = Shrinking(16, 24)
        self.block3 = Shrinking(24, 32)
        self.head = nn.Linear(32, EMBEDDING)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.block3(self.block2(self.block1(self.stem(images)))).mean((2, 3)))


class FaceBlock(nn.Module):
    """A block of the residual face networks: norm first, PReLU, no activation at its end."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(a)
        self.conv1 = nn.Conv2d(a, b, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(b)
        self.prelu = nn.PReLU(b)
        self.conv2 = nn.Conv2d(b, b, 3, 2, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(b)
        self.downsample = nn.Sequential(nn.Conv2d(a, b, 1, 2, bias=False), nn.BatchNorm2d(b))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return inner + self.downsample(x)


class Face(nn.Module):
    """The layout of residual face networks: the map is flattened, not pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.prelu = nn.PReLU(16)
        self.layer1 = nn.Sequential(FaceBlock(16, 16))
        self.layer2 = nn.Sequential(FaceBlock(16, 24))
        self.layer3 = nn.Sequential(FaceBlock(24, 32))
        self.layer4 = nn.Sequential(FaceBlock(32, 48))
        self.bn2 = nn.BatchNorm2d(48)
        self.dropout = nn.Dropout(0.4)
        self.fc = nn.Linear(48 * 49, EMBEDDING)
        self.features = nn.BatchNorm1d(EMBEDDING)

    def forward(self, images: Tensor) -> Tensor:
        x = self.prelu(self.bn1(self.conv1(images)))
        x = self.bn2(self.layer4(self.layer3(self.layer2(self.layer1(x)))))
        return self.features(self.fc(self.dropout(x.flatten(1))))


class Patches(nn.Module):
    """A transformer of one's own over patches, its tokens first ``(L,M,D)`` or the batch first."""

    def __init__(self, size: tuple[int, int], patch: int, *, tokens_first: bool, read: str) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 48, patch, patch)
        count = (size[0] // patch) * (size[1] // patch)
        self.cls = nn.Parameter(torch.randn(48))
        self.positions = nn.Parameter(0.1 * torch.randn(count + 1, 48))
        self.blocks = nn.Sequential(*(Block(48, batch_first=not tokens_first) for _ in range(3)))
        self.norm = nn.LayerNorm(48)
        self.tokens_first, self.read = tokens_first, read

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls.expand(len(images), 1, -1), tokens], 1) + self.positions
        tokens = tokens.transpose(0, 1) if self.tokens_first else tokens
        tokens = self.blocks(tokens)
        tokens = tokens.transpose(0, 1) if self.tokens_first else tokens
        return self.norm(tokens[:, 0] if self.read == "class" else tokens[:, 1:].mean(1))


class Block(nn.Module):
    """A pre-norm block, as in the original CLIP."""

    def __init__(self, width: int, *, batch_first: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 4, batch_first=batch_first)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 96), nn.GELU(), nn.Linear(96, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class TorchEncoder(nn.Module):
    """``nn.TransformerEncoder`` with its default order of axes, tokens first."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 16, 16)
        self.positions = nn.Parameter(0.1 * torch.randn(24, 1, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(self.patch(images).flatten(2).permute(2, 0, 1) + self.positions).mean(0)


class Siamese(nn.Module):
    """Two images in, two vectors out; what people train with, not what they embed with."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Pooled()

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x1), self.net(x2)


class PairScore(nn.Module):
    """Two images in, one learned score of the pair out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Pooled()
        self.score = nn.Linear(EMBEDDING, 1)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return self.score((self.net(x1) - self.net(x2)).abs())


@dataclass
class Answer:
    embedding: Tensor
    features: Tensor


class Named(NamedTuple):
    logits: Tensor
    embedding: Tensor


class Answering(nn.Module):
    """The same network with another kind of output."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.trunk = trunk()
        self.head = nn.Linear(32, EMBEDDING)
        self.classes = nn.Linear(EMBEDDING, 5)
        self.kind = kind

    def forward(self, images: Tensor) -> Any:
        features = self.trunk(images)
        vector = self.head(features.mean((2, 3)))
        if self.kind == "dict":
            return {"logits": self.classes(vector), "embedding": vector, "map": features}
        if self.kind == "tuple":
            return self.classes(vector), vector
        if self.kind == "named":
            return Named(self.classes(vector), vector)
        return Answer(vector, features)


class Frozen(nn.Module):
    """A trunk that runs without gradients below a trained head."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.trunk = trunk()
        self.head = nn.Linear(32, EMBEDDING)
        self.mode = mode

    def forward(self, images: Tensor) -> Tensor:
        if self.mode == "detach":
            return self.head(self.trunk(images).detach().mean((2, 3)))
        with torch.no_grad() if self.mode == "no_grad" else torch.inference_mode():
            features = self.trunk(images)
        return self.head(features.clone().mean((2, 3)))


class Flat(nn.Module):
    """No map at all: the picture is flattened at once."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 24, 32), nn.ReLU())
        self.head = nn.Linear(32, EMBEDDING)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images))


class Steps(nn.Module):
    """Strides of 3, 5 and (1, 2) and kernels that do not fit the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 16, 7, stride=3), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(16, 24, 3, stride=(1, 2)), nn.ReLU())
        self.c = nn.Sequential(nn.Conv2d(24, 32, 5, stride=5, padding=2), nn.ReLU())
        self.head = nn.Linear(32, EMBEDDING)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(images))).mean((2, 3)))


def make(kind: type[nn.Module], *args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: kind(*args, **options)


EIGHTH = halving((8, 12), 3)

NETS = [
    Net("head: mean", "own", make(Pooled), (64, 96), ("trunk",), (8, 12), EIGHTH, quick=True,
        route="export", why="linear from the map on"),
    Net("head: normalised", "own", make(Pooled, normalise=True), (64, 96), ("trunk",), (8, 12),
        EIGHTH, plain=make(Pooled), quick=True, route="export",
        why="its own L2 changes nothing in a cosine"),
    Net("head: L2 in the middle", "own", make(HiddenNorm, normalise=True), (64, 96), ("trunk",),
        (8, 12), EIGHTH, plain=make(HiddenNorm, normalise=False),
        route="export",
        why="scaling before a layer without bias scales the vector"),
    Net("head: GeM", "own", make(Pooled, power=3), (64, 96), ("trunk",), (8, 12), EIGHTH,
        route="export",
        why="generalised mean, p = 3"),
    Net("head: GeM normalised", "own", make(Pooled, power=3, normalise=True), (64, 96), ("trunk",),
        (8, 12), EIGHTH, plain=make(Pooled, power=3),
        route="export",
        why="generalised mean, then L2"),
    Net("head: NetVLAD-like", "own", make(Vlad), (64, 96), ("trunk",), (8, 12), EIGHTH, quick=True,
        route="export",
        why="`assign` has a map for each of 64 clusters, but the residuals bypass it"),
    Net("head: NetVLAD-like, 16 clusters", "own", make(Vlad, 16), (64, 64), ("trunk",), (8, 8),
        halving((8, 8), 3),
        route="export",
        why="as many clusters as 4 x 4 places"),
    Net("head: 64 learned queries", "own", make(Queries), (64, 64), ("trunk",), (8, 8),
        halving((8, 8), 3), quick=True,
        route="export",
        why="64 queries are no 8 x 8 places"),
    Net("head: 16 learned queries", "own", make(Queries, 16), (64, 96), ("trunk",), (8, 12),
        EIGHTH, why="16 queries are no 4 x 4 places"),
    Net("head: 64 cluster centres", "own", make(Clusters), (64, 64), ("trunk",), (8, 8),
        halving((8, 8), 3),
        route="export",
        why="tokens of centres are no places"),
    Net("branches 1 : 0.01", "own", make(Branches, 0.01), (64, 96), ("t",), (8, 12), EIGHTH,
        quick=True,
        route="export",
        why="the last map that both branches read"),
    Net("branches 1 : 1", "own", make(Branches, 1.0), (64, 96), ("t",), (8, 12), EIGHTH,
        route="export",
        why="the last map that both branches read"),
    Net("two depths joined", "own", make(Scales), (64, 96), ("early",), (16, 24),
        halving((16, 24), 2), or_warned={"late": (4, 6)},
        route="export",
        why="the mean of the early map bypasses the late one"),
    Net("part: lower rows beside the whole", "own", make(Part, "low", alone=False), (64, 96),
        ("t",), (16, 24), halving((16, 24), 2),
        route="export",
        why="d sees the lower half alone"),
    Net("part: right columns beside the whole", "own", make(Part, "right", alone=False), (64, 96),
        ("t",), (16, 24), halving((16, 24), 2),
        route="export",
        why="d sees the right half alone"),
    Net("part: right columns alone", "own", make(Part, "right", alone=True), (64, 96), ("d",),
        (16, 12), None, also={"t": (16, 24)},
        route="export",
        why="everything passes d, which sees the right"),
    Net("part: stripes", "own", make(Stripes), (96, 64), ("trunk",), (12, 8), halving((12, 8), 3),
        route="export",
        why="each stripe is normalised, and nothing is left out"),
    Net("residual, unpadded strides", "own", make(Unpadded), (64, 64), ("block3",), (4, 4),
        halving((4, 4)), quick=True,
        route="export",
        why="insides of blocks (15, 7, 3) are smaller than ends"),
    Net("odd strides", "own", make(Steps), (64, 96), ("c",), (4, 3), ((20, 30), (18, 14), (4, 3)),
        route="export",
        why="strides 3, (1, 2) and 5 without padding"),
    Net("face, iresnet-like", "own", make(Face), (112, 112), ("bn2", "layer4"), (7, 7),
        halving((7, 7)),
        route="export",
        why="a map that is flattened; bn2 is position-wise"),
    Net("shared weights", "own", make(Shared), (72, 88), ("block@2",), (18, 22),
        ((36, 44), (18, 22)),
        route="export",
        why="one block runs three times; its last run is the end"),
    Net("tokens first, class token", "own",
        make(Patches, (64, 96), 16, tokens_first=True, read="class"), (64, 96),
        ("blocks.2.ln_1", "blocks.1"), (4, 6), DEPTH, tokens=True, prefix=1, quick=True,
        route="export",
        why="the original CLIP's order (L,M,D)"),
    Net("tokens first, mean", "own",
        make(Patches, (64, 96), 16, tokens_first=True, read="mean"), (64, 96), ("blocks.2",),
        (4, 6), DEPTH, tokens=True, prefix=1,
        route="export",
        why="the original CLIP's order (L,M,D)"),
    Net("patch 12 of 64 x 90", "own",
        make(Patches, (64, 90), 12, tokens_first=False, read="class"), (64, 90),
        ("blocks.2.ln_1", "blocks.1"), (5, 7), DEPTH, tokens=True, prefix=1, quick=True,
        route="export",
        why="patches do not divide the picture"),
    Net("patch 10 of 64 x 64, mean", "own",
        make(Patches, (64, 64), 10, tokens_first=False, read="mean"), (64, 64), ("blocks.2",),
        (6, 6), DEPTH, tokens=True, prefix=1,
        route="export",
        why="patches do not divide the picture"),
    Net("nn.TransformerEncoder", "own", make(TorchEncoder), (64, 96),
        ("encoder.layers.2", "encoder"), (4, 6), DEPTH, tokens=True,
        route="export",
        why="batch_first is False by default"),
    Net("output: dict", "own", make(Answering, "dict"), (64, 96), ("trunk",), (8, 12), EIGHTH,
        output="embedding",
        route="export",
        why=""),
    Net("output: tuple", "own", make(Answering, "tuple"), (64, 96), ("trunk",), (8, 12), EIGHTH,
        output=1,
        route="export",
        why=""),
    Net("output: named tuple", "own", make(Answering, "named"), (64, 96), ("trunk",), (8, 12),
        EIGHTH, output="embedding", why=""),
    Net("output: dataclass", "own", make(Answering, "dataclass"), (64, 96), ("trunk",), (8, 12),
        EIGHTH, output="embedding", why=""),
    Net("output: dict, not named", "own", make(Answering, "dict"), (64, 96), ("trunk",), (8, 12),
        EIGHTH, refused=r"output=", why="which of its tensors is meant must be said"),
    Net("one channel", "own", make(Pooled, 1), (64, 96), ("trunk",), (8, 12), EIGHTH, channels=1,
        why="grey pictures"),
    Net("six channels", "own", make(Pooled, 6), (64, 96), ("trunk",), (8, 12), EIGHTH, channels=6,
        why="two pictures or a satellite's bands"),
    Net("trunk under no_grad", "own", make(Frozen, "no_grad"), (64, 96), ("trunk",), (8, 12),
        refused=r"no_grad|detach", why="no gradient reaches the map"),
    Net("trunk under inference_mode", "own", make(Frozen, "inference"), (64, 96), ("trunk",),
        (8, 12), refused=r"inference_mode", why="no gradient reaches the map"),
    Net("trunk detached", "own", make(Frozen, "detach"), (64, 96), ("trunk",), (8, 12),
        refused=r"detach", why="no gradient reaches the map"),
    Net("no map", "own", make(Flat), (16, 24), (), (1, 1), refused=r"no layer with a map|map over",
        why="the picture is flattened at once"),
    Net("siamese of two images", "own", make(Siamese), (64, 96), ("net.trunk",), (8, 12), EIGHTH,
        refused=r"two|images|argument|one image", why="embed with the inner network"),
    Net("learned score of two images", "own", make(PairScore), (64, 96), ("net.trunk",), (8, 12),
        EIGHTH, refused=r"two|images|argument|one image", why="its score is of the pair"),
]  # fmt: skip
