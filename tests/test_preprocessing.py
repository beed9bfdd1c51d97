"""From picture to tensor exactly as timm does it, and from the network's view back again."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from pictures import noise, square
from PIL import Image
from timm.data import create_transform, resolve_data_config

from simexplain.data.preprocessing import FITS, IMAGENET, Geometry, Preprocess, hardly_seen
from simexplain.errors import ImageError
from simexplain.models.backbones import preprocess_of_timm

SHAPES = [(200, 300), (300, 200), (480, 640), (40, 30), (777, 333), (224, 224), (1, 1), (21, 1000)]


@pytest.mark.parametrize("size", [(224, 224), (64, 64), (256, 128), (96, 160), (192, 193)])
@pytest.mark.parametrize("share", [0.875, 0.95, 1.0])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_equal_to_timm_bit_for_bit(size: tuple[int, int], share: float, interpolation: str) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    theirs = create_transform(
        (3, *size), interpolation=interpolation, crop_pct=share, mean=mean, std=std
    )
    ours = Preprocess(size, "crop", share, interpolation, mean, std)
    for number, shape in enumerate(SHAPES):
        picture = noise(*shape, seed=number)
        tensor, geometry = ours(picture)
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, theirs(picture)), shape
        assert geometry.original == shape
        assert geometry.size == size


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "tf_efficientnet_lite0",
        "convnext_atto",
        "densenet121",
        "swin_tiny_patch4_window7_224",
        "vit_base_patch16_clip_384.openai_ft_in12k_in1k",  # squashed to 1 / 0.95, then cropped
        "dm_nfnet_f0",  # squashed to 1 / 0.9, then cropped
    ],
)
def test_equal_to_timm_for_its_networks(name: str) -> None:
    # The configuration is all that is read, so an empty network with it will do.
    network = torch.nn.Module()
    network.pretrained_cfg = network.default_cfg = timm.get_pretrained_cfg(name).to_dict()
    theirs = create_transform(**resolve_data_config({}, model=network))
    ours = preprocess_of_timm(network)
    assert ours.source == "timm's data config"
    for shape in SHAPES[:4]:
        assert torch.equal(ours(noise(*shape))[0], theirs(noise(*shape))), shape


def named(**change: object) -> torch.nn.Module:
    """An empty network with a timm configuration, which is all that is read of it."""
    network = torch.nn.Module()
    network.pretrained_cfg = timm.get_pretrained_cfg("resnet18").to_dict() | change
    return network


def test_timm_networks_that_saw_whole_pictures_with_a_border() -> None:
    network = named(crop_mode="border", crop_pct=1.0)
    theirs = create_transform(**resolve_data_config({}, model=network))
    for shape in ((90, 60), (61, 300), (224, 224)):
        assert torch.equal(preprocess_of_timm(network)(noise(*shape))[0], theirs(noise(*shape)))


def test_timm_networks_whose_crop_is_larger_than_the_picture() -> None:
    tensor, _ = preprocess_of_timm(named(crop_pct=1.15))(noise(90, 60))
    assert tensor.shape == (3, 224, 224)


def centroid(heat: np.ndarray) -> tuple[float, float]:
    """Centre of mass ``(x, y)`` in pixels from the top left corner of the picture."""
    rows, columns = np.indices(heat.shape)
    return ((columns + 0.5) * heat).sum() / heat.sum(), ((rows + 0.5) * heat).sum() / heat.sum()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(64, 64), (64, 96), (224, 160)])
@pytest.mark.parametrize(
    ("shape", "centre", "side"),
    [
        ((300, 500), (220, 130), 40),
        ((300, 500), (301, 171), 50),
        ((500, 300), (120, 220), 40),
        ((90, 120), (50, 42), 12),
        ((30, 40), (22, 13), 6),
        ((12, 10), (5, 7), 4),
    ],
)
def test_heat_returns_to_where_it_came_from(
    fit: str,
    size: tuple[int, int],
    shape: tuple[int, int],
    centre: tuple[float, float],
    side: int,
) -> None:
    picture = square(*shape, centre, side)
    # A black mean pads with black, so that the square is all there is.
    prepare = Preprocess(size, fit, 0.875, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    tensor, geometry = prepare(picture)
    heat = geometry.to_original(tensor.mean(dim=0).numpy())
    assert heat.shape == shape
    assert heat.dtype == np.float32
    x, y = centroid(heat)
    truth = centroid(np.asarray(picture.convert("L"), dtype=float))
    # One pixel of the picture or of the view, whichever is coarser, and never more than that.
    cell = max(1.0, 1 / min(geometry.scale) / 2)
    assert abs(x - truth[0]) < cell
    assert abs(y - truth[1]) < cell
    assert heat[round(centre[1]), round(centre[0])] > 0.9 * heat.max()


def test_pad_shows_all_on_the_mean_colour() -> None:
    prepare = Preprocess((60, 60), "pad", mean=(1.0, 0.5, 0.0), std=(1.0, 1.0, 1.0))
    tensor, geometry = prepare(Image.new("RGB", (120, 60), (0, 0, 255)))
    assert geometry.resized == (30, 60)
    assert geometry.box == (0, 0, 120, 60)
    assert prepare.undo(tensor)[5, 30].tolist() == [255, 128, 0]
    assert prepare.undo(tensor)[30, 30].tolist() == [0, 0, 255]


def test_box_and_zero_outside() -> None:
    geometry = Preprocess((100, 100), "crop", 1.0).geometry((200, 400))
    assert geometry == Geometry((200, 400), (100, 200), (0, 50), (100, 100))
    assert geometry.box == (100, 0, 300, 200)
    heat = geometry.to_original(np.ones((100, 100), np.float32))
    assert (heat[:, 100:300] == 1).all()
    assert (heat[:, :100] == 0).all()
    assert (heat[:, 300:] == 0).all()
    inner = Preprocess((100, 100), "crop", 0.5).geometry((200, 400))
    assert inner.box == (150, 50, 250, 150)
    heat = inner.to_original(np.ones((100, 100), np.float32))
    assert heat.sum() == 100 * 100
    assert heat[50:150, 150:250].all()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", SHAPES[:7])
def test_box_is_what_the_tensor_shows(fit: str, shape: tuple[int, int]) -> None:
    """Blanking everything inside the box leaves nothing of the picture in the tensor."""
    prepare = Preprocess((64, 48), fit, 0.875, "bilinear", (0.0,) * 3, (1.0,) * 3)
    left, top, right, bottom = prepare.geometry(shape).box
    assert 0 <= left < right <= shape[1]
    assert 0 <= top < bottom <= shape[0]
    pixels = np.full((*shape, 3), 255, np.uint8)
    margin = 2 * max(1, round(max(shape[0] / 64, shape[1] / 48)))  # antialiasing looks beyond it
    rows = slice(max(0, int(top) - margin), int(bottom) + margin + 1)
    pixels[rows, max(0, int(left) - margin) : int(right) + margin + 1] = 0
    assert prepare(Image.fromarray(pixels))[0].max() < 0.02


def test_point_agrees_with_the_heatmap() -> None:
    for fit in FITS:
        geometry = Preprocess((64, 64), fit, 0.875).geometry((300, 500))
        heat = np.zeros((64, 64), np.float32)
        heat[20, 33] = 1
        x, y = geometry.point_to_original(33.5, 20.5)
        mapped = geometry.to_original(heat)
        assert np.allclose(centroid(mapped), (x, y), atol=0.5), fit
    assert geometry.point_to_original(0, 0) == (0, 0)


def test_huge_pictures_can_be_mapped_back() -> None:
    geometry = Preprocess((64, 64), "squash").geometry((40_000, 20))
    heat = np.zeros((64, 64), np.float32)
    heat[32:] = 1
    mapped = geometry.to_original(heat)
    assert mapped.shape == (40_000, 20)
    assert (mapped[:19_000] == 0).all()
    assert (mapped[21_000:] == 1).all()


@pytest.mark.parametrize("std", [(0.229, 0.224, 0.225), (0.5, 0.5, 0.5), (0.017, 1.0, 2.0)])
def test_undo_inverts_normalisation(std: tuple[float, ...]) -> None:
    picture = noise(64, 64)
    prepare = Preprocess((64, 64), "squash", std=std)
    tensor, _ = prepare(picture)
    apart = np.abs(prepare.undo(tensor).astype(int) - np.asarray(picture, dtype=int))
    assert apart.max() <= 1
    assert prepare.undo(torch.stack([tensor] * 4).view(2, 2, 3, 64, 64)).shape == (2, 2, 64, 64, 3)


def test_json_round_trip() -> None:
    prepare = Preprocess((96, 160), "pad", 0.9, "bicubic", (0.5,) * 3, (0.25,) * 3, "a", ("b",))
    assert Preprocess.from_json(json.loads(json.dumps(prepare.to_json()))) == prepare


def test_elongated_pictures() -> None:
    strip = Image.new("RGB", (510, 10))
    with pytest.raises(ImageError, match=r"510x10 .*pad.*squash"):
        Preprocess((64, 64))(strip)
    for fit in ("pad", "squash"):
        assert Preprocess((64, 64), fit)(strip)[0].shape == (3, 64, 64)
    assert Preprocess((64, 64))(Image.new("RGB", (500, 10)))[0].shape == (3, 64, 64)


def test_bad_options() -> None:
    with pytest.raises(ImageError, match=r"crop, squash, pad.*'zoom'"):
        Preprocess(fit="zoom")
    for share in (0, -1, float("nan")):
        with pytest.raises(ImageError, match="crop_fraction"):
            Preprocess(crop_fraction=share)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(300, 500), (90, 61), (12, 10)])
def test_points_go_to_the_view_and_back(fit: str, shape: tuple[int, int]) -> None:
    geometry = Preprocess((64, 96), fit, 0.875).geometry(shape)
    left, top, right, bottom = geometry.box
    for share in (0.0, 0.2, 0.7, 1.0):
        point = left + share * (right - left), top + (1 - share) * (bottom - top)
        view = geometry.point_from_original(*point)
        assert geometry.point_to_original(*view) == pytest.approx(point)
        assert -1e-6 <= view[0] <= 96 + 1e-6
        assert -1e-6 <= view[1] <= 64 + 1e-6
    assert Geometry.from_json(json.loads(json.dumps(geometry.to_json()))) == geometry


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("share", [0.875, 1.1])
def test_masks_lie_on_the_view_as_the_picture_does(fit: str, share: float) -> None:
    picture = square(90, 130, (60, 50), 30)
    prepare = Preprocess((64, 96), fit, share, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    view, geometry = prepare(picture)
    mask = geometry.from_original(np.asarray(picture)[..., 0] > 127)
    assert mask.shape == (64, 96)
    away = mask != (view[0] > 0.5).numpy()  # at most at the edge, where pixels are mixed
    assert away.mean() < 0.03
    assert centroid(mask) == pytest.approx(centroid(view[0].numpy()), abs=0.5)


@pytest.mark.parametrize(
    ("fit", "size", "wanted"),
    [
        ("crop", (100, 200), 0.875 * 0.4375),
        ("crop", (100, 100), 0.875**2),
        ("squash", (100, 200), 0.875**2),
        ("pad", (100, 200), 1.0),
        ("pad", (300, 40), 1.0),
    ],
)
def test_the_share_that_is_seen(fit: str, size: tuple[int, int], wanted: float) -> None:
    """Counted pixel by pixel: those of the picture that the view's pixels come from."""
    geometry = replace(IMAGENET, fit=fit).geometry(size)
    assert geometry.seen == pytest.approx(wanted, abs=0.01)
    left, top, right, bottom = geometry.box
    rows = sum(top <= y + 0.5 < bottom for y in range(size[0]))
    columns = sum(left <= x + 0.5 < right for x in range(size[1]))
    assert geometry.seen == pytest.approx(rows * columns / (size[0] * size[1]), abs=0.02)
    assert geometry.to_json()["seen"] == round(geometry.seen, 4)


def test_pictures_whose_ends_are_cut_off_are_named() -> None:
    def record(fit: str, *sizes: tuple[int, int]) -> str:
        prepare = replace(IMAGENET, fit=fit)
        return hardly_seen((f"{n}.jpg", prepare.geometry(size)) for n, size in enumerate(sizes))

    assert record("crop", (100, 100), (100, 102)) == ""
    assert record("squash", (100, 300)) == ""
    assert record("pad", (100, 300)) == ""
    assert "saw 38% of '1.jpg', whose" in record("crop", (100, 100), (100, 200))
    assert "'0.jpg'" in record("crop", (200, 100))
    many = record("crop", *[(100, 200)] * 5)
    assert many.count("'") == 6
    assert "2 more" in many
