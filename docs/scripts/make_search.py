"""Makes the pictures and the reports of ``docs/search.md`` from the bundled demo pictures.

Prints of a cat, a cup and a photographer are cut out of the demo pictures and hung on walls, so the
right answer is known. Run it again after any change of ``search`` or its figure::

    python docs/scripts/make_search.py
"""

from __future__ import annotations

import io
import os
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from make_pictures import DEMO, MODEL, TARGET
from PIL import Image, ImageOps
from simexplain_cli.search import report

from simexplain import SearchResult, build_index, load_model, search
from simexplain.rendering.sheet import png_of

SIDE, PRINT = 448, 170
BOXES = {
    "cat": ("positive", (246, 54, 430, 226)),
    "cup": ("positive", (40, 252, 224, 414)),
    "photographer": ("negative", (246, 54, 426, 226)),
}
WALL = ("positive", (0, 0, 220, 220))
WALLS = ("cat cup", "cat photographer", "cup photographer", "cat", "cup", "photographer")
EACH = 4


def hang(folder: Path) -> None:
    """Four walls of each kind in folders, and a query: a cat and a cup, both mirrored."""
    demo = {name: Image.open(DEMO / f"{name}.jpg") for name, _ in (*BOXES.values(), WALL)}
    prints = {name: demo[source].crop(box) for name, (source, box) in BOXES.items()}
    plaster = demo[WALL[0]].crop(WALL[1]).resize((SIDE, SIDE))
    random = np.random.default_rng(4)
    for kind in WALLS:
        (folder / "walls" / kind).mkdir(parents=True)
        for number in range(EACH):
            wall = _wall(plaster, [prints[name] for name in kind.split()], random)
            wall.save(folder / "walls" / kind / f"{number}.jpg", quality=92)
    query = plaster.copy()
    for name, place in (("cat", (30, 40)), ("cup", (240, 230))):
        query.paste(_framed(ImageOps.mirror(prints[name]), PRINT), place)
    query.save(folder / "query.jpg", quality=92)


def _framed(picture: Image.Image, side: int) -> Image.Image:
    return ImageOps.expand(ImageOps.contain(picture, (side, side)), border=6, fill="white")


def _wall(
    plaster: Image.Image, prints: list[Image.Image], random: np.random.Generator
) -> Image.Image:
    """Prints in different quarters of a wall, in different sizes."""
    wall = ImageOps.mirror(plaster) if random.random() < 0.5 else plaster.copy()
    for picture, quarter in zip(prints, random.permutation(4), strict=False):
        framed = _framed(picture, int(random.integers(130, 200)))
        room = SIDE // 2 - max(framed.size)
        left, top = (
            int(part) * SIDE // 2 + int(random.integers(room + 1)) for part in divmod(quarter, 2)
        )
        wall.paste(framed, (left, top))
    return wall


def small(result: SearchResult, name: str, width: int) -> None:
    """The figure, as a small JPEG."""
    drawn = Image.open(io.BytesIO(png_of(result.figure()))).convert("RGB")
    size = (width, round(drawn.height * width / drawn.width))
    drawn.resize(size, Image.Resampling.LANCZOS).save(TARGET / name, quality=60, optimize=True)
    print(name, f"{(TARGET / name).stat().st_size / 1000:.0f} kB")


def write_report(result: SearchResult, name: str) -> None:
    """What the command line prints."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        report(result)
    text = f"```text\n{printed.getvalue().rstrip()}\n```\n"
    (TARGET / name).write_text(text, encoding="utf-8")
    print(text)


def main() -> None:
    """Writes both figures and reports."""
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)  # so that the reports name files as a user would
        hang(Path())
        model = load_model(MODEL, fit="squash")
        build_index(model, "walls", "walls.index")
        result = search(model, "query.jpg", "walls.index")
        write_report(result, "search_report.md")
        small(result, "search.jpg", 800)
        finer = load_model(MODEL, size=(448, 448), fit="squash")
        build_index(finer, "walls", "finer.index")
        region = search(finer, "query.jpg", "finer.index", 3, region=(30, 40, 182, 170))
        write_report(region, "search_region_report.md")
        small(region, "search_region.jpg", 600)
        os.chdir(TARGET)


if __name__ == "__main__":
    main()
