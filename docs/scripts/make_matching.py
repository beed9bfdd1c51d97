"""Makes the picture and the report of ``docs/matching.md`` from the bundled demo pictures.

Run it again after any change of ``match`` or its figure::

    python docs/scripts/make_matching.py
"""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout

from make_pictures import DEMO, MODEL, TARGET
from PIL import Image
from simexplain_cli.match import report

from simexplain import load_model, match
from simexplain.rendering.sheet import png_of

POINT = (300, 370)
"""The cat's nose in the anchor."""

WIDTH = 720


def main() -> None:
    """Writes the figure, small, and what the command line prints."""
    os.chdir(DEMO)  # so that the report names files as a user would
    result = match(load_model(MODEL), "anchor.jpg", "positive.jpg")
    drawn = Image.open(io.BytesIO(png_of(result.figure(points=[POINT])))).convert("RGB")
    size = (WIDTH, round(drawn.height * WIDTH / drawn.width))
    small = drawn.resize(size, Image.Resampling.LANCZOS)
    # Photographs under heat: as a PNG they would take three times as much.
    small.save(TARGET / "matching.jpg", quality=82, optimize=True)
    printed = io.StringIO()
    with redirect_stdout(printed):
        report(result, [POINT], 4)
    text = f"```text\n{printed.getvalue().rstrip()}\n```\n"
    (TARGET / "matching_report.md").write_text(text, encoding="utf-8")
    print(text, f"{(TARGET / 'matching.jpg').stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
