"""Makes the picture and the report of ``docs/segmentation.md`` from emoji under Apache-2.0.

FOLDER holds a folder for each emoji, named by its code point, with ``google.png`` (Noto Emoji) and
``noto-v1.png`` (its first version, drawn otherwise) in it, both with an alpha channel. The first is
looked for in a scene of two, the second is the support. The truth is known, so the report has the
intersection over union::

    python docs/scripts/make_segmentation.py FOLDER
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from make_pictures import MODEL, TARGET
from PIL import Image
from simexplain_cli.segment import report
from skimage import data

from simexplain import load_model, segment
from simexplain.rendering.sheet import png_of
from simexplain.segmentation.evaluating import overlap

SIDE, LARGE = 448, 210
PLACES = ((20, 40), (215, 200))
WIDTH = 760


def compose(stamps: list[Image.Image]) -> tuple[Image.Image, list[np.ndarray]]:
    """Both emoji on gravel, and the mask of each."""
    grey = np.asarray(data.gravel())[:SIDE, :SIDE, None] * np.array([0.85, 0.9, 0.75])
    scene = Image.fromarray(grey.astype(np.uint8))
    masks = []
    for stamp, place in zip(stamps, PLACES, strict=True):
        small = stamp.resize((LARGE, LARGE), Image.Resampling.LANCZOS)
        scene.paste(small, place, small)
        mask = Image.new("L", scene.size)
        mask.paste(small.getchannel("A"), place)
        masks.append(np.asarray(mask) > 127)
    return scene, masks


def alone(stamp: Image.Image) -> Image.Image:
    """An emoji on white."""
    page = Image.new("RGB", (320, 320), "white")
    small = stamp.resize((260, 260), Image.Resampling.LANCZOS)
    page.paste(small, (30, 30), small)
    return page


def main() -> None:
    """Writes the figure, small, and what the command line prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--emoji", nargs=2, default=["1f407", "1f350"], metavar="CODE")
    given = parser.parse_args()
    folder = given.folder / "images" if (given.folder / "images").is_dir() else given.folder
    read = [
        [
            Image.open(folder / code / f"{name}.png").convert("RGBA")
            for name in ("google", "noto-v1")
        ]
        for code in given.emoji
    ]
    scene, masks = compose([pair[0] for pair in read])
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)  # so that the report names files as a user would
        scene.save("test.png")
        alone(read[0][1]).save("support.png")
        alone(read[1][1]).save("other.png")
        result = segment(load_model(MODEL), "test.png", ["support.png"], ["other.png"])
    drawn = Image.open(io.BytesIO(png_of(result.figure()))).convert("RGB")
    size = (WIDTH, round(drawn.height * WIDTH / drawn.width))
    small = drawn.resize(size, Image.Resampling.LANCZOS)
    small.save(TARGET / "segmentation.jpg", quality=74, optimize=True)
    printed = io.StringIO()
    with redirect_stdout(printed):
        report(result)
    reached = overlap(result.mask, masks[0]).iou
    text = (
        f"```text\n{printed.getvalue().rstrip()}\n```\n\nIntersection over union: {reached:.2f}.\n"
    )
    (TARGET / "segmentation_report.md").write_text(text, encoding="utf-8")
    print(text, f"{(TARGET / 'segmentation.jpg').stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
