"""Pictures of many pixels: the same results as in one piece, in bounded memory."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import TinyNet
from numpy.typing import NDArray
from pictures import noise
from PIL import Image

from simexplain import Preprocess, explain, save_model, segment
from simexplain.data import images, preprocessing
from simexplain.data.images import LargePicture, pixels_of, read_picture
from simexplain.data.preprocessing import shrunk
from simexplain.errors import ImageError
from simexplain.rendering import overlay
from simexplain.results import result as results
from simexplain.results.png import write_png
from simexplain.segmentation import cue, segmenting

GIGABYTE = 10**9
_MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets from how many pixels on pictures are large, and how few rows are taken at a time."""

    def at(pixels: int) -> None:
        for module in (images, preprocessing, results, cue, segmenting):
            monkeypatch.setattr(module, "LARGE", pixels)
        for module in (images, preprocessing, overlay):
            monkeypatch.setattr(module, "_ROWS", 7)

    return at


def saved(folder: Path) -> list[Path]:
    """A JPEG that lies on its side, and a PNG."""
    exif = Image.Exif()
    exif[0x0112] = 6
    paths = [folder / "a.jpg", folder / "b.png"]
    noise(90, 130).save(paths[0], exif=exif, quality=95)
    noise(120, 70, seed=1).save(paths[1])
    return paths


def files_of(folder: Path) -> dict[str, NDArray[np.uint8]]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def test_results_are_those_of_small_pictures(tmp_path: Path, large: Callable[[int], None]) -> None:
    model, paths = TinyNet().eval(), saved(tmp_path)

    def made(name: str) -> dict[str, NDArray[np.uint8]]:
        explain(model, paths, check=False).save(tmp_path / name)
        return files_of(tmp_path / name)

    small = made("small")
    large(1)
    again = made("large")
    assert len(small) == 5
    assert small.keys() == again.keys()
    for name, pixels in small.items():
        np.testing.assert_array_equal(again[name], pixels)


def test_masks_are_those_of_small_pictures(tmp_path: Path, large: Callable[[int], None]) -> None:
    model, paths = TinyNet().eval(), saved(tmp_path)
    wide = tmp_path / "wide.png"
    noise(40, 90, seed=5).resize((900, 400), Image.Resampling.BICUBIC).save(wide)
    small = segment(model, wide, paths)
    small.save(tmp_path / "small")
    large(1)
    again = segment(model, wide, paths)
    again.save(tmp_path / "large")
    assert callable(vars(again)["heat"])
    np.testing.assert_array_equal(again.heat, small.heat)
    np.testing.assert_array_equal(again.marks, small.marks)
    # The edge of a mask is interpolated in 8 bits.
    assert (again.mask != small.mask).mean() < 1e-3
    np.testing.assert_array_equal(segment(model, wide, paths).mask, again.mask)
    files = files_of(tmp_path / "large")
    np.testing.assert_array_equal(files["mask.png"] > 0, again.mask)
    np.testing.assert_array_equal(files["overlay.png"], again.overlay())
    np.testing.assert_array_equal(files["cutout.png"], again.cutout())


def test_a_large_picture_is_read_again(tmp_path: Path, large: Callable[[int], None]) -> None:
    path = saved(tmp_path)[0]
    whole = np.asarray(read_picture(path).image)
    large(1)
    picture = read_picture(path)
    assert isinstance(picture, LargePicture)
    first, second = picture.image, picture.image
    assert first is not second
    for kept in (first, second, picture.pixels, pixels_of(picture.image)):
        np.testing.assert_array_equal(np.asarray(kept), whole)
    for another in (copy.deepcopy(picture), pickle.loads(pickle.dumps(picture))):  # noqa: S301
        np.testing.assert_array_equal(np.asarray(another.image), whole)
    path.unlink()
    np.testing.assert_array_equal(np.asarray(picture.image), whole)


@pytest.mark.parametrize("content", ["another", "nothing", "half"])
def test_a_large_picture_that_is_overwritten(
    tmp_path: Path, large: Callable[[int], None], content: str
) -> None:
    path = saved(tmp_path)[1]
    large(1)
    picture = read_picture(path)
    picture.image.close()
    before, another = path.read_bytes(), io.BytesIO()
    noise(10, 10).save(another, "PNG")
    new = {"another": another.getvalue(), "nothing": b"", "half": before[: len(before) // 2]}
    path.write_bytes(new[content])
    with pytest.raises(ImageError, match=r"b\.png"):
        _ = picture.image


def test_a_damaged_large_picture_is_refused_when_it_is_read(
    tmp_path: Path, large: Callable[[int], None]
) -> None:
    path = saved(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:3000])
    large(1)
    with pytest.raises(ImageError, match="damaged"):
        read_picture(path)


def odd_pictures() -> dict[str, Image.Image]:
    rgba = noise(40, 30).convert("RGBA")
    rgba.putalpha(noise(40, 30, seed=2).convert("L"))
    deep = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(40, 30) * 50)
    return {
        "rgba": rgba,
        "la": rgba.convert("LA"),
        "palette": rgba.convert("RGB").quantize(20),
        "deep": deep,
        "float": Image.fromarray(np.linspace(-3, 7, 1200, dtype=np.float32).reshape(40, 30)),
        "cmyk": rgba.convert("RGB").convert("CMYK"),
    }


def as_a_whole(name: str, image: Image.Image) -> NDArray[np.uint8]:
    """By the formula of each, without strips."""
    values = np.asarray(image).astype(np.float64)
    if name in ("deep", "float"):
        low, high = min(0.0, values.min()), max(255.0 if name == "deep" else 1.0, values.max())
        grey = np.round((values - low) / (high - low) * 255).astype(np.uint8)
        return np.stack([grey] * 3, axis=2)
    if name in ("rgba", "la"):
        whole = image.convert("RGBA")
        white = Image.new("RGBA", whole.size, (255, 255, 255, 255))
        return np.asarray(Image.alpha_composite(white, whole).convert("RGB"))
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("name", odd_pictures())
def test_odd_pictures_in_strips(large: Callable[[int], None], name: str) -> None:
    large(1)
    image = odd_pictures()[name]
    before = image.tobytes()
    np.testing.assert_array_equal(
        np.asarray(read_picture(image).image), as_a_whole(name, odd_pictures()[name])
    )
    assert image.tobytes() == before


@pytest.mark.parametrize("shape", [(1, 1), (5, 7, 3), (300, 2, 3), (513, 40, 4), (256, 9)])
def test_png_files_have_the_pixels(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    file = io.BytesIO()
    write_png(file, pixels)
    with Image.open(file) as image:
        image.load()
        np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("size", [(3, 900), (900, 3), (700, 650), (30, 20)])
def test_arrays_shrink_as_pictures_do(large: Callable[[int], None], size: tuple[int, int]) -> None:
    image = noise(*size)
    np.testing.assert_array_equal(shrunk(np.asarray(image), 100), shrunk(image, 100))
    large(1)  # Pillow may begin with the columns, which rounds differently
    np.testing.assert_allclose(shrunk(np.asarray(image), 100), shrunk(image, 100), atol=1.01)


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network, a JPEG and a PNG of a hundred million pixels."""
    folder = tmp_path_factory.mktemp("hundred")
    torch.manual_seed(0)
    network = timm.create_model("test_efficientnet", num_classes=0).eval()
    save_model(
        network, folder / "net.pt", backbone="timm:test_efficientnet",
        preprocess=Preprocess(size=(64, 64)),
    )  # fmt: skip
    for name, seed in (("a.jpg", 0), ("b.png", 1)):
        image = noise(82, 123, seed=seed).resize((12_247, 8_165), Image.Resampling.BICUBIC)
        image.save(folder / name, **({"compress_level": 1} if name == "b.png" else {}))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read as Linux has them")
@pytest.mark.parametrize("pictures", [("a.jpg", "b.png"), ("b.png", "a.jpg")])
@pytest.mark.parametrize("command", ["explain", "segment", "match", "search"])
def test_a_hundred_megapixels_take_two_gigabytes(
    hundred: Path, tmp_path: Path, command: str, pictures: tuple[str, str]
) -> None:
    paths: list[str | Path] = [hundred / name for name in pictures]
    if command == "search":
        (tmp_path / "gallery").mkdir()
        (tmp_path / "gallery" / pictures[1]).symlink_to(paths[1])
        paths[1] = tmp_path / "gallery"
    words = ("simexplain", command, hundred / "net.pt", *paths, "--out", tmp_path / "out")
    run = [sys.executable, "-c", _MEASURE, sys.executable, "-m", "simexplain_cli.main"]
    done = subprocess.run([*run, *words[1:]], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 <= 2 * GIGABYTE
