"""What all commands that make a result share: --show, and one decorator for all of them."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from conftest import DEMO
from simexplain_cli.main import cli

PAIR = ("timm:test_resnet", str(DEMO / "anchor.jpg"), str(DEMO / "positive.jpg"))
FAST = ("--untrained", "--size", "64x64")
MAKING = ("explain", "match", "attribute", "segment", "compare", "search")


def options_of(name: str) -> set[str]:
    made = cli.get_command(click.Context(cli), name)
    assert made is not None
    return {flag for param in made.params for flag in param.opts}


@pytest.mark.parametrize("name", MAKING)
def test_every_result_can_be_shown(name: str) -> None:
    assert {"--out", "--force", "--json", "--show"} <= options_of(name)


def test_show_opens_the_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: list[str] = []
    monkeypatch.setattr(click, "launch", lambda path: opened.append(path) or 0)
    out = tmp_path / "found"
    arguments = ["match", *PAIR, *FAST, "--out", str(out), "--show"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    assert [Path(path) for path in opened] == [out / "matching.png"]
    assert CliRunner().invoke(cli, [*arguments[:-1], "--force"]).exit_code == 0
    assert len(opened) == 1


def test_what_is_not_written_cannot_be_shown(tmp_path: Path) -> None:
    arguments = ["evaluate", "retrieval", "timm:test_resnet", str(tmp_path), *FAST, "--show"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 2
    assert "--out" in done.output
