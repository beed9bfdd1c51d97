"""Pictures from memory: what verbs on files make of PIL pictures and arrays is as from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avsl_cases import small_avsl
from conftest import TinyNet
from PIL import Image

from simexplain import (
    as_similarity_model,
    attribute,
    compare,
    evaluate_faithfulness,
    explain,
    match,
    search,
    segment,
)
from simexplain.data.images import read_picture
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ComparisonError, ImageError
from simexplain.models.base import SimilarityModel

SIZES = ((40, 60), (50, 30), (44, 44))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    result = []
    for number, (height, width) in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        result.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(result[-1])
    return result


@pytest.fixture
def model() -> SimilarityModel:
    torch.manual_seed(0)
    return as_similarity_model(TinyNet().eval(), preprocess=Preprocess(size=(32, 32)), name="tiny")


def mixed(files: list[Path]) -> list[Any]:
    """The first as an array, the second of PIL, the others as files."""
    return [np.asarray(Image.open(files[0])), Image.open(files[1]), *files[2:]]


def test_explaining_is_as_from_files(
    files: list[Path], model: SimilarityModel, tmp_path: Path
) -> None:
    direct, result = explain(model, files), explain(model, mixed(files))
    assert torch.equal(direct.maps, result.maps)
    assert torch.equal(direct.distances, result.distances)
    assert [p.path for p in result.pictures] == ["image 1", "image 2", str(files[2])]
    result.save(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "explanation.json").read_text())
    paths = [image["path"] for image in record["images"]]
    assert paths == ["image 1", "image 2", str(files[2])]
    assert result.figure() is not None


def test_every_verb_takes_them(files: list[Path], model: SimilarityModel, tmp_path: Path) -> None:
    given = mixed(files)
    pair = match(model, *given[:2])
    assert torch.equal(pair.score, match(model, *files[:2]).score)
    assert [picture.path for picture in pair.pictures[0]] == ["image 1", "image 2"]
    avsl = small_avsl()
    assert torch.equal(
        attribute(avsl, given[0], given[1:]).distances,
        attribute(avsl, files[0], files[1:]).distances,
    )
    np.testing.assert_array_equal(
        segment(model, given[0], given[1:], refine="threshold").mask,
        segment(model, files[0], files[1:], refine="threshold").mask,
    )
    table = compare(model, given, ["sam"], arch="triplet", curve_steps=2)
    assert (
        table["sam"].means
        == compare(model, files, ["sam"], arch="triplet", curve_steps=2)["sam"].means
    )
    scores = evaluate_faithfulness(
        model, [(given, "triplet")], {"sam": ("sam", None, {})}, curve_steps=2
    )
    assert scores.items == (("image 1", "image 2", str(files[2])),)


def test_one_picture_is_no_list_of_supports(files: list[Path], model: SimilarityModel) -> None:
    for one in mixed(files):
        with pytest.raises(
            ComparisonError,
            match=r"tensor or a list of pictures .* as supports, got .* put it into a list",
        ):
            segment(model, files[0], one)


@pytest.mark.parametrize("place", [0, 1])
def test_a_search_takes_them(files: list[Path], model: SimilarityModel, place: int) -> None:
    pytest.importorskip("faiss")
    result = search(model, mixed(files)[place], files[0].parent, 3)
    assert result.query == "query"
    # A picture from memory is no file of the gallery, so its own file is a hit as copies are.
    assert result.paths[0] == str(files[place])
    assert result.hits[0].distance == pytest.approx(0, abs=1e-5)


KINDS: dict[str, tuple[Image.Image, str]] = {
    mode: (Image.effect_noise((30, 20), 80).convert(mode), ".png")
    for mode in ("L", "RGB", "RGBA", "P", "1", "LA")
} | {"CMYK": (Image.effect_noise((30, 20), 80).convert("CMYK"), ".tif")}


@pytest.mark.parametrize("mode", KINDS)
def test_pictures_of_pil_are_read_as_their_files(mode: str, tmp_path: Path) -> None:
    picture, ending = KINDS[mode]
    if mode == "RGBA":
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    picture.save(tmp_path / f"a{ending}")
    before = picture.tobytes(), picture.mode
    result = read_picture(picture)
    np.testing.assert_array_equal(result.image, read_picture(tmp_path / f"a{ending}").image)
    assert (picture.tobytes(), picture.mode) == before
    assert result.path == "image 1"


def test_a_photograph_is_turned_upright_and_an_animation_stays_where_it_is(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((30, 20), 80).convert("RGB").save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as opened:
        assert read_picture(opened).image.size == (20, 30)
    frames = [Image.new("RGB", (20, 20), (60 * n, 0, 0)) for n in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.gif") as opened:
        opened.seek(2)
        assert read_picture(opened).image.getpixel((0, 0))[0] == pytest.approx(120, abs=8)
        assert opened.tell() == 2


def test_arrays_are_what_their_shape_and_type_say() -> None:
    random = np.random.default_rng(0)
    rgb = random.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    before = rgb.copy()
    np.testing.assert_array_equal(read_picture(rgb).image, rgb)
    np.testing.assert_array_equal(read_picture(rgb.transpose(2, 0, 1)).image, rgb)
    np.testing.assert_array_equal(read_picture((rgb / 255).astype(np.float32)).image, rgb)
    grey = read_picture(rgb[..., 0]).image
    np.testing.assert_array_equal(np.asarray(grey)[..., 2], rgb[..., 0])
    np.testing.assert_array_equal(read_picture(rgb[..., :1]).image, grey)
    clear = np.dstack((rgb, np.zeros((20, 30), dtype=np.uint8)))
    assert set(np.unique(read_picture(clear).image)) == {255}
    np.testing.assert_array_equal(rgb, before)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.zeros((4, 4, 3, 1)), "(4, 4, 3, 1)"),
        (np.full((8, 8, 3), np.nan), "not finite"),
        (np.full((8, 8, 3), 200.0), "divide them by 255"),
        (np.zeros((8, 8), dtype=complex), "complex"),
        (np.array([["a"]]), "numbers of shape"),
        (torch.zeros(3, 8, 8), "preprocessed tensors"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_picture_is_told_by_its_place(
    given: Any, said: str, files: list[Path], model: SimilarityModel
) -> None:
    with pytest.raises(ImageError) as error:
        explain(model, [files[0], given], arch="siamese")
    assert said in str(error.value)
    assert "'image 2'" in str(error.value)
    assert str(error.value).endswith(".")


def test_a_closed_file_is_told(files: list[Path], model: SimilarityModel) -> None:
    with Image.open(files[0]) as opened:
        pass
    with pytest.raises(ImageError, match="image 1"):
        explain(model, [opened, files[1]], arch="siamese")
