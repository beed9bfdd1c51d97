"""What every method in METHODS promises, whatever it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import TinyViT
from avsl_cases import small_avsl
from conftest import TinyNet
from torch import Tensor, nn

from simexplain import Comparison, as_similarity_model, build_bank, explain
from simexplain.errors import ComparisonError, ModelError
from simexplain.methods import METHODS, PIXELS, options_of
from simexplain.methods.attention import ATTENTION
from simexplain.models.avsl import AVSL

ON_ATTENTION = ("attention", "attention_relevance", "grad_eclip")
QUICK: dict[str, dict[str, Any]] = {
    "smoothgrad": {"samples": 2},
    "integrated_gradients": {"steps": 4},
    "random_masks": {"masks": 20},
}


@pytest.fixture
def network(tiny: TinyNet, method: str) -> nn.Module:
    """What the method explains: for AVSL's own an AVSL model, a transformer, else any network."""
    if method in ON_ATTENTION:
        return TinyViT()
    return small_avsl().float() if method == "avsl" else tiny


@pytest.fixture
def options(network: nn.Module, images: Tensor, method: str) -> dict[str, Any]:
    """Options with which the method is quick, and those that it cannot do without."""
    if method == "weight_bank":
        return {"bank": build_bank(network, (images, "ababab"), margin=1.0, triplets=5)}
    return QUICK.get(method, {})


@pytest.fixture
def triplets(images: Tensor) -> Comparison:
    return Comparison.triplet(images[:2], images[2:4], images[4:6])


@pytest.mark.parametrize("method", METHODS)
def test_every_image_of_every_comparison_gets_a_map(
    network: nn.Module, triplets: Comparison, method: str, options: dict[str, Any]
) -> None:
    signed = {"keep_negative": True}
    signed = signed if "keep_negative" in [o.name for o in options_of(METHODS[method])] else {}
    result = explain(network, triplets, method, **options, **signed)
    assert result.maps.shape[:2] == (2, 3)
    assert result.maps.dtype == torch.float32
    assert result.maps.isfinite().all()
    assert (result.maps[:, :2].abs().amax(dim=(2, 3)) > 0).all()
    assert result.heatmaps.shape == (2, 3, 24, 32)
    assert result.scores.shape == (2, 3)
    width = 2 * sum(network.widths) if isinstance(network, AVSL) else 10
    assert result.embeddings.shape == (2, 3, width)
    assert result.method == method
    if METHODS[method].uses_layers or isinstance(network, AVSL):
        assert set(result.layers) <= {layer.name for layer in as_similarity_model(network).layers}
    else:
        assert result.layers == ((ATTENTION,) if method in ON_ATTENTION else (PIXELS,))
    assert list(result.layer_maps) == list(result.layers)


@pytest.mark.parametrize("method", METHODS)
def test_maps_of_an_image_do_not_depend_on_its_batch(
    network: nn.Module, triplets: Comparison, method: str, options: dict[str, Any]
) -> None:
    whole = explain(network, triplets, method, **options)
    parts = Comparison(*(part[1:] for part in (triplets.anchor, triplets.positives,
                                               triplets.negatives)))  # fmt: skip
    alone = explain(network, parts, method, max_batch=2, **options)
    scale = float(whole.maps.abs().max())
    torch.testing.assert_close(alone.maps[0], whole.maps[1], rtol=1e-3, atol=1e-4 * scale + 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_the_user_s_is_touched(
    network: nn.Module, triplets: Comparison, method: str, options: dict[str, Any]
) -> None:
    network.train()
    norm = next(module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    norm.eval()
    modes = [module.training for module in network.modules()]
    state = {key: value.clone() for key, value in network.state_dict().items()}
    before, kept = torch.get_rng_state(), triplets.stacked().clone()
    explain(network, triplets, method, **options)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(triplets.stacked(), kept)


@pytest.mark.parametrize("method", METHODS)
def test_layers_and_options_are_checked(
    network: nn.Module, triplets: Comparison, method: str, options: dict[str, Any]
) -> None:
    assert options_of(METHODS[method])
    with pytest.raises(ComparisonError, match="has the options"):
        explain(network, triplets, method, surprise=1)
    if METHODS[method].uses_layers:
        with pytest.raises(ModelError, match="no layer 'nowhere'"):
            explain(network, triplets, method, "nowhere", **options)
    else:
        with pytest.raises(ModelError, match="takes no layer"):
            explain(network, triplets, method, "last", **options)


@pytest.mark.parametrize("method", METHODS)
def test_results_save_and_load(
    network: nn.Module, triplets: Comparison, method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    result = explain(network, triplets, method, **options)
    result.save(tmp_path / "out")
    again = type(result).load(tmp_path / "out")
    assert torch.equal(again.maps, result.maps)
    assert again.method == method


@pytest.mark.parametrize("method", METHODS)
def test_a_callers_no_grad_is_no_hindrance(
    network: nn.Module, triplets: Comparison, method: str, options: dict[str, Any]
) -> None:
    wanted = explain(network, triplets, method, **options).maps
    with torch.no_grad():
        assert torch.equal(explain(network, triplets, method, **options).maps, wanted)
        assert not torch.is_grad_enabled()
