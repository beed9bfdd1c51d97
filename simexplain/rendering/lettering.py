"""Text in figures: measured, shortened and wrapped so that it fits, whatever a name holds."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from simexplain.errors import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

FONT = "DejaVu Sans"
"""Comes with matplotlib, so that figures are alike everywhere."""

_BOX = 1.2
"""The breadth of the box in place of a letter that the font lacks, as a share of the size."""

DOTS = 120
"""Of a figure, per inch."""


def write(target: Figure | Axes, x: float, y: float, text: str, **style: Any) -> Text:
    """Writes text literally: dollar signs make no formulas, and settings of the user's no LaTeX.

    Args:
        target: What is written on.
        x: From the left, in the coordinates of ``target`` or of a ``transform`` in ``style``.
        y: From below.
        text: One or more lines; what cannot be drawn becomes an escape.
        **style: As matplotlib has it.
    """
    style = {"family": FONT, "usetex": False, "parse_math": False, **style}
    return target.text(x, y, printable(text, keep="\n"), **style)


def breadth(text: str, size: float, weight: str = "normal") -> float:
    """How broad a line of text is at most, in inches."""
    return 1.01 / DOTS * (1 + sum(_advance(sign, size, weight) for sign in text))


@lru_cache(maxsize=16384)
def _advance(sign: str, size: float, weight: str) -> float:
    """From one letter to the next, in pixels."""
    from matplotlib.backends.backend_agg import get_hinting_flag
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family=FONT, weight=weight)))
    if not (index := font.get_char_index(ord(sign))):
        return _BOX * size * DOTS / 72
    font.set_size(size, DOTS)
    glyph = font.load_glyph(index, flags=get_hinting_flag())
    # Letters are fitted to whole pixels, which makes some broader than they are designed.
    return float(max(glyph.linearHoriAdvance / 65536, glyph.horiAdvance / 64))


def shortened(text: str, most: float, size: float, weight: str = "normal") -> str:
    """Leaves out the middle of a text broader than ``most`` inches: both ends tell names apart."""
    if breadth(text, size, weight) <= most:
        return text
    least, kept = 0, len(text)
    while kept - least > 1:
        middle = (least + kept) // 2
        if breadth(_ends(text, middle), size, weight) <= most:
            least = middle
        else:
            kept = middle
    return _ends(text, least)


def _ends(text: str, kept: int) -> str:
    return f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"


def wrapped(
    text: str, most: float, size: float, weight: str = "normal", lines: int | None = None
) -> list[str]:
    """Lines of at most ``most`` inches, parted between words where possible.

    Args:
        text: May have several lines.
        most: The breadth, in inches.
        size: Of the letters, in points.
        weight: Of the letters.
        lines: The number of lines at most, of which the last one is shortened; None for all of the
            text, in which long words are parted too.
    """
    values: list[str] = []
    for paragraph in printable(text, keep="\n").split("\n"):
        line = ""
        for word in paragraph.split(" "):
            for part in _parts(word, most, size, weight) if lines is None else [word]:
                joined = f"{line} {part}" if line else part
                if line and breadth(joined, size, weight) > most:
                    values.append(line)
                    joined = part
                line = joined
        values.append(line)
    if lines is not None and len(values) > lines:
        values = [*values[: lines - 1], " ".join(values[lines - 1 :])]
    return [shortened(line, most, size, weight) for line in values]


def _parts(word: str, most: float, size: float, weight: str) -> list[str]:
    parts = [""]
    for sign in word:
        if parts[-1] and breadth(parts[-1] + sign, size, weight) > most:
            parts.append("")
        parts[-1] += sign
    return parts


def number(value: float) -> str:
    """Three digits that count: ``0.0123``, ``12.3``, ``1.2e-6``."""
    digits, exponential, power = f"{value:.3g}".partition("e")
    return f"{digits}e{int(power)}" if exponential else digits
