"""Two processes with half of a batch each train as one with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loss_cases import LABELS, SmoothNet, pictures, smooth_model
from side_by_side import in_two_processes
from torch import Tensor, distributed, nn

from simexplain.errors import ModelError
from simexplain.losses.classification import (
    ClassHead,
    ClassificationLoss,
    ClassificationMiningLoss,
)
from simexplain.losses.constraint import AttentionMaskLoss
from simexplain.losses.metric_losses import QuadrupletLoss
from simexplain.losses.mining import SimilarityMiningLoss
from simexplain.losses.objective import MetricLoss, Objective

HALF = 6
SPLITS = {
    "even": LABELS,
    # The only pairs lie in the first half; the second half gives at most a few negatives.
    "few in the second": torch.tensor([0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8]),
}


def masks() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    result = torch.rand(12, 12, 12, generator=generator, dtype=torch.float64)
    result[[0, 7, 8]] = torch.nan
    return result


def step(images: Tensor, labels: Tensor, masks: Tensor | None) -> tuple[dict[str, float], Tensor]:
    """One step's parts of the loss, and the gradient of everything as one row."""
    torch.manual_seed(0)
    model, head = smooth_model(), ClassHead(9, 5).double()
    terms = {
        "quadruplet": (1.0, MetricLoss(QuadrupletLoss())),
        "mining": (0.3, SimilarityMiningLoss(layer="body", share=0.4)),
        "bce": (0.5, ClassificationLoss(head)),
        "bce_sm": (0.2, ClassificationMiningLoss(head, arch="siamese", layer="body")),
        "mask": (0.4, AttentionMaskLoss(arch="siamese", layer="body")),
    }
    objective = Objective(terms)
    result = objective(model, images, labels, masks=masks, seed=2)
    result.total.backward()  # not autograd.grad, which leaves out what only other processes need
    rows = [part.grad for part in [*model.parameters(), *objective.parameters()]]
    parts = {name: float(part) for name, part in result.parts.items()}
    return parts, nn.utils.parameters_to_vector(rows)


def work(rank: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    own = slice(rank * HALF, (rank + 1) * HALF)
    results = {}
    for name, labels in SPLITS.items():
        parts, gradient = step(pictures(12)[own], labels[own], masks()[own])
        distributed.all_reduce(gradient)
        # One process has masks and the other has none at all.
        lone, _ = step(pictures(12)[own], labels[own], masks()[own] if rank == 0 else None)
        results[name] = (parts, gradient / 2, lone["mask"])
    torch.save(results, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("processes")
    in_two_processes(work, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", SPLITS)
def test_two_processes_train_as_one(halves: list[dict], name: str) -> None:
    parts, gradient = step(pictures(12), SPLITS[name], masks())
    for half in halves:
        result, averaged, _ = half[name]
        assert result == pytest.approx(parts, rel=1e-9)
        assert torch.allclose(averaged, gradient, atol=1e-9)
    lone = masks()
    lone[HALF:] = torch.nan
    expected = step(pictures(12), SPLITS[name], lone)[0]["mask"]
    assert [half[name][2] for half in halves] == pytest.approx([expected] * 2)


# ---------------------------------------------------------------- in DistributedDataParallel


class Step(nn.Module):
    """Network and objective in one module, so that DDP sees the whole computation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network, self.head = SmoothNet().double(), ClassHead(9, 5).double()
        terms = {
            "mining": (0.3, SimilarityMiningLoss(layer="body")),
            "bce": (0.5, ClassificationLoss(self.head)),
        }
        self.objective = Objective(terms)

    def forward(self, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        return self.objective(self.network, images, labels, seed=seed).total


def slopes(step: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector([part.grad for part in step.parameters()])


def work_in_ddp(rank: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    own = slice(rank * HALF, (rank + 1) * HALF)
    step = nn.parallel.DistributedDataParallel(Step())
    step(pictures(12)[own], LABELS[own], 2).backward()
    refused = ""
    try:
        network = nn.parallel.DistributedDataParallel(step.module.network)
        step.module.objective(network, pictures(12)[own], LABELS[own])
    except ModelError as error:
        refused = str(error)
    torch.save((slopes(step), refused), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_in_ddp_the_objective_is_called_inside(tmp_path: Path) -> None:
    in_two_processes(work_in_ddp, tmp_path)
    step = Step()
    step(pictures(12), LABELS, 2).backward()
    for rank in range(2):
        result, refused = torch.load(tmp_path / f"{rank}.pt")
        assert torch.allclose(result, slopes(step), atol=1e-9)
        assert "put a module in it whose forward calls the objective" in refused
