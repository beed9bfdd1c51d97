"""Tall inputs through all that explains: maps lie where things are, figures stay readable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from avsl_cases import small_avsl
from figures import assert_tidy, texts_of
from pictures import square
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain import SimilarityModel, as_similarity_model, attribute, compare, explain, match
from simexplain.data.preprocessing import Preprocess

# Black is 0, so that the border of ``pad`` is as dark as the pictures' ground.
TALL = Preprocess(size=(384, 128), fit="squash", mean=(0.0,) * 3, std=(1.0,) * 3)
# Between (height, width) of pictures and the centres (x, y) of a white square of 16 pixels.
PICTURES = (
    ((128, 64), (20, 100), (42, 104)),
    ((160, 60), (22, 40), (40, 48)),
    ((300, 100), (35, 210), (66, 220)),
    ((64, 64), (30, 20), (34, 24)),
)


class Stripes(nn.Module):
    """How bright each of six stripes is: nothing else can be said of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 1, 16, stride=16)
        nn.init.constant_(self.body.weight, 1 / (3 * 16 * 16))
        nn.init.zeros_(self.body.bias)
        self.act = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.act(self.body(images)), (6, 1)).flatten(1)


def persons(fit: str = "squash") -> SimilarityModel:
    return as_similarity_model(Stripes().eval(), preprocess=replace(TALL, fit=fit))


def drawn(folder: Path, size: tuple[int, int], *centres: tuple[int, int]) -> list[Path]:
    paths = []
    for number, centre in enumerate(centres):
        paths.append(folder / f"{number}.png")
        square(*size, centre, 16).save(paths[-1])
    return paths


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
@pytest.mark.parametrize(("size", "a", "b"), PICTURES)
def test_the_heat_lies_on_the_square_in_the_picture_as_it_was(
    tmp_path: Path, size: tuple[int, int], a: tuple[int, int], b: tuple[int, int], fit: str
) -> None:
    model, paths = persons(fit), drawn(tmp_path, size, a, b)
    result = explain(model, paths, "decomposition", arch="siamese")
    assert result.images.shape[-2:] == (384, 128)
    assert result.maps.shape[-2:] == (24, 8)
    for index, centre in enumerate((a, b)):
        picture, heat = result.on_picture(index)
        assert picture.shape == (*size, 3)
        assert heat.shape == size
        rows, columns = np.indices(size) + 0.5
        middle = (heat * columns).sum() / heat.sum(), (heat * rows).sum() / heat.sum()
        # A cell is as large as 16 pixels of the input.
        scale = result.geometries[index].scale
        cell = 16 / scale[1], 16 / scale[0]
        for actual, wanted, width in zip(middle, centre, cell, strict=True):
            assert abs(actual - wanted) <= 2 + 0.5 * width
        x, y = result.peaks()[index] or (-1, -1)
        assert abs(x - centre[0]) <= 8 + cell[0]
        assert abs(y - centre[1]) <= 8 + cell[1]
    matched = match(model, *paths)
    best = matched.best(*a)
    assert abs(best.b[0] - b[0]) <= 8 + 0.5 * cell[0]
    assert abs(best.b[1] - b[1]) <= 8 + 0.5 * cell[1]
    assert float(matched.residual.abs().max()) < 1e-5


@pytest.mark.parametrize("method", ["sam", "focus", "saliency"])
def test_every_kind_of_method_takes_tall_pictures(tmp_path: Path, method: str) -> None:
    paths = drawn(tmp_path, (128, 64), (20, 100), (42, 104), (30, 30))
    result = explain(persons(), paths, method, arch="triplet")
    for index in range(3):
        assert result.on_picture(index)[1].shape == (128, 64)
    result.save(tmp_path / "out")
    with Image.open(tmp_path / "out" / "heatmap_0_anchor.png") as saved:
        assert saved.size == (64, 128)


def test_avsl_takes_tall_pictures(tmp_path: Path) -> None:
    model = small_avsl().float()
    model.preprocess = replace(TALL, size=(96, 32))
    paths = drawn(tmp_path, (128, 64), (20, 100), (42, 104))
    result = attribute(model, paths[0], paths[1:])
    assert float(result.residual.abs().max()) < 1e-4
    maps = result.maps(-1, 0)
    assert maps.shape[-2] == 3 * maps.shape[-1]
    files = result.save(tmp_path / "out")
    for name in ("ranking", "graph"):
        with Image.open(files[name]) as figure:
            assert max(figure.size) < 4 * min(figure.size)


def test_methods_are_compared_on_tall_pictures(tmp_path: Path) -> None:
    paths = drawn(tmp_path, (128, 64), (20, 100), (42, 104), (30, 30))
    result = compare(persons(), paths, ["focus", "decomposition"], arch="triplet", curve_steps=4)
    files = result.save(tmp_path / "out")
    with Image.open(files["figure"]) as figure:
        assert figure.width > 600


@pytest.mark.parametrize("size", [(40, 60), (60, 60), (128, 64), (300, 60)])
def test_the_lines_over_a_picture_stay_apart(tmp_path: Path, size: tuple[int, int]) -> None:
    """A name that stands a share of the height above a tall picture would run into its role."""
    paths = drawn(tmp_path, size, (20, 20), (30, 20))
    figure = explain(persons(), paths, "decomposition", arch="siamese").figure()
    assert_tidy(figure)
    texts = [text for text in texts_of(figure) if text.get_gid() == "above"]
    assert [text.get_text() for text in texts[1::2]] == [path.name for path in paths]
    tops = [axes.get_window_extent().y1 for axes in figure.axes if axes.images]
    for title, caption, top in zip(texts[::2], texts[1::2], tops, strict=False):
        box = caption.get_window_extent()
        assert box.y0 >= top
        # A line's letters have room under the line above.
        letters = title.get_size() * figure.dpi / 72
        assert box.y1 <= title.get_window_extent().y1 - 0.9 * letters
