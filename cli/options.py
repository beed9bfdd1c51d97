"""Options that several commands share, and what they print with."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

import click

from simexplain.comparison import ARCHITECTURES
from simexplain.data.preprocessing import FITS, INTERPOLATIONS
from simexplain.errors import ArgumentError, OutputError, meant, missing
from simexplain.methods import ELSEWHERE, METHODS
from simexplain.models.base import DISTANCES
from simexplain.models.loading import RANDOM, Pixels, load_model
from simexplain.models.readouts import OUTPUTS
from simexplain.option_fields import MOST, About, declared
from simexplain.renaming import RENAMED_OPTIONS, RenamedWarning, new_name, todays_value, warn

from .console import echo

if TYPE_CHECKING:
    from simexplain.models.base import SimilarityModel

OWN_GROUP = "own"
GROUP_HELP = (
    "Leave the query's own group out of the gallery: pictures of the same file name without its "
    "ending (name), of the same group in DATA (own), or where the group in parentheses of a "
    "regular expression finds the same in the path."
)
"""What ``--group`` is in every command."""

F = TypeVar("F", bound=Callable[..., Any])


class Option(click.Option):
    """An option with a heading in ``--help-all``.

    Args:
        group: The heading.
        rare: Whether ``--help`` leaves it out.
    """

    def __init__(self, *args: Any, group: str = "", rare: bool = False, **more: Any) -> None:
        super().__init__(*args, **more)
        self.group, self.rare = group, rare

    def make_metavar(self, ctx: click.Context) -> str:
        """As click's, whose numbers with a range are called no differently from others."""
        return super().make_metavar(ctx).replace(" RANGE", "")

    def brief(self, ctx: click.Context) -> tuple[str, str] | None:
        """As in ``--help``: no ranges, and of a long text its first clause and the default."""
        record = self.get_help_record(ctx)
        if record is None:
            return None
        text = re.sub(r"[;\s]*[^;\[\s]*[<>]=?[^;\]]*(?=\]$)", "", record[1]).removesuffix("  []")
        if len(text) > _LONG:
            clause = re.split(r"[:;.](?:\s|$)", text)[0]
            default = re.search(r"\s+\[[^\[\]]*\]$", text)
            text = f"{clause}.{default[0] if default else ''}"
        return record[0], text


option = partial(click.option, cls=Option)
rare_option = partial(click.option, cls=Option, rare=True)


class Command(click.Command):
    """A command whose ``--help`` fits a screen, and which takes the last version's options too."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """As click has them, with ``--help-all`` where ``--help`` leaves some out."""
        params = super().get_params(ctx)
        if any(getattr(param, "rare", False) for param in params):
            params.append(_HELP_ALL)
        return params

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The everyday options in one table; for ``--help-all`` all, by their headings."""
        everything = ctx.meta.get(_ALL, False)
        tables: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if not isinstance(param, click.Option):
                continue
            record, heading = param.get_help_record(ctx), ""
            if isinstance(param, Option):
                heading = param.group if everything else ""
                if not everything:
                    record = None if param.rare else param.brief(ctx)
            if record is not None:
                tables.setdefault(heading or "Options", []).append(record)
        for heading, rows in tables.items():
            with formatter.section(heading):
                formatter.write_dl(rows, col_max=_LEFT)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Where the other options are."""
        if _HELP_ALL in self.get_params(ctx) and not ctx.meta.get(_ALL):
            formatter.write(f"\nAll options: {ctx.command_path} --help-all\n")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, after old names have become new ones."""
        with _notes(ctx):
            return super().parse_args(ctx, self._todays(args))

    def invoke(self, ctx: click.Context) -> Any:
        """As click does; notes of old names go to standard error."""
        with _notes(ctx), _largest_picture():
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
def _largest_picture() -> Iterator[None]:
    """Pictures of up to SIMEXPLAIN_MAX_MEGAPIXELS are read, unless given of 178 megapixels."""
    given = os.environ.get("SIMEXPLAIN_MAX_MEGAPIXELS")
    if not given:
        yield
        return
    if not re.fullmatch(r"\d{1,6}(\.\d+)?", given) or not float(given):
        raise click.UsageError(
            f"Expected SIMEXPLAIN_MAX_MEGAPIXELS to be a number of megapixels, got {given!a}."
        )
    from PIL import Image

    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = int(float(given) * 1e6) // 2  # beyond twice that Pillow refuses
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _show_all(ctx: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        ctx.meta[_ALL] = True
        click.echo(ctx.get_help())
        ctx.exit()


_ALL = f"{__name__}.all"
_LEFT = 34
"""Columns for the names of options."""
_LONG = 122
"""Characters from which on ``--help`` has only the first clause of a text."""
_HELP_ALL = Option(
    ["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_show_all,
    help="Show all options, by subject, and exit.",
)  # fmt: skip


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


class Pair(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """``NAME=VALUE``; the value becomes a number or a truth value where it reads as one."""

    name = "NAME=VALUE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Any]:
        """The pair."""
        name, sign, text = str(value).partition("=")
        if not sign or not name.isidentifier():
            self.fail(f"expected NAME=VALUE such as margin=0.2, got {value!r}.")
        if _INTEGER.fullmatch(text):
            return name, int(text)
        if _NUMBER.fullmatch(text):
            return name, float(text)
        return name, {"true": True, "false": False}.get(text, text)


_INTEGER, _NUMBER = re.compile(r"[+-]?\d+"), re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.I)

batch_size_option = option("--batch-size", default=32, show_default=True, type=click.IntRange(1),
                           help="Pictures in one forward pass.")  # fmt: skip
RANKS_TYPE = Numbers(int, "1 or 1,5,10", least=1)
"""Of ``--ranks``."""


def joined(context: click.Context, option: click.Parameter, value: Any) -> tuple[Any, ...]:
    """What a repeated option of several numbers was given, in one."""
    return tuple(number for numbers in value for number in numbers)


def together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator, in this order."""

    def add(command: F) -> F:
        for one in reversed(options):
            command = one(command)
        return command

    return add


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
    return together(
        option("--out", type=FilePath(path_type=Path), required=required, help=out, **named),
        option("--force", is_flag=True, help=f"Replace what is there already{more}."),
        option("--json", "as_json", is_flag=True, help="Print JSON instead of text."),
    )


comparison_options = together(
    option(
        "--arch",
        type=OneOf(list(ARCHITECTURES)),
        help="What is compared: siamese, 2 images; triplet, anchor, positive and negative; "
        "quadruplet, with 2 negatives; set, any number of each. "
        "[siamese for 2 images, triplet for 3]",
    ),
    option("--negative", is_flag=True, help="The pair is dissimilar: a negative."),
    rare_option("--positives", default=1, show_default=True,
                 help="How many of a set's other images are positives."),
)  # fmt: skip
"""How images given in a row are compared."""

_MODEL = "Model"
model_options = together(
    option(
        "--backbone", metavar="ZOO:NAME", group=_MODEL,
        help="Network of a zoo: the one a file of weights belongs to, such as timm:resnet50.",
    ),
    rare_option(
        "--keep-head", is_flag=True, group=_MODEL,
        help="The file's last linear layer makes the embedding.",
    ),
    option("--untrained", is_flag=True, group=_MODEL, help="Random weights: to try things out."),
    rare_option(
        "--trust-pickle", is_flag=True, group=_MODEL,
        help="Load pickled modules. They can run any code.",
    ),
    option(
        "--size", type=Size(), group=_MODEL, help="Input size in pixels. [the model's own]"
    ),
    rare_option(
        "--fit", type=OneOf(FITS), group=_MODEL,
        help="How a picture fits the input. [as the model has it]",
    ),
    rare_option(
        "--distance", type=OneOf(list(DISTANCES)), group=_MODEL,
        help="Distance between embeddings. [euclidean]",
    ),
    rare_option(
        "--output", "which_vector", type=OneOf(OUTPUTS), group=_MODEL,
        help="Which vector of the network is the embedding. [the one that its authors compare]",
    ),
    rare_option(
        "--mean", type=Numbers(), group=_MODEL,
        help="Mean of each channel, in [0, 1]. [the model's]",
    ),
    rare_option(
        "--std", type=Numbers(), group=_MODEL, help="Deviation of each channel. [the model's]"
    ),
    rare_option(
        "--interpolation", type=OneOf(INTERPOLATIONS), group=_MODEL,
        help="How pictures are resized. [as the model has it]",
    ),
    rare_option(
        "--channels", type=click.IntRange(1), group=_MODEL, help="Channels of a picture. [3]"
    ),
    rare_option(
        "--fast", is_flag=True, group=_MODEL,
        help="Run faster: batch norm is folded, numbers round otherwise.",
    ),
)  # fmt: skip
"""Everything that :func:`model_from` wants."""


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


def free_folder(base: Path) -> Path:
    """The first of ``base-1``, ``base-2``, ... that is not there yet."""
    number = 1
    while (folder := base.with_name(f"{base.name}-{number}")).exists():
        number += 1
    return folder


# ------------------------------------------------------------- options declared by dataclasses


def field_options(made: Any, *names: str, **more: Any) -> Callable[[F], F]:
    """Adds an option for each declared field of an options dataclass.

    Its default is only shown: those not given are None or empty, see :func:`given_fields`.

    Args:
        made: A dataclass with fields by :func:`simexplain.option_fields.option`.
        *names: Of its fields; all unless given.
        **more: What is declared otherwise for all of them, such as ``rare``.
    """
    hints = get_type_hints(made)

    def add(command: F) -> F:
        for name, (field, known) in reversed(declared(made).items()):
            if not names or name in names:
                known = replace(known, **more)
                command = _field_option(name, field.default, hints[name], known)(command)
        return command

    return add


def given_fields(made: Any, given: dict[str, Any], *names: str) -> dict[str, Any]:
    """Takes the options of :func:`field_options` out of ``given``: those that were given."""
    values = {name: given.pop(name) for name in names or declared(made)}
    return {name: value for name, value in values.items() if value not in (None, ())}


def _field_option(name: str, default: Any, hint: Any, known: About) -> Callable[[F], F]:
    """One option: its type follows from the field's type hint and what is declared of it."""
    flag = f"--{name.replace('_', '-')}"
    settings: dict[str, Any] = {"group": known.group, "rare": known.rare}
    if hint is bool:
        flag = known.flag or f"{flag}/--no-{flag[2:]}"
        shown = known.usual or ("yes" if default else "no")
        settings |= {"default": None}
    elif known.names:
        settings["type"] = OneOf(known.names)
    elif hint in _TUPLES:
        settings |= _TUPLES[hint]
    else:
        settings["type"] = _number(hint, known)
    if hint is not bool:
        flag = known.flag or flag
        values = default if isinstance(default, tuple) else (default,)
        values = () if default is MISSING else values
        shown = known.usual or ",".join(map(str, values)).replace("None", "")
    idle = f"; no effect {known.unless.where}." if known.unless else ""
    text = (known.help.rstrip(".") + idle if idle else known.help) + (
        f" [{shown}]" if shown else ""
    )
    return option(flag, name, help=text, **settings)


_TUPLES: dict[Any, dict[str, Any]] = {
    tuple[int, int] | None: {"type": Size()},
    tuple[int, ...]: {"type": RANKS_TYPE, "multiple": True, "callback": joined},
    tuple[float, ...]: {"type": Numbers(float, "1 or 0.5,1,2")},
    tuple[str, ...]: {"type": str, "multiple": True},
    tuple[tuple[str, Any], ...]: {"type": Pair(), "multiple": True},
}
"""How a field of several values is written on the command line, by its type hint."""


def _number(hint: Any, known: About) -> Any:
    """The type of one number, or text."""
    (kind,) = {hint, *get_args(hint)} & {int, float, str} or {str}
    if kind is str or known.least == -MOST:
        return kind
    between: Any = click.FloatRange if kind is float else click.IntRange
    return between(known.least, None if known.most == MOST else known.most)
