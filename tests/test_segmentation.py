"""Segmentation: cues, cuts, the verb on scenes whose mask is known, results on disk."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from avsl_cases import small_avsl
from PIL import Image
from torch import Tensor, nn

import simexplain
from simexplain import (
    Comparison,
    Preprocess,
    Segmentation,
    as_similarity_model,
    explain,
    load_model,
    segment,
)
from simexplain.errors import ComparisonError, ImageError, OutputError
from simexplain.methods.similarity_attention import SimilarityAttention
from simexplain.publishing import KINDS
from simexplain.segmentation.cue import (
    CUES,
    REFINEMENTS,
    SHAPES,
    Cue,
    GrabCut,
    default_cue,
    framed,
    nearly_all,
    refine,
)
from simexplain.segmentation.segmenting import attend

SIDE = 96
PLAIN = Preprocess(size=(SIDE, SIDE), mean=(0, 0, 0), std=(1, 1, 1))


class ColourNet(nn.Module):
    """How much red, green and blue there is, averaged: it knows colours and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(4)
        self.mix = nn.Conv2d(3, 3, 1, bias=False)
        self.mix.weight.data = (1.5 * torch.eye(3) - 0.5).view(3, 3, 1, 1)
        self.act = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        return self.act(self.mix(self.pool(images))).mean(dim=(2, 3))


def scene(seed: int = 0, side: int = SIDE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A red disc and a blue square on grey noise, and the mask of each."""
    noise = np.random.default_rng(seed).integers(90, 150, (side, side, 1), dtype=np.uint8)
    picture = np.repeat(noise, 3, axis=2)
    rows, columns = np.mgrid[:side, :side] / side
    red = (rows - 0.35) ** 2 + (columns - 0.3) ** 2 < 0.2**2
    blue = (abs(rows - 0.65) < 0.15) & (abs(columns - 0.75) < 0.15)
    picture[red], picture[blue] = (200, 30, 30), (30, 40, 190)
    return picture, red, blue


def plate(colour: tuple[int, int, int]) -> np.ndarray:
    """A square of one colour on white."""
    picture = np.full((SIDE, SIDE, 3), 255, dtype=np.uint8)
    picture[30:66, 30:66] = colour
    return picture


def tensor(*pictures: np.ndarray) -> Tensor:
    return PLAIN.redo(np.stack(pictures))


@pytest.fixture
def colours() -> nn.Module:
    return as_similarity_model(ColourNet().eval(), preprocess=PLAIN)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A scene larger than the network's input and not square, and its supports."""
    picture, red, _ = scene(side=200)
    Image.fromarray(picture[:, :180]).save(tmp_path / "scene.png")
    Image.fromarray(red[:, :180]).save(tmp_path / "red_mask.png")
    for name, colour in (("red", (190, 20, 40)), ("blue", (20, 30, 200))):
        Image.fromarray(plate(colour)).save(tmp_path / f"{name}.png")
    return tmp_path


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    return float((mask & truth).sum() / (mask | truth).sum())


RED, BLUE = (190, 20, 40), (20, 30, 200)


@pytest.mark.parametrize(("sought", "place"), [("red", 1), ("blue", 2)])
@pytest.mark.parametrize("method", ["sam", "focus"])
def test_two_ways_find_each_its_own(
    colours: nn.Module, sought: str, place: int, method: str
) -> None:
    picture, *masks = scene()
    near, far = (RED, BLUE) if sought == "red" else (BLUE, RED)
    result = segment(
        colours, tensor(picture)[0], tensor(plate(near)), tensor(plate(far)), method=method
    )
    assert iou(result.mask, masks[place - 1]) > 0.9
    assert iou(result.mask, masks[2 - place]) < 0.05


def test_one_way_needs_no_other_class(colours: nn.Module) -> None:
    picture, red, _ = scene()
    result = segment(colours, tensor(picture)[0], tensor(plate(RED)), method="sam",
                    weights="relative")  # fmt: skip
    assert iou(result.mask, red) > 0.9
    assert result.options["weights"] == "relative"


def test_the_map_is_that_of_explain(colours: nn.Module, images: Tensor) -> None:
    """One shot is a triplet with the test image as its anchor; several shots are averaged."""
    test, near, far = images[0], images[1:3], images[3:5]
    one = attend(colours, test, near[:1], far[:1], method="sam")
    triplet = Comparison.triplet(test[None], near[:1], far[:1])
    torch.testing.assert_close(one.heat, explain(colours, triplet, "sam").heatmaps[0, 0])
    two = attend(colours, test, near, far, method="sam")
    each = [
        explain(colours, Comparison.triplet(test[None], near[n : n + 1], far[n : n + 1]), "sam")
        for n in range(2)
    ]
    mean = torch.stack([result.heatmaps[0, 0] for result in each]).mean(dim=0)
    torch.testing.assert_close(two.heat, mean / mean.max())
    for n in range(2):
        torch.testing.assert_close(two.supports[n], each[n].heatmaps[0, 1])
        torch.testing.assert_close(two.others[n], each[n].heatmaps[0, 2])
    uneven = attend(colours, test, near, far[:1], method="sam")
    assert (len(uneven.supports), len(uneven.others)) == (2, 1)
    turned = attend(colours, test, near[:1], far[:1], method="sam", anchor="support")
    triplet = Comparison.triplet(near[:1], test[None], far[:1])
    expected = explain(colours, triplet, "sam").heatmaps[0]
    torch.testing.assert_close(turned.heat, expected[1])
    torch.testing.assert_close(turned.supports[0], expected[0])
    everything = Comparison(test[None], near[None], far[None])
    together = attend(colours, test, near, far, method="sam", aggregate="together")
    torch.testing.assert_close(together.heat, explain(colours, everything, "sam").heatmaps[0, 0])


def test_marks_are_thresholds_of_the_heat() -> None:
    heat = np.array([[0.0, 0.09, 0.1, 0.49], [0.5, 0.79, 0.8, 1.0]], dtype=np.float32)
    marks = Cue(sure=0.8, probable=0.5, background=0.1).marks(heat)
    assert marks.tolist() == [[0, 0, 2, 2], [3, 3, 1, 1]]
    seen = np.array([[True] * 4, [False] * 4])
    assert Cue(0.8, 0.5, 0.1).marks(heat, seen).tolist() == [[0, 0, 2, 2], [2, 2, 2, 2]]
    assert 1 not in Cue(2, 0.5, 0.1).marks(heat)
    for wrong in ((0.4, 0.5, 0.1), (0.8, 0.1, 0.5), (0.8, 0, 0), (0.8, 0.5, -0.1)):
        with pytest.raises(ComparisonError, match="thresholds"):
            Cue(*wrong)


def test_a_cut_is_opencv_with_that_seed_and_leaves_the_callers_generator_alone() -> None:
    picture, red, _ = scene()
    marks = framed((SIDE, SIDE), (5, 10, 60, 60))
    cv2.setRNGSeed(0)
    expected = marks.copy()
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(picture, expected, None, *models, 5, cv2.GC_INIT_WITH_MASK)
    cv2.setRNGSeed(123)
    drawn = [cv2.randu(np.zeros(4), 0, 1).tolist() for _ in range(2)]
    cv2.setRNGSeed(123)
    first = cv2.randu(np.zeros(4), 0, 1).tolist()
    result = GrabCut()(picture, marks)
    assert [first, cv2.randu(np.zeros(4), 0, 1).tolist()] == drawn
    assert (result == np.isin(expected, (1, 3))).all()
    assert (GrabCut()(picture, marks) == result).all()
    assert iou(result, red) > 0.95
    assert set(np.unique(marks)) == {0, 3}, "the marks given are as they were"


def test_cuts_with_nothing_to_tell_apart() -> None:
    picture, _, _ = scene()
    for mark, expected in ((0, False), (2, False), (1, True), (3, True)):
        marks = np.full((SIDE, SIDE), mark, dtype=np.uint8)
        assert (GrabCut()(picture, marks) == expected).all()
    for count in (1, 3):  # fewer pixels than a colour model has parts
        marks = np.zeros((SIDE, SIDE), dtype=np.uint8)
        marks[0, :count] = 1
        assert GrabCut()(picture, marks)[0, :count].all()
        assert not GrabCut()(picture, 1 - marks)[0, :count].any()
    flat = np.full((SIDE, SIDE, 3), 7, dtype=np.uint8)
    assert GrabCut()(flat, framed((SIDE, SIDE), (5, 5, 20, 20))).shape == (SIDE, SIDE)
    assert GrabCut()(picture[:1, :1], np.zeros((1, 1), np.uint8)).tolist() == [[False]]


def test_large_pictures_are_cut_small_and_come_back_smooth() -> None:
    picture, red, _ = scene(side=400)
    marks = framed((400, 400), (20, 30, 240, 240))
    assert iou(GrabCut(longest=100)(picture, marks), red) > 0.93
    assert iou(GrabCut()(picture, marks), red) > 0.98


def test_sure_marks_hold_where_a_reduced_picture_does_not_show_them() -> None:
    picture, _, _ = scene(side=400)
    for ground in (2, 3):
        marks = np.full((400, 400), ground, dtype=np.uint8)
        marks[200:300, 200:300] = 3
        marks[101, 103], marks[251, 253] = 1, 0
        result = GrabCut(longest=50)(picture, marks)
        assert result[101, 103]
        assert not result[251, 253]


@pytest.mark.parametrize("method", ["focus", "sam", "avsl"])
def test_avsl_models_segment_with_their_own_maps_and_others(method: str) -> None:
    model = small_avsl()
    generator = torch.Generator().manual_seed(0)
    test, near, far = torch.rand((3, 3, 32, 40), generator=generator, dtype=torch.float64)
    result = segment(model, test, near[None], far[None], method=method, refine="threshold")
    triplet = Comparison.triplet(test[None], near[None], far[None])
    wanted = explain(model, triplet, method, **SHAPES.get(method, {}))
    heat = wanted.heatmaps[0, 0]
    np.testing.assert_allclose(result.heat, heat / heat.max(), atol=1e-6)
    assert result.layers == wanted.layers
    assert (result.mask == (result.heat >= default_cue(method).probable)).all()


@pytest.mark.parametrize("by", REFINEMENTS)
def test_every_refinement_has_an_answer_for_every_map(by: str) -> None:
    picture, _, _ = scene()
    empty, hot = np.zeros((SIDE, SIDE), np.float32), np.ones((SIDE, SIDE), np.float32)
    dot = empty.copy()
    dot[40, 40] = 1
    result = refine(picture, empty, CUES["sam"], by=by)
    if by != "whole":
        assert not result.mask.any()
        assert "empty" in result.note
    for heat in (hot, dot):
        result = refine(picture, heat, CUES["sam"], by=by)
        assert result.mask.shape == heat.shape
        assert result.mask.dtype == bool
    everything = refine(picture, hot, CUES["sam"], by="grabcut")
    assert everything.mask.all()
    assert "everywhere" in everything.note


def test_otsu_is_that_of_scikit_image() -> None:
    threshold_otsu = pytest.importorskip("skimage.filters").threshold_otsu
    heat = np.random.default_rng(0).beta(0.6, 2.0, (SIDE, SIDE)).astype(np.float32)
    heat /= heat.max()
    levels = np.round(heat * 255).astype(np.uint8)
    expected = levels > threshold_otsu(levels)
    result = refine(scene()[0], heat, CUES["sam"], by="otsu").mask
    assert (result != expected).mean() < 0.01


def test_a_box_and_nearly_all() -> None:
    assert nearly_all((100, 200)) == (4, 2, 196, 98)
    assert nearly_all((1, 1)) == (0, 0, 1, 1)
    assert framed((3, 4), (1, 0, 3, 2)).tolist() == [[0, 3, 3, 0], [0, 3, 3, 0], [0, 0, 0, 0]]


def test_names_are_refused_in_a_sentence(colours: nn.Module) -> None:
    test, near = tensor(scene()[0])[0], tensor(plate(RED))
    for options, record in (
        ({"refine": "snake"}, "refine to be one of"),
        ({"aggregate": "some"}, "aggregate to be one of"),
        ({"anchor": "other"}, "anchor to be one of"),
        ({"aggregate": "together", "anchor": "support"}, "one anchor"),
        ({"method": "sum"}, "method"),
        ({"support_masks": torch.ones(2, SIDE, SIDE, dtype=torch.bool)}, "support masks"),
        ({"support_masks": torch.zeros(1, SIDE, SIDE, dtype=torch.bool)}, "empty"),
    ):
        with pytest.raises(ComparisonError, match=record):
            segment(colours, test, near, **options)
    for wrong in (near[:0], near[:, :, :10], near[0], near.numpy(), None):
        with pytest.raises(ComparisonError, match="support"):
            segment(colours, test, wrong)


def test_thresholds_belong_to_the_method() -> None:
    assert default_cue("focus") == CUES["focus"]
    assert default_cue(simexplain.METHODS["focus"]()) == CUES["focus"]
    assert default_cue(SimilarityAttention()) == default_cue("saliency") == CUES["sam"]


def test_focus_makes_a_smooth_cue_unless_told_otherwise(tiny: nn.Module, images: Tensor) -> None:
    test, near = images[0], images[1:2]
    pair = simexplain.Comparison.pair(images[:1], near)
    for given, wanted in (
        ({}, {"peak": 3.0, "detail": 0.0}),
        ({"detail": 0.4}, {"peak": 3.0, "detail": 0.4}),
    ):
        heat = attend(as_similarity_model(tiny), test, near, method="focus", **given).heat
        own = simexplain.explain(tiny, pair, "focus", **wanted).heatmaps[0, 0]
        assert torch.allclose(heat, own, atol=1e-5)


def test_files_at_their_own_resolution(colours: nn.Module, files: Path) -> None:
    result = segment(colours, files / "scene.png", [files / "red.png"], [files / "blue.png"])
    truth = np.asarray(Image.open(files / "red_mask.png"))
    assert result.mask.shape == result.heat.shape == truth.shape == (200, 180)
    assert iou(result.mask, truth) > 0.9
    left, top, right, bottom = result.box
    rows, columns = np.nonzero(result.mask)
    assert (left, top, right, bottom) == (
        columns.min(), rows.min(), columns.max() + 1, rows.max() + 1,
    )  # fmt: skip
    assert [image.role for image in result.images] == ["support", "other"]


def test_what_the_network_does_not_see_is_never_sure(colours: nn.Module, files: Path) -> None:
    cropping = as_similarity_model(ColourNet().eval(), preprocess=replace(PLAIN, crop_fraction=0.5))
    result = segment(cropping, files / "scene.png", [files / "red.png"], view="model", method="sam")
    assert result.marks is not None
    assert set(np.unique(result.marks[:20])) == {2}
    assert not result.heat[:20].any()


def test_support_masks_hide_what_lies_around(colours: nn.Module, files: Path) -> None:
    """A support with both colours says nothing; with a mask of the red one it does."""
    both = plate(RED)
    both[70:90, 5:90] = BLUE
    Image.fromarray(both).save(files / "both.png")
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[30:66, 30:66] = True
    Image.fromarray(mask).save(files / "mask.png")
    truth = np.asarray(Image.open(files / "red_mask.png"))
    options = {"method": "sam", "weights": "relative"}
    result = segment(
        colours,
        files / "scene.png",
        [files / "both.png"],
        support_masks=[files / "mask.png"],
        **options,
    )
    without = segment(colours, files / "scene.png", [files / "both.png"], **options)
    assert iou(result.mask, truth) > 0.9
    assert iou(without.mask, truth) < iou(result.mask, truth)
    assert result.options["support_masks"] is True
    with pytest.raises(ComparisonError, match="a mask for each"):
        segment(colours, files / "scene.png", [files / "both.png"], support_masks=[])
    with pytest.raises(ImageError, match="size of its picture"):
        segment(
            colours,
            files / "scene.png",
            [files / "both.png"],
            support_masks=[files / "red_mask.png"],
        )
    one = files / "red.png"
    for supports, given in (
        (str(one), {}), ([one], {"others": str(one)}), ([one], {"support_masks": str(one)}),
    ):  # fmt: skip
        with pytest.raises(ComparisonError, match=r"list of .* as \w+, got .*; put it into a list"):
            segment(colours, files / "scene.png", supports, **given)


def test_support_masks_of_0_and_255_do_not_change_the_light(colours: nn.Module) -> None:
    test, near = tensor(scene()[0])[0], tensor(plate(RED))
    mask = torch.zeros((1, SIDE, SIDE), dtype=torch.bool)
    mask[:, 30:66, 30:66] = True
    result = [
        segment(colours, test, near, support_masks=marks)
        for marks in (mask, mask.to(torch.uint8) * 255)
    ]
    assert (result[0].images[0].picture == result[1].images[0].picture).all()
    np.testing.assert_array_equal(result[0].heat, result[1].heat)


def states() -> tuple[object, ...]:
    """Of all random generators but OpenCV's, which does not tell."""
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002 - the users' may be the old one
        torch.get_rng_state().tolist(),
    )


def test_nothing_of_the_users_is_touched(files: Path) -> None:
    network = ColourNet().train()
    network.mix.weight.requires_grad_(False)
    before = states()
    segment(network, files / "scene.png", [files / "red.png"])
    assert states() == before
    assert network.training
    assert network.mix.weight.grad is None
    assert not network.act._forward_hooks


def test_saving_and_loading(colours: nn.Module, files: Path, tmp_path: Path) -> None:
    result = segment(colours, files / "scene.png", [files / "red.png"], [files / "blue.png"])
    written = result.save(tmp_path / "out")
    assert {Path(path).name for path in written.values()} == set(KINDS["Segmentation"].names)
    mask = np.asarray(Image.open(tmp_path / "out" / "mask.png"))
    assert ((mask == 255) == result.mask).all()
    cut = Image.open(tmp_path / "out" / "cutout.png")
    left, top, right, bottom = result.box
    assert cut.size == (right - left, bottom - top)
    alpha = np.asarray(cut)[:, :, 3]
    assert not alpha[~result.mask[top:bottom, left:right]].any()
    assert alpha.max() == 255
    record = json.loads((tmp_path / "out" / "segmentation.json").read_text(encoding="utf-8"))
    assert record["share"] == result.share
    assert record["test"]["size"] == [180, 200]
    again = Segmentation.load(tmp_path / "out")
    assert (again.mask == result.mask).all()
    assert (again.marks == result.marks).all()
    assert (again.picture == result.picture).all()
    np.testing.assert_allclose(again.heat, result.heat, atol=1e-3)
    assert [one.name for one in again.images] == [one.name for one in result.images]
    assert again.figure().axes
    assert again._repr_html_().startswith("<img")
    with pytest.raises(OutputError, match="is there already"):
        result.save(tmp_path / "out")
    result.save(tmp_path / "out", force=True)
    (tmp_path / "out" / "segmentation.npz").write_bytes(b"broken")
    with pytest.raises(OutputError, match="damaged"):
        Segmentation.load(tmp_path / "out")


def test_the_figure_asks_for_one_support_or_several(colours: nn.Module) -> None:
    test, near = tensor(scene()[0])[0], tensor(plate(RED), plate(RED))
    for count, record in ((1, "the support shows?"), (2, "the supports show?")):
        result = segment(colours, test, near[:count], refine="otsu")
        assert any(record in text.get_text() for text in result.figure().texts)


def test_an_empty_mask_can_be_shown_and_saved(colours: nn.Module, tmp_path: Path) -> None:
    """The network's map of a grey picture is empty: it has no colour at all."""
    grey = np.full((SIDE, SIDE, 3), 90, dtype=np.uint8)
    grey[0, 0] = 250, 240, 240  # or its embedding would be zero
    result = segment(
        colours, tensor(grey)[0], tensor(plate(BLUE)), method="sam", refine="threshold"
    )
    empty = replace(result, mask=np.zeros_like(result.mask))
    assert empty.box is None
    assert empty.share == 0
    assert not empty.cutout()[:, :, 3].any()
    empty.save(tmp_path / "out")
    assert not Segmentation.load(tmp_path / "out").mask.any()


def test_a_single_pixel_is_cut_out(colours: nn.Module) -> None:
    result = segment(colours, tensor(scene()[0])[0], tensor(plate(RED)), method="sam")
    mask = np.zeros_like(result.mask)
    mask[5, 7] = True
    tiny = replace(result, mask=mask)
    assert tiny.box == (7, 5, 8, 6)
    assert tiny.cutout().shape == (1, 1, 4)
    assert tiny.cutout()[0, 0, 3] == 255


def test_the_pretrained_default_finds_the_photograph(demo_paths: list[Path]) -> None:
    """The demo's positive shows the anchor's cat as a photograph on a cloth, beside a cup."""
    model = load_model("timm:tf_efficientnet_lite0")
    anchor, positive, negative = demo_paths
    result = segment(model, positive, [anchor], [negative])
    print_of_the_cat = np.zeros(result.mask.shape, dtype=bool)
    print_of_the_cat[30:250, 230:450] = True
    assert (result.mask & print_of_the_cat).sum() > 0.9 * result.mask.sum()
    assert result.share > 0.04
