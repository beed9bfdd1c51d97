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
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from cli_runs import simexplain
from hostile_commands import PICTURE, Place, prepared
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


QUICK_DISK = ("explain", "match", "bank")
ON_DISKS = [name for name in PICTURE if "picture as" not in name and "--vector" not in name]


@pytest.mark.parametrize("size", [0, 300, 3000])
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK_DISK else pytest.mark.slow) for n in WRITERS],
)
def test_a_full_disk(
    references: dict[str, Reference], tmp_path: Path, name: str, size: int
) -> None:
    """No file may grow beyond so many bytes: one sentence, and what was there is still there."""
    own = references[name]
    folder = tmp_path / "full"
    shutil.copytree(own.folders[0], folder)
    child = forked(own.writer.line(own.place, 1, force=True), folder, partial(_bounded, size))
    assert ended(child) == 1
    if own.writer.lost:
        assert own.writer.mark(folder) == own.prints[0]
    assert not list(folder.rglob(".simexplain-draft-*"))
    again = simexplain(*own.writer.line(own.place, 1, force=True), cwd=folder)
    assert again.code == 0, again.err
    assert own.writer.mark(folder) == own.prints[1]


def _bounded(size: int) -> None:
    """From now on no file of this process may grow beyond so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@contextmanager
def mounted(disk: Path, *mounts: tuple[str, ...]) -> Iterator[Path]:
    """A folder as a disk of its own."""
    try:
        if any(subprocess.run(["mount", *one], capture_output=True).returncode for one in mounts):
            pytest.skip("mounting is not allowed here")
        yield disk
    finally:
        subprocess.run(["umount", disk], capture_output=True)


@pytest.fixture
def read_only(references: dict[str, Reference], tmp_path: Path) -> Iterator[Path]:
    """A read-only disk with a result on it."""
    disk = tmp_path / "disk"
    shutil.copytree(references["explain"].folders[0], disk)
    at = str(disk)
    with mounted(disk, ("--bind", at, at), ("-o", "remount,bind,ro", at)):
        yield disk


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for names and a few kilobytes, no more."""
    disk = tmp_path / "small"
    disk.mkdir()
    with mounted(disk, ("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk))):
        (disk / "filler").write_bytes(bytes(56 * 1024))
        yield disk


def test_a_read_only_disk(references: dict[str, Reference], read_only: Path) -> None:
    own = references["explain"]
    for out in (OUT, "another"):
        words = (*own.writer.words(own.place, 1), "--out", read_only / out, "--force")
        done = simexplain(*words, cwd=own.place.root)
        assert (done.code, done.err.count("\n")) == (1, 1), done.err
        assert "cannot be written" in done.err
    assert fingerprint(read_only) == own.prints[0]


@pytest.mark.slow
@pytest.mark.parametrize("command", ON_DISKS)
def test_every_command_on_a_read_only_disk(place: Place, read_only: Path, command: str) -> None:
    before = sorted(read_only.rglob("*"))
    words = PICTURE[command](place, Path(place.good), read_only / "new")
    done = simexplain(*words, cwd=place.root)
    assert (done.code, done.err.count("Error: ")) == (1, 1), done.err
    assert "cannot be written" in done.err
    assert sorted(read_only.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("command", [name for name in ON_DISKS if name != "train"])
def test_every_command_on_a_full_disk(place: Place, full: Path, command: str) -> None:
    words = PICTURE[command](place, Path(place.good), full / "new")
    done = simexplain(*words, cwd=place.root)
    assert (done.code, done.err.count("Error: ")) == (1, 1), done.err
    assert "cannot be written" in done.err
    if command not in ("index", "batch"):  # whose beginning is gone on with
        assert [path.name for path in full.iterdir()] == ["filler"]
