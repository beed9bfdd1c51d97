"""Programs that ordinary users export load without trust and answer as the network does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import refusal
from pictures import noise
from torch import Tensor, nn
from torch.export import Dim
from torchvision import models

from simexplain import Preprocess, as_similarity_model, build_index, explain, load_model, save_model
from simexplain.comparison import Comparison
from simexplain.errors import ModelError

pytestmark = pytest.mark.usefixtures("offline")

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


class Part(nn.Module):
    """A Hugging Face network that gives one part of its output."""

    def __init__(self, model: nn.Module, part: str | None = "pooler_output") -> None:
        super().__init__()
        self.model = model
        self.part = part

    def forward(self, images: Tensor) -> Any:
        result = self.model(pixel_values=images)
        return result if self.part is None else getattr(result, self.part)


def hugging_face(name: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**(options or SMALL))
    return getattr(transformers, f"{name}Model")(config)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "timm vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, depth=2
    ),
    "torchvision swin": lambda: models.SwinTransformer([4, 4], 24, [1, 1], [1, 2], [4, 4]),
    "transformers Swin": lambda: Part(
        hugging_face(
            "Swin",
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[1, 1],
            num_heads=[1, 2],
            window_size=4,
        )
    ),
    "transformers SigLIP": lambda: Part(hugging_face("SiglipVision")),
    "transformers DINOv2": lambda: Part(hugging_face("Dinov2")),
}
SLOW_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "timm mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=0),
    "timm convnext": lambda: timm.create_model("convnext_atto", num_classes=0),
    "torchvision resnet18": lambda: models.resnet18(weights=None),
    "torchvision vit": lambda: models.VisionTransformer(32, 8, 2, 2, 32, 48),
    "transformers ViT": lambda: Part(hugging_face("ViT")),
    "transformers CLIP": lambda: Part(hugging_face("CLIPVision")),
    "timm resnet18": lambda: timm.create_model("resnet18", num_classes=0),
    "timm efficientnet": lambda: timm.create_model("efficientnet_lite0", num_classes=0),
    "timm swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224",
        num_classes=0,
        img_size=32,
        window_size=4,
        embed_dim=24,
        depths=(1, 1, 1),
        num_heads=(1, 2, 2),
    ),
    "torchvision mobilenetv3": lambda: models.mobilenet_v3_small(weights=None),
    "torchvision efficientnet": lambda: models.efficientnet_b0(weights=None),
    "torchvision convnext": lambda: models.convnext_tiny(weights=None),
    "torchvision swin v2": lambda: models.swin_transformer.SwinTransformer(
        [4, 4],
        24,
        [1, 1],
        [1, 2],
        [4, 4],
        block=models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=models.swin_transformer.PatchMergingV2,
    ),
}
SHAPES: dict[str, Any] = {
    "fixed": None,
    "dynamic": ({0: Dim("batch")},),
    "bounded": ({0: Dim("batch", max=8)},),
    "automatic": ({0: Dim.AUTO},),
}


def exported(
    path: Path, network: nn.Module, shapes: Any = None, *, strict: bool = False, side: int = 32
) -> Path:
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(network, (images,), dynamic_shapes=shapes, strict=strict)
        torch.export.save(program, path)
    return path


def check(path: Path, network: nn.Module, *, counts: tuple[int, ...], side: int = 32) -> None:
    model = load_model(path)
    for count in counts:
        images = torch.rand(count, 3, side, side)
        with torch.no_grad():
            expected = nn.functional.normalize(network(images).flatten(1).float(), dim=1)
        assert torch.allclose(model.embed(images), expected, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_with_a_dynamic_batch(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = NETWORKS[name]().eval()
    path = exported(tmp_path / "a.pt2", network, SHAPES["bounded"])
    check(path, network, counts=(1, 2, 5))
    assert load_model(path).largest_batch == 8


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", [*NETWORKS, *SLOW_NETWORKS])
def test_every_network_and_shape(name: str, shapes: str, strict: bool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = (NETWORKS | SLOW_NETWORKS)[name]().eval()
    path = exported(tmp_path / "a.pt2", network, SHAPES[shapes], strict=strict)
    check(path, network, counts=(2,) if shapes == "fixed" else (1, 2, 5))


class Small(nn.Module):
    """A convolution under odd names, in several modes, with what the output is made of."""

    def __init__(self, give: Callable[[Tensor], Any] = lambda rows: rows) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(
            {"-1": nn.AvgPool2d(1), "my-layer": nn.Conv2d(3, 6, 3, padding=1)}
        )
        self.scales = nn.ParameterDict({"a b": torch.rand(6, 1, 1)})
        self.norm = nn.BatchNorm2d(6)
        self.register_buffer("shift", torch.rand(6, 1, 1), persistent=False)
        self.give = give

    def forward(self, images: Tensor, flag: bool = True, power: int = 1, extra: Any = None) -> Any:
        with torch.no_grad():
            mean = images.mean()
        maps = (
            self.norm(self.parts["my-layer"](self.parts["-1"](images - mean))) * self.scales["a b"]
            + self.shift
        )
        maps = maps.relu() if flag else maps
        return self.give(maps.mean((2, 3)) * power)


@pytest.mark.parametrize(
    ("shapes", "strict"), [("fixed", False), ("automatic", False), ("bounded", True)]
)
def test_odd_names_and_modes(shapes: str, strict: bool, tmp_path: Path) -> None:
    network = Small().eval()
    path = exported(tmp_path / "a.pt2", network, SHAPES[shapes], strict=strict)
    check(path, network, counts=(2,) if shapes == "fixed" else (1, 2, 5))
    assert "parts.my-layer" in {layer.name for layer in load_model(path).layers}


@pytest.mark.parametrize("type_", [torch.float16, torch.bfloat16, torch.float64])
def test_types(type_: torch.dtype, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1)).eval().to(type_)
    images = torch.rand(2, 3, 8, 8).to(type_)
    torch.export.save(torch.export.export(network, (images,)), tmp_path / "a.pt2")
    rows = load_model(tmp_path / "a.pt2").embed(images)
    with torch.no_grad():
        expected = nn.functional.normalize(network(images).flatten(1).float(), dim=1)
    assert torch.allclose(rows.float(), expected, atol=1e-5)


@pytest.mark.parametrize(
    "give",
    [lambda rows: (rows,), lambda rows: [rows], lambda rows: {"embedding": rows}],
    ids=["tuple", "list", "dict"],
)
def test_the_only_tensor_of_a_container_is_the_embedding(
    give: Callable[[Tensor], Any], tmp_path: Path
) -> None:
    network = Small(give).eval()
    path = exported(tmp_path / "a.pt2", network, SHAPES["dynamic"])
    network.give = lambda rows: rows
    check(path, network, counts=(1, 3))


def test_of_several_outputs_one_is_to_be_picked(tmp_path: Path) -> None:
    def give(rows: Tensor) -> Any:
        return {"first": rows, "rest": [rows + 1, (rows * 2,)]}

    model = load_model(exported(tmp_path / "a.pt2", Small(give).eval(), SHAPES["dynamic"]))
    with pytest.raises(ModelError, match="keys first, rest"):
        model.embed(torch.rand(3, 3, 32, 32))


def test_a_model_output_is_refused_with_advice(tmp_path: Path) -> None:
    network = Part(hugging_face("ViT"), None).eval()
    text = refusal(exported(tmp_path / "a.pt2", network))
    assert "BaseModelOutputWithPooling" in text
    assert "wrapper whose forward returns the embedding as a tensor" in text


@pytest.mark.parametrize("by_name", [False, True])
def test_constants_beside_the_images_are_filled_in(by_name: bool, tmp_path: Path) -> None:
    network = Small().eval()
    images = torch.rand(2, 3, 32, 32)
    given: tuple[tuple[Any, ...], dict[str, Any]] = (images, False, 3, None), {}
    if by_name:
        given = (), {"images": images, "flag": False, "power": 3, "extra": None}
    torch.export.save(torch.export.export(network, *given), tmp_path / "a.pt2")
    with torch.no_grad():
        expected = nn.functional.normalize(network(images, flag=False, power=3), dim=1)
    assert torch.allclose(load_model(tmp_path / "a.pt2").embed(images), expected, atol=1e-5)


class Pools(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.last = nn.Conv2d(6, 6, 3, stride=2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.stem(images).relu()).mean((2, 3))


@pytest.mark.parametrize(
    ("limits", "size"),
    [
        (None, (32, 32)),
        ({"min": 8}, (224, 224)),
        ({"min": 16, "max": 64}, (32, 32)),
        ({"min": 300}, (320, 320)),
    ],
)
def test_dynamic_sides(
    limits: dict[str, int] | None, size: tuple[int, int], tmp_path: Path
) -> None:
    network = Pools().eval()
    shapes = None
    if limits is not None:
        sides = {2: Dim("height", **limits), 3: Dim("width", **limits)}
        shapes = ({0: Dim("batch")} | sides,)
    side = max(32, size[0]) if limits and limits["min"] == 300 else 32
    model = load_model(exported(tmp_path / "a.pt2", network, shapes, side=side))
    assert model.preprocess.size == size
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        expected = nn.functional.normalize(network(images), dim=1)
    assert torch.allclose(model.embed(images), expected, atol=1e-5)
    assert model.default_layer == "last"


def passes(model: nn.Module, counts: list[int]) -> None:
    """Notes how many images each pass of an exported program gets."""
    plain = model.network.forward

    def counted(images: Tensor) -> Any:
        counts.append(len(images))
        return plain(images)

    model.network.forward = counted


@pytest.mark.parametrize("method", ["sam", "similarity_cam", "decomposition", "saliency", "sbsm"])
def test_no_pass_exceeds_the_largest_batch(method: str, tmp_path: Path) -> None:
    network = Pools().eval()
    model = load_model(exported(tmp_path / "a.pt2", network, ({0: Dim("batch", max=3)},)))
    assert (model.batch_size, model.largest_batch) == (None, 3)
    counts: list[int] = []
    passes(model, counts)
    stack = torch.rand(5, 1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    rest = stack.transpose(0, 1)
    comparison = Comparison(stack[0], positives=rest[:, 1:3], negatives=rest[:, 3:])
    options: dict[str, Any] = {} if method in ("saliency", "sbsm") else {"layer": "last"}
    ours = explain(model, comparison, method, **options, max_batch=64)
    assert max(counts) <= 3
    whole = explain(network, comparison, method, **options)
    assert torch.allclose(ours.embeddings, whole.embeddings, atol=1e-5)
    top = whole.maps.abs().max()
    assert torch.allclose(ours.maps / top, whole.maps / top, atol=1e-4)


@pytest.mark.parametrize("limits", [{"max": 4}, {"min": 3}, {"min": 3, "max": 4}])
def test_an_index_obeys_the_limits(limits: dict[str, int], tmp_path: Path) -> None:
    network = Pools().eval()
    images = torch.rand(4, 3, 32, 32)
    program = torch.export.export(network, (images,), dynamic_shapes=({0: Dim("n", **limits)},))
    torch.export.save(program, tmp_path / "a.pt2")
    model = load_model(tmp_path / "a.pt2")
    counts: list[int] = []
    passes(model, counts)
    (tmp_path / "pictures").mkdir()
    for seed in range(10):
        noise(32, 32, seed=seed).save(tmp_path / "pictures" / f"{seed}.png")
    index = build_index(model, tmp_path / "pictures", tmp_path / "a.index", batch_size=32)
    assert len(index) == 10
    assert max(counts) <= limits.get("max", 4)
    assert min(counts) >= limits.get("min", 1)


def test_too_many_images_at_once(tmp_path: Path) -> None:
    network = Pools().eval()
    model = load_model(exported(tmp_path / "a.pt2", network, ({0: Dim("batch", max=3)},)))
    with pytest.raises(ModelError, match="at most 3 images"):
        model.embed(torch.rand(4, 3, 32, 32))
    fixed = load_model(exported(tmp_path / "b.pt2", network))
    with pytest.raises(ModelError, match="Expected 2 images"):
        fixed.embed(torch.rand(4, 3, 32, 32))


class Covariances(nn.Module):
    """Pooling by a matrix square root, which transposes by ``.mT``."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 8, 4, 4)

    def forward(self, images: Tensor) -> Tensor:
        cells = self.trunk(images).flatten(2)
        values, vectors = torch.linalg.eigh(cells @ cells.mT + torch.eye(8))
        return (vectors * values.sqrt()[:, None] @ vectors.mT).flatten(1)


class Recurrences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 8, 4, 4)
        self.cell = nn.LSTM(8, 4, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        return self.cell(self.trunk(images).flatten(2).mT)[0].mean(1)


class Kept(nn.Module):
    """A fixed choice of tokens after a block of attention, whose program passes sizes along."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.block = Attending()
        self.last = Attending()

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.block(self.patch(images).flatten(2).transpose(1, 2))
        return self.last(tokens[:, torch.tensor([0, 3, 5, 6])]).mean(1)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        own = self.norm(tokens)
        return tokens + self.attention(own, own, own, need_weights=False)[0]


@pytest.mark.parametrize(
    ("build", "layer"), [(Covariances, "trunk"), (Recurrences, "cell"), (Kept, "block")]
)
def test_saved_networks_come_back_with_their_layer(
    build: Callable[[], nn.Module], layer: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network, images = build().eval(), torch.rand(2, 3, 32, 32)
    model = as_similarity_model(network, preprocess=Preprocess(size=(32, 32)))
    save_model(model, tmp_path / "net.pt2")
    pair = Comparison.pair(images[:1], images[1:])
    own, again = (explain(each, pair) for each in (model, load_model(tmp_path / "net.pt2")))
    assert own.layers == again.layers == (layer,)
    assert torch.allclose(own.maps, again.maps, atol=1e-5 * float(own.maps.max()))


@torch.library.custom_op("simexplain_tests::twice", mutates_args=())
def twice(maps: Tensor) -> Tensor:
    return maps * 2


twice.register_fake(torch.empty_like)


def test_what_could_not_be_loaded_again_is_not_written(tmp_path: Path) -> None:
    class Custom(nn.Conv2d):
        def forward(self, images: Tensor) -> Tensor:
            return twice(super().forward(images)).mean((2, 3))

    model = as_similarity_model(Custom(3, 8, 4, 4), preprocess=Preprocess(size=(16, 16)))
    with pytest.raises(ModelError, match=r"holds the operator .*simexplain_tests.twice"):
        save_model(model, tmp_path / "net.pt2")
    assert not any(tmp_path.iterdir())
