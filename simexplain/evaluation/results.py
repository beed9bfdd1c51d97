"""What was measured: plain numbers that can be read as tables and written as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from simexplain.errors import ComparisonError
from simexplain.metrics.intervals import FEW, Interval, bootstrap_difference
from simexplain.renaming import takes_old_names, with_old_names
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
