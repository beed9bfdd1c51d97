"""``simexplain fit`` and ``simexplain attribute`` end to end, good and bad input."""

from __future__ import annotations

import csv
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runs import NETWORK, Run, simexplain
from conftest import DEMO
from PIL import Image

from simexplain import Attribution, load_model
from simexplain.models.avsl import AVSL

PICTURES = [DEMO / f"{role}.jpg" for role in ("anchor", "positive", "negative")]
QUICK = (
    "--untrained",
    "--size",
    "64",
    "--nodes-per-level",
    "8",
    "--epochs",
    "2",
    "--reliability-batches",
    "2",
)
CONTRACT = {"schema", "distance", "residual", "levels", "nodes", "files", "versions"}


def classes(folder: Path, count: int = 3, each: int = 3) -> Path:
    """Pictures of noise around one colour for each class."""
    random = np.random.default_rng(0)
    for label in range(count):
        (folder / f"class {label}").mkdir(parents=True)
        for number in range(each):
            colour = np.array([80 * label, 200 - 80 * label, 90])
            pixels = (colour + random.normal(0, 40, (48, 60, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class {label}" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures in classes, and models fitted with and without labels."""
    folder = tmp_path_factory.mktemp("attribute")
    classes(folder / "pictures")
    run = simexplain("fit", NETWORK, "pictures", "--out", "avsl.pt", *QUICK, cwd=folder)
    assert run.code == 0, run.err
    (folder / "fit.txt").write_text(run.out)
    run = simexplain(
        "fit",
        NETWORK,
        "pictures",
        "--out",
        "plain.pt",
        "--unlabelled",
        "--json",
        *QUICK,
        cwd=folder,
    )
    assert run.code == 0, run.err
    (folder / "fit.json").write_text(run.out)
    return folder


def test_fit_says_what_it_made(work: Path) -> None:
    record = (work / "fit.txt").read_text()
    for part in ("heads trained on the frozen network from labelled images", "level 0: layer2, 8",
                 "level 2: layer4, 8", "images 9", "classes 3", "model: avsl.pt"):  # fmt: skip
        assert part in record
    manifest = json.loads((work / "fit.json").read_text())
    assert manifest["origin"] == "unlabelled"
    assert manifest["report"]["images"] == 9
    assert manifest["options"]["bias"] is True


def test_fit_is_reproducible_and_loads(work: Path) -> None:
    first = load_model(work / "avsl.pt")
    assert isinstance(first, AVSL)
    assert first.origin == "labelled"
    assert first.preprocess.size == (64, 64)


@pytest.fixture(scope="module")
def pair(work: Path) -> Run:
    return simexplain(
        "attribute", "avsl.pt", *PICTURES[:2], "--json", "--out", "pair", "--top", "3", cwd=work
    )


def test_json_is_pure_and_keeps_the_contract(pair: Run, work: Path) -> None:
    assert pair.code == 0, pair.err
    record = json.loads(pair.out)
    assert record.keys() >= CONTRACT
    assert [image["path"] for image in record["images"]] == [str(path) for path in PICTURES[:2]]
    assert len(record["nodes"]) == 3
    assert record["nodes"][0].keys() >= {
        "level", "node", "value", "reliability", "sensitivity", "contribution",
    }  # fmt: skip
    total = sum(level["contribution"] for level in record["levels"])
    assert total == pytest.approx(record["distance"], rel=1e-5)
    assert abs(record["residual"]) < 1e-5 * record["distance"]
    assert record == json.loads((work / "pair/attribution.json").read_text(encoding="utf-8"))


def test_one_command_writes_two_figures_and_a_table_that_adds_up(pair: Run, work: Path) -> None:
    record = json.loads(pair.out)
    names = {"attribution.json", "attribution.npz", "graph.png", "ranking.png", "nodes.csv"}
    assert {path.name for path in (work / "pair").iterdir()} == names
    assert {Path(path).name for path in record["files"].values()} == names
    for name in ("graph.png", "ranking.png"):
        with Image.open(work / "pair" / name) as drawn:
            assert min(drawn.size) > 400
    with (work / "pair/nodes.csv").open(newline="") as file:
        total = sum(float(row["contribution"]) for row in csv.DictReader(file))
    assert total == pytest.approx(record["distance"], rel=1e-5)
    loaded = Attribution.load(work / "pair")
    assert float(loaded.distances[0]) == pytest.approx(record["distance"])


def test_printed_contributions_add_up_to_the_printed_distance(work: Path) -> None:
    run = simexplain(
        "attribute", "plain.pt", *PICTURES, "--decompose", "layer4:2", "--out", "triplet", cwd=work
    )
    assert run.code == 0, run.err
    distances = [float(value) for value in re.findall(r"^distance (\d\.\d+)", run.out, re.M)]
    sums = [float(value) for value in re.findall(r"sum +(\d\.\d+) +100\.0%", run.out)]
    parts = re.findall(r"^[012] +layer\d +\d+ +(\d\.\d+)", run.out, re.M)
    assert len(distances) == len(sums) == 2
    assert len(parts) == 6
    for index, distance in enumerate(distances):
        assert sums[index] == pytest.approx(distance, abs=2e-6)
        assert sum(map(float, parts[3 * index : 3 * index + 3])) == pytest.approx(
            distance, abs=3e-6
        )
    assert "(positive)" in run.out
    assert "(negative)" in run.out
    assert run.out.count("Node 2:2 brings") == 2
    assert "PCA heads and edges from images alone" in run.out
    assert run.err.startswith("Warning: This model has PCA heads")
    assert (work / "triplet" / "graph_0001.png").exists()


def test_decompose_is_in_the_json(work: Path) -> None:
    run = simexplain(
        "attribute", "avsl.pt", *PICTURES[:2], "--decompose", "1:3", "--json", "--out", "apart",
        cwd=work,
    )  # fmt: skip
    apart = json.loads(run.out)["decomposition"]
    assert (apart["node"]["level"], apart["node"]["node"]) == (1, 3)
    total = apart["own"] + sum(part["part"] for part in apart["stand_ins"])
    assert total == pytest.approx(apart["flow"], rel=1e-4)


def test_results_get_new_folders_unless_named(work: Path) -> None:
    for _ in range(2):
        run = simexplain("attribute", "avsl.pt", *PICTURES[:2], "--top", "0", cwd=work)
        assert run.code == 0, run.err
        assert "contribute most" not in run.out
    assert (work / "attribution-1").is_dir()
    assert (work / "attribution-2").is_dir()


def test_bad_input_to_attribute(
    work: Path, run: Callable[..., Run], fails: Callable[..., str], here: Path
) -> None:
    avsl = work / "avsl.pt"
    assert "no heads on its lower levels" in fails("attribute", NETWORK, "a.png", "b.jpg",
                                                   "--untrained")  # fmt: skip
    assert "no file" in fails("attribute", avsl, "a.png", "none.jpg")
    assert "not a picture" in fails("attribute", avsl, "text.jpg", "b.jpg")
    assert "elongated" in fails("attribute", avsl, "a.png", "strip.png")
    assert "Expected a level of 0 (layer2)" in fails("attribute", avsl, "a.png", "b.jpg",
                                                     "--decompose", "7:1")  # fmt: skip
    assert "Expected a node of 0 to 7" in fails("attribute", avsl, "a.png", "b.jpg",
                                                "--decompose", "1:99")  # fmt: skip
    assert "LEVEL:NODE" in fails("attribute", avsl, "a.png", "b.jpg", "--decompose", "2:²", code=2)
    assert "LEVEL:NODE" in fails("attribute", avsl, "a.png", "b.jpg", "--decompose", "x", code=2)
    assert "--top" in fails("attribute", avsl, "a.png", "b.jpg", "--top", "-1", code=2)
    assert "Missing argument" in fails("attribute", avsl, "a.png", code=2)
    assert "whose distance is its own" in fails("attribute", avsl, "a.png", "b.jpg",
                                                "--distance", "cosine")  # fmt: skip
    (here / "out").mkdir()
    (here / "out" / "graph.png").touch()
    assert "is there already" in fails("attribute", avsl, "a.png", "b.jpg", "--out", "out")
    assert run("attribute", avsl, "a.png", "b.jpg", "--out", "out", "--force").code == 0


def test_bad_input_to_fit(here: Path, fails: Callable[..., str]) -> None:
    classes(here / "good")
    (here / "empty").mkdir()
    (here / "flat").mkdir()
    Image.new("RGB", (9, 9)).save(here / "flat" / "x.png")
    common = (NETWORK, "--out", "avsl.pt", *QUICK)
    assert "is none; check the path" in fails("fit", *common, "nowhere")
    assert "found none" in fails("fit", *common, "empty")
    assert "--unlabelled" in fails("fit", *common, "flat")
    assert "at least two pictures" in fails("fit", *common, "flat", "--unlabelled")
    assert "layers of" in fails("fit", *common, "good", "--level", "layer9")
    assert "nodes of at least 1" in fails("fit", *common, "good", "--nodes-per-level", "0")
    assert "63 bits" in fails("fit", *common, "good", "--seed", "9" * 25)
    (here / "black").mkdir()
    for number in range(3):
        Image.new("RGB", (9, 9)).save(here / "black" / f"{number}.png")
    assert "look alike to layer" in fails("fit", *common, "black", "--unlabelled")
    assert "Missing option '--out'" in fails("fit", NETWORK, "good", *QUICK, code=2)
    assert "no folder 'deep'" in fails("fit", NETWORK, "good", *QUICK, "--out", "deep/avsl.pt")
    assert "is a folder" in fails("fit", NETWORK, "good", *QUICK, "--out", "empty")
    assert "is there already" in fails("fit", NETWORK, "good", *QUICK, "--out", "a.png")


def test_one_level_and_levels_of_one_node(here: Path, run: Callable[..., Run]) -> None:
    classes(here / "good")
    done = run("fit", NETWORK, "good", "--out", "one.pt", *QUICK, "--level", "layer4")
    assert done.code == 0, done.err
    done = run("attribute", "one.pt", "a.png", "b.jpg", "--decompose", "0:3", "--out", "out")
    assert done.code == 0, done.err
    assert "no lower node stands in for it" in done.out
    done = run("fit", NETWORK, "good", "--out", "few.pt", *QUICK, "--nodes-per-level", "1")
    assert done.code == 0, done.err
    done = run("attribute", "few.pt", "a.png", "b.jpg")
    assert "has one node" in done.err


def test_replacing_leaves_no_picture_of_the_earlier_result(
    work: Path, here: Path, run: Callable[..., Run]
) -> None:
    avsl = work / "avsl.pt"
    assert run("attribute", avsl, "a.png", "b.jpg", "--out", "out").code == 0
    again = ("a.png", "b.jpg", "whole.jpg", "--out", "out", "--force")
    assert run("attribute", avsl, *again).code == 0
    names = {path.name for path in (here / "out").glob("*.png")}
    assert names == {"graph_0000.png", "graph_0001.png", "ranking.png"}


def test_skipped_pictures_are_told(here: Path, run: Callable[..., Run]) -> None:
    classes(here / "good")
    (here / "good" / "class 1" / "0.png").write_bytes(b"broken")
    done = run("fit", NETWORK, "good", "--out", "avsl.pt", *QUICK)
    assert done.code == 0, done.err
    assert re.search(r"Warning: 1 pictures? cannot be read: .*0\.png", done.err)
    assert "images 8" in done.out


def test_a_network_without_a_name_is_refused_before_the_work(here: Path, fails) -> None:
    """A torch.export program cannot be rebuilt by name, so its AVSL model could not be saved."""
    from conftest import TinyNet

    classes(here / "good")
    program = torch.export.export(TinyNet().eval(), (torch.rand(1, 3, 64, 64),))
    torch.export.save(program, here / "tiny.pt2")
    record = fails("fit", "tiny.pt2", "good", "--out", "avsl.pt", "--nodes-per-level", "8")
    assert "torchvision:NAME rebuilds, got a ExportedNetwork" in record


@pytest.mark.parametrize(
    "place",
    ["simexplain.fitting.posthoc._pooled", "simexplain.fitting.posthoc.trained_head", "torch.save"],
)
def test_ctrl_c_leaves_nothing(
    here: Path, run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """While pictures are read, while heads are trained, while the file is written."""
    classes(here / "good")
    before = sorted(here.rglob("*"))
    monkeypatch.setattr(place, lambda *_, **__: signal.raise_signal(signal.SIGINT))
    # Which a shell's background jobs, these tests perhaps, ignore.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = run("fit", NETWORK, "good", "--out", "avsl.pt", *QUICK)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (done.code, done.out) == (130, "")
    assert done.err.strip() == "Error: Interrupted; nothing was written."
    assert sorted(here.rglob("*")) == before
