"""What commands print with: nothing in a name or a note acts on the terminal."""

from __future__ import annotations

import click

from simexplain.errors import printable


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
