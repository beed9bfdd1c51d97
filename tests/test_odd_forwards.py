"""Networks whose forward does more than call layers: half precision, chance, choices, sums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain import (
    Comparison,
    as_similarity_model,
    explain,
    load_model,
    match,
    save_model,
)
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ModelError
from simexplain.models.base import SimilarityModel

SIZE = (32, 48)
WIDTH = 12


class Trunk(nn.Module):
    """Two halvings and a linear layer; what happens to the last map is a test's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, WIDTH, 4, 4), nn.Conv2d(WIDTH, WIDTH, 2, 2)
        self.head = nn.Linear(WIDTH, 8)

    def maps(self, images: Tensor) -> Tensor:
        return self.last(self.first(images).tanh()).tanh()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.maps(images).mean((2, 3)))


def wrapped(network: nn.Module) -> SimilarityModel:
    return as_similarity_model(network.eval(), preprocess=Preprocess(size=SIZE))


@pytest.fixture
def pair() -> Comparison:
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    return Comparison.pair(images[:1], images[1:])


class Half(Trunk):
    """Enters autocast by itself."""

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(images).float()


def test_a_network_under_autocast_is_explained_exactly(pair: Comparison) -> None:
    torch.manual_seed(0)
    model = wrapped(Half())
    parts = explain(model, pair, method="decomposition", check=False)
    plain = wrapped(Trunk())
    plain.network.load_state_dict(model.network.state_dict())
    right = explain(plain, pair, method="decomposition", check=False)
    close = 0.06 * float(right.maps.abs().max())  # what bfloat16 rounds
    assert torch.allclose(parts.maps, right.maps, atol=close, rtol=0)
    images = pair.stacked()[0]
    result = match(model, images[:1], images[1:])
    assert float(result.residual.abs().max()) < 0.03 * float(result.score)


def test_a_program_under_autocast_is_refused_when_saved(tmp_path: Path, pair: Comparison) -> None:
    with pytest.raises(ModelError, match=r"enters torch\.autocast"):
        save_model(wrapped(Half()), tmp_path / "half.pt2")
    assert not list(tmp_path.iterdir())
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(
        Half().eval(), (torch.rand(2, 3, *SIZE),), dynamic_shapes=({0: batch},)
    )
    torch.export.save(program, tmp_path / "theirs.pt2")
    model = load_model(tmp_path / "theirs.pt2")
    assert any("torch.autocast" in note for note in model.preprocess.notes)
    assert explain(model, pair, method="saliency", check=False).maps.any()


class Dropping(Trunk):
    """The usual slip: a function for dropout takes it that it is trained."""

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.dropout(self.maps(images).mean((2, 3))))


class Noisy(Trunk):
    def forward(self, images: Tensor) -> Tensor:
        maps = self.maps(images)
        return self.head((maps + torch.randn_like(maps)).mean((2, 3)))


class Unused(Trunk):
    """Draws numbers that change nothing."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images + 0 * torch.rand(1))


@pytest.mark.parametrize("build", [Dropping, Noisy])
def test_a_network_that_draws_random_numbers_is_mentioned(
    build: type[Trunk], pair: Comparison
) -> None:
    model = wrapped(build())
    before = torch.get_rng_state()
    result = explain(model, pair, check=False)
    assert any("draws random numbers" in text for text in result.warnings)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("build", [Trunk, Unused])
def test_chance_without_effect_is_not_mentioned(build: type[Trunk], pair: Comparison) -> None:
    result = explain(wrapped(build()), pair, check=False)
    assert not any("random numbers" in text for text in result.warnings)


class Choosing(Trunk):
    """Keeps the cells above a threshold, and a layer for each of so many."""

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.maps(images).flatten(2).transpose(1, 2)
        rows = []
        for image in tokens:
            kept = image[image.mean(1) > image.mean()]
            rows.append(kept.reshape(len(kept), WIDTH).tanh().mean(0))
        return self.head(torch.stack(rows))


def test_a_tail_that_cannot_be_run_on_other_numbers_says_so(pair: Comparison) -> None:
    model = wrapped(Choosing())
    result = explain(model, pair, layer="last", check=False)
    assert result.maps.any()
    with pytest.raises(ModelError, match="cannot be run again on others"):
        explain(model, pair, method="decomposition", layer="last", check=False, steps=4)
