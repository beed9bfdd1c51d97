"""The result of explaining a model of two towers: one explanation for each tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from simexplain.explanation import Condition, Explanation
from simexplain.picturing import columns_of, draw_columns, footer, question, verdict
from simexplain.publishing import numbered
from simexplain.results.result import Attachments, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class PairExplanation(Result):
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
        names: Sequence[tuple[str, str] | None] = (None, None)
        title = question(self.first)
        if self.score is not None:
            names = (("anchor", "first image"), ("positive", "second image"))
            title = "What gives these two their score?"
        elif self.first.architecture == "siamese":
            title = f"What makes these two {'alike' if self.first.positives else 'different'}?"
        feet = dict.fromkeys(footer(row) for side in self.sides for row in side.rows)
        return draw_columns(
            [
                column
                for side, named in zip(self.sides, names, strict=True)
                for column in columns_of(side, index, styles, named=named)
                if column.heats
            ],
            self.sides, title=title, verdict=self.verdict(index), footer="\n".join(feet),
            holds=self.condition(index).holds, notes=self.warnings,
        )  # fmt: skip

    def save(
        self, folder: str | Path, *, force: bool = False, styles: Sequence[str] = ("overlay",)
    ) -> dict[str, str]:
        """As :meth:`Result.save`; the heatmap files are drawn in the first of the styles."""
        return self.write(folder, force=force, styles=styles)

    def captions(self) -> list[str]:
        """One for each comparison."""
        about = f"{self.first.method} of a pair model"
        return [f"{about}, comparison {index + 1}" for index in range(len(self))]

    def attachments(self, styles: Sequence[str] = ("overlay",), **options: Any) -> Attachments:
        """A figure of each comparison, and every picture with its heat."""
        files = self._figures(styles=styles)
        for index in range(len(self)):
            tag = numbered(index, len(self))
            for name, side in zip(("first", "second"), self.sides, strict=True):
                for position in range(len(side.roles)):
                    heated = partial(side.heated, position, index, styles)
                    files[f"{name}{tag}_{position}"] = (f"pair_{name}{tag}_{position}.png", heated)
        return files

    def summary(self, **options: Any) -> dict[str, Any]:
        """The learned score, and both sides as explanations."""
        first, second = (side.to_json() for side in self.sides)
        return {"score": self.score, "first": first, "second": second}
