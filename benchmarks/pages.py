"""Writes the pages of measurements from the store of records; nothing is measured.

    python benchmarks/pages.py [NAME ...]

A page whose benchmark keeps every case is made by that benchmark; of the others the store has the
text and the cells of the tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from store import RECORDS, ROOT, load, page_of

DOCS = ROOT / "docs"
COMMANDS = {
    "trained_networks": "python benchmarks/trained_pointing.py EMOJI --runs FOLDER --cache FOLDER "
    "--scenes 60 --few 30",
    "vit_pointing": "python benchmarks/vit_pointing.py DATA --steps 800 --scenes 150",
}
"""With what the records were made, where they do not say so themselves."""


def _made(module: str, *records: str, name: str = "") -> Callable[[], str]:
    """The page that a benchmark makes of its records, and of its command where it wants it."""

    def make() -> str:
        given: list[Any] = [load(record) for record in records]
        given += [COMMANDS[name]] if name else []
        text: str = import_module(module).page(*given)
        return text

    return make


OWN: dict[str, Callable[[], str]] = {
    "believed": _made("believed", "believed"),
    "correspondence": _made("correspondence", "correspondence"),
    "fit": _made("fit", "fit"),
    "kinds": _made("kinds_page", "trained_pointing", "vit_pointing"),
    "reliability": _made("reliability", "reliability"),
    "scenes": _made("scene_kinds", "scenes"),
    "trained_networks": _made(
        "trained_pointing", "trained_pointing", "trained_networks", name="trained_networks"
    ),
    "vit_pointing": _made("vit_pointing", "vit_pointing", name="vit_pointing"),
}
"""Pages that are made of every case that was measured."""

NUMBERS = (
    "avsl_distance", "avsl_fit", "batch", "explain", "faithfulness", "focus_parts", "processors",
    "results", "search", "segmentation-results", "training", "training-results",
)  # fmt: skip
"""Pages of whose numbers the store has no more than the page."""
PAGES = (*OWN, *NUMBERS)


def file_of(name: str) -> Path:
    """Where a page lies."""
    inside = "results" not in name and name != "reliability"
    return DOCS / "benchmarks" / f"{name}.md" if inside else DOCS / f"{name}.md"


def page(name: str) -> str:
    """A page of :data:`PAGES`."""
    return OWN[name]() if name in OWN else page_of(load(name))


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the pages."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", choices=[*PAGES, []], metavar="NAME")
    for name in parser.parse_args(arguments).names or PAGES:
        file_of(name).write_text(page(name), encoding="utf-8")
        print(f"{file_of(name).relative_to(ROOT)}: from {RECORDS.name}")


if __name__ == "__main__":
    main()
