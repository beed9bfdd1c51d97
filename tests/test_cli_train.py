"""``simexplain train`` end to end: one line trains, and what comes of it is explained."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import click
import pytest

pytest.importorskip("lightning")
pytest.importorskip("pytorch_metric_learning")

from cli_runs import Run, environment
from simexplain_cli.main import cli
from training_cases import striped

from simexplain.training.options import TrainOptions
from simexplain.training.recipes import RECIPES

QUICK = (
    "--backbone", "timm:test_efficientnet", "--untrained", "--size", "32", "--embedding", "12",
    "--classes-per-batch", "4", "--images-per-class", "2", "--accelerator", "cpu",
    "--attention-triplets", "0",
)  # fmt: skip


@pytest.fixture
def data(here: Path) -> Path:
    return striped(here / "data")


def test_one_line_trains_and_explain_takes_the_model(run: Callable[..., Run], data: Path) -> None:
    result = run("train", "data", "--out", "run", *QUICK, "--epochs", "2", "--ranks", "1,2")
    assert result.code == 0, result.err
    assert result.err == ""
    lines = result.out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["epoch", str(n)] for n in range(3)]
    assert "loss" in lines[1]
    assert lines[3].split() == ["Recall@1", "Recall@2", "MAP@R"]
    assert lines[4].startswith("before training")
    assert "the best" in lines[5]
    assert "model: run/model.pt" in lines
    pictures = ("data/class05/0.png", "data/class05/1.png", "data/class06/0.png")
    explained = run("explain", "run/model.pt", *pictures, "--arch", "triplet", "--out", "why")
    assert explained.code == 0, explained.err


def test_an_avsl_model_is_attributed(run: Callable[..., Run], data: Path) -> None:
    trained = run(
        "train", "data", "--out", "run", *QUICK, "--avsl", "--loss", "proxy_anchor",
        "--epochs", "1", "--json",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    record = json.loads(trained.out)
    assert record["options"]["avsl"] is True
    assert record["best_epoch"] == 1
    done = run(
        "attribute", record["files"]["model"], "data/class05/0.png", "data/class06/0.png",
        "--out", "account",
    )  # fmt: skip
    assert done.code == 0, done.err


def test_options_win_over_recipes_and_recipes_over_defaults(
    run: Callable[..., Run], data: Path
) -> None:
    result = run(
        "train", "data", "--out", "run", *QUICK, "--recipe", "emoji-sam-triplet", "--epochs", "1",
        "--group", "name", "--gamma", "0.5", "--mining-option", "share=0.5",
        "--loss-option", "margin=0.3", "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    options = json.loads(result.out)["options"]
    assert (options["mining"], options["head_lr"], options["augmentation"]) == (
        "triplet", 1e-3, "light",
    )  # fmt: skip
    assert (options["gamma"], options["epochs"], options["classes_per_batch"]) == (0.5, 1, 4)
    assert options["mining_options"] == [["share", 0.5]]
    assert options["loss_options"] == [["margin", 0.3]]
    assert options["grouped"] is True
    kept = json.loads(Path("run/options.json").read_text(encoding="utf-8"))
    assert kept["recipe"] == "emoji-sam-triplet"


def test_recipes_are_listed_and_shown(run: Callable[..., Run]) -> None:
    listed = run("train", "--list-recipes")
    assert listed.code == 0
    assert [line.split()[0] for line in listed.out.splitlines()[1:]] == list(RECIPES)
    shown = run("train", "--show-recipe", "sam-siamese-cub").out
    assert "similarity attention, Table 1" in shown
    assert "0.25" in shown


def test_every_setting_is_an_option() -> None:
    command = cli.get_command(click.Context(cli), "train")
    assert command is not None
    assert {field.name for field in fields(TrainOptions)} <= {
        option.name for option in command.params
    }


def test_bad_data_are_told_at_once_and_nothing_is_written(
    fails: Callable[..., str], data: Path
) -> None:
    (data / "class00" / "0.png").write_text("no picture", encoding="utf-8")
    for index in (1, 2, 3):
        (data / "class01" / f"{index}.png").unlink()
    record = fails("train", "data", "--out", "run", *QUICK, "--classes-per-batch", "7")
    for part in ("class00/0.png", "class01", "4 classes"):
        assert part in record


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("data", "--out", "a.png"), 1, "is a file"),
        (("data", "--out", "run", "--resume"), 1, "leave --resume away"),
        (("data", "--out", "run", "--resume", "--force"), 2, "say one of them"),
        (("none", "--out", "run"), 1, "check the path"),
        (("data", "--out", "run", "--classes-per-batch", "1"), 1, "at least two classes"),
        (("data", "--out", "run", "--ranks", "one"), 2, "expected numbers"),
        (("data", "--out", "run", "--loss-option", "margin"), 2, "expected NAME=VALUE"),
        (("data", "--out", "run", "--loss-option", "margn=1"), 1, "margn"),
        (("data", "--out", "run", "--level", "none", "--avsl", "--loss", "margin"), 1, "levels"),
        (("data", "--out", "run", "--backbone", "timm:nonesuch"), 1, "nonesuch"),
        (("data", "--out", "run", "--devices", "3"), 1, "share evenly"),
    ],
)
def test_mistakes_are_told_in_a_line(
    arguments: Sequence[str], code: int, said: str, fails: Callable[..., str], data: Path
) -> None:
    assert said in fails("train", arguments[0], *QUICK, *arguments[1:], code=code)


def test_a_run_that_is_there_is_kept(
    run: Callable[..., Run], fails: Callable[..., str], data: Path
) -> None:
    start = ("train", "data", "--out", "run", *QUICK, "--epochs", "1")
    assert run(*start).code == 0
    assert "--resume to go on" in fails(*start)
    again = run("train", "data", "--out", "run", "--resume")
    assert again.code == 0, again.err
    assert "epoch 1, the best" in again.out


def test_ctrl_c_keeps_the_checkpoint_and_says_how_to_go_on(here: Path, data: Path) -> None:
    arguments = [*QUICK, "--epochs", "500", "--checkpoint-every", "1"]
    started = subprocess.Popen(
        [sys.executable, "-m", "simexplain", "train", "data", "--out", "run", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=here, env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert started.stdout is not None
    lines = [started.stdout.readline() for _ in range(3)]
    assert lines[2].startswith("epoch   2"), lines
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 130, err
    assert err.count("\n") == 1
    assert err.startswith("Error: Interrupted; go on with: simexplain train data --out run")
    assert err.rstrip().endswith("--resume")
    assert (here / "run" / "checkpoints" / "last.ckpt").exists()
    assert not list((here / "run").rglob("*.part"))


def test_an_interrupted_replacement_leaves_and_names_no_run(
    run: Callable[..., Run], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = ("train", "data", "--out", "run", *QUICK, "--epochs", "1")
    assert run(*start).code == 0
    before = Path("run/checkpoints/last.ckpt").read_bytes()

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("simexplain.training.training.check_training", stop)
        early = run(*start, "--force")
    assert early.code == 130
    assert early.err.strip() == "Error: Interrupted; nothing was written."
    assert Path("run/checkpoints/last.ckpt").read_bytes() == before
    monkeypatch.setattr("simexplain.training.recording.evaluate_retrieval", stop)
    late = run(*start, "--force")
    assert late.code == 130
    assert "go on with: simexplain train data" in late.err
    fresh = run("train", "data", "--out", "other", *QUICK, "--epochs", "1")
    assert "go on with: simexplain train data --out other" in fresh.err
    monkeypatch.undo()


def test_how_data_are_read_needs_not_be_said_again(run: Callable[..., Run], data: Path) -> None:
    more = ("--train-share", "0.75", "--group", "name", "--grouped", "--classes-per-batch", "6")
    begun = run("train", "data", "--out", "run", *QUICK, *more, "--epochs", "1")
    assert begun.code == 0, begun.err
    again = run("train", "data", "--out", "run", "--resume", "--epochs", "2")
    assert again.code == 0, again.err
    part = run("train", "data", "--out", "run", "--resume", "--epochs", "3", "--group", "name")
    assert part.code == 0, part.err
    other = run("train", "data", "--out", "run", "--resume", "--train-share", "0.5")
    assert other.code == 1
    assert "other pictures or masks" in other.err


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_reader_that_goes_away_stops_no_run(epochs: int, here: Path, data: Path) -> None:
    """As ``| head -1`` does."""
    started = subprocess.Popen(
        [sys.executable, "-m", "simexplain", "train", "data", "--out", "run", *QUICK,
         "--epochs", str(epochs)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=here, env=environment(),
    )  # fmt: skip
    assert started.stdout is not None
    assert started.stderr is not None
    assert started.stdout.readline().startswith("epoch   0")
    started.stdout.close()
    assert started.wait(timeout=120) == 0
    assert started.stderr.read() == ""
    assert json.loads((here / "run" / "results.json").read_text(encoding="utf-8"))["epochs"][epochs]


def test_an_empty_name_is_no_folder(fails: Callable[..., str], data: Path) -> None:
    assert "an empty name" in fails("train", "data", "--out", "", *QUICK, code=2)
    assert "lies within the data" in fails("train", "data", "--out", "data/run", *QUICK)


def test_a_missing_extra_is_named(
    fails: Callable[..., str], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simexplain.training.training.find_spec", lambda name: None)
    record = fails("train", "data", "--out", "run")
    assert "pip install 'simexplain[train]'" in record
