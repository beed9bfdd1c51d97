"""Runs a campaign and prints what happened: ``python tests/hostile/record.py pictures``.

With a number behind the name, such as 7, only every seventh pair of a file and a command is tried,
or every seventh step.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

from hostile_commands import MODEL, PICTURE, Place, campaign, prepared  # noqa: E402
from hostile_models import write_models  # noqa: E402
from hostile_pictures import write_pictures  # noqa: E402
from hostile_writers import WRITERS, Reference, killed, races, reference  # noqa: E402


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


CAMPAIGNS: dict[str, Callable[[Place, int, str], Iterable[str]]] = {
    "pictures": files, "models": files, "kills": kills, "races": two_at_once,
}  # fmt: skip


def main(what: str, share: int = 1) -> None:
    """Prints faults as they come, and a line at the end."""
    with os.fdopen(os.dup(1), "w") as out, tempfile.TemporaryDirectory() as folder:
        for line in CAMPAIGNS[what](prepared(Path(folder)), share, what):
            print(line, file=out, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
