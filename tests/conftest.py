"""Small networks and pictures that every test may use."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable
from pathlib import Path

# As the command line does, before anything computes: the same bytes from run to run.
os.environ.setdefault("MKL_CBWR", "AUTO")

import pytest
import torch
from cli_runs import Run, simexplain
from pictures import noise
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain import load_model
from simexplain.errors import ModelError

LONGEST = (
    "notebooks", "cli_batch", "docs", "short_tails", "hostile", "properties", "cli", "cli_train",
    "publishing", "batch", "benchmarks", "training_resume", "numbers", "cli_attribute", "matrix",
    "cli_errors", "training_ddp", "normalised_networks", "attention", "rendering", "names",
    "writers", "attribution_rendering",
)  # fmt: skip
"""Test files that take long, the longest first."""
DEMO = Path(__file__).parents[1] / "simexplain" / "data" / "demo"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that two workers end at about the same time."""
    order = {f"test_{name}": index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_collection_finish() -> None:
    """Half a million objects stay from here to the last test; the collector leaves them alone."""
    gc.collect()
    gc.set_threshold(100_000, 10, 10)
    gc.freeze()


def pytest_unconfigure() -> None:
    """Or libraries would complain of what is left at the end."""
    gc.unfreeze()


class TinyNet(nn.Module):
    """Two convolutions with batch norm, pooling and a linear head; quick and not symmetric."""

    def __init__(self, width: int = 12, embedding: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(8, width, 3, stride=2, padding=1)
        self.last = nn.ReLU()
        self.head = nn.Linear(width, embedding)
        self.norm.running_mean.normal_(0, 0.1)
        self.norm.running_var.uniform_(0.5, 1.5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.last(self.body(self.act(self.norm(self.stem(images)))))
        return self.head(features.mean(dim=(2, 3)))


class SharedNet(nn.Module):
    """One convolution and one ReLU that run three times each, as in weight-shared pyramids."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.block = nn.Conv2d(8, 8, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        for _ in range(3):
            features = self.act(self.block(features)) + 0.1 * features
        return features.mean(dim=(2, 3))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that looks up a host or opens a connection."""

    def used(*arguments: object, **_: object) -> None:
        pytest.fail(f"the network was used: {arguments}")  # which no except clause swallows

    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, used)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, used, raising=False)


@pytest.fixture
def tiny() -> TinyNet:
    return TinyNet().eval()


@pytest.fixture
def images() -> Tensor:
    """Six images that are not square."""
    return torch.rand(6, 3, 24, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def demo_paths() -> list[Path]:
    return [DEMO / f"{role}.jpg" for role in ("anchor", "positive", "negative")]


def plain_maps(
    module: nn.Module,
    layer: nn.Module,
    image: Tensor,
    weight: Tensor,
    *,
    grid=lambda output: output,
    call: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Grad-CAM of ``weight . f`` for one image alone, by plain autograd with a retained graph.

    Independent of simexplain: an ordinary forward with gradients everywhere, one image, one hook.

    Returns:
        The map, the unit embedding and the gradient of the score at the layer, as grids.
    """
    outputs: list[Tensor] = []
    values: list[Tensor] = []

    def keep(_module, _args, output):
        tensor = output[0] if isinstance(output, tuple) else output
        values.append(tensor.detach().clone())  # before anything works on it in place
        outputs.append(tensor)
        clone = tensor.clone()
        return (clone, *output[1:]) if isinstance(output, tuple) else clone

    handle = layer.register_forward_hook(keep)
    try:
        embedding = F.normalize(module(image.clone().requires_grad_() * 1).flatten(1), dim=1)
        (gradient,) = torch.autograd.grad((embedding @ weight).sum(), outputs[call])
    finally:
        handle.remove()
    activation, gradient = grid(values[call]), grid(gradient)
    alpha = gradient.mean(dim=(2, 3), keepdim=True)
    return (alpha * activation).sum(dim=1).relu()[0], embedding[0].detach(), gradient[0]


def varied(network: nn.Module) -> nn.Module:
    """Statistics and heads that are not trivial, so that a wrong formula shows."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def refusal(*args: object, **options: object) -> str:
    """The sentence with which load_model refuses; one line that ends in a full stop."""
    with pytest.raises(ModelError) as caught:
        load_model(*args, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two good pictures and many bad ones, which is the current one."""
    for name in ("a.png", "b.jpg", "whole.jpg"):
        noise(40, 60, seed=len(name)).save(tmp_path / name)
    (tmp_path / "text.jpg").write_text("no picture", encoding="utf-8")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.png").touch()
    noise(10, 900).save(tmp_path / "strip.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SIMEXPLAIN_DEBUG", raising=False)
    return tmp_path


@pytest.fixture
def run(here: Path) -> Callable[..., Run]:
    """Runs the command line in this process and the current folder, which is ``here``."""
    return simexplain


@pytest.fixture
def fails(run: Callable[..., Run], here: Path) -> Callable[..., str]:
    """Runs, and checks that nothing but one line of error came out and nothing was written."""

    def check(*arguments: object, code: int = 1) -> str:
        before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
        result = run(*arguments)
        assert result.code == code, result.err
        assert result.out == ""
        assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before
        if code == 1:
            assert result.err.startswith("Error: ")
            assert result.err.endswith((".\n", "?\n"))
            assert result.err.count("\n") == 1, result.err
            assert "Unexpected" not in result.err
        return result.err

    return check
