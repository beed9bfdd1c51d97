"""Commands that write, killed at each step, or racing another into one folder.

Most write their result at once. An index and a batch grow in place and are gone on with; what they
hold is compared through Python, since it says where it lies.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from cli_runs import simexplain
from hostile_commands import Place, Words
from simexplain_cli.main import main

from simexplain import Explanation, Matching, Segmentation, load_model, open_batch, open_index
from simexplain.errors import SimexplainError

OUT = "found"
STEPS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


@dataclass(frozen=True)
class Writer:
    """A command that writes ``found`` in the current folder, in one of two variants.

    Attributes:
        words: The command, for the first or the second variant.
        read: Reads what was written, or refuses it.
        mark: A digest of what is in a folder, or refuses it; empty if nothing.
        again: What is said to go on after a kill, until one of them succeeds.
        lost: States in which what was there is lost: none of a batch, which ``--force`` removes
            before its long work.
    """

    words: Callable[[Place, int], Words]
    read: Callable[[Path], object]
    mark: Callable[[Path], str]
    again: tuple[tuple[str, ...], ...] = (("--force",),)
    lost: tuple[str, ...] = ("none",)

    def line(self, place: Place, variant: int, *, force: bool) -> Words:
        """The whole command."""
        return (*self.words(place, variant), "--out", OUT, *(("--force",) if force else ()))


def _pictures(place: Place, variant: int) -> tuple[str, ...]:
    return (place.good, place.other) if variant else (place.other, place.good)


def fingerprint(folder: Path) -> str:
    """A digest of the names and bytes of all that is there but locks and drafts; empty if none."""
    found = sorted(
        path
        for path in (folder / OUT, *(folder / OUT).rglob("*"))
        if path.is_file() and ".lock" not in path.name and ".simexplain-draft-" not in str(path)
    )
    digest = hashlib.sha256()
    for path in found:
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest() if found else ""


def index_mark(folder: Path) -> str:
    """Of the pictures of an index and all its columns."""
    if not (folder / OUT).exists():
        return ""
    index = open_index(folder / OUT)
    digest = hashlib.sha256(repr((index.paths, sorted(index.errors))).encode())
    for name, column in sorted(index.tensors.items()):
        digest.update(name.encode() + column.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def batch_mark(folder: Path) -> str:
    """Of the rows of a batch and their maps, key by key."""
    if not (folder / OUT).is_dir() or not any((folder / OUT).iterdir()):
        return ""
    batch = open_batch(folder / OUT)
    digest = hashlib.sha256(repr(batch.table.to_pylist()).encode())
    for row in range(len(batch)):
        digest.update(batch.maps(row).contiguous().numpy().tobytes())
    return digest.hexdigest()


WRITERS = {
    "explain": Writer(
        lambda p, v: ("explain", p.network, *_pictures(p, v), "--no-check"), Explanation.load,
        fingerprint,
    ),
    "match": Writer(
        lambda p, v: ("match", p.network, *_pictures(p, v)), Matching.load, fingerprint
    ),
    "segment": Writer(
        lambda p, v: ("segment", p.network, *_pictures(p, v)), Segmentation.load, fingerprint
    ),
    "bank": Writer(
        lambda p, v: ("bank", p.network, p.data(v)), lambda path: path.read_bytes(), fingerprint
    ),
    "fit": Writer(
        lambda p, v: ("fit", p.network, p.data(v)), lambda path: load_model(path), fingerprint
    ),
    "index": Writer(
        lambda p, v: ("index", p.network, p.data(v), "--batch-size", "2"), open_index, index_mark,
        ((), ("--force",)), ("none", "refused"),
    ),
    "batch": Writer(
        lambda p, v: (
            "batch", p.network, p.table(Path(p.other if v else p.good)), "--shard-rows", "1"
        ),
        open_batch, batch_mark, (("--resume",), ("--force",)), (),
    ),
}  # fmt: skip


def forked(words: Words, folder: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Starts a command in a child; its process id.

    Args:
        words: The command.
        folder: Where it runs.
        prepare: What the child does first.
    """
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        torch.set_num_threads(1)  # a child has none of its parent's threads
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
        sys.argv = ["simexplain", *map(str, words)]
        os.chdir(folder)
        prepare()
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)
    return 0


def _die_at(number: int) -> None:
    """This process kills itself before its step of this number."""
    seen = [0]

    def step(event: str, arguments: tuple[object, ...]) -> None:
        writes = (
            event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+")
        )
        if event in STEPS or writes:
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen[0] += 1

    sys.addaudithook(step)


def ended(child: int) -> int:
    """The exit code of a child, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run leaves: fingerprints of both variants, and folders to copy."""

    writer: Writer
    place: Place
    folders: tuple[Path, Path]
    prints: tuple[str, str]
    seconds: float


def reference(name: str, place: Place, root: Path) -> Reference:
    """Runs both variants to their end."""
    writer, folders, began = WRITERS[name], (root / "0", root / "1"), time.monotonic()
    for variant, folder in enumerate(folders):
        folder.mkdir(parents=True)
        done = simexplain(*writer.line(place, variant, force=False), cwd=folder)
        assert done.code == 0, done.err
    seconds = (time.monotonic() - began) / 2
    prints = tuple(writer.mark(folder) for folder in folders)
    assert prints[0] != prints[1]
    return Reference(writer, place, folders, (prints[0], prints[1]), seconds)


def killed(own: Reference, folder: Path, there: bool, *, step: int = -1, seed: int = 0) -> str:
    """Kills the second variant at a step or at random, then looks at what is there.

    Args:
        own: What undisturbed runs leave.
        folder: A new one to work in.
        there: Whether the first variant is there already, to be replaced.
        step: Before which step; -1 for a moment by chance.
        seed: Of that chance.

    Returns:
        ``old``, ``new``, ``none``, ``refused`` (which a second run mends), or ``ended`` where the
        run was over before.

    Raises:
        AssertionError: If what is there is mixed, or a second run does not mend it.
    """
    if there:
        shutil.copytree(own.folders[0], folder)
    else:
        folder.mkdir(parents=True)
    child = forked(
        own.writer.line(own.place, 1, force=there),
        folder,
        partial(_die_at, step) if step >= 0 else lambda: None,
    )
    if step < 0:
        time.sleep(random.Random(seed).random() * own.seconds)
        os.kill(child, signal.SIGKILL)
    code = ended(child)
    state = _state(own, folder)
    assert not there or state not in own.writer.lost, "what was there is lost"
    for flags in own.writer.again:
        again = simexplain(*own.writer.words(own.place, 1), "--out", OUT, *flags, cwd=folder)
        if not again.code:
            break
        assert again.code == 1, again.err
        assert again.err.rstrip().endswith("."), again.err
    assert again.code == 0, again.err
    assert own.writer.mark(folder) == own.prints[1], "a second run gives something else"
    return "ended" if code >= 0 else state


def _state(own: Reference, folder: Path) -> str:
    """Of which run the files are."""
    try:
        mark = own.writer.mark(folder)
    except SimexplainError:
        return "refused"
    known = {own.prints[0]: "old", own.prints[1]: "new", "": "none"}
    if mark in known:
        return known[mark]
    try:
        own.writer.read(folder / OUT)
    except (SimexplainError, FileNotFoundError):
        return "refused"
    raise AssertionError(f"files of two runs are read: {sorted((folder / OUT).rglob('*'))}")


def raced(one: Reference, two: Reference, folder: Path, *, force: bool) -> None:
    """Two commands at once into one folder: each file is of one of them, and all of one are whole.

    Raises:
        AssertionError: If both say that they wrote what only one can have written, or files mix.
    """
    folder.mkdir(parents=True)
    children = [
        forked(own.writer.line(own.place, variant, force=force), folder)
        for variant, own in enumerate((one, two))
    ]
    codes = [ended(child) for child in children]
    assert set(codes) <= {0, 1}, codes
    assert 0 in codes, codes
    if one.writer is two.writer:
        assert one.writer.mark(folder) in (one.prints[0], two.prints[1]), codes
        assert force or 1 in codes, codes
        return
    for code, own in zip(codes, (one, two), strict=True):
        if code == 0:  # which the other may have replaced, but never in part
            try:
                own.writer.read(folder / OUT)
            except SimexplainError as refused:
                assert "two runs" not in str(refused), refused  # noqa: PT017


def races(references: dict[str, Reference], root: Path, count: int) -> Iterator[tuple[str, str]]:
    """So many races, of every pair in turn."""
    pairs = [(a, b) for a in references for b in references if a <= b]
    for number in range(count):
        first, second = pairs[number % len(pairs)]
        force = (number // len(pairs)) % 2 == 1
        raced(references[first], references[second], root / str(number), force=force)
        yield first, second
