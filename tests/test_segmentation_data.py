"""PASCAL-5i from miniature trees, episodes, and intersection over union counted by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runs import Run
from PIL import Image
from test_segmentation import PLAIN, ColourNet, scene

from simexplain import as_similarity_model, evaluate_segmentation
from simexplain.errors import ComparisonError, ImageError
from simexplain.segmentation.dataset import (
    CLASSES,
    Appearance,
    SegmentationData,
    draw_episodes,
    fold_classes,
    is_pascal,
    read_masked,
    read_pascal,
)
from simexplain.segmentation.evaluating import EpisodeScore, FoldScore, Overlap, divided, overlap

COLOURS = {1: (220, 40, 40), 2: (40, 40, 220), 6: (40, 200, 40), 20: (200, 40, 200)}
"""What the objects of some of VOC's classes look like here."""

CONTENT = {
    "2007_000001": (1,), "2007_000002": (1, 2), "2007_000003": (2,), "2007_000004": (1,),
    "2007_000005": (2, 6), "2007_000006": (20,), "2007_000007": (1, 2),
}  # fmt: skip
TRAIN = ("2008_000001", "2008_000002")
EXTRA = "2008_000003"


def drawn(values: tuple[int, ...], seed: int) -> tuple[Image.Image, Image.Image]:
    """A picture 60 high and 80 wide with a square of each class, and its VOC mask with contours."""
    grey = np.random.default_rng(seed).integers(100, 140, (60, 80, 1), dtype=np.uint8)
    picture, mask = np.repeat(grey, 3, axis=2), np.zeros((60, 80), dtype=np.uint8)
    for index, value in enumerate(values):
        left = 8 + 38 * index
        mask[18:44, left - 2 : left + 28] = 255
        mask[20:42, left : left + 26] = value
        picture[20:42, left : left + 26] = COLOURS[value]
    palette = Image.fromarray(mask)
    palette.putpalette([(31 * n) % 256 for n in range(768)])
    return Image.fromarray(picture), palette


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VOCdevkit/VOC2012 as it unpacks, in miniature."""
    root = tmp_path_factory.mktemp("voc")
    base = root / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True)
    for seed, (name, values) in enumerate(
        {**CONTENT, TRAIN[0]: (6,), TRAIN[1]: (2, 20), EXTRA: (20,)}.items()
    ):
        picture, mask = drawn(values, seed)
        picture.save(base / "JPEGImages" / f"{name}.jpg", quality=98)
        if name != EXTRA:
            mask.save(base / "SegmentationClass" / f"{name}.png")
    lists = base / "ImageSets" / "Segmentation"
    (lists / "val.txt").write_text("".join(f"{name}\n" for name in CONTENT), encoding="utf-8")
    (lists / "train.txt").write_text("".join(f"{name}\n" for name in TRAIN), encoding="utf-8")
    return root


def copied(voc: Path, target: Path) -> Path:
    import shutil

    return Path(shutil.copytree(voc, target / "voc"))


def shown(data: SegmentationData) -> list[tuple[str, str]]:
    return [(one.path.stem, one.label) for one in data.tests]


def test_folds_are_five_classes_in_vocs_order() -> None:
    assert [fold_classes(fold) for fold in range(4)] == [
        CLASSES[:5], CLASSES[5:10], CLASSES[10:15], CLASSES[15:],
    ]  # fmt: skip
    assert set(fold_classes(2, "train")) == set(CLASSES) - set(CLASSES[10:15])
    with pytest.raises(ImageError, match="from 0 to 3"):
        fold_classes(4)


@pytest.mark.parametrize("inside", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_a_fold_is_read_from_voc_alone(voc: Path, inside: str) -> None:
    assert is_pascal(voc / inside)
    result = read_pascal(voc / inside, 0)
    expected = [(n, CLASSES[v - 1]) for n, own in CONTENT.items() for v in own if v <= 5]
    assert shown(result) == expected
    assert shown(read_pascal(voc / inside, 3)) == [("2007_000006", "tvmonitor")]
    assert shown(read_pascal(voc / inside, 0, "train")) == [
        (TRAIN[0], "bus"), (TRAIN[1], "tvmonitor"),
    ]  # fmt: skip


def test_the_reader_agrees_with_torchvision(voc: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.datasets.VOCSegmentation(str(voc), year="2012", image_set="val")
    result = {one.path: one for fold in (0, 1, 3) for one in read_pascal(voc, fold).tests}
    assert sorted(map(str, result)) == sorted(theirs.images)
    for number, path in enumerate(theirs.images):
        one = result[Path(path)]
        values = np.asarray(theirs[number][1])
        truth, valid = one.truth((60, 80))
        assert (truth == (values == one.value)).all()
        assert (valid == (values != 255)).all()
        assert truth.sum() == 22 * 26
        assert not valid.all()


def test_sbd_adds_training_pictures_and_never_those_of_the_test(voc: Path, tmp_path: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    root = copied(voc, tmp_path)
    sbd = root / "benchmark_RELEASE" / "dataset"
    (sbd / "cls").mkdir(parents=True)
    (sbd / "img").mkdir()
    (sbd / "train.txt").write_text(f"{EXTRA}\n{next(iter(CONTENT))}\n", encoding="utf-8")
    (sbd / "val.txt").write_text("2007_000002\n", encoding="utf-8")
    values = np.asarray(drawn((20,), 9)[1])
    # As MATLAB writes them: a struct with the field Segmentation.
    scipy_io.savemat(sbd / "cls" / f"{EXTRA}.mat", {"GTcls": {"Segmentation": values}})
    result = read_pascal(root, 0, "train")
    assert shown(result)[-1] == (EXTRA, "tvmonitor")
    assert not {name for name, _ in shown(result)} & set(CONTENT)
    truth, valid = result.tests[-1].truth((60, 80))
    assert (truth == (values == 20)).all()
    assert (valid == (values != 255)).all()
    (sbd / "cls" / f"{EXTRA}.mat").write_bytes(b"no matrix")
    with pytest.raises(ImageError, match=r"cannot be read .* check the file\.$"):
        read_pascal(root, 0, "train")


def test_augmented_masks_and_lists_of_the_community(voc: Path, tmp_path: Path) -> None:
    root = copied(voc, tmp_path)
    base = root / "VOCdevkit" / "VOC2012"
    (base / "SegmentationClassAug").mkdir()
    mask = np.zeros((60, 80), dtype=np.uint8)
    mask[:30] = 1
    Image.fromarray(mask).save(base / "SegmentationClassAug" / "2007_000001.png")
    one = read_pascal(root, 0).tests[0]
    assert one.mask is not None
    assert one.mask.parent.name == "SegmentationClassAug"
    assert one.truth((60, 80))[0].sum() == 30 * 80
    lists = root / "splits" / "pascal" / "val"
    lists.mkdir(parents=True)
    (lists / "fold0.txt").write_text("2007_000003__02\n2007_000004__01\n", encoding="utf-8")
    assert shown(read_pascal(root, 0)) == [("2007_000003", "bicycle"), ("2007_000004", "aeroplane")]
    (lists / "fold0.txt").write_text("2007_000003\n", encoding="utf-8")
    with pytest.raises(ImageError, match="2007_000033__01"):
        read_pascal(root, 0)


def test_damaged_trees_are_told_in_a_sentence(voc: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="Expected PASCAL VOC 2012"):
        read_pascal(tmp_path, 0)
    root = copied(voc, tmp_path)
    mask = root / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "2007_000001.png"
    Image.new("RGB", (80, 60)).save(mask)
    with pytest.raises(ImageError, match="mode RGB"):
        read_pascal(root, 0)
    Image.fromarray(np.full((60, 80), 77, np.uint8)).save(mask)
    with pytest.raises(ImageError, match="got 77"):
        read_pascal(root, 0)
    mask.unlink()
    with pytest.raises(ImageError, match="cannot be read"):
        read_pascal(root, 0)
    with pytest.raises(ImageError, match=r"found none in its test lists"):
        read_pascal(voc, 2)


def test_episodes_are_even_repeatable_and_never_show_their_test(voc: Path) -> None:
    data = read_pascal(voc, 0)
    for ways, shots in ((1, 1), (1, 3), (2, 1)):
        result = draw_episodes(data, 40, ways=ways, shots=shots, seed=3)
        assert result == draw_episodes(data, 40, ways=ways, shots=shots, seed=3)
        assert result != draw_episodes(data, 40, ways=ways, shots=shots, seed=4)
        first = [episode.labels[0] for episode in result]
        assert first.count("aeroplane") == first.count("bicycle") == 20
        shows = {one.label: {o.path for o in data.tests if o.label == one.label}
                 for one in data.tests}  # fmt: skip
        for episode in result:
            assert len(episode.labels) == ways == len(set(episode.labels))
            for label, supports in zip(episode.labels, episode.supports, strict=True):
                assert len(set(supports)) == shots
                assert episode.test in shows[label]
                assert set(supports) <= shows[label] - {episode.test}
    # With one shot there are enough supports without the other way's class.
    for episode in draw_episodes(data, 40, ways=2):
        assert {path.stem for path in episode.supports[0] + episode.supports[1]} <= {
            "2007_000001", "2007_000003", "2007_000004", "2007_000005",
        }  # fmt: skip
    with pytest.raises(ComparisonError, match="shots"):
        draw_episodes(data, 5, shots=7)
    with pytest.raises(ComparisonError, match="two classes"):
        draw_episodes(SegmentationData("one", (data.tests[0],), data.tests), 5, ways=2)
    with pytest.raises(ComparisonError, match="1 or 2 ways"):
        draw_episodes(data, 5, ways=3)


def test_counts_by_hand_and_by_a_naive_loop() -> None:
    mask = np.array([[1, 1, 0, 0], [1, 0, 0, 1]], dtype=bool)
    truth = np.array([[1, 0, 0, 1], [1, 0, 1, 1]], dtype=bool)
    valid = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=bool)
    assert overlap(mask, truth) == Overlap(hits=3, extra=1, missed=2, outside=2)
    assert overlap(mask, truth, valid) == Overlap(hits=2, extra=1, missed=2, outside=2)
    assert overlap(mask, truth, valid).iou == 2 / 5
    assert overlap(mask, truth, valid).binary_iou == (2 / 5 + 2 / 5) / 2
    counts = [0, 0, 0, 0]
    random = np.random.default_rng(0)
    mask, truth, valid = (random.random((9, 11)) < share for share in (0.4, 0.5, 0.8))
    for row in range(9):
        for column in range(11):
            if valid[row, column]:
                m, t = mask[row, column], truth[row, column]
                counts[0 if m and t else 1 if m else 2 if t else 3] += 1
    assert overlap(mask, truth, valid) == Overlap(*counts)
    assert math.isnan(Overlap(outside=4).iou)


def test_ious_are_those_of_scikit_learn() -> None:
    jaccard = pytest.importorskip("sklearn.metrics").jaccard_score
    random = np.random.default_rng(1)
    masks, truths = random.random((2, 3, 8, 8)) < 0.5
    episodes = tuple(
        EpisodeScore("", (label,), ((),), (overlap(m, t),), overlap(m, t))
        for label, m, t in zip(("a", "b", "a"), masks, truths, strict=True)
    )
    fold = FoldScore("fold", episodes)
    both = [0, 2]
    a = jaccard(truths[both].ravel(), masks[both].ravel())
    b = jaccard(truths[1].ravel(), masks[1].ravel())
    assert fold.per_class == pytest.approx({"a": a, "b": b})
    assert fold.mean_iou == pytest.approx((a + b) / 2)
    every = jaccard(truths.ravel(), masks.ravel(), average="macro", labels=[True, False])
    assert fold.binary_iou == pytest.approx(every)


def test_claimed_pixels_go_to_the_hotter_map() -> None:
    masks = [np.array([[1, 1, 1, 0]], bool), np.array([[0, 1, 1, 1]], bool)]
    heats = [np.array([[0.9, 0.9, 0.2, 0.9]], np.float32), np.array([[1, 0.5, 0.5, 0.1]])]
    first, second = divided(masks, heats)
    assert first.tolist() == [[True, True, False, False]]
    assert second.tolist() == [[False, False, True, True]]


@pytest.mark.parametrize(("ways", "shots"), [(1, 1), (2, 1), (1, 2)])
def test_a_network_that_knows_colours_solves_the_fold(voc: Path, ways: int, shots: int) -> None:
    model = as_similarity_model(ColourNet().eval(), preprocess=PLAIN)
    result = evaluate_segmentation(model, read_pascal(voc, 0), ways=ways, shots=shots, episodes=6)
    assert set(result.per_class) == {"aeroplane", "bicycle"}
    # Supports with both classes leave one way undecided; with two ways there are none.
    assert result.mean_iou > (0.8 if ways == 2 else 0.6)
    assert result.binary_iou > (0.85 if ways == 2 else 0.7)
    assert len(result.folds[0].episodes) == 6
    record = result.to_json()
    assert set(record) >= {"schema", "binary_iou", "mean_iou", "per_class", "folds"}
    assert record["settings"]["shots"] == shots
    assert len(result.table()) == 6 * ways
    assert "mean IoU" in str(result)
    # Void pixels are in no count.
    assert all(
        sum((c.hits, c.extra, c.missed, c.outside)) < 60 * 80
        for episode in result.folds[0].episodes
        for c in episode.classes
    )


def test_pictures_that_cannot_be_read_are_listed(voc: Path, tmp_path: Path) -> None:
    root = copied(voc, tmp_path)
    data = read_pascal(root, 0)
    (root / "VOCdevkit/VOC2012/JPEGImages/2007_000001.jpg").write_bytes(b"no picture")
    model = as_similarity_model(ColourNet().eval(), preprocess=PLAIN)
    result = evaluate_segmentation(model, data, episodes=8, method="sam")
    assert 0 < len(result.folds[0].episodes) < 8
    assert len(result.errors) + len(result.folds[0].episodes) >= 5
    assert all("2007_000001" in reason for reason in result.errors.values())
    missing = SegmentationData("gone", tuple(
        Appearance(tmp_path / f"{n}.jpg", "a", tmp_path / "m.png") for n in range(3)
    ))  # fmt: skip
    with pytest.raises(ImageError, match="None of 3 episodes"):
        evaluate_segmentation(model, missing, episodes=3)


def own_data(folder: Path) -> Path:
    """A CSV file of scenes with two classes each, and their masks."""
    lines = ["path,label,mask"]
    for seed in range(3):
        picture, red, blue = scene(seed)
        Image.fromarray(picture).save(folder / f"scene{seed}.png")
        for name, mask in (("red", red), ("blue", blue)):
            Image.fromarray(mask).save(folder / f"{name}{seed}.png")
            lines.append(f"scene{seed}.png,{name},{name}{seed}.png")
    (folder / "scenes.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "scenes.csv"


def test_masks_of_ones_own(tmp_path: Path) -> None:
    data = read_masked("csv", own_data(tmp_path))
    assert len(data.tests) == 6
    assert data.labels == ("blue", "red")
    (first,) = (one for one in data.tests if one.mask and one.mask.name == "red0.png")
    truth, valid = first.truth((96, 96))
    assert (truth == scene(0)[1]).all()
    assert valid.all()
    with pytest.raises(ImageError, match="size of its picture"):
        data.tests[0].truth((10, 10))
    with pytest.raises(ImageError, match="Expected a part"):
        read_masked("csv", tmp_path / "scenes.csv", part="val")
    lines = (tmp_path / "scenes.csv").read_text(encoding="utf-8").split()
    split = [f"{line},{part}" for line, part in zip(lines, ["split"] + ["train"] * 6, strict=True)]
    (tmp_path / "split.csv").write_text("\n".join(split), encoding="utf-8")
    assert len(read_masked("csv", tmp_path / "split.csv", part="train").tests) == 6
    with pytest.raises(ImageError, match="part 'test' of split, found none"):
        read_masked("csv", tmp_path / "split.csv", part="test")
    with (tmp_path / "scenes.csv").open("a", encoding="utf-8") as opened:
        opened.write("gone.png\n")
    with pytest.raises(ImageError, match="does not match"):
        read_masked("csv", tmp_path / "scenes.csv")


def test_class_folders_with_alpha_or_a_folder_of_masks(tmp_path: Path) -> None:
    picture, red, blue = scene()
    for name, mask in (("red", red), ("blue", blue)):
        for folder in ("cut", "plain", "masks"):
            (tmp_path / folder / name).mkdir(parents=True)
        for number in range(2):
            alpha = np.dstack((picture, mask.astype(np.uint8) * 255))
            Image.fromarray(alpha).save(tmp_path / "cut" / name / f"{number}.png")
            Image.fromarray(picture).save(tmp_path / "plain" / name / f"{number}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / name / "0.png")
    result = read_masked("folder", tmp_path / "cut", masks="alpha")
    assert len(result.tests) == 4
    assert (result.tests[0].truth((96, 96))[0] == blue).all()
    result = read_masked("folder", tmp_path / "plain", masks=tmp_path / "masks")
    assert result.supports is not None
    assert (len(result.tests), len(result.supports)) == (2, 4)
    assert draw_episodes(result, 4)[0].supports[0][0].name == "1.png"
    with pytest.raises(ImageError, match="found none; name the folder of masks"):
        read_masked("folder", tmp_path / "plain")


def test_the_command_measures_folds_and_files(
    voc: Path, run: Callable[..., Run], tmp_path: Path
) -> None:
    network = ("timm:test_resnet", "--untrained", "--size", "64")
    done = run("evaluate", "segmentation", network[0], voc, *network[1:], "--fold", "0",
               "--episodes", "3", "--out", "scores", "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert done.err == ""
    record = json.loads(done.out)
    assert set(record) >= {"schema", "binary_iou", "mean_iou", "per_class"}
    assert set(record["per_class"]) == {"aeroplane", "bicycle"}
    assert [fold["name"] for fold in record["folds"]] == ["PASCAL-5i fold 0 (test)"]
    assert json.loads((tmp_path / "scores" / "scores.json").read_text("utf-8")) == record
    lines = (tmp_path / "scores" / "episodes.csv").read_text("utf-8").splitlines()
    assert len(lines) == 4
    table = own_data(tmp_path)
    done = run("evaluate", "segmentation", network[0], table, *network[1:], "--ways", "2",
               "--episodes", "2", "--refine", "otsu", "--method", "sam:weights=signed")  # fmt: skip
    assert done.code == 0, done.err
    assert "2-way 1-shot" in done.out
    assert "blue" in done.out
    (tmp_path / "scene0.png").unlink()
    done = run("evaluate", "segmentation", network[0], table, *network[1:], "--episodes", "6",
               "--refine", "otsu")  # fmt: skip
    assert "of 6 episodes cannot be measured and are left out." in done.err


def test_the_commands_errors(voc: Path, fails: Callable[..., str], tmp_path: Path) -> None:
    network = ("timm:test_resnet", "--untrained", "--size", "64")
    start = ("evaluate", "segmentation", network[0])
    for arguments, code, record in (
        ((tmp_path / "nowhere",), 1, "nowhere"),
        ((tmp_path,), 1, "sub-folders"),
        ((voc, "--fold", "4"), 2, "0<=x<=3"),
        ((voc, "--masks", "alpha"), 2, "PASCAL-5i has its own"),
        ((voc, "--split", "all"), 2, "PASCAL-5i has its own"),
        ((tmp_path, "--fold", "1"), 2, "only PASCAL-5i has folds"),
        ((voc, "--method", "sum"), 2, "method"),
        ((voc, "--sure", "0.1", "--probable", "0.5"), 1, "thresholds"),
        ((voc, "--fold", "2"), 1, "found none in its test lists"),
        ((voc, "--fold", "0", "--shots", "9"), 1, "fewer shots"),
    ):
        assert record in fails(*start, *arguments, *network[1:], code=code)
    assert torch.is_grad_enabled()
