"""Figures of an attribution: everything in its place, to scale, and as it was written."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace

import numpy as np
import pytest
from figures import assert_tidy, texts_of
from matplotlib.figure import Figure
from matplotlib.text import Text
from pictures import noise
from PIL import Image

from simexplain.rendering.graph import Branch, LevelShare, NodeCard, StandIn, attribution_graph
from simexplain.rendering.lettering import number
from simexplain.rendering.ranking import PairRanking, node_ranking
from simexplain.rendering.sheet import ROLE_COLOURS, SMALL, png_of

ODD = r"$\frac{1}{$ 50% <b>_^{} $x$ имя"
SQUARE = ((60, 60), (60, 60))
SHAPES = [SQUARE, ((45, 80), (80, 45)), ((4, 200), (200, 4)), ((1, 1), (1, 300))]


def pixels(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.array(noise(*shape, seed=seed))


def card(level: int, node: int, shapes=SQUARE, value: float = 0.0123) -> NodeCard:
    overlays = (pixels(shapes[0], node), pixels(shapes[1], node + 1))
    return NodeCard(level, node, overlays, value, 0.31 if level else 1.0, 0.5, 0.5 * value)


def branch_from(level: int, node: int = 9, shapes=SQUARE, scale: float = 1.0) -> Branch:
    """A chain from a level down to the lowest, whose second stand-in is always taken apart."""
    parts = (0.004, 0.003, 0.0005)
    stand_ins = tuple(
        StandIn(card(level - 1, 20 + at, shapes, 0.01 * scale), 0.1 * (at + 1), part * scale)
        for at, part in enumerate(parts)
    )
    below = branch_from(level - 1, 21, shapes, scale) if level > 1 else None
    return Branch(
        card(level, node, shapes, 0.01 * scale), 0.002 * scale, stand_ins, 0.001 * scale, 12, below
    )


def graph(depth: int = 3, shapes=SQUARE, scale: float = 1.0, **changes: object) -> Figure:
    top = depth - 1
    shares = np.arange(1, depth + 1) / np.arange(1, depth + 1).sum()
    given = {
        "pictures": (pixels(shapes[0]), pixels(shapes[1])),
        "captions": ("first.jpg", "second.jpg"),
        "distance": 0.418 * scale,
        "levels": [
            LevelShare(f"layer{at + 1}", 0.418 * scale * share, float(share), 512)
            for at, share in enumerate(shares)
        ],
        "similar": [card(top, at, shapes, 1e-6 * scale) for at in (1, 2)],
        "dissimilar": [card(top, at, shapes, 0.02 * scale) for at in (3, 4)],
        "branch": branch_from(top, shapes=shapes, scale=scale) if top else None,
        "title": "Which nodes?",
        "footer": "a network",
    }
    return attribution_graph(**{**given, **changes})


def ranked(role: str, n: int = 128, shapes=SQUARE, scale: float = 0.01, **changes) -> PairRanking:
    values = np.sort(np.random.default_rng(n).chisquare(1, n)) * scale
    shown = tuple(sorted({*range(min(4, n)), *range(max(n - 4, 0), n)}))
    cards = tuple(card(2, at, shapes, float(values[at])) for at in shown)
    given = PairRanking(f"anchor and {role}", role, 0.4, values, shown, cards)
    return replace(given, **changes)


def ranking(*pairs: PairRanking, **changes: object) -> Figure:
    return node_ranking(pairs, **{"title": "Ranked nodes", "footer": "a network", **changes})


def said(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


def named(figure: Figure, gid: str) -> list:
    return [artist for artist in figure.findobj() if artist.get_gid() == gid]


def pictures_of(figure: Figure) -> list:
    return [axes for axes in figure.axes if axes.images]


def box_of(artist: object) -> object:
    """In pixels of the figure; a line's or a frame's without the width of its stroke."""
    return artist.get_path().get_extents(artist.get_transform())


@pytest.mark.parametrize(
    ("levels", "shapes"), [(1, SQUARE), (2, SQUARE), (4, SQUARE), *((3, odd) for odd in SHAPES)]
)
def test_graph_of_any_depth_and_shape(levels: int, shapes: tuple) -> None:
    figure = graph(levels, shapes)
    assert_tidy(figure)
    # Two pictures, four framed nodes, and for each level above the lowest three stand-ins.
    nodes = 4 + (1 if levels > 1 else 0) + 3 * (levels - 1)
    assert len(pictures_of(figure)) == 2 + 2 * nodes
    assert len(named(figure, "share")) == levels
    assert len(named(figure, "unreliable")) == levels - 1
    assert len(named(figure, "others")) == levels - 1


@pytest.mark.parametrize("scale", [0.0, 2.4e-6, 30.0])
def test_graph_of_any_distance(scale: float) -> None:
    figure = graph(3, scale=scale)
    assert_tidy(figure)
    assert number(0.418 * scale) in said(figure)


def test_pictures_keep_their_shapes() -> None:
    shapes = ((45, 80), (80, 45))
    for figure in (graph(3, shapes), ranking(ranked("negative", shapes=shapes))):
        for axes in pictures_of(figure):
            height, width = axes.images[0].get_array().shape[:2]
            box = axes.get_window_extent()
            assert box.width / box.height == pytest.approx(width / height, rel=0.02)


def test_each_level_has_a_band_and_its_cards_lie_in_it() -> None:
    figure = graph(3)
    tracks = [box_of(track) for track in named(figure, "track")]
    heights = [(box.y0 + box.y1) / 2 for box in tracks]
    assert heights == sorted(heights, reverse=True)
    layers = [text for text in texts_of(figure) if text.get_text().startswith("layer")]
    assert [text.get_text() for text in layers] == ["layer3", "layer2", "layer1"]
    for kind, count in (("similar", 1), ("dissimilar", 1), ("unreliable", 2), ("stand-in", 5)):
        frames = named(figure, kind)
        assert len(frames) == count
        for frame in frames:
            box = box_of(frame)
            inside = [y for y in heights if box.y0 < y < box.y1]
            assert len(inside) == 1
    (similar,), (dissimilar,) = named(figure, "similar"), named(figure, "dissimilar")
    assert box_of(similar).y1 == pytest.approx(box_of(dissimilar).y1)
    assert box_of(similar).x1 < box_of(dissimilar).x0
    assert similar.get_edgecolor() != dissimilar.get_edgecolor()


def test_cards_are_drawn_in_the_band_of_their_level() -> None:
    figure = graph(3, similar=[card(2, 1), card(0, 5)])
    assert_tidy(figure)
    bands = [box_of(track) for track in named(figure, "track")]
    places = sorted(box_of(frame).y0 for frame in named(figure, "similar"))
    assert len(places) == 2
    assert places[0] < bands[-1].y0 < bands[1].y0 < places[1]


def test_shares_are_drawn_to_scale() -> None:
    figure = graph(4)
    bars = [box_of(bar).width for bar in named(figure, "share")]
    tracks = [box_of(track).width for track in named(figure, "track")]
    shares = np.array([4, 3, 2, 1]) / 10
    assert np.array(bars) / tracks == pytest.approx(shares, abs=0.001)
    for share in shares:
        assert f"{100 * share:.1f} %" in said(figure)
    empty = graph(1, levels=[LevelShare("a", 0.0, 0.0, 3)])
    assert [box_of(bar).width for bar in named(empty, "share")] == [0]


def test_edges_are_as_wide_as_what_passes() -> None:
    figure = graph(2)
    edges = [
        (edge.get_path().vertices[-1][0], edge.get_linewidth()) for edge in named(figure, "edge")
    ]
    assert len(edges) == 3 + 4
    below = [width for _, width in edges[3:]]
    assert [x for x, _ in edges[3:]] == sorted(x for x, _ in edges[3:])
    # 0.004, 0.003, 0.0005 and 0.001 for all others, from left to right.
    assert np.array(below) / below[0] == pytest.approx([1, 0.75, 0.125, 0.25])
    above = [width for _, width in edges[:3]]
    # Similar nodes add next to nothing, the unreliable one 0.0105, the dissimilar ones 0.02.
    assert above[1] / above[2] == pytest.approx(0.0105 / 0.02)
    assert 0 < above[0] < above[1]


def test_edges_lead_from_the_unreliable_node_to_its_stand_ins() -> None:
    figure = graph(3)
    index = named(figure, "edge")[0].get_transform()
    frames = {
        kind: [box_of(frame) for frame in named(figure, kind)]
        for kind in ("similar", "dissimilar", "unreliable", "stand-in", "others")
    }
    everything = [box for boxes in frames.values() for box in boxes]
    hit = []
    for edge in named(figure, "edge"):
        start, end = index.transform(edge.get_path().vertices[[0, -1]])
        ends = [at for at, box in enumerate(everything) if box.contains(*end)]
        assert len(ends) == 1
        hit += ends
        from_branch = any(
            abs(start[1] - box.y0) < 1 and box.x0 < start[0] < box.x1
            for box in frames["unreliable"]
        )
        assert from_branch or start[1] > max(box.y1 for box in everything)
    assert sorted(hit) == list(range(len(everything)))


def test_edges_cross_no_text() -> None:
    figure = graph(3)
    words = [(text, text.get_window_extent()) for text in texts_of(figure)]
    frames = [
        box_of(frame)
        for kind in ("similar", "dissimilar", "unreliable", "stand-in", "others")
        for frame in named(figure, kind)
    ]
    for edge in named(figure, "edge"):
        path = edge.get_path().interpolated(1).to_polygons(edge.get_transform(), closed_only=False)
        for point in path[0]:
            if any(box.contains(*point) for box in frames):
                continue  # frames are drawn over edges
            for text, box in words:
                assert not box.contains(*point), text.get_text()


def test_graph_says_its_numbers() -> None:
    words = said(graph(2))
    for text in ("0.418", "node 9", "δ 0.01", "p 0.31", "λ 0.5", "adds 0.005", "ω 0.2"):
        assert text in words
    for text in ("passes 0.004", "+ 12 more", "pass 0.001", "in all 0.0105"):
        assert text in words
    assert "itself 19 %" in words
    assert "lower nodes 81 %" in words


def test_graph_without_an_unreliable_node() -> None:
    figure = graph(3, branch=None)
    assert_tidy(figure)
    assert len(named(figure, "edge")) == 2
    assert not named(figure, "unreliable")
    alone = graph(3, branch=None, similar=[], dissimilar=[])
    assert_tidy(alone)
    assert not named(alone, "edge")
    assert len(pictures_of(alone)) == 2


def test_graph_without_other_nodes() -> None:
    figure = graph(2, branch=replace(branch_from(1), others=0, rest=0.0))
    assert_tidy(figure)
    assert not named(figure, "others")
    assert len(named(figure, "edge")) == 3 + 3


def test_a_lower_node_taken_apart_is_reached_from_the_distance() -> None:
    figure = graph(3, similar=[], dissimilar=[], branch=branch_from(1))
    assert_tidy(figure)
    assert len(named(figure, "edge")) == 1 + 4


def test_many_framed_nodes_still_fit() -> None:
    ends = {"similar": [card(2, at) for at in range(4)], "dissimilar": [card(2, 9)]}
    figure = graph(3, **ends)
    shown = [axes.get_window_extent() for axes in pictures_of(figure)]
    assert max(box.x1 for box in shown) < figure.bbox.x1
    for a, b in itertools.combinations(shown, 2):
        assert not a.shrunk(0.98, 0.98).overlaps(b)


@pytest.mark.parametrize(
    ("count", "shapes"), [(1, SQUARE), (3, SQUARE), *((2, odd) for odd in SHAPES)]
)
def test_ranking_of_any_number_of_pairs(count: int, shapes: tuple) -> None:
    roles = ("positive", "negative", "")[:count]
    figure = ranking(*(ranked(role, shapes=shapes) for role in roles))
    assert_tidy(figure)
    assert len(pictures_of(figure)) == 16 * count
    colours = [frame.get_edgecolor() for frame in named(figure, "pair")]
    assert len(set(colours)) == count


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 128])
def test_ranking_of_any_number_of_nodes(n: int) -> None:
    figure = ranking(ranked("positive", n))
    assert_tidy(figure)
    assert len(pictures_of(figure)) == 2 * min(n, 8)
    words = said(figure)
    assert f"rank {n}" in words
    # Only ranks that were left out are stood for by dots.
    assert words.count("···") == (1 if n > 8 else 0)


def test_cards_stand_in_columns_by_rank() -> None:
    pair = ranked("negative")
    shown = pictures_of(ranking(pair))
    for at in range(8):
        above, below = (axes.get_window_extent() for axes in shown[2 * at : 2 * at + 2])
        assert above.x0 == pytest.approx(below.x0)
        assert above.y0 > below.y1
        for axes, overlay in zip(shown[2 * at : 2 * at + 2], pair.cards[at].overlays, strict=True):
            assert np.array_equal(axes.images[0].get_array(), overlay)
    starts = [axes.get_window_extent().x0 for axes in shown[::2]]
    assert starts == sorted(starts)
    steps = np.diff(starts)
    assert steps.argmax() == 3
    assert np.delete(steps, 3).max() < 0.9 * steps[3]


def test_all_pairs_share_one_scale() -> None:
    pairs = ranked("positive", scale=0.01), ranked("negative", n=64, scale=0.05)
    figure = ranking(*pairs)
    curves = [axes for axes in figure.axes if not axes.images]
    assert len(curves) == 2
    assert curves[0].get_ylim() == curves[1].get_ylim()
    assert curves[0].get_xlim() == curves[1].get_xlim()
    assert curves[0].get_ylim()[1] > max(pair.values.max() for pair in pairs)
    assert curves[0].get_xlim()[1] > 128
    for axes, pair in zip(curves, pairs, strict=True):
        drawn = [line.get_ydata() for line in axes.lines]
        assert any(np.array_equal(data, pair.values) for data in drawn)
        marked = next(line for line in axes.lines if line.get_marker() == "o")
        assert (marked.get_xdata() - 1).tolist() == list(pair.shown)
        assert np.array_equal(marked.get_ydata(), pair.values[list(pair.shown)])
        assert marked.get_color() == ROLE_COLOURS[pair.role]


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-6, 12.3])
def test_ranking_of_any_distance(scale: float) -> None:
    figure = ranking(ranked("positive", scale=scale, distance=scale), ranked("negative", scale=0.0))
    assert_tidy(figure)
    assert f"distance {number(scale)}" in said(figure)


def test_equal_values_and_images_with_words() -> None:
    same = np.full(128, 0.5)
    figure = ranking(
        ranked("positive", values=same, images=("query", "a long name of a picture.jpg"))
    )
    assert_tidy(figure)
    assert "query" in said(figure)
    assert any("standard deviation 0" in text for text in said(figure))


def test_text_is_shown_as_it_is() -> None:
    figure = graph(1, captions=(ODD, "b"), title=ODD, footer=ODD, notes=(ODD,))
    assert_tidy(figure)
    assert said(figure).count(ODD) == 2
    # The caption is cut in its middle, since it keeps to its picture.
    assert any(text.startswith("$\\frac{1}{$") and "…" in text for text in said(figure))
    assert any(ODD in text and text.startswith("!") for text in said(figure))
    named_oddly = [LevelShare("$a$.b", 0.1, 1.0, 3)]
    assert "$a$.b" in said(graph(1, levels=named_oddly))
    for text in figure.findobj(Text):
        if "$" in text.get_text():
            assert not text.get_parse_math()
    assert ODD in said(ranking(ranked("positive", label=ODD), title="t", notes=(ODD, "n" * 900)))


def test_long_names_are_shortened_in_the_middle() -> None:
    name = "a" * 150 + "-the-end.jpg"
    layer = "features.denseblock3.denselayer24.conv2"
    levels = [LevelShare(layer, 0.1, 0.5, 512), LevelShare("a" * 90, 0.1, 0.5, 512)]
    figure = graph(
        2, captions=(name, name), title=name * 2, levels=levels, notes=(name, "w " * 500)
    )
    assert_tidy(figure)
    captions = [text for text in said(figure) if text.endswith("end.jpg") and "…" in text]
    assert len(captions) >= 3
    assert "features.denseblock3." in said(figure)
    assert "denselayer24.conv2" in said(figure)
    assert_tidy(ranking(ranked("positive", label=name * 2), title=name * 2, notes=(name * 3,)))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1e-6, "1e-6"), (1.234e-12, "1.23e-12"), (0.0123, "0.0123"), (12.34, "12.3")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text
    assert float(number(value)) == pytest.approx(value, rel=0.005)


def test_nothing_is_smaller_than_can_be_read() -> None:
    for figure in (graph(3), ranking(ranked("positive"))):
        assert min(text.get_fontsize() for text in texts_of(figure)) >= SMALL
        assert 11 <= figure.get_figwidth() <= 13
        assert figure.dpi == 120


def test_inputs_are_left_alone_and_files_are_reproducible() -> None:
    pair = ranked("positive")
    before = pair.values.copy(), pair.cards[0].overlays[0].copy()
    pair.values.setflags(write=False)
    first, second = (png_of(ranking(pair)) for _ in range(2))
    assert first == second
    assert np.array_equal(pair.values, before[0])
    assert np.array_equal(pair.cards[0].overlays[0], before[1])
    assert png_of(graph(3)) == png_of(graph(3))
    with Image.open(io.BytesIO(first)) as drawn:
        assert drawn.width == 1560


def test_a_tight_crop_moves_everything_together() -> None:
    """Notebooks crop figures; frames and texts must stay with the pictures."""
    figure = graph(1)
    whole, tight = io.BytesIO(), io.BytesIO()
    figure.savefig(whole, format="png")
    figure.savefig(tight, format="png", bbox_inches="tight", pad_inches=0)
    large, small = (
        np.asarray(Image.open(file).convert("RGB")).astype(int) for file in (whole, tight)
    )
    rows, columns = (np.abs(large - 255).sum(axis=2) > 0).nonzero()
    ink = large[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width = (min(pair) for pair in zip(ink.shape[:2], small.shape[:2], strict=True))
    assert abs(ink.shape[0] - small.shape[0]) < 12
    assert abs(ink.shape[1] - small.shape[1]) < 12
    # A pixel more or less at the border shifts all; the best of small shifts must fit.
    differences = [
        np.abs(
            ink[up : height - 6, left : width - 6] - small[: height - 6 - up, : width - 6 - left]
        )
        for up in range(4)
        for left in range(4)
    ]
    assert min(float(part.mean()) for part in differences) < 6
