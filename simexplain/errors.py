"""Every error that simexplain raises on purpose, in one sentence; text that is safe to print."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

_ACTING = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories that a terminal acts on or cannot print: control characters, changes of the
writing direction, bytes that are not UTF-8 (lone surrogates), separators of lines."""


def printable(text: object, keep: str = "") -> str:
    r"""One line that shows what a terminal would act on as escapes, such as ``\x1b`` and ``\n``.

    Args:
        text: What is printed, such as the name of a file.
        keep: Characters that stay although a terminal acts on them.
    """
    plain = str(text)
    if plain.isprintable():
        return plain
    return "".join(sign if sign in keep else _escaped(sign) for sign in plain)


def _escaped(sign: str) -> str:
    """One character, as Python's source code would have it where it cannot be printed."""
    code = ord(sign)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte of a name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if unicodedata.category(sign) in _ACTING:
        return sign.encode("unicode_escape").decode("ascii")
    return sign


def json_text(value: Any) -> str:
    """JSON, indented by two spaces, for a file or a terminal.

    What is not a finite number becomes null. Characters that a terminal acts on, and bytes of names
    that are not UTF-8, become escapes, which readers of JSON give back.
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    if text.replace("\n", "").isprintable():
        return text
    return "".join(
        json.dumps(sign)[1:-1] if sign != "\n" and unicodedata.category(sign) in _ACTING else sign
        for sign in text
    )


def _finite(value: Any) -> Any:
    """The same with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class SimexplainError(ValueError):
    """Base of all errors meant for the user; its text is complete without a traceback.

    Names in it, which may hold anything, are shown without what a terminal would act on.
    """

    def __init__(self, text: str = "") -> None:
        super().__init__(printable(text))


class ComparisonError(SimexplainError):
    """The images or embeddings compared do not fit together."""


class ImageError(SimexplainError):
    """A picture cannot be read or preprocessed."""


class ModelError(SimexplainError):
    """A model, a layer of it or a file that should hold one cannot be used."""


class ArgumentError(ComparisonError, ImageError, ModelError):
    """An argument is not of its kind, whatever it belongs to."""


class NetworkError(ModelError, RuntimeError):
    """A network failed on the images that it was given; the cause is what it raised."""


class TwoImagesError(ModelError):
    """A model that takes two images at once was given where one image is embedded."""


class OutputError(SimexplainError):
    """A result cannot be written or read back."""


DAMAGED = (ValueError, KeyError, IndexError, TypeError, AttributeError)
"""What reading a file of the right kind but with damaged content may raise."""


def meant(name: str, known: Iterable[str], others: Mapping[str, str] | None = None) -> str:
    """``; did you mean X?`` for a name that is not known, or nothing.

    Args:
        name: What was written.
        known: The names that there are.
        others: Names that people use elsewhere, in small letters and digits alone, and ours.
    """
    plain = "".join(sign for sign in str(name).lower() if sign.isalnum())
    if others and plain in others:
        return f"; did you mean {others[plain]}?"
    short = {"".join(sign for sign in one.lower() if sign.isalnum()): one for one in known}
    matches = get_close_matches(plain, short, n=3)
    return f"; did you mean {' or '.join(short[one] for one in matches)}?" if matches else ""


def check_choice(
    what: str, chosen: str, table: Iterable[str], error: type[SimexplainError] = ComparisonError
) -> None:
    """Raises an error of a type where a name is not in a table."""
    names = list(table)
    if chosen not in names:
        raise error(f"Expected {what} to be one of {', '.join(names)}, got '{chosen}'.")


def check_index(what: str, index: int, count: int) -> None:
    """Raises a ComparisonError for the index of something that a result does not have."""
    if not -count <= index < count:
        raise ComparisonError(
            f"Expected a {what} below {count}, got {index}; counting starts at 0."
        )


def missing(path: object, otherwise: str) -> str:
    """Why a file or folder does not exist: addresses on the web are never one."""
    name = re.sub(r"^([a-z][a-z0-9+.-]+:/)(?!/)", r"\1/", str(path))  # a Path has one slash
    if not re.match(r"[a-z][a-z0-9+.-]+:/", name):
        return otherwise
    return f"'{name}' is an address on the web, which is not read; download it and give the file."


def cause_of(error: Exception) -> str:
    """The first line of what went wrong; of a :class:`NetworkError` that is its cause."""
    cause = error.__cause__ if isinstance(error, NetworkError) else error
    return first_line(cause if isinstance(cause, Exception) else error)


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type where the text is empty."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
