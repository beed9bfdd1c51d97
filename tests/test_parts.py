"""A layer that sees a part of the picture is drawn on it by every command; bypass is stated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from simexplain import (
    Attribution,
    Comparison,
    Matching,
    SearchResult,
    Segmentation,
    as_similarity_model,
    attribute,
    build_index,
    explain,
    explain_batch,
    match,
    open_batch,
    open_index,
    search,
    segment,
)
from simexplain.batching.planning import BatchOptions
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ComparisonError
from simexplain.matching.pictures import _Side
from simexplain.models.avsl import AVSL
from simexplain.models.base import SimilarityModel
from simexplain.searching.index_gallery import report_of
from simexplain.searching.search_pictures import _Picture

HIGH, WIDE = 80, 120
NEAR = 8.0
"""How far a point may lie from the middle of its square; cells are 5 by 7.5 pixels."""


class Part(nn.Module):
    """``d`` sees the lower or the right half alone; beside it ``t`` goes into the embedding too.

    Without biases, so that black pixels give nothing.
    """

    def __init__(self, side: str, *, alone: bool = True) -> None:
        super().__init__()
        self.t = nn.Sequential(nn.Conv2d(3, 16, 4, 4, bias=False), nn.ReLU())
        self.d = nn.Sequential(nn.Conv2d(16, 12, 1, bias=False), nn.ReLU())
        self.side, self.alone = side, alone

    def forward(self, images: Tensor) -> Tensor:
        t = self.t(images)
        part = self.d(t[:, :, 8:] if self.side == "lower" else t[..., 8:]).mean((2, 3))
        return part if self.alone else torch.cat([t.mean((2, 3)), part], dim=1)


def network(side: str, *, alone: bool = True) -> SimilarityModel:
    torch.manual_seed(0)
    prepare = Preprocess(size=(64, 64), fit="squash", mean=(0.0,) * 3, std=(1.0,) * 3)
    return as_similarity_model(Part(side, alone=alone).eval(), preprocess=prepare, name="part")


def scene(seen: tuple[int, int], unseen: tuple[int, int], colour: tuple[int, int, int]) -> Image:
    """A square where the layer looks, a larger one where it does not."""
    pixels = np.zeros((HIGH, WIDE, 3), dtype=np.uint8)
    for (x, y), half in ((unseen, 9), (seen, 6)):
        pixels[y - half : y + half, x - half : x + half] = colour
    return Image.fromarray(pixels)


PLACES = {
    "lower": (((90, 62), (30, 20)), ((40, 66), (100, 18)), ((66, 54), (20, 14))),
    "right": (((100, 22), (20, 60)), ((76, 60), (30, 20)), ((90, 40), (20, 30))),
}


@pytest.fixture(params=list(PLACES))
def side(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def paths(side: str, tmp_path: Path) -> list[Path]:
    (tmp_path / "gallery").mkdir()
    result = []
    for number, (seen, unseen) in enumerate(PLACES[side]):
        path = tmp_path / "gallery" / f"{number}.png"
        scene(seen, unseen, (250 - 20 * number, 120 + 30 * number, 60)).save(path)
        result.append(path)
    return result


def near(point: object, wanted: tuple[int, int]) -> bool:
    assert isinstance(point, tuple)
    return max(abs(point[0] - wanted[0]), abs(point[1] - wanted[1])) <= NEAR


def middle(heat: np.ndarray) -> tuple[float, float]:
    """The middle of what is at least half as hot as the maximum."""
    rows, columns = np.nonzero(heat >= heat.max() / 2)
    return float(columns.mean()), float(rows.mean())


def test_explain_draws_a_named_layer_of_a_plain_network_where_it_looks(side: str) -> None:
    """Also where nothing wrapped the network before, so that no survey was made."""
    images = torch.rand(2, 3, 64, 64)
    result = explain(Part(side).eval(), Comparison.pair(images[:1], images[1:]), layer="d")
    assert result.region == ((0.5, 0, 1, 1) if side == "lower" else (0, 0.5, 1, 1))


@pytest.mark.parametrize("method", ["sam", "focus", "similarity_cam", "decomposition"])
@pytest.mark.parametrize("layers", [("d",), ("t", "d")])
def test_explain_and_batch(
    side: str, paths: list[Path], layers: tuple[str, ...], method: str, tmp_path: Path
) -> None:
    """Joined with a layer that sees the whole, each map is laid where it looks."""
    model = network(side)
    actual = explain(model, paths[:2], arch="siamese", method=method, layer=layers)
    table = tmp_path / "rows.csv"
    table.write_text(f"anchor,positive\n{paths[0]},{paths[1]}\n")
    how = BatchOptions(pictures=True, figures=True)
    done = explain_batch(model, table, tmp_path / "batch", method=method, layer=layers, how=how)
    again = open_batch(done.folder).explanation(0)
    for result in (actual, again):
        for index, (seen, _) in enumerate(PLACES[side][:2]):
            assert near(result.peaks()[index], seen), (method, layers)
            own = result.drawn(result.layer_maps["d"], "d")[0, index].numpy()
            assert near(middle(actual.geometries[index].to_original(own)), seen)
    assert again.region == actual.region
    assert again.layer_regions == actual.layer_regions
    assert again.bypass == actual.bypass == dict.fromkeys(layers, 0.0)
    assert torch.equal(again.heatmaps, actual.heatmaps)


def test_match(side: str, paths: list[Path], tmp_path: Path) -> None:
    result = match(network(side), *paths[:2], layer="d")
    (first, unseen), (second, _) = PLACES[side][:2]
    (best,) = result.top(1)
    assert near(best.a, first)
    assert near(best.b, second)
    assert near(result.best(*first).b, second)
    assert near(result.best(*second, side="b").a, first)
    for index, wanted in enumerate((first, second)):
        drawn = _Side(result, index, 0)
        assert near(middle(drawn.heat(result.marginals()[index][0])), wanted)
    with pytest.raises(ComparisonError, match="that the layer sees, x from"):
        result.at(*unseen)
    result.save(tmp_path / "out")
    again = Matching.load(tmp_path / "out")
    assert again.regions == result.regions
    assert again.top(1) == result.top(1)
    record = json.loads((tmp_path / "out" / "matching.json").read_text())
    assert record["bypass"] == again.bypass == {"d": 0.0}


def test_match_of_two_sizes_has_a_region_for_each() -> None:
    """Rows 8 and on: of 16 half the picture, of 24 two thirds."""
    images = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 96, 64)
    result = match(network("lower"), *images, "d")
    assert result.regions == ((0.5, 0, 1, 1), (pytest.approx(1 / 3, abs=1e-3), 0, 1, 1))
    centre = result.frame("b").centre(0)
    assert centre == pytest.approx((2, 34), abs=0.1)
    assert result.frame("b").weights(*centre, result.matrix)[0, 0] == pytest.approx(1, abs=0.02)


def test_search(side: str, paths: list[Path], tmp_path: Path) -> None:
    model, places = network(side), PLACES[side]
    index = build_index(model, paths[0].parent, tmp_path / "x.index", layer="d")
    query = tmp_path / "query.png"
    scene(*places[0], (240, 130, 70)).save(query)
    result = search(model, query, index)
    for number, hit in enumerate(result.hits):
        seen = places[int(Path(hit.path).stem)][0]
        assert near(hit.peak, seen)
        assert near(hit.query_peak, places[0][0])
        assert near(hit.pairs[0].a, places[0][0])
        assert near(hit.pairs[0].b, seen)
        own = _Picture(result, hit.path)
        shrink = own.shrink
        x, y = middle(own.heat(result.hit_maps[number]))
        assert near((x / shrink[0], y / shrink[1]), seen)
    x, y = places[0][0]
    boxed = search(model, query, index, region=(x - 6, y - 6, 12, 12))
    for hit in boxed.hits:
        left, top, wide, high = hit.box
        assert near((left + wide / 2, top + high / 2), places[int(Path(hit.path).stem)][0])
    x, y = places[0][1]
    with pytest.raises(ComparisonError, match="what the layer sees"):
        search(model, query, index, region=(x - 6, y - 6, 12, 12))
    result.save(tmp_path / "out")
    again = SearchResult.load(tmp_path / "out")
    assert again.layer_region == result.layer_region == open_index(index.path).keeping.region
    assert again.layer_region == ((0.5, 0, 1, 1) if side == "lower" else (0, 0.5, 1, 1))
    assert again.bypass == {"d": 0.0}


def test_an_index_of_an_older_version_is_searched_where_its_layer_looks(
    paths: list[Path], side: str, tmp_path: Path
) -> None:
    model = network(side, alone=False)
    index = build_index(model, paths[0].parent, tmp_path / "x.index", layer="d")
    older = replace(index, keeping=replace(index.keeping, region=(0.0, 0.0, 1.0, 1.0), bypass=None))
    now, then = (search(model, paths[0], one) for one in (index, older))
    assert now.hits == then.hits
    assert now.bypass == then.bypass


def test_attribute_and_the_maps_of_avsl(side: str, paths: list[Path], tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = AVSL(network(side), levels=("t", "d"), nodes=5).eval()
    result = attribute(model, paths[:2][0], paths[:2][1:])
    result.save(tmp_path / "out")
    for one in (result, Attribution.load(tmp_path / "out")):
        heats = one.heatmaps("d", range(5)).numpy()
        for index, (seen, _) in enumerate(PLACES[side][:2]):
            for heat in heats[index]:
                x, y = middle(heat)
                assert near((x * WIDE / 64, y * HIGH / 64), seen)
    images = result.images
    actual = explain(model, Comparison.pair(images[:, 0], images[:, 1]), "avsl", level="d")
    for index, (seen, _) in enumerate(PLACES[side][:2]):
        x, y = middle(actual.heatmaps[0, index].numpy())
        assert near((x * WIDE / 64, y * HIGH / 64), seen)
    both = explain(model, Comparison.pair(images[:, 0], images[:, 1]), "avsl", keep_negative=True)
    assert both.region == (0, 0, 1, 1)
    torch.testing.assert_close(both.maps.sum((2, 3)), both.scores, rtol=1e-4, atol=1e-6)
    one = both.layer_maps["t"] + 2 * torch.nn.functional.pad(
        both.layer_maps["d"], (0, 0, 8, 0) if side == "lower" else (8, 0)
    ) / 2  # fmt: skip
    torch.testing.assert_close(both.maps, one)


def test_segment(side: str, paths: list[Path], tmp_path: Path) -> None:
    result = segment(network(side), paths[0], paths[1:], layer="d", method="sam", refine="otsu")
    assert near(middle(result.heat), PLACES[side][0][0])
    assert near(middle(result.mask.astype(float)), PLACES[side][0][0])
    result.save(tmp_path / "out")
    assert Segmentation.load(tmp_path / "out").bypass == result.bypass == {"d": 0.0}


def test_what_bypasses_a_layer_is_told_with_every_result(paths: list[Path], tmp_path: Path) -> None:
    """A part of the embedding is made of ``t`` alone."""
    model = network("lower", alone=False)
    images = torch.rand(2, 3, 64, 64)
    index = build_index(model, paths[0].parent, tmp_path / "x.index", layer="d")
    actual = search(model, paths[0], index)
    matched = match(model, *paths[:2], layer="d")
    cut = segment(model, paths[0], paths[1:], layer="d")
    shares = [one["d"] for one in (actual.to_json()["bypass"], matched.bypass, cut.bypass)]
    assert shares[0] == report_of(index)["basis"]["bypass"]
    assert all(0.1 < share < 1 for share in shares)
    explain(model, Comparison.pair(images[:1], images[1:]), layer="d")
    again = build_index(model, paths[0].parent, tmp_path / "y.index", layer="d")
    assert again.bypass == index.bypass
    for result in (actual, matched, cut):
        assert any("bypasses layer 'd'" in line for line in result.warnings)
