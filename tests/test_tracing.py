"""Promise 3: no side effects; and everything else that a pass with hooks could get wrong."""

from __future__ import annotations

import gc

import pytest
import torch
from conftest import SharedNet, TinyNet
from torch import Tensor, nn

from simexplain import Comparison, as_similarity_model, explain
from simexplain.errors import ModelError
from simexplain.tracing import trace


def state_of(network: nn.Module) -> dict:
    """Everything about a network that a caller could miss afterwards."""
    return {
        "modes": [module.training for module in network.modules()],
        "hooks": [
            len(module._forward_hooks)
            + len(module._forward_pre_hooks)
            + len(module._backward_hooks)
            for module in network.modules()
        ],
        "requires_grad": [p.requires_grad for p in network.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in network.parameters()],
        "values": {key: value.clone() for key, value in network.state_dict().items()},
    }


def assert_same(before: dict, after: dict) -> None:
    for key in ("modes", "hooks", "requires_grad"):
        assert after[key] == before[key], key
    for old, new in zip(before["grads"], after["grads"], strict=True):
        assert (old is None and new is None) or torch.equal(old, new)
    for key, value in before["values"].items():
        assert torch.equal(after["values"][key], value), key


class Moody(TinyNet):
    """Draws random numbers, changes its input in place and fails when told to."""

    fail = False

    def forward(self, images: Tensor) -> Tensor:
        images.sub_(0.5)
        if self.fail:
            raise RuntimeError("told to fail")
        return super().forward(images) + 0 * torch.rand(())


@pytest.fixture
def mixed() -> Moody:
    """A network in mixed modes with gradients and one frozen layer, as in someone's training."""
    network = Moody().train()
    network.norm.eval()
    network.stem.requires_grad_(False)
    network(torch.rand(2, 3, 16, 16)).sum().backward()
    return network


@pytest.mark.parametrize("fail", [False, True], ids=["success", "exception"])
@pytest.mark.parametrize("grad_mode", [True, False])
def test_nothing_of_the_users_changes(
    mixed: Moody, images: Tensor, fail: bool, grad_mode: bool
) -> None:
    mixed.fail = fail
    comparison = Comparison.triplet(*images[:3, None])
    before, pixels = state_of(mixed), images.clone()
    random = torch.get_rng_state()
    with torch.set_grad_enabled(grad_mode):
        if fail:
            with pytest.raises(RuntimeError, match="told to fail"):
                explain(mixed, comparison, layer="last")
        else:
            explain(mixed, comparison, layer="last")
            explain(mixed, comparison)
        assert torch.is_grad_enabled() is grad_mode
    assert_same(before, state_of(mixed))
    assert torch.equal(images, pixels)
    assert torch.equal(torch.get_rng_state(), random)


def test_an_unknown_layer_leaves_no_hook(tiny: TinyNet, images: Tensor) -> None:
    before = state_of(tiny)
    with pytest.raises(ModelError, match="did you mean norm"):
        explain(tiny, Comparison.pair(images[:1], images[1:2]), layer=["last", "norn"])
    assert_same(before, state_of(tiny))


def test_200_calls_leak_nothing(tiny: TinyNet, images: Tensor) -> None:
    model = as_similarity_model(tiny)
    comparison = Comparison.pair(images[:1], images[1:2])
    explain(model, comparison)
    gc.collect()
    before = sum(isinstance(thing, Tensor) for thing in gc.get_objects())
    for _ in range(200):
        explain(model, comparison)
    gc.collect()
    after = sum(isinstance(thing, Tensor) for thing in gc.get_objects())
    assert after <= before + 2
    assert state_of(tiny)["hooks"] == [0] * len(list(tiny.modules()))


def test_nothing_below_the_layer_is_tracked(tiny: TinyNet, images: Tensor) -> None:
    seen = {}
    for name in ("stem", "norm", "body"):
        tiny.get_submodule(name).register_forward_hook(
            lambda _m, _a, out, name=name: seen.__setitem__(name, out.requires_grad)
        )
    traced = trace(as_similarity_model(tiny), images, ["body"])
    assert seen["stem"] is False
    assert seen["norm"] is False
    assert all(output.is_leaf for output in traced.outputs["body"])
    assert traced.embeddings.requires_grad


def test_every_image_goes_forward_once_and_backward_once(tiny: TinyNet, images: Tensor) -> None:
    calls = {"forward": 0, "backward": 0}

    class Counting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calls["forward"] += len(x)
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            calls["backward"] += len(g)
            return g

    class Counted(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            return Counting.apply(super().forward(x))

    comparison = Comparison.quadruplet(*images[:4].view(4, 1, 3, 24, 32).expand(4, 5, 3, 24, 32))
    model = as_similarity_model(Counted().eval())
    explain(model, comparison)  # the layers are looked up once
    for options in ({}, {"through_weights": True}, {"layer": ["body", "last"]}):
        calls.update(forward=0, backward=0)
        explain(model, comparison, **{"layer": "last", "check": False, **options})
        assert calls == {"forward": 20, "backward": 20}
    # Both rows of the default share the pass; the check has 2 images a row and one for both.
    for check, more in ((False, 0), (True, 5)):
        calls.update(forward=0, backward=0)
        result = explain(model, comparison, check=check)
        assert calls["forward"] == 20 * (1 + more)
        if check:
            assert sum(row.check.images for row in result.rows) == 20 * more


def test_several_layers_at_once_equal_each_alone(tiny: TinyNet, images: Tensor) -> None:
    model = as_similarity_model(tiny)
    direction = torch.randn(6, 10)
    names = ["last", "stem", "body"]
    together = trace(model, images, names)
    result = together.gradients((together.embeddings * direction).sum())
    for name in names:
        alone = trace(model, images, [name])
        wanted = alone.gradients((alone.embeddings * direction).sum())[name]
        torch.testing.assert_close(result[name], wanted)
        torch.testing.assert_close(together.maps[name], alone.maps[name])


def test_shared_layers_must_be_named_with_their_call(images: Tensor) -> None:
    model = as_similarity_model(SharedNet().eval())
    with pytest.raises(ModelError, match=r"3 times.*block@0, block@1, block@2"):
        trace(model, images, ["block"])
    with pytest.raises(ModelError, match="did not run"):
        trace(model, images, ["block@3"])
    names = {layer.name for layer in model.layers}
    assert {"block@0", "block@1", "block@2"} <= names
    assert "block" not in names


def test_differentiable_keeps_the_graph_to_the_parameters(tiny: TinyNet, images: Tensor) -> None:
    traced = trace(as_similarity_model(tiny), images, ["last"], differentiable=True)
    gradient = traced.gradients(traced.embeddings[:, 0].sum(), create_graph=True)["last"]
    (gradient.square().sum() + traced.maps["last"].sum()).backward()
    assert float(tiny.stem.weight.grad.abs().sum()) > 0


class NoGradInside(TinyNet):
    def forward(self, images: Tensor) -> Tensor:
        features = self.last(self.body(self.act(self.norm(self.stem(images)))))
        with torch.no_grad():
            return self.head(features.mean(dim=(2, 3)))


class Detached(TinyNet):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).detach()


class Inference(TinyNet):
    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


class SideBranch(TinyNet):
    """The body runs, but nothing of it reaches the embedding."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.act(self.norm(self.stem(images)))
        self.body(features)
        return features.mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (NoGradInside, r"torch.no_grad\(\)"),
        (Detached, "detaches"),
        (Inference, "inference_mode"),
        (SideBranch, "does not depend on layer 'body'"),
    ],
)
def test_why_there_is_no_gradient_is_said(kind: type[TinyNet], said: str, images: Tensor) -> None:
    with pytest.raises(ModelError, match=said):
        explain(kind().eval(), Comparison.pair(images[:1], images[1:2]), layer="body")


def test_a_backbone_under_no_grad_below_the_layer_is_no_hindrance(images: Tensor) -> None:
    class FrozenStem(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.act(self.norm(self.stem(x)))
            return self.head(self.last(self.body(x)).mean(dim=(2, 3)))

    network = FrozenStem().eval()
    plain = TinyNet().eval()
    plain.load_state_dict(network.state_dict())
    comparison = Comparison.pair(images[:1], images[1:2])
    torch.testing.assert_close(explain(network, comparison).maps, explain(plain, comparison).maps)


def test_tuple_outputs_go_on_whole(images: Tensor) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return self.conv(x), "kept"

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            features, note = self.pair(x)
            assert note == "kept"
            return features.mean(dim=(2, 3))

    net = Net().eval()
    comparison = Comparison.pair(images[:1], images[1:2])
    whole, inner = (explain(net, comparison, layer=name).maps for name in ("pair", "pair.conv"))
    torch.testing.assert_close(whole, inner)


class Crops(nn.Module):
    """Four crops of every image go through the layers as images of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        crops = torch.stack(
            [images[..., y : y + 24, x : x + 24] for y in (0, 8) for x in (0, 8)], 1
        )
        return self.trunk(crops.flatten(0, 1)).mean((2, 3)).unflatten(0, (-1, 4)).mean(1)


def test_a_layer_that_runs_on_other_images_than_those_given_is_refused() -> None:
    model = as_similarity_model(Crops())
    first, second = torch.rand(2, 1, 3, 32, 32)
    with pytest.raises(ModelError, match="one map for each image at layer 'trunk', got 4 for 1"):
        explain(model, Comparison.pair(first, second), "similarity_cam", layer="trunk", check=False)
