"""Every command with one picture or one model that may be anything, and what must hold after it."""

from __future__ import annotations

import csv
import itertools
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import timm
import torch
from cli_runs import Run, simexplain
from pictures import noise

from simexplain import Preprocess, save_model

BACKBONE = "timm:test_efficientnet"
SECONDS = 20
"""What no command may work over one bad file, on one processor."""


class HangError(BaseException):
    """A command took longer than that; no ``except Exception`` may swallow it."""


@contextmanager
def at_most(seconds: int = SECONDS) -> Iterator[None]:
    """Ends what is inside after so many seconds of work, or ten times as many on the clock.

    Work alone counts the same on a machine that has other things to do.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise HangError(f"longer than {seconds} s")

    before = {number: signal.signal(number, end) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(10 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Place:
    """A folder with good pictures, two classes, an index and AVSL's model, to work in."""

    root: Path

    @property
    def good(self) -> str:
        return str(self.root / "good.png")

    @property
    def other(self) -> str:
        return str(self.root / "other.png")

    @property
    def network(self) -> str:
        return str(self.root / "network.pt")

    def data(self, variant: int) -> str:
        """A folder of two classes; one of its pictures differs between the variants."""
        return self.classes(Path(self.other if variant else self.good))

    def classes(self, picture: Path, labels: tuple[str, ...] = ("one", "two")) -> str:
        """A data set of classes in which a picture lies as a link, among good ones."""
        data = self.root / "classes" / f"{abs(hash(str(picture)))}-{len(labels)}"
        for label in labels:
            (data / label).mkdir(parents=True, exist_ok=True)
            for number in range(3):
                path = data / label / f"{number}.png"
                if not path.exists():
                    noise(40, 60, seed=number + 10 * labels.index(label)).save(path)
        link = data / "one" / f"x{picture.suffix or '.png'}"
        if not link.is_symlink():
            link.symlink_to(picture)
        return str(data)

    def table(self, picture: Path) -> str:
        """A CSV file of two comparisons, the first with the picture."""
        path = self.root / f"rows-{abs(hash(str(picture)))}.csv"
        with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(("anchor", "positives", "negatives"))
            writer.writerow((picture, self.good, ""))
            writer.writerow((self.good, self.good, ""))
        return str(path)


def prepared(root: Path) -> Place:
    """Makes it once."""
    place = Place(root)
    noise(48, 64).save(place.good)
    noise(48, 64, seed=1).save(place.other)
    torch.manual_seed(0)
    network = timm.create_model("test_efficientnet", num_classes=0).eval()
    save_model(network, place.network, backbone=BACKBONE, preprocess=Preprocess(size=(64, 64)))
    data = place.classes(Path(place.good))
    for words in (
        ("index", place.network, data, "--out", root / "good.index"),
        ("fit", place.network, data, "--out", root / "avsl.pt"),
        ("bank", place.network, data, "--out", root / "bank.safetensors"),
    ):
        done = simexplain(*words)
        assert done.code == 0, done.err
    return place


FOUR = ("one", "two", "three", "four")
"""Classes enough to train on two and test on two."""

Words = tuple[object, ...]
PICTURE: dict[str, Callable[[Place, Path, Path], Words]] = {
    "explain": lambda p, x, out: (
        "explain", p.network, "--out", out, "--no-check", "--", x, p.good
    ),
    "explain, last of three": lambda p, x, out: (
        "explain", p.network, "--out", out, "--no-check", "--", p.good, p.good, x
    ),
    "explain --vector": lambda p, x, out: (
        "explain", p.network, p.good, "--vector", x, "--out", out
    ),
    "explain --class-folder": lambda p, x, out: (
        "explain", p.network, p.good, "--class-folder", Path(p.classes(x)) / "one", "--out", out
    ),
    "match": lambda p, x, out: ("match", p.network, "--out", out, "--", p.good, x),
    "segment": lambda p, x, out: ("segment", p.network, "--out", out, "--", x, p.good),
    "segment, support": lambda p, x, out: (
        "segment", p.network, "--out", out, "--", p.good, x
    ),
    "compare": lambda p, x, out: (
        "compare", p.network, "--method", "sam", "--out", out, "--", p.good, x
    ),
    "attribute": lambda p, x, out: (
        "attribute", p.root / "avsl.pt", "--out", out, "--", p.good, x
    ),
    "search": lambda p, x, out: (
        "search", p.network, "--out", out, "--", x, p.root / "good.index"
    ),
    "search --region-mask": lambda p, x, out: (
        "search", p.network, p.good, p.root / "good.index", "--region-mask", x, "--out", out
    ),
    "search, picture as index": lambda p, x, out: (
        "search", p.network, "--out", out, "--", p.good, x
    ),
    "index": lambda p, x, out: ("index", p.network, p.classes(x), "--out", out),
    "batch": lambda p, x, out: ("batch", p.network, p.table(x), "--out", out),
    "batch, picture as table": lambda p, x, out: (
        "batch", p.network, "--out", out, "--", x
    ),
    "bank": lambda p, x, out: (
        "bank", p.network, p.classes(x), "--out", out.with_suffix(".safetensors")
    ),
    "fit": lambda p, x, out: (
        "fit", p.network, p.classes(x), "--nodes-per-level", 6, "--out", out.with_suffix(".pt")
    ),
    "evaluate retrieval": lambda p, x, out: (
        "evaluate", "retrieval", p.network, p.classes(x), "--out", out
    ),
    "evaluate faithfulness": lambda p, x, out: (
        "evaluate", "faithfulness", p.network, p.table(x), "--method", "sam", "--out", out
    ),
    "train": lambda p, x, out: (
        "train", p.classes(x, FOUR), "--backbone", BACKBONE, "--size", 32, "--epochs", 1,
        "--classes-per-batch", 2, "--images-per-class", 2, "--untrained", "--out", out,
    ),
    "layers, picture as model": lambda p, x, out: ("layers", "--", x),
}  # fmt: skip
"""Every command with a picture in each place that takes one; what it makes goes to ``out``."""

MODEL: dict[str, Callable[[Place, Path, Path], Words]] = {
    "layers": lambda p, x, out: ("layers", x),
    "layers --backbone": lambda p, x, out: ("layers", x, "--backbone", BACKBONE),
    "explain": lambda p, x, out: ("explain", x, p.good, p.good, "--out", out),
    "explain --backbone": lambda p, x, out: (
        "explain", x, p.good, p.good, "--backbone", BACKBONE, "--out", out
    ),
    "match": lambda p, x, out: ("match", x, p.good, p.good, "--out", out),
    "attribute": lambda p, x, out: ("attribute", x, p.good, p.good, "--out", out),
    "segment": lambda p, x, out: ("segment", x, p.good, p.good, "--out", out),
    "compare": lambda p, x, out: ("compare", x, p.good, p.good, "--method", "sam", "--out", out),
    "search": lambda p, x, out: ("search", x, p.good, p.root / "good.index", "--out", out),
    "search, model as index": lambda p, x, out: ("search", p.network, p.good, x, "--out", out),
    "index": lambda p, x, out: ("index", x, p.classes(Path(p.good)), "--out", out),
    "batch": lambda p, x, out: ("batch", x, p.table(Path(p.good)), "--out", out),
    "bank": lambda p, x, out: (
        "bank", x, p.classes(Path(p.good)), "--out", out.with_suffix(".safetensors")
    ),
    "explain, model as bank": lambda p, x, out: (
        "explain", p.network, p.good, p.good, "--method", f"weight_bank:bank={x}", "--out", out
    ),
    "fit": lambda p, x, out: (
        "fit", x, p.classes(Path(p.good)), "--out", out.with_suffix(".pt")
    ),
    "evaluate retrieval": lambda p, x, out: (
        "evaluate", "retrieval", x, p.classes(Path(p.good)), "--out", out
    ),
    "evaluate faithfulness": lambda p, x, out: (
        "evaluate", "faithfulness", x, p.table(Path(p.good)), "--method", "sam", "--out", out
    ),
    "train --resume": lambda p, x, out: ("train", p.classes(Path(p.good)), "--resume", "--out", x),
}  # fmt: skip
"""Every command with a model in each place that takes one."""


@dataclass(frozen=True)
class Outcome:
    """One run: what came out, how long it took, and what was wrong with it."""

    command: str
    name: str
    run: Run | None
    seconds: float
    faults: tuple[str, ...]


def tried(command: str, words: Words, name: str, root: Path, out: Path) -> Outcome:
    """Runs one command, and looks for everything that must never be."""
    here, began, done = root / "here", time.process_time(), None
    here.mkdir(exist_ok=True)
    faults: list[str] = []
    try:
        with at_most():
            done = simexplain(*words, cwd=here)
    except HangError:
        faults.append("hang")
    except AssertionError as error:
        faults.append(f"traceback: {str(error)[-300:]}")
    except BaseException as error:  # what main() let through
        faults.append(f"escaped: {error!r}"[:300])
    if done is not None:
        faults += _faults_of(done, out)
    faults += ["code was run"] if (here / "sprung").exists() or (root / "sprung").exists() else []
    left = [path.name for path in here.iterdir()]
    faults += [f"left behind: {left}"] if left else []
    return Outcome(command, name, done, time.process_time() - began, tuple(faults))


def _faults_of(done: Run, out: Path) -> Iterator[str]:
    """What is wrong with an ending."""
    if done.code not in (0, 1, 2):
        yield f"exit code {done.code}"
    if "Unexpected" in done.err:
        yield f"unexpected: {done.err[-300:]}"
    if "site-packages" in done.err:
        yield f"a library speaks: {done.err[-300:]}"
    drafts = [path.name for path in out.parent.glob(".simexplain-*")]
    made = [path for path in out.parent.glob(f"{out.name}*") if not path.name.endswith(".lock")]
    if drafts:
        yield f"drafts: {drafts}"
    if done.code and made:
        yield f"partial output: {[path.name for path in made]}"
    if done.code == 1:
        lines = [line for line in done.err.splitlines() if line.startswith("Error: ")]
        if len(lines) != 1 or not lines[0].rstrip().endswith((".", "?")):
            yield f"not one sentence: {done.err[-300:]}"


def campaign(
    place: Place,
    files: list[Path],
    commands: dict[str, Callable[[Place, Path, Path], Words]],
    share: int,
) -> Iterator[Outcome]:
    """Every ``share``-th of all pairs of a command and a file, in turn."""
    for number, (file, command) in enumerate(itertools.product(files, commands)):
        if number % share == 0:
            out = place.root / "out" / f"{len(files)}-{number}"
            out.parent.mkdir(exist_ok=True)
            words = commands[command](place, file, out)
            name = str(file.relative_to(place.root))
            yield tried(command, words, name, place.root, out)
