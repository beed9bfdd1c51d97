"""What every result can do; where its files lie and what draws it is a line of ``KINDS``."""

from __future__ import annotations

import csv
import html
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np
from PIL import Image

from simexplain.data.images import LARGE
from simexplain.errors import OutputError, json_text, printable
from simexplain.publishing import KINDS, SCHEMA, Kind, atomic_directory, numbered, read_back
from simexplain.results.codec import Arrays, decoded, encoded, plain
from simexplain.results.png import write_png
from simexplain.results.upgrades import UPGRADES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Made = TypeVar("Made", bound="Result")
Row = dict[str, str | int | float]

_SHOWN = 4
_FIELDS = "fields"


@dataclass(frozen=True)
class Table:
    """Rows of a CSV file; what is undefined (NaN) is left empty.

    Attributes:
        rows: By column.
        columns: Their order; those of the first row unless given.
    """

    rows: Sequence[Mapping[str, Any]]
    columns: Sequence[str] = ()


Attachments = dict[str, tuple[str, Callable[[], Any]]]
"""For each kind of file its name and what makes its content: a figure, pixels or a table."""


class Result(ABC):
    """A frozen dataclass that can be drawn, shown by a notebook, saved and loaded.

    Its fields say by their types how they are kept; see ``simexplain.results.codec``.
    """

    @abstractmethod
    def summary(self, **options: Any) -> dict[str, Any]:
        """Its JSON record; later versions may add keys, never change them."""

    def captions(self) -> Sequence[str]:
        """What each of its figures shows, in a line; none for a result that is shown as text."""
        return ()

    def attachments(self, **options: Any) -> Attachments:
        """The files that are written beside the manifest and the arrays: here the figures.

        Args:
            **options: Of saving; here of the figures.
        """
        return self._figures(**options) if self.captions() else {}

    def _figures(self, what: str = "figure", **options: Any) -> Attachments:
        """A figure for each caption, numbered where there are several."""
        count = len(self.captions())
        stem, _, ending = kind_of(type(self)).files[what].rpartition(".")
        return {
            f"{what}{tag}": (f"{stem}{tag}.{ending}", partial(self._figure, index, **options))
            for index in range(count)
            for tag in (numbered(index, count),)
        }

    def _figure(self, index: int, **options: Any) -> Figure:
        """One of its figures; a type with a single one takes no number."""
        drawn: Any = getattr(self, "figure")  # noqa: B009 - not every type has one
        figure: Figure = drawn(index, **options) if index else drawn(**options)
        return figure

    def more_arrays(self) -> Arrays:
        """Arrays for those who read the file alone, beside those of the fields."""
        return {}

    def placed(self: Made, notes: Sequence[str] = (), **fields: Any) -> Made:
        """The same with other fields, such as its pictures, and more warnings in front."""
        own: Any = self
        placed: Made = replace(own, warnings=(*notes, *own.warnings), **fields)
        return placed

    def to_store(self: Made) -> Made:
        """What of it is kept."""
        return self

    def from_store(self: Made) -> Made:
        """The counterpart of :meth:`to_store`."""
        return self

    def to_json(self, files: Mapping[str, str] | None = None, **options: Any) -> dict[str, Any]:
        """The JSON contract: plain values; what is undefined (NaN) is null.

        Args:
            files: Where its files are, by kind.
            **options: Those of saving, where the type has any.
        """
        record = {"schema": SCHEMA, **self.summary(**options)}
        record["files"] = files or record.get("files", {})
        return {key: plain(value) for key, value in record.items()}

    def save(self, folder: str | Path, *, force: bool = False) -> dict[str, str]:
        """Writes its figures, arrays and manifest atomically.

        Args:
            folder: Made if missing.
            force: Replace the files of a result of this type that is there already; others stay.

        Returns:
            What was written, by kind.

        Raises:
            OutputError: If files are there already, or the folder cannot be written.
        """
        return self.write(folder, force=force)

    def write(
        self, folder: str | Path, *, force: bool = False, alone: str = "", **options: Any
    ) -> dict[str, str]:
        """As :meth:`save`, with what the type has to choose from.

        Args:
            folder: Made if missing.
            force: Replace the files of an earlier result.
            alone: The name of a JSON file that has everything, without tables and figures.
            **options: Of the type.
        """
        folder, kind = Path(folder), kind_of(type(self))
        kind = Kind(kind.what, {"results": alone}) if alone else kind
        made = {} if alone else self.attachments(**options)
        names = {
            key: name
            for key, name in kind.files.items()
            if key in made or name in (kind.manifest, kind.arrays)
        }
        names |= {key: name for key, (name, _) in made.items()}
        files = {key: str(folder / name) for key, name in names.items()}
        with atomic_directory(folder, list(names.values()), kind, force=force) as draft:
            record = self.to_json(files, **options)
            for name, make in made.values():
                with (draft / name).open("wb") as file:
                    _put(file, make())
            record, arrays = _kept(self, kind, record)
            if kind.arrays:
                np.savez_compressed(draft / kind.arrays, **arrays)  # type: ignore[arg-type]
            (draft / kind.manifest).write_text(json_text(record) + "\n", encoding="utf-8")
        return files

    @classmethod
    def load(cls: type[Made], folder: str | Path) -> Made:
        """Reads what :meth:`save` wrote; no code in it is ever run.

        Original pictures are not stored: they become the network's view of them.

        Raises:
            OutputError: If the folder holds no such result or a damaged one.
        """
        return cls.read(Path(folder))

    @classmethod
    def read(cls: type[Made], folder: Path, alone: str = "") -> Made:
        """The counterpart of :meth:`write`."""
        kind = kind_of(cls)
        kind = Kind(kind.what, {"results": alone}) if alone else kind
        return read_back(folder, kind, lambda *kept: _restored(cls, *kept))

    def _repr_html_(self) -> str:
        """What Jupyter shows: the first figures, or the text."""
        from simexplain.rendering.sheet import as_html

        captions = self.captions()
        if not captions:
            return f"<pre>{html.escape(printable(str(self), keep=chr(10)))}</pre>"
        parts = [as_html(self._figure(index), text) for index, text in enumerate(captions[:_SHOWN])]
        if len(captions) > _SHOWN:
            parts.append(f"<p>{len(captions) - _SHOWN} more: .figure(index)</p>")
        return "\n".join(parts)

    def _draw(self, *args: Any, by: str = "", **options: Any) -> Figure:
        """Its figure, by the function of its line in ``KINDS``, or another one beside that."""
        module, _, name = kind_of(type(self)).drawn.rpartition(".")
        drawn: Figure = getattr(import_module(module), by or name)(self, *args, **options)
        return drawn


class Kept(Result):
    """A result that lies in a folder already, written while it was made."""

    folder: Path

    def write(
        self, folder: str | Path, *, force: bool = False, alone: str = "", **options: Any
    ) -> dict[str, str]:
        """Cannot be done twice.

        Raises:
            OutputError: Always; the error states where it is.
        """
        raise OutputError(f"Its files are in '{self.folder}' already; copy that folder.")


def kind_of(made: type[Result]) -> Kind:
    """How results of a type lie on the disk."""
    return KINDS[next(base.__name__ for base in made.__mro__ if base.__name__ in KINDS)]


def _put(file: BinaryIO, made: Any) -> None:
    """Writes the content of a file."""
    if isinstance(made, np.ndarray) and made.shape[0] * made.shape[1] >= LARGE:
        write_png(file, made)
    else:
        file.write(content_of(made))


def content_of(made: Any) -> bytes:
    """The content of a file."""
    buffer = io.BytesIO()
    if isinstance(made, Table):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, made.columns or list(made.rows[0]))
        writer.writeheader()
        for row in made.rows:
            writer.writerow({key: "" if v != v else v for key, v in row.items()})
        return text.getvalue().encode("utf-8", errors="backslashreplace")
    if isinstance(made, np.ndarray):
        Image.fromarray(made).save(buffer, "PNG", compress_level=3)
        return buffer.getvalue()
    from simexplain.rendering.sheet import png_of

    return png_of(made)


def _kept(result: Result, kind: Kind, metadata: dict[str, Any]) -> tuple[dict[str, Any], Arrays]:
    """The manifest and the arrays: fields that neither has as they are stand under ``fields``."""
    arrays: Arrays = {}
    record = encoded(result.to_store(), arrays if kind.arrays else None)
    known = {**metadata, **{name: name for name in arrays}}
    rest = {key: value for key, value in record.items() if known.get(key, known) != value}
    if kind.arrays:
        return metadata, {**arrays, **result.more_arrays(), _FIELDS: np.array(json.dumps(rest))}
    return ({**metadata, _FIELDS: rest} if rest else metadata), {}


def _restored(made: type[Made], metadata: dict[str, Any], arrays: Arrays) -> Made:
    """The result with this manifest and these arrays, today's or those of an earlier version."""
    if _FIELDS in arrays:
        rest = json.loads(str(arrays.pop(_FIELDS)))
    else:
        rest = metadata.get(_FIELDS, {})
        if not rest and made.__name__ in UPGRADES:
            rest = UPGRADES[made.__name__](metadata, arrays)
    record = {**metadata, **{name: name for name in arrays}, **rest}
    return decoded(made, record, arrays).from_store()
