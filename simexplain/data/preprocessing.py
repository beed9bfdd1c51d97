"""From a picture to the tensor a network wants, and from the network's view back again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral, Real
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from simexplain.arguments import typed
from simexplain.data.arrays import as_rgb, fitting_bands
from simexplain.data.images import LARGE, Picture
from simexplain.errors import ImageError

FITS = ("crop", "squash", "pad")
INTERPOLATIONS = (
    "bilinear", "bicubic", "nearest", "nearest-exact", "box", "hamming", "lanczos",
)  # fmt: skip
RESIZINGS = ("pillow", "tensor", "float")
_MOST_ELONGATED = 50
_LARGEST_SIDE = 16384
_ROWS = 256


@dataclass(frozen=True)
class Geometry:
    """Where the network's view lies in the original picture.

    Attributes:
        original: ``(height, width)`` of the picture.
        resized: ``(height, width)`` it was resized to.
        offset: ``(top, left)`` of the view inside the resized picture; negative where padded.
        size: ``(height, width)`` of the view, the network's input.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    offset: tuple[int, int]
    size: tuple[int, int]

    @property
    def scale(self) -> tuple[float, float]:
        """Resized pixels per original pixel, vertically and horizontally."""
        return self.resized[0] / self.original[0], self.resized[1] / self.original[1]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The part of the picture that the network saw: left, top, right, bottom in pixels."""
        (height, width), (sy, sx), (top, left) = self.original, self.scale, self.offset
        return (
            max(0.0, left / sx),
            max(0.0, top / sy),
            min(float(width), (left + self.size[1]) / sx),
            min(float(height), (top + self.size[0]) / sy),
        )

    @property
    def seen(self) -> float:
        """The share of the picture's area that the network saw, in [0, 1]."""
        left, top, right, bottom = self.box
        return min(1.0, (right - left) * (bottom - top) / (self.original[0] * self.original[1]))

    def to_original(self, heatmap: NDArray[np.float32]) -> NDArray[np.float32]:
        """A heatmap over the view as one over the picture; zero where the network saw nothing.

        Args:
            heatmap: Shape ``size``; pixel centres at half-integers, bilinear in between.

        Returns:
            Shape ``original``.
        """
        (height, width), (sy, sx), (top, left) = self.original, self.scale, self.offset
        to_view = np.array(
            [[sx, 0, (sx - 1) / 2 - left], [0, sy, (sy - 1) / 2 - top]], dtype=np.float64
        )
        mapped: NDArray[np.float32] = cv2.warpAffine(
            np.ascontiguousarray(heatmap, dtype=np.float32),
            to_view,
            (width, height),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        left_edge, top_edge, right_edge, bottom_edge = self.box
        mapped[: math.floor(top_edge)] = 0
        mapped[math.ceil(bottom_edge) :] = 0
        mapped[:, : math.floor(left_edge)] = 0
        mapped[:, math.ceil(right_edge) :] = 0
        return mapped

    def point_to_original(self, x: float, y: float) -> tuple[float, float]:
        """A point ``(x, y)`` of the view in pixels of the picture, kept inside it."""
        (height, width), (sy, sx), (top, left) = self.original, self.scale, self.offset
        return (
            min(max((x + left) / sx, 0.0), float(width)),
            min(max((y + top) / sy, 0.0), float(height)),
        )

    def point_from_original(self, x: float, y: float) -> tuple[float, float]:
        """A point ``(x, y)`` of the picture in pixels of the view; the inverse, also outside it."""
        (sy, sx), (top, left) = self.scale, self.offset
        return x * sx - left, y * sy - top

    def from_original(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """A mask of the picture ``(H0,W0)`` as the view sees it ``(H,W)``; False where padded."""
        per_axis = []
        for index, scale in enumerate(self.scale):
            pixels = (np.arange(self.size[index]) + 0.5 + self.offset[index]) / scale
            per_axis.append(np.floor(pixels).astype(int))
        inside = [(n >= 0) & (n < most) for n, most in zip(per_axis, self.original, strict=True)]
        rows, columns = (
            n.clip(0, most - 1) for n, most in zip(per_axis, self.original, strict=True)
        )
        return np.asarray(mask[np.ix_(rows, columns)] & np.outer(*inside))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON from which :meth:`from_json` makes an equal object, and ``seen``."""
        return {**asdict(self), "seen": round(self.seen, 4)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Geometry:
        """The counterpart of :meth:`to_json`."""
        pairs: dict[str, Any] = {n: tuple(pair) for n, pair in values.items() if n != "seen"}
        return cls(**pairs)


@dataclass(frozen=True)
@typed
class Preprocess:
    """Resize, fit and normalise, as the network was trained to expect.

    Attributes:
        size: ``(height, width)`` of the input tensor.
        fit: ``crop`` the centre after resizing (what most networks were evaluated with),
            ``squash`` the picture to the input's aspect, or ``pad`` it with the mean colour.
        crop_fraction: Share of the resized picture that ``crop`` and ``squash`` keep, in (0, 2];
            above 1 a black border is added, as a few networks were evaluated.
        interpolation: ``bilinear``, ``bicubic``, ``nearest``, ``nearest-exact``, ``box``,
            ``hamming`` or ``lanczos``, always with antialiasing.
        mean: Subtracted from channels in [0, 1]; as many numbers as the network has channels. With
            one, pictures are read as grey; with more than three, from files of many bands.
        std: What channels are divided by afterwards.
        source: Where these values come from, for the user to read.
        notes: What a user should know about how the model was read.
        resizing: What resizes: ``pillow``, ``tensor`` (torchvision on 8-bit tensors) or ``float``
            (torchvision on tensors in [0, 1]). The latter two are what image processors of
            transformers do, and like them they round a centre crop's corner down.
        shown: Which channels figures draw as red, green and blue; with one or three channels those
            themselves, else the first three unless given.
    """

    size: tuple[int, int] = (224, 224)
    fit: str = "crop"
    crop_fraction: float = 1.0
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    source: str = "ImageNet defaults"
    notes: tuple[str, ...] = ()
    resizing: str = "pillow"
    shown: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ImageError(f"Expected fit to be one of {', '.join(FITS)}, got '{self.fit}'.")
        if not _is_number(self.crop_fraction) or not 0 < self.crop_fraction <= 2:
            raise ImageError(f"Expected crop_fraction in (0, 2], got {self.crop_fraction!r}.")
        _check_values(self)
        if self.shown and (
            len(self.shown) != 3 or not set(self.shown) <= set(range(self.channels))
        ):
            raise ImageError(
                f"Expected shown to be three of the channels 0 to {self.channels - 1}, got "
                f"{self.shown}."
            )
        if self.resizing not in RESIZINGS:
            raise ImageError(
                f"Expected resizing to be one of {', '.join(RESIZINGS)}, got '{self.resizing}'."
            )

    @property
    def channels(self) -> int:
        """How many channels the network's images have: 1 for grey, 3 for RGB, or more bands."""
        return len(self.mean)

    def drawn(self, picture: Picture) -> Picture:
        """The picture as figures show it: grey for a grey network, bands by :attr:`shown`."""
        if picture.bands is None and self.channels != 1:
            return picture
        bands = fitting_bands(picture.pixels, self.channels)
        return replace(picture, image=Image.fromarray(as_rgb(bands, self.shown)))

    def for_channels(self, channels: int) -> Preprocess:
        """The same for a network of another number of channels.

        Mean and std of grey are the mean of those of the colours; of other bands, whose range is
        unknown, 0 and 1, which leaves them as they are.
        """
        if channels == self.channels:
            return self
        if channels == 1:
            mean, std = (sum(values) / len(values) for values in (self.mean, self.std))
            return replace(self, mean=(round(mean, 6),), std=(round(std, 6),), shown=())
        return replace(self, mean=(0.0,) * channels, std=(1.0,) * channels, shown=())

    def __call__(self, image: Image.Image | NDArray[np.float32]) -> tuple[Tensor, Geometry]:
        """The input tensor ``(C,H,W)``, float32, and where it lies in the picture.

        Args:
            image: RGB, or bands ``(H,W,C)``.

        Raises:
            ImageError: If the picture is so elongated that its centre crop shows next to nothing,
                or has other channels than the network.
        """
        if not isinstance(image, Image.Image) or self.channels != 3:
            return self._other_channels(image)
        geometry = self.geometry((image.height, image.width))
        pixels = self._resized(image, geometry.resized)
        border = torch.tensor([round(255 * channel) / 255 for channel in self.mean]).clamp(0, 1)
        view = self._placed(pixels, geometry, border)
        return F.normalize(view, list(self.mean), list(self.std)), geometry

    def _resized(self, image: Image.Image, size: tuple[int, int]) -> Tensor:
        """The picture ``(C,h,w)`` in this size, in [0, 1], which ``float`` may overshoot."""
        mode = InterpolationMode(self.interpolation)
        if self.resizing == "pillow":
            tensor: Tensor = F.to_tensor(F.resize(image, list(size), mode))
            return tensor
        from torchvision.transforms.v2.functional import resize  # heavier than the first version

        pixels: Tensor = F.pil_to_tensor(image).contiguous()
        pixels = pixels * (1 / 255) if self.resizing == "float" else pixels
        resized: Tensor = resize(pixels, list(size), mode, antialias=True)
        return resized if self.resizing == "float" else resized.float() / 255

    def _other_channels(self, image: Image.Image | NDArray[np.float32]) -> tuple[Tensor, Geometry]:
        """The input tensor for grey networks, and from or for pictures of many bands."""
        bands = fitting_bands(image, self.channels)
        geometry = self.geometry((bands.shape[0], bands.shape[1]))
        values = torch.from_numpy(np.ascontiguousarray(bands)).movedim(-1, 0)
        resized = F.resize(
            values, list(geometry.resized), InterpolationMode(self.interpolation), antialias=True
        )
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        view = self._placed(resized, geometry, mean)
        return (view - mean.view(-1, 1, 1)) / std.view(-1, 1, 1), geometry

    def _placed(self, resized: Tensor, geometry: Geometry, border: Tensor) -> Tensor:
        """The view of a resized picture ``(C,h,w)``: cropped, or in a border of colour ``(C,)``."""
        (top, left), (height, width) = geometry.offset, geometry.size
        if self.fit != "pad":
            cropped: Tensor = F.crop(resized, top, left, height, width)
            return cropped
        view = border.view(-1, 1, 1).repeat(1, height, width)
        rows, columns = geometry.resized
        view[:, -top : rows - top, -left : columns - left] = resized
        return view

    def geometry(self, original: tuple[int, int]) -> Geometry:
        """Where the view of a picture of this ``(height, width)`` lies."""
        ratios = original[0] / self.size[0], original[1] / self.size[1]
        if self.fit == "pad":
            resized = tuple(max(1, round(side / max(ratios))) for side in original)
        elif self.fit == "squash":
            resized = self._before_crop()
        else:
            if max(original) > _MOST_ELONGATED * min(original):
                raise ImageError(
                    f"A picture of {original[1]}x{original[0]} is too elongated for its centre "
                    "crop to show it; choose fit='pad' or fit='squash'."
                )
            resized = self._covering(original)
        down = self.resizing != "pillow"
        top, left = (_centred(r, s, down=down) for r, s in zip(resized, self.size, strict=True))
        return Geometry(original, (resized[0], resized[1]), (top, left), self.size)

    def _before_crop(self) -> tuple[int, ...]:
        """The size to which a picture is brought, of which the network sees the centre."""
        return tuple(max(1, math.floor(side / self.crop_fraction)) for side in self.size)

    def _covering(self, original: tuple[int, int]) -> tuple[int, ...]:
        """The resized size whose centre crop the network sees, in timm's own rounding."""
        target = self._before_crop()
        if target[0] == target[1]:
            short, long = min(original), max(original)
            sides = (target[0], int(target[0] * long / short))
            return sides if original[0] <= original[1] else sides[::-1]
        ratio = min(original[0] / target[0], original[1] / target[1])
        return tuple(round(side / ratio) for side in original)

    def undo(self, images: Tensor) -> NDArray[np.uint8]:
        """Input tensors ``(...,C,H,W)`` as pictures ``(...,H,W,3)`` to look at.

        One channel is drawn as grey; of more than three those in :attr:`shown`, stretched.
        """
        mean, std = (torch.tensor(v).view(-1, 1, 1).to(images) for v in (self.mean, self.std))
        if self.channels != 3:
            plain = (images * std + mean).detach().float().movedim(-3, -1).cpu().numpy()
            flat = plain.reshape(-1, *plain.shape[-3:])
            pictures = np.stack([as_rgb(one, self.shown) for one in flat])
            return pictures.reshape(*plain.shape[:-1], 3)
        values = ((images * std + mean) * 255).round().clamp(0, 255).movedim(-3, -1)
        return np.asarray(values.detach().cpu().to(torch.uint8).numpy(), dtype=np.uint8)

    def redo(self, pictures: NDArray[np.uint8]) -> Tensor:
        """The counterpart of :meth:`undo`: ``(...,H,W,3)`` as input tensors ``(...,C,H,W)``.

        Of one or three channels only; a drawing of many bands does not hold them all.
        """
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        shown = pictures[..., : self.channels]
        return (torch.from_numpy(shown).movedim(-1, -3) / 255 - mean) / std

    def to_json(self) -> dict[str, Any]:
        """Plain JSON from which :meth:`from_json` makes an equal object."""
        return asdict(self)

    @classmethod
    def from_json(cls, options: dict[str, Any]) -> Preprocess:
        """The counterpart of :meth:`to_json`."""
        lists: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in options.items()
        }
        return cls(**lists)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_values(prepare: Preprocess) -> None:
    """Checks what pictures would otherwise fail on one by one, or what would make them NaN."""
    size, mean, std = prepare.size, prepare.mean, prepare.std
    whole = isinstance(size, (tuple, list)) and len(size) == 2
    if not whole or not all(
        isinstance(side, Integral) and not isinstance(side, bool) and 1 <= side <= _LARGEST_SIDE
        for side in size
    ):
        raise ImageError(
            f"Expected size as (height, width) in pixels from 1 to {_LARGEST_SIDE}, got {size!r}."
        )
    if prepare.interpolation not in INTERPOLATIONS:
        raise ImageError(
            f"Expected interpolation to be one of {', '.join(INTERPOLATIONS)}, got "
            f"{prepare.interpolation!r}."
        )
    for name, values in (("mean", mean), ("std", std)):
        good = isinstance(values, (tuple, list, np.ndarray)) and len(values) > 0
        if not good or not all(_is_number(value) for value in values):
            raise ImageError(f"Expected {name} as one finite number a channel, got {values!r}.")
    if len(mean) != len(std):
        raise ImageError(f"Expected as many values in mean as in std, got {mean!r} and {std!r}.")
    if not all(value > 0 for value in std):
        raise ImageError(f"Expected std above 0 in every channel, got {std!r}.")
    texts = prepare.notes if isinstance(prepare.notes, (tuple, list)) else (None,)
    if not all(isinstance(text, str) for text in (prepare.source, *texts)):
        raise ImageError("Expected source as a text and notes as several, got something else.")


ROUND = 0.95
"""How much less may be seen along one side than along the other without a note."""

_NAMED = 3


def hardly_seen(named: Iterable[tuple[str, Geometry]]) -> str:
    """A sentence on pictures so wide or tall that much of them is cut off; empty without any.

    The rim that a centre crop cuts off all around, of any picture, is not counted.
    """
    few: dict[str, float] = {}
    for name, geometry in named:
        (left, top, right, bottom), (height, width) = geometry.box, geometry.original
        along = (right - left) / width, (bottom - top) / height
        if min(along) < ROUND * max(along):
            few[name] = geometry.seen
    if not few:
        return ""
    shares = [f"{share:.0%} of '{name}'" for name, share in list(few.items())[:_NAMED]]
    more = f" and little of {len(few) - _NAMED} more" if len(few) > _NAMED else ""
    return (
        f"The network saw {', '.join(shares)}{more}, whose ends are cut off; --fit squash or pad "
        "(fit= in Python) shows them."
    )


def notes_of(prepare: Preprocess, pictures: Iterable[Picture | Seen]) -> tuple[str, ...]:
    """What a user should know about how the model and these pictures were read."""
    return prepare.notes + tuple(note for picture in pictures for note in picture.notes)


@dataclass(frozen=True)
class Seen:
    """What is remembered of a picture that was read: where the view lies in it, and its notes."""

    geometry: Geometry
    notes: tuple[str, ...]


def prepared(prepare: Preprocess, pictures: Sequence[Picture]) -> tuple[Tensor, list[Geometry]]:
    """Several pictures as one batch ``(M,C,H,W)``, and where each view lies in its picture.

    Raises:
        ImageError: If a picture is too elongated or has other channels; names it.
    """
    tensors, geometries = [], []
    for picture in pictures:
        try:
            tensor, geometry = prepare(picture.pixels)
        except ImageError as error:
            raise ImageError(f"'{picture.path}': {error}") from error
        tensors.append(tensor)
        geometries.append(geometry)
    return torch.stack(tensors), geometries


def _centred(resized: int, size: int, *, down: bool) -> int:
    """Where a centred view starts, in torchvision's rounding or down; negative where larger."""
    if resized < size:
        return -((size - resized) // 2)
    return (resized - size) // 2 if down else round((resized - size) / 2.0)


IMAGENET = Preprocess(crop_fraction=0.875)
"""The default where neither the checkpoint nor the architecture has a value."""


SIDE = 560
"""Pixels of the longer side."""


def shrunk(image: Image.Image | NDArray[np.uint8], longest: int = SIDE) -> NDArray[np.uint8]:
    """RGB ``(H,W,3)``, no side longer than ``longest``; a smaller picture is left as it is."""
    height, width = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
    share = min(1.0, longest / max(height, width))
    size = (max(1, round(width * share)), max(1, round(height * share)))
    if isinstance(image, np.ndarray) and height * width < LARGE:
        image = Image.fromarray(np.ascontiguousarray(image))
    elif isinstance(image, np.ndarray):  # first rows become shorter, some at a time
        parts = (image[top : top + _ROWS] for top in range(0, height, _ROWS))
        strips = [_lanczos(Image.fromarray(one), (size[0], len(one))) for one in parts]
        image = Image.fromarray(np.concatenate(strips))
    return _lanczos(image, size)


def _lanczos(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))


class Thumbnail:
    """A small picture on which maps and points of the network's view, or of the picture, are laid.

    Attributes:
        pixels: RGB ``(H,W,3)``.
        seen: The part that the network saw: left, top, right, bottom in its pixels; None for all.
    """

    def __init__(self, pixels: NDArray[np.uint8], geometry: Geometry | None = None) -> None:
        """Of a picture with its geometry, or of a view itself.

        Args:
            pixels: RGB ``(H,W,3)``, the picture reduced by any factor.
            geometry: Of the picture itself; None where the pixels are those of the view.
        """
        height, width = pixels.shape[:2]
        self.pixels, self.geometry = pixels, geometry
        self.shrink, self.seen = (1.0, 1.0), None
        if geometry is not None:
            self.shrink = width / geometry.original[1], height / geometry.original[0]
            self.geometry = replace(geometry, original=(height, width))
            if self.geometry.box != (0, 0, width, height):
                self.seen = self.geometry.box

    def heat(self, heatmap: NDArray[np.float32]) -> NDArray[np.float32]:
        """A map over the view as one over the small picture."""
        return heatmap if self.geometry is None else self.geometry.to_original(heatmap)

    def spot(self, x: float, y: float) -> tuple[float, float]:
        """A point of the picture in pixels of the small one, from the centre of the first."""
        return x * self.shrink[0] - 0.5, y * self.shrink[1] - 0.5

    def view_spot(self, x: float, y: float) -> tuple[float, float]:
        """The same of a point of the view."""
        if self.geometry is not None:
            x, y = self.geometry.point_to_original(x, y)
        return x - 0.5, y - 0.5
