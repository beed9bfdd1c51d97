"""Training: it learns, tells what it does, writes what others read, and leaves all else alone."""

from __future__ import annotations

import csv
import json
import math
import signal
import threading
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lightning")
pytest.importorskip("pytorch_metric_learning")

import torch
from pictures import noise
from torch import nn
from training_cases import TINY, same, state_of, striped

from simexplain import attribute, explain, load_model
from simexplain.data.dataset_split import DataSplit
from simexplain.data.folders import Record
from simexplain.errors import ImageError, ModelError, OutputError
from simexplain.evaluation.retrieval import evaluate_retrieval
from simexplain.losses.attention import last_linear
from simexplain.option_fields import declared
from simexplain.training.building import (
    OPTIMISERS,
    SCHEDULES,
    build_model,
    build_objective,
    drop_idle,
    mining_factor,
    optimiser_for,
    rate_factor,
    set_rates,
)
from simexplain.training.module import set_training
from simexplain.training.options import TrainOptions, with_options
from simexplain.training.recording import Listeners, attention_triplets_of
from simexplain.training.run_folder import RunFolder, TrainResult
from simexplain.training.training import Source, not_improved, searchable, train

MARGIN = 0.2
"""By how much Recall@1 of unseen classes must rise in the end-to-end test; it rises by 0.4."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return striped(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("plain") / "run"
    settings = {**TINY, "mining": "triplet", "attention_triplets": 2, "warmup_epochs": 1}
    return train(data, out=out, **settings)


@pytest.fixture(scope="module")
def avsl(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("avsl") / "run"
    return train(
        data, out=out, **{**TINY, "avsl": True, "loss": "proxy_anchor", "attention_triplets": 1}
    )


def test_training_improves_retrieval_of_unseen_classes(tmp_path: Path) -> None:
    data = striped(tmp_path / "data", classes=16, each=16)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = train(
            data, out=tmp_path / "run",
            **{**TINY, "classes_per_batch": 8, "images_per_class": 4, "batches_per_epoch": 12,
               "epochs": 9, "lr": 2e-3, "head_lr": 2e-3, "freeze_bn": False, "embedding": 16,
               "augmentation": "none"},
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    assert result.reached["recall@1"] > result.untrained["recall@1"] + MARGIN
    assert not result.warnings
    # What was measured in training is what the file gives.
    split = Source().read(data)
    again = evaluate_retrieval(result.model(), split.queries, ranks=(1, 2))
    assert again.recall[1] == pytest.approx(result.reached["recall@1"])
    assert again.map_at_r == pytest.approx(result.reached["map_at_r"])


def test_a_run_leaves_what_it_says(plain: Any) -> None:
    assert set(plain.files) == {
        "model", "last", "checkpoint", "options", "metrics", "results", "attention", "tensorboard",
    }  # fmt: skip
    assert all(Path(path).exists() for path in plain.files.values())
    record = json.loads(Path(plain.files["results"]).read_text(encoding="utf-8"))
    assert record["best_epoch"] == plain.best_epoch
    assert record["files"] == plain.files
    options = json.loads(Path(plain.files["options"]).read_text(encoding="utf-8"))
    assert TrainOptions.from_json(options["options"]) == plain.options
    assert options["pictures"]["train"] == {"pictures": 16, "classes": 4}
    assert {"torch", "lightning", "simexplain"} <= options["versions"].keys()
    with Path(plain.files["metrics"]).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert float(rows[2]["loss"]) == plain.rows[2]["loss"]
    assert rows[0]["loss"] == ""
    loss = plain.rows[2]["loss/metric"] + plain.options.gamma * plain.rows[2]["loss/mining"]
    assert plain.rows[2]["loss"] == pytest.approx(loss, rel=1e-5)
    assert [row["lr/network"] for row in plain.rows[1:]] == [0.0, 1e-4]
    assert not list(plain.folder.rglob("*.part"))


def test_attention_is_drawn_each_epoch_on_the_same_pictures(plain: Any) -> None:
    from PIL import Image

    drawn = sorted((plain.folder / "attention").iterdir())
    assert [path.name for path in drawn] == [f"epoch_{n:03d}.png" for n in range(3)]
    pictures = [np.asarray(Image.open(path).convert("RGB"), dtype=int) for path in drawn]
    assert pictures[0].shape == pictures[2].shape
    # The pictures are where they were; the maps beside them have moved.
    assert 0 < (pictures[0] != pictures[2]).any(axis=2).mean() < 0.6


def test_explain_takes_the_model(plain: Any, data: Path) -> None:
    files = [data / "class05/0.png", data / "class05/1.png", data / "class06/0.png"]
    model = load_model(plain.files["model"])
    assert model.preprocess.size == (32, 32)
    explained = explain(model, files, arch="triplet", weights="signed")
    assert explained.embeddings.shape[-1] == 12
    assert explained.model.startswith("model (timm:test_efficientnet)")


def test_attribute_takes_an_avsl_model(avsl: Any, data: Path) -> None:
    model = load_model(avsl.files["model"])
    assert model.origin == "trained"
    assert int(model.edge_updates) == avsl.best_epoch * 2
    result = attribute(model, data / "class05/0.png", [data / "class06/0.png"])
    assert not [w for w in result.warnings if "heads" in w]
    row = avsl.rows[-1]
    levels = sum(row[f"loss/avsl/{part}"] for part in ("level_0", "level_1", "level_2", "overall"))
    assert row["loss"] == pytest.approx(levels, rel=1e-5)
    assert float(result.distances[0]) > 0


def test_best_and_last_are_told_apart(data: Path, tmp_path: Path) -> None:
    result = train(data, out=tmp_path, force=True, **{**TINY, "epochs": 4, "lr": 0.05})
    scores = [row["recall@1"] for row in result.rows[1:]]
    assert result.best == max(scores)
    assert result.best_epoch == 1 + scores.index(max(scores))
    equal = same(state_of(tmp_path / "model.pt"), state_of(tmp_path / "last.pt"))
    assert equal == (result.best_epoch == 4)
    by_map = train(data, out=tmp_path, force=True, **{**TINY, "best": "map_at_r"})
    assert by_map.best == max(row["map_at_r"] for row in by_map.rows[1:])


def test_no_improvement_is_told(data: Path, tmp_path: Path) -> None:
    result = train(data, out=tmp_path / "run", **{**TINY, "lr": 0.0, "head_lr": 0.0, "epochs": 1})
    assert result.warnings == ("Training did not improve retrieval over the untrained network.",)


def test_what_rose_and_what_fell_is_told_where_the_chosen_figure_did_not_rise() -> None:
    before = {"epoch": 0, "recall@1": 0.5, "recall@2": 0.6, "recall@4": 0.9, "map_at_r": 0.3}
    after = {"epoch": 1, "recall@1": 0.5, "recall@2": 0.7, "recall@4": 0.8, "map_at_r": 0.35}

    def record(row: dict) -> str:
        result = TrainResult(Path(), TrainOptions(), (before, row), 1, row["recall@1"], {})
        assert not result.improved
        return not_improved(result)

    assert record(after) == (
        "Training did not raise Recall@1, by which the epoch was chosen: Recall@2 0.600 to 0.700, "
        "MAP@R 0.300 to 0.350 rose; Recall@4 0.900 to 0.800 fell."
    )
    worse = {**before, "epoch": 1, "recall@1": 0.4}
    assert record(worse) == (
        "Training did not improve retrieval over the untrained network: Recall@1 0.500 to 0.400 "
        "fell."
    )


def test_the_same_seed_gives_the_same_and_another_another(data: Path, tmp_path: Path) -> None:
    settings = {**TINY, "epochs": 1}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(len(name) + seed)
        train(data, out=tmp_path / name, **settings, seed=seed)
    a, b, c = (state_of(tmp_path / name / "model.pt") for name in "abc")
    assert same(a, b)
    assert not same(a, c)


def test_the_callers_state_is_as_before(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    random, handler = torch.get_rng_state(), signal.getsignal(signal.SIGINT)
    filters, threads = list(warnings.filters), torch.get_num_threads()
    numbers = np.random.get_state()[1].copy()  # noqa: NPY002
    train(data, out=tmp_path / "run", **{**TINY, "epochs": 1})
    assert torch.equal(torch.get_rng_state(), random)
    assert signal.getsignal(signal.SIGINT) is handler
    assert list(warnings.filters) == filters
    assert torch.get_num_threads() == threads
    assert (np.random.get_state()[1] == numbers).all()  # noqa: NPY002


def test_it_says_nothing_by_itself(data: Path, tmp_path: Path, capfd: Any) -> None:
    train(data, out=tmp_path / "run", **{**TINY, "epochs": 1})
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_listeners_hear_every_step_and_epoch(data: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    epochs: list[int] = []
    work: set[str] = set()
    lines = Listeners(
        lambda done, total, loss: steps.append((done, total)),
        lambda row: epochs.append(row["epoch"]),
        lambda what, done, total: work.add(what),
    )
    train(data, out=tmp_path / "run", listeners=lines, **{**TINY, "batches_per_epoch": 3})
    assert steps == [(n, 6) for n in range(1, 7)]
    assert epochs == [0, 1, 2]
    assert "Checking pictures" in work


def test_interrupting_keeps_the_last_checkpoint(data: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, loss: float) -> None:
        if done == 3:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(data, out=tmp_path / "run", listeners=Listeners(step=stop), **TINY)
    assert signal.getsignal(signal.SIGINT) is before
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert state["place"]["step"] == 2
    assert not list((tmp_path / "run").rglob("*.part"))


def test_a_loss_that_is_not_finite_ends_the_run_with_a_sentence(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"stopped being finite at step \d.*--clip"):
        train(data, out=tmp_path / "run", **{**TINY, "lr": 1e30, "head_lr": 1e30, "epochs": 5})
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert all(torch.isfinite(tensor).all() for tensor in state["place"]["sums"].values())


def test_half_precision_and_several_terms(data: Path, tmp_path: Path) -> None:
    settings = {**TINY, "precision": "bf16", "bce": 0.1, "bce_mining": 0.1, "epochs": 1}
    row = train(data, out=tmp_path / "run", **settings, mining="siamese").rows[1]
    assert {"loss/metric", "loss/mining", "loss/bce", "loss/bce_mining"} <= row.keys()
    assert math.isfinite(row["loss"])
    kinds = {tensor.dtype for tensor in state_of(tmp_path / "run/model.pt").values()}
    assert kinds <= {torch.float32, torch.int64}


def test_masks_are_trained_with(data: Path, tmp_path: Path) -> None:
    for path in data.rglob("*.png"):
        mask = tmp_path / "masks" / path.relative_to(data)
        mask.parent.mkdir(parents=True, exist_ok=True)
        noise(40, 40).convert("L").point(lambda level: 255 * (level > 128)).save(mask)
    settings = {**TINY, "mask_weight": 0.5, "epochs": 1}
    source = Source(masks=tmp_path / "masks")
    row = train(data, out=tmp_path / "run", source=source, **settings).rows[1]
    assert 0 < row["loss/masks"] < 1
    with pytest.raises(ImageError, match=r"no picture of .* has one"):
        train(data, out=tmp_path / "other", **settings)


def test_without_test_pictures_the_last_model_is_kept(data: Path, tmp_path: Path) -> None:
    records = Source().read(data).train
    split = DataSplit(train=records, queries=(), name="all", root=data)
    result = train(split, out=tmp_path / "run", **TINY)
    assert result.best_epoch == 2
    assert result.untrained == {}
    assert same(state_of(tmp_path / "run/model.pt"), state_of(tmp_path / "run/last.pt"))


def test_all_problems_of_the_data_are_told_before_anything_is_written(tmp_path: Path) -> None:
    data = striped(tmp_path / "data", classes=6)
    (data / "class00/0.png").write_text("no picture", encoding="utf-8")
    for index in (1, 2, 3):
        (data / f"class01/{index}.png").unlink()
    with pytest.raises(ImageError) as caught:
        train(data, out=tmp_path / "run", **TINY)
    text = str(caught.value)
    for part in ("class01", "class00/0.png", "3 classes"):
        assert part in text
    assert not (tmp_path / "run").exists()


def test_nothing_is_overwritten_silently(plain: Any, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "model.pt").write_bytes(b"mine")
    (run / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match=r"holds a run already \(model.pt\); say --force"):
        train(data, out=run, **TINY)
    assert (run / "model.pt").read_bytes() == b"mine"
    (run / "attention").mkdir()
    (run / "attention" / "epoch_099.png").touch()
    train(data, out=run, force=True, **{**TINY, "epochs": 1})
    assert (run / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert not (run / "attention" / "epoch_099.png").exists()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        train(data, out=tmp_path / "file", **TINY)


def test_what_is_not_of_a_run_is_never_removed(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    mine = [
        run / "sub.part", run / "below" / "film.part", run / "tensorboard" / "other" / "keep",
        run / "attention" / "epoch_x.png", run / "checkpoints" / "older.ckpt",
    ]  # fmt: skip
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match=r"\(checkpoints\).*; say --force"):
        train(data, out=run, **TINY)
    stale = [run / "attention/epoch_099.png", run / "tensorboard/events.out.tfevents.1.host"]
    for path in stale:
        path.touch()
    train(data, out=run, force=True, **{**TINY, "epochs": 1})
    assert all(path.read_text(encoding="utf-8") == "mine" for path in mine)
    assert not any(path.exists() for path in stale)


def test_a_run_lies_outside_its_data(tmp_path: Path) -> None:
    data = striped(tmp_path / "data")
    before = sorted(tmp_path.rglob("*"))
    for out in (data, data / "trained", data / "class00" / "run", tmp_path / "x/../data/run"):
        with pytest.raises(OutputError, match="lies within the data"):
            train(data, out=out, force=True, **TINY)
    split = Source().read(striped(tmp_path / "attention"))
    with pytest.raises(OutputError, match=r"keeps its own files; choose another"):
        train(split, out=tmp_path, force=True, **TINY)
    with pytest.raises(OutputError, match="an empty name"):
        train(data, out="", **TINY)
    assert [path for path in sorted(tmp_path.rglob("*")) if "attention" not in str(path)] == before


def test_folders_that_cannot_be_are_told_before(data: Path, tmp_path: Path) -> None:
    for name in ("attention", "tensorboard", "checkpoints"):
        run = tmp_path / f"with_{name}"
        run.mkdir()
        (run / name).touch()
        for force in (False, True):
            with pytest.raises(OutputError, match="is a file where a folder must go"):
                train(data, out=run, force=force, **TINY)
    for bad, record in (("x" * 300, "too long"), ("a\0b", "null"), ("caf\udce9", "in UTF-8")):
        with pytest.raises(OutputError, match=f"{record}.*choose another folder") as caught:
            train(data, out=tmp_path / bad, **TINY)
        str(caught.value).encode()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot be written.*choose another folder"):
        train(data, out=tmp_path / "file" / "run", **TINY)


def test_classes_need_no_name_in_utf_8(tmp_path: Path) -> None:
    data = striped(tmp_path / "data")
    try:
        for number in (1, 5):
            (data / f"class0{number}").rename(data / f"class0{number}_caf\udce9")
    except OSError:
        pytest.skip("this file system takes names in UTF-8 alone")
    (data / "class05_caf\udce9" / "0.png").write_bytes(
        (data / "class01_caf\udce9" / "0.png").read_bytes()
    )
    result = train(data, out=tmp_path / "run", **{**TINY, "epochs": 1, "attention_triplets": 2})
    assert "caf" in result.warnings[0]
    record = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert record["warnings"] == list(result.warnings)


def test_no_thread_is_left(data: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, loss: float) -> None:
        raise KeyboardInterrupt

    before = set(threading.enumerate())
    train(data, out=tmp_path / "run", **{**TINY, "epochs": 1})
    assert set(threading.enumerate()) == before
    with pytest.raises(KeyboardInterrupt):
        train(data, out=tmp_path / "other", listeners=Listeners(step=stop), **TINY)
    assert set(threading.enumerate()) == before


def test_gradients_that_are_off_are_on_within(data: Path, tmp_path: Path) -> None:
    settings = {**TINY, "epochs": 1, "mining": "triplet"}
    with torch.inference_mode():
        first = train(data, out=tmp_path / "first", **settings)
        assert torch.is_inference_mode_enabled()
    with torch.no_grad():
        train(data, out=tmp_path / "second", **settings)
        assert not torch.is_grad_enabled()
    assert first.rows[1]["loss"] > 0
    assert same(state_of(tmp_path / "first/last.pt"), state_of(tmp_path / "second/last.pt"))


def test_16_bits_need_a_gpu(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(ModelError, match=r"bf16 on a CPU, got 16.*--precision bf16"):
        train(data, out=tmp_path / "run", **{**TINY, "accelerator": "auto", "precision": "16"})
    assert not (tmp_path / "run").exists()


# The parts


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.write("file", b"old")

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        folder.write("file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_what_a_killed_run_left_is_tidied_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".simexplain-last.ckpt.part").touch()
    (tmp_path / ".simexplain-abc").mkdir()
    mine = {"notes.txt", "film.part", "model.pt.part"}
    for name in mine:
        (tmp_path / name).touch()
    RunFolder(tmp_path).tidy()
    assert {path.name for path in tmp_path.rglob("*")} == {"checkpoints", *mine}


def test_drafts_are_what_is_tidied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.replace", lambda *_: None)
        patched.setattr("pathlib.Path.unlink", lambda *_, **__: None)
        folder.write("checkpoints/last.ckpt", b"half")
        folder.write("attention/epoch_001.png", b"half")
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2
    folder.tidy()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_wrong_settings_are_refused_in_one_sentence() -> None:
    wrong: list[dict[str, Any]] = [
        {"loss": "none"}, {"epochs": 0}, {"lr": -1.0}, {"ranks": ()}, {"size": (0, 3)},
        {"classes_per_batch": 1},
        {"devices": 3, "classes_per_batch": 4}, {"warmup_epochs": 99}, {"bce_mining": 1.0},
        {"lr": "fast"}, {"edges_per_node": 1.5},
        {"avsl": 1}, {"avsl": True, "bce": 0.1}, {"avsl": True, "loss": "quadruplet"},
        {"lr": math.inf}, {"precision": "16", "accelerator": "cpu"}, {"size": 224},
        {"learning": 1}, {"lr": math.nan}, {"ranks": (1, 0)},
        {"ranks": ("1",)}, {"size": (1, 2, 3)},
    ]  # fmt: skip
    for settings in wrong:
        with pytest.raises(ModelError, match=r"^[^\n]+\.$"):
            with_options(TrainOptions(), settings)


def test_a_batch_has_no_more_classes_than_there_are_unless_told() -> None:
    own = TrainOptions()
    assert [own.settled(n).classes for n in (1, 4, 16, 500)] == [2, 4, 16, 16]
    assert replace(own, classes_per_batch=20).settled(4).classes_per_batch == 20


def test_every_range_and_choice_is_of_a_setting_and_holds_its_default() -> None:
    own = TrainOptions()
    about = {name: known for name, (_, known) in declared(TrainOptions).items()}
    assert list(about) == list(vars(own))
    for name, known in about.items():
        value = getattr(own, name)
        if type(value) in (int, float):
            assert 0 <= known.least <= value <= known.most, "every number has a range"
        assert not known.names or value in known.names
    assert set(OPTIMISERS) == set(about["optimiser"].names)
    assert set(SCHEDULES) == set(about["schedule"].names)


@pytest.mark.parametrize("bad", [{"margn": 1}, {"margin": "x", "negatives": "none"}])
def test_wrong_settings_of_a_loss_are_refused(bad: dict[str, Any]) -> None:
    def build(**record: Any) -> None:
        options = TrainOptions(**{**TINY, **record})
        build_objective(build_model(options), options, classes=4)

    with pytest.raises(ModelError):
        build(loss_options=tuple(bad.items()))
    with pytest.raises(ModelError, match=r"share.*\(0, 1\]"):
        build(mining="triplet", mining_options=(("share", 2.0),))


def test_learning_rates_follow_their_schedules() -> None:
    steps, own = 10, TrainOptions(epochs=4, warmup_epochs=0)
    rates = lambda options, group="heads": [  # noqa: E731
        rate_factor(options, group, step, steps) for step in range(40)
    ]
    assert rates(own) == [1.0] * 40
    cosine = rates(replace(own, schedule="cosine"))
    assert cosine[0] == 1.0
    assert cosine[20] == pytest.approx(0.5)
    assert all(a > b for a, b in pairwise(cosine))
    stepped = rates(replace(own, schedule="step", step_epochs=2, step_factor=0.1))
    assert stepped == [1.0] * 20 + [0.1] * 20
    linear = rates(replace(own, warmup_epochs=1, warmup="linear"))
    assert linear[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert linear[10:] == [1.0] * 30
    head = replace(own, warmup_epochs=2)
    assert rates(head, "network") == [0.0] * 20 + [1.0] * 20
    assert rates(head) == [1.0] * 40


def test_mining_begins_and_grows_when_it_shall() -> None:
    own = TrainOptions(mining="triplet", mining_start=1, mining_warmup=2)
    result = [mining_factor(own, step, steps=5) for step in range(20)]
    assert result[:5] == [0.0] * 5
    assert result[5:15] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert result[15:] == [1.0] * 5


@pytest.mark.parametrize("avsl", [False, True])
def test_every_parameter_is_in_one_group_with_its_own_rate(avsl: bool) -> None:
    more = {"avsl": avsl, "loss": "proxy_anchor", "lr": 1.0, "head_lr": 2.0, "proxy_lr": 3.0}
    options = TrainOptions(**{**TINY, **more, "reliability_lr": 4.0})
    model = build_model(options)
    objective = build_objective(model, options, classes=5)
    optimiser = optimiser_for(model, objective, options)
    seen = [id(p) for group in optimiser.param_groups for p in group["params"]]
    assert len(seen) == len(set(seen))
    assert set(seen) == {id(p) for p in (*model.parameters(), *objective.parameters())}
    rates = {group["name"]: group["lr"] for group in optimiser.param_groups}
    assert rates == {"network": 1.0, "heads": 2.0, "proxies": 3.0} | (
        {"reliability": 4.0} if avsl else {}
    )
    if not avsl:
        heads = next(g for g in optimiser.param_groups if g["name"] == "heads")["params"]
        assert {id(p) for p in heads} == {id(p) for p in last_linear(model.network).parameters()}


def test_warming_up_the_heads_leaves_the_network_and_its_moments_alone() -> None:
    options = TrainOptions(**{**TINY, "warmup_epochs": 1})
    model = build_model(options)
    objective = build_objective(model, options, classes=4)
    optimiser = optimiser_for(model, objective, options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    set_training(model, freeze_bn=True)
    objective(model, torch.randn(8, 3, 32, 32), torch.arange(8) // 2).total.backward()
    set_rates(optimiser, options, step=0, steps=3)
    drop_idle(optimiser)
    optimiser.step()
    moved = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert moved == {"module.classifier.weight", "module.classifier.bias"}
    assert len(optimiser.state) == 2


def test_frozen_statistics_do_not_move_and_others_do() -> None:
    for frozen in (True, False):
        model = build_model(TrainOptions(**TINY))
        before = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
        set_training(model, freeze_bn=frozen)
        model(torch.randn(8, 3, 32, 32))
        still = all(torch.equal(dict(model.named_buffers())[n], b) for n, b in before.items())
        assert still == frozen
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert all(p.requires_grad for norm in norms for p in norm.parameters())


def test_a_network_is_built_without_touching_chance() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_model(TrainOptions(**TINY))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert same(first.state_dict(), build_model(TrainOptions(**TINY)).state_dict())


def test_ablations_build_what_the_table_says() -> None:
    for name, levels in (("baseline", 1), ("+M", 3), ("full", 3)):
        options = TrainOptions(**{**TINY, "avsl": True, "loss": "proxy_anchor", "ablation": name})
        assert len(build_model(options).levels) == levels


def test_watched_triplets_are_of_the_roles_they_say_and_always_the_same() -> None:
    records = [
        Record(Path(f"{label}{n}.png"), label, group=f"g{n % 2}")
        for label in "abcd"
        for n in range(4)
    ]
    result = attention_triplets_of(records, 3, seed=2)
    assert result == attention_triplets_of(records, 3, seed=2)
    assert result != attention_triplets_of(records, 3, seed=3)
    assert len({anchor.label for anchor, _, _ in result}) == 3
    for anchor, positive, negative in result:
        assert anchor.label == positive.label != negative.label
        assert anchor.path != positive.path
        assert anchor.group != positive.group
    assert attention_triplets_of(records[:4], 3, seed=2) == ()


def test_searchable_data_have_something_to_find() -> None:
    def split(queries: list[tuple[str, str]], gallery: list[tuple[str, str]] | None) -> DataSplit:
        made = [
            None if part is None
            else tuple(Record(Path(f"{n}{side}.png"), *lines) for n, lines in enumerate(part))
            for side, part in enumerate((queries, gallery))
        ]  # fmt: skip
        return DataSplit((), made[0] or (), made[1])

    twice = [("a", "x"), ("a", "x"), ("b", "y")]
    assert searchable(split(twice, None), grouped=False)
    assert not searchable(split(twice, None), grouped=True)
    assert not searchable(split([("a", "x"), ("b", "x")], None), grouped=False)
    assert searchable(split([("a", "x")], [("a", "y")]), grouped=True)
    assert not searchable(split([("a", "x")], [("a", "x"), ("b", "y")]), grouped=True)
    assert not searchable(split([("a", "x")], [("b", "y")]), grouped=False)
