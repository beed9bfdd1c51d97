"""Options that several commands share, and what they print with."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat, TypeVar

import click

from simexplain.data.folders import left_out_of
from simexplain.data.preprocessing import FITS, INTERPOLATIONS, hardly_seen
from simexplain.errors import OutputError, meant
from simexplain.methods import ELSEWHERE, METHODS
from simexplain.models.base import DISTANCES
from simexplain.models.loading import RANDOM, Pixels, load_model
from simexplain.models.readouts import OUTPUTS
from simexplain.printing import printable

from .console import echo, echo_lines

if TYPE_CHECKING:
    from simexplain.data.preprocessing import Geometry
    from simexplain.fitting.passes import Progress
    from simexplain.models.base import SimilarityModel

F = TypeVar("F", bound=Callable[..., Any])


class OneOf(click.Choice):  # type: ignore[type-arg,unused-ignore]
    """One of some names, with a suggestion for what is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The name."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            known = list(map(str, self.choices))
            others = ELSEWHERE if known == list(METHODS) else None
            hint = meant(str(value), known, others) or "."
            self.fail(f"expected one of {', '.join(known)}, got {value!r}{hint}", param, ctx)


class FilePath(click.Path):  # type: ignore[type-arg,unused-ignore]
    """A file or folder, of which an empty name is none: Python would take it for this folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        if not str(value):
            self.fail(
                "expected a file or folder, got an empty name; is a variable of the shell unset?",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """``224`` or ``384x128``: height, then width."""

    name = "HxW"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """``(height, width)``; one number makes both."""
        parts = str(value).lower().split("x")
        digits = all(part.isascii() and part.isdigit() for part in parts)
        if not digits or not all(map(int, parts)) or len(parts) > 2:
            self.fail(f"expected a size such as 224 or 384x128 (height x width), got {value!r}.")
        return int(parts[0]), int(parts[-1])


class Numbers(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """``0.5`` or ``0.485,0.456,0.406``: one number for all channels, or one for each."""

    name = "N[,N,N]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """The numbers; finite."""
        try:
            numbers = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(abs(number) < 1e30 for number in numbers):
            self.fail(f"expected numbers such as 0.5 or 0.485,0.456,0.406, got {value!r}.")
        return numbers


_MODEL_OPTIONS = (
    click.option(
        "--backbone",
        metavar="ZOO:NAME",
        help="The network that a file of weights belongs to, e.g. timm:resnet50.",
    ),
    click.option(
        "--keep-head", is_flag=True, help="The file's last linear layer makes the embedding."
    ),
    click.option("--untrained", is_flag=True, help="Random weights, to try things out."),
    click.option(
        "--trust-pickle", is_flag=True, help="Load pickled modules. They can run any code."
    ),
    click.option("--size", type=Size(), help="Input size if not the model's own."),
    click.option(
        "--fit", type=OneOf(FITS), help="How pictures are fitted, if not as in the model."
    ),
    click.option(
        "--distance",
        type=OneOf(list(DISTANCES)),
        help="Between unit embeddings. [euclidean]",
    ),
    click.option(
        "--output",
        "which_vector",
        type=OneOf(OUTPUTS),
        help="Which vector of the network is the embedding, if not the one its authors compare.",
    ),
    click.option("--mean", type=Numbers(), help="Of each channel in [0, 1], if not the model's."),
    click.option("--std", type=Numbers(), help="Of each channel in [0, 1], if not the model's."),
    click.option("--interpolation", type=OneOf(INTERPOLATIONS), help="For resizing pictures."),
    click.option("--channels", type=click.IntRange(1), help="Channels of a picture. [3]"),
    click.option("--fast", is_flag=True, help="Fold batch norm, channels-last: quicker."),
)


def model_options(command: F) -> F:
    """Adds everything that :func:`model_from` wants."""
    for option in reversed(_MODEL_OPTIONS):
        command = option(command)
    return command


def model_from(source: str, given: dict[str, Any]) -> SimilarityModel:
    """Takes the model options out of ``given`` and loads the model."""
    fast = given["fast"]
    model = load_model(source, **loading_from(given))
    if fast:
        from simexplain.models.accelerating import accelerated

        model = accelerated(model)
    return model


def loading_from(given: dict[str, Any]) -> dict[str, Any]:
    """Takes the model options out of ``given``, as ``load_model`` has them."""
    untrained, _ = given.pop("untrained"), given.pop("fast")
    names = ("backbone", "keep_head", "trust_pickle", "size", "fit", "distance")
    pixels = Pixels(*(given.pop(name) for name in ("mean", "std", "interpolation", "channels")))
    return {
        "weights": RANDOM if untrained else None,
        "output": given.pop("which_vector"),
        "pixels": pixels,
        **{name: given.pop(name) for name in names},
    }


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
def progress_bars(begun: str = "") -> Iterator[Progress | None]:
    """A bar for everything that is told of on a terminal, nothing in a pipe.

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


def check_file(out: Path, *, force: bool) -> None:
    """Says what stands in the way before the long work, not after it.

    Raises:
        OutputError: If the file is there already (without ``force``) or cannot be written.
    """
    if out.is_dir():
        raise OutputError(f"Expected a file to write, but '{out}' is a folder.")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"There is no folder '{out.parent}' to write '{out.name}' into.")
    if out.exists() and not force:
        raise OutputError(f"'{out}' is there already; choose another file or say --force.")
    try:
        tempfile.TemporaryDirectory(prefix=".simexplain-", dir=out.absolute().parent).cleanup()
    except OSError as error:
        raise OutputError(f"'{out}' cannot be written ({error.strerror}).") from error


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


def free_folder(base: Path) -> Path:
    """The first of ``base-1``, ``base-2``, ... that is not there yet."""
    number = 1
    while (folder := base.with_name(f"{base.name}-{number}")).exists():
        number += 1
    return folder


def saved(save: Callable[[Path], dict[str, str]], out: Path | None, base: str) -> dict[str, str]:
    """Saves a result into a folder, or into the first one of ``base-1``, ``base-2``, ... there.

    Args:
        save: Writes into a folder and returns the files by kind.
        out: The folder, if one was named.
        base: The name of folders otherwise.

    Raises:
        OutputError: If it cannot be written.
    """
    while True:
        folder = out or free_folder(Path(base))
        with busy(f"Writing {folder}"):
            try:
                return save(folder)
            except OutputError:
                # Another run may have taken the name.
                if out is not None or not folder.exists():
                    raise


def tell_manifest(files: Mapping[str, str]) -> None:
    """Prints the JSON of a result that was saved."""
    echo_lines(Path(files["manifest"]).read_text(encoding="utf-8").rstrip())


def tell_left_out(folder: str | Path) -> None:
    """A line on what is in a folder of pictures but not used."""
    if Path(folder).is_dir() and (line := left_out_of(folder)):
        echo(line, err=True)


def tell_hardly_seen(names: Iterable[str], geometries: Iterable[Geometry]) -> None:
    """Names pictures so wide or tall that the network saw little of them."""
    if line := hardly_seen(zip(names, geometries, strict=True)):
        echo(line)


def tell_shares(
    bypass: Mapping[str, float], unexplained: SupportsFloat | None, of: str = "score"
) -> None:
    """A line on what maps cannot show, where that is known.

    Args:
        bypass: For each layer the share of the embedding that bypasses it.
        unexplained: The largest share that positions do not account for.
        of: Of what.
    """
    said = [f"{share:.1%} of the embedding bypasses {layer}" for layer, share in bypass.items()]
    if unexplained is not None:
        said.append(f"{float(unexplained):.1%} of the {of} comes from no position")
    if said:
        echo("not in the maps: " + ", ".join(said))


def tell_files(files: Mapping[str, str], warnings: Iterable[str] = ()) -> None:
    """The end of what a command prints for a person: warnings, then what was written."""
    for warning in warnings:
        echo(f"Warning: {warning}", err=True)
    for kind, path in files.items():
        echo(f"{kind}: {path}")
