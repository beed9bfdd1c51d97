"""The fast twin: the same maps, and the original untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from conftest import TinyNet, varied
from torch import Tensor, nn

from simexplain import Comparison, as_similarity_model, explain, load_model
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ModelError
from simexplain.models.accelerating import accelerated


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}), ("tf_efficientnet_lite0", {}), ("densenet121", {}),
        ("vgg11_bn", {"mlp_ratio": 1 / 32}),  # its two dense layers are narrow, which are no map's
    ],
)  # fmt: skip
def test_maps_agree_within_a_thousandth_of_their_maximum(name: str, options: dict) -> None:
    network = varied(timm.create_model(name, num_classes=0, **options))
    model = as_similarity_model(network, preprocess=Preprocess(size=(64, 64)))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    fast = accelerated(model)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    norms = [
        sum(isinstance(m, nn.BatchNorm2d) for m in n.modules()) for n in (fast.network, network)
    ]
    assert norms[0] < 0.6 * norms[1]
    assert fast.default_layer == model.default_layer
    comparison = Comparison.triplet(*torch.rand(3, 2, 3, 64, 64))
    wanted, result = (explain(m, comparison, keep_negative=True) for m in (model, fast))
    top = wanted.maps.abs().amax(dim=(2, 3), keepdim=True)
    assert float(((result.maps - wanted.maps).abs() / top).max()) < 1e-3
    torch.testing.assert_close(result.distances, wanted.distances, rtol=1e-3, atol=1e-4)


def test_a_shared_convolution_is_left_alone(images: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.norm(self.conv(x))).mean(dim=(2, 3))

    network = Twice().eval()
    network.norm.running_mean.fill_(0.3)
    fast = accelerated(as_similarity_model(network, preprocess=Preprocess(size=(24, 32))))
    torch.testing.assert_close(fast.embed(images), as_similarity_model(network).embed(images))


@pytest.mark.parametrize("dynamic", [True, False])
def test_an_exported_program_is_refused(tmp_path: Path, dynamic: bool) -> None:
    shapes = ({0: torch.export.Dim("n", min=1, max=9)},) if dynamic else None
    program = torch.export.export(
        TinyNet().eval(), (torch.rand(2, 3, 24, 32),), dynamic_shapes=shapes
    )
    torch.export.save(program, tmp_path / "net.pt2")
    with pytest.raises(ModelError, match="program is fixed"):
        accelerated(load_model(tmp_path / "net.pt2"))
