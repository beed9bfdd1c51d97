"""``simexplain batch``: what it prints and writes, alone, in two processes, and when stopped."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

import torch
from batch_cases import NAMES, ROWS, contents, drawn, written
from cli_runs import Run, environment
from simexplain_cli.main import COMMANDS

from simexplain import Explanation, load_model, open_batch, save_model
from simexplain.models.loading import RANDOM

needs_lightning = pytest.mark.skipif(
    find_spec("lightning") is None or not torch.distributed.is_available(),
    reason="needs lightning and torch.distributed",
)


THREADS = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
"""As many as here: sums over more or fewer threads differ in their last bits."""


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network in a file: untrained ones are others in every process."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("network") / "model.pt"
    save_model(load_model("timm:test_efficientnet", weights=RANDOM, size=(128, 128)), path)
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return written(drawn(tmp_path / "pictures") / "rows.csv")


def test_a_batch_from_the_command_line(
    network: Path, table: Path, run: Callable[..., Run], here: Path
) -> None:
    with table.open("a", encoding="utf-8") as opened:
        opened.write("p0.png,gone.png,\n")
    done = run("batch", network, table, "--out", "out", "--weights", "signed", "--shard-rows", 4)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].endswith("method sam")
    assert lines[1] == f"{len(ROWS) + 1} rows, {len(ROWS)} explained, 1 failed"
    assert f"{len(NAMES)} pictures went through the network; 28 without sharing" in lines
    assert lines[-3:] == [
        "results: out/results.parquet",
        "manifest: out/batch.json",
        "maps: out/maps",
    ]
    assert done.err.startswith(
        "Warning: 1 row cannot be explained and will be skipped:\n  line 11: "
    )
    assert done.err.count("gone.png") == 1
    images = [table.parent / name for name in ("p0.png", "p1.png", "p2.png")]
    alone = run("explain", network, *images, "--arch", "triplet", "--weights", "signed",
                "--out", "alone")  # fmt: skip
    assert alone.code == 0
    wanted, batch = Explanation.load(here / "alone"), open_batch(here / "out")
    torch.testing.assert_close(batch.maps(0), wanted.maps[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(batch.explanation(0).weights, wanted.weights)
    assert run("batch", network, table, "--out", "out", "--weights", "signed", "--shard-rows", 4,
               "--resume").out.splitlines()[3] == "all rows were done already"  # fmt: skip


def test_json_and_pictures(network: Path, table: Path, run: Callable[..., Run], here: Path) -> None:
    (table.parent / "other").mkdir()
    moved = written(table.parent / "other" / "rows.csv", ROWS[:2])
    done = run("batch", network, moved, "--root", table.parent, "--out", "out", "--json",
               "--pictures", "--figures", "--method", "focus",
               "--option", "matching=1")  # fmt: skip
    assert (done.code, done.err) == (0, "")
    record = json.loads(done.out)
    assert (record["schema"], record["rows"], record["explained"], record["failed"]) == (1, 2, 2, 0)
    assert (record["method"], record["pictures"]) == ("focus", 5)
    assert record["work"]["forwards"] == 5
    assert set(record["files"]) == {"results", "manifest", "maps", "heatmaps", "figures"}
    assert len(list((here / "out" / "heatmaps").iterdir())) == 5
    assert len(list((here / "out" / "figures").iterdir())) == 2
    assert open_batch("out").manifest["options"]["matching"] == 1.0


def test_refusals(network: Path, table: Path, fails: Callable[..., str]) -> None:
    assert "'a.png' is not a CSV file" in fails("batch", network, "a.png", "--out", "x")
    assert "cannot be read" in fails("batch", network, "gone.csv", "--out", "x")
    assert "say one of them" in fails(
        "batch", network, table, "--out", "x", "--resume", "--force", code=2
    )
    assert "Expected a batch to resume" in fails("batch", network, table, "--out", "x", "--resume")
    bad = written(table.parent / "bad.csv", [("p0.png", "nope.png", ""), *ROWS])
    error = fails("batch", network, bad, "--out", "x", "--strict")
    assert "1 of 10 cannot: line 2: There is no file" in error
    assert "no layer 'nope'" in fails("batch", network, table, "--out", "x", "--layer", "nope")
    both = ("--sweep", "--layer", "body")
    assert "say it or --layer" in fails("batch", network, table, "--out", "x", *both, code=2)
    assert "'a.png' is a file" in fails("batch", network, table, "--out", "a.png")
    assert "--out" in fails("batch", network, table, code=2)


def test_another_weight_rule_on_resume(
    network: Path, table: Path, run: Callable[..., Run], fails: Callable[..., str]
) -> None:
    assert run("batch", network, table, "--out", "out").code == 0
    error = fails("batch", network, table, "--out", "out", "--resume", "--weights", "relative")
    assert "begun without option weights, and cannot go on with option weights='relative'" in error
    assert "holds a batch already" in fails("batch", network, table, "--out", "out")


def test_the_overview_names_it() -> None:
    assert list(COMMANDS).index("batch") < list(COMMANDS).index("compare")


@needs_lightning
@pytest.mark.parametrize("way", ["devices", "torchrun"])
def test_two_processes_give_the_same_batch(
    way: str, network: Path, table: Path, tmp_path: Path, run: Callable[..., Run]
) -> None:
    """Byte for byte, with a broken picture among them, which one of the two finds."""
    whole = (table.parent / "p3.png").read_bytes()
    (table.parent / "cut.png").write_bytes(whole[: len(whole) // 2])
    with table.open("a", encoding="utf-8") as opened:
        opened.write("p0.png,cut.png,\np0.png,gone.png,\n")
    given = ["batch", network, table, "--shard-rows", "2", "--accelerator", "cpu", "--out"]
    alone = run(*given, tmp_path / "one")
    assert alone.code == 0, alone.err
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    start = [sys.executable, "-m"]
    more = ["--devices", "2"]
    if way == "torchrun":
        start += ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "-m"]
        more = []
    done = subprocess.run(
        [*start, "simexplain", *map(str, given), tmp_path / "two", "--json", *more],
        env={**environment(), "MASTER_PORT": port, **THREADS},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["explained"], record["failed"]) == (len(ROWS), 2)
    assert record["work"]["rows"] == len(ROWS) + 1
    assert len(NAMES) <= record["work"]["forwards"] < record["work"]["separate"]
    assert "Traceback" not in done.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert open_batch(tmp_path / "one").manifest == open_batch(tmp_path / "two").manifest


SLOW = """
import os, sys, time
sys.argv[0] = "simexplain"
from simexplain.batching.folder import BatchFolder
from simexplain_cli.main import main
write = BatchFolder.write_shard
def slowly(self, shard, records, tensors):
    write(self, shard, records, tensors)
    print("shard", shard, flush=True, file=sys.stderr)
    time.sleep(0.3)
BatchFolder.write_shard = slowly
main()
"""


@pytest.mark.parametrize("struck", [signal.SIGINT, signal.SIGKILL])
def test_stopped_and_resumed(
    struck: signal.Signals,
    network: Path,
    table: Path,
    tmp_path: Path,
    run: Callable[..., Run],
) -> None:
    (tmp_path / "slow.py").write_text(SLOW, encoding="utf-8")
    given = list(map(str, ["batch", network, table, "--out", tmp_path / "out", "--shard-rows", 2]))
    started = subprocess.Popen(
        [sys.executable, tmp_path / "slow.py", *given], env=environment() | THREADS, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert started.stderr is not None
    assert started.stderr.readline() == "shard 0\n"
    time.sleep(0.1)
    started.send_signal(struck)
    _, err = started.communicate(timeout=100)
    if struck is signal.SIGINT:
        assert started.returncode == 130
        assert err.endswith(" --shard-rows 2 --resume\n")
        assert "Error: Interrupted; go on with: simexplain batch " in err
    assert (tmp_path / "out" / "parts" / "shard_00000.parquet").exists()
    assert not (tmp_path / "out" / "results.parquet").exists()
    done = run(*given, "--resume")
    assert done.code == 0, done.err
    given[given.index(str(tmp_path / "out"))] = str(tmp_path / "whole")
    assert run(*given).code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
