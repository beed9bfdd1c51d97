"""Text in figures: names of files may hold dollar signs, ends of lines and what is not UTF-8."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simexplain.printing import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text


def write(place: Figure | Axes, x: float, y: float, text: str, **style: Any) -> Text:
    """Text as it is, at a place of a figure or of axes: dollar signs are no formulas.

    Args:
        place: What is written on.
        x: From the left, in the coordinates of ``place``.
        y: From below.
        text: One or more lines; what cannot be drawn becomes an escape.
        **style: As matplotlib has it.
    """
    return place.text(x, y, printable(text, keep="\n"), parse_math=False, **style)
