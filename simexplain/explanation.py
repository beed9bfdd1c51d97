"""The result of explaining: maps with everything needed to read, draw, cite and check them."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simexplain.checking import Agreement, Check, agreement_of, doubt_of
from simexplain.comparison import architecture, roles
from simexplain.data.images import Picture, pixels_of
from simexplain.data.preprocessing import Geometry, Preprocess
from simexplain.errors import check_choice
from simexplain.methods import METHODS, PIXELS, options_of
from simexplain.metrics.maps import peak_of, placed
from simexplain.models.moving import WHOLE, Region
from simexplain.publishing import numbered
from simexplain.rendering.overlay import RENDERERS, robust
from simexplain.results.codec import Views
from simexplain.results.result import Attachments, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALES = ("image", "shared")
ROOTED = ("focus",)
"""Methods whose maps fall off so steeply that figures draw their square root."""


@dataclass(frozen=True)
class Condition:
    """What the arrangement demands of the distances.

    Attributes:
        text: The condition in words and symbols.
        holds: Whether it holds; None where there is nothing to compare, as for a pair.
        margin: The farthest positive's distance below the nearest negative's; None likewise.
    """

    text: str
    holds: bool | None
    margin: float | None


@dataclass(frozen=True)
class GivenVector:
    """A member of a comparison that was given as a vector, so that it has no map.

    Attributes:
        member: Its number among all members; the anchor is 0.
        label: What it stands for, such as the text whose embedding it is.
        direction: Whether it is a direction rather than an embedding.
    """

    member: int
    label: str
    direction: bool = False


@dataclass(frozen=True)
class Explanation(Result):
    """Heatmaps for ``B`` comparisons of ``K`` images, each an anchor, ``P`` positives, the rest.

    Where vectors were given beside the images (:attr:`vectors`), there are ``M`` members, images
    and vectors, of which ``K`` are images; else ``M`` is ``K``.

    Attributes:
        maps: ``(B,K,h,w)`` as the method defines them, not scaled; float32 or float64.
        layer_maps: For each layer its own maps ``(B,K,h,w)``.
        weights: ``(B,E)``, the weight vector of each comparison; or ``(B,K,E)``, the direction of
            each image; or, of a bank, ``(B,K,C)``, the channel weights of each image.
        scores: ``(B,K)``, the score whose gradient the maps are made of, or what else the method
            explains.
        embeddings: ``(B,M,E)``, unit rows at the model's own input size; given vectors as they
            were used.
        distances: ``(B,M-1)``, from the anchor to each other member, at that size.
        positives: ``P``, given vectors included.
        images: ``(B,K,C,H,W)``, the preprocessed images that the maps lie on.
        preprocess: How to make ``images`` visible again.
        method: Name of the method.
        model: Name of the model.
        layers: The layers used.
        options: Everything else that was chosen, as plain JSON values.
        warnings: What to know before trusting the maps.
        versions: Of the packages that made them.
        moved: ``(B,K)``, the cosine distance that upscaling moved each embedding; None without.
        unexplained: ``(B,K)``, the share of each score in [0, 1] that the positions of the layer do
            not account for (biases, what passes by it, errors of an integration); None where the
            method does not take scores apart.
        scale: ``image`` draws each map to its own maximum, ``shared`` to that of its comparison.
        pictures: The original pictures where files were explained (then ``B`` is 1), else empty.
        geometries: Where the images lie in the pictures; kept where the pictures are not, as
            after loading.
        vectors: The members that are given vectors.
        region: Top, left, bottom and right of what the maps' cells look at, as shares of the
            image; zero is drawn beyond it.
        frames: Where members are sets of frames, how many images each of them has, in order; then
            ``K`` counts frames, and what there is of each image is repeated for every frame of a
            set. Empty where every member is one image.
        layer_regions: The same of the own map of each layer, where several were joined that look
            at different parts.
        bypass: For each layer the share of the embedding that bypasses it, 0 to 1, where that is
            known; what bypasses a layer its map cannot show. Measured on the first two images of
            their size that the model explained, or on noise.
        others: What other methods found in the same comparisons, the further rows of a figure;
            these have no others themselves. See :attr:`rows`.
        check: What became of the claim when parts of the images were hidden; None unless requested.
    """

    maps: Tensor
    layer_maps: Annotated[Mapping[str, Tensor], "layer"]
    weights: Tensor
    scores: Tensor
    embeddings: Tensor
    distances: Tensor
    positives: int
    images: Views
    preprocess: Preprocess
    method: str
    model: str
    layers: tuple[str, ...]
    options: Mapping[str, Any]
    warnings: tuple[str, ...]
    versions: Mapping[str, str]
    moved: Tensor | None = None
    scale: str = "image"
    pictures: tuple[Picture, ...] = field(default=(), repr=False)
    geometries: tuple[Geometry, ...] = field(default=(), repr=False)
    unexplained: Tensor | None = None
    vectors: tuple[GivenVector, ...] = ()
    region: Region = WHOLE
    bypass: Mapping[str, float] = field(default_factory=dict)
    others: tuple[Explanation, ...] = field(default=(), repr=False)
    check: Check | None = field(default=None, repr=False)
    layer_regions: Mapping[str, Region] = field(default_factory=dict)
    frames: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_choice("scale", self.scale, SCALES)

    def __len__(self) -> int:
        return int(self.maps.shape[0])

    @property
    def rows(self) -> tuple[Explanation, ...]:
        """This explanation and those of :attr:`others`."""
        return (self, *self.others)

    @property
    def title(self) -> str:
        """What a row of a figure is called: the two of the default say what they are."""
        return _title(self.method, self.layers, self.options)

    def agreement(self, index: int = 0) -> tuple[Agreement, ...]:
        """How far each of the other rows shows what the first one shows in comparison ``index``."""
        heats = [row.heatmaps_at(index) for row in self.rows]
        peaks = [row.view_peaks(index) for row in self.rows]
        return tuple(
            agreement_of(
                (self.title, row.title), (heats[0], heats[number]), (peaks[0], peaks[number]),
                (self.check, row.check), index,
            )
            for number, row in enumerate(self.others, start=1)
        )  # fmt: skip

    def doubt(self, index: int = 0) -> str | None:
        """Why no row of comparison ``index`` can be believed, by its check; else None."""
        return doubt_of([row.check for row in self.rows if row.check is not None], index)

    def placed(self, notes: Sequence[str] = (), **fields: Any) -> Explanation:
        """As :meth:`Result.placed`, in all rows."""
        own = super().placed(notes, **fields)
        return replace(own, others=tuple(row.placed(notes, **fields) for row in self.others))

    @property
    def negatives(self) -> int:
        """How many negatives each comparison has, ``N``."""
        return int(self.embeddings.shape[1]) - 1 - self.positives

    @property
    def places(self) -> tuple[int, ...]:
        """Which of the ``M`` members each of the ``K`` images is."""
        given = {vector.member for vector in self.vectors}
        shown = [n for n in range(int(self.embeddings.shape[1])) if n not in given]
        counts = self.frames or (1,) * len(shown)
        return tuple(n for n, count in zip(shown, counts, strict=True) for _ in range(count))

    @property
    def roles(self) -> tuple[str, ...]:
        """The role of each of the ``K`` images."""
        every = roles(self.positives, self.negatives)
        return tuple(every[position] for position in self.places)

    @property
    def members(self) -> tuple[str, ...]:
        """The role of each of the ``M`` members; ``positive vector`` and the like of vectors."""
        every = list(roles(self.positives, self.negatives))
        for vector in self.vectors:
            every[vector.member] = (
                "direction" if vector.direction else f"{every[vector.member]} vector"
            )
        return tuple(every)

    def kind(self, place: int) -> str:
        """What to call one of the ``K`` images where its role is not enough: which frame it is."""
        if not self.frames:
            return ""
        number = place + 1 - self.places.index(self.places[place])
        return f"{self.roles[place]}, frame {number}"

    @property
    def architecture(self) -> str:
        """The arrangement: siamese, triplet, quadruplet or set."""
        return architecture(self.positives, self.negatives)

    @property
    def layer(self) -> str:
        """The layers in one string, joined as their maps are."""
        return (" + " if self.joined == "sum" else " x ").join(self.layers)

    @property
    def joined(self) -> str:
        """What the maps of several layers are joined to: their ``product`` or ``sum``."""
        return str(getattr(METHODS.get(self.method), "joined", "product"))

    @property
    def heatmaps(self) -> Tensor:
        """``(B,K,H,W)`` float32 in [0, 1], for drawing over :attr:`images`.

        Maps are upsampled bilinearly with pixel centres at half-integers, negative values cut
        off, and divided by the true maximum, of all frames of a set; a zero map stays zero.
        """
        return self.drawn(self.maps)

    def heatmaps_at(self, index: int) -> Tensor:
        """``(K,H,W)``: the heatmaps of one comparison, without the work for all others."""
        return self.drawn(self.maps[index][None])[0]

    def drawn(self, maps: Tensor, layer: str | None = None) -> Tensor:
        """Any of this explanation's maps ``(B,K,h,w)`` as heatmaps, like :attr:`heatmaps`.

        Args:
            maps: The maps.
            layer: Whose own they are; None for joined ones.
        """
        size = self.images.shape[-2:]
        region = self.region if layer is None else self.layer_regions.get(layer, self.region)
        grown = placed(maps.float().relu(), (int(size[0]), int(size[1])), region)
        top = grown.amax(dim=(-2, -1), keepdim=True)
        if self.scale == "shared":
            top = top.amax(dim=-3, keepdim=True)
        elif self.frames:  # frames of one item are on one scale
            parts = torch.split(top, list(self.frames), dim=1)
            own = [part.amax(dim=1, keepdim=True).expand_as(part) for part in parts]
            top = torch.cat(own, dim=1)
        return (grown / torch.where(top > 0, top, torch.ones_like(top))).clamp(0, 1)

    @property
    def views(self) -> NDArray[np.uint8]:
        """``(B,K,H,W,3)``: the images as the network saw them, as pixels."""
        return self.preprocess.undo(self.images)

    def condition(self, index: int = 0) -> Condition:
        """Whether comparison ``index`` is as the arrangement demands, and by how much."""
        distances = self.distances[index].tolist()
        if any(vector.direction for vector in self.vectors):
            score = float(self.embeddings[index, 0] @ self.embeddings[index, 1])
            side = "on the side it points to" if score > 0 else "on the other side"
            return Condition(f"score f . d along the direction {score:+.3f}: {side}", None, None)
        near, far = distances[: self.positives], distances[self.positives :]
        if not near or not far:
            return Condition(
                "no condition: there is nothing to compare the distance with", None, None
            )
        text = {
            "triplet": "d(anchor, positive) < d(anchor, negative)",
            "quadruplet": "d(anchor, positive) < d(anchor, negative 1) and d(anchor, negative 2)",
        }.get(self.architecture, "every positive is closer to the anchor than every negative")
        margin = min(far) - max(near)
        return Condition(text, margin > 0, margin)

    def peaks(self, index: int = 0) -> list[tuple[float, float] | None]:
        """Where the evidence of each image is highest, ``(x, y)``; None for an empty map.

        In pixels of the original picture where files were explained, else of the image. Of a flat
        maximum the middle, see :func:`~simexplain.metrics.maps.peak_of`.
        """
        view_peaks = self.view_peaks(index)
        if not self.geometries:
            return view_peaks
        return [
            peak and geometry.point_to_original(*peak)
            for peak, geometry in zip(view_peaks, self.geometries, strict=True)
        ]

    def view_peaks(self, index: int = 0) -> list[tuple[float, float] | None]:
        """The same in pixels of :attr:`images`, whatever was explained."""
        places = [peak_of(heatmap) for heatmap in self.heatmaps_at(index)]
        return [position and (position[1] + 0.5, position[0] + 0.5) for position in places]

    def on_picture(
        self, place: int, index: int = 0, *, raw: bool = False
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """A picture and its heatmap at the picture's own resolution.

        Args:
            place: Which of the ``K`` images.
            index: Which comparison.
            raw: The heat of :attr:`heatmaps`, for measuring; else that which figures show: of maps
                on pixels a smoothed one on a robust scale, of ``focus`` the square root.

        Returns:
            RGB ``(H0,W0,3)`` and heat ``(H0,W0)`` in [0, 1]; zero where the network saw nothing.
        """
        heatmaps = self.heatmaps_at(index).cpu().numpy() if raw else heat_of(self, index)
        heatmap: NDArray[np.float32] = heatmaps[place]
        if not self.pictures:
            return self.preprocess.undo(self.images[index, place]), heatmap
        return pixels_of(self.pictures[place].image), self.geometries[place].to_original(heatmap)

    def figure(
        self, index: int = 0, *, styles: Sequence[str] = ("overlay",), by_layer: bool = False
    ) -> Figure:
        """A figure of comparison ``index``: pictures, heatmaps, roles, distances, verdict.

        Args:
            index: Which comparison.
            styles: One row of heatmaps for each: ``overlay``, ``contour``, ``spotlight``.
            by_layer: Below them one row for each layer alone, where several were given.
        """
        return self._draw(index, styles, by_layer=by_layer)

    def save(
        self, folder: str | Path, *, force: bool = False, styles: Sequence[str] = ("overlay",)
    ) -> dict[str, str]:
        """As :meth:`Result.save`.

        Args:
            folder: Made if missing.
            force: Replace the files of an explanation that is there already; others stay.
            styles: As for :meth:`figure`; the heatmap files are drawn in the first one.
        """
        return self.write(folder, force=force, styles=styles)

    def captions(self) -> list[str]:
        """One for each comparison."""
        about = f"{self.method} of a {self.architecture}"
        return [f"{about}, comparison {index + 1}" for index in range(len(self))]

    def attachments(self, styles: Sequence[str] = ("overlay",), **options: Any) -> Attachments:
        """A figure of each comparison, and every picture with the heat of every row."""
        files = self._figures(styles=styles, by_layer=True)
        for index in range(len(self)):
            tag = numbered(index, len(self))
            for position, role in enumerate(self.roles):
                for number, row in enumerate(self.rows, start=1):
                    mark = f"_row{number}" if number > 1 else ""
                    name = f"heatmap{tag}_{position}_{role}{mark and f'{mark}_{row.method}'}.png"
                    heated = partial(row.heated, position, index, styles)
                    files[f"heatmap{tag}_{position}{mark}"] = (name, heated)
        return files

    def heated(
        self, position: int, index: int = 0, styles: Sequence[str] = ("overlay",)
    ) -> NDArray[np.uint8]:
        """A picture at its own resolution with its heat, drawn in the first of the styles."""
        drawn: NDArray[np.uint8] = RENDERERS[styles[0]](*self.on_picture(position, index))
        return drawn

    def notes(self, index: int = 0) -> tuple[str, ...]:
        """Why no row can be believed, if that is so, and the warnings of all rows."""
        doubt = self.doubt(index)
        warnings = (warning for row in self.rows for warning in row.warnings)
        return tuple(dict.fromkeys((*filter(None, [doubt]), *warnings)))

    def summary(self, **options: Any) -> dict[str, Any]:
        """What stands at the top is that of the first comparison and row."""
        comparisons = [self._fields_json(index) for index in range(len(self))]
        return {
            "architecture": self.architecture,
            "model": self.model,
            **self._row(),
            "scale": self.scale,
            **comparisons[0],
            "warnings": list(dict.fromkeys(n for at in range(len(self)) for n in self.notes(at))),
            "versions": self.versions,
            "preprocess": self.preprocess,
            "comparisons": comparisons,
            "rows": [
                {
                    "title": row.title,
                    **row._row(),
                    "warnings": row.warnings,
                    "comparisons": [row._measured(index) for index in range(len(self))],
                }
                for row in self.rows
            ],
        }

    def from_store(self) -> Explanation:
        """Itself.

        Raises:
            ValueError: If its maps are not of its layers.
        """
        if any(row.layer_maps.keys() != set(row.layers) for row in self.rows):
            raise ValueError("maps of other layers")
        return self

    @property
    def placing(self) -> dict[str, Any]:
        """Where the maps lie and what bypasses their layers."""
        return {name: getattr(self, name) for name in ("region", "bypass", "layer_regions")}

    def _row(self) -> dict[str, Any]:
        """What differs from row to row, whatever the comparison."""
        names = ("method", "layer", "layers", "options")
        return {**{name: getattr(self, name) for name in names}, **self.placing}

    def _measured(self, index: int) -> dict[str, Any]:
        """What differs from row to row in one comparison."""
        return {
            "peaks": [_rounded(peak) for peak in self.peaks(index)],
            "scores": self.scores[index],
            "unexplained": None if self.unexplained is None else self.unexplained[index],
            "check": self.check and self.check.to_json(index),
        }

    def _fields_json(self, index: int) -> dict[str, Any]:
        """All of one comparison."""
        measured = self._measured(index)
        peaks = measured.pop("peaks")
        nothing: list[Any] = [None] * len(peaks)
        paths = [picture.path for picture in self.pictures] or nothing
        places = [position.to_json() for position in self.geometries] or nothing
        images = zip(paths, self.roles, peaks, places, strict=True)
        return {
            "images": [
                dict(zip(("path", "role", "peak", "geometry"), image, strict=True))
                for image in images
            ],
            "members": self.members,
            "frames": self.frames,
            "vectors": self.vectors,
            "distances": self.distances[index],
            "condition": self.condition(index),
            "moved": None if self.moved is None else self.moved[index],
            **measured,
            "agreement": [
                {**vars(agreement), "degree": agreement.degree}
                for agreement in self.agreement(index)
            ],
            "doubt": self.doubt(index),
        }


def on_pixels(explanation: Explanation) -> bool:
    """Whether the maps have a value of its own for every pixel."""
    fine = explanation.maps.shape[-2:] == explanation.images.shape[-2:]
    return explanation.layers == (PIXELS,) and fine


def heat_of(explanation: Explanation, index: int) -> NDArray[np.float32]:
    """The heat that figures draw ``(K,H,W)`` in [0, 1].

    That of ``heatmaps``; of maps on pixels, whose largest values are far above all others, a
    smoothed one on a robust scale (:func:`~simexplain.rendering.overlay.robust`); of ``focus``,
    whose values fall off steeply from the peak, the square root.
    """
    heatmaps: NDArray[np.float32] = explanation.heatmaps_at(index).cpu().numpy()
    if explanation.method in ROOTED:
        return np.sqrt(heatmaps)
    if not on_pixels(explanation):
        return heatmaps
    return robust(heatmaps, shared=explanation.scale == "shared")


def _rounded(peak: tuple[float, float] | None) -> list[float] | None:
    return peak and [round(value, 1) for value in peak]


def _title(method: str, layers: Sequence[str], options: Mapping[str, Any]) -> str:
    if method == "focus":
        return "where the match is"
    chosen = {field.name: field.default for field in options_of(METHODS.get(method))}
    changed = [f"{key} {value}" for key, value in options.items() if value != chosen.get(key)]
    if (
        method == "sam"
        and len(layers) == 1
        and not [line for line in changed if "upscale" not in line]
    ):
        return "similarity attention, as published"
    return ", ".join([method, *changed])


def versions() -> dict[str, str]:
    """Versions of everything that has a say in the numbers."""
    return dict(_versions())


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    """Read once: the metadata of installed packages lies on disk."""
    packages = ("simexplain", "torch", "torchvision", "timm", "numpy")
    packaged = tuple((name, version(name)) for name in packages)
    return (("python", platform.python_version()), *packaged)
