"""Networks of transformers: from a folder, offline, with their own vectors and pictures."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runs import Run
from conftest import refusal
from hub_cases import MODELS, built, no_network, photographs, written  # noqa: F401
from torch import Tensor, nn

from simexplain import Comparison, as_similarity_model, explain, load_model, save_model
from simexplain.errors import ModelError
from simexplain.models import hub
from simexplain.models.readouts import OUTPUTS

pytest.importorskip("transformers")
FAMILIES = tuple(MODELS)

# What transformers itself gives, written by hand for each family from its documentation.
OWN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "CLIP": lambda m, x: m.get_image_features(pixel_values=x).pooler_output,
    "CLIP vision": lambda m, x: m(pixel_values=x).pooler_output,
    "CLIP projecting": lambda m, x: m(pixel_values=x).image_embeds,
    "SigLIP": lambda m, x: m.get_image_features(pixel_values=x).pooler_output,
    "SigLIP vision": lambda m, x: m(pixel_values=x).pooler_output,
    "SigLIP 2": lambda m, x: m.get_image_features(**naflex(x)).pooler_output,
    "DINOv2": lambda m, x: m(pixel_values=x).pooler_output,
    "DINOv2 with registers": lambda m, x: m(pixel_values=x).pooler_output,
    "DINOv3": lambda m, x: m(pixel_values=x).pooler_output,
    "ViT": lambda m, x: m(pixel_values=x).last_hidden_state[:, 0],
    "DeiT": lambda m, x: m(pixel_values=x).last_hidden_state[:, 0],
    "BEiT": lambda m, x: m(pixel_values=x).pooler_output,
    "ViTMSN": lambda m, x: m(pixel_values=x).last_hidden_state[:, 0],
    "Swin": lambda m, x: m(pixel_values=x).pooler_output,
    "ConvNeXt": lambda m, x: m(pixel_values=x).pooler_output,
    "ResNet": lambda m, x: m(pixel_values=x).pooler_output.flatten(1),
}


def naflex(images: Tensor, side: int = 8) -> dict[str, Tensor]:
    """Patches as the processor of SigLIP 2 cuts them, in a plain loop."""
    rows = []
    for image in images:
        patches = []
        for top in range(0, image.shape[1], side):
            for left in range(0, image.shape[2], side):
                patch = image[:, top : top + side, left : left + side]
                patches.append(patch.permute(1, 2, 0).flatten())
        rows.append(torch.stack(patches))
    shape = [images.shape[2] // side, images.shape[3] // side]
    return {
        "pixel_values": torch.stack(rows),
        "pixel_attention_mask": torch.ones(len(images), rows[0].shape[0], dtype=torch.int32),
        "spatial_shapes": torch.tensor([shape] * len(images)),
    }


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_gives_the_vector_its_authors_compare(
    family: str, tmp_path: Path, images: Tensor
) -> None:
    network = written(family, tmp_path / "net")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model = load_model(tmp_path / "net")
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        wanted = OWN[family](network, images)
        assert torch.allclose(model.vectors(images), wanted, atol=1e-5)
        assert torch.allclose(model.embed(images), nn.functional.normalize(wanted), atol=1e-5)
    assert wanted.std(dim=0).max() > 1e-3  # vectors that do not depend on the image prove nothing
    assert model.name == "net"
    bare = as_similarity_model(built(family))
    with torch.no_grad():
        assert torch.allclose(bare.vectors(images), wanted, atol=1e-5)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_are_prepared_as_the_processor_does(family: str, tmp_path: Path) -> None:
    """To 1e-4 of a normalised channel, which is under a hundredth of one grey level."""
    from transformers import AutoImageProcessor

    written(family, tmp_path / "net")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "net", local_files_only=True)
    prepare = load_model(tmp_path / "net").preprocess
    if family == "SigLIP 2":  # every picture gets a shape of its own there
        assert any("aspect ratio" in note for note in prepare.notes)
        pictures = [picture.resize((90, 90)) for picture in photographs()]
    else:
        assert prepare.notes == ()
        pictures = photographs()
    for picture in pictures:
        tensor, geometry = prepare(picture)
        theirs = processor(images=picture, return_tensors="pt")["pixel_values"][0]
        ours = naflex(tensor[None])["pixel_values"][0] if family == "SigLIP 2" else tensor
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 1e-4
        assert geometry.size == tuple(tensor.shape[1:])


def vision(network: nn.Module) -> nn.Module:
    return getattr(network, "vision_model", network)


# By hand: how many tokens of the last hidden state are no patches, None for maps.
PREFIX = {
    "CLIP": 1, "CLIP vision": 1, "CLIP projecting": 1, "SigLIP": 0, "SigLIP vision": 0,
    "SigLIP 2": 0, "DINOv2": 1, "DINOv2 with registers": 5, "DINOv3": 5, "ViT": 1, "DeiT": 2,
    "BEiT": 1, "ViTMSN": 1, "Swin": 0, "ConvNeXt": None, "ResNet": None,
}  # fmt: skip
PROJECTING = ("CLIP", "CLIP projecting", "SigLIP", "SigLIP vision", "SigLIP 2")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_word_for_a_vector(family: str, images: Tensor) -> None:
    network = built(family)
    inputs = naflex(images) if family == "SigLIP 2" else {"pixel_values": images}
    with torch.no_grad():
        result = vision(network)(**inputs)
    hidden, prefix = result.last_hidden_state, PREFIX[family]
    wanted = {
        "class_token": hidden[:, 0] if prefix else None,
        "patch_mean": hidden.mean((2, 3)) if prefix is None else hidden[:, prefix:].mean(1),
        "projected": OWN[family](network, images) if family in PROJECTING else None,
        "pooled": result.pooler_output.flatten(1) if family != "ViTMSN" else None,
    }
    assert set(wanted) == set(OUTPUTS)
    for word, vector in wanted.items():
        model = as_similarity_model(network, output=word)
        if vector is None:
            with pytest.raises(ModelError, match=f"no vector '{word}'; choose"):
                model.vectors(images)
        else:
            with torch.no_grad():
                assert torch.allclose(model.vectors(images), vector, atol=1e-5), word


def test_a_part_may_still_be_named_or_picked(images: Tensor) -> None:
    network = built("DINOv2")
    with torch.no_grad():
        hidden = network(pixel_values=images).last_hidden_state
        second = as_similarity_model(network, output=lambda r: r.last_hidden_state[:, 1])
        assert torch.equal(second.vectors(images), hidden[:, 1])
        named = as_similarity_model(network, output="pooler_output")
        assert torch.equal(named.vectors(images), hidden[:, 0])
        clip = as_similarity_model(built("CLIP"), output="pooler_output")
        assert torch.allclose(clip.vectors(images), OWN["CLIP"](built("CLIP"), images), atol=1e-6)
    with pytest.raises(ModelError, match="does not pick anything"):
        as_similarity_model(network, output="nothing").vectors(images)


def test_a_classifier_is_read_before_its_head(images: Tensor) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    body = built("ViT")
    classifier = ViTForImageClassification(ViTConfig(**body.config.to_dict())).eval()
    bare = classifier.base_model
    with torch.no_grad():
        wanted = bare(pixel_values=images).last_hidden_state[:, 0]
        assert torch.allclose(as_similarity_model(classifier).vectors(images), wanted, atol=1e-6)


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_a_classifier_of_two_towers_needs_no_text_tower(
    kind: str, images: Tensor, tmp_path: Path
) -> None:
    import transformers

    body = built("CLIP" if kind == "CLIP" else "SigLIP")
    network = getattr(transformers, f"{kind}ForImageClassification")(body.config).eval()
    network.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = network.vision_model(pixel_values=images)
        model = load_model(tmp_path)
        assert torch.allclose(model.vectors(images), wanted.pooler_output, atol=1e-5)


def test_flava_compares_its_class_token_in_the_shared_space(images: Tensor) -> None:
    from transformers import FlavaConfig, FlavaModel

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 16}  # fmt: skip
    config = FlavaConfig(
        image_config={**small, "image_size": 32, "patch_size": 8},
        text_config={**small, "vocab_size": 20},
        multimodal_config=small,
        projection_dim=12,
    )
    network = FlavaModel(config).eval()
    with torch.no_grad():
        first = network.image_model(pixel_values=images).last_hidden_state[:, 0]
        wanted = network.image_projection(first)
        assert torch.allclose(as_similarity_model(network).vectors(images), wanted, atol=1e-6)


def test_detection_tokens_are_no_patches(images: Tensor) -> None:
    from transformers import YolosConfig, YolosModel

    network = YolosModel(
        YolosConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            image_size=[32, 32], patch_size=8, num_detection_tokens=3,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        wanted = network(pixel_values=images).last_hidden_state[:, 1:17].mean(1)
        model = as_similarity_model(network, output="patch_mean")
        assert torch.allclose(model.vectors(images), wanted, atol=1e-6)


@pytest.mark.parametrize("family", ["CLIP", "ViT", "DINOv2", "Swin", "SigLIP"])
def test_maps_equal_plain_autograd(family: str, images: Tensor) -> None:
    """Similarity attention of a pair at a block, against a hook and autograd on the own vector."""
    network = built(family)
    model = as_similarity_model(network)
    layer = next(row.name for row in reversed(model.layers) if row.kind.endswith("Layer"))
    comparison = Comparison.pair(images[:1], images[1:2])
    result = explain(model, comparison, layer=layer)
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: object) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = network.get_submodule(layer).register_forward_hook(keep)
    unit = nn.functional.normalize(OWN[family](network, images[:2]), dim=1)
    handle.remove()
    weight = (1 - (unit[0] - unit[1]).abs()).detach()
    (gradient,) = torch.autograd.grad((unit @ weight).sum(), kept[0])
    prefix = PREFIX[family] or 0
    tokens, slopes = kept[0][:, prefix:], gradient[:, prefix:]
    heat = (tokens * slopes.mean(1, keepdim=True)).sum(2).relu()
    side = round(heat.shape[1] ** 0.5)
    assert torch.allclose(result.maps[0], heat.view(2, side, side).detach(), atol=1e-5)


def test_another_size_is_interpolated(tmp_path: Path) -> None:
    written("ViT", tmp_path / "net")
    model = load_model(tmp_path / "net", size=(48, 64))
    images = torch.rand(2, 3, 48, 64)
    with torch.no_grad():
        wanted = built("ViT")(pixel_values=images, interpolate_pos_encoding=True)
        assert torch.allclose(model.vectors(images), wanted.last_hidden_state[:, 0], atol=1e-5)
    odd = load_model(tmp_path / "net", size=(36, 36))
    odd.embed(torch.rand(1, 3, 36, 36))  # the patches do not divide it


def test_a_folder_without_a_processor_says_what_is_assumed(tmp_path: Path) -> None:
    written("CLIP vision", tmp_path / "net", processor=False)
    prepare = load_model(tmp_path / "net").preprocess
    assert prepare.size == (32, 32)
    assert prepare.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert any("CLIPImageProcessor" in note for note in prepare.notes)
    written("ConvNeXt", tmp_path / "conv", processor=False)
    cropping = load_model(tmp_path / "conv").preprocess
    assert (cropping.size, cropping.fit) == ((224, 224), "crop")  # squashed from 384 on only
    assert cropping.geometry((300, 300)).resized == (256, 256)


@pytest.mark.usefixtures("no_network")
def test_the_command_line_explains_a_folder(
    tmp_path: Path, run: Callable[..., Run], demo_paths: list[Path]
) -> None:
    written("DINOv2", tmp_path / "net")
    done = run("explain", tmp_path / "net", *demo_paths, "--arch", "triplet", "--out", "out")
    assert done.code == 0, done.err
    assert ": net, layer " in done.out.splitlines()[0]
    assert (tmp_path / "out" / "explanation.png").is_file()
    listed = run("layers", tmp_path / "net", "--output", "patch_mean")
    assert listed.code == 0, listed.err
    assert "encoder.layer.1" in listed.out


@pytest.mark.usefixtures("no_network")
def test_names_without_a_network_give_one_sentence(fails: Callable[..., str]) -> None:
    for name in ("hf:somebody/net", "st:net", "open_clip:ViT-B-32/openai", "open_clip:hf-hub:a/b"):
        text = fails("layers", name)
        assert "cannot be fetched from here" in text
        assert name.removeprefix("st:") in text
    assert "hf:ORG/NAME or a folder" in fails("layers", "hf:net")
    assert "no network 'ViT-B-33'" in fails("layers", "open_clip:ViT-B-33")
    assert "laion2b_s34b_b79k" in fails("layers", "open_clip:ViT-B-32")


def test_a_name_is_fetched_once_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The hub is played by a folder; what it gave is found in the cache the second time."""
    import huggingface_hub

    written("ViT", tmp_path / "remote")
    cache, requested = tmp_path / "cache", []

    def snapshot(name: str, *, allow_patterns: list[str], local_files_only: bool = False) -> str:
        if not cache.exists():
            if local_files_only:
                raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
            requested.append((name, allow_patterns))
            shutil.copytree(tmp_path / "remote", cache)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: [])
    with caplog.at_level(logging.WARNING, logger="simexplain"):
        first, second = load_model("hf:some/vit"), load_model("hf:some/vit")
    assert [name for name, _ in requested] == ["some/vit"]
    assert not any("bin" in pattern for pattern in requested[0][1])
    (message,) = (record.message for record in caplog.records)
    assert "hf:some/vit over the network, once" in message
    assert first.name == second.name == "hf:some/vit"


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written("ViT", tmp_path / "net")

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(hub, "import_module", missing)
    for source in (tmp_path / "net", "hf:a/b", "st:a/b", "open_clip:ViT-B-32"):
        assert "pip install 'simexplain[hub]'" in refusal(source)


def test_weights_that_would_be_random_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    written("ViT", tmp_path / "net")
    file = tmp_path / "net" / "model.safetensors"
    state = load_file(file)
    without = {key: value for key, value in state.items() if "pooler" not in key}
    save_file(without, file, metadata={"format": "pt"})
    assert load_model(tmp_path / "net").readout.output == "class_token"
    assert "no weights for the pooler" in refusal(tmp_path / "net", output="pooled")
    dropped = next(key for key in without if "intermediate" in key or "fc1" in key)
    without.pop(dropped)
    save_file(without, file, metadata={"format": "pt"})
    assert "lacks 1 weights" in refusal(tmp_path / "net")
    file.unlink()
    assert "cannot be loaded with transformers" in refusal(tmp_path / "net")


def test_untrained_pooler_falls_back_to_the_class_token(tmp_path: Path, images: Tensor) -> None:
    from safetensors.torch import load_file, save_file

    network = written("BEiT", tmp_path / "net")
    file = tmp_path / "net" / "model.safetensors"
    state = {k: v for k, v in load_file(file).items() if "pooler" not in k}
    save_file(state, file, metadata={"format": "pt"})
    with torch.no_grad():
        wanted = network(pixel_values=images).last_hidden_state[:, 0]
        assert torch.allclose(load_model(tmp_path / "net").vectors(images), wanted, atol=1e-5)


@pytest.mark.usefixtures("no_network")
def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel, VideoMAEConfig, VideoMAEModel

    (tmp_path / "empty").mkdir()
    assert "no config.json" in refusal(tmp_path / "empty")
    text = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        vocab_size=20,
    )  # fmt: skip
    BertModel(text).save_pretrained(tmp_path / "text")
    assert "network of images" in refusal(tmp_path / "text")
    film = VideoMAEConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=32, num_frames=2,
    )  # fmt: skip
    VideoMAEModel(film).save_pretrained(tmp_path / "film")
    assert "takes videos" in refusal(tmp_path / "film")
    written("ViT", tmp_path / "net")
    config = tmp_path / "net" / "config.json"
    stored = json.loads(config.read_text())
    stored |= {"model_type": "mine", "auto_map": {"AutoModel": "code.Mine"}}
    config.write_text(json.dumps(stored))
    (tmp_path / "net" / "code.py").write_text("raise SystemExit('ran')")
    assert "code that comes with a model is never run" in refusal(tmp_path / "net")
    config.write_text("{")
    assert "cannot be read as JSON" in refusal(tmp_path / "net")
    written("DINOv2", tmp_path / "dino")
    (tmp_path / "dino" / "preprocessor_config.json").write_text("[1]")
    assert "image processor" in refusal(tmp_path / "dino")
    assert "expected output to be one of" in refusal(tmp_path / "dino", output="mean").lower()


def test_pickled_weights_of_a_folder_are_tensors_only(tmp_path: Path, images: Tensor) -> None:
    network = written("ViT", tmp_path / "net")
    (tmp_path / "net" / "model.safetensors").unlink()
    path = tmp_path / "net" / "pytorch_model.bin"
    torch.save(network.state_dict(), path)
    with torch.no_grad():
        wanted = OWN["ViT"](network, images)
        assert torch.allclose(load_model(tmp_path / "net").vectors(images), wanted, atol=1e-5)

    sprung = tmp_path / "sprung"

    class Trap:
        def __reduce__(self) -> tuple:
            return Path.touch, (sprung,)

    torch.save({**network.state_dict(), "odd": Trap()}, path)
    refusal(tmp_path / "net")
    assert not sprung.exists()


@pytest.mark.usefixtures("no_network")
def test_weights_of_a_file_for_a_folder(tmp_path: Path, images: Tensor) -> None:
    network = written("ViT", tmp_path / "net")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)
    state = {f"model.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "tuned.ckpt")
    with torch.no_grad():
        wanted = OWN["ViT"](network, images)
        for model in (
            load_model(tmp_path / "tuned.ckpt", backbone=f"hf:{tmp_path / 'net'}"),
            load_model(f"hf:{tmp_path / 'net'}", weights=tmp_path / "tuned.ckpt"),
        ):
            assert torch.allclose(model.vectors(images), wanted, atol=1e-5)
    random = load_model(tmp_path / "net", weights="random")
    assert not torch.allclose(random.vectors(images), wanted, atol=1e-2)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("family", ["CLIP", "SigLIP 2", "DINOv3", "DeiT", "Swin", "ResNet"])
def test_saved_and_loaded_again(family: str, tmp_path: Path, images: Tensor) -> None:
    written(family, tmp_path / "net")
    first = load_model(tmp_path / "net", output="patch_mean", distance="cosine", size=(32, 32))
    save_model(first, tmp_path / "again")
    again = load_model(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again.embed(images), first.embed(images))
    assert again.preprocess == first.preprocess
    assert again.distance_name == "cosine"
    assert (again.default_layer, again.stages) == (first.default_layer, first.stages)
    assert (tmp_path / "again" / "preprocessor_config.json").is_file()
    before = (tmp_path / "again" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is there already; choose a new folder"):
        save_model(first, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "net"]
