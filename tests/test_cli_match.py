"""``simexplain match`` end to end, good and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runs import FAST, NETWORK, Run, simexplain
from conftest import DEMO

from simexplain import Matching, load_model, match

QUICK = (NETWORK, "a.png", "b.jpg", *FAST)
CONTRACT = {
    "schema", "score", "residual", "layer", "images", "points", "pairs", "warnings", "files",
    "versions",
}  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A matching of the demo's pictures by the network that comes with its weights."""
    folder = tmp_path_factory.mktemp("match")
    done = simexplain(
        "match", "timm:tf_efficientnet_lite0", DEMO / "anchor.jpg", DEMO / "positive.jpg",
        "--at", "120,240", "--at", "300.5,300", "--out", "found", "--json", cwd=folder,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.err == ""
    (folder / "said.json").write_text(done.out, encoding="utf-8")
    return folder


def test_the_json_is_the_contract_and_the_manifest(work: Path) -> None:
    record = json.loads((work / "said.json").read_text(encoding="utf-8"))
    assert set(record) >= CONTRACT
    assert record["schema"] == 1
    assert record["score"]["name"] == "cosine"
    assert abs(record["residual"]) < 1e-5 * record["score"]["value"]
    assert [point["at"] for point in record["points"]] == [[120, 240], [300.5, 300]]
    assert [Path(image["path"]).name for image in record["images"]] == [
        "anchor.jpg",
        "positive.jpg",
    ]
    assert len(record["pairs"]) == 8
    values = [pair["value"] for pair in record["pairs"]]
    assert values == sorted(values, reverse=True)
    manifest = json.loads((work / "found" / "matching.json").read_text(encoding="utf-8"))
    assert manifest == record
    for path in record["files"].values():
        assert (work / path).stat().st_size > 1000


def test_the_numbers_are_those_of_python(work: Path) -> None:
    record = json.loads((work / "said.json").read_text(encoding="utf-8"))
    model = load_model("timm:tf_efficientnet_lite0")
    result = match(model, DEMO / "anchor.jpg", DEMO / "positive.jpg")
    again = Matching.load(work / "found")
    torch.testing.assert_close(again.matrix, result.matrix, rtol=1e-3, atol=1e-7)
    for point in record["points"]:
        best = again.best(*point["at"])
        assert point["value"] == pytest.approx(best.value)
        assert point["best"] == pytest.approx(best.b, abs=0.06)
    assert record["pairs"][0]["a"] == pytest.approx(again.top(1)[0].a, abs=0.06)


def test_the_cat_answers_to_the_cat(work: Path) -> None:
    """The demo's right answer: the upper right of the positive shows what the anchor shows."""
    record = json.loads((work / "said.json").read_text(encoding="utf-8"))
    for result in (*record["pairs"], *record["mutual_pairs"]):
        assert result["b"][0] > 210
        assert result["b"][1] < 270


def test_text_for_people(run: Callable[..., Run], here: Path) -> None:
    done = run("match", *QUICK, "--score", "squared", "--top", "3", "--at", "30,20")
    assert done.code == 0, done.err
    assert "layer layer4" in done.out
    assert "squared distance" in done.out
    assert "residual" in done.out
    assert "What answers most to a point" in done.out
    assert "30, 20" in done.out
    assert "figure: matching-1/matching.png" in done.out
    assert (here / "matching-1" / "matching.npz").exists()
    # Nothing is overwritten without a word.
    assert run("match", *QUICK).out.count("matching-2/matching.png") == 1


def test_what_is_there_stays_unless_forced(
    run: Callable[..., Run], fails: Callable[..., str], here: Path
) -> None:
    assert run("match", *QUICK, "--out", "x").code == 0
    assert "matching.json' is there already" in fails("match", *QUICK, "--out", "x")
    done = run("match", *QUICK, "--out", "x", "--force", "--formula", "zhu")
    assert done.code == 0
    assert "Warning: Style zhu leaves biases out" in done.err


def test_tails_that_are_not_linear_are_told(run: Callable[..., Run], here: Path) -> None:
    done = run("match", *QUICK, "--layer", "layer4.0.act1", "--jacobians", "2", "--json")
    assert done.code == 0
    record = json.loads(done.out)
    assert record["layer"] == "layer4.0.act1"
    assert ("2 Jacobians" in " ".join(record["warnings"])) == (abs(record["residual"]) > 1e-4)


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (("--at", "3"), "such as 120,85", 2),
        (("--at", "3,4,5"), "such as 120,85", 2),
        (("--score", "l2"), "--score", 2),
        (("--jacobians", "0"), "--jacobians", 2),
        (("--top", "-1"), "--top", 2),
        (("--at", "2,20"), "that the network saw", 1),
        (("--at", "nan,20"), "that the network saw", 1),
        (("--layer", "nowhere"), "no layer 'nowhere'", 1),
        (("--score", "squared", "--formula", "zhu"), "has no distances", 1),
    ],
)
def test_bad_options_are_refused_in_a_sentence(
    fails: Callable[..., str], arguments: tuple[str, ...], words: str, code: int
) -> None:
    assert words in fails("match", *QUICK, *arguments, code=code)


@pytest.mark.parametrize("bad", ["text.jpg", "cut.jpg", "empty.png", "strip.png", "none.png"])
def test_bad_pictures_are_refused_in_a_sentence(fails: Callable[..., str], bad: str) -> None:
    assert bad in fails("match", NETWORK, "a.png", bad, *FAST)
