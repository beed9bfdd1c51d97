"""From an explanation to its figure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from simexplain.checking import PROVES
from simexplain.comparison import roles
from simexplain.errors import ComparisonError
from simexplain.explanation import ROOTED, Explanation, GivenVector, heat_of, on_pixels
from simexplain.methods import PIXELS
from simexplain.printing import printable
from simexplain.rendering.overlay import FULL_HEAT, RENDERERS
from simexplain.rendering.panel import Row, Tile, panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_THUMBNAIL = 560
_NOTHING = np.zeros((1, 1, 3), np.uint8)
_PERCENTILE = f"{100 * FULL_HEAT:g}th"


def draw_explanation(
    explanation: Explanation, index: int, styles: Sequence[str], *, by_layer: bool = False
) -> Figure:
    """The figure of one comparison; see ``Explanation.figure``.

    Raises:
        ComparisonError: If there is no such comparison or style.
    """
    if not -len(explanation) <= index < len(explanation):
        raise ComparisonError(
            f"Expected a comparison below {len(explanation)}, got {index}; counting starts at 0."
        )
    unknown = [style for style in styles if style not in RENDERERS]
    if unknown or not styles:
        raise ComparisonError(
            f"Expected styles of {', '.join(RENDERERS)}, got {', '.join(unknown) or 'none'}."
        )
    feet = [footer(row) for row in explanation.rows]
    return draw_tiles(
        _tiles(explanation, index, by_layer=by_layer),
        title=question(explanation),
        verdict=verdict(explanation, index),
        holds=explanation.condition(index).holds,
        footer="\n".join((*findings(explanation, index), *dict.fromkeys(feet))),
        notes=explanation.notes(index),
        styles=styles,
        explanations=explanation.rows,
    )


def findings(explanation: Explanation, index: int = 0) -> tuple[str, ...]:
    """What the rows say together: whether they agree, and what the check does not prove."""
    found = tuple(f"{agreement.text}." for agreement in explanation.agreement(index))
    return found if explanation.check is None else (*found, PROVES)


def draw_tiles(
    tiles: Sequence[Tile],
    *,
    styles: Sequence[str],
    explanations: Sequence[Explanation],
    **said: Any,
) -> Figure:
    """Draws tiles of one or several explanations; ``said`` as for ``rendering.panel.panel``."""
    joined = explanations[0].joined
    return panel(tiles, styles=styles, scale=full_heat(explanations), joined=joined, **said)


def image_tiles(explanation: Explanation, index: int) -> list[Tile]:
    """The images of one comparison as tiles of a figure, without given vectors."""
    return [tile for tile in _tiles(explanation, index, by_layer=False) if tile.text is None]


def verdict(explanation: Explanation, index: int = 0) -> str:
    """One line: whether the condition holds and by how much, or a pair's distance."""
    condition = explanation.condition(index)
    if any(vector.direction for vector in explanation.vectors):
        return condition.text
    if condition.holds is None and explanation.vectors:
        return "distance {:.3f}, cosine {:.3f}".format(*_to_the_vector(explanation, index))
    if condition.holds is None:
        values = ", ".join(f"{d:.3f}" for d in explanation.distances[index].tolist())
        return f"distance {values}"
    word = "holds" if condition.holds else "fails"
    return f"{condition.text}: {word} by {abs(condition.margin or 0.0):.3f}"


def _to_the_vector(explanation: Explanation, index: int) -> tuple[float, float]:
    """Distance and cosine of the only pair of a comparison."""
    rows = F.normalize(explanation.embeddings[index], dim=1)
    return float(explanation.distances[index, 0]), float(rows[0] @ rows[1])


def footer(explanation: Explanation) -> str:
    """What one must know to cite the figure: model, layer, method and options."""
    chosen = [f"{key} {value}" for key, value in explanation.options.items() if value]
    where = [] if explanation.layers == (PIXELS,) else [f"layer {explanation.layer}"]
    drawn = []
    if on_pixels(explanation):
        drawn = [f"heat smoothed, full at its {_PERCENTILE} percentile"]
    if explanation.method in ROOTED:
        drawn = ["heat drawn by its square root"]
    said = (explanation.model, *where, f"method {explanation.method}", *chosen, *drawn)
    return "   ·   ".join(said)


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


def _tiles(explanation: Explanation, index: int, *, by_layer: bool) -> list[Tile]:
    heatmaps = heat_of(explanation, index)
    distances = [None, *explanation.distances[index].tolist()]
    peaks = explanation.view_peaks(index)
    shown = explanation.layer_maps if by_layer and not explanation.others else {}
    shown = shown if len(explanation.layers) > 1 else {}
    others = [(row, heat_of(row, index), row.view_peaks(index)) for row in explanation.others]
    more = {
        layer: explanation.drawn(maps[index][None], layer)[0].cpu().numpy()
        for layer, maps in shown.items()
    }
    tiles: list[tuple[int, Tile]] = []
    for place, role in enumerate(explanation.roles):
        member = explanation.places[place]
        tile = Tile(
            picture=_NOTHING,
            heatmap=heatmaps[place],
            role=role,
            distance=distances[member],
            peak=peaks[place],
            more=tuple((layer, heatmaps[place]) for layer, heatmaps in more.items()),
            label=explanation.title if explanation.others else "",
            note=_note(explanation, index, place),
            others=tuple(
                Row(row.title, heat[place], found[place], _note(row, index, place))
                for row, heat, found in others
            ),
            kind=explanation.kind(place),
        )
        if explanation.pictures:
            tiles.append((member, _from_picture(explanation, place, tile)))
        else:
            picture = explanation.preprocess.undo(explanation.images[index, place])
            tiles.append((member, _on_view(tile, picture)))
    tiles += [
        (vector.member, _card(explanation, vector, distances[vector.member]))
        for vector in explanation.vectors
    ]
    return [tile for _, tile in sorted(tiles, key=lambda one: one[0])]


def _on_view(tile: Tile, picture: NDArray[np.uint8]) -> Tile:
    """The network's view with the heat on it."""
    others = tuple(replace(row, peak=_centred(row.peak)) for row in tile.others)
    return replace(tile, picture=picture, peak=_centred(tile.peak), others=others)


def _card(explanation: Explanation, vector: GivenVector, distance: float | None) -> Tile:
    """A given vector, which has no picture."""
    return Tile(
        picture=_NOTHING,
        heatmap=_NOTHING[..., 0].astype(np.float32),
        role=roles(explanation.positives, explanation.negatives)[vector.member],
        distance=None if vector.direction else distance,
        text=vector.label,
        kind=explanation.members[vector.member],
    )


def _from_picture(explanation: Explanation, place: int, tile: Tile) -> Tile:
    """A thumbnail of the whole picture with the heat where the network saw it."""
    picture, geometry = explanation.pictures[place], explanation.geometries[place]
    width, height = picture.image.size
    shrink = min(1.0, _THUMBNAIL / max(width, height))
    small = (max(1, round(height * shrink)), max(1, round(width * shrink)))
    reduced = replace(geometry, original=small)
    thumbnail = picture.image.resize((small[1], small[0]), Image.Resampling.LANCZOS)
    left, top, right, bottom = reduced.box
    whole = (left, top) == (0, 0) and (right, bottom) == (small[1], small[0])

    def there(peak: tuple[float, float] | None) -> tuple[float, float] | None:
        return _centred(peak and reduced.point_to_original(*peak))

    return replace(
        tile,
        picture=np.asarray(thumbnail),
        heatmap=reduced.to_original(tile.heatmap),
        more=tuple((label, reduced.to_original(heatmap)) for label, heatmap in tile.more),
        caption=printable(Path(picture.path).name),
        box=None if whole else reduced.box,
        peak=there(tile.peak),
        others=tuple(
            replace(row, heatmap=reduced.to_original(row.heatmap), peak=there(row.peak))
            for row in tile.others
        ),
    )


def _centred(peak: tuple[float, float] | None) -> tuple[float, float] | None:
    """A place as figures count it, from the centre of the first pixel."""
    return peak and (peak[0] - 0.5, peak[1] - 0.5)


def _note(row: Explanation, index: int, place: int) -> str:
    return "" if row.check is None else row.check.says(index, place)
