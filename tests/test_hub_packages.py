"""Networks of open_clip, sentence-transformers and timm, and the original CLIP's modules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from cli_runs import Run
from conftest import refusal
from hub_cases import PROCESSORS, built, no_network, photographs  # noqa: F401
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain import as_similarity_model, load_model, save_model
from simexplain.errors import ModelError


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


# ------------------------------------------------------------------------------ open_clip

CLIP_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {
        "context_length": 8, "vocab_size": 60, "width": 16, "heads": 2, "layers": 1,
    },
}  # fmt: skip
PREPROCESSING = [
    {},
    {"resize_mode": "squash", "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.25] * 3},
]


def clip_folder(folder: Path, preprocessing: dict[str, Any]) -> Any:
    """A folder as open_clip pushes it to a hub; gives the network."""
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(4)
    network = open_clip.CLIP(**CLIP_CONFIG).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    folder.mkdir()
    config = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(network.state_dict(), folder / "open_clip_model.safetensors")
    return network


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("preprocessing", PREPROCESSING)
def test_open_clip_folder(tmp_path: Path, preprocessing: dict[str, Any], images: Tensor) -> None:
    open_clip = pytest.importorskip("open_clip")
    network = clip_folder(tmp_path / "net", preprocessing)
    model = load_model(tmp_path / "net")
    with torch.no_grad():
        wanted = network.encode_image(images)
        assert torch.allclose(model.vectors(images), wanted, atol=1e-5)
        assert torch.allclose(as_similarity_model(network).vectors(images), wanted, atol=1e-5)
        prefixed = load_model(f"open_clip:{tmp_path / 'net'}")
        assert torch.equal(prefixed.vectors(images), model.vectors(images))
    config = open_clip.transform.PreprocessCfg(**{"size": 32, **preprocessing})
    theirs = open_clip.transform.image_transform_v2(config, is_train=False)
    for picture in photographs():
        assert torch.equal(model.preprocess(picture)[0], theirs(picture))
    assert model.preprocess.notes == ()


def test_words_of_open_clip(images: Tensor, tmp_path: Path) -> None:
    network = clip_folder(tmp_path / "net", {})
    tower = network.visual
    kept: list[Tensor] = []
    handle = tower.ln_post.register_forward_hook(lambda _m, args, _o: kept.append(args[0]))
    with torch.no_grad():
        network.encode_image(images)
        handle.remove()
        tokens = kept[0] if kept[0].dim() == 3 else None
        if tokens is None:  # only the class token is normalised: run the blocks by hand
            tokens = tower.transformer(tower._embeds(images))
        tokens = F.layer_norm(tokens, (32,), tower.ln_post.weight, tower.ln_post.bias)
        first = as_similarity_model(network, output="class_token").vectors(images)
        mean = as_similarity_model(network, output="patch_mean").vectors(images)
    assert torch.allclose(first, tokens[:, 0], atol=1e-5)
    assert torch.allclose(mean, tokens[:, 1:].mean(1), atol=1e-5)
    with pytest.raises(ModelError, match="choose projected, class_token or patch_mean"):
        as_similarity_model(network, output="pooled").vectors(images)


@pytest.mark.usefixtures("no_network")
def test_open_clip_by_name_with_weights_of_a_file(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    name = min(open_clip.list_models(), key=size_of_config)
    random = load_model(f"open_clip:{name}", weights="random")
    assert random.backbone is None
    state = {key: value.clone() for key, value in random.network.state_dict().items()}
    torch.save(state, tmp_path / "tuned.pt")
    image = random.example()
    with torch.no_grad():
        for again in (
            load_model(f"open_clip:{name}", weights=tmp_path / "tuned.pt"),
            load_model(tmp_path / "tuned.pt", backbone=f"open_clip:{name}"),
        ):
            assert torch.equal(again.embed(image), random.embed(image))
    torch.save({**state, "odd": torch.zeros(1)}, tmp_path / "tuned.pt")
    assert "odd" in refusal(tmp_path / "tuned.pt", backbone=f"open_clip:{name}")


def size_of_config(name: str) -> float:
    """A network that is quick to build, without a tower of another package."""
    import open_clip

    config = open_clip.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision or "hf_model_name" in text or "width" not in vision:
        return float("inf")
    layers = vision["layers"]
    depth = sum(layers) if isinstance(layers, list) else layers
    return float(depth * vision["width"] ** 2 + text["layers"] * text["width"] ** 2)


# ------------------------------------------------------------------------------ original CLIP


class VisionTransformer(nn.Module):
    """The image tower of the original CLIP: tokens come first in its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.input_resolution, self.output_dim = 32, 12
        self.conv1 = nn.Conv2d(3, 16, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(16))
        self.positional_embedding = nn.Parameter(torch.randn(17, 16))
        block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
        self.transformer = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.ln_post = nn.LayerNorm(16)
        self.proj = nn.Parameter(torch.randn(16, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(x.dtype).expand(len(x), 1, 16)
        x = torch.cat([first, x], dim=1) + self.positional_embedding.to(x.dtype)
        x = self.transformer(x.transpose(0, 1)).transpose(0, 1)
        return self.ln_post(x[:, 0]) @ self.proj


class CLIP(nn.Module):
    """A whole model with the original's methods: a call needs text as well."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = VisionTransformer()
        self.token_embedding = nn.Embedding(9, 12)
        self.logit_scale = nn.Parameter(torch.ones([]))

    def encode_image(self, image: Tensor) -> Tensor:
        return self.visual(image.type(self.visual.conv1.weight.dtype))

    def encode_text(self, text: Tensor) -> Tensor:
        return self.token_embedding(text).mean(1)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.encode_image(image) @ self.encode_text(text).T


def test_the_original_clip_whole_and_its_tower(images: Tensor) -> None:
    torch.manual_seed(0)
    whole = CLIP().eval()
    with torch.no_grad():
        wanted = whole.visual(images)
        model = as_similarity_model(whole)
        assert torch.equal(model.vectors(images), wanted)
        assert torch.equal(as_similarity_model(whole.visual).vectors(images), wanted)
    for prepared in (model, as_similarity_model(whole.visual)):
        assert prepared.preprocess.size == (32, 32)
        assert prepared.preprocess.interpolation == "bicubic"
        assert prepared.preprocess.mean == (0.48145466, 0.4578275, 0.40821073)
        assert prepared.preprocess.notes == ()
    assert any(layer.name.startswith("visual.") for layer in model.layers)


def test_images_get_the_type_of_the_convolution_they_meet() -> None:
    """The original casts its convolutions to half precision and leaves the class token."""
    torch.manual_seed(0)
    tower = VisionTransformer().eval()
    tower.conv1.double()
    images = torch.rand(2, 3, 32, 32)
    seen: list[torch.dtype] = []
    tower.conv1.register_forward_pre_hook(lambda _m, args: seen.append(args[0].dtype))
    with pytest.raises(RuntimeError):  # blocks of another type: only the first step is of interest
        as_similarity_model(tower).vectors(images)
    assert seen == [torch.float64]


# ----------------------------------------------------------------- sentence-transformers


def sentence_folder(folder: Path) -> Any:
    """A CLIP model as sentence-transformers saves it."""
    package = pytest.importorskip("sentence_transformers")
    transformers = pytest.importorskip("transformers")
    source = folder.with_name("source")
    built("CLIP").save_pretrained(source)
    words = {word: n for n, word in enumerate(["<pad>", "<bos>", "<eos>", *"abc"])}
    (source / "vocab.json").write_text(json.dumps(words))
    (source / "merges.txt").write_text("#version: 0.2\n")
    tokens = transformers.CLIPTokenizer(
        str(source / "vocab.json"), str(source / "merges.txt"),
        unk_token="<eos>", bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
    )  # fmt: skip
    processor = transformers.CLIPProcessor(PROCESSORS["CLIP"](transformers), tokens)
    processor.save_pretrained(source)
    model = package.SentenceTransformer(str(source), device="cpu", local_files_only=True)
    model.save_pretrained(str(folder))
    return model


@pytest.mark.usefixtures("no_network")
def test_sentence_transformers(tmp_path: Path, images: Tensor) -> None:
    package = sentence_folder(tmp_path / "net")
    model = load_model(tmp_path / "net", distance="cosine")
    pictures = photographs()
    wanted = torch.from_numpy(package.encode(pictures))
    batch = torch.stack([model.preprocess(picture)[0] for picture in pictures])
    with torch.no_grad():
        assert torch.allclose(model.vectors(batch), wanted, atol=1e-4)
        tokens = model.network[0].model.vision_model(pixel_values=images).last_hidden_state
        mean = load_model(f"st:{tmp_path / 'net'}", output="patch_mean")
        assert torch.allclose(mean.vectors(images), tokens[:, 1:].mean(1), atol=1e-5)
        bare = as_similarity_model(package)
        assert torch.allclose(bare.vectors(images), model.vectors(images), atol=1e-6)
    assert bare.preprocess == model.preprocess
    save_model(model, tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert torch.equal(again.embed(images), model.embed(images))
    assert again.preprocess == model.preprocess
    assert again.distance_name == "cosine"


# ------------------------------------------------------------------------------ timm

TIMM = ("test_vit", "test_efficientnet", "test_convnext")


def timm_folder(folder: Path, name: str, classes: int = 5) -> nn.Module:
    """A folder as timm saves it for a hub."""
    from timm.models import save_for_hf

    torch.manual_seed(6)
    network = timm.create_model(name, num_classes=classes).eval()
    save_for_hf(network, folder, safe_serialization=True)
    return network


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", TIMM)
def test_timm_folder(name: str, tmp_path: Path) -> None:
    network = timm_folder(tmp_path / "net", name)
    model = load_model(tmp_path / "net")
    image = model.example()
    with torch.no_grad():
        features = network.forward_features(image)
        pooled = network.forward_head(features, pre_logits=True)
        assert torch.allclose(model.vectors(image), pooled, atol=1e-5)
        kept = load_model(tmp_path / "net", keep_head=True)
        assert torch.allclose(kept.vectors(image), network(image), atol=1e-5)
    theirs = timm.data.create_transform(**timm.data.resolve_data_config({}, model=network))
    for picture in photographs():
        assert torch.allclose(model.preprocess(picture)[0], theirs(picture), atol=1e-6)
    save_model(model, tmp_path / "again.pt")
    assert torch.equal(load_model(tmp_path / "again.pt").embed(image), model.embed(image))


def test_words_of_timm(tmp_path: Path) -> None:
    network = timm.create_model("test_vit", num_classes=0).eval()
    model = load_model("timm:test_vit", weights="random")
    image = model.example()
    model.network.load_state_dict(network.state_dict())
    with torch.no_grad():
        tokens = network.forward_features(image)
        wanted = {
            "class_token": tokens[:, 0],
            "patch_mean": tokens[:, 1:].mean(1),
            "pooled": network.forward_head(tokens, pre_logits=True),
        }
        for word, vector in wanted.items():
            picked = as_similarity_model(network, output=word)
            assert torch.allclose(picked.vectors(image), vector, atol=1e-6), word
            save_model(picked, tmp_path / f"{word}.pt")
            again = load_model(tmp_path / f"{word}.pt")
            assert torch.equal(again.embed(image), picked.embed(image))
    with pytest.raises(ModelError, match="no vector 'projected'"):
        as_similarity_model(network, output="projected").vectors(image)
    maps = timm.create_model("test_efficientnet", num_classes=0).eval()
    with torch.no_grad():
        mean = as_similarity_model(maps, output="patch_mean").vectors(image)
        assert torch.allclose(mean, maps.forward_features(image).mean((2, 3)), atol=1e-6)
    with pytest.raises(ModelError, match="no vector 'class_token'"):
        as_similarity_model(maps, output="class_token").vectors(image)


def test_damaged_timm_folder(tmp_path: Path) -> None:
    timm_folder(tmp_path / "net", "test_vit")
    config = tmp_path / "net" / "config.json"
    stored = json.loads(config.read_text())
    config.write_text(json.dumps({**stored, "architecture": "hf-hub:some/net"}))
    assert "does not have" in refusal(tmp_path / "net")
    config.write_text(json.dumps(stored))
    state = load_file(tmp_path / "net" / "model.safetensors")
    state.pop("cls_token")
    save_file(state, tmp_path / "net" / "model.safetensors")
    assert "1 missing (cls_token)" in refusal(tmp_path / "net")
    (tmp_path / "net" / "model.safetensors").unlink()
    (tmp_path / "net" / "pytorch_model.bin").unlink(missing_ok=True)
    assert "model.safetensors" in refusal(tmp_path / "net")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "name",
    ["timm:hf-hub:some/net", "timm:hf_hub:some/net", "timm:local-dir:/tmp", "pcb:timm:hf-hub:a/b",
     "hf:some/net", "open_clip:ViT-B-32", "timm:some/net"],
)  # fmt: skip
def test_a_file_never_leads_to_a_hub(tmp_path: Path, name: str, run: Callable[..., Run]) -> None:
    save_model(timm.create_model("test_vit", num_classes=0), tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    content["simexplain"]["backbone"] = name
    torch.save(content, tmp_path / "model.pt")
    assert "may only name networks" in refusal(tmp_path / "model.pt")
    assert "Error: " in run("layers", tmp_path / "model.pt").err
