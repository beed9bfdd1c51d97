"""Failures of re-identification as pictures: the query, the wrong person, the right one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from simexplain.data.images import read_picture
from simexplain.data.preprocessing import shrunk
from simexplain.printing import printable
from simexplain.rendering.sheet import FAINT, ROLE_COLOURS, Cell, Grid, Row, Words, page

if TYPE_CHECKING:
    from simexplain.evaluation.reid_result import Failure, Reidentification

_ACROSS, _SIDE, _TALL, _BETWEEN, _LONGEST = 4, 0.72, 1.44, 0.3, 360
_PARTS = (("query", "anchor"), ("came first", "negative"), ("was meant", "positive"))


def draw_failures(result: Reidentification, most: int) -> Figure:
    """A block of three pictures for each failure, the worst first.

    Args:
        result: Whose failures.
        most: How many to draw at most.

    Raises:
        ImageError: If a picture cannot be read.
    """
    failures, count = result.failures[:most], len(result.failures)
    model = str(result.settings["model"])
    across = min(_ACROSS, max(1, len(failures)))
    blocks = [_block(failure) for failure in failures]
    blocks += [[None] * 4] * (-len(blocks) % across)
    rows = [
        Row([cell for block in blocks[at : at + across] for cell in block][:-1], tallest=_TALL)
        for at in range(0, len(blocks), across)
    ]
    shown = f"{len(failures)} of {count} queries" if count > len(failures) else f"{count} queries"
    title = f"Another person ranked first: {shown}, worst first"
    if not failures:
        title = "Every query found its person first"
    widths = ([_SIDE] * 3 + [_BETWEEN]) * across
    return page([Grid(rows, widths[:-1], gap=0.06)], title=title, footer=model).figure


def _block(failure: Failure) -> list[Cell | None]:
    """The three pictures of a failure and a gap."""
    shown = (
        (failure.query, ""),
        (failure.wrong, f"{failure.distances[0]:.3f}"),
        (failure.right, f"{failure.distances[1]:.3f}, place {failure.first}"),
    )
    return [
        *(
            Cell(
                shrunk(read_picture(record.path).image, _LONGEST),
                above=(Words(title, ROLE_COLOURS[role], 7),),
                below=(
                    Words(printable(f"{record.label} c{record.camera}"), size=6.5),
                    Words(below, FAINT, 6.5, lines=2),
                ),
                frame=ROLE_COLOURS[role],
            )
            for (record, below), (title, role) in zip(shown, _PARTS, strict=True)
        ),
        None,
    ]
