"""Pictures of heat: sizes kept, heat where it belongs, no global state, nothing unescaped."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from avsl_cases import small_avsl
from conftest import TinyNet
from figures import assert_tidy, written
from pictures import noise
from PIL import Image

from simexplain import Comparison, Explanation, as_similarity_model, explain
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ComparisonError
from simexplain.explanation import heat_of
from simexplain.picturing import footer, full_heat
from simexplain.rendering.overlay import (
    CONTOUR_LEVELS,
    RENDERERS,
    contour,
    overlay,
    robust,
    spotlight,
)
from simexplain.rendering.sheet import Cell, Grid, Row, Words, page

SHAPES = [(40, 60), (1, 1), (1, 500), (500, 1), (3, 7), (257, 5), (600, 40)]


def explained(count: int, batch: int = 1, **options: object) -> Explanation:
    torch.manual_seed(1)
    model = as_similarity_model(TinyNet().eval(), preprocess=Preprocess((24, 32)), name="tiny")
    stack = torch.randn(batch, count, 3, 24, 32)
    return explain(model, Comparison(stack[:, 0], stack[:, 1:2], stack[:, 2:]), **options)


def disc(size: int = 101, radius: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Heat of one inside a disc, and the distance of every pixel from its centre."""
    rows, columns = np.indices((size, size)) - size // 2
    distance = np.hypot(rows, columns)
    return (distance <= radius).astype(np.float32), distance


@pytest.mark.parametrize("name", RENDERERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_size_type_and_input_are_kept(name: str, shape: tuple[int, int]) -> None:
    picture = np.array(noise(*shape))
    heat = np.random.default_rng(1).random(shape, dtype=np.float32)
    before = picture.copy(), heat.copy()
    drawn = RENDERERS[name](picture, heat)
    assert drawn.shape == (*shape, 3)
    assert drawn.dtype == np.uint8
    assert drawn is not picture
    assert np.array_equal(picture, before[0])
    assert np.array_equal(heat, before[1])


@pytest.mark.parametrize("name", RENDERERS)
def test_read_only_picture_is_accepted(name: str) -> None:
    picture = np.asarray(noise(9, 9))
    assert not picture.flags.writeable
    assert RENDERERS[name](picture, np.ones((9, 9), np.float32)).shape == (9, 9, 3)


def test_no_heat() -> None:
    picture, zero = np.array(noise(40, 60)), np.zeros((40, 60), np.float32)
    assert np.array_equal(contour(picture, zero), picture)
    assert np.abs(spotlight(picture, zero) - picture * 0.14).max() <= 1
    # Without heat the overlay is the picture with some grey, and brightness stays.
    grey = picture @ np.array([0.299, 0.587, 0.114])
    expected = 0.6 * picture + 0.4 * grey[..., None]
    assert np.abs(overlay(picture, zero) - expected).max() <= 2


def test_full_heat() -> None:
    picture, one = np.array(noise(40, 60)), np.ones((40, 60), np.float32)
    assert np.array_equal(spotlight(picture, one), picture)
    assert np.array_equal(contour(picture, one)[20, 30], picture[20, 30])


def test_overlay_differs_most_where_it_is_hottest() -> None:
    rows, columns = np.indices((50, 70))
    heat = np.exp(-((rows - 30) ** 2 + (columns - 20) ** 2) / 200).astype(np.float32)
    picture = np.full((50, 70, 3), 60, np.uint8)
    change = np.abs(overlay(picture, heat).astype(int) - picture).sum(axis=2)
    # Colours are steps of whole numbers, so the very top is a small plateau.
    assert change[30, 20] >= change.max() - 3
    rows, columns = (change >= change.max() - 3).nonzero()
    assert np.hypot(rows - 30, columns - 20).max() < 4
    assert change[30, 20] > 2 * change[30, 50]
    lit = spotlight(picture, heat).sum(axis=2)
    assert lit[30, 20] == lit.max()
    assert lit[30, 50] < 0.5 * lit.max()


def test_overlay_gets_brighter_with_heat() -> None:
    """Inferno is monotonous in lightness, so a ramp of heat on black never gets darker."""
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None]
    drawn = overlay(np.zeros((1, 256, 3), np.uint8), ramp)
    luminance = drawn[0] @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luminance) > -1).all()
    assert luminance[-1] > luminance[128] > luminance[32]


def test_values_outside_the_range_are_cut_off() -> None:
    picture = np.array(noise(8, 8))
    for render in RENDERERS.values():
        wild = np.linspace(-3, 4, 64, dtype=np.float32).reshape(8, 8)
        assert np.array_equal(render(picture, wild), render(picture, wild.clip(0, 1)))


def test_strips_leave_no_seams() -> None:
    picture = np.full((1000, 30, 3), 90, np.uint8)
    heat = np.full((1000, 30), 0.4, np.float32)
    for render in (overlay, spotlight):
        assert len(np.unique(render(picture, heat).reshape(-1, 3), axis=0)) == 1


def test_contour_encloses_the_heat() -> None:
    heat, distance = disc()
    picture = np.full((101, 101, 3), 128, np.uint8)
    drawn = (contour(picture, heat) != picture).any(axis=2)
    assert drawn.any()
    assert distance[drawn].min() > 25
    assert distance[drawn].max() < 35
    # The line is closed: it is met in every direction from the centre.
    angles = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    for angle in angles:
        steps = np.arange(50)
        rows = np.round(50 + steps * np.sin(angle)).astype(int)
        columns = np.round(50 + steps * np.cos(angle)).astype(int)
        assert drawn[rows, columns].any(), angle


def test_contours_lie_at_their_levels() -> None:
    _, distance = disc()
    heat = (1 - distance / distance.max()).clip(0).astype(np.float32)
    picture = np.full((101, 101, 3), 128, np.uint8)
    row = (contour(picture, heat)[50] != 128).any(axis=1).nonzero()[0]
    for level in CONTOUR_LEVELS:
        radius = (1 - level) * distance.max()
        if radius < 50:
            assert np.abs(row - (50 + radius)).min() <= 3


def test_contour_around_a_single_pixel_is_seen() -> None:
    heat = np.zeros((60, 60), np.float32)
    heat[30, 30] = 1
    picture = np.full((60, 60, 3), 128, np.uint8)
    changed = (contour(picture, heat) != 128).any(axis=2).nonzero()
    assert len(changed[0]) > 0
    assert np.abs(np.stack(changed) - 30).max() <= 4


def pixels_of(figure: object, dpi: int | str = "figure") -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return np.asarray(Image.open(buffer).convert("RGB"))


@pytest.mark.parametrize("count", range(2, 8))
@pytest.mark.parametrize("styles", [("overlay",), ("contour", "spotlight"), tuple(RENDERERS)])
def test_figure_of_any_number_of_images(count: int, styles: tuple[str, ...]) -> None:
    result = explained(count)
    figure = result.figure(styles=styles)
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == count * (1 + len(result.rows) * len(styles))
    record = " ".join(written(figure, "above"))
    for role in ("anchor", "positive", "negative"):
        assert record.count(role) == result.roles.count(role)
    for distance in result.distances[0].tolist():
        assert f"{distance:.3f}" in record
    everything = " ".join(text.get_text() for text in figure.texts)
    assert "tiny" in everything
    assert result.layer in everything
    assert result.condition().text in everything or count == 2
    assert_tidy(figure)
    boxes = [axes.get_position() for axes in shown]
    for number, a in enumerate(boxes):
        assert min(a.x0, a.y0) >= 0
        assert max(a.x1, a.y1) <= 1
        assert not any(a.overlaps(b) and a.shrunk(0.98, 0.98).overlaps(b) for b in boxes[:number])
    assert pixels_of(figure, 50).std() > 10


@pytest.mark.parametrize("shape", SHAPES)
def test_figure_of_odd_shapes(shape: tuple[int, int]) -> None:
    drawn = contour(np.array(noise(*shape)), np.ones(shape, np.float32))
    cells = [Cell(drawn, (Words(record),), peak=(0.0, 0.0)) for record in ("anchor", "positive")]
    figure = page([Grid([Row(cells, tallest=4.4)], [2.75] * 2)], title="t", footer="f").figure
    height, width = pixels_of(figure).shape[:2]
    assert 100 < height < 3000
    assert 100 < width < 3000
    assert_tidy(figure)


def test_strings_that_look_like_formulas_are_shown_as_they_are() -> None:
    odd = r"$\frac{1}{$ 50% <b>_^{} $x$"
    cell = Cell(np.array(noise(9, 9)), (Words(odd),), (Words(odd),), tag=odd)
    grid = Grid([Row([cell, Cell(inside=(Words(odd),))], Words(odd))], [2.75] * 2)
    figure = page([grid], title=odd, verdict=odd, legend=odd, footer=odd, notes=(odd,)).figure
    pixels_of(figure)
    assert sum(odd in text for text in written(figure)) == 10


def test_bad_arguments() -> None:
    result = explained(3, batch=2)
    for index in (2, -3):
        with pytest.raises(ComparisonError, match="below 2"):
            result.figure(index)
    with pytest.raises(ComparisonError, match="glow"):
        result.figure(styles=("glow",))
    with pytest.raises(ComparisonError, match="scale"):
        replace(result, scale="none")


def test_robust_heat_is_not_blinded_by_single_pixels() -> None:
    random = np.random.default_rng(0)
    heat = random.uniform(0, 0.02, (2, 120, 160)).astype(np.float32)
    heat[0, 40:80, 40:80] += 0.05  # what there is to see
    heat[0, 5, 5] = 1
    assert heat[0, 40:80, 40:80].mean() < 0.07
    drawn = robust(heat)
    assert drawn.dtype == np.float32
    assert drawn[0, 45:75, 45:75].min() > 0.7
    assert drawn[0, 90:, 90:].max() < 0.35
    assert drawn.min() >= 0
    assert drawn.max() == 1
    assert (drawn[1] == 1).mean() == pytest.approx(0.005, abs=0.001)
    shared = robust(heat, shared=True)
    assert shared[1].max() < 0.5  # on the scale of the first
    assert not robust(np.zeros((1, 8, 8), np.float32)).any()
    single = np.zeros((1, 300, 300), np.float32)
    single[0, 7, 9] = 1
    assert robust(single).max() == 1
    assert robust(single)[0, 200:].max() == 0


def test_the_figure_of_focus_shows_its_square_root() -> None:
    result = explained(3, method="focus")
    np.testing.assert_allclose(heat_of(result, 0) ** 2, result.heatmaps_at(0).numpy(), atol=1e-6)
    assert "heat drawn by its square root" in footer(result)
    assert result.on_picture(0, raw=True)[1].sum() < result.on_picture(0)[1].sum()


def test_maps_on_pixels_are_drawn_robustly_and_kept_as_they_are() -> None:
    result, plain = explained(3, method="saliency"), explained(3)
    drawn = heat_of(result, 0)
    np.testing.assert_allclose(drawn, robust(result.heatmaps_at(0).numpy()))
    assert drawn.mean() > result.heatmaps.mean()
    assert result.heatmaps.amax(dim=(2, 3)).eq(1).all()
    np.testing.assert_array_equal(heat_of(plain, 0), plain.heatmaps_at(0).numpy())
    assert "heat smoothed, full at its 99.5th percentile" in footer(result)
    assert "layer" not in footer(result)
    assert "heat" not in footer(plain)
    assert "layer last" in footer(plain)
    assert legend_of(result) == "evidence, share of the 99.5th percentile"
    assert legend_of(plain) == "evidence, share of the maximum"
    assert full_heat([plain, result]) == "the maximum (on pixels, the 99.5th percentile)"


def legend_of(result: Explanation) -> str:
    (actual,) = {axes.get_ylabel() for axes in result.figure().axes if not axes.images} - {""}
    return actual


def test_levels_that_are_added_are_not_called_a_product() -> None:
    images = torch.rand(3, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    triplet = Comparison.triplet(*images[:, None])
    figure = explain(small_avsl().float(), triplet, "avsl").figure(by_layer=True)
    assert written(figure, "heading") == ["sum", "stage1", "stage2", "stage3"]
    assert any("layer stage1 + stage2 + stage3" in text.get_text() for text in figure.texts)


class _Images(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_jupyter_shows_an_image() -> None:
    parser = _Images()
    parser.feed(replace(explained(3), method='"><script>alert(1)</script>')._repr_html_())
    ((tag, attributes),) = parser.found
    assert tag == "img"
    assert attributes["alt"].startswith('"><script>alert(1)</script> of a triplet')
    kind, _, data = attributes["src"].partition(",")
    assert kind == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data, validate=True))).format == "PNG"


def test_jupyter_shows_the_first_of_many() -> None:
    text = explained(2, batch=6)._repr_html_()
    assert len(re.findall("<img ", text)) == 4
    assert "2 more" in text


def test_a_notebook_shows_a_figure_by_itself() -> None:
    figure = explained(3).figure()
    with Image.open(io.BytesIO(figure._repr_png_())) as drawn:
        assert drawn.format == "PNG"
