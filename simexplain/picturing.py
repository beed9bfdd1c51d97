"""From an explanation to its figure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch.nn import functional as F

from simexplain.checking import PROVES
from simexplain.comparison import roles
from simexplain.data.preprocessing import Thumbnail, shrunk
from simexplain.errors import ComparisonError, check_index, printable
from simexplain.explanation import ROOTED, Explanation, GivenVector, heat_of, on_pixels
from simexplain.methods import PIXELS
from simexplain.rendering.overlay import CONTOUR_LEVELS, FULL_HEAT, RENDERERS
from simexplain.rendering.sheet import (
    FAINT,
    ROLE_COLOURS,
    VERDICTS,
    Bar,
    Cell,
    Grid,
    Row,
    Words,
    page,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_COLUMNS, _CELL, _TALLEST = 5, 2.75, 4.4
_PERCENTILE = f"{100 * FULL_HEAT:g}th"


def draw_explanation(
    explanation: Explanation, index: int, styles: Sequence[str], *, by_layer: bool = False
) -> Figure:
    """The figure of one comparison; see ``Explanation.figure``.

    Raises:
        ComparisonError: If the comparison or the style does not exist.
    """
    check_index("comparison", index, len(explanation))
    unknown = [style for style in styles if style not in RENDERERS]
    if unknown or not styles:
        raise ComparisonError(
            f"Expected styles of {', '.join(RENDERERS)}, got {', '.join(unknown) or 'none'}."
        )
    feet = [footer(row) for row in explanation.rows]
    return draw_columns(
        columns_of(explanation, index, styles, by_layer=by_layer),
        [explanation],
        title=question(explanation),
        verdict=verdict(explanation, index),
        holds=explanation.condition(index).holds,
        footer="\n".join((*findings(explanation, index), *dict.fromkeys(feet))),
        notes=explanation.notes(index),
    )


def findings(explanation: Explanation, index: int = 0) -> tuple[str, ...]:
    """What the rows say together: whether they agree, and what the check does not prove."""
    lines = tuple(f"{agreement.text}." for agreement in explanation.agreement(index))
    return lines if explanation.check is None else (*lines, PROVES)


@dataclass(frozen=True)
class Column:
    """One member of a comparison in its figure.

    Attributes:
        member: Its position in the comparison, 0 for the anchor.
        top: Its picture, or a card of what a given vector stands for.
        heats: What each row is called, and the heat that it shows; empty for a vector.
    """

    member: int
    top: Cell
    heats: tuple[tuple[str, Cell], ...] = ()


def draw_columns(
    columns: Sequence[Column],
    explanations: Sequence[Explanation],
    *,
    title: str,
    verdict: str,
    holds: bool | None,
    footer: str,
    notes: Sequence[str],
) -> Figure:
    """Draws the members of a comparison beside each other, their heat below them.

    Args:
        columns: The anchor first.
        explanations: Those that the columns are of, whose scale the legend names.
        title: The question, in a line.
        verdict: Whether the condition holds and by how much.
        holds: Colours the verdict; None for neither.
        footer: Model, layer and method, so that the figure can be cited; one or several lines.
        notes: Warnings, printed below.
    """
    rows = [row for explanation in explanations for row in explanation.rows]
    bar = Bar(f"evidence, share of {full_heat(rows)}", row=1, ticks=(0, *CONTOUR_LEVELS, 1))
    across = min(len(columns), _MOST_COLUMNS)
    grids = []
    for start in range(0, len(columns), across):
        block: list[Column | None] = list(columns[start : start + across])
        block += [None] * (across - len(block))
        lines = [Row([column.top if column else None for column in block], tallest=_TALLEST)]
        labels = next((column.heats for column in columns if column.heats), ())
        for number, (label, _) in enumerate(labels):
            cells = [c.heats[number][1] if c and c.heats else None for c in block]
            heading = Words(label, size=9, align="left", lines=2) if label else None
            lines.append(Row(cells, heading, _TALLEST))
        grids.append(Grid(lines, [_CELL] * across, bar=None if start else bar))
    return page(
        grids, title=title, verdict=verdict, ink=VERDICTS[holds], footer=footer, notes=notes
    ).figure


def verdict(explanation: Explanation, index: int = 0) -> str:
    """One line: whether the condition holds and by how much, or a pair's distance."""
    condition = explanation.condition(index)
    if any(vector.direction for vector in explanation.vectors):
        return condition.text
    if condition.holds is None and explanation.vectors:
        rows = F.normalize(explanation.embeddings[index], dim=1)
        distance, cosine = float(explanation.distances[index, 0]), float(rows[0] @ rows[1])
        return f"distance {distance:.3f}, cosine {cosine:.3f}"
    if condition.holds is None:
        values = ", ".join(f"{d:.3f}" for d in explanation.distances[index].tolist())
        return f"distance {values}"
    word = "holds" if condition.holds else "fails"
    return f"{condition.text}: {word} by {abs(condition.margin or 0.0):.3f}"


def footer(explanation: Explanation) -> str:
    """What one must know to cite the figure: model, layer, method and options."""
    chosen = [f"{key} {value}" for key, value in explanation.options.items() if value]
    where = [] if explanation.layers == (PIXELS,) else [f"layer {explanation.layer}"]
    drawn = []
    if on_pixels(explanation):
        drawn = [f"heat smoothed, full at its {_PERCENTILE} percentile"]
    if explanation.method in ROOTED:
        drawn = ["heat drawn by its square root"]
    parts = (explanation.model, *where, f"method {explanation.method}", *chosen, *drawn)
    return "   ·   ".join(parts)


def full_heat(explanations: Sequence[Explanation]) -> str:
    """What full heat is in the drawings of these explanations, for a legend."""
    fine = [on_pixels(explanation) for explanation in explanations]
    if all(fine):
        return f"the {_PERCENTILE} percentile"
    return f"the maximum (on pixels, the {_PERCENTILE} percentile)" if any(fine) else "the maximum"


def question(explanation: Explanation) -> str:
    """The question the maps answer, in a line."""
    if explanation.vectors and explanation.architecture == "siamese":
        vector = explanation.vectors[0]
        sign = "speaks for" if explanation.positives else "speaks against"
        where = "the direction " if vector.direction else ""
        label = textwrap.shorten(vector.label, 36, placeholder=" …")
        return f"What in the image {sign} {where}\u201c{label}\u201d?"
    if explanation.architecture == "siamese":
        return f"What makes these two {'alike' if explanation.positives else 'different'}?"
    near = f"the positive{'s' * (explanation.positives > 1)}"
    far = f"the negative{'s' * (explanation.negatives > 1)}"
    if not explanation.negatives:
        return f"What brings the anchor close to {near}?"
    if not explanation.positives:
        return f"What sets the anchor apart from {far}?"
    return f"What brings the anchor close to {near} and sets it apart from {far}?"


def columns_of(
    explanation: Explanation,
    index: int,
    styles: Sequence[str],
    *,
    by_layer: bool = False,
    named: tuple[str, str] | None = None,
) -> list[Column]:
    """The members of one comparison.

    Args:
        explanation: Of the comparisons.
        index: Which one.
        styles: Names in ``RENDERERS``, a row each.
        by_layer: Below them one row for each layer alone.
        named: The role and the name of all images, in place of their own and of the distances.
    """
    columns = [
        Column(
            explanation.places[position],
            _top(explanation, index, position, picture, named),
            tuple(_heats(explanation, index, position, picture, styles, by_layer=by_layer)),
        )
        for position, picture in enumerate(_pictures(explanation, index))
    ]
    columns += [_card(explanation, index, vector) for vector in explanation.vectors]
    return sorted(columns, key=lambda column: column.member)


def _pictures(explanation: Explanation, index: int) -> list[Thumbnail]:
    """The whole pictures reduced, or the network's views."""
    if explanation.pictures:
        both = zip(explanation.pictures, explanation.geometries, strict=True)
        return [Thumbnail(shrunk(picture.image), geometry) for picture, geometry in both]
    return [Thumbnail(explanation.preprocess.undo(image)) for image in explanation.images[index]]


def _top(
    explanation: Explanation,
    index: int,
    position: int,
    picture: Thumbnail,
    named: tuple[str, str] | None,
) -> Cell:
    role, name = named or (explanation.roles[position], explanation.kind(position))
    member = explanation.places[position]
    distance = None if named or not member else float(explanation.distances[index, member - 1])
    caption = (
        printable(Path(explanation.pictures[position].path).name) if explanation.pictures else ""
    )
    return Cell(
        picture.pixels, _titled(role, name, distance, caption), frame=ROLE_COLOURS[role],
        seen=picture.seen,
    )  # fmt: skip


def _titled(role: str, name: str, distance: float | None, caption: str) -> tuple[Words, ...]:
    title = (name or role) if distance is None else f"{name or role}   d = {distance:.3f}"
    return Words(title, ROLE_COLOURS[role], 11, "bold"), Words(caption, FAINT)


def _heats(
    explanation: Explanation,
    index: int,
    position: int,
    picture: Thumbnail,
    styles: Sequence[str],
    *,
    by_layer: bool,
) -> Iterator[tuple[str, Cell]]:
    """What every method shows, then every layer alone."""
    swept = by_layer and len(explanation.layers) > 1 and not explanation.others
    for row in explanation.rows:
        heat = picture.heat(heat_of(row, index)[position])
        peak = row.view_peaks(index)[position]
        note = "" if row.check is None else row.check.says(index, position)
        for style in styles:
            label = row.title if explanation.others else explanation.joined if swept else ""
            below = (Words(note, FAINT, 7.5, lines=3),) if note and style == styles[-1] else ()
            yield (
                label if style == styles[0] else "",
                Cell(
                    RENDERERS[style](picture.pixels, heat), below=below, seen=picture.seen,
                    peak=peak and picture.view_spot(*peak),
                ),
            )  # fmt: skip
    for layer, maps in explanation.layer_maps.items() if swept else ():
        heat = explanation.drawn(maps[index][None], layer)[0, position].cpu().numpy()
        drawn = RENDERERS[styles[0]](picture.pixels, picture.heat(heat))
        yield layer, Cell(drawn, seen=picture.seen)


def _card(explanation: Explanation, index: int, vector: GivenVector) -> Column:
    """A given vector, which has no picture: what it stands for, where its picture would be."""
    role = roles(explanation.positives, explanation.negatives)[vector.member]
    known = vector.member and not vector.direction
    distance = float(explanation.distances[index, vector.member - 1]) if known else None
    size = 13 if len(vector.label) < 60 else 10
    cell = Cell(
        above=_titled(role, explanation.members[vector.member], distance, ""),
        inside=(Words(vector.label, size=size, lines=8),),
        below=(Words("a vector: no map", FAINT),),
        frame=ROLE_COLOURS[role],
    )
    return Column(vector.member, cell)
