"""A run that was killed and resumed is the run that was never stopped, bit for bit."""

from __future__ import annotations

import csv
import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")
pytest.importorskip("pytorch_metric_learning")

import torch
from cli_runs import environment
from pictures import noise
from training_cases import TINY, same, state_of, striped

from simexplain.errors import ModelError, OutputError
from simexplain.training.recording import Listeners
from simexplain.training.training import Source, train

CASES: dict[str, dict[str, Any]] = {
    "mining": {
        "mining": "triplet", "augmentation": "avsl", "warmup_epochs": 1, "schedule": "cosine",
        "freeze_bn": False, "mining_warmup": 2,
    },
    "avsl": {"avsl": True, "loss": "margin", "optimiser": "adam", "schedule": "step", "clip": 1.0},
    "proxies": {"loss": "proxy_anchor", "optimiser": "sgd", "precision": "bf16", "bce": 0.1},
}  # fmt: skip
EVERY = {**TINY, "checkpoint_every": 2, "batches_per_epoch": 5, "attention_triplets": 1}
KILLED = """
import json, os, signal, sys, torch
torch.set_num_threads(1)
from simexplain.training.recording import Listeners
from simexplain.training.training import train
data, out, settings, at = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
def step(done, total, loss):
    if done == at:
        os.kill(os.getpid(), signal.SIGKILL)
train(data, out=out, listeners=Listeners(step=step), **settings)
"""


class Killed(BaseException):
    """Nothing catches it but the test."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return striped(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open(encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def assert_equal_runs(first: Path, second: Path) -> None:
    for name in ("model.pt", "last.pt"):
        assert same(state_of(first / name), state_of(second / name)), name
    assert rows_of(first) == rows_of(second)
    for picture in (first / "attention").iterdir():
        assert picture.read_bytes() == (second / "attention" / picture.name).read_bytes()
    files = [run / "checkpoints" / "last.ckpt" for run in (first, second)]
    ends = [torch.load(file, weights_only=True) for file in files]
    assert ends[0]["place"]["step"] == ends[1]["place"]["step"] == 10
    assert same(ends[0]["objective"], ends[1]["objective"])
    moments = [end["optimiser"]["state"] for end in ends]
    assert moments[0].keys() == moments[1].keys()
    assert all(same(_tensors(moments[0][key]), _tensors(moments[1][key])) for key in moments[0])


def _tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("case", CASES)
def test_interrupted_at_any_step_and_resumed_it_is_the_same(
    case: str, data: Path, tmp_path: Path
) -> None:
    """Stopped again and again: within an epoch, after its last step, right after a checkpoint."""
    settings = {**EVERY, **CASES[case]}
    train(data, out=tmp_path / "whole", **settings)
    for at in (1, 4, 5, 8, 10):

        def step(done: int, total: int, loss: float, at: int = at) -> None:
            if done == at:
                raise Killed

        with pytest.raises(Killed):
            train(
                data, out=tmp_path / "parts", resume=at > 1, listeners=Listeners(step=step),
                **settings,
            )  # fmt: skip
    train(data, out=tmp_path / "parts", resume=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_killed_and_resumed_it_is_the_same(data: Path, tmp_path: Path) -> None:
    """The real thing: SIGKILL at a step that nobody chose, reading in a worker process."""
    settings = {**EVERY, **CASES["mining"]}
    train(data, out=tmp_path / "whole", **settings)
    at = random.SystemRandom().randint(1, 9)
    done = subprocess.run(
        [
            sys.executable, "-c", KILLED, data, tmp_path / "killed",
            json.dumps({**settings, "workers": 1}), str(at),
        ],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "killed" / "results.json").exists()
    train(data, out=tmp_path / "killed", resume=True, workers=0)
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    train(data, out=out, **{**TINY, "epochs": 1})
    return out


def test_resuming_a_finished_run_gives_its_result(data: Path, finished: Path) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*.pt")}
    result = train(data, out=finished, resume=True)
    assert result.best_epoch == 1
    assert before == {p: p.read_bytes() for p in finished.rglob("*.pt")}


def test_a_recipe_may_be_named_again(data: Path, tmp_path: Path) -> None:
    """As the advice after Ctrl-C does: the same line with --resume."""
    more = {k: v for k, v in TINY.items() if k not in ("classes_per_batch", "epochs")}
    source = Source(group="name")
    given = {"recipe": "emoji-triplet", "source": source, **more, "classes_per_batch": 0}
    begun = train(data, out=tmp_path / "run", **given, epochs=1)
    assert begun.options.classes_per_batch == 4
    again = train(data, out=tmp_path / "run", resume=True, **given, epochs=2)
    assert again.options.classes_per_batch == 4
    assert len(again.rows) == 3


def test_a_run_can_be_made_longer(data: Path, tmp_path: Path) -> None:
    train(data, out=tmp_path / "run", **{**TINY, "epochs": 1})
    longer = train(data, out=tmp_path / "run", resume=True, epochs=2)
    whole = train(data, out=tmp_path / "whole", **TINY)
    assert [row["recall@1"] for row in longer.rows] == [row["recall@1"] for row in whole.rows]
    assert same(state_of(tmp_path / "run/last.pt"), state_of(tmp_path / "whole/last.pt"))
    assert not any("schedule" in text for text in longer.warnings)


def test_a_longer_run_whose_learning_rate_jumps_says_so(data: Path, tmp_path: Path) -> None:
    train(data, out=tmp_path / "run", **{**TINY, "epochs": 1}, schedule="cosine")
    longer = train(data, out=tmp_path / "run", resume=True, epochs=2)
    (record,) = (text for text in longer.warnings if "schedule" in text)
    assert "after epoch 1 the learning rate goes from 0% to 50% of its start" in record


def test_what_cannot_be_resumed_is_refused(data: Path, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="leave --resume away"):
        train(data, out=tmp_path / "none", resume=True)
    with pytest.raises(ModelError, match=r"begun with lr=0\.0001, and cannot go on with 0\.5"):
        train(data, out=finished, resume=True, lr=0.5)
    other = striped(tmp_path / "other", classes=10)
    with pytest.raises(OutputError, match="on other pictures"):
        train(other, out=finished, resume=True)
    with pytest.raises(OutputError, match="holds a run already"):
        train(data, out=finished, **TINY)


def test_a_damaged_checkpoint_is_told(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").write_bytes(b"PK no checkpoint")
    with pytest.raises(OutputError, match=r"damaged.*say --force"):
        train(data, out=tmp_path / "run", resume=True)


DAMAGE: dict[str, Any] = {
    **{f"no {name}": lambda state, name=name: state.pop(name) for name in (
        "options", "data", "source", "recipe", "model", "objective", "optimiser", "precision",
        "place",
    )},
    "a list of options": lambda state: state.update(options=[1]),
    "an unknown option": lambda state: state["options"].update(learning=1),
    "no step": lambda state: state["place"].pop("step"),
    "a step in words": lambda state: state["place"].update(step="one"),
    "more of a place": lambda state: state["place"].update(more=1),
    "a tensor less": lambda state: state["model"].popitem(),
    "another shape": lambda state: state["model"].update(
        {name: torch.zeros(99) for name in list(state["model"])[:1]}
    ),
    "no groups": lambda state: state["optimiser"].pop("param_groups"),
    "a group less": lambda state: state["optimiser"]["param_groups"].pop(),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_what_a_checkpoint_lacks_is_told(
    what: str, data: Path, finished: Path, tmp_path: Path
) -> None:
    state = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    DAMAGE[what](state)
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    file.parent.mkdir(parents=True)
    torch.save(state, file)
    with pytest.raises(OutputError, match=r"^The checkpoint .* is damaged \(.*\); say --force"):
        train(data, out=tmp_path / "run", resume=True, epochs=2)
    assert [path.name for path in file.parent.parent.rglob("*.*")] == ["last.ckpt"]


def test_how_data_are_read_is_known_to_the_run(data: Path, tmp_path: Path) -> None:
    source = Source(train_share=0.75, group="name")
    settings = {**TINY, "classes_per_batch": 6, "grouped": True, "epochs": 1}
    train(data, out=tmp_path / "run", source=source, **settings)
    longer = train(data, out=tmp_path / "run", resume=True, epochs=2)
    assert len(longer.rows) == 3
    with pytest.raises(OutputError, match="other pictures or masks"):
        train(data, out=tmp_path / "run", resume=True, source=Source(), epochs=3)


def masks_for(data: Path, masks: Path, level: int) -> Path:
    for path in data.rglob("*.png"):
        mask = masks / path.relative_to(data)
        mask.parent.mkdir(parents=True, exist_ok=True)
        noise(40, 40).convert("L").point(lambda value: 255 * (value > level)).save(mask)
    return masks


def test_masks_are_known_to_the_run_and_may_not_change(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = masks_for(data, tmp_path / "masks", 128)
    other = masks_for(data, tmp_path / "other", 99)
    monkeypatch.chdir(tmp_path)
    settings = {**TINY, "mask_weight": 0.5, "epochs": 1}
    train(data, out=tmp_path / "run", source=Source(masks="masks"), **settings)
    monkeypatch.chdir(data)
    train(data, out=tmp_path / "run", resume=True, epochs=2)
    moved = masks.rename(tmp_path / "moved")
    train(data, out=tmp_path / "run", resume=True, source=Source(masks=moved))
    with pytest.raises(OutputError, match="other pictures or masks"):
        train(data, out=tmp_path / "run", resume=True, source=Source(masks=other))


def test_replaced_pictures_are_noticed(tmp_path: Path) -> None:
    data = striped(tmp_path / "data")
    train(data, out=tmp_path / "run", **{**TINY, "epochs": 1})
    noise(40, 40).save(data / "class06" / "0.png")
    with pytest.raises(OutputError, match="other pictures or masks"):
        train(data, out=tmp_path / "run", resume=True, epochs=2)


def test_a_run_stopped_in_its_first_evaluation_is_resumed(data: Path, tmp_path: Path) -> None:
    settings = {**EVERY, **CASES["mining"]}

    def work(what: str, done: int, total: int) -> None:
        if what.startswith("Embedding"):
            raise Killed

    with pytest.raises(Killed):
        train(data, out=tmp_path / "parts", listeners=Listeners(work=work), **settings)
    train(data, out=tmp_path / "parts", resume=True)
    train(data, out=tmp_path / "whole", **settings)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_what_is_stopped_before_its_first_checkpoint_leaves_all_as_it_was(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    shutil.copytree(finished, tmp_path / "old")
    before = {path: path.read_bytes() for path in (tmp_path / "old").rglob("*.*")}
    monkeypatch.setattr("os.fsync", stop)
    for out in ("new", "old"):
        with pytest.raises(KeyboardInterrupt):
            train(data, out=tmp_path / out, force=True, **TINY)
    assert not [path for path in (tmp_path / "new").rglob("*") if path.is_file()]
    assert {path: path.read_bytes() for path in (tmp_path / "old").rglob("*.*")} == before
    monkeypatch.undo()
    train(data, out=tmp_path / "new", **{**TINY, "epochs": 1})


@pytest.mark.parametrize("at", [0, 1])
def test_an_epoch_is_kept_before_it_is_told(at: int, data: Path, tmp_path: Path) -> None:
    def epoch(row: dict[str, Any]) -> None:
        if row["epoch"] == at:
            raise Killed

    with pytest.raises(Killed):
        train(data, out=tmp_path / "run", listeners=Listeners(epoch=epoch), **TINY)
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert [row["epoch"] for row in state["place"]["rows"]] == list(range(at + 1))
    assert state["place"]["epoch"] == at


def test_what_a_run_says_of_itself_follows(data: Path, tmp_path: Path) -> None:
    run, more = tmp_path / "run", {k: v for k, v in TINY.items() if k != "epochs"}
    train(data, out=run, source=Source(group="name"), recipe="emoji-triplet", **more, epochs=1)
    train(data, out=run, resume=True, epochs=2)
    record = json.loads((run / "options.json").read_text(encoding="utf-8"))
    assert (record["options"]["epochs"], record["recipe"]) == (2, "emoji-triplet")
    assert record["source"]["group"] == "name"
    with pytest.raises(ModelError, match=r"has done 2 epochs already, and cannot go on to 1"):
        train(data, out=run, resume=True, epochs=1)
    assert json.loads((run / "options.json").read_text(encoding="utf-8")) == record
