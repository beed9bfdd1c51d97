"""The result of explaining a model of two towers: one explanation for each tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from simexplain.explanation import Condition, Explanation
from simexplain.picturing import draw_tiles, footer, image_tiles, question, verdict
from simexplain.printing import json_text
from simexplain.publishing import Kind, numbered, published, read_back
from simexplain.rendering.overlay import RENDERERS
from simexplain.rendering.panel import as_html, png_of
from simexplain.saving import arrays_of, manifest, restored

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = 1
_MANIFEST, _ARRAYS, _SIDES = "pair.json", "pair.npz", ("first", "second")
_KIND = Kind("pair explanation", _MANIFEST, _ARRAYS, ("pair_",), SCHEMA)


@dataclass(frozen=True)
class PairExplanation:
    """Heatmaps of both sides of a pair model, whose images may differ in size.

    Attributes:
        first: The explanation of the anchors, for which the other images are given vectors.
        second: The explanation of the other images, for which the anchors are given vectors.
        score: The learned score ``(B,)``; None where embeddings are compared.
    """

    first: Explanation
    second: Explanation
    score: Tensor | None = None

    def __len__(self) -> int:
        return len(self.first)

    @property
    def sides(self) -> tuple[Explanation, Explanation]:
        """Both explanations."""
        return self.first, self.second

    @property
    def maps(self) -> tuple[Tensor, Tensor]:
        """``(B,1,h,w)`` of the anchors and ``(B,K-1,h',w')`` of the other images."""
        return self.first.maps, self.second.maps

    @property
    def heatmaps(self) -> tuple[Tensor, Tensor]:
        """The same at the size of the images, float32 in [0, 1]."""
        return self.first.heatmaps, self.second.heatmaps

    @property
    def distances(self) -> Tensor | None:
        """``(B,K-1)``, from the anchor to each other image; None where the score is learned."""
        return None if self.score is not None else self.first.distances

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to know before trusting the maps."""
        return tuple(dict.fromkeys(self.first.warnings + self.second.warnings))

    def condition(self, index: int = 0) -> Condition:
        """Whether comparison ``index`` is as the arrangement demands, and by how much."""
        if self.score is None:
            return self.first.condition(index)
        return Condition(f"learned score {float(self.score[index]):+.3f}", None, None)

    def verdict(self, index: int = 0) -> str:
        """One line: whether the condition holds, a pair's distance, or the learned score."""
        if self.score is not None:
            return self.condition(index).text
        if self.first.architecture == "siamese":
            return f"distance {float(self.first.distances[index, 0]):.3f}"
        return verdict(self.first, index)

    def figure(self, index: int = 0, *, styles: Sequence[str] = ("overlay",)) -> Figure:
        """A figure of comparison ``index``: both sides, their heatmaps and what compares them."""
        tiles = [image_tiles(side, index) for side in self.sides]
        title = question(self.first)
        if self.score is not None:
            tiles[1] = [replace(tile, role="positive", kind="second image") for tile in tiles[1]]
            tiles[0] = [replace(tile, kind="first image") for tile in tiles[0]]
            tiles = [[replace(tile, distance=None) for tile in side] for side in tiles]
            title = "What gives these two their score?"
        elif self.first.architecture == "siamese":
            title = f"What makes these two {'alike' if self.first.positives else 'different'}?"
        feet = dict.fromkeys(footer(side) for side in self.sides)
        return draw_tiles(
            [*tiles[0], *tiles[1]], title=title, verdict=self.verdict(index),
            explanations=self.sides, holds=self.condition(index).holds,
            footer="  |  ".join(feet), notes=self.warnings, styles=styles,
        )  # fmt: skip

    def save(
        self, folder: str | Path, *, force: bool = False, styles: Sequence[str] = ("overlay",)
    ) -> dict[str, str]:
        """Writes figures, heatmaps, ``pair.npz`` and ``pair.json``, all or none.

        Raises:
            OutputError: If files are there already, or the folder cannot be written.
        """
        folder, names = Path(folder), {"manifest": _MANIFEST, "maps": _ARRAYS}
        for index in range(len(self)):
            tag = numbered(index, len(self))
            names[f"figure{tag}"] = f"pair_figure{tag}.png"
            for name, side in zip(_SIDES, self.sides, strict=True):
                for place in range(len(side.roles)):
                    names[f"{name}{tag}_{place}"] = f"pair_{name}{tag}_{place}.png"
        files = {kind: str(folder / name) for kind, name in names.items()}
        with published(folder, list(names.values()), _KIND, force=force) as draft:
            self._draw(draft, names, styles)
            arrays = {
                f"{name}_{key}": array
                for name, side in zip(_SIDES, self.sides, strict=True)
                for key, array in arrays_of(side).items()
            }
            if self.score is not None:
                arrays["score"] = self.score.cpu().numpy()
            np.savez_compressed(draft / _ARRAYS, **arrays)
            text = json_text(self.to_json(files))
            (draft / _MANIFEST).write_text(text, encoding="utf-8")
        return files

    def to_json(self, files: dict[str, str]) -> dict[str, Any]:
        """The JSON contract of pair models; keys may be added in later versions, never changed."""
        sides = {name: manifest(side, {}) for name, side in zip(_SIDES, self.sides, strict=True)}
        score = None if self.score is None else self.score.tolist()
        return {"schema": SCHEMA, "score": score, **sides, "files": files}

    def _draw(self, draft: Path, names: dict[str, str], styles: Sequence[str]) -> None:
        for index in range(len(self)):
            tag = numbered(index, len(self))
            figure = self.figure(index, styles=styles)
            (draft / names[f"figure{tag}"]).write_bytes(png_of(figure))
            for name, side in zip(_SIDES, self.sides, strict=True):
                for place in range(len(side.roles)):
                    drawn = RENDERERS[styles[0]](*side.on_picture(place, index))
                    Image.fromarray(drawn).save(draft / names[f"{name}{tag}_{place}"])

    @classmethod
    def load(cls, folder: str | Path) -> PairExplanation:
        """Reads what :meth:`save` wrote; no code in it is ever run.

        Raises:
            OutputError: If the folder holds no pair explanation or a damaged one.
        """
        return read_back(Path(folder), _KIND, _restored)

    def _repr_html_(self) -> str:
        """What Jupyter shows: the figure of the first comparison."""
        return as_html(self.figure(), f"{self.first.method} of a pair model")


def _restored(said: dict[str, Any], arrays: dict[str, Any]) -> PairExplanation:
    import torch

    sides = [
        restored(
            said[name],
            {
                key.removeprefix(f"{name}_"): array
                for key, array in arrays.items()
                if key.startswith(f"{name}_")
            },
        )
        for name in _SIDES
    ]
    score = None if said["score"] is None else torch.from_numpy(arrays["score"])
    return PairExplanation(sides[0], sides[1], score)
