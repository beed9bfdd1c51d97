"""Similarity attention against reference values computed independently in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from simexplain import Comparison, explain
from simexplain.methods.cams import channel_weights, grad_cam
from simexplain.methods.similarity_attention import SimilarityAttention, similarity_weights
from simexplain.models.embedder import as_similarity_model
from simexplain.tracing import trace

GOLDEN = np.load(Path(__file__).parent / "golden" / "sam_reference.npz")
ARRANGEMENTS = {
    "siamese_similar": ([1], []),
    "siamese_dissimilar": ([], [1]),
    "triplet": ([1], [2]),
    "quadruplet": ([1], [2, 3]),
    "two_positives_three_negatives": ([1, 2], [3, 4, 5]),
}
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}


def golden(key: str) -> Tensor:
    return torch.from_numpy(GOLDEN[key])


class ReferenceNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        conv, linear = golden("conv_weight"), golden("linear_weight")
        self.conv = nn.Conv2d(3, len(conv), 1)
        self.relu = nn.ReLU(inplace=True)
        self.linear = nn.Linear(linear.shape[1], linear.shape[0])
        self.double()
        self.conv.weight.data = conv[:, :, None, None]
        self.conv.bias.data = golden("conv_bias")
        self.linear.weight.data = linear
        self.linear.bias.data = golden("linear_bias")

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.relu(self.conv(images)).mean(dim=(2, 3)))


def arranged(values: Tensor, name: str) -> Comparison:
    positives, negatives = ARRANGEMENTS[name]
    return Comparison(values[:1], values[positives][None], values[negatives][None])


def assert_close(result: Tensor, key: str, dtype: torch.dtype) -> None:
    wanted = golden(key)
    error = (result.double() - wanted).abs().max() / wanted.abs().max()
    assert error < TOLERANCE[dtype], f"{key}: relative error {error:.2e}"


@pytest.mark.parametrize("name", ARRANGEMENTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_golden_value(name: str, dtype: torch.dtype) -> None:
    model = as_similarity_model(ReferenceNet().to(dtype))
    images = golden("images").to(dtype)
    result = explain(model, arranged(images, name), layer="relu")
    assert_close(result.weights[0], f"{name}/weight", dtype)
    assert_close(result.scores[0], f"{name}/scores", dtype)
    assert_close(result.maps[0], f"{name}/maps", dtype)
    assert result.maps.dtype == dtype


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_channel_weights_are_the_alpha_of_equation_2(name: str) -> None:
    model = as_similarity_model(ReferenceNet())
    comparison = arranged(golden("images"), name)
    traced = trace(model, comparison.stacked().flatten(0, 1), ["relu"])
    weights = similarity_weights(comparison.like(comparison.restacked(traced.embeddings.detach())))
    gradient = traced.gradients((weights @ traced.embeddings.T).sum())["relu"]
    assert_close(channel_weights(gradient), f"{name}/channel_weights", torch.float64)
    maps = grad_cam(traced.maps["relu"].detach(), gradient).relu()
    assert_close(maps, f"{name}/maps", torch.float64)


def test_embeddings_and_activations() -> None:
    model = as_similarity_model(ReferenceNet())
    traced = trace(model, golden("images"), ["relu"])
    assert_close(traced.embeddings.detach(), "embeddings", torch.float64)
    assert_close(traced.maps["relu"].detach(), "activations", torch.float64)


def test_the_default_method_is_exactly_the_paper() -> None:
    assert SimilarityAttention() == SimilarityAttention(
        weights="paper", cam=None, through_weights=False, keep_negative=False
    )
