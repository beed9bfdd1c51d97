"""Pictures of one and of many channels, from a file to a figure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyNet, plain_maps
from numpy.typing import NDArray
from pictures import noise
from torch import nn
from torch.nn import functional as F

from simexplain import (
    Comparison,
    Explanation,
    Preprocess,
    as_similarity_model,
    build_index,
    explain,
    load_model,
    match,
    search,
)
from simexplain.data.arrays import as_rgb
from simexplain.data.images import read_picture
from simexplain.data.preprocessing import prepared
from simexplain.errors import ImageError
from simexplain.methods import METHODS

NEEDING_OTHERS = ("avsl", "weight_bank", "attention", "attention_relevance", "grad_eclip")
"""Methods that need a model or a bank of their own."""

QUICK = {"smoothgrad": {"samples": 2}, "random_masks": {"masks": 8}}


def network(channels: int) -> TinyNet:
    made = TinyNet()
    made.stem = nn.Conv2d(channels, 8, 3, stride=2, padding=1)
    return made.eval()


def bands(channels: int, seed: int, size: tuple[int, int] = (40, 60)) -> NDArray[np.float32]:
    values = np.random.default_rng(seed).random((*size, channels), dtype=np.float32)
    return values * np.linspace(1, 4000, channels, dtype=np.float32)


@pytest.fixture(params=[1, 2, 5])
def channels(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.mark.parametrize("method", [name for name in METHODS if name not in NEEDING_OTHERS])
def test_every_method_explains_any_number_of_channels(channels: int, method: str) -> None:
    images = torch.rand(3, channels, 24, 32)
    net = network(channels)
    result = explain(net, Comparison.triplet(*images[:, None]), method, **QUICK.get(method, {}))
    assert result.maps.shape[:2] == (1, 3)
    assert result.views.shape == (1, 3, 24, 32, 3)
    assert result.preprocess.channels == channels
    result.figure()


def test_maps_of_any_number_of_channels_equal_plain_autograd(channels: int) -> None:
    images, net = torch.rand(2, channels, 24, 32), network(channels)
    result = explain(net, Comparison.pair(images[:1], images[1:]))
    rows = F.normalize(net(images), dim=1).detach()
    weight = 1 - (rows[0] - rows[1]).abs()
    for index in range(2):
        wanted, _, _ = plain_maps(net, net.last, images[index, None], weight)
        torch.testing.assert_close(result.maps[0, index], wanted, rtol=1e-4, atol=1e-7)


def test_match_and_default_layers_take_any_number_of_channels(channels: int) -> None:
    images, net = torch.rand(2, channels, 24, 32), network(channels)
    assert as_similarity_model(net).default_layer == "last"
    result = match(net, images[:1], images[1:])
    assert float(result.residual.abs().max()) < 1e-4
    result.figure()


def test_a_grey_network_reads_pictures_as_grey(tmp_path: Path) -> None:
    picture = noise(40, 60, seed=1)
    model = as_similarity_model(
        network(1), preprocess=Preprocess(size=(40, 60), mean=(0.5,), std=(0.25,))
    )
    tensor, _ = model.preprocess(picture)
    grey = torch.from_numpy(np.asarray(picture.convert("L")) / 255).float()
    torch.testing.assert_close(tensor, ((grey - 0.5) / 0.25)[None], rtol=1e-5, atol=1e-5)
    for name in ("a.png", "b.png"):
        noise(50, 70, seed=len(name) + ord(name[0])).save(tmp_path / name)
    result = explain(model, [tmp_path / "a.png", tmp_path / "b.png"], arch="siamese")
    shown, _ = result.on_picture(0)
    assert (shown[..., 0] == shown[..., 2]).all()
    result.save(tmp_path / "out")
    again = Explanation.load(tmp_path / "out")
    assert torch.equal(again.images, result.images)
    again.figure()


@pytest.mark.parametrize("kind", ["npy", "npz", "first", "tif"])
def test_files_of_many_bands_are_read_explained_indexed_and_searched(
    kind: str, tmp_path: Path
) -> None:
    folder = tmp_path / "gallery"
    folder.mkdir()
    paths = []
    for seed in range(3):
        values = bands(5, seed)
        path = folder / f"{seed}.{'npy' if kind == 'first' else kind}"
        if kind == "npz":
            np.savez(path, values)
        elif kind == "tif":
            tifffile = pytest.importorskip("tifffile")
            tifffile.imwrite(path, values, photometric="minisblack", planarconfig="contig")
        else:
            np.save(path, np.moveaxis(values, -1, 0) if kind == "first" else values)
        paths.append(path)
    prepare = Preprocess(
        size=(40, 60),
        mean=(0.5, 500, 1000, 1500, 2000),
        std=(1, 400, 800, 1200, 1600),
        shown=(4, 2, 0),
    )
    model = as_similarity_model(network(5), preprocess=prepare)
    tensor, geometry = prepare(read_picture(paths[0]).pixels)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (prepare.mean, prepare.std))
    wanted = (torch.from_numpy(bands(5, 0)).movedim(-1, 0) - mean) / std
    torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-5)
    assert geometry.original == (40, 60)
    result = explain(model, paths, arch="triplet")
    result.save(tmp_path / "out")
    torch.testing.assert_close(Explanation.load(tmp_path / "out").images, result.images)
    if kind == "npy":
        index = build_index(model, folder, tmp_path / "index.safetensors")
        hits = search(model, paths[1], index, k=1)
        with torch.no_grad():
            rows = model(prepared(prepare, [read_picture(path) for path in paths])[0])
        nearest = max((0, 2), key=lambda position: float(rows[1] @ rows[position]))
        assert Path(hits.hits[0].path).name == f"{nearest}.npy"  # the query itself is never a hit


def test_figures_draw_bands_by_a_stated_mapping() -> None:
    values = np.stack([np.full((8, 8), level) for level in range(5)], axis=-1).astype(np.float32)
    values[:4] *= 2
    values[..., 3] = values[::-1, :, 3]
    drawn = as_rgb(values, (4, 3, 0))
    assert drawn[0, 0].tolist() == [255, 0, 0]
    assert drawn[-1, 0].tolist() == [0, 255, 0]
    assert as_rgb(np.full((2, 2, 1), 0.5, np.float32))[0, 0].tolist() == [128, 128, 128]


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    noise(40, 60).save(tmp_path / "rgb.png")
    np.save(tmp_path / "five.npy", bands(5, 0))
    np.save(tmp_path / "odd.npy", np.zeros((2, 3, 4, 5)))
    np.save(tmp_path / "nan.npy", np.full((4, 4), np.nan))
    (tmp_path / "bad.npy").write_bytes(b"no array")
    five = as_similarity_model(network(5))
    three = as_similarity_model(network(3))
    for model, name, record in (
        (five, "rgb.png", "5 channels as the network takes, got 3"),
        (three, "five.npy", "3 channels as the network takes, got 5"),
        (five, "odd.npy", r"\(2, 3, 4, 5\)"),
        (five, "nan.npy", "not finite"),
        (five, "bad.npy", "cannot be read as bands"),
        (five, "none.npy", "no file"),
    ):
        with pytest.raises(ImageError, match=record) as caught:
            explain(model, [tmp_path / name] * 2, arch="siamese")
        assert str(caught.value).endswith(".")
    with pytest.raises(ImageError, match="as many values in mean as in std"):
        Preprocess(mean=(0.5,))
    with pytest.raises(ImageError, match="three of the channels"):
        Preprocess(shown=(0, 1, 7))


def test_padding_and_cropping_bands_places_them_as_for_rgb() -> None:
    """The same values as three bands and as RGB give the same view up to 8-bit rounding."""
    picture = noise(40, 60, seed=2)
    values = (np.asarray(picture) / 255).astype(np.float32)
    for fit in ("pad", "crop", "squash"):
        prepare = Preprocess(size=(32, 32), fit=fit, mean=(0.5,) * 3, std=(0.5,) * 3)
        wanted, geometry = prepare(picture)
        result, same = prepare(values)
        assert geometry == same
        torch.testing.assert_close(result, wanted, rtol=0, atol=0.012)


def test_values_assumed_for_other_channels() -> None:

    assert Preprocess().for_channels(3) == Preprocess()
    assert Preprocess().for_channels(1).mean == (pytest.approx(0.449, abs=1e-3),)


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_exported_grey_networks_are_read_explained_and_keep_their_channels(
    kind: str, tmp_path: Path
) -> None:
    path, net, images = tmp_path / f"grey.{kind}", network(1), torch.rand(2, 1, 24, 32)
    if kind == "pt2":
        torch.export.save(torch.export.export(net, (images,)), path)
    else:
        pytest.importorskip("onnxruntime")
        torch.onnx.export(net, (images,), path, dynamo=False)
    model = load_model(path)
    assert model.preprocess.channels == 1
    result = explain(model, Comparison.pair(images[:1], images[1:]), "sbsm")
    wanted = explain(net, Comparison.pair(images[:1], images[1:]), "sbsm")
    torch.testing.assert_close(result.maps, wanted.maps, rtol=1e-3, atol=1e-5)
