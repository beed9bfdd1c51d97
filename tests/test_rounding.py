"""Rounding is not evidence: short embeddings, identical and blank pictures, autocast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TinyNet
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain import Comparison, Explanation, as_similarity_model, explain, match
from simexplain.networks import full_precision, unit_rows


class Scaled(nn.Module):
    """A network whose vectors are very short or very long."""

    def __init__(self, network: nn.Module, size: float) -> None:
        super().__init__()
        self.network, self.size = network, size

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images) * self.size


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_unit_rows_are_those_of_torch_bit_by_bit(kind: torch.dtype) -> None:
    rows = torch.randn(200, 65, dtype=kind) * torch.randn(200, 1, dtype=kind).exp()
    assert torch.equal(unit_rows(rows), F.normalize(rows, dim=1))
    assert torch.equal(unit_rows(rows, dim=0), F.normalize(rows, dim=0))
    assert torch.equal(unit_rows(rows[0], dim=0), F.normalize(rows[0], dim=0))


@pytest.mark.parametrize("size", [1e-13, 1e-20, 1e-30, 1e-36, 1e15, 1e30, 1e36])
def test_rows_of_any_length_become_unit_rows(size: float) -> None:
    rows = torch.randn(5, 7)
    wide = F.normalize(rows.double(), dim=1)
    torch.testing.assert_close(unit_rows(rows * size).double(), wide, rtol=1e-6, atol=1e-7)
    tiny = rows.double() * size**8  # down to 1e-288, where float64 has no squares
    torch.testing.assert_close(unit_rows(tiny), unit_rows(rows.double()), rtol=1e-9, atol=1e-12)


def test_zero_stays_zero_and_gradients_are_right() -> None:
    assert torch.equal(unit_rows(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert torch.equal(unit_rows(torch.zeros(0, 3)), torch.zeros(0, 3))
    rows = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit_rows, (rows,))


@pytest.mark.parametrize("size", [1e-14, 1e-25, 1e20])
@pytest.mark.parametrize(
    "method", ["sam", "decomposition", "similarity_cam", "focus", "occlusion", "held"]
)
def test_the_length_of_the_vectors_is_of_no_account(
    tiny: TinyNet, images: Tensor, size: float, method: str
) -> None:
    pair = Comparison.pair(images[:1], images[1:2])
    name, options = ("similarity_cam", {"score": "held"}) if method == "held" else (method, {})
    layer = None if name == "occlusion" else "last"
    other = layer and "network.last"
    tiny.head.bias.data.zero_()  # so that embeddings differ, and their maps are no rounding
    own = explain(tiny, pair, name, layer, **options)
    result = explain(Scaled(tiny, size).eval(), pair, name, other, **options)
    torch.testing.assert_close(result.embeddings, own.embeddings, rtol=1e-5, atol=1e-6)
    top = float(own.maps.abs().max())
    assert top > 0
    torch.testing.assert_close(result.maps / top, own.maps / top, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("method", ["saliency", "input_x_gradient", "similarity_cam"])
def test_identical_pictures_have_no_gradient_to_show(
    tiny: TinyNet, images: Tensor, method: str
) -> None:
    """Their cosine is as large as can be; what a network gives as its gradient is rounding."""
    same = Comparison.pair(images[:3], images[:3])
    layer = "last" if method == "similarity_cam" else None
    result = explain(tiny, same, method, layer)
    assert not result.maps.any()
    for index in range(3):
        assert result.peaks(index) == [None, None]
    assert any("is empty" in record for record in result.warnings)
    # Nearly the same is another matter.
    near = Comparison.pair(images[:1], images[:1] + 0.02 * torch.rand_like(images[:1]))
    assert explain(tiny, near, method, layer).maps.any()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("occlusion", {"fill": "mean"}),
        ("occlusion", {"fill": "blur"}),
        ("sbsm", {"fill": "mean"}),
        ("random_masks", {"fill": "mean", "masks": 40}),
        ("integrated_gradients", {"baseline": "mean"}),
        ("integrated_gradients", {"baseline": "blur"}),
    ],
)
def test_hiding_nothing_shows_nothing(
    tiny: TinyNet, images: Tensor, method: str, options: dict[str, object]
) -> None:
    """A picture of one colour looks the same with any part hidden by that colour."""
    blank = torch.full_like(images[:1], 0.3) + 0.1 * torch.arange(3).view(1, 3, 1, 1)
    result = explain(tiny, Comparison.pair(blank, images[:1]), method, **options)
    assert not result.maps[0, 0].any()
    assert result.peaks()[0] is None
    assert result.maps[0, 1].any()
    assert result.peaks()[1] is not None


AUTOCAST = [
    ("sam", "last"), ("similarity_cam", "last"), ("decomposition", "last"), ("focus", "last"),
    ("saliency", None), ("occlusion", None), ("integrated_gradients", None),
]  # fmt: skip


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("method", "layer"), AUTOCAST)
def test_autocast_changes_nothing(
    tiny: TinyNet, images: Tensor, kind: torch.dtype, method: str, layer: str | None, tmp_path: Path
) -> None:
    pair = Comparison.pair(images[:1], images[1:2])
    own = explain(tiny, pair, method, layer)
    with torch.autocast("cpu", kind):
        result = explain(tiny, pair, method, layer)
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == kind
        result.save(tmp_path / "found")
    assert result.maps.dtype == torch.float32
    torch.testing.assert_close(result.maps, own.maps, rtol=0, atol=0)
    assert torch.equal(Explanation.load(tmp_path / "found").maps, own.maps)


def test_autocast_changes_no_matching(tiny: TinyNet, images: Tensor, tmp_path: Path) -> None:
    own = match(tiny, images[:1], images[1:2], "last")
    with torch.autocast("cpu", torch.bfloat16):
        result = match(tiny, images[:1], images[1:2], "last")
        result.save(tmp_path / "found")
        rows = as_similarity_model(tiny)(images)
    torch.testing.assert_close(result.matrix, own.matrix, rtol=0, atol=0)
    assert rows.dtype == torch.float32  # outside our passes the caller's choice stands


def test_full_precision_gives_autocast_back_after_an_error() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="broken"):
            broken()
        assert torch.is_autocast_enabled("cpu")


@full_precision()
def broken() -> None:
    assert not torch.is_autocast_enabled("cpu")
    raise ValueError("broken")
