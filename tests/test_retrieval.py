"""Retrieval: the ranking against plain loops and another library, then end to end on pictures."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from avsl_cases import small_avsl
from conftest import TinyNet
from pictures import noise
from torch import Tensor, nn

from simexplain import as_similarity_model, evaluate_retrieval
from simexplain.data.folders import Record, pictures_in
from simexplain.errors import ComparisonError, ImageError, ModelError, OutputError
from simexplain.evaluation.retrieval import Embedded, embedded, ranked_retrieval
from simexplain.metrics.ranking import Ranking, rank, ranked, same
from simexplain.models.base import DISTANCES
from simexplain.publishing import KINDS

NAMES = ("candidates", "relevant", "first", "nearest", "map_at_r", "r_precision")


def naive(distances: Tensor, relevant: Tensor, ignored: Tensor) -> list[dict[str, float]]:
    """The definitions, one query after the other: sort the candidates, walk along them."""
    result = []
    for query in range(len(distances)):
        candidates = [g for g in range(distances.shape[1]) if not ignored[query, g]]
        candidates.sort(key=lambda g: (float(distances[query, g]), bool(relevant[query, g]), g))
        hits = [bool(relevant[query, g]) for g in candidates]
        total = sum(hits)
        one: dict[str, float] = {"candidates": len(candidates), "relevant": total}
        one["first"] = hits.index(True) + 1 if total else 0
        one["nearest"] = candidates[0] if candidates else -1
        if total:
            precision = [sum(hits[: n + 1]) / (n + 1) for n in range(len(hits))]
            one["map_at_r"] = sum(p for p, h in zip(precision[:total], hits, strict=False) if h)
            one["map_at_r"] /= total
            one["r_precision"] = sum(hits[:total]) / total
            one["average_precision"] = (
                sum(p for p, h in zip(precision, hits, strict=True) if h) / total
            )
        result.append(one)
    return result


def check(ranking: Ranking, expected: list[dict[str, float]]) -> None:
    for query, one in enumerate(expected):
        for name in (*NAMES, "average_precision"):
            value = float(getattr(ranking, name)[query])
            if name in one:
                assert value == pytest.approx(one[name], abs=1e-12), (query, name)
            else:
                assert math.isnan(value)


@pytest.mark.parametrize("seed", range(6))
def test_the_ranking_is_that_of_a_plain_loop_with_ties_and_both_masks(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    distances = torch.randint(0, 7, (23, 31), generator=generator).double()
    relevant = torch.rand(23, 31, generator=generator) < 0.2
    ignored = torch.rand(23, 31, generator=generator) < 0.3
    relevant[0], ignored[1], relevant[2], ignored[3] = False, True, True, False
    check(ranked(distances, relevant, ignored), naive(distances, relevant, ignored))
    check(ranked(distances, relevant), naive(distances, relevant, torch.zeros(23, 31).bool()))


@pytest.mark.parametrize("distance", list(DISTANCES))
@pytest.mark.parametrize("block", [1, 7, 1000, None])
def test_blocks_change_nothing(distance: str, block: int | None) -> None:
    rows = nn.functional.normalize(torch.randn(60, 5, dtype=torch.float64), dim=1)
    rows[40:] = rows[:20]  # identical images of other classes
    labels, groups, own = torch.arange(60) % 7, torch.arange(60) % 4, torch.arange(60)
    relevant, files, sets = same(labels, labels), same(own, own), same(groups, groups)
    done: list[tuple[int, int]] = []
    result = rank(
        DISTANCES[distance], rows, rows, relevant, lambda part: files(part) | sets(part),
        block=block, progress=lambda *now: done.append(now),
    )  # fmt: skip
    everything = slice(0, 60)
    once = DISTANCES[distance](rows, rows[:40])[:, [*range(40), *range(20)]]
    check(result, naive(once, relevant(everything), files(everything) | sets(everything)))
    assert done[-1] == (60, 60)
    assert len(done) == (1 if block is None else -(-60 // block))


def test_memory_is_bounded_by_the_block() -> None:
    rows, labels = torch.randn(50, 3), torch.arange(50) % 5
    shapes = []

    def distance(q: Tensor, g: Tensor) -> Tensor:
        shapes.append((len(q), len(g)))
        return torch.cdist(q, g)

    rank(distance, rows, rows, same(labels, labels), block=8)
    assert shapes == [(8, 50)] * 6 + [(2, 50)]


_PEAK = """
import resource, torch
from simexplain.metrics.ranking import rank, same
from simexplain.publishing import KINDS

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

torch.set_num_threads(1)
rows, labels = torch.randn(20000, 8), torch.arange(20000) // 20
def ranked(count):
    rank(lambda q, g: 1 - q @ g.T, rows[:count], rows, same(labels[:count], labels))
ranked(200)
before = peak()
ranked(3000)
print(peak() - before)
"""


@pytest.mark.slow
def test_the_process_does_not_grow_with_the_queries() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True, timeout=300
    )
    assert float(done.stdout) < 80  # all distances alone are 229 MiB


def test_it_agrees_with_pytorch_metric_learning() -> None:
    calculators = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    knn = pytest.importorskip("pytorch_metric_learning.utils.inference")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    rows = nn.functional.normalize(torch.randn(90, 6), dim=1)
    labels = torch.cat([torch.full((size,), size) for size in (2, 3, 5, 30, 50)])
    names = ("precision_at_1", "mean_average_precision_at_r", "r_precision")
    calculator = calculators.AccuracyCalculator(
        include=(*names, "mean_average_precision"),
        k=89,
        knn_func=knn.CustomKNN(distances.LpDistance(normalize_embeddings=False)),
    )
    theirs = calculator.get_accuracy(rows, labels)
    own = torch.arange(90)
    ours = rank(DISTANCES["euclidean"], rows, rows, same(labels, labels), same(own, own))
    for name, values in zip(
        (*names, "mean_average_precision"),
        (ours.recall(1), ours.map_at_r, ours.r_precision, ours.average_precision),
        strict=True,
    ):
        assert float(values.mean()) == pytest.approx(theirs[name], abs=1e-6), name


def test_one_point_for_everything_finds_nothing() -> None:
    rows, labels, own = torch.ones(12, 4), torch.arange(12) // 4, torch.arange(12)
    result = rank(DISTANCES["cosine"], rows, rows, same(labels, labels), same(own, own))
    assert result.first.tolist() == [9] * 12
    assert result.recall(8).sum() == 0
    assert result.map_at_r.sum() == 0
    # The order of the gallery is no way around that.
    order = torch.randperm(12)
    moved = rank(
        DISTANCES["cosine"], rows, rows[order], same(labels, labels[order]), same(own, own[order])
    )
    assert torch.equal(moved.first, result.first)


def test_k_beyond_the_gallery_and_queries_with_nothing_to_find() -> None:
    distances = torch.tensor([[1.0, 2, 3], [1, 2, 3]])
    result = ranked(distances, torch.tensor([[False, False, True], [False, False, False]]))
    assert result.recall(2).tolist()[0] == 0
    assert result.recall(1000).tolist()[0] == 1
    assert math.isnan(result.recall(1000)[1])
    assert result.answerable.tolist() == [True, False]
    assert result.nearest.tolist() == [0, 0]
    with pytest.raises(ComparisonError, match="K of at least 1"):
        result.recall(0)


def test_what_cannot_be_ranked_is_refused() -> None:
    rows, mask = torch.randn(3, 2), same(torch.arange(3), torch.arange(3))
    for queries, gallery in ((rows[:0], rows), (rows, rows[:0])):
        with pytest.raises(ComparisonError, match="at least one query and one gallery"):
            rank(torch.cdist, queries, gallery, mask)
    with pytest.raises(ComparisonError, match="block"):
        rank(torch.cdist, rows, rows, mask, block=0)
    with pytest.raises(ComparisonError, match="finite embeddings"):
        rank(torch.cdist, rows, rows / 0 * 0, mask)
    with pytest.raises(ComparisonError, match="finite distances"):
        ranked(torch.full((1, 2), torch.nan), torch.ones(1, 2).bool())
    with pytest.raises(ComparisonError, match="one shape"):
        ranked(torch.zeros(1, 2), torch.ones(2, 1).bool())
    assert same(torch.tensor([-1, 0]), torch.tensor([-1, 0]))(slice(0, 2)).tolist() == [
        [False, False], [False, True],
    ]  # fmt: skip


# From here on with pictures.


def pictures(folder: Path, classes: dict[str, int]) -> list[Record]:
    """Pictures of noise, ``a/0.png`` and so on; the number of a picture is its group."""
    for index, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            picture = noise(24, 32, seed=100 * index + number)
            picture.save(folder / name / f"{number}.png")
    records = pictures_in(folder, labelled=True)
    return [Record(r.path, r.label, r.path.stem) for r in records]


def expected(model: nn.Module, queries: list[Record], gallery: list[Record], grouped: bool):
    """Means of the plain loop over embeddings made one by one."""
    base = as_similarity_model(model)

    def embeddings(records: list[Record]) -> Tensor:
        return embedded(model, records, batch_size=1).rows

    distances = base.distance(embeddings(queries), embeddings(gallery))
    relevant = torch.tensor([[q.label == g.label for g in gallery] for q in queries])
    ignored = torch.tensor(
        [[q.path == g.path or (grouped and q.group == g.group) for g in gallery] for q in queries]
    )
    return naive(distances, relevant, ignored)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("kind", ["plain", "avsl"])
def test_end_to_end_against_the_loop(tmp_path: Path, grouped: bool, kind: str) -> None:
    records = pictures(tmp_path, {"a": 5, "b": 3, "c": 1, "d": 2})
    model: nn.Module = TinyNet().eval() if kind == "plain" else small_avsl()
    result = evaluate_retrieval(model, records, grouped=grouped, ranks=(2, 1), batch_size=4)
    lines = expected(model, records, records, grouped)
    check(result.ranking, lines)
    scored = [line for line in lines if line["relevant"]]
    assert len(scored) == 10
    assert result.skipped == 1
    assert result.ks == (1, 2)
    for k in (1, 2):
        assert result.recall[k] == pytest.approx(sum(n["first"] <= k for n in scored) / 10)
    assert result.map_at_r == pytest.approx(sum(n["map_at_r"] for n in scored) / 10)
    assert result.settings["own group"] == ("ignored" if grouped else "counted")
    by_class = {one.label: one for one in result.classes}
    assert by_class["c"].queries == 0
    assert result.classes[-1].label == "c"
    own = [line for line, record in zip(lines, records, strict=True) if record.label == "b"]
    assert by_class["b"].map_at_r == pytest.approx(sum(n["map_at_r"] for n in own) / 3)
    recalls = [one.recall[1] for one in result.classes if one.queries]
    assert recalls == sorted(recalls)
    assert result.class_mean("recall", 1) == pytest.approx(sum(recalls) / 3)


def test_a_gallery_of_its_own_never_gives_back_the_same_file(tmp_path: Path) -> None:
    records = pictures(tmp_path / "all", {"a": 4, "b": 4})
    model = TinyNet().eval()
    both = evaluate_retrieval(model, records, records)
    among = evaluate_retrieval(model, records)
    for name in (*NAMES, "average_precision"):
        assert torch.equal(getattr(both.ranking, name), getattr(among.ranking, name))
    (tmp_path / "linked").symlink_to(tmp_path / "all")
    linked = [Record(r.path, r.label) for r in pictures_in(tmp_path / "linked", labelled=True)]
    again = evaluate_retrieval(model, records, linked)
    assert torch.equal(again.ranking.first, among.ranking.first)
    assert (among.settings["gallery"], both.settings["gallery"]) == ("queries", "separate")
    part = evaluate_retrieval(model, records[:3], records[2:])
    check(part.ranking, expected(model, records[:3], records[2:], False))
    assert len(part.gallery) == 6


def test_ranked_again_without_embedding_and_in_any_block(tmp_path: Path) -> None:
    records = pictures(tmp_path, {"a": 4, "b": 4})
    model = TinyNet().eval()
    actual = embedded(model, records, batch_size=3)
    assert actual.rows.shape == (8, 10)
    results = [ranked_retrieval(model, actual, block=block) for block in (1, 3, None)]
    assert len({json.dumps(result.to_json()) for result in results}) == 1
    fewer = Embedded(actual.rows[:5], actual.records[:5], {})
    assert ranked_retrieval(model, fewer, actual).to_json()["gallery"] == 8


def test_broken_pictures_are_listed_and_all_broken_is_an_error(tmp_path: Path) -> None:
    records = pictures(tmp_path, {"a": 3, "b": 3})
    records[1].path.write_bytes(b"no picture")
    result = evaluate_retrieval(TinyNet().eval(), records, batch_size=2)
    assert list(result.errors) == [str(records[1].path)]
    assert len(result.queries) == 5
    assert records[1] not in result.queries
    for record in records:
        record.path.write_bytes(b"no picture")
    with pytest.raises(ImageError, match="None of 6 pictures can be read, the first because"):
        evaluate_retrieval(TinyNet().eval(), records)


def test_errors_say_what_is_missing(tmp_path: Path) -> None:
    records = pictures(tmp_path / "one", {"a": 1, "b": 1})
    others = pictures(tmp_path / "two", {"c": 2, "d": 2})
    model = TinyNet().eval()
    cases = [
        (ImageError, "at least one query", ([],), {}),
        (ImageError, "gallery picture", (records, []), {}),
        (ComparisonError, "no class of 2 has them", (records,), {}),
        (ComparisonError, "has none of them", (records, others), {}),
        (ComparisonError, "of another group", ([Record(r.path, r.label, "x") for r in others],),
         {"grouped": True}),
        (ComparisonError, "K of at least 1", (others,), {"ranks": (0,)}),
        (ComparisonError, "K of at least 1", (others,), {"ranks": ()}),
        (ComparisonError, "Expected a class", ([Record(others[0].path)],), {}),
        (ComparisonError, "Expected a group", ([Record(r.path, r.label) for r in others],),
         {"grouped": True}),
    ]  # fmt: skip
    for kind, record, arguments, options in cases:
        with pytest.raises(kind, match=record) as caught:
            evaluate_retrieval(model, *arguments, **options)
        assert str(caught.value).endswith(".")


def test_embeddings_that_are_not_finite_name_the_picture(tmp_path: Path) -> None:
    records = pictures(tmp_path, {"a": 2, "b": 2})

    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean(dim=(2, 3)) * torch.nan

    with pytest.raises(ModelError, match=r"0\.png"):
        evaluate_retrieval(Broken(), records)


def test_a_model_with_one_batch_size_is_filled_up(tmp_path: Path) -> None:
    records = pictures(tmp_path, {"a": 3, "b": 4})
    tiny = TinyNet().eval()
    sizes = []

    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            sizes.append(len(images))
            return tiny(images)

    fixed = evaluate_retrieval(as_similarity_model(Fixed(), batch_size=3), records)
    assert sizes == [3, 3, 3]
    assert torch.equal(fixed.ranking.first, evaluate_retrieval(tiny, records).ranking.first)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    records = pictures(tmp_path, {"a": 3, "b": 3})
    model = TinyNet().train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    result = evaluate_retrieval(model, records)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    same_again = evaluate_retrieval(model.eval(), records)
    assert result.to_json() == same_again.to_json()


def test_json_tables_and_text(tmp_path: Path) -> None:
    records = pictures(tmp_path, {f"class {n:02}": 2 for n in range(12)} | {"lonely": 1})
    seen: list[tuple[str, int, int]] = []
    result = evaluate_retrieval(
        TinyNet().eval(), records, ranks=(1, 5), progress=lambda *now: seen.append(now)
    )
    assert ("Embedding queries", 25, 25) in seen
    assert seen[-1] == ("Ranking", 25, 25)
    record = result.to_json()
    assert (record["schema"], record["queries"], record["skipped"], record["gallery"]) == (
        1,
        24,
        1,
        25,
    )
    assert record["recall"] == {"1": result.recall[1], "5": result.recall[5]}
    assert record["classes"][-1]["class"] == "lonely"
    assert record["classes"][-1]["map_at_r"] is None
    json.dumps(record, allow_nan=False)
    lines = str(result).splitlines()
    assert lines[0].split() == ["Recall@1", "Recall@5", "MAP@R", "R-precision"]
    assert lines[4].startswith("worst 10 of 12 classes")
    assert len(lines) == 15
    assert result.settings["ties"] == "relevant last"
    first = result.table()[0]
    near = result.gallery[int(result.ranking.nearest[0])]
    assert (first["nearest"], first["nearest_class"]) == (str(near.path), near.label)
    assert len(result.table()) == 25


def test_the_class_taken_for_another(tmp_path: Path) -> None:
    names = pictures(tmp_path, {"a": 3, "b": 2, "c": 2})
    rows = torch.tensor([[0.0], [10], [20], [1], [11], [30], [31]])  # a, b and c on a line

    class Line(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean(dim=(2, 3))

    model = as_similarity_model(Line(), distance="euclidean")
    result = ranked_retrieval(model, Embedded(rows, tuple(names), {}))
    actual = {one.label: one.taken_for for one in result.classes}
    assert actual == {"a": "b", "b": "a", "c": None}


def test_saved_whole_or_not_at_all(tmp_path: Path) -> None:
    records = pictures(tmp_path / "data", {"a": 3, "b": 1, "c": 2})
    result = evaluate_retrieval(TinyNet().eval(), records)
    folder = tmp_path / "scores"
    files = result.write(folder, force=False)
    assert {path.name for path in folder.iterdir()} == set(KINDS["Retrieval"].names)
    printed = json.loads((folder / "retrieval.json").read_text(encoding="utf-8"))
    assert printed == {**result.to_json(files), "digests": printed["digests"]}
    with (folder / "queries.csv").open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["query"] for row in rows] == [str(record.path) for record in records]
    assert [row["map_at_r"] == "" for row in rows] == [r.label == "b" for r in records]
    with (folder / "classes.csv").open(encoding="utf-8", newline="") as opened:
        classes = list(csv.DictReader(opened))
    assert [row["class"] for row in classes] == [one.label for one in result.classes]
    assert float(classes[0]["recall_at_1"]) == result.classes[0].recall[1]
    with pytest.raises(OutputError, match="force"):
        result.write(folder, force=False)
    result.write(folder, force=True)
    assert result.save(tmp_path / "alone.json").exists()
