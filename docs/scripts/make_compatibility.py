"""Runs the matrix of real networks and writes docs/compatibility.md from what came out.

Run it from the repository: ``python docs/scripts/make_compatibility.py``, about half an hour on
two cores. ``--checks default,stages,maps,places`` runs some of the checks; ``--only TEXT`` the rows
whose name has the text, and prints them without writing.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
sys.path[:0] = [str(ROOT / "tests" / "compat"), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from compat_checks import CHECKS, Case, check_refused, checks_of, places_followed  # noqa: E402
from compat_files import check_file  # noqa: E402
from compat_known import KNOWN  # noqa: E402
from compat_net import DEPTH, Net  # noqa: E402
from compat_table import NETS, missing  # noqa: E402

MARK = "<!-- written by docs/scripts/make_compatibility.py -->"
PACKAGES = {
    "timm": "timm",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "open_clip_torch": "open_clip",
    "sentence-transformers": "sentence-transformers",
    "facenet-pytorch": "facenet-pytorch",
    "torchreid": "torchreid",
    "own": "own modules and ways of wrapping",
}


@dataclass
class Row:
    """What a run found for one network."""

    net: Net
    layer: str = ""
    grid: str = ""
    stages: str = ""
    notes: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    ran: bool = True

    @property
    def status(self) -> str:
        """One word, or what is wrong."""
        if not self.ran:
            return "expected"
        if unknown := [name for name in self.failures if (self.net.name, name) not in KNOWN]:
            return "**wrong**: " + ", ".join(unknown)
        if self.failures:
            reasons = {KNOWN[self.net.name, name]: None for name in self.failures}
            return f"known fault ({', '.join(self.failures)}): {'; '.join(reasons)}"
        return "refused, with the reason" if self.net.refused and not self.layer else "right"


def run(net: Net, only: list[str] | None = None) -> Row:
    """All checks of one row, or some."""
    row = Row(net)
    if only is not None and net.refused:
        attempt(row, "refused", lambda: note_refusal(row))
        return row
    if only is not None:
        judge(row, [name for name in checks_of(net) if name in only])
        return row
    if net.refused:
        attempt(row, "refused", lambda: note_refusal(row))
        if not row.failures and not row.notes:
            judge(row, ["default", "maps", "clear"])
        return row
    judge(row, checks_of(net))
    if net.route:
        attempt(row, "file", lambda: check_file(net))
        if "file" not in row.failures:
            row.notes.append(f"through a file ({net.route})")
    return row


def note_refusal(row: Row) -> None:
    """Keeps the sentence."""
    if sentence := check_refused(row.net):
        row.notes.append(f"“{sentence}”")


def judge(row: Row, checks: list[str]) -> None:
    """Runs some checks on a built network and notes what it reports."""
    try:
        case = Case(row.net)
    except Exception as error:
        row.failures["build"] = as_sentence(error)
        return
    for name in checks:
        attempt(row, name, lambda name=name: CHECKS[name](case))
    attempt(row, "describe", lambda: describe(row, case))


def describe(row: Row, case: Case) -> None:
    """Layer, grid and stages as simexplain has them."""
    row.layer = case.layer
    row.grid = "{}x{}".format(*case.sam.maps.shape[-2:])
    stages = [c for c in case.model.layers_for(case.images) if c.stage]
    row.stages = ", ".join("{}x{}".format(*c.shape[1:]) for c in stages)
    if row.net.tokens:
        row.notes.append(f"follows {places_followed(case, by_hand=False)} of 16 places")
    row.notes += [text for text in case.sam.warnings if "%" in text]


def attempt(row: Row, name: str, check: Any) -> None:
    """Runs a check and keeps how it failed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check()
    except Exception as error:
        row.failures[name] = as_sentence(error)
        if os.environ.get("COMPAT_TRACE"):
            traceback.print_exc()


def as_sentence(error: Exception) -> str:
    """The first line, without pytest's rewriting."""
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    return f"{kind}{str(error).splitlines()[0] if str(error) else 'failed'}"


def page(rows: list[Row], checks: list[str] | None) -> str:
    """The page as Markdown."""
    done = Counter("wrong" if row.failures else "right" for row in rows if row.ran)
    if not done:
        lines = [head_text(), f"{len(rows)} networks. This page has what is right; it was not run."]
        return "\n".join([*lines, *tables(rows)]) + "\n"
    used = {net.net.package for net in rows} - {"own"}
    versions = ", ".join(f"{name} {version(name)}" for name in ["torch", *sorted(used)])
    lines = [
        head_text(),
        f"{len(rows)} networks, {done['right']} as they should be, {done['wrong']} not"
        f"{f', {left} not run (expected)' if (left := len(rows) - done.total()) else ''}. "
        f"Run with {versions}. Checks of this run: {', '.join(checks or [*CHECKS, 'file'])}.",
        *tables(rows),
    ]
    return "\n".join(lines) + "\n"


def head_text() -> str:
    """What stands above the numbers."""
    text = (ROOT / "docs" / "scripts" / "compatibility_head.md").read_text(encoding="utf-8")
    return f"{text.rstrip()}\n\n{MARK}\n"


def tables(rows: list[Row]) -> list[str]:
    """A table for each package."""
    lines = []
    for package, title in PACKAGES.items():
        own = [row for row in rows if row.net.package == package]
        if own:
            lines += ["", f"## {title}", "", *table(own)]
    return lines


def table(rows: list[Row]) -> list[str]:
    """One package's networks."""
    lines = [
        "| network | images | default layer | grid | stages | notes | status |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        notes = "; ".join([part for part in [row.net.why, *row.notes] if part]).replace("|", "\\|")
        size = "{}x{}".format(*row.net.size)
        layer = f"`{row.layer}`" if row.layer else ""
        lines.append(
            f"| {row.net.name} | {size} | {layer} | {row.grid} | {row.stages} | {notes} | "
            f"{row.status} |"
        )
    return lines


def expected(net: Net) -> Row:
    """What is written by hand, before any run."""
    layer = next(iter([*net.default, *net.or_warned]), "")
    grid = "{}x{}".format(*net.or_warned.get(layer, net.grid))
    stages = f"{grid}, of several depths" if net.stages == DEPTH else ""
    if isinstance(net.stages, tuple):
        stages = ", ".join("{}x{}".format(*cells) for cells in net.stages)
    return Row(net, layer, grid, stages, ran=False)


def run_named(name: str, checks: list[str] | None) -> tuple[Any, ...]:
    """A row by name, as plain values: networks cannot be sent between processes."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    row = run(next(net for net in NETS if net.name == name), checks)
    return row.layer, row.grid, row.stages, row.notes, row.failures


def main() -> None:
    """Runs all rows that can be built here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", default="", help="rows whose package or name has this text; nothing written"
    )
    parser.add_argument("--checks", default="", help="these alone, with commas")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time [2]")
    parser.add_argument(
        "--expected", action="store_true", help="write what is right, without a run"
    )
    chosen = parser.parse_args()
    if chosen.expected:
        PAGE.write_text(page([expected(net) for net in NETS], None), encoding="utf-8")
        return
    checks = chosen.checks.split(",") if chosen.checks else None
    nets = [net for net in NETS if chosen.only in f"{net.package} {net.name}"]
    for net in nets:
        if reason := missing(net):
            print(f"{net.name}: left out, {reason}", flush=True)
    nets = [net for net in nets if not missing(net)]
    rows = []
    with ProcessPoolExecutor(chosen.jobs, mp_context=get_context("spawn")) as pool:
        done = [pool.submit(run_named, net.name, checks) for net in nets]
        for net, future in zip(nets, done, strict=True):
            row = Row(net, *future.result())
            rows.append(row)
            print(f"{net.name}: {row.status}", flush=True)
            for name, text in row.failures.items():
                print(f"    {name}: {text}", flush=True)
    if not chosen.only:
        PAGE.write_text(page(rows, checks), encoding="utf-8")
        print(f"{PAGE}: {len(rows)} networks")


if __name__ == "__main__":
    main()
