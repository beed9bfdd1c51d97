"""Results in a folder: two processes, kills in the middle, names that somebody else takes."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import TinyNet
from pictures import noise
from side_by_side import another_process
from simexplain_cli.result_commands import Made, _saved

from simexplain import Explanation, as_similarity_model, explain
from simexplain.errors import OutputError
from simexplain.publishing import digest_of, locked


@pytest.fixture
def results() -> list[Explanation]:
    """Two explanations whose arrays differ."""
    torch.manual_seed(0)
    model = as_similarity_model(TinyNet().eval())
    pictures = [noise(48, 40, seed=seed) for seed in range(3)]
    return [explain(model, pictures[: 2 + n], method="sam", check=False) for n in (0, 1)]


def check_whole(folder: Path) -> Explanation:
    """Every file is of the run that wrote the manifest."""
    record = json.loads((folder / "explanation.json").read_text("utf-8"))
    assert {Path(name).name for name in record["files"].values()} == {
        *record["digests"], "explanation.json",
    }  # fmt: skip
    for name, digest in record["digests"].items():
        assert digest_of(folder / name) == digest
    return Explanation.load(folder)


@pytest.mark.parametrize("there", [False, True])
def test_of_two_that_write_into_one_folder_one_is_refused(
    results: list[Explanation], tmp_path: Path, there: bool
) -> None:
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        if there:
            folder.mkdir()

        def save(result: Explanation, folder: Path = folder) -> str:
            try:
                result.save(folder)
            except OutputError as refused:
                return str(refused)
            return ""

        with ThreadPoolExecutor(2) as pool:
            errors = [error for error in pool.map(save, results) if error]
        assert len(errors) == 1
        assert "is there already" in errors[0]
        check_whole(folder)
        assert not list(tmp_path.glob(".simexplain-*")) + list(folder.glob(".simexplain-*"))


@pytest.mark.parametrize("moved", range(6))
def test_killed_while_replacing_another(
    results: list[Explanation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    pair, triplet = results
    pair.save(tmp_path / "found")
    replace, calls = Path.replace, []

    def dies(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) > moved:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        triplet.save(tmp_path / "found", force=True)
    monkeypatch.undo()
    if moved == 0:  # nothing was replaced yet
        assert torch.equal(Explanation.load(tmp_path / "found").maps, pair.maps)
    else:
        with pytest.raises(OutputError, match="files of two runs"):
            Explanation.load(tmp_path / "found")
    triplet.save(tmp_path / "found", force=True)
    assert torch.equal(check_whole(tmp_path / "found").maps, triplet.maps)


def test_files_of_earlier_versions_have_no_digests(
    results: list[Explanation], tmp_path: Path
) -> None:
    results[0].save(tmp_path / "found")
    path = tmp_path / "found" / "explanation.json"
    record = json.loads(path.read_text("utf-8"))
    del record["digests"]
    path.write_text(json.dumps(record), encoding="utf-8")
    assert torch.equal(Explanation.load(tmp_path / "found").maps, results[0].maps)


def test_a_name_that_somebody_takes_is_not_taken_again(
    results: list[Explanation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    class Raced(Explanation):
        def write(self, folder: Path, *, force: bool = False, **_: object) -> dict[str, str]:
            if str(folder) == "found-1" and not folder.exists():
                results[1].save(folder)  # another run, in between
            return super().write(folder, force=force)

    made = Made(Raced(**vars(results[0])), list)
    files = _saved(made, None, "found", force=False)
    assert files["manifest"] == str(Path("found-2", "explanation.json"))
    assert torch.equal(check_whole(Path("found-1")).maps, results[1].maps)
    assert torch.equal(check_whole(Path("found-2")).maps, results[0].maps)
    with pytest.raises(OutputError, match="is there already"):
        _saved(made, Path("found-2"), "found", force=False)


def hold(folder: Path, ready: object, done: object) -> None:
    """Another process that works on a draft."""
    with locked(folder):
        ready.set()
        done.wait(60)


def test_drafts_of_the_dead_are_removed_and_those_of_the_living_kept(
    results: list[Explanation], tmp_path: Path
) -> None:
    pytest.importorskip("fcntl")
    dead, living, young = (tmp_path / f".simexplain-draft-{name}" for name in "abc")
    for folder in (dead, living, young):
        (folder / "draft").mkdir(parents=True)
    for folder in (dead, living):
        os.utime(folder, (time.time() - 3600,) * 2)
    context = another_process()
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(living, ready, done))
    process.start()
    try:
        assert ready.wait(60)
        results[0].save(tmp_path / "found")
        assert not dead.exists()
        assert living.exists()
        assert young.exists()
    finally:
        done.set()
        process.join()


def test_a_forged_manifest_removes_no_picture_of_the_users(
    results: list[Explanation], tmp_path: Path
) -> None:
    results[0].save(tmp_path / "found")
    path = tmp_path / "found" / "explanation.json"
    own = tmp_path / "found" / "heatmap_of_mine.png"
    own.write_bytes(b"mine")
    record = json.loads(path.read_text("utf-8"))
    record["files"]["more"] = str(own)
    record["digests"][own.name] = "0" * 64
    path.write_text(json.dumps(record), encoding="utf-8")
    results[1].save(tmp_path / "found", force=True)
    assert own.read_bytes() == b"mine"
