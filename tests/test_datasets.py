"""Data sets in the layouts that they are published in, written small."""

from __future__ import annotations

from pathlib import Path

import pytest
from pictures import noise

from simexplain.data.datasets import DATASETS, DataSplit, read_dataset
from simexplain.data.folders import Record
from simexplain.errors import ImageError


def put(*paths: Path) -> None:
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(8, 8, seed=number).save(path)


def told(records: tuple[Record, ...] | None, root: Path) -> list[tuple[str, str | None]]:
    assert records is not None
    return [(record.path.relative_to(root).as_posix(), record.label) for record in records]


def refused(*args: object, **options: object) -> str:
    with pytest.raises(ImageError) as caught:
        read_dataset(*args, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    put(*(tmp_path / "set" / name / f"{n}.png" for name in "dabce" for n in range(2)))
    return tmp_path / "set"


@pytest.mark.parametrize(
    ("share", "train"), [(0.5, "ab"), (0.6, "abc"), (0.01, "a"), (0.99, "abcd")]
)
def test_the_first_classes_by_name_train_and_the_others_test(
    folder: Path, share: float, train: str
) -> None:
    split = read_dataset("folder", folder, train_share=share)
    assert split.classes == tuple(train)
    assert {record.label for record in split.queries} == set("abcde") - set(train)
    assert len(split.train) + len(split.queries) == 10
    assert split.gallery is None
    assert split.name == "set"


def test_shares_are_not_spoilt_by_rounding(tmp_path: Path) -> None:
    put(*(tmp_path / f"{n:03d}" / "x.png" for n in range(100)))
    assert len(read_dataset("folder", tmp_path, train_share=0.29).classes) == 29


def test_parts_in_folders_of_their_own(tmp_path: Path) -> None:
    put(*(tmp_path / part / name / "1.png" for part in ("train", "test") for name in "ab"))
    split = read_dataset("folder", tmp_path)
    assert told(split.train, tmp_path) == [("train/a/1.png", "a"), ("train/b/1.png", "b")]
    assert told(split.queries, tmp_path) == [("test/a/1.png", "a"), ("test/b/1.png", "b")]
    assert split.gallery is None
    put(*(tmp_path / part / "c" / "2.png" for part in ("query", "gallery")))
    split = read_dataset("folder", tmp_path)
    assert told(split.queries, tmp_path) == [("query/c/2.png", "c")]
    assert told(split.gallery, tmp_path) == [("gallery/c/2.png", "c")]
    assert len(split.train) == 2


def test_classes_may_be_called_train_and_test(tmp_path: Path) -> None:
    put(*(tmp_path / name / f"{n}.png" for name in ("test", "train", "bus") for n in range(2)))
    split = read_dataset("folder", tmp_path)
    assert split.classes == ("bus",)
    assert {record.label for record in split.queries} == {"test", "train"}


def test_what_is_odd_in_folders(folder: Path) -> None:
    put(folder / "loose.png")
    (folder / "empty").mkdir()
    split = read_dataset("folder", folder, strict=False)
    assert split.problems == ("no class for 'loose.png', which lie beside the class folders",)
    assert split.empty == ("empty",)
    assert "no class for 'loose.png'" in refused("folder", folder)
    assert "all pictures lie directly in it" in refused("folder", folder / "a")
    assert "is none; check the path" in refused("folder", folder / "nowhere")
    assert "between 0 and 1, got 1.0" in refused("folder", folder, train_share=1.0)
    assert "folder, csv, cub" in refused("mnist", folder)


def test_groups_by_name_or_by_rule(folder: Path) -> None:
    by_name = read_dataset("folder", folder, group="name")
    assert [record.group for record in by_name.train] == ["0", "1"] * 2
    by_rule = read_dataset("folder", folder, group=r"^(.)/")
    assert all(record.group == record.label for record in by_rule.queries)
    text = refused("folder", folder, group="(1)[.]png")
    assert "does not match 'a/0.png', 'b/0.png', 'c/0.png' and 2 more" in text
    assert "not a regular expression" in refused("folder", folder, group="(")
    assert "with 0" in refused("folder", folder, group="vendor")
    assert "has its own groups or none" in refused("cub", folder, group="name")


def test_masks_from_a_folder_or_from_alpha(folder: Path, tmp_path: Path) -> None:
    own = read_dataset("folder", folder, masks="alpha")
    assert all(record.mask == record.path for record in (*own.train, *own.queries))
    # Inside the data set, which makes it no class.
    masks = folder / "masks"
    put(masks / "a" / "0.png", masks / "d" / "1.bmp")
    split = read_dataset("folder", folder, masks=masks)
    assert [record.mask for record in split.train] == [masks / "a" / "0.png", None, None, None]
    assert split.classes == ("a", "b")
    assert not split.empty
    assert [r.mask for r in split.queries if r.label == "d"] == [None, masks / "d" / "1.bmp"]
    (tmp_path / "nothing").mkdir()
    assert "no picture has a mask" in refused("folder", folder, masks=tmp_path / "nothing")
    assert "is not a folder" in refused("folder", folder, masks=tmp_path / "gone")


def test_a_table_with_all_columns(folder: Path) -> None:
    table = folder / "list.csv"
    table.write_text(
        "\ufefflabel,path,split,group,mask\n"
        "x, a/0.png ,train,g,a/1.png\ny,b/0.png,train,,alpha\n"
        "z,c/0.png,query,h,\nz,d/0.png,gallery,,\n",
        encoding="utf-8",
    )
    split = read_dataset("csv", table)
    first, second = split.train
    assert first == Record(folder / "a/0.png", "x", "g", folder / "a/1.png")
    assert second == Record(folder / "b/0.png", "y", None, folder / "b/0.png")
    assert split.queries == (Record(folder / "c/0.png", "z", "h"),)
    assert split.gallery == (Record(folder / "d/0.png", "z"),)
    assert split.name == "list"


def test_a_table_without_a_split_is_split_by_classes(folder: Path) -> None:
    table = folder / "list.csv"
    rows = [f"{name}/{n}.png,{name}" for name in "abcde" for n in range(2)]
    table.write_text("path,label\n" + "\n".join(rows), encoding="utf-8")
    split = read_dataset("csv", table, train_share=0.6, group="name")
    assert split.classes == ("a", "b", "c")
    assert [record.group for record in split.queries] == ["0", "1", "0", "1"]


@pytest.mark.parametrize("other", ["./b/../a/0.png", "linked.png"])
def test_one_picture_under_two_names_is_listed_repeatedly(folder: Path, other: str) -> None:
    (folder / "linked.png").symlink_to(folder / "a" / "0.png")
    table = folder / "list.csv"
    table.write_text(f"path,label\na/0.png,a\n{other},a\nb/0.png,b\nb/1.png,b\n", encoding="utf-8")
    assert "1 listed repeatedly: 'a/0.png'" in refused("csv", table)


def test_a_table_that_does_not_match_is_told_all_at_once(folder: Path) -> None:
    table = folder / "list.csv"
    table.write_text(
        "path,label,colour,split\na/0.png,a,red,train\na/0.png,b,red,train\ngone.png,a,,train\n"
        "a/1.png,,,train\n,a,,train\nb/0.png,a,,valid\nb/1.png,a\n",
        encoding="utf-8",
    )
    text = refused("csv", table)
    for expected in (
        "unknown columns 'colour' (known: path, label, split, group, mask)",
        "1 listed repeatedly: 'a/0.png'",
        "no label in line 5",
        "no path in line 6",
        "a split other than train, test, query, gallery in line 7",
        "another number of cells than columns in line 8",
        "1 picture not there: 'gone.png'",
    ):
        assert expected in text
    # Told by check_training, together with what else is wrong.
    assert len(read_dataset("csv", table, strict=False).problems) == 6


def test_files_that_are_no_table(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "x.csv"
    for content, expected in (
        ("file,label\na,b\n", "got file, label"),
        ("", "got nothing"),
        ("path,label,label\na,b,c\n", "each once"),
        ("path,label\n", "found none below its header"),
    ):
        table.write_text(content, encoding="utf-8")
        assert expected in refused("csv", table)
    table.write_bytes(b"path,label\n\xff\xfe,a\n")
    assert "not a CSV file in UTF-8" in refused("csv", table)
    assert "Expected a CSV file" in refused("csv", folder)
    table.write_text("path,label,split\na,b,test\nc,d,gallery\n", encoding="utf-8")
    assert "got both" in refused("csv", table)


# ---------------------------------------------------------------- the papers' data sets


def lines(path: Path, *content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in content), encoding="utf-8")


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    pytest.importorskip("pytorch_metric_learning")
    inner = tmp_path / "CUB_200_2011"
    names = ["001.Albatross/A_1.jpg", "100.Pelican/P_2.jpg", "101.Auk/U_3.jpg", "200.Wren/W_4.jpg"]
    lines(inner / "images.txt", *(f"{n + 1} {name}" for n, name in enumerate(names)))
    lines(inner / "image_class_labels.txt", "1 1", "2 100", "3 101", "4 200")
    put(*(inner / "images" / name for name in names))
    return tmp_path


@pytest.mark.parametrize("inside", ["", "CUB_200_2011"])
def test_cub_first_hundred_species_train(cub: Path, inside: str) -> None:
    split = read_dataset("cub", cub / inside)
    root = cub / "CUB_200_2011" / "images"
    assert told(split.train, root) == [
        ("001.Albatross/A_1.jpg", "001.Albatross"),
        ("100.Pelican/P_2.jpg", "100.Pelican"),
    ]
    assert [record.label for record in split.queries] == ["101.Auk", "200.Wren"]
    assert split.gallery is None
    put(cub / "segmentations" / "001.Albatross" / "A_1.png")
    with_masks = read_dataset("cub", cub, masks=cub / "segmentations")
    assert [bool(record.mask) for record in with_masks.train] == [True, False]


def test_cub_lists_that_do_not_match(cub: Path) -> None:
    inner = cub / "CUB_200_2011"
    lines(inner / "image_class_labels.txt", "1 1", "2 1", "9 101", "4 200")
    (inner / "images" / "001.Albatross" / "A_1.jpg").unlink()
    text = refused("cub", cub)
    assert "class numbers that do not match the folders ('100.Pelican')" in text
    assert "images.txt lists 4 pictures, but only 3 of them have a class" in text
    assert "1 picture not there: '001.Albatross/A_1.jpg'" in text
    (inner / "images.txt").unlink()
    assert "Expected CUB with CUB_200_2011/images.txt" in refused("cub", cub)


def test_cars_first_98_models_train(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_metric_learning")
    lines(tmp_path / "names.csv", *(f"Car {n}/x" for n in range(1, 197)))
    lines(tmp_path / "anno_train.csv", "1.jpg,0,0,9,9,98", "2.jpg,0,0,9,9,99")
    lines(tmp_path / "anno_test.csv", "3.jpg,0,0,9,9,1", "4.jpg,0,0,9,9,196")
    cars = tmp_path / "car_data" / "car_data"
    put(cars / "train/Car 98-x/1.jpg", cars / "train/Car 99-x/2.jpg")
    put(cars / "test/Car 1-x/3.jpg", cars / "test/Car 196-x/4.jpg")
    split = read_dataset("cars", tmp_path)
    assert told(split.train, cars) == [
        ("train/Car 98-x/1.jpg", "Car 98-x"),
        ("test/Car 1-x/3.jpg", "Car 1-x"),
    ]
    assert [record.label for record in split.queries] == ["Car 99-x", "Car 196-x"]


def test_the_other_layout_of_cars_is_named(tmp_path: Path) -> None:
    (tmp_path / "cars_annos.mat").touch()
    assert "write their paths and labels into a CSV file" in refused("cars", tmp_path)


def test_sop_takes_the_authors_lists(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_metric_learning")
    inner = tmp_path / "Stanford_Online_Products"
    header = "image_id class_id super_class_id path"
    lines(
        inner / "Ebay_train.txt",
        header,
        "1 1 1 bicycle_final/1_0.JPG",
        "2 1 1 bicycle_final/1_1.JPG",
    )
    lines(inner / "Ebay_test.txt", header, "3 11319 1 chair_final/2_0.JPG")
    put(inner / "bicycle_final/1_0.JPG", inner / "bicycle_final/1_1.JPG")
    put(inner / "chair_final/2_0.JPG")
    for root in (tmp_path, inner):
        split = read_dataset("sop", root)
        assert told(split.train, inner) == [
            ("bicycle_final/1_0.JPG", "1"),
            ("bicycle_final/1_1.JPG", "1"),
        ]
        assert told(split.queries, inner) == [("chair_final/2_0.JPG", "11319")]


def persons(root: Path, suffix: str, names: dict[str, list[str]]) -> DataSplit:
    for part, result in names.items():
        put(*(root / part / f"{name}{suffix}" for name in result))
    return read_dataset("market1501", root, strict=False)


def test_market_has_persons_cameras_junk_and_distractors(tmp_path: Path) -> None:
    split = persons(
        tmp_path,
        ".jpg",
        {
            "bounding_box_train": ["0002_c1s1_000451_03", "0002_c6s4_000776_01"],
            "query": ["0001_c1s1_001051_00"],
            "bounding_box_test": [
                "-1_c3s1_000001_01",
                "0000_c4s6_018216_01",
                "0001_c1s1_002301_02",
                "0001_c2s1_000301_00",
                "portrait",
            ],
        },
    )
    assert [(r.label, r.group) for r in split.train] == [("0002", "0002_c1"), ("0002", "0002_c6")]
    assert [(r.label, r.group) for r in split.queries] == [("0001", "0001_c1")]
    assert [(r.label, r.group) for r in split.gallery or ()] == [
        ("0000", "0000_c4"),
        ("0001", "0001_c1"),
        ("0001", "0001_c2"),
    ]
    wanted = "names without person and camera: 'bounding_box_test/portrait.jpg'"
    assert split.problems == (wanted,)
    assert "'bounding_box_train', 'query' and" not in refused("market1501", tmp_path)
    assert "are not there" in refused("market1501", tmp_path / "query")


def test_cuhk03_in_its_new_protocol(tmp_path: Path) -> None:
    names = {"bounding_box_train": ["0003_c1_1", "0003_c2_6"], "query": ["0001_c1_2"]}
    names["bounding_box_test"] = ["0001_c2_7"]
    for kind in ("detected", "labeled"):
        persons(tmp_path / kind, ".png", names)
    split = read_dataset("cuhk03", tmp_path / "labeled")
    assert split.name == "CUHK03-NP labeled"
    assert [(r.label, r.group) for r in split.train] == [("0003", "0003_c1"), ("0003", "0003_c2")]
    assert [(r.label, r.group) for r in split.gallery or ()] == [("0001", "0001_c2")]
    text = refused("cuhk03", tmp_path)
    assert "detected' or " in text


def test_every_kind_says_what_it_is() -> None:
    for kind in DATASETS.values():
        assert kind.about
        assert kind.layout
        assert not kind.about.endswith(".")


@pytest.mark.parametrize("held", ["test", "val", "valid", "validation"])
def test_held_out_pictures_may_lie_under_other_names(tmp_path: Path, held: str) -> None:
    put(*(tmp_path / part / name / "1.png" for part in ("train", held) for name in "ab"))
    split = read_dataset("folder", tmp_path)
    assert told(split.train, tmp_path) == [("train/a/1.png", "a"), ("train/b/1.png", "b")]
    assert told(split.queries, tmp_path) == [(f"{held}/a/1.png", "a"), (f"{held}/b/1.png", "b")]
    assert split.has_split


def test_val_beside_test_is_left_alone(tmp_path: Path) -> None:
    put(*(tmp_path / part / name / "1.png" for part in ("train", "val", "test") for name in "ab"))
    split = read_dataset("folder", tmp_path)
    assert {path.split("/")[0] for path, _ in told(split.queries, tmp_path)} == {"test"}
    assert len(split.train) == 2


def test_a_stray_picture_in_a_part_is_named(tmp_path: Path) -> None:
    put(*(tmp_path / part / name / "1.png" for part in ("train", "test") for name in "ab"))
    put(tmp_path / "train" / "stray.png")
    assert "no class for 'train/stray.png', which lie beside" in refused("folder", tmp_path)
    split = read_dataset("folder", tmp_path, strict=False)
    assert split.classes == ("a", "b")
    assert len(split.problems) == 1


def test_a_table_with_other_signs_between_its_columns_is_told(tmp_path: Path) -> None:
    for sign, what in ((";", "semicolons"), ("\t", "tabs")):
        table = tmp_path / "x.csv"
        table.write_text(f"path{sign}label\na{sign}b\n", encoding="utf-8")
        assert f"parted by {what}, save it with commas" in refused("csv", table)
    table.write_text("file,label\na,b\n", encoding="utf-8")
    assert "correct its first line" in refused("csv", table)
