"""What retrieval and re-identification reached: means, lines by class or camera, failures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from simexplain.data.datasets import JUNK, is_distractor
from simexplain.data.folders import Record
from simexplain.evaluation.results import ScoreResult, aligned, number
from simexplain.metrics.ranking import Ranking, mean_defined
from simexplain.renaming import takes_old_names, with_old_names
from simexplain.results.result import Attachments, Row, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WORST = 10
_AVERAGES = ("map_at_r", "r_precision", "average_precision")


@dataclass(frozen=True)
class ClassRetrieval:
    """The means of one class over its queries that have something to find.

    Attributes:
        label: The class.
        queries: How many those are.
        recall: Recall@K by K; NaN without queries, as all that follows.
        map_at_r: MAP@R.
        r_precision: R-precision.
        average_precision: mAP.
        taken_for: The other class that most often stands first where its own does not; ties go to
            the name that sorts first, None without such a class.
    """

    label: str
    queries: int
    recall: Mapping[int, float]
    map_at_r: float
    r_precision: float
    average_precision: float
    taken_for: str | None


@dataclass(frozen=True)
class RankedQueries(ScoreResult):
    """A gallery ranked by queries: what retrieval and re-identification have in common."""

    ranking: Ranking
    queries: tuple[Record, ...]
    gallery: tuple[Record, ...]
    ranks: tuple[int, ...]

    @property
    def skipped(self) -> int:
        """Queries without a relevant picture in the gallery, which take no part in a mean."""
        return int((~self.ranking.answerable).sum())

    @property
    def counted(self) -> int:
        """Queries with a relevant picture."""
        return len(self.queries) - self.skipped

    def _by_rank(self, places: Sequence[int] | slice = slice(None)) -> dict[int, float]:
        """For each rank the share of some queries with a relevant picture among the first."""
        return {k: mean_defined(self.ranking.recall(k)[places]) for k in self.ranks}

    def _table(
        self, columns: Mapping[str, str], scores: Sequence[str], beside: Sequence[str]
    ) -> list[Row]:
        """One row a query: what it is, where the first relevant picture stands, what came first.

        ``columns`` has the fields of a record by their columns; ``beside`` are those that are
        listed of the nearest picture as well.
        """
        rows = []
        for index, record in enumerate(self.queries):
            row: Row = {"query": str(record.path), **_described(record, columns)}
            row |= {
                name: int(getattr(self.ranking, name)[index])
                for name in ("candidates", "relevant", "first")
            }
            row |= {name: float(getattr(self.ranking, name)[index]) for name in scores}
            nearest = int(self.ranking.nearest[index])
            near = self.gallery[nearest] if nearest >= 0 else None
            row["nearest"] = "" if near is None else str(near.path)
            about = _described(near, columns)
            rows.append({**row, **{f"nearest_{name}": about[name] for name in beside}})
        return rows


def _described(record: Record | None, columns: Mapping[str, str]) -> dict[str, str]:
    """Fields of a record as text by column; empty for what is not known."""
    return {name: str(getattr(record, field, None) or "") for name, field in columns.items()}


@takes_old_names
@dataclass(frozen=True)
class Retrieval(RankedQueries):
    """How well images of a query's class are found.

    Means are over the queries with a relevant image; see ``skipped`` for the others.

    Attributes:
        ranking: Where the relevant images stand for each query.
        queries: The queries, in the order of the ranking.
        gallery: The gallery, in the order of ``ranking.nearest``.
        ranks: The K of Recall@K.
        errors: Pictures that could not be read, with the reason.
        settings: How it was measured.
    """

    errors: Mapping[str, str]
    settings: Mapping[str, Any]

    @cached_property
    def recall(self) -> dict[int, float]:
        """Recall@K in [0, 1] by K."""
        return self._by_rank()

    @property
    def map_at_r(self) -> float:
        """MAP@R in [0, 1]."""
        return mean_defined(self.ranking.map_at_r)

    @property
    def r_precision(self) -> float:
        """R-precision in [0, 1]."""
        return mean_defined(self.ranking.r_precision)

    @property
    def average_precision(self) -> float:
        """Mean average precision over the whole ranking, in (0, 1]."""
        return mean_defined(self.ranking.average_precision)

    @cached_property
    def classes(self) -> tuple[ClassRetrieval, ...]:
        """Every class of the queries, the worst first: by Recall at the smallest K, then MAP@R.

        Classes whose queries all had nothing to find come last.
        """
        places: dict[str, list[int]] = {}
        for index, record in enumerate(self.queries):
            places.setdefault(str(record.label), []).append(index)
        scores = [self._of(label, own) for label, own in places.items()]
        return tuple(sorted(scores, key=self._badness))

    def _badness(self, one: ClassRetrieval) -> tuple[bool, float, float, str]:
        if not one.queries:
            return (True, 0, 0, one.label)
        return (False, one.recall[self.ranks[0]], one.map_at_r, one.label)

    def _of(self, label: str, places: list[int]) -> ClassRetrieval:
        ranking = self.ranking
        answerable = [index for index in places if ranking.relevant[index]]
        nearest = [self.gallery[row].label for row in ranking.nearest[answerable].tolist()]
        mistaken = Counter(str(other) for other in nearest if other != label)
        return ClassRetrieval(
            label=label,
            queries=len(answerable),
            recall=self._by_rank(places),
            **{name: mean_defined(getattr(ranking, name)[places]) for name in _AVERAGES},
            taken_for=min(mistaken, key=lambda name: (-mistaken[name], name), default=None),
        )

    def class_mean(self, name: str, k: int | None = None) -> float:
        """The mean over classes, which counts a class of three as much as one of three hundred.

        Args:
            name: ``recall``, ``map_at_r``, ``r_precision`` or ``average_precision``.
            k: For ``recall``, one of ``ranks``.
        """
        values = [
            one.recall[k] if k is not None else getattr(one, name)
            for one in self.classes
            if one.queries
        ]
        return sum(values) / len(values)

    def table(self) -> list[Row]:
        """One row a query: what it is, where the first relevant image stands, what came first."""
        return self._table({"class": "label", "group": "group"}, _AVERAGES, ("class",))

    def class_table(self) -> list[Row]:
        """One row a class, the worst first."""
        rows = []
        for one in self.classes:
            row: Row = {"class": one.label, "queries": one.queries}
            row |= {f"recall_at_{k}": value for k, value in one.recall.items()}
            row |= {name: getattr(one, name) for name in _AVERAGES}
            rows.append({**row, "taken_for": one.taken_for or ""})
        return rows

    def __str__(self) -> str:
        """Means over queries and over classes, then the worst classes, as plain text."""
        head = ("", *(f"Recall@{k}" for k in self.ranks), "MAP@R", "R-precision")
        by_query = [*self.recall.values(), self.map_at_r, self.r_precision]
        by_class = [self.class_mean("recall", k) for k in self.ranks]
        by_class += [self.class_mean("map_at_r"), self.class_mean("r_precision")]
        means = [
            head,
            ("mean over queries", *map(number, by_query)),
            ("mean over classes", *map(number, by_class)),
        ]
        counted = [one for one in self.classes if one.queries]
        worst = counted[:_WORST]
        title = (
            "class" if len(worst) == len(counted) else f"worst {_WORST} of {len(counted)} classes"
        )
        rows: list[tuple[str, ...]] = [
            (title, "queries", *(f"Recall@{k}" for k in self.ranks), "MAP@R", "taken for")
        ]
        for one in worst:
            values = [number(value) for value in (*one.recall.values(), one.map_at_r)]
            rows.append((one.label, str(one.queries), *values, one.taken_for or "-"))
        return f"{aligned(means)}\n\n{aligned(rows)}"

    def attachments(self, **options: Any) -> Attachments:
        """A line for each query and for each class."""
        return {
            "queries": ("queries.csv", lambda: Table(self.table())),
            "classes": ("classes.csv", lambda: Table(self.class_table())),
        }

    def summary(self, **options: Any) -> dict[str, Any]:
        """Means over queries and over classes, and each class."""
        by_class = {name: self.class_mean(name) for name in _AVERAGES}
        record = {
            "recall": self.recall,
            **{name: getattr(self, name) for name in _AVERAGES},
            "queries": self.counted,
            "skipped": self.skipped,
            "gallery": len(self.gallery),
            "class_mean": {
                "recall": {k: self.class_mean("recall", k) for k in self.ranks},
                **by_class,
            },
            "classes": [
                {
                    "class": one.label,
                    "queries": one.queries,
                    "recall": one.recall,
                    **{name: getattr(one, name) for name in _AVERAGES},
                    "taken_for": one.taken_for,
                }
                for one in self.classes
            ],
            "errors": self.errors,
            "settings": self.settings,
        }
        return {"kind": "retrieval", **with_old_names(record, "left_out", "broken")}


_LISTED = 20
_WHO = {"person": "label", "camera": "camera"}

FAILURE_COLUMNS = (
    "query", "person", "camera", "wrong", "wrong_person", "wrong_camera", "right", "right_person",
    "right_camera", "first", "average_precision", "distance_wrong", "distance_right",
)  # fmt: skip
"""Of ``failures.csv``; see :class:`Failure`."""


@dataclass(frozen=True)
class Failure:
    """A query whose first candidate is another person: a triplet to be explained.

    Attributes:
        query: The query.
        wrong: What stands first.
        right: The nearest picture of the query's person.
        first: The place of ``right``, from 2 on.
        average_precision: Of the query.
        distances: From the query to ``wrong`` and to ``right``.
    """

    query: Record
    wrong: Record
    right: Record
    first: int
    average_precision: float
    distances: tuple[float, float]

    def row(self) -> Row:
        """One line of a table."""
        row: Row = {"query": str(self.query.path), **_described(self.query, _WHO)}
        for name, record in (("wrong", self.wrong), ("right", self.right)):
            about = _described(record, _WHO)
            row |= {name: str(record.path), **{f"{name}_{k}": text for k, text in about.items()}}
        return {
            **row,
            "first": self.first,
            "average_precision": self.average_precision,
            "distance_wrong": self.distances[0],
            "distance_right": self.distances[1],
        }


@takes_old_names
@dataclass(frozen=True)
class Reidentification(RankedQueries):
    """How well persons are found before other cameras.

    Means are over the queries with a relevant picture; see ``skipped`` for the others.

    Attributes:
        ranking: Where the relevant pictures stand for each query.
        queries: The queries, in the order of the ranking.
        gallery: The gallery, in the order of ``ranking.nearest``; junk may be among it.
        ranks: Ranks of the CMC.
        junk: Pictures of junk, all ignored, in the gallery or left out before.
        failures: Queries whose first candidate is another person, worst first.
        errors: Pictures that could not be read, with the reason.
        settings: How it was measured.
    """

    junk: int
    failures: tuple[Failure, ...]
    errors: Mapping[str, str]
    settings: Mapping[str, Any]

    @cached_property
    def rank(self) -> dict[int, float]:
        """The CMC in [0, 1] by rank: how often the person is among the first so many."""
        return self._by_rank()

    @property
    def map(self) -> float:
        """Mean average precision in (0, 1]: the mean precision at the places of all relevant."""
        return mean_defined(self.ranking.average_precision)

    @property
    def map_trapezoid(self) -> float:
        """The same by trapezoids, as the authors' code for Market-1501 computes it."""
        return mean_defined(self.ranking.trapezoid_precision)

    @property
    def persons(self) -> int:
        """How many the queries show."""
        return len({record.label for record in self.queries})

    @property
    def searched(self) -> int:
        """Pictures of the gallery without junk, distractors among them."""
        return len(self.gallery) - sum(record.label == JUNK for record in self.gallery)

    @property
    def distractors(self) -> int:
        """Pictures of the gallery that are right for no query."""
        return sum(is_distractor(record.label) for record in self.gallery)

    def cmc(self, most: int = 50) -> Tensor:
        """The whole curve ``(most,)`` float64, from rank 1 on."""
        first = self.ranking.first[self.ranking.answerable]
        hits = first.clamp(max=most + 1).bincount(minlength=most + 2)[1 : most + 1]
        curve: Tensor = hits.cumsum(dim=0).double() / len(first)
        return curve

    def cameras(self) -> list[Row]:
        """One row for each camera of the queries: which of them is hard to search from."""
        rows = []
        for camera in sorted({str(record.camera) for record in self.queries}):
            own = [n for n, record in enumerate(self.queries) if record.camera == camera]
            row: Row = {"camera": camera, "queries": int(self.ranking.answerable[own].sum())}
            row |= {f"rank_{k}": value for k, value in self._by_rank(own).items()}
            rows.append({**row, "map": mean_defined(self.ranking.average_precision[own])})
        return rows

    def table(self) -> list[Row]:
        """One row a query: who it is, where the person first stands, what came first."""
        return self._table(_WHO, ("average_precision", "trapezoid_precision"), tuple(_WHO))

    def figure(self, most: int = 12) -> Figure:
        """The worst failures as pictures: query, what came first, who was meant.

        Args:
            most: How many at most.

        Raises:
            ImageError: If a picture cannot be read any more.
        """
        return self._draw(most)

    def __str__(self) -> str:
        """CMC and mAP over all queries and from each camera, as plain text."""
        head = ("", *(f"rank-{k}" for k in self.ranks), "mAP", "queries")
        rows = [(*map(number, (*self.rank.values(), self.map)), str(self.counted))]
        cells: list[tuple[str, ...]] = [head, ("all", *rows[0])]
        for row in self.cameras():
            values = [float(row[f"rank_{k}"]) for k in self.ranks] + [float(row["map"])]
            name = f"from camera {row['camera']}"
            cells.append((name, *map(number, values), str(row["queries"])))
        return aligned(cells)

    def attachments(self, **options: Any) -> Attachments:
        """A line for each query and for each failure; a figure where any failed."""
        failures = [one.row() for one in self.failures]
        drawn: Attachments = {"figure": ("failures.png", self.figure)} if failures else {}
        return {
            "queries": ("queries.csv", lambda: Table(self.table())),
            "failures": ("failures.csv", lambda: Table(failures, FAILURE_COLUMNS)),
            **drawn,
        }

    def summary(self, **options: Any) -> dict[str, Any]:
        """The CMC, each camera, and the worst failures."""
        record = {
            "rank": self.rank,
            "map": self.map,
            "map_trapezoid": self.map_trapezoid,
            "queries": self.counted,
            "skipped": self.skipped,
            "persons": self.persons,
            "gallery": self.searched,
            "distractors": self.distractors,
            "junk": self.junk,
            "cmc": self.cmc(),
            "cameras": self.cameras(),
            "failed": len(self.failures),
            "failures": [one.row() for one in self.failures[:_LISTED]],
            "errors": self.errors,
            "settings": self.settings,
        }
        return {"kind": "reid", **with_old_names(record, "left_out", "broken")}
