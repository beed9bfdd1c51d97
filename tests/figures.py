"""What is written in a figure, by what it is, and whether everything keeps to its place."""

from __future__ import annotations

import itertools
import warnings

from matplotlib.figure import Figure
from matplotlib.text import Text


def written(figure: Figure, *kinds: str) -> list[str]:
    """Lines of a sheet's cells: ``above``, ``below``, ``inside``, ``heading``, ``head``; or all."""
    return [t.get_text() for t in figure.findobj(Text) if not kinds or t.get_gid() in kinds]


def texts_of(figure: Figure) -> list[Text]:
    """Every text, those of axes too, with its place known."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.draw_without_rendering()
    result = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    return [text for text in result if text.get_window_extent().width > 0]


def assert_tidy(figure: Figure) -> None:
    """Everything lies in the figure, and neither pictures nor texts lie over each other."""
    texts = texts_of(figure)
    boxes = [axes.get_window_extent() for axes in figure.axes]
    words = [text.get_window_extent() for text in texts]
    for box in boxes + words:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
    for (a, first), (b, second) in itertools.combinations(zip(words, texts, strict=True), 2):
        over = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(over) <= 1, f"{first.get_text()!r} lies over {second.get_text()!r}"
    for a, b in itertools.combinations(boxes, 2):
        assert min(min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)) <= 1
    shown = [axes.get_window_extent() for axes in figure.axes if axes.images]
    for box, (word, text) in itertools.product(shown, zip(words, texts, strict=True)):
        over = (
            min(box.x1, word.x1) - max(box.x0, word.x0),
            min(box.y1, word.y1) - max(box.y0, word.y0),
        )
        assert min(over) <= 1, f"{text.get_text()!r} lies over a picture"
