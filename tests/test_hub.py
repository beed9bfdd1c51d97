"""Networks of transformers: from a folder, offline, with their own vectors and pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runs import Run
from conftest import refusal
from hub_cases import MODELS, NetworkUsedError, built, no_network, photographs, written  # noqa: F401
from torch import Tensor, nn

from simexplain import Comparison, as_similarity_model, explain, load_model
from simexplain.errors import ModelError
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
