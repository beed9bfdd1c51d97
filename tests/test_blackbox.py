"""Programs without layers: the same maps as the network, and no layer is promised."""

from __future__ import annotations

import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyNet
from PIL import Image
from torch import Tensor, nn

from simexplain import Comparison, as_similarity_model, explain
from simexplain.errors import ModelError, SimexplainError
from simexplain.methods import METHODS
from simexplain.methods.pixel_gradients import (
    InputXGradient,
    IntegratedGradients,
    Saliency,
    SmoothGrad,
)
from simexplain.methods.pixel_methods import SBSM, Occlusion, RandomMasks, _enlarged
from simexplain.models.blackbox import (
    BlackBox,
    load_blackbox,
    pixel_methods,
)

BY_ANSWERS = {
    "occlusion": Occlusion(window=0.3, stride=0.2),
    "sbsm": SBSM(window=0.3, stride=0.2),
    "random_masks": RandomMasks(masks=30, grid=4),
}
BY_GRADIENTS = {
    "saliency": Saliency(),
    "input_x_gradient": InputXGradient(),
    "smoothgrad": SmoothGrad(samples=3),
    "integrated_gradients": IntegratedGradients(steps=8),
}


class Sized(TinyNet):
    """Baked into a graph: exactly four images of 24x32."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.reshape(4, 3, 24, 32))


@pytest.fixture
def triplet() -> Comparison:
    """Coarse colours, so that hiding a part moves a score by more than rounding does."""
    colours = 3 * torch.randn(6, 3, 3, 4, generator=torch.Generator().manual_seed(1))
    images = nn.functional.interpolate(colours, scale_factor=8)
    return Comparison.triplet(images[:2], images[2:4], images[4:])


def scripted(network: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network).save(path)
    return path


def traced(network: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(network, torch.zeros(4, 3, 24, 32)).save(path)
    return path


def graph(network: nn.Module, path: Path, *, batch: int | None = None) -> Path:
    """The network as an ONNX file, written node by node: exporters need more packages."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    h, n = onnx.helper, onnx.numpy_helper
    state = {k: v.detach().numpy() for k, v in network.state_dict().items() if v.dim()}
    conv = {"strides": [2, 2], "pads": [1, 1, 1, 1]}
    norm = [f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    nodes = [
        h.make_node("Conv", ["images", "stem.weight", "stem.bias"], ["a"], **conv),
        h.make_node("BatchNormalization", ["a", *norm], ["b"], epsilon=network.norm.eps),
        h.make_node("Relu", ["b"], ["c"]),
        h.make_node("Conv", ["c", "body.weight", "body.bias"], ["d"], **conv),
        h.make_node("Relu", ["d"], ["e"]),
        h.make_node("GlobalAveragePool", ["e"], ["f"]),
        h.make_node("Flatten", ["f"], ["g"]),
        h.make_node("Gemm", ["g", "head.weight", "head.bias"], ["embedding"], transB=1),
    ]
    size = [24, 32] if batch else ["height", "width"]
    floats = onnx.TensorProto.FLOAT
    made = h.make_graph(
        nodes, "tiny",
        [h.make_tensor_value_info("images", floats, [batch or "batch", 3, *size])],
        [h.make_tensor_value_info("embedding", floats, [batch or "batch", 10])],
        [n.from_array(value, name) for name, value in state.items()],
    )  # fmt: skip
    model = h.make_model(made, opset_imports=[h.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture(params=["scripted", "traced", "onnx", "fixed onnx", "function"])
def black(request: pytest.FixtureRequest, tiny: TinyNet, tmp_path: Path) -> BlackBox:
    path = tmp_path / "net.file"
    match request.param:
        case "scripted":
            return load_blackbox(scripted(tiny, path), kind="torchscript", trust=True)
        case "traced":
            return load_blackbox(traced(tiny, path), kind="torchscript", trust=True)
        case "function":
            return BlackBox(lambda images: tiny(images), name="mine")
    batch = 4 if request.param == "fixed onnx" else None
    return load_blackbox(graph(tiny, path, batch=batch), kind="onnx")


def test_same_maps_as_the_network(black: BlackBox, tiny: TinyNet, triplet: Comparison) -> None:
    methods = BY_ANSWERS | (BY_GRADIENTS if black.differentiable else {})
    for name, method in methods.items():
        ours = explain(black, triplet, method)
        theirs = explain(as_similarity_model(tiny), triplet, method)
        assert torch.allclose(ours.embeddings, theirs.embeddings, atol=1e-5), name
        assert torch.allclose(ours.distances, theirs.distances, atol=1e-5), name
        top = theirs.maps.abs().max()
        assert top > 0
        assert (ours.maps - theirs.maps).abs().max() < 1e-4 * top, name
        assert ours.layers == ("pixels",)
        assert ours.model == black.name


def one_sentence(error: pytest.ExceptionInfo[ModelError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_layers_are_refused(black: BlackBox, triplet: Comparison) -> None:
    for ask in (lambda: black.layers, lambda: black.default_layer, lambda: black.stages,
                lambda: explain(black, triplet, "sam")):  # fmt: skip
        with pytest.raises(ModelError, match="layers cannot be tapped") as caught:
            ask()
        record = one_sentence(caught)
        for name in BY_ANSWERS:
            assert name in record
        assert ("saliency" in record) == ("integrated_gradients" in record) == black.differentiable
    # Hooks on a part of a TorchScript module would never fire.
    with pytest.raises(ModelError) as caught:
        explain(black, triplet, "sam", layer="body")
    one_sentence(caught)


@pytest.mark.parametrize("differentiable", [True, False])
def test_the_methods_named_are_those_that_work(
    tiny: TinyNet, triplet: Comparison, differentiable: bool
) -> None:
    @torch.set_grad_enabled(differentiable)
    def program(images: Tensor) -> Tensor:
        return tiny(images)

    black = BlackBox(program, name="mine", differentiable=differentiable)

    def works(name: str) -> bool:
        try:
            explain(black, triplet, name, **quick.get(name, {}))
        except SimexplainError:
            return False
        return True

    quick = {"random_masks": {"masks": 4}, "smoothgrad": {"samples": 1}}
    work = [name for name in METHODS if works(name)]
    assert set(work) == set(pixel_methods(differentiable))
    with pytest.raises(ModelError) as caught:
        explain(black, triplet, "sam")
    named = one_sentence(caught).rpartition(": ")[2].rstrip(".").split(", ")
    assert sorted(named) == sorted(work)


def test_gradients_of_a_graph_are_refused(
    tiny: TinyNet, triplet: Comparison, tmp_path: Path
) -> None:
    model = load_blackbox(graph(tiny, tmp_path / "net.onnx"), kind="onnx")
    for method in BY_GRADIENTS.values():
        with pytest.raises(ModelError, match="occlusion, sbsm, random_masks") as caught:
            explain(model, triplet, method)
        one_sentence(caught)


def test_what_a_file_says_of_its_input(tiny: TinyNet, tmp_path: Path) -> None:
    model = load_blackbox(graph(tiny, tmp_path / "a.onnx", batch=4), kind="onnx")
    assert (model.batch_size, model.preprocess.size, model.name) == (4, (24, 32), "a")
    assert "ImageNet" in model.preprocess.notes[0]
    with pytest.raises(ModelError, match="24x32") as caught:
        model.embed(torch.zeros(4, 3, 16, 16))
    one_sentence(caught)
    model = load_blackbox(graph(tiny, tmp_path / "b.onnx"), kind="onnx", distance="cosine")
    assert (model.batch_size, model.preprocess.size) == (None, (224, 224))
    rows = model.embed(torch.rand(3, 3, 20, 28))
    assert torch.allclose(rows.norm(dim=1), torch.ones(3))
    assert torch.allclose(model.distance(rows, rows), 1 - rows @ rows.T, atol=1e-6)
    assert torch.allclose(model.vectors(torch.zeros(1, 3, 8, 8)), tiny(torch.zeros(1, 3, 8, 8)))
    path = scripted(tiny, tmp_path / "c.pt")
    assert load_blackbox(path, kind="torchscript", trust=True, batch_size=5).batch_size == 5


def test_program_with_a_fixed_batch(triplet: Comparison, tmp_path: Path) -> None:
    network = Sized().eval()
    path = traced(network, tmp_path / "net.pt")
    model = load_blackbox(path, kind="torchscript", trust=True, batch_size=4)
    for method in (BY_ANSWERS | BY_GRADIENTS).values():
        ours = explain(model, triplet, method).maps
        theirs = explain(as_similarity_model(network, batch_size=4), triplet, method).maps
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_modes_of_a_program_are_kept(tiny: TinyNet, triplet: Comparison, tmp_path: Path) -> None:
    path = scripted(tiny, tmp_path / "net.pt")
    model = load_blackbox(path, kind="torchscript", trust=True)
    program = model.network.program
    calm = explain(model, triplet, Saliency())
    assert not any(module.training for module in program.modules())
    model.train()
    assert all(module.training for module in program.modules())
    before = {key: value.clone() for key, value in program.state_dict().items()}
    random = torch.get_rng_state()
    for method in (BY_ANSWERS | BY_GRADIENTS).values():
        explain(model, triplet, method)
    assert torch.allclose(explain(model, triplet, Saliency()).maps, calm.maps, atol=1e-7)
    assert all(module.training for module in program.modules())
    after = program.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert next(model.double().parameters()).dtype == torch.float64
    assert model.embed(torch.rand(1, 3, 8, 8)).dtype == torch.float64


def test_several_outputs(tiny: TinyNet, images: Tensor) -> None:
    two = BlackBox(lambda x: (tiny(x).sum(), tiny(x)), output=1)
    assert torch.allclose(two.embed(images), as_similarity_model(tiny).embed(images))
    with pytest.raises(ModelError, match="output="):
        BlackBox(lambda x: (tiny(x), tiny(x))).embed(images)
    with pytest.raises(ModelError, match="embedding of shape"):
        BlackBox(lambda x: x).embed(images)


class Writes(nn.Module):
    """Being loaded, it writes a file."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path, self.training = state[0], state[1]
        torch.save(torch.ones(1), self.path)


def test_a_program_is_not_run_before_it_is_trusted(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    path = scripted(Writes(str(sprung)), tmp_path / "net.pt")
    sprung.unlink(missing_ok=True)
    with pytest.raises(ModelError, match="--trust-pickle") as caught:
        load_blackbox(path, kind="torchscript")
    one_sentence(caught)
    assert not sprung.exists()
    # The trap works, so the refusal above is what kept it shut.
    load_blackbox(path, kind="torchscript", trust=True)
    assert sprung.exists()


@pytest.mark.parametrize("content", [b"", b"\x08\x07\x12\x07pytorch", pickle.dumps({"a": 1})])
@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
def test_damaged_files(kind: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        load_blackbox(path, kind=kind, trust=True)
    assert str(path) in one_sentence(caught)


def test_graphs_that_take_no_images(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    h = onnx.helper
    cases = [
        ([2, 5], onnx.TensorProto.FLOAT, "one batch of images"),
        ([1, 24, 24, 3], onnx.TensorProto.FLOAT, "one batch of images"),
        ([1, 3, 24, 24], onnx.TensorProto.UINT8, "floating-point images"),
    ]
    for number, (shape, kind, record) in enumerate(cases):
        made = h.make_graph(
            [h.make_node("Identity", ["x"], ["y"])], "g",
            [h.make_tensor_value_info("x", kind, shape)],
            [h.make_tensor_value_info("y", kind, shape)],
        )  # fmt: skip
        path = tmp_path / f"{number}.onnx"
        onnx.save(h.make_model(made, opset_imports=[h.make_opsetid("", 17)], ir_version=8), path)
        with pytest.raises(ModelError, match=record) as caught:
            load_blackbox(path, kind="onnx")
        one_sentence(caught)


def test_missing_onnxruntime_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    path = tmp_path / "net.onnx"
    path.write_bytes(b"\x08\x07")
    with pytest.raises(ModelError, match=r"pip install 'simexplain\[onnx\]'") as caught:
        load_blackbox(path, kind="onnx")
    one_sentence(caught)


def test_bad_choices(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="torchscript or onnx"):
        load_blackbox(tmp_path / "net", kind="tflite")
    with pytest.raises(ModelError, match="euclidean"):
        BlackBox(lambda x: x, distance="far")


def test_random_masks_are_those_of_rise() -> None:
    """Cells stretched over one cell more than there are, and cut out where the shift says."""
    method = RandomMasks(masks=5, grid=4)
    cells, shifts = method._drawn()
    assert cells.shape == (5, 4, 4)
    like = torch.zeros(1, 3, 30, 44)
    tall, wide = -(-30 // 4), -(-44 // 4)
    result = _enlarged(cells, shifts, like)
    for number in range(5):
        grown = Image.fromarray(cells[number].numpy()).resize(
            (5 * wide, 5 * tall), Image.Resampling.BILINEAR
        )
        top, left = int(shifts[number, 0] * tall), int(shifts[number, 1] * wide)
        wanted = torch.from_numpy(np.array(grown))[top : top + 30, left : left + 44]
        torch.testing.assert_close(result[number], wanted, rtol=0, atol=1e-5)


def test_random_masks_do_not_hang_on_the_default_type() -> None:
    before = RandomMasks()._drawn()
    torch.set_default_dtype(torch.float64)
    try:
        after = RandomMasks()._drawn()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
