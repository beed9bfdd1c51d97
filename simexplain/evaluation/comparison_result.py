"""Several methods on one comparison, side by side, as text, figure and files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from simexplain.evaluation.faithfulness import means
from simexplain.evaluation.results import aligned, cost, number
from simexplain.explanation import Explanation, versions
from simexplain.results.codec import Arrays
from simexplain.results.result import Result, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ComparedMethod:
    """The explanation and scores of one method on the comparison.

    Attributes:
        name: As it was given.
        asked: The options that were given; all of them are in ``explanation.options``.
        explanation: Its maps and warnings, with the pictures where files were compared.
        scores: ``deletion``, ``insertion``, ``gain`` and, with masks, ``pointing`` and ``energy``:
            one number an image, NaN where undefined; one for all where they are masked together.
        agreement: ``spearman`` and ``cosine`` with the first method's heatmaps, as drawn: means
            over the images, NaN where all maps are flat.
        forwards: How many images passed forward through the network for the explanation.
        seconds: For the explanation alone, of one run, without reading the pictures.
        measuring: Seconds for the scores: its curves and its comparison with masks.
    """

    name: str
    asked: Mapping[str, Any]
    explanation: Annotated[Explanation, ""]
    scores: Mapping[str, tuple[float, ...]]
    agreement: Mapping[str, float]
    forwards: int
    seconds: float
    measuring: float = 0.0

    @property
    def means(self) -> dict[str, float]:
        """The mean over images of each score."""
        return means(self.scores)


@dataclass(frozen=True)
class MethodComparison(Result):
    """Methods side by side on one comparison; a notebook shows the figure by itself.

    Attributes:
        methods: In the given order; the others are compared with the first under ``agreement``.
        random: What a random map reaches in the same scores: what a method must beat.
        chance: With masks, what a random point (``pointing``) and a flat map (``energy``) reach.
        skipped: Methods that do not apply here, each with the reason.
        masks: For the places that have one, a boolean mask ``(H0,W0)``.
        notes: What to know of the pictures, whatever the method.
        settings: How it was measured.
        seconds: What all of it took, reading the pictures aside.
    """

    methods: Annotated[tuple[ComparedMethod, ...], "method"]
    random: Mapping[str, float]
    chance: Mapping[str, float]
    skipped: Mapping[str, str]
    masks: Mapping[int, Tensor]
    notes: tuple[str, ...]
    settings: Mapping[str, Any]
    seconds: float = 0.0

    def __getitem__(self, name: str) -> ComparedMethod:
        for method in self.methods:
            if method.name == name:
                return method
        raise KeyError(name)

    @property
    def first(self) -> Explanation:
        """The first method's explanation, for all that does not depend on the method."""
        return self.methods[0].explanation

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the scores that were measured."""
        return tuple(self.methods[0].scores)

    def best(self, metric: str) -> str:
        """The method with the best mean of a score; empty where none has a value."""
        sign = -1 if metric == "deletion" else 1
        signed = {m.name: sign * m.means[metric] for m in self.methods}
        known = {name: value for name, value in signed.items() if value == value}
        return max(known, key=lambda name: known[name]) if known else ""

    def table(self) -> list[Row]:
        """One row a method, the random map last: mean scores, agreement and cost."""
        rows: list[Row] = [
            {
                "method": method.name,
                "layer": method.explanation.layer,
                **method.means,
                **method.agreement,
                "forwards": method.forwards,
                "seconds": method.seconds,
                "measuring": method.measuring,
            }
            for method in self.methods
        ]
        empty = dict.fromkeys(("spearman", "cosine"), float("nan"))
        spent = dict.fromkeys(("forwards", "seconds", "measuring"), 0)
        rows.append({"method": "(random)", "layer": "", **self.random, **empty, **spent})
        return rows

    def __str__(self) -> str:
        """The table as plain text, with what was skipped."""
        head = ("method", *self.metrics, "agreement", "forwards", "seconds", "measuring")
        lines = [head]
        for method in self.methods:
            scores = [number(method.means[name], name) for name in self.metrics]
            agrees = number(method.agreement["spearman"], "agreement")
            spent = (str(method.forwards), cost(method.seconds), cost(method.measuring))
            lines.append((method.name, *scores, agrees, *spent))
        blank = ("", "", "", "")
        lines.append(("(random)", *(number(self.random[n], n) for n in self.metrics), *blank))
        if self.chance:
            levels = [number(self.chance[n], n) if n in self.chance else "" for n in self.metrics]
            lines.append(("(chance)", *levels, *blank))
        return "\n".join((aligned(lines), *self.remarks()))

    def remarks(self) -> list[str]:
        """Sentences that a reader of the table needs: undefined images, skipped methods."""
        lines = [
            f"Seconds are for explaining and for measuring; all of it took {cost(self.seconds)} s."
        ]
        lines = lines if self.seconds else []
        lines += [self.left_out()] if self.undefined() else []
        lines += [f"Skipped {name}: {reason}" for name, reason in self.skipped.items()]
        return lines

    def undefined(self) -> list[str]:
        """Images whose normalised areas are not defined, the same for all methods."""
        values = self.methods[0].scores["deletion"]
        names = self.first.roles if len(values) == len(self.first.roles) else ("all",)
        return [
            f"{role} (image {index + 1})"
            for index, (role, value) in enumerate(zip(names, values, strict=True))
            if value != value
        ]

    def left_out(self) -> str:
        """What to say of :meth:`undefined` images."""
        return (
            "Deletion and insertion leave out images that covering costs next to nothing, or "
            f"helps: {', '.join(self.undefined())}."
        )

    def figure(self, style: str = "overlay") -> Figure:
        """A row of overlays for each method below the pictures, with its scores beside it.

        Args:
            style: A name in ``RENDERERS``.

        Raises:
            ComparisonError: If the style does not exist.
        """
        return self._draw(style)

    def save(
        self, folder: str | Path, *, force: bool = False, style: str = "overlay"
    ) -> dict[str, str]:
        """As :meth:`Result.save`, in this style of :meth:`figure`."""
        return self.write(folder, force=force, style=style)

    def captions(self) -> list[str]:
        """Of its figure."""
        return [f"methods side by side: {', '.join(method.name for method in self.methods)}"]

    def more_arrays(self) -> Arrays:
        """The maps ``(K,h,w)`` of each method as ``maps_N``, and the ``views`` of the first."""
        maps = [method.explanation.maps[0].cpu().numpy() for method in self.methods]
        named = {f"maps_{index}": own for index, own in enumerate(maps)}
        return {"views": self.first.views[0], **named}

    def to_store(self) -> MethodComparison:
        """With masks as the network sees them, where they are not so already."""
        if not self.first.pictures:
            return self
        places = self.first.geometries
        masks = {
            index: torch.from_numpy(places[index].from_original(mask.numpy()))
            for index, mask in self.masks.items()
        }
        return replace(self, masks=masks)

    def summary(self, **options: Any) -> dict[str, Any]:
        """What does not depend on the method, and a line for each of them."""
        first = self.first
        paths: list[str | None] = [picture.path for picture in first.pictures]
        return {
            "architecture": first.architecture,
            "model": first.model,
            "images": [
                {"path": path, "role": role}
                for path, role in zip(
                    paths or [None] * len(first.roles), first.roles, strict=True
                )
            ],
            "distances": first.distances[0],
            "condition": first.condition(),
            "methods": [_method_json(index, method) for index, method in enumerate(self.methods)],
            "random": self.random,
            "chance": self.chance,
            "skipped": [{"name": n, "reason": reason} for n, reason in self.skipped.items()],
            "undefined": self.undefined(),
            "settings": self.settings,
            "seconds": self.seconds,
            "warnings": self.notes,
            "versions": versions(),
        }  # fmt: skip


def _method_json(index: int, method: ComparedMethod) -> dict[str, Any]:
    explanation = method.explanation
    return {
        "name": method.name,
        "method": explanation.method,
        "layer": explanation.layer,
        "layers": explanation.layers,
        "options": explanation.options,
        "asked": method.asked,
        **method.means,
        "agreement": method.agreement,
        "forwards": method.forwards,
        "seconds": method.seconds,
        "measuring": method.measuring,
        "warnings": explanation.warnings,
        "per_image": method.scores,
        "maps": f"maps_{index}",
    }
