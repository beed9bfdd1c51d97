"""Reading pictures: every common kind as upright RGB, every bad file as one clear sentence."""

from __future__ import annotations

import io
import os
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from pictures import chunk, noise, oriented, png
from PIL import Image, features

from simexplain.data.images import MOST_SCANS, read_picture
from simexplain.errors import ImageError


def pixels(path: Path) -> np.ndarray:
    picture = read_picture(path)
    assert picture.image.mode == "RGB"
    assert picture.path == str(path)
    return np.asarray(picture.image)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tiff", "jpg"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    # Flat quarters survive JPEG; a different colour in each tells all eight cases apart.
    quarters = np.zeros((32, 48, 3), np.uint8)
    quarters[:16, :24], quarters[:16, 24:], quarters[16:, :24] = (255, 0, 0), (0, 255, 0), 80
    upright = Image.fromarray(quarters)
    path = tmp_path / f"turned.{suffix}"
    oriented(upright, orientation, path)
    read = pixels(path)
    assert read.shape == quarters.shape
    assert np.abs(read.astype(int) - quarters).max() <= (4 if suffix == "jpg" else 0)


def test_plain_rgb_is_untouched(tmp_path: Path) -> None:
    original = noise(7, 5)
    original.save(tmp_path / "plain.png")
    picture = read_picture(tmp_path / "plain.png")
    assert np.array_equal(picture.image, original)
    assert picture.notes == ()


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    grey = np.arange(60, dtype=np.uint8).reshape(6, 10)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(pixels(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, axis=2))


def test_one_bit_becomes_black_and_white(tmp_path: Path) -> None:
    bits = np.arange(60).reshape(6, 10) % 3 == 0
    Image.fromarray(bits).save(tmp_path / "bits.png")
    with Image.open(tmp_path / "bits.png") as stored:
        assert stored.mode == "1"
    assert np.array_equal(pixels(tmp_path / "bits.png")[..., 1], np.where(bits, 255, 0))


ALPHA = np.array([[0, 1, 64, 128, 200, 255]], dtype=np.uint8)


def on_white(colour: int, alpha: np.ndarray) -> np.ndarray:
    return np.round((colour * (alpha / 255)) + 255 * (1 - alpha / 255)).astype(int)


def test_rgba_is_laid_on_white(tmp_path: Path) -> None:
    bands = [np.full_like(ALPHA, value) for value in (10, 120, 250)]
    Image.fromarray(np.dstack([*bands, ALPHA])).save(tmp_path / "rgba.png")
    read = pixels(tmp_path / "rgba.png").astype(int)
    assert read[0, 0].tolist() == [255, 255, 255]
    assert read[0, 5].tolist() == [10, 120, 250]
    for band, colour in enumerate((10, 120, 250)):
        assert np.abs(read[..., band] - on_white(colour, ALPHA)).max() <= 1


def test_grey_with_alpha_is_laid_on_white(tmp_path: Path) -> None:
    Image.merge("LA", [Image.new("L", (6, 1), 100), Image.fromarray(ALPHA)]).save(
        tmp_path / "la.png"
    )
    read = pixels(tmp_path / "la.png").astype(int)
    assert np.abs(read - on_white(100, ALPHA)[..., None]).max() <= 1
    assert read[0, 5].tolist() == [100, 100, 100]


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_transparent_palette_entry_becomes_white(tmp_path: Path, suffix: str) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    image.save(tmp_path / f"palette.{suffix}", transparency=1)
    read = pixels(tmp_path / f"palette.{suffix}")
    assert read[0].tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]


def test_transparent_rgb_colour_becomes_white(tmp_path: Path) -> None:
    two = Image.fromarray(np.array([[[1, 2, 3], [9, 8, 7]]], np.uint8))
    two.save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert pixels(tmp_path / "key.png")[0].tolist() == [[255, 255, 255], [9, 8, 7]]


def test_transparent_grey_of_16_bits_becomes_white(tmp_path: Path) -> None:
    rows = b"\0" + np.array([65535, 1000, 0], ">u2").tobytes()
    key = chunk(b"tRNS", np.array([1000], ">u2").tobytes())
    (tmp_path / "key16.png").write_bytes(png(3, 1, 16, 0, rows, key))
    assert pixels(tmp_path / "key16.png")[0, :, 0].tolist() == [255, 255, 0]


@pytest.mark.parametrize("suffix", ["tiff", "jpg"])
def test_cmyk_shows_its_colours(tmp_path: Path, suffix: str) -> None:
    # Magenta and yellow ink make red; black ink alone makes black.
    inks = np.zeros((16, 32, 4), np.uint8)
    inks[:, :16] = (0, 255, 255, 0)
    inks[:, 16:] = (0, 0, 0, 255)
    Image.fromarray(inks, mode="CMYK").save(tmp_path / f"inks.{suffix}")
    read = pixels(tmp_path / f"inks.{suffix}").astype(int)
    assert np.abs(read[8, 4] - (255, 0, 0)).max() <= 4
    assert np.abs(read[8, 28] - (0, 0, 0)).max() <= 4


def test_deep_grey_is_scaled_from_its_whole_range(tmp_path: Path) -> None:
    values = np.array([[0, 257, 1000, 32768, 65000, 65535]], np.uint16)
    expected = np.round(values / 65535 * 255)
    Image.fromarray(values).save(tmp_path / "deep.png")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "deep.tiff")
    Image.fromarray((values / 65535).astype(np.float32)).save(tmp_path / "unit.tiff")
    for name in ("deep.png", "deep.tiff", "unit.tiff"):
        assert np.array_equal(pixels(tmp_path / name)[..., 2], expected), name
        assert "8 bits" in " ".join(read_picture(tmp_path / name).notes)


def test_values_out_of_range_are_stretched_with_a_note(tmp_path: Path) -> None:
    values = np.array([[-3.0, 0.0, 9.0]], np.float32)
    Image.fromarray(values).save(tmp_path / "floats.tiff")
    assert pixels(tmp_path / "floats.tiff")[0, :, 0].tolist() == [0, 64, 255]
    assert "-3 to 9" in read_picture(tmp_path / "floats.tiff").notes[0]


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("top", [1, 254, 255, 256, 4000, 4095, 4096, 65535])
def test_white_is_the_maximum_without_a_jump(tmp_path: Path, kind: type, top: int) -> None:
    values = np.round(np.linspace(0, top, 12)).reshape(3, 4)
    Image.fromarray(values.astype(kind)).save(tmp_path / "deep.tiff")
    white = max(top, 1 if kind is np.float32 else 255)
    assert np.array_equal(pixels(tmp_path / "deep.tiff")[..., 0], np.round(values / white * 255))


def test_floats_just_above_one_stay_as_they_are(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    read = []
    for name, factor in (("one.tiff", 1.0), ("above.tiff", 1.0001), ("below.tiff", 0.9999)):
        Image.fromarray((values * factor).astype(np.float32)).save(tmp_path / name)
        read.append(pixels(tmp_path / name).astype(int))
    assert max(np.abs(other - read[0]).max() for other in read[1:]) <= 1
    assert read[0].max() == 255


def test_constant_and_not_finite_floats(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), -5, np.float32)).save(tmp_path / "flat.tiff")
    assert np.unique(pixels(tmp_path / "flat.tiff")).size == 1
    Image.fromarray(np.array([[1, np.nan]], np.float32)).save(tmp_path / "nan.tiff")
    refused(tmp_path / "nan.tiff", "not finite")


def test_16_bit_colours_keep_their_high_bytes(tmp_path: Path) -> None:
    rows = b"\0" + np.array([65535, 0, 0x8000, 0x1234, 0xFF00, 255], ">u2").tobytes()
    (tmp_path / "deep.png").write_bytes(png(2, 1, 16, 2, rows))
    read = pixels(tmp_path / "deep.png").astype(int)
    assert np.abs(read[0] - [[255, 0, 128], [18, 255, 1]]).max() <= 1


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_first_frame_of_an_animation_with_a_note(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    path = tmp_path / f"moving.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(pixels(path), np.asarray(frames[0]))
    assert len(read_picture(path).notes) == 1
    assert "3 frames" in read_picture(path).notes[0]
    assert str(path) in read_picture(path).notes[0]


def test_single_pixel(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "dot.png")
    assert pixels(tmp_path / "dot.png").tolist() == [[[1, 2, 3]]]


def test_path_may_be_a_string(tmp_path: Path) -> None:
    noise(3, 3).save(tmp_path / "a.png")
    assert read_picture(str(tmp_path / "a.png")).path == str(tmp_path / "a.png")


def refused(path: Path, *record: str) -> None:
    """One sentence that names the file and says what is wrong, and no other output."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError) as caught:
            read_picture(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert text.endswith(".")
    assert ". " not in text
    for word in record:
        assert word in text, text


def test_what_is_no_picture(tmp_path: Path) -> None:
    refused(tmp_path / "none.jpg", "no file")
    refused(tmp_path, "folder")
    (tmp_path / "text.jpg").write_text("not a picture", encoding="utf-8")
    refused(tmp_path / "text.jpg", "not a picture")
    (tmp_path / "empty.jpg").touch()
    refused(tmp_path / "empty.jpg", "not a picture")
    (tmp_path / "below.jpg").write_bytes(b"\xff\xd8\xff")
    refused(tmp_path / "text.jpg" / "below.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tiff", "bmp"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_file(tmp_path: Path, suffix: str, share: float) -> None:
    whole = tmp_path / f"whole.{suffix}"
    noise(40, 60).save(whole)
    content = whole.read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(content[: int(share * len(content))])
    refused(cut)


def test_damaged_exif_of_a_good_picture_is_harmless(tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "odd.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09garbage")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(tmp_path / "odd.jpg").shape == (8, 8, 3)


def test_flipped_bytes_never_give_another_error(tmp_path: Path) -> None:
    kinds = [kind for kind in ("jpg", "png", "gif", "tiff", "webp", "avif") if _writable(kind)]
    outcomes = {"read": 0, "refused": 0}
    for kind in kinds:
        path = tmp_path / f"a.{kind}"
        noise(20, 30).save(path)
        content = path.read_bytes()
        for seed in range(40):
            random = np.random.default_rng(seed)
            damaged = bytearray(content)
            for index in random.integers(0, min(len(content), 400), 8):
                damaged[index] = random.integers(0, 256)
            path.write_bytes(damaged)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    read_picture(path)
                outcomes["read"] += 1
            except ImageError:
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 0


def _writable(kind: str) -> bool:
    return kind not in ("webp", "avif") or bool(features.check(kind))


def test_decoder_errors_of_any_kind_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of Pillow's decoders, such as that for AVIF, raise a plain RuntimeError."""
    noise(3, 3).save(tmp_path / "a.png")

    def fail(*_: object) -> None:
        raise RuntimeError("Failed to decode image")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    refused(tmp_path / "a.png", "Failed to decode image")


def test_too_many_pixels(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png(20_000, 20_000, 8, 0, b""))
    refused(tmp_path / "bomb.png", "178 million")
    # 90 million pixels are allowed and not even warned about; this file only lacks its pixels.
    (tmp_path / "large.png").write_bytes(png(10_000, 9_000, 8, 0, b""))
    refused(tmp_path / "large.png", "cut off")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_file_without_permission(tmp_path: Path) -> None:
    noise(3, 3).save(tmp_path / "locked.png")
    (tmp_path / "locked.png").chmod(0)
    refused(tmp_path / "locked.png", "permission")


def test_permission_error_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("PIL.Image.open", locked)
    refused(tmp_path / "locked.png", "permission")


def with_scans(image: Image.Image, count: int) -> bytes:
    """A progressive JPEG whose last scan is there again and again."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", progressive=True, comment=b"\xff\xda" * 300)
    content = buffer.getvalue()
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + (count - 10) * last + content[-2:]


@pytest.mark.parametrize("ending", [".jpg", ""])
def test_a_jpeg_of_very_many_scans_is_refused_at_once(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"scans{ending}"
    image = noise(30, 40)
    path.write_bytes(with_scans(image, MOST_SCANS) + b"\xff\xda\x00\x02" * 500)  # behind its end
    assert read_picture(path).image.size == image.size
    path.write_bytes(with_scans(image, MOST_SCANS + 1))
    with pytest.raises(ImageError, match="more than 100 scans"):
        read_picture(path)
    path.write_bytes(with_scans(Image.new("RGB", (9000, 9000)), 10_000))
    began = time.monotonic()
    with pytest.raises(ImageError, match="more than 100 scans"):
        read_picture(path)
    assert time.monotonic() - began < 5
