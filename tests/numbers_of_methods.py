"""How far maps move when nothing but the arithmetic changes, and what each method promises.

``python tests/numbers_of_methods.py`` prints the table of ``docs/reliability.md``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from simexplain import Comparison, as_similarity_model, explain
from simexplain.methods import METHODS

PROMISED = {
    "decomposition": 1e-5, "attention": 1e-5,
    **dict.fromkeys(
        ("sam", "focus", "similarity_cam", "attention_relevance", "grad_eclip", "saliency",
         "smoothgrad", "input_x_gradient", "integrated_gradients"), 1e-4,
    ),
    "occlusion": 5e-3, "sbsm": 5e-3, "random_masks": 5e-2,
}  # fmt: skip
"""Largest difference of a map, as a share of the largest value of a comparison's maps.

Methods on pixels subtract nearly equal scores, and random masks are ranked by them.
"""
EXACT = {"the same again", "default dtype float64", "default device meta", "inference_mode",
         "autocast", "deterministic algorithms"}  # fmt: skip
"""Changes after which every bit is the same."""


class Convolutions(nn.Module):
    """A residual network with normalisation, small enough for a thousand passes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.act = nn.ReLU()
        self.left = nn.Conv2d(12, 12, 3, padding=1)
        self.down = nn.Conv2d(12, 24, 3, stride=2, padding=1)
        self.last = nn.ReLU()
        self.head = nn.Linear(24, 16)

    def forward(self, images: Tensor) -> Tensor:
        features = self.act(self.norm(self.stem(images)))
        features = features + self.left(features)
        return self.head(self.last(self.down(features)).mean(dim=(2, 3)))


def transformer() -> nn.Module:
    """A ViT of two blocks, for the methods that read attention."""
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=2,
        num_classes=0,
    )  # fmt: skip


def network_for(method: str) -> nn.Module:
    """What a method is measured on, with random weights."""
    torch.manual_seed(0)
    attending = METHODS[method].__module__ == "simexplain.methods.attention"
    return (transformer() if attending else Convolutions()).eval()


def triplets(count: int = 3) -> Tensor:
    """Pictures of so many triplets, ``(B,3,3,32,32)``."""
    return torch.rand(count, 3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


FEWER: dict[str, dict[str, int]] = {"random_masks": {"masks": 200}}
"""Options for as much work as shows rounding."""


def maps(network: nn.Module, images: Tensor, method: str) -> Tensor:
    model = as_similarity_model(network)
    anchors, positives, negatives = images.unbind(1)
    comparison = Comparison.triplet(anchors, positives, negatives)
    return explain(model, comparison, method, check=False, **FEWER.get(method, {})).maps


@cache
def unchanged(method: str) -> Tensor:
    """The maps of a plain call, made once."""
    return maps(network_for(method), triplets(), method).double()


@contextmanager
def _default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _inside(context: Callable[[], object]) -> Callable[[nn.Module, Tensor, str], Tensor]:
    def measured(network: nn.Module, images: Tensor, method: str) -> Tensor:
        with context():  # type: ignore[attr-defined]
            return maps(network, images, method)

    return measured


def _alone(network: nn.Module, images: Tensor, method: str) -> Tensor:
    return torch.cat([maps(network, own[None], method) for own in images])


def _double(network: nn.Module, images: Tensor, method: str) -> Tensor:
    return maps(copy.deepcopy(network).double(), images.double(), method)


def _one_thread(network: nn.Module, images: Tensor, method: str) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return maps(network, images, method)
    finally:
        torch.set_num_threads(before)


CHANGES: dict[str, Callable[[nn.Module, Tensor, str], Tensor]] = {
    "the same again": maps,
    "one at a time": _alone,
    "one thread": _one_thread,
    "float64": _double,
    "default dtype float64": _inside(_default_dtype),
    "default device meta": _inside(lambda: torch.device("meta")),
    "inference_mode": _inside(torch.inference_mode),
    "autocast": _inside(lambda: torch.autocast("cpu", torch.bfloat16)),
    "deterministic algorithms": _inside(_deterministic),
}
"""What changes around the same question."""


def moved(method: str, change: str) -> float:
    """How far the maps move, as a share of the largest value of each comparison's maps."""
    network, images = network_for(method), triplets()
    plain = unchanged(method)
    other = CHANGES[change](network, images, method).double()
    largest = plain.abs().amax(dim=tuple(range(1, plain.ndim)), keepdim=True)
    return float(((plain - other).abs() / largest).max())


def table() -> str:
    """Methods by changes, in Markdown."""
    rows = ["| method | promised | " + " | ".join(CHANGES) + " |",
            "| --- " * (len(CHANGES) + 2) + "|"]  # fmt: skip
    for method, promised in PROMISED.items():
        found = [moved(method, change) for change in CHANGES]
        shown = " | ".join("0" if value == 0 else f"{value:.0e}" for value in found)
        rows.append(f"| `{method}` | {promised:.0e} | {shown} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())  # noqa: T201
