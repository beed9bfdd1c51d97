"""Makes a folder of cut-out photographs by category, which no choice in this project was tuned on.

The pictures come from Debian's package tuxpaint-stamps-default (GPL-2: they may not be copied into
this repository); version 2022.06.04-1 was used.

    apt-get download tuxpaint-stamps-default
    dpkg-deb --extract tuxpaint-stamps-default_*.deb UNPACKED
    python benchmarks/stamps.py UNPACKED --out FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CATEGORIES = (
    *(f"animals/mammals/{n}" for n in ("apes", "aquatic", "bovines", "deer", "dogs", "rodents")),
    "animals/marsupials",
    "food/vegetables",
    "hobbies/music/percussion",
    "hobbies/music/string",
    "household/tools",
    "military/vehicles",
    "plants/flowers",
    "plants/mushrooms",
    "sports",
)
INSIDE = Path("usr/share/tuxpaint/stamps")
COVERED = (0.05, 0.9)
LEAST_SIDE, MOST_SIDE, LEAST_PICTURES = 60, 256, 3


def usable(picture: Image.Image) -> bool:
    """Whether it is a cut-out of some size whose object neither is tiny nor fills the frame."""
    if picture.mode != "RGBA" or min(picture.size) < LEAST_SIDE:
        return False
    alpha = np.asarray(picture.getchannel("A").resize((64, 64)))
    return bool(COVERED[0] <= (alpha > 127).mean() <= COVERED[1])


def make(source: Path, out: Path) -> dict[str, int]:
    """Writes the folders; gives how many pictures each category has.

    Raises:
        SystemExit: If the package lies elsewhere, or ``out`` is there already.
    """
    root = source / INSIDE if (source / INSIDE).is_dir() else source
    if not (root / CATEGORIES[0]).is_dir():
        raise SystemExit(f"{source} is not the unpacked package tuxpaint-stamps-default.")
    if out.exists():
        raise SystemExit(f"{out} is there already; name a folder that is not.")
    counts = {}
    for category in CATEGORIES:
        pictures = {path.name: Image.open(path) for path in sorted((root / category).glob("*.png"))}
        kept = {name: picture for name, picture in pictures.items() if usable(picture)}
        if len(kept) < LEAST_PICTURES:
            continue
        folder = out / category.replace("/", "_")
        folder.mkdir(parents=True)
        for name, picture in kept.items():
            picture.thumbnail((MOST_SIDE, MOST_SIDE), Image.Resampling.LANCZOS)
            picture.save(folder / name)
        counts[folder.name] = len(kept)
    return counts


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the folder and says what is in it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", type=Path, help="the unpacked package")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args(arguments)
    counts = make(options.source, options.out)
    for name, count in counts.items():
        print(f"{name}: {count}")
    print(f"{sum(counts.values())} pictures in {len(counts)} categories")


if __name__ == "__main__":
    main()
