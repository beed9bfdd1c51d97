"""A small transformer with its attention written out, and its maps by plain autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TinyBlock(nn.Module):
    """Self-attention by hand; ``fused`` calls torch's fused one instead."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def attend(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Output of the attention, and all that was seen on the way."""
        count, length, width = tokens.shape
        qkv = self.qkv(tokens).view(count, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = {"q": q, "k": k, "v": v}
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            seen["a"] = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
            out = seen["a"] @ v
        seen["o"] = out
        return self.proj(out.transpose(1, 2).reshape(count, length, width)), seen

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attend(self.norm1(tokens))[0]
        return tokens + self.mlp(self.norm2(tokens))


class TinyViT(nn.Module):
    """Patches of 8 pixels, three blocks; ``pool`` is ``class``, ``mean``, ``both`` or ``probe``."""

    def __init__(self, *, pool: str = "class", fused: bool = True, width: int = 12) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.pool = pool
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.bn = nn.BatchNorm2d(width)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, 13, width) * 0.5)
        self.blocks = nn.ModuleList(TinyBlock(width, 3, fused) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width * (2 if pool == "both" else 1), 10)
        self.probe = nn.Parameter(torch.randn(1, 1, 1, width))
        self.kv = nn.Linear(width, 2 * width)
        for block in self.blocks:  # sharp enough that attention is not uniform
            nn.init.normal_(block.qkv.weight, std=0.5)
        self.eval()

    def embedded(self, images: Tensor) -> Tensor:
        """Tokens before the first block."""
        patches = self.bn(self.patches(images)).flatten(2).transpose(1, 2)
        return torch.cat((self.token.expand(len(images), -1, -1), patches), 1) + self.places

    def pooled(self, tokens: Tensor) -> Tensor:
        """The embedding from the tokens after the last block."""
        tokens = self.norm(tokens)
        if self.pool == "probe":
            return self.head(self.probed(tokens)["o"][:, 0, 0])
        parts = {"class": tokens[:, 0], "mean": tokens[:, 1:].mean(1)}
        parts["both"] = torch.cat(tuple(parts.values()), dim=1)
        return self.head(parts[self.pool])

    def probed(self, tokens: Tensor) -> dict[str, Tensor]:
        """Attention pooling: one learned query, one head."""
        k, v = self.kv(tokens).unsqueeze(1).chunk(2, dim=-1)
        q = self.probe.expand(len(tokens), -1, -1, -1)
        if self.blocks[0].fused:
            return {"o": F.scaled_dot_product_attention(q, k, v)}
        a = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return {"q": q, "k": k, "v": v, "a": a, "o": a @ v}

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embedded(images)
        for block in self.blocks:
            tokens = block(tokens)
        return self.pooled(tokens)


def opened(network: TinyViT, image: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """The unit embedding ``(E,)`` of one image ``(1,3,H,W)`` and what each block saw, by hand."""
    tokens, seen = network.embedded(image), []
    for block in network.blocks:
        block.fused = False
        attended, inside = block.attend(block.norm1(tokens))
        tokens = tokens + attended
        tokens = tokens + block.mlp(block.norm2(tokens))
        seen.append(inside)
    if network.pool == "probe":
        seen.append(network.probed(network.norm(tokens)))
        return F.normalize(network.head(seen[-1]["o"][:, 0, 0]), dim=1)[0], seen
    return F.normalize(network.pooled(tokens), dim=1)[0], seen


def by_hand(network: TinyViT, image: Tensor, direction: Tensor) -> dict[str, Tensor]:
    """All maps ``(3,4)`` of one image by plain autograd and loops."""
    unit, seen = opened(network, image)
    score = unit @ direction
    slopes = torch.autograd.grad(score, [inside["a"] for inside in seen], retain_graph=True)
    (pull,) = torch.autograd.grad(score, seen[-1]["o"])
    rolled, relevance = torch.eye(13), torch.eye(13)
    for inside, slope in zip(seen, slopes, strict=True):
        weights = inside["a"][0]
        fused = sum(weights) / len(weights)
        step = sum((s * w).clamp(min=0) for s, w in zip(slope[0], weights, strict=True))
        step = step / len(weights)
        if len(fused) == 13:
            rolled = (0.5 * fused + 0.5 * torch.eye(13)) @ rolled
            relevance = relevance + step @ relevance
        else:  # the probe attends to the tokens
            gained = relevance - torch.eye(13)
            relevance = step @ (gained / gained.sum(dim=1, keepdim=True) + torch.eye(13))
            rolled = fused @ rolled
    if network.pool != "probe":
        relevance = relevance - torch.eye(13)
    rows = {"class": [0], "mean": list(range(1, 13)), "probe": [0]}[network.pool]
    last = seen[-1]["a"][0].mean(0)
    matrices = {"attention": last, "rollout": rolled, "attention_relevance": relevance}
    result = {name: matrix[rows, 1:].mean(0) for name, matrix in matrices.items()}
    result["grad_eclip"] = eclip(seen[-1], pull).clamp(min=0)
    return {name: one.detach().view(3, 4) for name, one in result.items()}


def eclip(inside: dict[str, Tensor], pull: Tensor) -> Tensor:
    """Grad-ECLIP of the twelve patches before the ReLU, summed over the queries."""
    q, k, v = (inside[name][0].transpose(0, 1).flatten(1) for name in "qkv")
    pull, total = pull[0].transpose(0, 1).flatten(1), torch.zeros(12)
    for row in range(len(q)):
        near = torch.stack([F.cosine_similarity(q[row], k[one], dim=0) for one in range(1, 13)])
        loose = (near - near.min()) / (near.max() - near.min())
        total += torch.stack([(pull[row] * v[one]).sum() for one in range(1, 13)]) * loose
    return total
