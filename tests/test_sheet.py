"""The page of every figure: text keeps to its cell, cells keep apart, bytes are reproducible."""

from __future__ import annotations

import io
import itertools

import matplotlib
import numpy as np
import pytest
from figures import assert_tidy, texts_of, written
from matplotlib.figure import Figure
from pictures import noise
from PIL import Image

from simexplain.rendering.lettering import DOTS, breadth, shortened, wrapped
from simexplain.rendering.overlay import overlay, signed_overlay
from simexplain.rendering.sheet import (
    EDGE,
    SMALL,
    Bar,
    Cell,
    Grid,
    Row,
    Sheet,
    Words,
    page,
    png_of,
)

NAMES = (
    "a.png", "W" * 90, "i" * 300, "a-long-name " * 20, "имя файла с пробелами и $деньгами$.png",
    "猫の写真とカップ_二千二十六年.png" * 3, "صورة قطة.png", "b\udcff\udcfe\n$x_{1}$.png",
    r"$\frac{1}{$ 50% <b>_^{} $x$" * 4, "e\u0301" * 50, "🐈" * 40, "\u202eevil\x1b[31m", " ", "",
)  # fmt: skip
SHAPES = ((60, 60), (20, 200), (200, 20), (1, 1), (1, 300), (300, 1))


def pixels(figure: Figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png_of(figure))).convert("RGB")).astype(int)


def picture(shape: tuple[int, int] = (60, 60), seed: int = 0) -> np.ndarray:
    return np.array(noise(*shape, seed=seed))


@pytest.mark.parametrize("weight", ["normal", "bold"])
@pytest.mark.parametrize("size", [6.5, 8.0, 11.0, 24.0])
def test_text_is_never_broader_than_measured(size: float, weight: str) -> None:
    sheet = Sheet(60, 2)
    for name in ("Quick brown fox 0123", "WAVE.jpg", "mm" * 20, "il.|" * 15, "ЖШ" * 9, "猫猫"):
        text = sheet.say(0.1, 1, name, size=size, weight=weight)
        with np.errstate(all="ignore"):
            png_of(sheet.figure)
        drawn = text.get_window_extent().width / DOTS
        assert 0.9 * breadth(name, size, weight) - 0.05 <= drawn <= breadth(name, size, weight)


@pytest.mark.parametrize("most", [0.3, 1.0, 2.75])
def test_what_is_shortened_or_wrapped_fits(most: float) -> None:
    for name, size in itertools.product(NAMES, (6.5, 8.0, 13.0)):
        assert breadth(shortened(name, most, size), size) <= most
        for lines in (1, 3, None):
            result = wrapped(name, most, size, lines=lines)
            assert lines is None or len(result) <= lines
            assert all(breadth(line, size) <= most for line in result)


def test_wrapping_loses_nothing_and_shortening_keeps_both_ends() -> None:
    text = "one two " * 30 + "x" * 200
    assert "".join(wrapped(text, 1.5, 8)).replace(" ", "") == text.replace(" ", "")
    result = shortened("beginning" + "-" * 99 + "end.jpg", 1.5, 8)
    assert result.startswith("begin")
    assert result.endswith("d.jpg")
    assert result.count("…") == 1


@pytest.mark.parametrize("align", ["left", "center", "right"])
@pytest.mark.parametrize("size", [6.5, SMALL, 13.0])
def test_text_keeps_to_its_cell(align: str, size: float) -> None:
    widths = [0.5, 2.75]
    for name in NAMES:
        words = Words(name, size=size, align=align, lines=2)
        cells = [
            Cell(picture(), (words,), (words, words)),
            Cell(inside=(words,), above=(words,), frame="#222222"),
        ]
        figure = page([Grid([Row(cells), Row(cells[::-1])], widths)], title="t").figure
        assert_tidy(figure)
        limits = [(EDGE, EDGE + 0.5), (EDGE + 0.58, EDGE + 3.33)]
        for text in texts_of(figure):
            if text.get_gid() != "head":
                box = text.get_window_extent()
                left, right = box.x0 / DOTS, box.x1 / DOTS
                assert any(a - 0.01 <= left <= right <= b + 0.01 for a, b in limits), name


def test_an_aside_and_its_text_stay_apart() -> None:
    for name in NAMES:
        words = Words(name, size=10, weight="bold", align="left", aside="d 0.123")
        figure = page([Grid([Row([Cell(picture(), (words,))])], [1.9])], title="t").figure
        assert_tidy(figure)
        assert "d 0.123" in written(figure, "above")


@pytest.mark.parametrize("seed", range(6))
def test_cells_keep_apart_whatever_is_in_them(seed: int) -> None:
    random = np.random.default_rng(seed)

    def words(most: int = 3) -> tuple[Words, ...]:
        names = [NAMES[random.integers(len(NAMES))] for _ in range(random.integers(most))]
        return tuple(Words(n, size=float(random.uniform(6.5, 12)), lines=2) for n in names)

    def cell() -> Cell | None:
        kind = random.integers(4)
        if kind == 0:
            return None
        if kind == 1:
            return Cell(inside=words(), above=words(), below=words(), frame="#222222")
        shape = SHAPES[random.integers(len(SHAPES))]
        if kind == 2:
            return Cell(picture(shape), above=words(), below=words(), peak=(0.0, 0.0))
        return Cell(picture(shape), beside=(Words("ab " * 20, align="left", lines=2),))

    grids = []
    for bar in (None, Bar("share of the maximum " * 4, signed=True)):
        widths = list(random.uniform(1.2, 2.5, 3))
        rows = [Row([cell() for _ in range(3)], words(2)[0] if words(2) and seed % 2 else None,
                    tallest=0.9) for _ in range(3)] if seed % 2 == 0 else [
            Row([cell() for _ in range(3)], Words("a heading " * 9, lines=2), tallest=0.9)
            for _ in range(3)
        ]  # fmt: skip
        rows = [Row([Cell(picture())] * 3), *rows]
        grids.append(Grid(rows, widths, bar=bar))
    long = "words of any length " * 40
    figure = page(
        grids, title=NAMES[seed], verdict=NAMES[-seed], legend=long, footer=f"a\n{long}",
        notes=(long, "n" * 500),
    ).figure  # fmt: skip
    assert_tidy(figure)


def test_bytes_are_the_same_again_and_under_other_settings() -> None:
    def drawn() -> bytes:
        cell = Cell(
            picture(), (Words("name"),), seen=(9, 9, 50, 50), region=(20, 20, 30, 30),
            peak=(5.0, 5.0), ring=((9.0, 9.0), "#e69f00"), spots=((1.0, 2.0),), tag="tag",
        )  # fmt: skip
        sheet = page([Grid([Row([cell, cell])], [2.0, 2.0], bar=Bar("share"))], title="t")
        sheet.connect(sheet.figure.axes[:2], [((1.0, 1.0), (2.0, 2.0))])
        return png_of(sheet.figure)

    first = drawn()
    assert first == drawn()
    changed = {"font.family": "serif", "text.usetex": False, "figure.dpi": 50, "axes.grid": True}
    with matplotlib.rc_context(changed):
        assert first == drawn()


def test_what_was_not_seen_is_hatched_and_the_rest_left_alone() -> None:
    grey = np.full((200, 100, 3), 90, np.uint8)
    plain = pixels(page([Grid([Row([Cell(grey)])], [2.0])], title="t").figure)
    cell = Cell(grey, seen=(0, 50, 100, 150))
    sheet = page([Grid([Row([cell])], [2.0])], title="t")
    changed = np.abs(pixels(sheet.figure) - plain).sum(axis=2) > 30
    box = sheet.figure.axes[0].get_window_extent()
    top, left = round(sheet.figure.bbox.height - box.y1), round(box.x0)
    share = changed[top : top + round(box.height), left : left + round(box.width)]
    high = len(share)
    assert share[: high // 4 - 3].mean() > 0.9
    assert share[-high // 4 + 3 :].mean() > 0.9
    assert not share[high // 4 + 4 : -high // 4 - 4, 4:-4].any()
    whole = page([Grid([Row([Cell(grey, seen=(-20, 0, 130, 200))])], [2.0])], title="t").figure
    assert np.array_equal(pixels(whole), plain)


def test_signed_heat_is_that_of_the_overlay_where_it_is_positive() -> None:
    shown, heat = picture((40, 60)), np.random.default_rng(0).random((40, 60), np.float32)
    assert np.array_equal(signed_overlay(shown, heat), overlay(shown, heat))
    grey = np.full((4, 4, 3), 80, np.uint8)
    warm, cold = (signed_overlay(grey, np.full((4, 4), v, np.float32))[0, 0] for v in (0.6, -0.6))
    assert np.array_equal(warm, cold[::-1])
    assert warm[0] > warm[2]


def test_a_long_label_of_a_scale_stays_beside_it() -> None:
    grid = Grid([Row([Cell(picture())])], [2.0], bar=Bar("a long label of what full heat is " * 3))
    assert_tidy(page([grid], title="t").figure)
