"""One model in many threads: every result as alone, and the network left as it was."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import TinyNet
from torch import Tensor

from simexplain import Comparison, as_similarity_model, explain, match

THREADS = 8
METHODS = ("sam", "focus", "similarity_cam", "decomposition", "saliency", "occlusion", "sbsm")
COARSE = {"occlusion": {"stride": 0.2}, "sbsm": {"stride": 0.2}}
"""Options for fewer passes of methods that take many."""


def state_of(network: torch.nn.Module) -> list[object]:
    """What a call must leave as it was."""
    return [
        [module.training for module in network.modules()],
        [len(module._forward_hooks) for module in network.modules()],
        [value.clone() for value in network.state_dict().values()],
        [parameter.requires_grad for parameter in network.parameters()],
        [parameter.grad for parameter in network.parameters()],
    ]


def triplet_of(images: Tensor) -> Comparison:
    return Comparison.triplet(images[:1], images[1:2], images[2:3])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_result_is_as_alone(images: Tensor, method: str, training: bool) -> None:
    network = TinyNet().train(training)
    model = as_similarity_model(network)
    triplets = [triplet_of(images.roll(turn, 0)) for turn in range(3)]
    options = COARSE.get(method, {})

    def of(triplet: Comparison) -> Tensor:
        return explain(model, triplet, method, check=False, **options).maps

    alone = [of(triplet) for triplet in triplets]
    before = state_of(network)
    with ThreadPoolExecutor(THREADS) as pool:
        result = list(pool.map(lambda n: of(triplets[n % 3]), range(24)))
    for number, maps in enumerate(result):
        assert torch.equal(maps, alone[number % 3])
    torch.testing.assert_close(state_of(network), before, rtol=0, atol=0)


def test_methods_side_by_side(images: Tensor) -> None:
    model = as_similarity_model(TinyNet().eval())
    triplet = triplet_of(images)
    alone = {method: explain(model, triplet, method).maps for method in METHODS}
    matched = match(model, images[:1], images[1:2]).matrix
    with ThreadPoolExecutor(THREADS) as pool:
        result = pool.map(lambda method: explain(model, triplet, method).maps, 3 * METHODS)
        matches = pool.map(lambda _: match(model, images[:1], images[1:2]).matrix, range(6))
        for method, maps in zip(3 * METHODS, result, strict=True):
            assert torch.equal(maps, alone[method])
        assert all(torch.equal(one, matched) for one in matches)


def test_a_pass_of_ones_own_beside_an_explanation(images: Tensor) -> None:
    network = TinyNet().eval()
    model = as_similarity_model(network)
    triplet = triplet_of(images)
    alone, rows = explain(model, triplet, "focus").maps, network(images)
    stop, wrong = threading.Event(), []

    def serve() -> None:
        while not stop.is_set():
            wrong.extend([] if torch.equal(network(images), rows) else [1])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(10):
            assert torch.equal(explain(model, triplet, "focus").maps, alone)
    finally:
        stop.set()
        thread.join()
    assert not wrong


def test_an_error_in_one_thread_holds_up_no_other(images: Tensor) -> None:
    network = TinyNet().eval()
    model = as_similarity_model(network)
    triplet = triplet_of(images)
    alone = explain(model, triplet).maps

    def one(number: int) -> Tensor | str:
        try:
            return explain(model, triplet, layer="nowhere" if number % 2 else None).maps
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(THREADS) as pool:
        for number, result in enumerate(pool.map(one, range(16))):
            assert "nowhere" in result if number % 2 else torch.equal(result, alone)
