"""``simexplain compare`` end to end: what is printed, written, skipped and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runs import FAST, NETWORK, Run
from conftest import DEMO
from PIL import Image
from simexplain_cli import method_options
from test_comparing import CONTRACT

PICTURES = [DEMO / f"{role}.jpg" for role in ("anchor", "positive", "negative")]
TRIPLET = (NETWORK, *PICTURES, "--arch", "triplet", *FAST, "--curve-steps", "2")
TWO = ("--method", "sam:weights=signed", "--method", "decomposition@layer3")


def test_table_and_files(run: Callable[..., Run], here: Path) -> None:
    result = run("compare", *TRIPLET, *TWO, "--method", "avsl")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].startswith(NETWORK)
    assert "d(anchor, positive) < d(anchor, negative)" in lines[0]
    assert lines[1].split()[:4] == ["method", "deletion", "insertion", "gain"]
    assert [line.split()[0] for line in lines[2:5]] == [
        "sam:weights=signed", "decomposition@layer3", "(random)",
    ]  # fmt: skip
    assert any(line.startswith("Skipped avsl: ") for line in lines)
    assert {path.name for path in (here / "comparison-1").iterdir()} == {
        "comparison.png", "comparison.json", "comparison.npz",
    }  # fmt: skip
    assert run("compare", *TRIPLET, "--method", "sam").code == 0
    assert (here / "comparison-2").is_dir()


def test_json_is_pure_and_keeps_the_contract(run: Callable[..., Run], here: Path) -> None:
    masks = []
    for index in range(2):
        Image.new("L", (480, 480), 255).save(here / f"m{index}.png")
        masks += ["--mask", f"m{index}.png"]
    result = run(
        "compare", *TRIPLET, *TWO, *masks, "--mask", "none", "--out", "o", "--json",
        "--style", "contour", "--baseline", "mean",
    )  # fmt: skip
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert record.keys() == CONTRACT | {"digests"}
    assert [method["name"] for method in record["methods"]] == [TWO[1], TWO[3]]
    assert record["methods"][1]["layers"] == ["layer3"]
    assert record["chance"] == {"pointing": 1, "energy": 1}
    assert record["methods"][0]["per_image"]["pointing"][2] is None
    assert record["settings"]["baseline"] == "mean"
    assert record == json.loads((here / "o" / "comparison.json").read_text(encoding="utf-8"))


def test_a_set_and_a_dissimilar_pair(run: Callable[..., Run]) -> None:
    pair = (NETWORK, *PICTURES[:2], "--arch", "siamese", "--negative", *FAST, "--curve-steps", "2")
    record = json.loads(run("compare", *pair, "--method", "sam", "--json").out)
    assert [image["role"] for image in record["images"]] == ["anchor", "negative"]
    many = (NETWORK, *PICTURES, "--arch", "set", "--positives", "2", *FAST, "--curve-steps", "2")
    record = json.loads(run("compare", *many, "--method", "sam", "--json").out)
    assert [image["role"] for image in record["images"]] == ["anchor", "positive", "positive"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--method", "smo"), "methods of sam"),
        (("--method", "sam:colour=red"), "option of sam"),
        (("--method", "sam:weights=heavy"), "heavy"),
        (("--method", "sam", "--method", "sam"), "once"),
        (("--mask", "m.png"), "each of 3"),
        (("--curve-steps", "0"), "--curve-steps"),
    ],
)
def test_usage_errors(fails: Callable[..., str], arguments: tuple[str, ...], said: str) -> None:
    text = " ".join(fails("compare", *TRIPLET, *arguments, code=2).split())
    assert said in text.replace("│ ", "")


def test_errors_are_one_line_and_nothing_is_written(
    fails: Callable[..., str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no_layer" in fails("compare", *TRIPLET, "--method", "sam@no_layer")
    start = (NETWORK, "a.png", "none.jpg", "--arch", "siamese", *FAST)
    assert "none.jpg" in fails("compare", *start, "--method", "sam")
    assert "3 images" in fails("compare", *start[:3], "--arch", "triplet")
    (here / "old").mkdir()
    (here / "old" / "comparison.json").touch()
    assert "--force" in fails("compare", *TRIPLET, "--method", "sam", "--out", "old")
    (here / "taken").touch()
    assert "is a file" in fails("compare", *TRIPLET, "--method", "sam", "--out", "taken")


def test_interrupted_it_writes_nothing(
    run: Callable[..., Run], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("numpy.savez_compressed", stop)
    before = set(here.rglob("*"))
    result = run("compare", *TRIPLET, "--method", "sam", "--out", "out")
    assert result.code == 130
    assert set(here.rglob("*")) == before


def test_all_takes_every_method_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"methods": ("sam:weights=signed", "sam"), "every": True}
    result = list(method_options.asked_recipes(given))
    assert result[:2] == ["sam:weights=signed", "sam"]
    assert set(result) == {"sam:weights=signed", *method_options.METHODS}
    assert not given
    assert list(method_options.asked_recipes({"methods": (), "every": False})) == list(
        method_options.quick_methods()
    )
