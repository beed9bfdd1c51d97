"""What commands that make a result share: where it goes, what is printed, and its figure shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from simexplain.errors import OutputError
from simexplain.publishing import KINDS, check_writable

from .console import busy, tell_files, tell_manifest
from .options import free_folder, option, saving_options

if TYPE_CHECKING:
    from simexplain.results.result import Result


@dataclass(frozen=True)
class Made:
    """What a command made.

    Attributes:
        result: The result.
        report: Prints it for a person, and returns what to warn of.
        saving: Options of saving it.
        more: Further keys of its JSON.
    """

    result: Result
    report: Callable[[], Sequence[str]]
    saving: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)


def makes(
    kind: str, out: str, *, folder: str = ""
) -> Callable[[Callable[..., Made]], Callable[..., None]]:
    """Adds ``--out``, ``--force``, ``--json`` and ``--show`` to a command that returns its result.

    Args:
        kind: Of the result, a name in ``KINDS``.
        out: What ``--out`` names.
        folder: The base of the folder's name where ``--out`` names none; unless given, nothing is
            written then.
    """

    def add(command: Callable[..., Made]) -> Callable[..., None]:
        @wraps(command)
        def run(out: Path | None, force: bool, as_json: bool, show: bool, **given: Any) -> None:
            where = out or (free_folder(Path(folder)) if folder else None)
            if where is not None:
                check_writable(where, KINDS[kind].names, force=force)
            elif show:
                raise click.UsageError("--show opens a figure that is written; say --out as well.")
            made = command(**given)
            files = {} if where is None else _saved(made, out, folder, force=force)
            if as_json:
                tell_manifest(files, made.result, **made.more)
            else:
                tell_files(files, made.report())
            figures = [path for path in files.values() if path.endswith(".png")]
            if show and figures:
                click.launch(figures[0])

        run.__annotations__ = {}
        shown = option("--show", is_flag=True, help="Open the figure when it is there.")
        return saving_options(out)(shown(run))

    return add


def _saved(made: Made, out: Path | None, base: str, *, force: bool) -> dict[str, str]:
    """The files of a result, in ``out`` or in the first of ``base-1``, ``base-2``, ... to be had.

    Raises:
        OutputError: If it cannot be written.
    """
    while True:
        folder = out or free_folder(Path(base))
        with busy(f"Writing {folder}"):
            try:
                return made.result.write(folder, force=force, **made.saving)
            except OutputError:
                # Another run may have taken the name.
                if out is not None or not folder.exists():
                    raise
