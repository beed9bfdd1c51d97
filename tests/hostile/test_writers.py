"""Kills, races, full and read-only disks: nothing that was there is lost, and no files are mixed.

The quick part takes one command and a few moments; ``-m slow`` all commands and every step.
"""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from cli_runs import simexplain
from hostile_commands import Place, prepared
from hostile_writers import (
    OUT,
    WRITERS,
    Reference,
    ended,
    fingerprint,
    forked,
    killed,
    raced,
    reference,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, signals and locks")
QUICK = ("bank",)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return prepared(tmp_path_factory.mktemp("writers"))


@pytest.fixture(scope="module")
def references(place: Place) -> dict[str, Reference]:
    """What undisturbed runs leave; made when asked for."""
    return References(place)


class References(dict[str, Reference]):
    def __init__(self, place: Place) -> None:
        self.place = place

    def __missing__(self, name: str) -> Reference:
        self[name] = reference(name, self.place, self.place.root / "whole" / name)
        return self[name]


@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("name", QUICK)
def test_killed_once(
    references: dict[str, Reference], tmp_path: Path, name: str, there: bool
) -> None:
    """Before its last but third step, which is when files move into place."""
    own = references[name]
    steps = _steps(own, tmp_path / "count", there)
    assert steps > 3
    assert killed(own, tmp_path / "dies", there, step=steps - 3) != "ended"


def _steps(own: Reference, folder: Path, there: bool) -> int:
    """How many steps an undisturbed run has: a child that would die at the last of them."""
    low, high = 0, 1
    while killed(own, folder / str(high), there, step=high) != "ended":
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        over = killed(own, folder / str(middle), there, step=middle) == "ended"
        low, high = (low, middle) if over else (middle, high)
    return high


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_killed_at_every_step_and_at_random(
    references: dict[str, Reference], tmp_path: Path, name: str
) -> None:
    states: Counter[str] = Counter()
    for there in (False, True):
        for step in range(10_000):
            state = killed(references[name], tmp_path / f"{there}{step}", there, step=step)
            states[state] += 1
            if state == "ended":
                break
        for seed in range(10):
            states[killed(references[name], tmp_path / f"{there}r{seed}", there, seed=seed)] += 1
    assert states["none"] > 3
    assert states["old"] > 3


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(a, b, marks=() if (a, b) in {("explain", "match"), ("bank", "bank")}
                     else pytest.mark.slow)
        for a in WRITERS for b in WRITERS if a <= b
    ],
)  # fmt: skip
def test_two_at_once(
    references: dict[str, Reference], tmp_path: Path, first: str, second: str, force: bool
) -> None:
    raced(references[first], references[second], tmp_path / OUT, force=force)


@pytest.mark.parametrize("size", [0, 300, 3000])
@pytest.mark.parametrize("name", ["explain", "match", "bank"])
def test_a_full_disk(
    references: dict[str, Reference], tmp_path: Path, name: str, size: int
) -> None:
    """No file may grow beyond so many bytes: one sentence, and what was there is still there."""
    own = references[name]
    folder = tmp_path / "full"
    shutil.copytree(own.folders[0], folder)
    child = forked(own.writer.line(own.place, 1, force=True), folder, partial(_bounded, size))
    assert ended(child) == 1
    assert fingerprint(folder) == own.prints[0]
    assert not list(folder.rglob(".simexplain-draft-*"))


def _bounded(size: int) -> None:
    """From now on no file of this process may grow beyond so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.fixture
def read_only(references: dict[str, Reference], tmp_path: Path) -> Iterator[Path]:
    """A read-only disk with a result on it."""
    disk = tmp_path / "disk"
    shutil.copytree(references["explain"].folders[0], disk)
    mounts = (["mount", "--bind", disk, disk], ["mount", "-o", "remount,bind,ro", disk])
    try:
        if any(subprocess.run(words, capture_output=True).returncode for words in mounts):
            pytest.skip("mounting is not allowed here")
        yield disk
    finally:
        subprocess.run(["umount", disk], capture_output=True)


def test_a_read_only_disk(references: dict[str, Reference], read_only: Path) -> None:
    own = references["explain"]
    for out in (OUT, "another"):
        words = (*own.writer.words(own.place, 1), "--out", read_only / out, "--force")
        done = simexplain(*words, cwd=own.place.root)
        assert (done.code, done.err.count("\n")) == (1, 1), done.err
        assert "cannot be written" in done.err
    assert fingerprint(read_only) == own.prints[0]
