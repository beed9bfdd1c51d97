"""``simexplain evaluate faithfulness`` end to end, from tables and from folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runs import FAST, NETWORK, Run
from pictures import noise
from test_comparing import classes, table

TWO = ("--method", "sam:weights=relative", "--method", "decomposition", "--curve-steps", "2")
START = ("evaluate", "faithfulness", NETWORK)


def test_from_a_table_with_a_broken_picture(run: Callable[..., Run], here: Path) -> None:
    path = table(here, "a.png,whole.jpg,b.jpg", "a.png,cut.jpg,b.jpg", "b.jpg,,a.png")
    result = run(*START, path, *FAST, *TWO, "--method", "avsl", "--out", "scores")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert "2 of 3 comparisons measured, means with 95 % intervals" in lines[0]
    assert [line.split()[0] for line in lines[2:6]] == [
        "sam:weights=relative", "decomposition", "(random)", "(centre)",
    ]  # fmt: skip
    assert "pointing" not in lines[1]
    assert sum(line.startswith("Skipped avsl: ") for line in lines) == 1
    assert result.err.count("\n") == 1
    assert result.err.startswith("Warning: item 1: ")
    assert "cut.jpg" in result.err
    assert {file.name for file in (here / "scores").iterdir()} == {
        "results.json", "results.png", "values.csv",
    }  # fmt: skip
    rows = (here / "scores" / "values.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + 3 * 5
    assert rows[1 + 5].endswith(",,")


def test_from_a_folder_as_json(run: Callable[..., Run], here: Path) -> None:
    folder = classes(here / "data")
    arguments = (folder, *FAST, *TWO, "--comparisons", "3", "--arch", "siamese", "--seed", "5")
    result = run(*START, *arguments, "--json", "--control", "random", "--confidence", "0.9")
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert record["schema"] == 1
    assert set(record["methods"]) == {TWO[1], TWO[3], "(random)"}
    assert [len(paths) for paths in record["items"]] == [2, 2, 2]
    assert record["settings"]["level"] == 0.9
    assert record["methods"]["decomposition"]["intervals"]["pointing"]["count"] == 3
    assert record["files"] == {}
    assert result.err == ""
    again = run(*START, *arguments, "--json", "--control", "random", "--confidence", "0.9")
    one, two = (
        {name: m["values"] for name, m in json.loads(text)["methods"].items()}
        for text in (result.out, again.out)
    )
    assert one == two
    assert {path.name for path in here.iterdir()} >= {"data"}
    assert not (here / "results.json").exists()


def test_the_first_lines_of_a_table(run: Callable[..., Run], here: Path) -> None:
    path = table(here, "a.png,b.jpg,", "a.png,cut.jpg,")
    result = run(*START, path, *FAST, *TWO, "--comparisons", "1", "--json")
    assert len(json.loads(result.out)["items"]) == 1


def test_errors_are_one_line_and_nothing_is_written(fails: Callable[..., str], here: Path) -> None:
    assert "cannot be read" in fails(*START, "none.csv", *FAST)
    assert "got no 'anchor'" in fails(*START, table(here, "a,b", header="x,y"), *FAST)
    assert "not a CSV" in fails(*START, "a.png", *FAST)
    (here / "flat").mkdir()
    noise(8, 8).save(here / "flat" / "a.png")
    assert "sub-folders" in fails(*START, "flat", *FAST)
    path = table(here, "cut.jpg,a.png,")
    assert "cut.jpg" in fails(*START, path, *FAST, "--method", "sam", "--out", "out")
    (here / "old").mkdir()
    (here / "old" / "values.csv").touch()
    assert "--force" in fails(*START, path, *FAST, "--out", "old")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--method", "smo"), "methods of sam"),
        (("--comparisons", "0"), "--comparisons"),
        (("--control", "edges"), "--control"),
        (("--confidence", "2"), "--confidence"),
    ],
)
def test_usage_errors(
    fails: Callable[..., str], here: Path, arguments: tuple[str, ...], said: str
) -> None:
    assert said in fails(*START, "data", *arguments, code=2)


def test_interrupted_it_writes_nothing(
    run: Callable[..., Run], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("simexplain.results.result.json_text", stop)
    path = table(here, "a.png,b.jpg,")
    before = set(here.rglob("*"))
    result = run(*START, path, *FAST, *TWO, "--out", "out")
    assert result.code == 130
    assert set(here.rglob("*")) == before


def test_the_group_lists_its_commands(run: Callable[..., Run]) -> None:
    result = run("evaluate", "--help")
    assert result.code == 0
    assert "faithfulness" in result.out
