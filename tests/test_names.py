"""Names of files that hold anything: every command works, and nothing acts on the terminal."""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_runs import Run
from pictures import noise

from simexplain.errors import ImageError, json_text, printable

NETWORK = ("timm:test_efficientnet", "--untrained", "--size", "64")
NAMES = {
    "quotes": 'it\'s "a" `b` $(c).png',
    "newline": "two\nlines\r.png",
    "escape": "\x1b[31mred\x1b]0;title\x07.png",
    "one byte escape": "\x9b31m.png",
    "markup": "<b>&amp;[red]x[b]{0}%s$a$.png",
    "not UTF-8": os.fsdecode(b"caf\xe9\xff.png"),
    "long": f"{'n' * 246}.png",
    "dash": "-x.png",
    "direction": "\u202egnp.png",
    "joined emoji": "\U0001f469\u200d\U0001f680.png",
    "formula": "=1+1,a;b\t.png",
    "pattern": "*[a]?.png",
    "spaces": "  a  .png",
}

TRYING = ("newline", "escape", "markup", "not UTF-8", "long")
"""Names that every command that draws is tried with."""


def check_plain(text: str) -> None:
    """Nothing but lines of characters that a terminal only prints, whole in UTF-8."""
    text.encode()
    acting = {sign for sign in text if unicodedata.category(sign) in ("Cc", "Cf", "Cs")}
    assert acting <= {"\n"}, acting


def strings(value: object) -> Iterator[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for own in value.values() if isinstance(value, dict) else value:
            yield from strings(own)


@pytest.fixture
def folder(here: Path) -> Path:
    """Two classes with pictures under all names."""
    for label in ("one", "two"):
        (here / "data" / label).mkdir(parents=True)
        for name in NAMES.values():
            noise(40, 30).save(here / "data" / label / name)
    return here


@pytest.mark.parametrize("kind", NAMES)
def test_commands_that_draw(here: Path, run: Callable[..., Run], kind: str) -> None:
    paths = []
    for label in ("one", "two", "three"):
        (here / label).mkdir()
        noise(40, 30).save(here / label / NAMES[kind])
        paths.append(f"{label}/{NAMES[kind]}")
    network, *options = NETWORK
    commands: list[tuple[str, ...]] = [("explain", network, *paths, "--no-check")]
    if kind in TRYING:
        commands += [
            ("match", network, *paths[:2]),
            ("segment", network, *paths[:2]),
            ("compare", network, *paths[:2], "--method", "sam", "--method", "saliency"),
        ]
    for words in commands:
        done = run(*words, *options, "--out", f"{words[0]}-out")
        assert done.code == 0, done.err
        check_plain(done.out + done.err)
        files = {path.name: path for path in (here / f"{words[0]}-out").iterdir()}
        manifest = next(path for name, path in files.items() if name.endswith(".json"))
        assert paths[0] in set(strings(json.loads(manifest.read_text("utf-8"))))


def test_commands_on_a_folder(folder: Path, run: Callable[..., Run]) -> None:
    network, *options = NETWORK
    for words in (
        ("index", network, "data", "--out", "shop.index"),
        ("search", network, f"data/one/{NAMES['escape']}", "shop.index", "--out", "found"),
        ("evaluate", "retrieval", network, "data", "--out", "retrieval"),
        ("bank", network, "data", "--out", "bank.safetensors"),
    ):
        for more in ((), ("--json",)):
            index = ["shop.index0" if word == "shop.index" else word for word in words[:-1]]
            done = run(*index, f"{words[-1]}{len(more)}", *options, *more)
            assert done.code == 0, done.err
            check_plain(done.out + done.err)
    result = json.loads((folder / "found0/search.json").read_text("utf-8"))
    assert {Path(hit["path"]).name for hit in result["hits"]} <= set(NAMES.values())


def test_a_table(folder: Path, run: Callable[..., Run]) -> None:
    names = [name for name in NAMES.values() if name != NAMES["not UTF-8"]]
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("anchor", "positive", "negative"))
        writer.writerows((f"data/one/{n}", f"data/one/{names[0]}", f"data/two/{n}") for n in names)
    network, *options = NETWORK
    done = run("batch", network, "rows.csv", *options, "--out", "batch")
    assert done.code == 0, done.err
    check_plain(done.out + done.err)


@pytest.mark.parametrize("kind", NAMES)
def test_errors(here: Path, run: Callable[..., Run], kind: str) -> None:
    name = NAMES[kind][:240]
    for words in (("explain", NETWORK[0], f"./{name}", f"./{name}"), ("layers", f"./{name}"),
                  ("search", NETWORK[0], f"./{name}", f"./{name}"), (name,),
                  ("explain", NETWORK[0], "./a", "./b", "--method", name)):  # fmt: skip
        done = run(*words)
        assert done.code, words
        check_plain(done.out + done.err)
    check_plain(str(ImageError(f"There is no file '{name}'.")))


def test_printable() -> None:
    text = "a\x1b[1m\n\x9b\udce9\u202e é 猫 \U0001f469"
    assert printable(text) == r"a\x1b[1m\n\x9b\xe9\u202e é 猫 " + "\U0001f469"
    assert printable(text, keep="\n").count("\n") == 1


def test_json_is_plain_and_comes_back() -> None:
    value = {"name": "\x1b\x7f\x9b\udce9\u202e猫", "score": [1.5, None]}
    text = json_text({**value, "score": [1.5, float("nan")]})
    check_plain(text)
    assert json.loads(text) == value
    assert "猫" in text
