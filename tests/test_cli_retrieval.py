"""``simexplain evaluate retrieval`` end to end, on folders, splits and tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runs import FAST, NETWORK, Run
from pictures import noise

START = ("evaluate", "retrieval", NETWORK)


def folder(root: Path, classes: dict[str, int], suffix: str = "") -> Path:
    """``a/v0.png``, ``a/v1.png`` and so on: noise, the number standing for who drew it."""
    for index, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            noise(24, 32, seed=100 * index + number).save(root / name / f"v{number}{suffix}.png")
    return root


def test_a_folder_with_a_broken_picture_and_a_class_of_one(
    run: Callable[..., Run], here: Path
) -> None:
    data = folder(here / "data", {"a": 3, "b": 2, "c": 1})
    (data / "a" / "broken.jpg").write_text("no picture", encoding="utf-8")
    result = run(*START, data, *FAST, "--ranks", "1,100", "--out", "scores")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0] == f"{NETWORK}, all: 5 queries, searched among themselves"
    assert lines[1].split() == ["Recall@1", "Recall@100", "MAP@R", "R-precision"]
    assert lines[2].split()[4] == "1.000"
    assert [line.split()[0] for line in lines[6:8]] in (["a", "b"], ["b", "a"])
    written = {line.split(":")[0] for line in lines[-4:]}
    assert written == {"results", "queries", "classes", "arrays"}
    warnings = result.err.splitlines()
    assert warnings[0].startswith("Warning: 1 query has nothing of the same class to find")
    assert "broken.jpg" in warnings[1]
    assert len(warnings) == 2
    record = json.loads((here / "scores" / "retrieval.json").read_text(encoding="utf-8"))
    assert (record["queries"], record["skipped"], record["gallery"]) == (5, 1, 6)
    assert list(record["errors"]) == [str(data / "a" / "broken.jpg")]


def test_the_zero_shot_split_with_groups_as_json(run: Callable[..., Run], here: Path) -> None:
    data = folder(here / "data", dict.fromkeys("abcde", 3))
    split = ("--split", "test", "--train-share", "0.6", "--json")
    result = run(*START, data, *FAST, *split, "--group", "name", "--out", "scores")
    assert result.code == 0, result.err
    assert result.err == ""
    record = json.loads(result.out)
    assert (record["schema"], record["queries"], record["gallery"]) == (1, 6, 6)
    assert set(record["recall"]) == {"1", "2", "4", "8"}
    assert {one["class"] for one in record["classes"]} == {"d", "e"}
    assert record["settings"] == {
        "model": NETWORK, "gallery": "queries", "own file": "ignored",
        "own group": "ignored", "ties": "relevant last", "data": str(data), "kind": "folder",
        "split": "test", "group": "name", "train_share": 0.6,
    }  # fmt: skip
    rows = (here / "scores" / "queries.csv").read_text(encoding="utf-8").splitlines()
    assert rows[1].split(",")[2:5] == ["v0", "4", "2"]  # two of six are of its group
    by_rule = run(*START, data, *FAST, *split, "--group", r"/(v\d)")
    assert json.loads(by_rule.out)["recall"] == record["recall"]
    train = json.loads(run(*START, data, *FAST, *split, "--split", "train").out)
    assert {one["class"] for one in train["classes"]} == {"a", "b", "c"}


def test_a_gallery_of_its_own(run: Callable[..., Run], here: Path) -> None:
    queries = folder(here / "queries", {"a": 2, "b": 2})
    gallery = folder(here / "gallery", {"a": 1, "b": 3, "z": 4}, suffix="g")
    result = run(*START, queries, *FAST, "--gallery", gallery)
    assert result.code == 0, result.err
    assert result.out.splitlines()[0].endswith("all: 4 queries, searched in 8 pictures")
    same = run(*START, queries, *FAST, "--gallery", queries, "--json")
    among = run(*START, queries, *FAST, "--json")
    assert json.loads(same.out)["map_at_r"] == json.loads(among.out)["map_at_r"]


def test_data_that_says_itself_what_is_tested(run: Callable[..., Run], here: Path) -> None:
    for part, classes in {"train": "ab", "query": "cd", "gallery": "cde"}.items():
        folder(here / "data" / part, dict.fromkeys(classes, 2), suffix=part)
    record = json.loads(run(*START, "data", *FAST, "--json").out)
    assert (record["settings"]["split"], record["queries"], record["gallery"]) == ("test", 4, 6)
    assert "train_share" not in record["settings"]
    train = json.loads(run(*START, "data", *FAST, "--split", "train", "--json").out)
    assert (train["queries"], train["gallery"]) == (4, 4)
    refused = run(*START, "data", *FAST, "--split", "test", "--train-share", "0.5")
    assert refused.code == 2
    assert "has its own" in refused.err


def test_a_table_with_its_own_groups(run: Callable[..., Run], here: Path) -> None:
    data = folder(here / "data", {"a": 2, "b": 2})
    lines = [f"{c}/v{n}.png,{c},test,g{n if c == 'a' else 0}" for c in "ab" for n in (0, 1)]
    text = "\n".join(["path,label,split,group", *lines]) + "\n"
    (data / "table.csv").write_text(text, encoding="utf-8")
    options = ("--kind", "csv", "--json", *FAST)
    assert json.loads(run(*START, data / "table.csv", *options).out)["queries"] == 4
    record = json.loads(run(*START, data / "table.csv", *options, "--group", "own").out)
    assert (record["queries"], record["skipped"]) == (2, 2)  # both of b are of one group


def test_errors_are_one_line_and_nothing_is_written(fails: Callable[..., str], here: Path) -> None:
    assert "'none' is none" in fails(*START, "none", *FAST)
    single = folder(here / "single", {"a": 1, "b": 1})
    assert "no class of 2 has them" in fails(*START, single, *FAST, "--out", "out")
    pair = folder(here / "pair", {"a": 2, "b": 2})
    other = folder(here / "other", {"c": 2, "d": 2})
    assert "none of them" in fails(*START, pair, *FAST, "--gallery", other)
    assert "does not match" in fails(*START, pair, *FAST, "--group", "(vendor)")
    assert "group" in fails(*START, pair, *FAST, "--group", "own")
    assert "regular expression" in fails(*START, pair, *FAST, "--group", "(")
    bad = folder(here / "bad", {"a": 2, "b": 2})
    for path in bad.rglob("*.png"):
        path.write_text("no picture", encoding="utf-8")
    assert "None of 4 pictures" in fails(*START, bad, *FAST)
    (here / "old").mkdir()
    (here / "old" / "classes.csv").touch()
    assert "--force" in fails(*START, pair, *FAST, "--out", "old")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ranks", "0"), "--ranks"),
        (("--split", "half"), "--split"),
        (("--train-share", "1"), "--train-share"),
        (("--kind", "imagenet"), "--kind"),
        (("--batch-size", "0"), "--batch-size"),
        (("--train-share", "0.6"), "--split test"),
        (("--train-share", "0.6", "--split", "all"), "--split test"),
    ],
)
def test_usage_errors(
    fails: Callable[..., str], here: Path, arguments: tuple[str, ...], said: str
) -> None:
    folder(here / "data", {"a": 2, "b": 2})
    assert said in fails(*START, "data", *arguments, code=2)


def test_interrupted_it_writes_nothing(
    run: Callable[..., Run], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("simexplain.results.result.json_text", stop)
    data = folder(here / "data", {"a": 2, "b": 2})
    before = set(here.rglob("*"))
    result = run(*START, data, *FAST, "--out", "out")
    assert result.code == 130
    assert set(here.rglob("*")) == before


def test_the_group_lists_it(run: Callable[..., Run]) -> None:
    result = run("evaluate", "--help")
    assert result.code == 0
    assert "retrieval" in result.out
