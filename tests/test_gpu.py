"""The same on a CUDA device; run by make test-all where there is one."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import TinyNet
from torch import Tensor

from simexplain import Comparison, as_similarity_model, explain
from simexplain.data.preprocessing import Preprocess
from simexplain.models.accelerating import accelerated

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def test_maps_on_the_gpu_equal_those_on_the_cpu(tiny: TinyNet, images: Tensor) -> None:
    comparison = Comparison.triplet(*images[:3, None])
    wanted = explain(
        tiny.double(), comparison.like(comparison.stacked().double()), weights="signed"
    )
    result = explain(
        copy.deepcopy(tiny).cuda(), comparison.like(comparison.stacked().double()), weights="signed"
    )
    assert result.maps.device.type == "cuda"
    torch.testing.assert_close(result.maps.cpu(), wanted.maps, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(result.distances.cpu(), wanted.distances)
    assert result.peaks() == wanted.peaks()
    assert result.figure().axes


def test_the_random_state_of_the_gpu_is_as_before(tiny: TinyNet, images: Tensor) -> None:
    class Drawing(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0 * torch.rand((), device=x.device)

    before = torch.cuda.get_rng_state()
    explain(Drawing().cuda().eval(), Comparison.pair(images[:1], images[1:2]))
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_the_fast_twin_works_on_the_gpu(tiny: TinyNet, images: Tensor) -> None:
    model = as_similarity_model(tiny.cuda(), preprocess=Preprocess(size=(24, 32)))
    comparison = Comparison.pair(images[:1], images[1:2])
    plain, fast = (explain(m, comparison, weights="relative") for m in (model, accelerated(model)))
    torch.testing.assert_close(fast.maps, plain.maps, rtol=1e-2, atol=1e-5)
