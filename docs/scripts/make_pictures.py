"""Makes every picture and every number of the documentation from the bundled demo triplet.

Each decision gives a picture and a Markdown table of the same name in ``docs/pictures``; the pages
include both, so that no number in them is typed by hand. Run it again after any change of maps::

    python docs/scripts/make_pictures.py
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from simexplain import Explanation, SimilarityModel, explain, load_model
from simexplain.models.accelerating import accelerated
from simexplain.rendering import sheet
from simexplain.rendering.overlay import RENDERERS
from simexplain.rendering.sheet import Cell, Grid, Words, page

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "docs" / "pictures"
DEMO = ROOT / "simexplain" / "data" / "demo"
TRIPLET = [DEMO / f"{role}.jpg" for role in ("anchor", "positive", "negative")]
MODEL = "timm:tf_efficientnet_lite0"

# Where compose_demo.py hung the two prints of the positive: size with border, centre, angle.
PRINTS = {"cat": ((221, 214), (335, 140), -4), "cup": ((225, 204), (135, 330), 3)}
CELL = 1.75


@dataclass(frozen=True)
class Row:
    """One choice to be shown.

    Attributes:
        label: What stands beside the picture and in the table.
        options: Passed to ``explain``.
        loading: Passed to ``load_model``.
    """

    label: str
    options: dict[str, Any] = field(default_factory=dict)
    loading: dict[str, Any] = field(default_factory=dict)


def rows_of(label: str, key: str, values: Sequence[Any], **always: Any) -> list[Row]:
    """One row for each value of one option."""
    return [Row(label.format(value), {key: value, **always}) for value in values]


SIGNED = {"weights": "signed"}
DECISIONS: dict[str, list[Row]] = {
    "weights": rows_of("{}", "weights", ("paper", "relative", "signed")),
    "weights_pair": rows_of("{}", "weights", ("paper", "relative"), arch="siamese"),
    "through_weights": [
        Row("weights constant"),
        Row("gradient through weights", {"through_weights": True}),
    ],
    "through_weights_signed": [
        Row("weights constant", SIGNED),
        Row("gradient through weights", {"through_weights": True, **SIGNED}),
    ],
    "layers": [
        Row(f"{layer}, {size}", {"layer": layer, **SIGNED})
        for layer, size in (
            ("bn2", "7x7 (default)"),
            ("blocks.5", "7x7"),
            ("blocks.4", "14x14"),
            ("blocks.2", "28x28"),
        )
    ],
    "cams": rows_of(
        "{}",
        "cam",
        ("grad_cam", "hires_cam", "layer_cam", "grad_cam_plus_plus"),
        layer="blocks.4",
        **SIGNED,
    ),
    "fused": [
        Row("bn2", {"layer": "bn2", **SIGNED}),
        Row("bn2 x blocks.4", {"layer": ("bn2", "blocks.4"), **SIGNED}),
    ],
    "upscale": rows_of("upscale {}", "upscale", (1, 2, 3), **SIGNED),
    "scale": rows_of("{}", "scale", ("image", "shared"), **SIGNED),
    "fit": [Row(fit, SIGNED, {"fit": fit}) for fit in ("crop", "squash", "pad")],
}


def wide_triplet(folder: Path) -> list[Path]:
    """The upper 480x300 of each demo picture: what the fits differ on."""
    paths = []
    for path in TRIPLET:
        paths.append(folder / f"{path.stem}.png")
        with Image.open(path) as picture:
            picture.crop((0, 0, 480, 300)).save(paths[-1])
    return paths


def mask_of(name: str, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Where a print hangs in the positive, cut to the height and width given."""
    size, (x, y), angle = PRINTS[name]
    turned = Image.new("L", size, 255).rotate(angle, expand=True)
    scene = Image.new("L", (480, 480))
    scene.paste(turned, (x - turned.width // 2, y - turned.height // 2), turned)
    inside = np.asarray(scene)[: shape[0], : shape[1]] > 127
    # The cat's print hangs over a corner of the cup's.
    return inside if name == "cat" else inside & ~mask_of("cat", shape)


def place_of(explanation: Explanation) -> str:
    """What the peak of the positive's map lies on."""
    peak = explanation.peaks()[1]
    if peak is None:
        return "nothing"
    shape = explanation.on_picture(1)[1].shape
    column, row = (int(v) for v in peak)
    on = [name for name in PRINTS if mask_of(name, (shape[0], shape[1]))[row, column]]
    return on[0] if on else "wall"


def table(rows: Sequence[Row], explanations: Sequence[Explanation]) -> str:
    """The numbers of one decision in Markdown; cosines are with the first row's maps.

    All maps of a decision about the scale are the same but for a factor, so its table has their
    largest values instead.
    """
    roles = explanations[0].roles
    heads = ["", "peak of the positive", "lies on", "heat on cat", "heat on cup"]
    shared = any(explanation.scale == "shared" for explanation in explanations)
    heads += [f"{'hottest' if shared else 'cosine'}, {role}" for role in roles]
    moved = any(explanation.moved is not None for explanation in explanations)
    heads += ["embedding moved"] if moved else []
    lines = [heads, ["---"] * len(heads)]
    first = [heat_of(explanations[0], place) for place in range(len(roles))]
    for row, explanation in zip(rows, explanations, strict=True):
        heat = heat_of(explanation, 1)
        shares = [heat[mask_of(name, heat.shape)].sum() / max(heat.sum(), 1e-9) for name in PRINTS]
        peak = explanation.peaks()[1]
        cells = [row.label, f"({peak[0]:.0f}, {peak[1]:.0f})" if peak else "none"]
        cells += [place_of(explanation), *(f"{share:.2f}" for share in shares)]
        heats = [heat_of(explanation, place) for place in range(len(roles))]
        pairs = zip(first, heats, strict=True)
        cells += [f"{b.max() if shared else cosine(a, b):.2f}" for a, b in pairs]
        if moved:
            most = 0.0 if explanation.moved is None else float(explanation.moved.max())
            cells.append(f"{most:.2f}")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def heat_of(explanation: Explanation, place: int) -> NDArray[np.float32]:
    """The heatmap on the picture itself."""
    return explanation.on_picture(place)[1]


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Cosine similarity of two maps; 0 where one is empty."""
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / norm if norm else 0.0


def strip(rows: Sequence[Row], explanations: Sequence[Explanation]) -> Figure:
    """One line of overlays for each choice."""
    lines = [
        sheet.Row(
            [
                Cell(
                    RENDERERS["overlay"](*explanation.on_picture(place)),
                    () if number else (Words(role, size=9),),
                    peak=peak and (peak[0] - 0.5, peak[1] - 0.5),
                )
                for place, (role, peak) in enumerate(
                    zip(explanation.roles, explanation.peaks(), strict=True)
                )
            ],
            Words(row.label, align="left", lines=2),
            tallest=CELL,
        )
        for number, (row, explanation) in enumerate(zip(rows, explanations, strict=True))
    ]
    grid = Grid(lines, [CELL] * len(explanations[0].roles), gap=0.05, between=0.04)
    return page([grid], title="", least=0).figure


def line(drawn: dict[str, NDArray[np.uint8]]) -> Figure:
    """Drawn pictures side by side under their names."""
    cell = CELL * 4 / max(4, len(drawn))
    cells = [Cell(picture, (Words(name, lines=2),)) for name, picture in drawn.items()]
    return page([Grid([sheet.Row(cells)], [cell] * len(cells))], title="", least=0).figure


def sweep(model: SimilarityModel) -> Figure:
    """The positive at the last layer of every resolution, and all of them multiplied."""
    swept = explain(model, TRIPLET, layer=model.stages, check=False, **SIGNED)
    alone = {f"{k}\n{m.shape[2]}x{m.shape[3]}": m for k, m in swept.layer_maps.items()}
    maps = {**alone, "product": swept.maps}
    return line(
        {
            name: RENDERERS["overlay"](*replace(swept, maps=single).on_picture(1))
            for name, single in maps.items()
        }
    )


def write(figure: Figure, name: str, share: float = 1) -> None:
    """Writes a picture as a PNG of 256 colours, a third of its size in full colour."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white", dpi=share * figure.dpi)
    picture = Image.open(buffer).convert("RGB")
    # k-means keeps the few bright colours of the heat, which plain median cut merges.
    palette = picture.reduce(3).quantize(256, kmeans=2)
    colours = np.array(palette.getpalette()).reshape(-1, 3)
    colours[colours.sum(axis=1).argmax()] = 255  # or the ground would be nearly white
    colours[colours.min(axis=1) >= 250] = 255  # Pillow matches colours in steps of four
    palette.putpalette(colours.ravel().tolist())
    dithered = picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
    dithered.save(TARGET / f"{name}.png", optimize=True)


def explained(model: SimilarityModel, paths: Sequence[Path], row: Row) -> Explanation:
    """A row's explanation; a pair takes the first two pictures."""
    count = 2 if row.options.get("arch") == "siamese" else 3
    return explain(model, paths[:count], method="sam", check=False, **row.options)


def fast_apart(model: SimilarityModel) -> float:
    """The largest difference of fast maps from plain ones, as a share of their maximum."""
    plain, fast = (
        explain(m, TRIPLET, check=False, **SIGNED).maps for m in (model, accelerated(model))
    )
    return float(((plain - fast).abs().amax(dim=(2, 3)) / plain.amax(dim=(2, 3))).max())


def along(explanation: Explanation) -> float:
    """The cosine of the weights with the anchor's embedding."""
    weights, anchor = explanation.weights[0], explanation.embeddings[0, 0]
    return float(weights @ anchor / weights.norm())


def main() -> None:
    """Writes all pictures and tables and prints the tables."""
    TARGET.mkdir(parents=True, exist_ok=True)
    model = load_model(MODEL)
    write(explain(model, TRIPLET).figure(), "demo", share=0.75)
    signed = explain(model, TRIPLET, check=False, **SIGNED)
    write(line({k: draw(*signed.on_picture(1)) for k, draw in RENDERERS.items()}), "renderers")
    write(sweep(model), "sweep")
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in DECISIONS.items():
            paths = wide_triplet(Path(folder)) if name == "fit" else TRIPLET
            models = [load_model(MODEL, **row.loading) if row.loading else model for row in rows]
            explanations = [explained(m, paths, row) for m, row in zip(models, rows, strict=True)]
            write(strip(rows, explanations), name)
            numbers = table(rows, explanations)
            (TARGET / f"{name}.md").write_text(numbers + "\n", encoding="utf-8")
            print(f"{name}\n{numbers}\n")
    for name, value in (("fast", f"{fast_apart(model):.0e}"), ("along", f"{along(signed):.2f}")):
        (TARGET / f"{name}.md").write_text(f"{value}\n", encoding="utf-8")
        print(f"{name}: {value}")
    size = sum(path.stat().st_size for path in TARGET.glob("*.png"))
    print(f"{len(list(TARGET.glob('*.png')))} pictures, {size / 1e6:.2f} MB in {TARGET.name}/")


if __name__ == "__main__":
    main()
