"""Fields of options: help, range, choices and effect, declared once beside the default.

The check of values, the command line and the command reference read them here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

from simexplain.errors import SimexplainError

Made = TypeVar("Made", bound=type)

MOST = float("inf")
_KEY = "simexplain"


@dataclass(frozen=True)
class Unless:
    """Where an option has no effect.

    Attributes:
        where: In words, such as ``without mining (--mining)``.
        met: Whether these options are such that it does have one.
    """

    where: str
    met: Callable[[Any], bool]


@dataclass(frozen=True)
class About:
    """What is declared of an option.

    Attributes:
        help: What it is, for the command line; what it does in particular follows a colon or a
            semicolon, and its default is left out.
        least: The smallest value of a number.
        most: The largest; infinite for finite values of any size.
        names: The names to choose from.
        unless: Where it has no effect.
        flag: Its name on the command line, unless it is the field's.
        usual: What is shown for a default that says nothing by itself, such as None.
        group: The heading it has in ``--help-all``.
        rare: Whether it is shown by ``--help-all`` alone.
    """

    help: str
    least: float = -MOST
    most: float = MOST
    names: tuple[str, ...] = ()
    unless: Unless | None = None
    flag: str = ""
    usual: str = ""
    group: str = ""
    rare: bool = True


def option(default: Any, what: str, *, names: Iterable[str] = (), **more: Any) -> Any:
    """A field of an options dataclass that says what it is.

    Args:
        default: Its default.
        what: Its help; see :class:`About`.
        names: The names to choose from, such as a table of them.
        **more: Further fields of :class:`About`.
    """
    return field(default=default, metadata={_KEY: About(what, names=tuple(names), **more)})


def declared(made: Any) -> dict[str, tuple[Field[Any], About]]:
    """The declared fields of a dataclass or of an object of it, by name."""
    return {one.name: (one, one.metadata[_KEY]) for one in fields(made) if _KEY in one.metadata}


def check_options(options: Any, error: type[SimexplainError]) -> None:
    """Refuses unknown names and numbers out of range.

    Args:
        options: An object of a dataclass with fields by :func:`option`.
        error: What is raised.

    Raises:
        SimexplainError: As ``error``, for the first value that cannot be used.
    """
    for name, (_, known) in declared(options).items():
        value = getattr(options, name)
        if known.names and value not in known.names:
            raise error(f"Expected {name} to be one of {', '.join(known.names)}, got {value!r}.")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            least, most = known.least, known.most
            if ((least > -MOST or most < MOST) and not least <= value <= most) or value == MOST:
                to = "" if most == MOST else f" and at most {most:g}"
                raise error(f"Expected {name} of at least {least:g}{to}, got {value:g}.")


def without_effect(options: Any) -> tuple[str, ...]:
    """A sentence for each option that was given, going by its default, and changes nothing."""
    return tuple(
        f"{name}={getattr(options, name)} has no effect {known.unless.where}."
        for name, (one, known) in declared(options).items()
        if known.unless and getattr(options, name) != one.default and not known.unless.met(options)
    )


def documented(made: Made) -> Made:
    """Adds to the docstring of a dataclass what is declared of its fields."""
    lines = [f"    {name}: {known.help}" for name, (_, known) in declared(made).items()]
    made.__doc__ = "\n".join([(made.__doc__ or "").rstrip(), "", "Attributes:", *lines])
    return made
