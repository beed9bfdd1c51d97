"""Wrapping any module: where the embedding comes from, what is unwrapped, what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from conftest import TinyNet
from torch import Tensor, nn

from simexplain import as_similarity_model
from simexplain.errors import ModelError


class Returning(nn.Module):
    """Gives an embedding inside of something."""

    def __init__(self, pack: Any) -> None:
        super().__init__()
        self.inner = TinyNet()
        self.pack = pack

    def forward(self, images: Tensor) -> Any:
        return self.pack(self.inner(images))


@pytest.mark.parametrize(
    ("pack", "output"),
    [
        (lambda e: (e - 1, e), 1),
        (lambda e: [e, e - 1], 0),
        (lambda e: (e - 1, e), -1),
        (lambda e: {"embedding": e, "logits": e - 1}, "embedding"),
        (lambda e: SimpleNamespace(pooled=e, other=1), "pooled"),
        (lambda e: {"deep": [e - 1, e]}, lambda result: result["deep"][1]),
        (lambda e: e[:, :, None, None], None),
        (lambda e: (e,), None),
        (lambda e: [e], None),
        (lambda e: e.half(), None),
    ],
)
def test_output_picks_the_embedding(pack: Any, output: Any, images: Tensor) -> None:
    module = Returning(pack).eval()
    with torch.no_grad():
        actual = as_similarity_model(module, output=output).embed(images)
        expected = nn.functional.normalize(module.inner(images), dim=1)
    assert actual.dtype == torch.float32
    assert torch.allclose(actual, expected, atol=1e-3 if output is None else 0)


@pytest.mark.parametrize(
    ("pack", "output", "said"),
    [
        (lambda e: (e, e), None, "tuple of 2"),
        (lambda e: {"a": e}, None, "keys a"),
        (lambda e: (e, e), 5, "output=5"),
        (lambda e: {"a": e}, "b", "output='b'"),
        (lambda e: SimpleNamespace(a=e), "b", "output='b'"),
        (lambda e: e, "missing", "output='missing'"),
        (lambda e: {"a": e}, lambda r: r["b"], "does not pick"),
        (lambda e: e[:, :, None, None].expand(-1, -1, 3, 3), None, "add pooling"),
        (lambda e: e[0], None, "Expected an embedding"),
        (lambda e: e[:2], None, "Expected an embedding"),
        (lambda e: None, None, "NoneType"),
    ],
)
def test_outputs_that_are_no_embedding(pack: Any, output: Any, said: str, images: Tensor) -> None:
    with pytest.raises(ModelError) as caught:
        as_similarity_model(Returning(pack), output=output).embed(images)
    assert said in str(caught.value)


def test_wrappers_are_taken_off(tiny: nn.Module) -> None:
    assert as_similarity_model(nn.DataParallel(tiny)).network is tiny
    compiled = torch.compile(tiny)
    assert as_similarity_model(compiled).network is tiny
    assert as_similarity_model(nn.DataParallel(compiled)).network is tiny
    assert as_similarity_model(torch.compile(nn.DataParallel(tiny))).network is tiny
    model = as_similarity_model(tiny)
    assert as_similarity_model(model) is model


def test_what_is_no_module(tiny: nn.Module) -> None:
    with pytest.raises(ModelError, match="load_model"):
        as_similarity_model("model.pt")
    with pytest.raises(ModelError, match="euclidean, squared, cosine"):
        as_similarity_model(tiny, distance="far")
    with pytest.raises(ModelError, match="unsqueeze"):
        as_similarity_model(tiny).embed(torch.zeros(3, 24, 32))


def test_rows_are_units_and_zero_stays_zero(images: Tensor) -> None:
    module = Returning(lambda e: torch.cat((e[:1] * 0, e[1:]))).eval()
    rows = as_similarity_model(module).embed(images)
    assert torch.equal(rows[0], torch.zeros(10))
    assert torch.allclose(rows[1:].norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("name", ["euclidean", "squared", "cosine"])
def test_distances(name: str) -> None:
    q, g = (nn.functional.normalize(torch.randn(n, 6, dtype=torch.float64)) for n in (3, 4))
    result = as_similarity_model(TinyNet(), distance=name).distance(q, g)
    for i in range(3):
        for j in range(4):
            apart = float(((q[i] - g[j]) ** 2).sum())
            expected = {"euclidean": apart**0.5, "squared": apart, "cosine": apart / 2}[name]
            assert float(result[i, j]) == pytest.approx(expected, abs=1e-12)


def test_preprocessing_that_nobody_told_is_known_or_noted() -> None:
    timm_net = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    known = as_similarity_model(timm_net).preprocess
    assert (known.mean, known.interpolation, known.notes) == ((0.5,) * 3, "bicubic", ())
    (note,) = as_similarity_model(TinyNet()).preprocess.notes
    assert "ImageNet's usual values" in note
    assert as_similarity_model(TinyNet(), preprocess=known).preprocess is known
