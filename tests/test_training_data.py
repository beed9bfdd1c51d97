"""From a data set to batches: checks, sampling, views that no number of processes changes."""

from __future__ import annotations

import pickle
import threading
import warnings
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import noise, oriented
from PIL import Image
from torch.utils.data import DataLoader

from simexplain.data.checking import check_training, check_views
from simexplain.data.datasets import DataSplit, read_dataset
from simexplain.data.folders import Record
from simexplain.data.images import pillow_quiet
from simexplain.data.preprocessing import Preprocess
from simexplain.data.training_set import (
    AUGMENTATIONS,
    Augmentation,
    ClassBalanced,
    Shuffled,
    TrainingImages,
)
from simexplain.errors import ImageError

SMALL = Preprocess(size=(48, 48), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def blob(path: Path, size: tuple[int, int] = (80, 60), centre: float = 0.5) -> Path:
    """A black soft spot that is opaque where it is: the picture on white is 1 - alpha."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    away = ((y / height - centre) / 0.3) ** 2 + ((x / width - 0.4) / 0.25) ** 2
    alpha = np.round(255 * np.exp(-away)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.merge("LA", (Image.new("L", (width, height)), Image.fromarray(alpha))).save(path)
    return path


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    result = []
    for number in range(6):
        size = (80, 60) if number % 2 else (50, 70)
        path = blob(tmp_path / f"{number}.png", size, 0.4 + 0.03 * number)
        result.append(Record(path, "ab"[number % 2], mask=path))
    return result


# ---------------------------------------------------------------- views


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("size", [(48, 48), (64, 32)])
def test_the_mask_moves_with_the_picture(
    records: list[Record], name: str, size: tuple[int, int]
) -> None:
    # A spot that is the negative of its alpha: picture and mask must stay each other's negative.
    still = replace(AUGMENTATIONS[name], erase=0.0, pad=0.0)
    views = TrainingImages(records, still, replace(SMALL, size=size), seed=3)
    away = mirrored = 0.0
    for index in range(len(records)):
        for repetition in range(3):
            sample = views[(0, index, repetition)]
            assert sample["image"].shape == (3, *size)
            assert sample["mask"].shape == size
            seen = torch.from_numpy(views.preprocess.undo(sample["image"])).float().mean(-1) / 255
            # Picture bilinear, mask nearest: half a pixel of a soft spot.
            torch.testing.assert_close(1 - seen, sample["mask"], atol=0.2, rtol=0)
            away += float((1 - seen - sample["mask"]).abs().mean())
            mirrored += float((1 - seen - sample["mask"].flip(-1)).abs().mean())
    assert away < 18 * 0.02
    assert away < mirrored / 4, "a mask that is not turned with its picture would show"


def test_padding_is_outside_of_the_object_and_erasing_leaves_the_mask(
    records: list[Record],
) -> None:
    whole = records[0].path.with_name("whole.png")
    Image.new("RGBA", (48, 48), (90, 20, 200, 255)).save(whole)
    record = [Record(whole, "a", mask=whole)]
    padded = Augmentation("", "", pad=0.2)
    views = TrainingImages(record, padded, SMALL)
    borders = 0
    for repetition in range(5):
        sample = views[(0, 0, repetition)]
        black = (views.preprocess.undo(sample["image"]) == 0).all(-1)
        assert np.array_equal(sample["mask"].numpy() == 0, black)
        borders += int(black.sum())
    assert borders > 0
    erased = TrainingImages(record, Augmentation("", "", erase=1.0), SMALL)[(0, 0, 0)]
    gone = (erased["image"] == 0).all(0)
    assert 0.02 * 0.8 < gone.float().mean() < 0.4 * 1.2
    assert bool((erased["mask"] == 1).all())


def test_erased_views_are_light_ones_with_a_rectangle_gone_half_the_time(
    records: list[Record],
) -> None:
    light, erased = (TrainingImages(records, name, SMALL, seed=1) for name in ("light", "erased"))
    gone = 0
    for index in range(len(records)):
        for repetition in range(6):
            whole, cut = (views[(0, index, repetition)]["image"] for views in (light, erased))
            changed = (whole != cut).any(0)
            assert bool((cut[:, changed] == 0).all())
            gone += int(changed.any())
    count = 6 * len(records)
    assert 0.25 * count < gone < 0.75 * count


def test_no_augmentation_is_what_evaluation_sees(records: list[Record], demo_paths) -> None:
    for fit in ("crop", "squash", "pad"):
        prepare = replace(SMALL, fit=fit, crop_fraction=0.875)
        views = TrainingImages([Record(demo_paths[0], "a")], "none", prepare)
        sample = views[(4, 0, 0)]
        expected, _ = prepare(Image.open(demo_paths[0]).convert("RGB"))
        torch.testing.assert_close(sample["image"], expected, atol=1e-6, rtol=0)
        assert bool(sample["mask"].isnan().all())


def test_turned_pictures_keep_white_white(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), "white").save(tmp_path / "white.png")
    views = TrainingImages([Record(tmp_path / "white.png", "a")], "light", SMALL)
    for repetition in range(8):
        pixels = SMALL.undo(views[(0, 0, repetition)]["image"])
        assert pixels.min() == 255, "no dark line where the turned picture ends"


def test_sizes_grow_with_the_input() -> None:
    picture = Image.new("RGB", (300, 500))
    squashed, _ = AUGMENTATIONS["avsl"].fixed(picture, None, Preprocess(size=(224, 224)))
    assert squashed.shape == (3, 256, 256)
    short, _ = AUGMENTATIONS["sam"].fixed(picture, None, Preprocess(size=(112, 112)))
    assert short.shape == (3, 213, 128)
    person, _ = AUGMENTATIONS["reid"].fixed(picture, None, Preprocess(size=(384, 128)))
    assert person.shape == (3, 384, 128)


def test_a_view_depends_on_seed_epoch_place_and_repetition_alone(records: list[Record]) -> None:
    views = TrainingImages(records, "avsl", SMALL, seed=1)
    first = views[(2, 3, 0)]["image"]
    torch.rand(7)
    before = torch.get_rng_state()
    assert torch.equal(views[(2, 3, 0)]["image"], first)
    assert torch.equal(torch.get_rng_state(), before)
    for other in ((3, 3, 0), (2, 5, 0), (2, 3, 1)):
        assert not torch.equal(views[other]["image"], first)
    for again in (
        TrainingImages(records, "avsl", SMALL, seed=1, cache_mb=0),
        pickle.loads(pickle.dumps(views)),  # noqa: S301 - its own
    ):
        assert torch.equal(again[(2, 3, 0)]["image"], first)
    assert not torch.equal(TrainingImages(records, "avsl", SMALL, 2)[(2, 3, 0)]["image"], first)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_what_one_process_gives(records: list[Record], workers: int) -> None:
    sampler = ClassBalanced([r.label for r in records], classes=2, each=2, seed=5)
    views = TrainingImages(records, "light", SMALL, seed=5)
    views[(0, 0, 0)]
    alone = list(DataLoader(views, batch_sampler=sampler.indices(1)))
    method = "spawn" if workers == 1 else "fork"
    loader = DataLoader(
        views,
        batch_sampler=sampler.indices(1),
        num_workers=workers,
        multiprocessing_context=method,
    )
    shared = list(loader)
    assert len(alone) == len(sampler)
    for one, other in zip(alone, shared, strict=True):
        assert set(one) == {"image", "label", "mask", "place"}
        assert one["image"].shape == (4, 3, 48, 48)
        for name in one:
            assert torch.equal(one[name], other[name])


def test_kept_pictures_stay_within_bounds(records: list[Record]) -> None:
    one = 48 * 48 * 4 / 2**20
    views = TrainingImages(records, "light", SMALL, cache_mb=2.5 * one)
    for index in range(6):
        views[(0, index, 0)]
    assert sorted(views._kept) == [0, 1]
    for record in records[:2]:
        record.path.unlink()
    views[(1, 0, 0)]
    with pytest.raises(ImageError, match="no file"):
        TrainingImages(records, "light", SMALL)[(0, 0, 0)]


def test_labels_are_numbers_of_sorted_classes(records: list[Record]) -> None:
    views = TrainingImages(records[::-1], "none", SMALL)
    assert views.classes == ("a", "b")
    assert views.labels == [1, 0] * 3
    assert [views[(0, index, 0)]["label"] for index in range(2)] == [1, 0]
    wide = TrainingImages(records, "none", SMALL, classes=("z", "b", "a"))
    assert wide.labels[:2] == [2, 1]
    with pytest.raises(ImageError, match="no label among"):
        TrainingImages([*records, Record(records[0].path)], "none", SMALL)
    with pytest.raises(ImageError, match="avsl, sam, light, erased, reid, pcb, none, got 'strong'"):
        TrainingImages(records, "strong", SMALL)


# ---------------------------------------------------------------- batches


LABELS = [str(n % 7) for n in range(40)] + ["small"]


def test_batches_hold_so_many_classes_and_pictures() -> None:
    sampler = ClassBalanced(LABELS, classes=3, each=4, seed=1)
    for epoch in range(3):
        batches = sampler.batches(epoch)
        assert len(batches) == len(sampler) == 4
        for batch in batches:
            labels = [LABELS[index] for index in batch]
            assert len(set(labels)) == 3
            assert all(len(set(labels[at : at + 4])) == 1 for at in (0, 4, 8))
            for label in set(labels) - {"small"}:
                mine = [index for index in batch if LABELS[index] == label]
                assert len(set(mine)) == 4, "different pictures where there are enough"
        drawn = Counter(LABELS[index] for index in chain(*batches))
        assert set(drawn) == set(LABELS), "every class in every epoch"
        assert max(drawn.values()) - min(drawn.values()) <= 4, "one turn more at most"


def test_an_epoch_is_drawn_again_alike() -> None:
    sampler = ClassBalanced(LABELS, classes=3, each=2, seed=1, steps=9)
    assert len(sampler.batches(4)) == 9
    assert sampler.batches(4) == ClassBalanced(LABELS, 3, 2, 1, 9).batches(4)
    assert sampler.batches(4) != sampler.batches(5)
    assert sampler.batches(4) != ClassBalanced(LABELS, 3, 2, 2, 9).batches(4)


def test_all_pictures_of_a_class_come_before_one_comes_again() -> None:
    sampler = ClassBalanced(["a"] * 5 + ["b"] * 2, classes=2, each=2, steps=5)
    count = Counter(chain(*sampler.batches(0)))
    assert {count[index] for index in range(5)} == {2}
    assert {count[index] for index in (5, 6)} == {5}


def test_many_small_classes_are_all_covered() -> None:
    labels = [str(n) for n in range(50)]
    sampler = ClassBalanced(labels, classes=8, each=4)
    assert len(sampler) == 7
    drawn = Counter(labels[index] for index in chain(*sampler.batches(0)))
    assert set(drawn) == set(labels)
    assert set(drawn.values()) <= {4, 8}


@pytest.mark.parametrize("world", [1, 2, 3, 6])
@pytest.mark.parametrize(
    "sampler",
    [ClassBalanced(LABELS, classes=3, each=4, seed=1), Shuffled(40, 12, seed=1)],
    ids=["balanced", "shuffled"],
)
def test_ranks_together_are_the_whole_batch(sampler: ClassBalanced | Shuffled, world: int) -> None:
    ranks = [sampler.of_rank(rank, world) for rank in range(world)]
    assert all(len(rank) == len(sampler) for rank in ranks)
    for parts, whole in zip(
        zip(*(rank.indices(2) for rank in ranks), strict=True), sampler.indices(2), strict=True
    ):
        assert {len(part) for part in parts} == {12 // world}
        assert list(chain(*parts)) == whole
    flat = list(chain(*sampler.indices(2)))
    assert len(set(flat)) == len(flat), "no view twice in an epoch"
    assert [index for _, index, _ in flat] == list(chain(*sampler.batches(2)))


def test_shuffled_takes_each_picture_once() -> None:
    batches = Shuffled(10, 3, seed=0).batches(0)
    assert [len(batch) for batch in batches] == [3, 3, 3]
    assert len(set(chain(*batches))) == 9


def test_batches_that_cannot_be() -> None:
    with pytest.raises(ImageError, match="at least 9 classes for batches of as many, got 8"):
        ClassBalanced(LABELS, classes=9, each=2)
    with pytest.raises(ImageError, match="2 processes can share equally, got 9"):
        ClassBalanced(LABELS, classes=3, each=3).of_rank(0, 2)
    with pytest.raises(ImageError, match="at least one class"):
        ClassBalanced(LABELS, classes=3, each=0)
    with pytest.raises(ImageError, match="batches of 1 to 4 pictures"):
        Shuffled(4, 5)


# ---------------------------------------------------------------- checks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate("abcd"):
        for picture in range(3):
            blob(tmp_path / "set" / name / f"{picture}.png", centre=0.2 * number + 0.05 * picture)
    return tmp_path / "set"


def refused(split: DataSplit, **options: object) -> str:
    settings = {"classes": 2, "each": 2, **options}
    with pytest.raises(ImageError) as caught:
        check_training(split, **settings)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_good_data_pass_without_a_word(folder: Path) -> None:
    calls = []
    split = read_dataset("folder", folder, masks="alpha")
    seen = check_training(split, classes=2, each=2, progress=lambda *at: calls.append(at))
    assert seen == ()
    assert calls[0] == (1, 12)
    assert calls[-1] == (12, 12)


def test_all_that_is_wrong_is_told_at_once(folder: Path) -> None:
    noise(90, 90).save(folder / "a" / "cut.jpg")
    cut = folder / "a" / "cut.jpg"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (folder / "a" / "1 (2).png").write_text("no picture")
    (folder / "b" / "0.png").unlink()
    (folder / "b" / "1.png").unlink()
    (folder / "bare").mkdir()
    blob(folder / "loose.png")
    split = read_dataset("folder", folder, strict=False)
    split = replace(split, queries=(*split.queries, split.train[0]))
    text = refused(split, classes=8)
    for expected in (
        "'set' cannot be trained on, 6 problems: ",
        "no class for 'loose.png'",
        "1 class folder without a picture: 'bare'",
        "1 class to train on with a single picture, which has no positive: 'b'",
        "2 classes to train on where a batch needs 8",
        "1 picture both to train on and to test: 'a/0.png'",
        "2 pictures that cannot be read: a/1 (2).png is not a picture in a format that can be "
        "read, a/cut.jpg is damaged or cut off (image file is truncated",
    ):
        assert expected in text


def test_long_lists_are_cut_short(folder: Path) -> None:
    for number in range(20):
        (folder / "a" / f"x{number:02d}.jpg").write_bytes(b"")
    text = refused(read_dataset("folder", folder))
    assert text.count(".jpg") == 3
    assert "20 pictures that cannot be read" in text
    assert "and 17 more" in text


def test_masks_must_fit(folder: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    for name in ("a/0", "a/1", "b/0"):
        (masks / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (60, 80)).save(masks / f"{name}.png")
    split = read_dataset("folder", folder, masks=masks)
    (warning,) = check_training(split, classes=2, each=2)
    assert warning.startswith("3 of 6 pictures have no mask: 'a/2.png', 'b/1.png', 'b/2.png'")
    Image.new("L", (60, 60)).save(masks / "a" / "1.png")
    (masks / "b" / "0.png").write_bytes(b"\x89PNG")
    (masks / "a" / "0.png").unlink()
    text = refused(split)
    assert (
        "3 pictures whose mask does not fit: a/0.png: is not there, a/1.png: 60x80 expected, 60x60"
        in text
    )
    assert "b/0.png: The mask cannot be read (" in text


def test_what_is_only_odd_is_a_warning(folder: Path) -> None:
    split = read_dataset("folder", folder)
    (folder / "c" / "0.png").write_bytes((folder / "a" / "0.png").read_bytes())
    overlapping = replace(split, queries=(*split.queries, replace(split.queries[1], label="a")))
    result = " ".join(check_training(overlapping, classes=2, each=4))
    assert (
        "2 classes with fewer than 4 pictures, which are repeated in a batch: 'a', 'b'." in result
    )
    assert "1 class both to train on and to test" in result
    assert "1 test picture without another of the class to be found: 'c/1.png'." in result
    assert "1 test picture with the same content as one to train on: 'c/0.png'." in result
    alone = replace(split, queries=())
    assert "nothing can be evaluated" in check_training(alone, classes=2, each=2)[0]


def test_a_single_picture_is_enough_where_nothing_is_paired(folder: Path) -> None:
    (folder / "a" / "1.png").unlink()
    (folder / "a" / "2.png").unlink()
    split = read_dataset("folder", folder)
    assert "which has no positive: 'a'" in refused(split)
    assert check_training(split, classes=2, each=1) == ()


def test_pictures_that_were_turned_have_masks_in_their_upright_size(tmp_path: Path) -> None:
    result = []
    for label in "aabb":
        path = tmp_path / f"{len(result)}.jpg"
        oriented(noise(32, 48, seed=len(result)), 6, path)
        mask = tmp_path / f"{len(result)}.png"
        Image.new("L", (48, 32), 255).save(mask)
        result.append(Record(path, label, mask=mask))
    split = DataSplit(tuple(result), (), root=tmp_path)
    check_training(split, classes=2, each=2)
    sample = TrainingImages(result, "light", SMALL)[(0, 0, 0)]
    assert float(sample["mask"].max()) == 1.0


def test_a_shallow_look_only_asks_whether_files_are_there(folder: Path) -> None:
    (folder / "a" / "1.png").write_text("no picture")
    split = read_dataset("folder", folder)
    assert check_training(split, classes=2, each=2, deep=False) == ()
    (folder / "a" / "2.png").unlink()
    assert "a/2.png is not there" in refused(split, deep=False)


# ---------------------------------------------------------------- other threads


def test_pythons_warnings_are_as_before(folder: Path) -> None:
    split = read_dataset("folder", folder, masks="alpha", strict=False)
    before, filters = warnings.filters, list(warnings.filters)
    for _ in range(20):  # threads meet by chance
        check_training(split, classes=2, each=2)
    assert warnings.filters is before
    assert warnings.filters == filters


def test_pillow_is_quiet_while_any_thread_reads() -> None:
    before, filters = warnings.filters, list(warnings.filters)
    inside, leave = threading.Barrier(3), threading.Event()

    def read() -> None:
        with pillow_quiet():
            inside.wait(10)
            leave.wait(10)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    inside.wait(10)
    with warnings.catch_warnings(record=True) as heard:  # whose lists of filters are copies
        warnings.warn_explicit("damaged", UserWarning, "Image.py", 1, module="PIL.Image")
        warnings.warn_explicit("other", UserWarning, "mine.py", 1, module="mine")
        leave.set()
        for thread in threads:
            thread.join(10)
        warnings.simplefilter("always")
        warnings.warn_explicit("after", UserWarning, "Image.py", 2, module="PIL.Image")
    assert [str(one.message) for one in heard][-1] == "after"
    assert "damaged" not in [str(one.message) for one in heard]
    assert warnings.filters is before
    assert warnings.filters == filters


def test_elongated_pictures_are_told_beforehand(folder: Path) -> None:
    Image.new("RGB", (900, 5)).save(folder / "a" / "long.png")
    Image.new("RGB", (5, 900)).save(folder / "d" / "tall.png")
    split = read_dataset("folder", folder)
    check_training(split, classes=2, each=2)  # they can be read
    record = (
        r"2 pictures too elongated .*: a/long.png of 900x5, d/tall.png of 5x900; crop or remove"
    )
    with pytest.raises(ImageError, match=record):
        check_views(split, SMALL, AUGMENTATIONS["none"])
    with pytest.raises(ImageError, match=r"1 picture too elongated .*: d/tall.png of 5x900"):
        check_views(split, SMALL, AUGMENTATIONS["sam"])
    check_views(split, replace(SMALL, fit="pad"), AUGMENTATIONS["none"])
    check_views(replace(split, queries=()), SMALL, AUGMENTATIONS["sam"])
