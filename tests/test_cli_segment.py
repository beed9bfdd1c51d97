"""``simexplain segment`` end to end, good and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_runs import FAST, NETWORK, Run, process
from conftest import DEMO
from PIL import Image

from simexplain import Segmentation, load_model, segment

QUICK = (NETWORK, "a.png", "b.jpg", *FAST)
CONTRACT = {
    "schema", "by", "refine", "method", "model", "layers", "test", "supports", "others", "share",
    "box", "options", "warnings", "files", "versions",
}  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's cat found on its positive, by the network that comes with its weights."""
    folder = tmp_path_factory.mktemp("segment")
    done = process(
        "segment", "timm:tf_efficientnet_lite0", DEMO / "positive.jpg", DEMO / "anchor.jpg",
        "--other", DEMO / "negative.jpg", "--out", "found", "--json", cwd=folder,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.err == ""
    (folder / "said.json").write_text(done.out, encoding="utf-8")
    return folder


def test_the_json_is_the_contract_and_the_manifest(work: Path) -> None:
    record = json.loads((work / "said.json").read_text(encoding="utf-8"))
    assert set(record) >= CONTRACT
    assert record["schema"] == 1
    assert json.loads((work / "found" / "segmentation.json").read_text("utf-8")) == record
    assert [Path(path).name for path in record["supports"]] == ["anchor.jpg"]
    assert [Path(path).name for path in record["others"]] == ["negative.jpg"]
    for path in record["files"].values():
        assert (work / path).stat().st_size > 500


def test_the_files_are_what_python_gives_in_another_process(work: Path) -> None:
    """Also a proof that GrabCut gives the same result from run to run."""
    model = load_model("timm:tf_efficientnet_lite0")
    result = segment(model, DEMO / "positive.jpg", [DEMO / "anchor.jpg"], [DEMO / "negative.jpg"])
    stored = Segmentation.load(work / "found")
    differing = (stored.mask != result.mask).mean()
    assert differing < 1e-3, "threads may round the map in another way"
    mask = np.asarray(Image.open(work / "found" / "mask.png"))
    assert mask.dtype == np.uint8
    assert ((mask == 255) == stored.mask).all()
    assert set(np.unique(mask)) == {0, 255}
    overlay = Image.open(work / "found" / "overlay.png")
    assert overlay.size == mask.shape[::-1]
    cut = Image.open(work / "found" / "cutout.png")
    assert cut.mode == "RGBA"
    assert stored.box is not None
    left, top, right, bottom = stored.box
    assert cut.size == (right - left, bottom - top)


def test_options_arrive(run: Callable[..., Run]) -> None:
    done = run("segment", *QUICK, "--other", "whole.jpg", "--method",
               "sam:weights=signed", "--anchor", "support", "--refine", "box", "--sure", "0.7",
               "--probable", "0.4", "--background", "0.2", "--iterations", "2", "--longest", "32",
               "--view", "model", "--json")  # fmt: skip
    assert done.code == 0, done.err
    record = json.loads(done.out)
    options = record["options"]
    assert (record["method"], record["refine"]) == ("sam", "box")
    assert options["weights"] == "signed"
    assert options["cue"] == {"sure": 0.7, "probable": 0.4, "background": 0.2}
    assert options["cut"] == {"iterations": 2, "seed": 0, "longest": 32}
    assert (options["anchor"], options["view"]) == ("support", "model")
    assert record["files"]["mask"] == "segmentation-1/mask.png"


def test_it_tells_a_person_and_finds_a_new_folder(run: Callable[..., Run]) -> None:
    for number in (1, 2):
        done = run("segment", *QUICK)
        assert done.code == 0, done.err
        assert "1 of the class to find" in done.out
        assert f"mask: segmentation-{number}/mask.png" in done.out
    done = run("segment", NETWORK, "a.png", "b.jpg", *FAST, "--out", "segmentation-1")
    assert done.code == 1
    assert "is there already" in done.err
    assert run("segment", *QUICK, "--out", "segmentation-1", "--force").code == 0


def test_bad_input_is_told_in_a_line(fails: Callable[..., str]) -> None:
    for arguments, code, record in (
        (("a.png",), 2, "SUPPORT"),
        (("gone.png", "b.jpg"), 1, "gone.png"),
        (("a.png", "text.jpg"), 1, "text.jpg"),
        (("cut.jpg", "b.jpg"), 1, "cut.jpg"),
        (("a.png", "b.jpg", "--other", "empty.png"), 1, "empty.png"),
        (("a.png", "b.jpg", "--support-mask", "gone.png"), 1, "gone.png"),
        (("a.png", "b.jpg", "--support-mask", "a.png", "--support-mask", "a.png"), 1, "a mask for"),
        (("a.png", "b.jpg", "--method", "sum"), 2, "method"),
        (("a.png", "b.jpg", "--method", "sam:weights=none"), 1, "weights"),
        (("a.png", "b.jpg", "--refine", "snake"), 2, "snake"),
        (("a.png", "b.jpg", "--sure", "0.1", "--probable", "0.4"), 1, "thresholds"),
        (("a.png", "b.jpg", "--background", "2"), 2, "background"),
        (("a.png", "b.jpg", "--aggregate", "together", "--anchor", "support"), 1, "one anchor"),
        (("a.png", "b.jpg", "--out", "a.png"), 1, "is a file"),
    ):
        assert record in fails("segment", NETWORK, *arguments, *FAST, code=code)
