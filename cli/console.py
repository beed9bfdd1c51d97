"""What commands print with: nothing in a name or a note acts on the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat

import click

from simexplain.errors import json_text, printable

if TYPE_CHECKING:
    from simexplain.data.folders import StageProgress
    from simexplain.data.preprocessing import Geometry
    from simexplain.results.result import Result


def echo(line: str, *, err: bool = False) -> None:
    """Prints one line, with escapes for what a terminal would act on.

    Args:
        line: Names of files in it may hold anything.
        err: To the standard error.
    """
    click.echo(printable(line), err=err)


def echo_lines(text: str, *, err: bool = False) -> None:
    """Prints several lines, whose cells are :func:`printable` already, such as a table or JSON.

    Args:
        text: The lines.
        err: To the standard error.
    """
    click.echo(printable(text, keep="\n"), err=err)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A spinner on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


@contextmanager
def progress_bars(begun: str = "") -> Iterator[StageProgress | None]:
    """Progress bars on a terminal, nothing in a pipe.

    Args:
        begun: What has a bar at once, before it is known how much there is to do.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:
        tasks = {begun: bars.add_task(begun, total=None)} if begun else {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """One bar on a terminal, nothing in a pipe."""
    with progress_bars(what) as show:
        yield None if show is None else partial(show, what)


def few(names: Sequence[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table of plain text."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def tell_manifest(files: Mapping[str, str], result: Result | None = None, **more: Any) -> None:
    """Prints the JSON of a result that was saved, or of one that was not."""
    if result is not None and not files:
        record = result.to_json()
    else:
        manifest = next(path for path in files.values() if path.endswith(".json"))
        record = json.loads(Path(manifest).read_text(encoding="utf-8"))
    echo_lines(json_text({**record, **more}))


def tell_left_out(folder: str | Path) -> None:
    """A line on what is in a folder of pictures but not used."""
    from simexplain.data.folders import left_out_of

    if Path(folder).is_dir() and (line := left_out_of(folder)):
        echo(line, err=True)


def tell_hardly_seen(names: Iterable[str], geometries: Iterable[Geometry]) -> None:
    """Names pictures so wide or tall that the network saw little of them."""
    from simexplain.data.preprocessing import hardly_seen

    if line := hardly_seen(zip(names, geometries, strict=True)):
        echo(line)


_NOTHING = 0.0005
"""Of a share: less is 0.0% in print."""


def tell_shares(
    bypass: Mapping[str, float], unexplained: SupportsFloat | None, of: str = "score"
) -> None:
    """A line on what maps cannot show, where that is known and more than rounds to nothing.

    Args:
        bypass: For each layer the share of the embedding that bypasses it.
        unexplained: The largest share that positions do not account for.
        of: Of what.
    """
    parts = [
        f"{share:.1%} of the embedding bypasses {layer} (measured on two pictures)"
        for layer, share in bypass.items()
        if share >= _NOTHING
    ]
    if unexplained is not None and float(unexplained) >= _NOTHING:
        parts.append(f"{float(unexplained):.1%} of the {of} comes from no position")
    if parts:
        echo("not in the maps: " + ", ".join(parts))


def tell_files(files: Mapping[str, str], warnings: Iterable[str] = ()) -> None:
    """The end of what a command prints for a person: warnings, then what was written."""
    for warning in warnings:
        echo(f"Warning: {warning}", err=True)
    heatmaps = {kind: path for kind, path in files.items() if kind.startswith("heatmap")}
    for kind, path in files.items():
        if kind not in heatmaps:
            echo(f"{kind}: {path}")
    if heatmaps:
        echo(f"heatmaps: {', '.join(heatmaps.values())}")
