"""Composes the bundled demo triplet from CC0 photographs in scikit-image.

The right answer is known by construction: anchor and positive share the cat and nothing else,
positive and negative share everything but the cat.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from skimage import data

TARGET = Path(__file__).parents[2] / "simexplain" / "data" / "demo"
SIZE = (480, 480)


def wall() -> Image.Image:
    """A plain plaster-like wall from the CC0 gravel texture, softened and warmed."""
    grey = Image.fromarray(data.gravel()).resize((960, 960)).crop((100, 100, 580, 580))
    soft = grey.filter(ImageFilter.GaussianBlur(2.5))
    values = 205 + (np.asarray(soft, dtype=float) - np.asarray(soft).mean()) * 0.22
    tint = np.stack([values, values * 0.975, values * 0.93], axis=-1)
    return Image.fromarray(tint.clip(0, 255).astype(np.uint8))


def hung(scene: Image.Image, print_: Image.Image, centre: tuple[int, int], angle: float) -> None:
    """Hangs a photographic print with a white border and a soft shadow on the scene."""
    framed = ImageOps.expand(print_, border=7, fill=(250, 249, 246)).convert("RGBA")
    turned = framed.rotate(angle, expand=True, resample=Image.Resampling.BICUBIC)
    shadow = Image.new("RGBA", scene.size)
    place = (centre[0] - turned.width // 2, centre[1] - turned.height // 2)
    shape = turned.getchannel("A").point(lambda alpha: alpha * 0.45)
    shadow.paste(
        Image.new("RGBA", turned.size, (0, 0, 0, 255)), (place[0] + 5, place[1] + 7), shape
    )
    scene.paste(
        shadow.filter(ImageFilter.GaussianBlur(6)),
        (0, 0),
        shadow.filter(ImageFilter.GaussianBlur(6)),
    )
    scene.paste(turned, place, turned)


def main() -> None:
    """Writes anchor.jpg, positive.jpg and negative.jpg."""
    cat = Image.fromarray(data.chelsea())
    coffee = Image.fromarray(data.coffee())
    man = Image.fromarray(data.camera()).convert("RGB")

    anchor = cat.crop((75, 0, 375, 300)).resize(SIZE, Image.Resampling.LANCZOS)
    other_cat = ImageOps.mirror(cat.crop((40, 10, 330, 290)))
    other_cat = ImageEnhance.Brightness(other_cat).enhance(1.12).resize((207, 200))
    cup = coffee.crop((110, 20, 510, 380)).resize((211, 190), Image.Resampling.LANCZOS)
    photographer = man.crop((120, 20, 420, 320)).resize((200, 200), Image.Resampling.LANCZOS)

    positive, negative = wall(), wall()
    hung(positive, cup, (135, 330), 3)
    hung(positive, other_cat, (335, 140), -4)
    hung(negative, cup, (135, 330), 3)
    hung(negative, photographer, (335, 140), -4)
    TARGET.mkdir(parents=True, exist_ok=True)
    for name, image in (("anchor", anchor), ("positive", positive), ("negative", negative)):
        image.save(TARGET / f"{name}.jpg", quality=88, optimize=True)
        print(TARGET / f"{name}.jpg")


if __name__ == "__main__":
    main()
