"""What every method in METHODS promises, whatever it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TinyNet
from torch import Tensor

from simexplain import Comparison, explain
from simexplain.errors import ComparisonError, ModelError
from simexplain.methods import METHODS, PIXELS, options_of

QUICK: dict[str, dict[str, Any]] = {
    "smoothgrad": {"samples": 2},
    "integrated_gradients": {"steps": 4},
    "random_masks": {"masks": 20},
}


@pytest.fixture
def triplets(images: Tensor) -> Comparison:
    return Comparison.triplet(images[:2], images[2:4], images[4:6])


@pytest.mark.parametrize("method", METHODS)
def test_every_image_of_every_comparison_gets_a_map(
    tiny: TinyNet, triplets: Comparison, method: str
) -> None:
    signed = {"keep_negative": True}
    signed = signed if "keep_negative" in [o.name for o in options_of(METHODS[method])] else {}
    result = explain(tiny, triplets, method, **QUICK.get(method, {}), **signed)
    assert result.maps.shape[:2] == (2, 3)
    assert result.maps.dtype == torch.float32
    assert result.maps.isfinite().all()
    assert (result.maps[:, :2].abs().amax(dim=(2, 3)) > 0).all()
    assert result.heatmaps.shape == (2, 3, 24, 32)
    assert result.scores.shape == (2, 3)
    assert result.embeddings.shape == (2, 3, 10)
    assert result.method == method
    layers = (PIXELS,) if not METHODS[method].uses_layers else result.layers
    assert result.layers == layers
    assert list(result.layer_maps) == list(layers)


@pytest.mark.parametrize("method", METHODS)
def test_maps_of_an_image_do_not_depend_on_its_batch(
    tiny: TinyNet, triplets: Comparison, method: str
) -> None:
    options = QUICK.get(method, {})
    whole = explain(tiny, triplets, method, **options)
    parts = Comparison(*(part[1:] for part in (triplets.anchor, triplets.positives,
                                               triplets.negatives)))  # fmt: skip
    alone = explain(tiny, parts, method, max_batch=2, **options)
    scale = float(whole.maps.abs().max())
    torch.testing.assert_close(alone.maps[0], whole.maps[1], rtol=1e-3, atol=1e-4 * scale + 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_the_user_s_is_touched(tiny: TinyNet, triplets: Comparison, method: str) -> None:
    tiny.train()
    tiny.norm.eval()
    modes = [module.training for module in tiny.modules()]
    state = {key: value.clone() for key, value in tiny.state_dict().items()}
    before, kept = torch.get_rng_state(), triplets.stacked().clone()
    explain(tiny, triplets, method, **QUICK.get(method, {}))
    assert [module.training for module in tiny.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in tiny.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny.parameters())
    assert not any(module._forward_hooks for module in tiny.modules())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(triplets.stacked(), kept)


@pytest.mark.parametrize("method", METHODS)
def test_layers_and_options_are_checked(tiny: TinyNet, triplets: Comparison, method: str) -> None:
    assert options_of(METHODS[method])
    with pytest.raises(ComparisonError, match="has the options"):
        explain(tiny, triplets, method, surprise=1)
    if METHODS[method].uses_layers:
        with pytest.raises(ModelError, match="no layer 'nowhere'"):
            explain(tiny, triplets, method, "nowhere")
    else:
        with pytest.raises(ModelError, match="takes no layer"):
            explain(tiny, triplets, method, "last")


@pytest.mark.parametrize("method", METHODS)
def test_results_save_and_load(tiny: TinyNet, triplets: Comparison, method: str, tmp_path) -> None:
    result = explain(tiny, triplets, method, **QUICK.get(method, {}))
    result.save(tmp_path / "out")
    again = type(result).load(tmp_path / "out")
    assert torch.equal(again.maps, result.maps)
    assert again.method == method
