"""The formulas against naive loops and an independent library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from simexplain.methods.cams import CAMS, channel_weights, fuse, unit_scaled


@pytest.fixture
def maps() -> tuple[Tensor, Tensor]:
    activations = torch.randn(3, 4, 5, 6, dtype=torch.float64).relu()
    return activations, torch.randn(3, 4, 5, 6, dtype=torch.float64)


def naive(name: str, a: np.ndarray, g: np.ndarray) -> np.ndarray:
    """One image ``(C,h,w)``, position by position, straight from the papers."""
    channels, height, width = a.shape
    out = np.zeros((height, width))
    for k in range(channels):
        if name == "grad_cam":
            out += g[k].sum() / (height * width) * a[k]
        elif name == "grad_cam_plus_plus":
            weight = 0.0
            for i in range(height):
                for j in range(width):
                    below = 2 * g[k, i, j] ** 2 + a[k].sum() * g[k, i, j] ** 3
                    weight += g[k, i, j] ** 2 / below * max(g[k, i, j], 0.0)
            out += weight * a[k]
        else:
            gate = np.maximum(g[k], 0) if name == "layer_cam" else g[k]
            out += gate * a[k]
    return out


@pytest.mark.parametrize("name", CAMS)
def test_every_formula_equals_the_naive_loop(name: str, maps) -> None:
    result = CAMS[name](*maps)
    for image in range(3):
        wanted = naive(name, maps[0][image].numpy(), maps[1][image].numpy())
        np.testing.assert_allclose(result[image].numpy(), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("grad_cam", "GradCAM"), ("hires_cam", "HiResCAM"), ("layer_cam", "LayerCAM")],
)
def test_against_grad_cams_package(name: str, theirs: str, maps) -> None:
    package = pytest.importorskip("pytorch_grad_cam", reason="the grad-cam package is missing")
    activations, gradients = (m.numpy() for m in maps)
    method = object.__new__(getattr(package, theirs))
    wanted = method.get_cam_image(None, None, None, activations, gradients, False)
    np.testing.assert_allclose(CAMS[name](*maps).numpy(), wanted, rtol=1e-6)


@pytest.mark.parametrize("name", CAMS)
def test_zero_gradients_and_constant_maps_stay_finite(name: str, maps) -> None:
    activations, gradients = maps
    assert torch.equal(CAMS[name](activations, 0 * gradients), torch.zeros(3, 5, 6).double())
    assert CAMS[name](torch.ones_like(activations), gradients).isfinite().all()


@pytest.mark.parametrize("name", CAMS)
def test_every_formula_is_differentiable(name: str, maps) -> None:
    activations, gradients = (m[:1, :2, :2, :2].clone().requires_grad_() for m in maps)
    assert torch.autograd.gradcheck(CAMS[name], (activations + 0.1, gradients))


def test_channel_weights_are_means(maps) -> None:
    torch.testing.assert_close(channel_weights(maps[1])[1, 2], maps[1][1, 2].mean())


def test_fusing_multiplies_scaled_maps_on_the_finest_grid() -> None:
    coarse, fine = torch.rand(1, 2, 2, 2), torch.rand(1, 2, 4, 4)
    grown = torch.nn.functional.interpolate(coarse, size=(4, 4), mode="bilinear")
    wanted = grown / grown.amax((2, 3), True) * fine / fine.amax((2, 3), True)
    torch.testing.assert_close(fuse([coarse, fine]), wanted)
    assert fuse([fine]) is fine
    assert torch.equal(fuse([0 * coarse, fine]), torch.zeros(1, 2, 4, 4))
    assert torch.equal(fuse([-fine, -fine]), torch.zeros(1, 2, 4, 4))  # no evidence from two wrongs


def test_scaling_keeps_zero_maps_and_signs() -> None:
    maps = torch.tensor([[[0.0, 0.0]], [[-4.0, 2.0]]])
    torch.testing.assert_close(unit_scaled(maps), torch.tensor([[[0.0, 0.0]], [[-1.0, 0.5]]]))
