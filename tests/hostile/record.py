"""Runs a campaign, prints what happened and keeps it for the page on reliability.

    python tests/hostile/record.py pictures [N] [--keep]

Faults are printed as they come, and a line at the end. With a number behind the name, such as 7,
only every seventh pair of a file and a command is tried, or every seventh step. With ``--keep`` the
line goes to ``benchmarks/records/reliability.json``, of which ``python benchmarks/pages.py
reliability`` writes ``docs/reliability.md``.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

import store  # noqa: E402
from hostile_commands import MODEL, PICTURE, Place, campaign, prepared  # noqa: E402
from hostile_models import write_models  # noqa: E402
from hostile_pictures import write_pictures  # noqa: E402
from hostile_writers import WRITERS, Reference, killed, races, reference  # noqa: E402
from numbers_of_methods import table  # noqa: E402


def files(place: Place, share: int, what: str) -> Iterable[str]:
    """Pictures or models through every command."""
    if what == "pictures":
        paths, commands = write_pictures(place.root / "pictures"), PICTURE
    else:
        paths, commands = write_models(place.root / "models", place.root / "sprung"), MODEL
    ends: Counter[str] = Counter()
    longest = 0.0
    for one in campaign(place, paths, commands, share):
        ends["done" if one.run and not one.run.code else "refused"] += 1
        ends["faults"] += bool(one.faults)
        longest = max(longest, one.seconds)
        if one.faults:
            yield f"{one.command}, {one.name!a}: {one.faults}"
    yield (
        f"{len(paths)} {what}, {len(commands)} commands: {ends['done'] + ends['refused']} runs, "
        f"{ends['done']} done, {ends['refused']} refused in a sentence, {ends['faults']} faults; "
        f"longest {longest:.1f} s"
    )


def _after(own: Reference, folder: Path, there: bool, **moment: int) -> tuple[str, list[str]]:
    """The state after one kill, and what is wrong with it."""
    try:
        return killed(own, folder, there, **moment), []
    except AssertionError as error:
        return "faults", [f"{folder.relative_to(own.place.root)}: {str(error)[:300]}"]


def kills(place: Place, share: int, what: str) -> Iterable[str]:
    """Every writing command killed at every step, and at random."""
    states: Counter[str] = Counter()
    for name, there in itertools.product(WRITERS, (False, True)):
        root = place.root / "kills" / f"{name}-{there}"
        own = reference(name, place, root / "whole")
        for step in itertools.count(0, share):
            state, fault = _after(own, root / f"{step}", there, step=step)
            states[state] += 1
            yield from fault
            if state == "ended":
                break
        for seed in range(10):
            state, fault = _after(own, root / f"by-chance-{seed}", there, seed=seed)
            states[state] += 1
            yield from fault
    yield f"{len(WRITERS)} commands, {states.total()} kills: {dict(states)}"


def two_at_once(place: Place, share: int, what: str) -> Iterable[str]:
    """Every pair of writing commands into one folder."""
    references = {name: reference(name, place, place.root / "whole" / name) for name in WRITERS}
    count = 2 * len(WRITERS) * (len(WRITERS) + 1) // 2
    yield f"{sum(1 for _ in races(references, place.root / 'races', count))} races, none mixed"


def _tests(*words: str, examples: int = 0) -> str:
    """What pytest says at its end of some tests, slow ones included."""
    settings = {"SIMEXPLAIN_FUZZ_EXAMPLES": str(examples)} if examples else {}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "", "-p", "no:cacheprovider", *words],
        cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return re.sub(r"(, \d+ warnings?)? in .*", "", done.stdout.strip().splitlines()[-1]).strip("= ")


def fuzz(place: Place, share: int, what: str) -> Iterable[str]:
    """Exported programs changed at random."""
    examples, began = 20_000 // share, time.monotonic()
    ended = _tests("tests/test_exported_fuzz.py", "-k", "many", examples=examples)
    minutes = (time.monotonic() - began) / 60
    if "failed" in ended or "passed" not in ended:
        yield ended
    yield f"{examples} changed programs in {minutes:.0f} minutes: {ended.partition(',')[0]}"


def several(place: Place, share: int, what: str) -> Iterable[str]:
    """One model in eight threads, and one process that explains 1,000 times."""
    threads, memory = _tests("tests/test_threads.py"), _tests("tests/test_memory.py")
    yield f"tests of eight threads: {threads}; of 1,000 explanations in a row: {memory}"


def numbers(place: Place, share: int, what: str) -> Iterable[str]:
    """How far maps move when only the arithmetic changes."""
    yield table()


CAMPAIGNS: dict[str, Callable[[Place, int, str], Iterable[str]]] = {
    "pictures": files, "models": files, "kills": kills, "races": two_at_once, "fuzz": fuzz,
    "threads": several, "numbers": numbers,
}  # fmt: skip


def main() -> None:
    """Prints faults as they come, and a line at the end."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=CAMPAIGNS)
    parser.add_argument("share", type=int, nargs="?", default=1)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    lines = []
    with os.fdopen(os.dup(1), "w") as out, tempfile.TemporaryDirectory() as folder:
        for line in CAMPAIGNS[options.what](prepared(Path(folder)), options.share, options.what):
            print(line, file=out, flush=True)
            lines.append(line)
    if options.keep:
        share = f" {options.share}" if options.share > 1 else ""
        found = {"with": f"{options.what}{share}", "faults": lines[:-1], "found": lines[-1]}
        store.keep("reliability", store.load("reliability") | {options.what: found})


if __name__ == "__main__":
    main()
