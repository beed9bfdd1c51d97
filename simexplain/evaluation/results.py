"""What was measured: plain numbers that can be read as tables and written as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from simexplain.errors import ComparisonError
from simexplain.explanation import Explanation, versions
from simexplain.metrics.intervals import FEW, Interval, bootstrap_difference
from simexplain.metrics.maps import mean_valid
from simexplain.renaming import takes_old_names, with_old_names
from simexplain.results.codec import Arrays
from simexplain.results.result import Attachments, Made, Result, Row, Table, kind_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGNED = ("gain", "agreement", "spearman", "cosine")
"""Numbers that can fall on both sides of zero in ordinary use, written with their sign."""


def number(value: float, name: str = "") -> str:
    """Three decimals, with a sign where the metric may have either; a dash for NaN."""
    if math.isnan(value):
        return "-"
    return f"{value:+.3f}" if name in SIGNED else f"{value:.3f}"


def ranged(interval: Interval, name: str = "") -> str:
    """A mean with the ends of its interval, where there is one; marked if of few values."""
    text = number(interval.mean, name)
    if math.isnan(interval.low):
        return text
    ends = f"{number(interval.low, name)}, {number(interval.high, name)}"
    return f"{text} {'?' if interval.few else ''}[{ends}]"


def cost(seconds: float) -> str:
    """Seconds with about three digits."""
    return (
        f"{seconds:.{0 if seconds >= 100 else 1 if seconds >= 10 else 2 if seconds >= 1 else 3}f}"
    )


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table: the first column to the left, numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def means(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean over images of each metric; NaN where none has a value."""
    return {
        name: mean_valid(torch.tensor(values, dtype=torch.float64))
        for name, values in scores.items()
    }


class ScoreResult(Result):
    """Numbers, which can be kept in one JSON file as well."""

    def save(self, path: str | Path, *, force: bool = False) -> Path:  # type: ignore[override]
        """Writes tables, figure, arrays and JSON into a folder, or one JSON file, atomically.

        Args:
            path: The folder; or a file, where it ends in ``.json``.
            force: Replace what is there; other files stay.

        Returns:
            The path of the JSON file.

        Raises:
            OutputError: If files are there already or cannot be written.
        """
        target = Path(path)
        alone = target.suffix == ".json"
        files = self.write(
            target.parent if alone else target, force=force, alone=target.name if alone else ""
        )
        return Path(next(name for name in files.values() if name.endswith(".json")))

    @classmethod
    def load(cls: type[Made], folder: str | Path) -> Made:
        """Reads what :meth:`save` wrote, a folder or a file; no code in it is ever run.

        Raises:
            OutputError: If the folder has no such result, or a damaged one.
        """
        path = Path(folder)
        alone = path.name if path.suffix == ".json" and not path.is_dir() else ""
        if alone == kind_of(cls).manifest and (path.parent / kind_of(cls).arrays).is_file():
            alone = ""
        return cls.read(path.parent if alone else path, alone)


@dataclass(frozen=True)
class FaithfulnessScores(ScoreResult):
    """Areas of deletion and insertion curves of ``B`` comparisons.

    Attributes:
        roles: Of the images in the columns; only ``all`` where they were masked together.
        deletion: ``(B,C)`` float64, areas normalised as in
            :class:`~simexplain.metrics.curves.Curve`; lower is better, NaN where covering costs
            next to nothing or even helps.
        insertion: ``(B,C)``; higher is better, NaN likewise.
        raw_deletion: ``(B,C)``, in units of the score, always defined.
        raw_insertion: ``(B,C)``.
        whole: ``(B,C)``, score of the whole images.
        empty: ``(B,C)``, score of the fully deleted images.
        settings: How it was measured.
    """

    roles: tuple[str, ...]
    deletion: Tensor
    insertion: Tensor
    raw_deletion: Tensor
    raw_insertion: Tensor
    whole: Tensor
    empty: Tensor
    settings: Mapping[str, Any]

    @property
    def gain(self) -> Tensor:
        """``raw_insertion - raw_deletion`` ``(B,C)``: always defined, higher is better.

        Random maps are not at zero: under ``blur`` a coarse random map may well gain, since the
        score does not fall evenly with the share that is covered. So compare with a random map,
        as ``compare`` and ``evaluate_faithfulness`` do; and as it depends on how much
        score there is to lose, compare methods on the same images only.
        """
        return self.raw_insertion - self.raw_deletion

    def table(self) -> list[Row]:
        """One row for each image of each comparison, with the same columns in all rows."""
        return [
            {
                "comparison": index,
                "image": position,
                "role": role,
                "deletion": float(self.deletion[index, position]),
                "insertion": float(self.insertion[index, position]),
                "gain": float(self.gain[index, position]),
                "whole": float(self.whole[index, position]),
                "empty": float(self.empty[index, position]),
            }
            for index in range(len(self.deletion))
            for position, role in enumerate(self.roles)
        ]

    def summary(self, **options: Any) -> dict[str, Any]:
        """All fields, and the gain."""
        return {"kind": "faithfulness", **vars(self), "gain": self.gain}


@dataclass(frozen=True)
class MethodScores:
    """What one method reached over a data set.

    Attributes:
        values: For each metric one number an item, NaN where undefined: the mean over its images.
        intervals: For each metric the mean over items with its confidence interval.
        seconds: Median time of an explanation, from the files to the maps.
        forwards: Median number of images that passed forward through the network for it.
        measuring: Median time of its scores: the curves, and the comparison with masks.
    """

    values: Mapping[str, tuple[float, ...]]
    intervals: Mapping[str, Interval]
    seconds: float
    forwards: float
    measuring: float = 0.0


@takes_old_names
@dataclass(frozen=True)
class Evaluation(ScoreResult):
    """Methods side by side on the same items.

    Attributes:
        methods: By the names that were given; controls are in brackets.
        items: The paths of each item.
        chance: What a random point (``pointing``) and a flat map (``energy``) reach; NaN without
            masks.
        errors: For each item and method that gave no number the reason.
        settings: How it was measured.
        seconds: What all of it took.
    """

    methods: Mapping[str, MethodScores]
    items: tuple[tuple[str, ...], ...]
    chance: Mapping[str, float]
    errors: Mapping[str, str]
    settings: Mapping[str, Any]
    seconds: float = 0.0

    def difference(self, one: str, other: str, metric: str = "gain") -> Interval:
        """By how much one method's mean exceeds another's on the items where both have a value.

        Raises:
            ComparisonError: If the method or the metric does not exist.
        """
        for name in (one, other):
            if name not in self.methods or metric not in self.methods[name].values:
                raise ComparisonError(
                    f"Expected methods of {', '.join(self.methods)} and a measured metric, got "
                    f"'{name}' and '{metric}'."
                )
        left, right = (self.methods[name].values[metric] for name in (one, other))
        return bootstrap_difference(
            left, right, level=self.settings["level"], seed=self.settings["seed"]
        )

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that have a value for some item: without masks, none needs them."""
        every = next(iter(self.methods.values())).intervals
        return tuple(
            name for name in every if any(m.intervals[name].count for m in self.methods.values())
        )

    @property
    def skipped(self) -> dict[str, str]:
        """Methods that gave no number on any item, with the reason on the first."""
        reasons: dict[str, str] = {}
        for where, reason in self.errors.items():
            name = where.partition(", ")[2]
            if name in self.methods and not self.methods[name].intervals["gain"].count:
                reasons.setdefault(name, reason)
        return reasons

    def figure(self) -> Figure:
        """Means with their intervals as dots, one panel a metric, controls and chance in grey."""
        return self._draw()

    def __str__(self) -> str:
        """The table as plain text: each mean with the ends of its interval."""
        head = ("method", *self.metrics, "forwards", "seconds", "measuring")
        skipped, lines = self.skipped, [head]
        for name, scores in self.methods.items():
            if name not in skipped:
                cells = [ranged(scores.intervals[metric], metric) for metric in self.metrics]
                passed = f"{scores.forwards:g}" if scores.forwards else ""
                spent = (
                    passed,
                    *(cost(s) if s else "" for s in (scores.seconds, scores.measuring)),
                )
                lines.append((name, *cells, *spent))
        if any(value == value for value in self.chance.values()):
            levels = [
                number(self.chance[name], name) if name in self.chance else ""
                for name in self.metrics
            ]
            lines.append(("(chance)", *levels, "", "", ""))
        return "\n".join((aligned(lines), *self.remarks()))

    def remarks(self) -> list[str]:
        """Sentences that a reader of the table needs: what its seconds are, intervals of few."""
        lines = []
        if self.seconds:
            each = "Seconds for one explanation, and for measuring it, are medians"
            lines.append(f"{each}; all of it took {cost(self.seconds)} s.")
        if self.few:
            lines.append(
                f"Intervals marked ? are of fewer than {FEW} comparisons and say next to nothing; "
                "measure more of them."
            )
        return lines

    @property
    def few(self) -> bool:
        """Whether some interval is of too few comparisons to say anything."""
        return any(
            interval.few and interval.count > 1
            for name, scores in self.methods.items() if name not in self.skipped
            for interval in scores.intervals.values()
        )  # fmt: skip

    def captions(self) -> list[str]:
        """Of its figure."""
        return ["faithfulness of methods"]

    def table(self) -> list[Row]:
        """One row a method: mean, ends of the interval and count for each metric, and the cost."""
        rows = []
        for name, scores in self.methods.items():
            row: Row = {"method": name}
            for metric, interval in scores.intervals.items():
                row[metric] = interval.mean
                row[f"{metric}_low"], row[f"{metric}_high"] = interval.low, interval.high
                row[f"{metric}_count"] = interval.count
                row[f"{metric}_few"] = interval.few
            spent = {name: getattr(scores, name) for name in ("seconds", "measuring", "forwards")}
            rows.append({**row, **spent})
        return rows

    def attachments(self, **options: Any) -> Attachments:
        """A line for each item and method, and the figure."""
        columns = ("item", "anchor", "method", *self.metrics)
        rows = [
            dict(zip(columns, (index, paths[0], name, *files), strict=True))
            for index, paths in enumerate(self.items)
            for name, scores in self.methods.items()
            for files in ([scores.values[metric][index] for metric in self.metrics],)
        ]
        return {"values": ("values.csv", lambda: Table(rows, columns)), **self._figures()}

    def summary(self, **options: Any) -> dict[str, Any]:
        """All fields, and what a reader of them needs."""
        fields = {**vars(self), "skipped": self.skipped, "notes": self.remarks()}
        return {"kind": "evaluation", **with_old_names(fields, "broken")}


@takes_old_names
@dataclass(frozen=True)
class SanityScores(ScoreResult):
    """How alike maps stay while the network forgets, from the last layer on.

    Attributes:
        depths: ``(D,)``, how many layers were forgotten each time; the first is 0.
        layers: The last layer that was forgotten each time; empty for none.
        agreement: For each measure in ``AGREEMENTS`` values ``(D,B,K)``, NaN where there was no
            map to compare or one was flat.
        roles: Of the ``K`` images.
        errors: For each depth without maps the reason.
        settings: How it was measured.
    """

    depths: tuple[int, ...]
    layers: tuple[str, ...]
    agreement: Mapping[str, Tensor]
    roles: tuple[str, ...]
    errors: Mapping[str, str]
    settings: Mapping[str, Any]

    def table(self) -> list[Row]:
        """One row a depth with the mean of each measure over all images."""
        return [
            {
                "forgotten": depth,
                "layer": layer,
                **{name: float(v[number].nanmean()) for name, v in self.agreement.items()},
            }
            for number, (depth, layer) in enumerate(zip(self.depths, self.layers, strict=True))
        ]

    def summary(self, **options: Any) -> dict[str, Any]:
        """All fields."""
        return {"kind": "sanity", **with_old_names(vars(self), "broken")}


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
