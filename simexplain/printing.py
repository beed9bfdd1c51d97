"""Text that is safe to print: names of files and notes of models may hold anything."""

from __future__ import annotations

import json
import math
import unicodedata
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
