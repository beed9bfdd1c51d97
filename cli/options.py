"""Options that several commands share, and what they print with."""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat, TypeVar

import click

from simexplain.comparison import ARCHITECTURES
from simexplain.data.folders import left_out_of
from simexplain.data.preprocessing import FITS, INTERPOLATIONS, hardly_seen
from simexplain.errors import ArgumentError, OutputError, json_text, meant, missing, printable
from simexplain.methods import ELSEWHERE, METHODS
from simexplain.models.base import DISTANCES
from simexplain.models.loading import RANDOM, Pixels, load_model
from simexplain.models.readouts import OUTPUTS
from simexplain.renaming import RENAMED_OPTIONS, RenamedWarning, new_name, todays_value, warn

from .console import echo, echo_lines

if TYPE_CHECKING:
    from simexplain.data.folders import StageProgress
    from simexplain.data.preprocessing import Geometry
    from simexplain.models.base import SimilarityModel
    from simexplain.results.result import Result

OWN_GROUP = "own"
GROUP_HELP = (
    "Leave the query's own group out of the gallery: pictures of the same file name without its "
    "ending (name), of the same group in DATA (own), or where the group in parentheses of a "
    "regular expression finds the same in the path."
)
"""What ``--group`` is in every command."""

F = TypeVar("F", bound=Callable[..., Any])


class Command(click.Command):
    """A command that takes the options of the last version too, with a note of the new names."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, after old names have become new ones."""
        with _notes(ctx):
            return super().parse_args(ctx, self._todays(args))

    def invoke(self, ctx: click.Context) -> Any:
        """As click does; notes of old names go to standard error."""
        with _notes(ctx):
            return super().invoke(ctx)

    def _todays(self, args: Sequence[str]) -> list[str]:
        flags = [flag for param in self.params for flag in (*param.opts, *param.secondary_opts)]
        known = [flag[2:].replace("-", "_") for flag in flags if flag.startswith("--")]
        end = args.index("--") if "--" in args else len(args)
        renamed = []
        for word in args[:end]:
            flag, equals, value = word.partition("=")
            old = flag[2:].replace("-", "_") if flag.startswith("--") else ""
            new = new_name(old, known, RENAMED_OPTIONS)
            if new is not None:
                named = f"--{new.replace('_', '-')}"
                warn(flag, named)
                word = f"{named}{equals}{value}"
            renamed.append(word)
        return [*renamed, *args[end:]]


@contextmanager
def _notes(ctx: click.Context) -> Iterator[None]:
    """Old names are noted on standard error, each once."""
    shown = warnings.showwarning
    noted: set[str] = ctx.meta.setdefault(f"{__name__}.noted", set())

    def show(message: Any, category: type[Warning], *index: Any, **more: Any) -> None:
        if not issubclass(category, RenamedWarning):
            shown(message, category, *index, **more)
        elif str(message) not in noted:
            noted.add(str(message))
            echo(f"Note: {message}", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", RenamedWarning)
        warnings.showwarning = show
        yield


class OneOf(click.Choice):  # type: ignore[type-arg,unused-ignore]
    """One of some names, with a suggestion for what is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The name."""
        today = todays_value((param and param.name) or "", value)
        if today is not value:
            warn(value, today)
            value = today
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            known = list(map(str, self.choices))
            others = ELSEWHERE if known == list(METHODS) else None
            hint = meant(str(value), known, others) or "."
            self.fail(f"expected one of {', '.join(known)}, got {value!r}{hint}", param, ctx)


class FilePath(click.Path):  # type: ignore[type-arg,unused-ignore]
    """A file or folder; no empty name, which Python takes for this folder, and no web address."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        if not str(value):
            self.fail(
                "expected a file or folder, got an empty name; is a variable of the shell unset?",
                param,
                ctx,
            )
        if web := missing(value, ""):
            raise ArgumentError(web)
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
    """One number, or several with commas in between, such as ``0.485,0.456,0.406``."""

    name = "N[,N...]"

    def __init__(
        self,
        kind: type[int] | type[float] = float,
        such: str = "0.5 or 0.485,0.456,0.406",
        least: float = -1e30,
    ) -> None:
        self.kind, self.such, self.least = kind, such, least

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """The numbers; finite."""
        try:
            parts = value if isinstance(value, tuple) else str(value).split(",")
            numbers = tuple(map(self.kind, parts))
        except ValueError:
            numbers = ()
        if not numbers or not all(self.least <= number < 1e30 for number in numbers):
            least = "" if self.least < 0 else f" of at least {self.least:g}"
            self.fail(f"expected numbers{least} such as {self.such}, got {value!r}.", param, ctx)
        return numbers


RANKS_TYPE = Numbers(int, "1 or 1,5,10", least=1)
"""Of ``--ranks``."""


def joined(context: click.Context, option: click.Parameter, value: Any) -> tuple[Any, ...]:
    """What a repeated option of several numbers was given, in one."""
    return tuple(number for numbers in value for number in numbers)


_MODEL_OPTIONS = (
    click.option(
        "--backbone",
        metavar="ZOO:NAME",
        help="Network of a zoo: the one a file of weights belongs to, such as timm:resnet50.",
    ),
    click.option(
        "--keep-head", is_flag=True, help="The file's last linear layer makes the embedding."
    ),
    click.option("--untrained", is_flag=True, help="Random weights: to try things out."),
    click.option(
        "--trust-pickle", is_flag=True, help="Load pickled modules. They can run any code."
    ),
    click.option("--size", type=Size(), help="Input size in pixels. [the model's own]"),
    click.option(
        "--fit", type=OneOf(FITS), help="How a picture fits the input. [as the model has it]"
    ),
    click.option(
        "--distance",
        type=OneOf(list(DISTANCES)),
        help="Distance between embeddings. [euclidean]",
    ),
    click.option(
        "--output",
        "which_vector",
        type=OneOf(OUTPUTS),
        help="Which vector of the network is the embedding. [the one that its authors compare]",
    ),
    click.option("--mean", type=Numbers(), help="Mean of each channel, in [0, 1]. [the model's]"),
    click.option("--std", type=Numbers(), help="Deviation of each channel. [the model's]"),
    click.option(
        "--interpolation",
        type=OneOf(INTERPOLATIONS),
        help="How pictures are resized. [as the model has it]",
    ),
    click.option("--channels", type=click.IntRange(1), help="Channels of a picture. [3]"),
    click.option(
        "--fast", is_flag=True, help="Run faster: batch norm is folded, numbers round otherwise."
    ),
)


def saving_options(
    out: str, *, default: str | None = None, required: bool = False, more: str = ""
) -> Callable[[F], F]:
    """Adds ``--out``, ``--force`` and ``--json``.

    Args:
        out: What ``--out`` names.
        default: Its default.
        required: Whether it has to be given.
        more: What ``--force`` does beside replacing.
    """
    named: dict[str, Any] = {"default": default, "show_default": True} if default else {}
    options = (
        click.option("--out", type=FilePath(path_type=Path), required=required, help=out, **named),
        click.option("--force", is_flag=True, help=f"Replace what is there already{more}."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text."),
    )

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def comparison_options(command: F) -> F:
    """Adds the options for how images given in a row are compared."""
    for option in (
        click.option("--positives", default=1, show_default=True,
                     help="How many of a set's other images are positives."),
        click.option("--negative", is_flag=True, help="The pair is dissimilar: a negative."),
        click.option(
            "--arch",
            type=OneOf(list(ARCHITECTURES)),
            help="What is compared: siamese, 2 images; triplet, anchor, positive and negative; "
            "quadruplet, with 2 negatives; set, any number of each. "
            "[siamese for 2 images, triplet for 3]",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


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
    if Path(folder).is_dir() and (line := left_out_of(folder)):
        echo(line, err=True)


def tell_hardly_seen(names: Iterable[str], geometries: Iterable[Geometry]) -> None:
    """Names pictures so wide or tall that the network saw little of them."""
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
