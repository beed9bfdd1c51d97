"""Folders of pictures: what is found, labels, batches, broken files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from simexplain.data.folders import Batches, Record, left_out_of, pictures_in
from simexplain.data.images import read_pages, read_picture
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ComparisonError, ImageError
from simexplain.evaluation.items import read_comparisons, read_mask

SMALL = Preprocess(size=(16, 16))


def picture(path: Path, colour: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (colour, 255 - colour, 60)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("b/2.png", "b/1.JPG", "a/x/deep.png", "a/y.webp")):
        picture(tmp_path / name, 40 * number)
    picture(tmp_path / ".hidden" / "z.png")
    picture(tmp_path / "a" / ".thumb.png")
    (tmp_path / "a" / "notes.txt").write_text("not a picture")
    return tmp_path


def test_classes_are_the_first_folders_in_order(folder: Path) -> None:
    records = pictures_in(folder, labelled=True)
    names = [(record.path.relative_to(folder).as_posix(), record.label) for record in records]
    assert names == [("a/x/deep.png", "a"), ("a/y.webp", "a"), ("b/1.JPG", "b"), ("b/2.png", "b")]


def test_class_folders_may_be_links(folder: Path, tmp_path_factory) -> None:
    linked = tmp_path_factory.mktemp("linked")
    for name in "ab":
        (linked / name).symlink_to(folder / name, target_is_directory=True)
    assert len(pictures_in(linked, labelled=True)) == 4


def test_without_labels_every_picture_counts(folder: Path) -> None:
    picture(folder / "loose.png")
    records = pictures_in(str(folder), labelled=False)
    assert len(records) == 5
    assert all(record.label is None for record in records)


def test_what_is_wrong_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is none; check the path"):
        pictures_in(tmp_path / "nowhere", labelled=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="found none"):
        pictures_in(tmp_path / "empty", labelled=False)
    picture(folder / "single" / "x" / "only.png")
    with pytest.raises(ImageError, match=r"only 'x'.*--unlabelled"):
        pictures_in(folder / "single", labelled=True)
    picture(folder / "loose.png")
    with pytest.raises(ImageError, match=r"'loose\.png' beside them"):
        pictures_in(folder, labelled=True)


def test_batches_keep_order_and_leave_broken_pictures_out(folder: Path) -> None:
    (folder / "a" / "y.webp").write_bytes(b"RIFF broken")
    records = pictures_in(folder, labelled=True)
    batches = Batches(records, SMALL, size=3)
    for _ in range(2):
        result = list(batches)
        assert [places for places, _ in result] == [[0, 2], [3]]
        assert list(batches.broken) == [folder / "a" / "y.webp"]
    assert len(batches) == 2
    expected = SMALL(Image.open(records[3].path).convert("RGB"))[0]
    torch.testing.assert_close(result[1][1][0], expected)
    assert [places for places, _ in batches.over([3, 0])] == [[3, 0]]


def test_a_batch_of_broken_pictures_only_is_no_batch(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    records = [Record(tmp_path / "x.png"), Record(tmp_path / "gone.png")]
    batches = Batches(records, SMALL)
    assert list(batches) == []
    assert len(batches.broken) == 2


def results(folder: Path) -> list[Path]:
    """One of every kind of figure that simexplain writes, as its own code writes it."""
    from conftest import TinyNet

    from simexplain import as_similarity_model, compare, explain, explain_batch, match, search
    from simexplain.batching.planning import BatchOptions

    torch.manual_seed(0)
    model = as_similarity_model(TinyNet().eval(), preprocess=SMALL, name="tiny")
    pair = [picture(folder / "b" / "2.png", 0), picture(folder / "b" / "3.png", 90)]
    result = folder / "a" / "found"
    explain(model, pair, arch="siamese").save(result / "explanation")
    match(model, *pair).save(result / "matching")
    compare(model, pair, ["sam"], arch="siamese", curve_steps=2).save(result / "comparison")
    table = folder / "table.csv"
    table.write_text("anchor,positives\nb/2.png,b/3.png\n")
    explain_batch(model, table, result / "batch", how=BatchOptions(pictures=True, figures=True))
    search(model, pair[0], folder / "b").save(folder / "b")
    return pair


def test_figures_of_results_are_left_out_and_own_pictures_beside_them_are_not(
    folder: Path,
) -> None:
    pytest.importorskip("faiss")
    before = {record.path for record in pictures_in(folder, labelled=True)}
    assert "simexplain wrote" not in left_out_of(folder)
    added = set(results(folder))
    own = picture(folder / "a" / "found" / "explanation" / "mine.png")
    result = {record.path for record in pictures_in(folder, labelled=True)}
    assert result == before | added | {own}
    printed = left_out_of(folder)
    shown = [
        p for p in folder.rglob("*.png") if "/." not in p.relative_to(folder.parent).as_posix()
    ]
    assert int(printed.split()[2]) == len(set(shown) - result)
    assert str(folder / "a" / "found") in printed


def test_a_table_that_is_no_manifest_hides_nothing(folder: Path) -> None:
    (folder / "b" / "search.json").write_text('{"files": {"figure": "2.png"}}')
    (folder / "b" / "results.json").write_text("[1]")
    (folder / "b" / "own.json").write_text('{"schema": 1, "files": {"figure": "2.png"}}')
    assert len(pictures_in(folder, labelled=True)) == 4


def save_as(path: Path, kind: str) -> Path:
    """A picture in a format of Pillow, whatever its ending."""
    with Image.open(picture(path.with_name("for-now.png"))) as opened:
        opened.convert("L" if kind in ("PPM", "SPIDER") else "RGB").save(path, kind)
    path.with_name("for-now.png").unlink()
    return path


@pytest.mark.parametrize(
    ("ending", "kind"),
    [(".pgm", "PPM"), (".jpe", "JPEG"), (".tga", "TGA"), (".jp2", "JPEG2000"), (".ico", "ICO"),
     (".avif", "AVIF"), (".mpo", "MPO"), (".qoi", "QOI"), (".PNG", "PNG"), ("", "PNG")],
)  # fmt: skip
def test_pictures_of_every_ending_are_read(folder: Path, ending: str, kind: str) -> None:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"Pillow here does not write {kind}")
    own = save_as(folder / "b" / f"other{ending}", kind)
    result = [record.path for record in pictures_in(folder, labelled=True)]
    assert own in result
    assert read_picture(own).image.size[0] > 0
    assert left_out_of(folder) == "Left out: files that are not pictures (.txt 1)."


def test_what_is_no_picture_is_named(folder: Path) -> None:
    for name in ("a/more.txt", "b/clip.mp4", "b/README", "b/drawing.eps"):
        (folder / name).write_text("%!PS-Adobe-3.0 EPSF-3.0")
    for name in ("empty", ".git"):
        (folder / name).mkdir()
    before = len(pictures_in(folder, labelled=True))
    record = left_out_of(folder)
    assert record.startswith("Left out: files that are not pictures (")
    assert "(.eps 1, .mp4 1, .txt 2, no ending 1);" in record
    assert record.endswith("folders without a picture, empty.")
    assert before == len(pictures_in(folder, labelled=True))


def test_a_folder_without_pictures_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ImageError, match=r"found none.*\.txt 1"):
        pictures_in(tmp_path, labelled=False)


@pytest.mark.parametrize("name", ["pipe.png", "pipe.tif", "pipe.npy", "pipe"])
def test_pipes_and_devices_are_refused_at_once(folder: Path, name: str) -> None:
    os.mkfifo(folder / "b" / name)
    for path in (folder / "b" / name, Path("/dev/zero")):
        for reads in (read_picture, read_pages, lambda own: read_mask(own, (4, 4))):
            with pytest.raises(ImageError, match="pipe or a device"):
                reads(path)
    assert all(record.path.name != name for record in pictures_in(folder, labelled=True))


def test_no_other_program_reads_a_mask(tmp_path: Path) -> None:
    mask = tmp_path / "mask.eps"
    mask.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n")
    with pytest.raises(ImageError, match="cannot identify image file"):
        read_mask(mask, (4, 4))


def test_tables_are_read_from_files_alone(tmp_path: Path) -> None:
    """A pipe that nobody writes to would be waited for, a device would never end."""
    os.mkfifo(tmp_path / "pipe.csv")
    for path in (tmp_path / "pipe.csv", Path("/dev/zero")):
        with pytest.raises(ComparisonError, match=r"Expected a CSV file, but .* a pipe or a dev"):
            read_comparisons(path)
