"""Every error that simexplain raises on purpose: one sentence with what came and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from simexplain.printing import printable


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
